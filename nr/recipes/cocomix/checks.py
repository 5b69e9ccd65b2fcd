"""What can be refused before any device time is spent, by field, value and remedy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nr import names
from nr.data.windows import SHIFTS
from nr.labels import MAX_CONCEPTS
from nr.models import parameters
from nr.models.concept_intervention import InterventionMode
from nr.models.concept_mixing_spec import MIXING
from nr.models.transformer import TransformerSpec
from nr.recipes.cocomix import autoencoder as autoencoder_stage
from nr.recipes.cocomix import corpus, label_corpus, labels, settings, text_measures
from nr.recipes.cocomix import teacher as teacher_stage
from nr.recipes.cocomix.method import sparse_autoencoder_method
from nr.recipes.cocomix.steering.protocol import REFERENCE_MODE
from nr.recipes.cocomix.students import arm_method, arm_training
from nr.recipes.sections import transformer_spec
from nr.training import defaults, sharding
from nr.training.method import Method
from nr.training.model_files import Model, build_model, graphdef_of
from nr.training.next_token import next_token_method
from nr.training.optimizers import make_optimizer
from nr.training.state import abstract_state, state_shardings


def validate(config: Any) -> None:
  """Checks everything that can be checked without data or device.

  Builds every model and optimizer abstractly, so that sizes, schedules and
  meshes that do not fit together are found here and not after the teacher.

  Raises:
    ValueError: one line with field, value and remedy.
  """
  _check_fields(config)
  if settings.steered_arm(config) is not None:
    _check_steering(config)
  given = teacher_stage.open_given(config) if config.teacher.checkpoint else None
  tokenizer = given.tokenizer if given is not None else corpus.given_tokenizer(config)
  vocab_size = config.tokenizer.vocab_size if tokenizer is None else tokenizer.vocab_size
  autoencoder_stage.check(config)
  text_measures.check(config)
  check_trainings(config, vocab_size, None if given is None else given.spec)


def check_trainings(config: Any, vocab_size: int, given_teacher: TransformerSpec | None = None) -> None:
  """Builds every model, method and optimizer abstractly; see `validate`.

  Args:
    config: the whole config.
    vocab_size: token ids of the tokenizer.
    given_teacher: settings of the teacher where one is given; else it is trained as the config says.
  """
  teacher = given_teacher or transformer_spec(config.teacher.model, vocab_size, config.window.length)
  autoencoder = settings.autoencoder_spec(config)
  for kind in settings.label_kinds(config):
    try:
      settings.attribution_spec(config, kind).check(autoencoder.max_active, autoencoder.num_latents)
    except ValueError as error:
      raise ValueError(f"targets.variants.{kind}: {error}" if kind else str(error)) from error
  if given_teacher is None:
    _check_training("teacher", config.teacher.train, next_token_method(teacher))
  if not config.sae.checkpoint:
    zeros_D = jnp.zeros(autoencoder.model_dim)
    _check_training("sae", config.sae.train, sparse_autoencoder_method(autoencoder, zeros_D, 1.0))
  teacher_model, autoencoder_model = _abstract(teacher), _abstract(autoencoder)
  for arm in settings.arm_names(config):
    try:
      spec = settings.student_spec(config, arm, vocab_size)
      method = arm_method(config, arm, spec, teacher_model, autoencoder_model)
    except ValueError as error:
      raise ValueError(f"students.arms.{arm}: {error}") from error
    _check_training("students", arm_training(config, arm, 0), method)


@functools.cache  # points of a sweep share most of their models
def _abstract(spec: Any) -> Model:
  """Returns a model whose parameters have shapes and no values."""
  params = jax.eval_shape(lambda: parameters.split(build_model(spec, jax.random.key(0)))[1])
  return Model(spec, graphdef_of(spec), params, "", {})


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
  if config.window.shift not in SHIFTS:
    raise ValueError(names.unknown("window.shift", config.window.shift, SHIFTS))
  if not config.students.seeds:
    raise ValueError("students.seeds=() is empty; name at least one seed, for example (0,)")
  _check_label_kinds(config)
  _check_arms(config)


def _check_label_kinds(config: Any) -> None:
  devices = config.labels.devices
  if not 0 <= devices <= jax.local_device_count():
    raise ValueError(
      f"labels.devices={devices}: this host has {jax.local_device_count()}; give 1 to {jax.local_device_count()}, "
      "or 0 for all"
    )
  label_corpus.check_division(config.labels.batch_size, labels.labelling_mesh(config))
  known = [name for name in config.targets if name != "variants"]
  for kind in config.targets.variants:
    for field in config.targets.variants[kind]:
      if field not in known:
        raise ValueError(names.unknown(f"field of targets.variants.{kind}", field, known))
  for kind in settings.label_kinds(config):
    source = settings.targets_of(config, kind)["source"]
    if source not in settings.SOURCES:
      where = f"targets.variants.{kind}" if kind else "targets"
      raise ValueError(names.unknown(f"{where}.source", source, settings.SOURCES))


def _check_arms(config: Any) -> None:
  arms, kinds = settings.arm_names(config), settings.label_kinds(config)
  if not arms:
    raise ValueError("students.arms: every concept.mode is empty; give at least one arm a mode")
  for field in ("baseline", "main"):
    if config.students[field] not in arms:
      raise ValueError(
        f"{names.unknown(f'students.{field}', config.students[field], arms)} (arms whose concept.mode is not empty)"
      )
  for arm in arms:
    section = config.students.arms[arm]
    if section.labels not in kinds:
      raise ValueError(names.unknown(f"students.arms.{arm}.labels", section.labels, kinds))
    if section.steps < 0:
      raise ValueError(f"students.arms.{arm}.steps={section.steps}: give 0 for students.train.steps, or more")
    try:
      settings.student_loss(config, arm)
    except ValueError as error:
      raise ValueError(f"students.arms.{arm}.{error}") from error
  steered = config.steer.arm
  if steered and (steered not in arms or settings.mode_of(config, steered) not in MIXING):
    mixing = [arm for arm in arms if settings.mode_of(config, arm) in MIXING]
    raise ValueError(
      f"steer.arm={steered!r} is no arm whose concepts reach the stream; choose one of {', '.join(mixing) or 'none'}"
    )


def _check_training(name: str, section: Any, method: Method) -> None:
  """Checks a training section with its method on the devices that are there."""
  try:
    sizes = sharding.mesh_sizes(section.mesh, jax.device_count())
    defaults.validate(section, sizes, jax.process_count())
    mesh = sharding.make_mesh(section.mesh)
    sharding.check_processes(mesh)
    optimizer = make_optimizer(section, method)
    state_shardings(method, abstract_state(method, optimizer), mesh)
  except ValueError as error:
    raise ValueError(f"{name}.train: {error}") from error


def _check_steering(config: Any) -> None:
  steer = config.steer
  if steer.prompt_tokens + steer.new_tokens > config.window.length:
    raise ValueError(
      f"steer.prompt_tokens + steer.new_tokens = {steer.prompt_tokens + steer.new_tokens} is more than "
      f"window.length={config.window.length}, the positions the students know; shorten one of them"
    )
  modes = [*(mode.name.lower() for mode in InterventionMode), REFERENCE_MODE]
  if steer.mode not in modes:
    raise ValueError(names.unknown("steer.mode", steer.mode, modes))
  if len(steer.strengths) < 2:
    raise ValueError(f"steer.strengths={steer.strengths} needs at least two values to sweep")
  outside = [concept for concept in steer.concepts if not 0 <= concept < config.sae.num_latents]
  if outside:
    raise ValueError(
      f"steer.concepts={tuple(steer.concepts)}: {outside} are outside 0..{config.sae.num_latents - 1}, "
      "the latents of sae"
    )
  if not steer.concepts and steer.num_concepts < 1:
    raise ValueError("steer.num_concepts=0 and steer.concepts=(): name a concept, or ask for at least one")
  if steer.prompts < 2:
    raise ValueError(f"steer.prompts={steer.prompts}: intervals need at least 2")
