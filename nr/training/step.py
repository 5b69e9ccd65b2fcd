"""The one train step: exact accumulation by weight, one division, one update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nr.objectives.weighted import LossOutput, Weighted
from nr.training import sharding, trees
from nr.training.method import SURVEY, Method
from nr.training.optimizers import Optimizer
from nr.training.state import TrainState, abstract_state, state_shardings

PyTree = Any


def _microbatches(batch: PyTree, accumulation: int, mesh: Mesh | None) -> PyTree:
  """Reshapes [B, ...] to [accumulation, B / accumulation, ...].

  Microbatch i takes rows i, i + accumulation, ...: every device splits the rows
  that it already holds, so no row travels.
  """

  def split(x: jax.Array) -> jax.Array:
    if x.shape[0] % accumulation:
      raise ValueError(
        f"accumulation: {accumulation} does not divide the {x.shape[0]} rows of the batch; change one of them"
      )
    x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
    if mesh is None:
      return x
    rows = sharding.partition_spec((None, "batch"))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rows))

  return jax.tree.map(split, batch)


def accumulate(
  method: Method, params: PyTree, frozen: PyTree, extra: PyTree, batch: PyTree, key: jax.Array,
  accumulation: int = 1, mesh: Mesh | None = None,
) -> tuple[PyTree, LossOutput]:  # fmt: skip
  """Sums loss, metrics, statistics and gradients of the summed loss over microbatches.

  A method's survey goes over all of them first.

  Args:
    method: the method; only its trainable parameters are differentiated.
    params: all parameters.
    frozen: the method's frozen arrays.
    extra: the method's extra state.
    batch: dictionary of arrays that lead with the row axis.
    key: key of this step; microbatch i uses fold_in(key, i).
    accumulation: number of microbatches.
    mesh: mesh of the rows, or None.

  Returns:
    (gradients of `loss.total` summed, float32, absent leaves where not trainable;
    the summed LossOutput).
  """
  trainable, fixed = trees.partition(params, trees.match_mask(params, method.trainable))

  def summed_loss(trainable: PyTree, rows: PyTree, key: jax.Array) -> tuple[jax.Array, LossOutput]:
    output = method.loss(trees.combine(trainable, fixed), frozen, extra, rows, key)
    if jnp.shape(output.loss.total) or jnp.shape(output.loss.weight):
      raise ValueError(f"Method {method.name!r}: the loss must be scalar sums; vectors belong in metrics")
    return output.loss.total.astype(jnp.float32), output

  gradient = jax.grad(summed_loss, has_aux=True)
  known: dict[str, PyTree] = {}
  if method.survey is not None:

    def look(rows: PyTree, index: jax.Array | int) -> PyTree:
      return method.survey(params, frozen, extra, rows, jax.random.fold_in(key, index))

    known[SURVEY] = _sum_microbatches(look, batch, accumulation, mesh)

  def one(rows: PyTree, index: jax.Array | int) -> tuple[PyTree, LossOutput]:
    rows = {**rows, **known} if known else rows
    gradients, output = gradient(trainable, rows, jax.random.fold_in(key, index))
    return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), output

  return _sum_microbatches(one, batch, accumulation, mesh)


def _sum_microbatches(
  function: Callable[[PyTree, jax.Array | int], PyTree], batch: PyTree, accumulation: int, mesh: Mesh | None
) -> PyTree:
  """Adds up what a function of (rows, number of the microbatch) returns."""
  if accumulation == 1:
    return function(batch, 0)
  rows = _microbatches(batch, accumulation, mesh)
  first = jax.tree.map(lambda x: x[0], rows)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first, 0))

  def add_one(total: PyTree, item: tuple[PyTree, jax.Array]) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, total, function(*item)), None

  return jax.lax.scan(add_one, zeros, (rows, jnp.arange(accumulation)))[0]


def make_train_step(
  method: Method, optimizer: Optimizer, accumulation: int = 1, seed: int = 0, *, mesh: Mesh | None = None
) -> Any:
  """Makes the jitted train step.

  The gradient is that of loss total / loss weight over the whole global batch: the
  sums are divided once, so any split into microbatches or devices gives the same
  update up to rounding. Randomness comes from fold_in(key(seed), step): nothing
  about it needs saving.

  Args:
    method: the method.
    optimizer: from `make_optimizer`; its state covers trainable parameters only.
    accumulation: microbatches a step.
    seed: seed of the run.
    mesh: if given, the state keeps its shardings; call inside `sharding.context(mesh)`.

  Returns:
    step(state, frozen, batch) -> (state, metrics). `state` is donated: do not use the
    argument afterwards. Metrics are Weighted by name: the method's, "loss",
    "gradient_norm" (before clipping) and "learning_rate".
  """

  def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Weighted]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    sums, output = accumulate(method, state.params, frozen, state.extra, batch, key, accumulation, mesh)
    weight = output.loss.weight.astype(jnp.float32)
    scale = jnp.where(weight == 0, 0.0, 1.0 / jnp.where(weight == 0, 1.0, weight))
    gradients = jax.tree.map(lambda g: g * scale, sums)
    trainable, fixed = trees.partition(state.params, trees.match_mask(state.params, method.trainable))
    updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
    params = trees.combine(optax.apply_updates(trainable, updates), fixed)
    extra = method.update_extra(state.extra, params, output.statistics, state.step)
    one = jnp.ones((), jnp.float32)
    metrics = dict(output.metrics)
    metrics["loss"] = output.loss
    metrics["gradient_norm"] = Weighted(optax.tree.norm(gradients), one)
    metrics["learning_rate"] = Weighted(optimizer.learning_rate(state.step), one)
    return TrainState(state.step + 1, params, opt_state, extra), metrics

  if mesh is None:
    return jax.jit(step, donate_argnums=0)
  placed = state_shardings(method, abstract_state(method, optimizer), mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, PartitionSpec())))
