"""The record by which a paper's training is known to the one training loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from nr.objectives.weighted import LossOutput

PyTree = Any
ALL = (".*",)
SURVEY = "survey"
"""Field of the batch in which the loss finds what `Method.survey` found."""


def _no_extra(params: PyTree) -> PyTree:
  """Returns the empty extra state."""
  del params
  return ()


def _keep_extra(extra: PyTree, params: PyTree, statistics: PyTree, step: jax.Array) -> PyTree:
  """Returns the extra state unchanged."""
  del params, statistics, step
  return extra


def _unconstrained(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns the optimizer unchanged."""
  return optimizer


class Method(NamedTuple):
  """All that the loop knows of a paper's training. Every function is pure.

  Paths in patterns are written "a/b/c"; the index of a layer kept apart from its
  neighbours is not part of the path, so one pattern serves both layouts.
  Patterns are regular expressions that must match the whole path.

  Attributes:
    name: short name, used in logs, checkpoints and errors.
    init: key -> parameters, nested dictionaries of float32 arrays (the master copy).
    loss: (params, frozen, extra, batch, key) -> LossOutput, sums and weights over
      the rows it is given; the loop divides once. Compute types are its business.
      The weights must not depend on the parameters.
    axes: tree like the parameters whose leaves are tuples of logical axis names.
    start: parameters to begin from instead of `init` (fine-tuning); they are copied.
    frozen: arrays the loss reads and training never touches (teacher, reference,
      autoencoder). They cross jit as an argument and are not donated.
    frozen_axes: logical names of `frozen`; None keeps a copy on every device.
    init_extra: params -> state without gradients (moving average, counters).
    extra_axes: logical names of the extra state; None gives a leaf whose path ends
      like a parameter's, and has its shape, that parameter's sharding, and
      keeps a copy of every other leaf on every device.
    update_extra: (extra, params, statistics, step) -> extra, after each update;
      `params` are the updated ones, `statistics` the sum over the microbatches,
      `step` the number of updates done before this one, int32.
    trainable: patterns of the parameters that are trained; the rest get neither
      gradients nor optimizer state.
    decay: patterns of the parameters that weight decay shrinks.
    constrain: wraps the whole optimizer, clipping included (for example: project
      the gradient, update, renormalise as part of the update).
    survey: (params, frozen, extra, batch, key) -> pytree of sums over the rows it is
      given, for a loss that needs to know something of the whole global batch
      (a mean, such as KTO's reference point). Added up over the microbatches
      before the first of them is differentiated, and handed to the loss as
      `batch[SURVEY]`, a constant. None: the loss needs nothing.
  """

  name: str
  init: Callable[[jax.Array], PyTree]
  loss: Callable[[PyTree, PyTree, PyTree, PyTree, jax.Array], LossOutput]
  axes: PyTree
  start: PyTree | None = None
  frozen: PyTree = {}
  frozen_axes: PyTree | None = None
  init_extra: Callable[[PyTree], PyTree] = _no_extra
  extra_axes: PyTree | None = None
  update_extra: Callable[[PyTree, PyTree, PyTree, jax.Array], PyTree] = _keep_extra
  trainable: tuple[str, ...] = ALL
  decay: tuple[str, ...] = ALL
  constrain: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _unconstrained
  survey: Callable[[PyTree, PyTree, PyTree, PyTree, jax.Array], PyTree] | None = None


class Evaluator(NamedTuple):
  """A measurement the loop takes every `eval_every` steps.

  Attributes:
    name: prefix of its numbers in the log, "name/key".
    run: (params, frozen, extra) -> numbers by name. It must not keep the arrays:
      the next training step reuses their memory.
  """

  name: str
  run: Callable[[PyTree, PyTree, PyTree], dict[str, float]]
