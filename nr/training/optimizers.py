"""Optimizers, schedules, clipping and decay masks, from a config section."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nr.training import trees
from nr.training.method import Method

PyTree = Any
Schedule = Callable[[jax.Array], jax.Array]
OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "cosine", "linear")


class Optimizer(NamedTuple):
  """An optax transformation together with its learning rate.

  Attributes:
    init: trainable parameters -> optimizer state.
    update: (gradients, state, parameters) -> (updates, state).
    learning_rate: number of updates done (int32) -> learning rate of the next one.
  """

  init: Callable[[PyTree], PyTree]
  update: Callable[..., tuple[PyTree, PyTree]]
  learning_rate: Schedule


def make_schedule(
  name: str, learning_rate: float, *, steps: int, warmup_steps: int = 0, final_fraction: float = 0.1
) -> Schedule:
  """Builds a learning-rate schedule over the count of updates done.

  The factor is count / warmup_steps during the warm-up (so the first update of a
  warmed-up run has rate 0), then, with p the fraction of the rest that is done,
  1 ("constant"), f + (1 - f)(1 + cos(pi p)) / 2 ("cosine") or 1 - (1 - f) p
  ("linear"), f the final fraction. Past the last step p stays 1.

  Args:
    name: "constant", "cosine" or "linear".
    learning_rate: the largest rate.
    steps: updates after which the rate has fallen to its final value.
    warmup_steps: updates of linear warm-up.
    final_fraction: final rate divided by the largest one.

  Raises:
    ValueError: unknown name, or numbers outside their range.

  Source: the cosine with a floor of transformers 4.44.2 (`cosine_with_min_lr`).
  """
  if name not in SCHEDULES:
    raise ValueError(f"schedule.name: {name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
  if not 0 <= warmup_steps <= steps:
    raise ValueError(
      f"schedule.warmup_steps: {warmup_steps} must lie between 0 and the {steps} steps of the schedule"
    )
  if not 0.0 <= final_fraction <= 1.0:
    raise ValueError(f"schedule.final_fraction: {final_fraction} must lie between 0 and 1")

  def rate(count: jax.Array) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    progress = jnp.clip((count - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    if name == "cosine":
      factor = final_fraction + (1 - final_fraction) * (1 + jnp.cos(math.pi * progress)) / 2
    elif name == "linear":
      factor = 1 - (1 - final_fraction) * progress
    else:
      factor = jnp.ones_like(progress)
    warm = count / max(1, warmup_steps)
    return learning_rate * jnp.where(count < warmup_steps, warm, factor)

  return rate


def _inner(config: Any, schedule: Schedule, decay: tuple[str, ...]) -> optax.GradientTransformation:
  """Builds the update rule named by `config.name`."""
  if config.name == "sgd":
    rule = optax.trace(config.beta1) if config.beta1 else optax.identity()
  else:
    rule = optax.scale_by_adam(
      b1=config.beta1, b2=config.beta2, eps=config.epsilon, mu_dtype=jnp.dtype(config.mu_dtype)
    )
  parts = [rule]
  if config.weight_decay:
    mask = functools.partial(trees.match_mask, patterns=decay)
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
  return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def make_optimizer(config: Any, method: Method) -> Optimizer:
  """Builds the optimizer of a training section for a method.

  Order: what `method.constrain` adds around everything; clip by the global norm of
  the gradients (`config.clip`, 0 for none); the rule; decoupled weight decay on
  the parameters that `method.decay` matches; the learning rate.

  Args:
    config: a training section, see `nr.training.defaults.get_training_config`.
    method: gives decay patterns and constraint.

  Returns:
    An Optimizer, to be initialised with the trainable part of the parameters.

  Raises:
    ValueError: naming the field, its value and what would be right.
  """
  section = config.optimizer
  if section.name not in OPTIMIZERS:
    raise ValueError(f"optimizer.name: {section.name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
  if section.name == "adam" and section.weight_decay:
    raise ValueError(
      f"optimizer.weight_decay: {section.weight_decay} has no meaning for 'adam'; set it to 0 or use 'adamw'"
    )
  for field in ("learning_rate", "weight_decay"):
    if not 0.0 <= section[field] < math.inf:
      raise ValueError(f"optimizer.{field}: {section[field]} must be a finite number, 0 or more")
  for field in ("beta1", "beta2"):
    if not 0.0 <= section[field] < 1.0:
      raise ValueError(f"optimizer.{field}: {section[field]} must lie in [0, 1)")
  if config.clip < 0:
    raise ValueError(f"clip: {config.clip} must be 0 (no clipping) or a positive norm")
  schedule = make_schedule(
    config.schedule.name,
    section.learning_rate,
    steps=config.schedule.steps or config.steps,
    warmup_steps=config.schedule.warmup_steps,
    final_fraction=config.schedule.final_fraction,
  )
  inner = _inner(section, schedule, method.decay)
  if config.clip:
    inner = optax.chain(optax.clip_by_global_norm(config.clip), inner)
  transformation = method.constrain(inner)
  return Optimizer(transformation.init, transformation.update, schedule)
