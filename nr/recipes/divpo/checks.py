"""What can be refused before any device time is spent, by field, value and remedy."""

import pathlib
from typing import Any

import jax

from nr.generation.transforms.text import parse
from nr.recipes.divpo import settings
from nr.recipes.policies import adapter_spec, check_base
from nr.recipes.sections import transformer_spec
from nr.training import defaults, sharding


def validate(config: Any) -> None:
  """Checks everything that can be checked without data or device.

  Raises:
    ValueError: one line with field, value and remedy.
  """
  if not config.seeds or len(set(config.seeds)) != len(config.seeds):
    raise ValueError(f"seeds={config.seeds}: name at least one seed, each once, for example (0,)")
  for name, section in (("base.train", config.base.train), ("train", config.train)):
    try:
      defaults.validate(section, sharding.mesh_sizes(section.mesh, jax.device_count()), jax.process_count())
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error
  for field in ("sampling.chain", "evaluate.chain"):
    section, name = field.split(".")
    try:
      parse(config[section][name])
    except ValueError as error:
      raise ValueError(f"{field}: {error}") from error
  if config.sampling.num_samples < 2:
    raise ValueError(f"sampling.num_samples={config.sampling.num_samples}: a pair takes at least 2")
  if not 2 <= config.evaluate.pool_size <= config.evaluate.samples:
    raise ValueError(
      f"evaluate.pool_size={config.evaluate.pool_size}: give 2 to evaluate.samples={config.evaluate.samples}"
    )
  _check_arms(config)
  check_base(config.base)
  adapter_spec(config)
  settings.task_of(config)
  if settings.is_toy(config):
    _check_toy(config)
  elif not pathlib.Path(config.base.checkpoint).expanduser().exists():
    raise ValueError(f"base.checkpoint={config.base.checkpoint!r}: there is no such file or folder")


def _check_arms(config: Any) -> None:
  for arm in config.arms:
    for section, make in (
      ("select", settings.selection_spec),
      ("loss", settings.preference_spec),
      ("group", settings.group_spec),
    ):
      try:
        make(config, arm)
      except ValueError as error:
        raise ValueError(f"arms.{arm}.{section}: {error}") from error
    for field in ("steps_per_round", "prompts_per_round", "sync_reference_every", "steps", "learning_rate"):
      if config.arms[arm][field] < 0:
        raise ValueError(f"arms.{arm}.{field}={config.arms[arm][field]}: give 0 or more")
  if settings.BASE in config.arms:
    raise ValueError(f"arms.{settings.BASE}: this name is the model that arms begin from; choose another")
  if not settings.arm_names(config):
    raise ValueError("arms: every select.method is empty; give at least one arm 'dpo' or 'divpo'")


def _check_toy(config: Any) -> None:
  task = settings.task_of(config)
  tokenizer = task.tokenizer()
  # Prompt, brackets, attributes and the end of text.
  needed = len(task.attributes) + 4
  for field in ("base.max_length", "sampling.max_length"):
    section, name = field.split(".")
    if config[section][name] < needed:
      raise ValueError(f"{field}={config[section][name]}: a persona takes {needed} tokens")
  spec = transformer_spec(config.base.model, tokenizer.vocab_size, config.base.max_length)
  longest = max(config.sampling.max_length, 1 + config.sampling.max_new_tokens)
  if spec.positions == "learned" and longest > config.base.max_length:
    raise ValueError(
      f"base.max_length={config.base.max_length}: pools need {longest} positions (sampling.max_length, or the "
      "prompt and sampling.max_new_tokens), and the model has learned ones; raise it to that"
    )
