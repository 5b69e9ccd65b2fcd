"""What can be refused before any device time is spent, by field, value and remedy."""

from typing import Any

import jax
import jax.numpy as jnp

from nr import names
from nr.labels import MAX_CONCEPTS
from nr.models.concept_intervention import InterventionMode
from nr.recipes.cocomix import settings
from nr.recipes.cocomix.method import sparse_autoencoder_method
from nr.recipes.cocomix.students import KINDS, student_method
from nr.recipes.sections import transformer_spec
from nr.training import defaults, sharding
from nr.training.method import Method
from nr.training.next_token import next_token_method
from nr.training.optimizers import make_optimizer
from nr.training.state import abstract_state, state_shardings

STUDENT_MODES = ("cocomix", "mix_only", "add")
"""Modes in which concepts reach the stream; without one there is nothing to steer."""


def validate(config: Any) -> None:
  """Checks everything that can be checked without data or device.

  Builds every model and optimizer abstractly, so that sizes, schedules and
  meshes that do not fit together are found here and not after the teacher.

  Raises:
    ValueError: one line with field, value and remedy.
  """
  _check_fields(config)
  _check_steering(config)
  vocab_size, length = config.tokenizer.vocab_size, config.window.length
  teacher = transformer_spec(config.teacher.model, vocab_size, length)
  autoencoder = settings.autoencoder_spec(config)
  settings.attribution_spec(config).check(autoencoder.k)
  zeros_D = jnp.zeros(autoencoder.model_dim)
  _check_training("teacher", config.teacher.train, next_token_method(teacher))
  _check_training("sae", config.sae.train, sparse_autoencoder_method(autoencoder, zeros_D, 1.0))
  for kind in KINDS:
    spec = settings.student_spec(config, kind, vocab_size)
    _check_training("students", config.students.train, student_method(config, kind, spec))


def _check_fields(config: Any) -> None:
  layers = config.teacher.model.num_layers
  if not 0 <= config.teacher.tap_layer < layers:
    raise ValueError(
      f"teacher.tap_layer={config.teacher.tap_layer} is outside the teacher: choose 0..{layers - 1}, its blocks from 0"
    )
  if config.sae.num_latents > MAX_CONCEPTS:
    raise ValueError(
      f"sae.num_latents={config.sae.num_latents}: labels are stored as uint16; use at most {MAX_CONCEPTS}"
    )
  if config.targets.source != "cache":
    raise ValueError(f"targets.source={config.targets.source!r} is not available yet; use 'cache'")
  if config.students.cocomix.kd_weight:
    raise ValueError(
      f"students.cocomix.kd_weight={config.students.cocomix.kd_weight} is not available yet; use 0"
    )
  mode = config.students.cocomix.concept.mode
  if mode in ("none", "prediction_only"):
    raise ValueError(
      f"students.cocomix.concept.mode={mode!r} mixes no concepts, so this recipe could not steer it; "
      f"use one of {', '.join(STUDENT_MODES)}"
    )
  if not config.students.seeds:
    raise ValueError("students.seeds=() is empty; name at least one seed, for example (0,)")


def _check_training(name: str, section: Any, method: Method) -> None:
  """Checks a training section with its method on the devices that are there."""
  try:
    sizes = sharding.mesh_sizes(section.mesh, jax.device_count())
    defaults.validate(section, sizes, jax.process_count())
    optimizer = make_optimizer(section, method)
    state_shardings(method, abstract_state(method, optimizer), sharding.make_mesh(section.mesh))
  except ValueError as error:
    raise ValueError(f"{name}.train: {error}") from error


def _check_steering(config: Any) -> None:
  steer = config.steer
  if steer.prompt_tokens + steer.new_tokens > config.window.length:
    raise ValueError(
      f"steer.prompt_tokens + steer.new_tokens = {steer.prompt_tokens + steer.new_tokens} is more than "
      f"window.length={config.window.length}, the positions the students know; shorten one of them"
    )
  modes = [mode.name.lower() for mode in InterventionMode]
  if steer.mode not in modes:
    raise ValueError(names.unknown("steer.mode", steer.mode, modes))
  if len(steer.strengths) < 2:
    raise ValueError(f"steer.strengths={steer.strengths} needs at least two values to sweep")
