"""What changes from step to step, and how it comes to be."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nr.training import sharding, trees
from nr.training.method import Method
from nr.training.optimizers import Optimizer

PyTree = Any
# Steps fold their own number into the seed's key; this number is no step's.
_INIT_STREAM = 2**32 - 1


class TrainState(NamedTuple):
  """The donated argument and result of a train step.

  Attributes:
    step: number of updates done, int32 scalar.
    params: parameters, nested dictionaries of float32 arrays.
    opt_state: optimizer state of the trainable parameters alone.
    extra: the method's state without gradients.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  extra: PyTree


def initial_params(method: Method, seed: int) -> PyTree:
  """Returns the parameters before the first update: those given to start from, or new ones."""
  if method.start is not None:
    return method.start
  return method.init(jax.random.fold_in(jax.random.key(seed), _INIT_STREAM))


def initial_state(method: Method, optimizer: Optimizer, params: PyTree) -> TrainState:
  """Builds the state before the first update. Pure; runs under jit and eval_shape."""
  trainable, _ = trees.partition(params, trees.match_mask(params, method.trainable))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(trainable),
    extra=method.init_extra(params),
  )


def abstract_state(method: Method, optimizer: Optimizer) -> TrainState:
  """Returns the state's shapes and types; makes no array.

  Raises:
    ValueError: a trainable or decay pattern of the method matches nothing.
  """
  state = jax.eval_shape(lambda: initial_state(method, optimizer, initial_params(method, 0)))
  trees.check_patterns(state.params, method.trainable, f"Method {method.name!r}, trainable")
  trees.check_patterns(state.params, method.decay, f"Method {method.name!r}, decay")
  return state


def _like_parameters(tree: PyTree, params: PyTree, param_shardings: PyTree, mesh: Mesh) -> PyTree:
  """Shards leaves whose path ends like a parameter's, with its shape, as that parameter; copies the rest."""
  known = {}
  for (path, leaf), placed in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(param_shardings)
  ):
    known[trees.names_of(path)] = (leaf.shape, placed)

  def place(path: Any, leaf: Any) -> NamedSharding:
    names = trees.names_of(path)
    for start in range(len(names)):
      shape, placed = known.get(names[start:], (None, None))
      if shape == leaf.shape:
        return placed
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(place, tree)


def state_shardings(method: Method, state: TrainState, mesh: Mesh) -> TrainState:
  """Returns a NamedSharding for every leaf of an (abstract) state.

  Optimizer moments follow their parameters. Raises ValueError as `sharding.shardings`.
  """
  params = sharding.shardings(method.axes, mesh, state.params)
  if method.extra_axes is None:
    extra = _like_parameters(state.extra, state.params, params, mesh)
  else:
    extra = sharding.shardings(method.extra_axes, mesh, state.extra)
  return TrainState(
    step=NamedSharding(mesh, PartitionSpec()),
    params=params,
    opt_state=_like_parameters(state.opt_state, state.params, params, mesh),
    extra=extra,
  )


def create_state(method: Method, optimizer: Optimizer, seed: int, mesh: Mesh | None = None) -> TrainState:
  """Makes the initial state, born sharded: no device ever holds a whole sharded array.

  Call it inside `sharding.context(mesh)` when a mesh is given.
  """
  placed = None if mesh is None else state_shardings(method, abstract_state(method, optimizer), mesh)
  if method.start is None:

    def make() -> TrainState:
      return initial_state(method, optimizer, initial_params(method, seed))

    return jax.jit(make, out_shardings=placed)()
  start = method.start if mesh is None else sharding.put_tree(method.start, placed.params)

  # Copied: steps donate the state, and who gave the parameters may go on to use them.
  def begin(params: PyTree) -> TrainState:
    return initial_state(method, optimizer, jax.tree.map(jnp.copy, params))

  return jax.jit(begin, out_shardings=placed)(start)


def place_frozen(method: Method, mesh: Mesh | None) -> PyTree:
  """Puts the method's frozen arrays on the mesh by `frozen_axes`, or a copy on every device."""
  if mesh is None:
    return jax.tree.map(jnp.asarray, method.frozen)
  if method.frozen_axes is None:
    placed = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), method.frozen)
  else:
    placed = sharding.shardings(method.frozen_axes, mesh, method.frozen)
  return sharding.put_tree(method.frozen, placed)
