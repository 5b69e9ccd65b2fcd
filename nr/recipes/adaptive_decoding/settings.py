"""From the config to the specs that models, losses and samplers take."""

import hashlib
from typing import Any

import jax
import numpy as np

from nr.models.adaptive_decoder import AdaptiveDecoderSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.latent_preference import LatentPreferenceSpec
from nr.recipes import sections
from nr.recipes.adaptive_decoding import families
from nr.recipes.adaptive_decoding.tasks.prompts import PromptTaskSpec


def is_toy(config: Any) -> bool:
  """Whether the language model is trained on the toy tasks: no checkpoint was given."""
  return not config.language_model.checkpoint


def transformer_spec(config: Any) -> TransformerSpec:
  """Returns the settings of the toy language model.

  Raises:
    ValueError: unknown family, or values that do not fit together.
  """
  try:
    model = config.language_model.model
    return sections.transformer_spec(model, families.TOKENIZER.vocab_size, families.LENGTH)
  except ValueError as error:
    raise ValueError(f"language_model.{error}") from error


def head_spec(config: Any, experiment: Any, model_dim: int | None = None) -> AdaptiveDecoderSpec:
  """Returns the settings of an experiment's head; of the toy model's width where none is given."""
  width = config.language_model.model.model_dim if model_dim is None else model_dim
  return AdaptiveDecoderSpec(width, len(experiment["values"]), **config.heads.model.to_dict())


def loss_spec(config: Any, experiment: Any, variant: str) -> LatentPreferenceSpec:
  """Returns the settings of the loss for one variant, at the level of an experiment."""
  return LatentPreferenceSpec(variant=variant, level=experiment.level, **config.heads.lpo.to_dict())


def task_specs(config: Any) -> dict[str, PromptTaskSpec]:
  """Returns the tasks of checkpoints by name.

  Raises:
    ValueError: settings that are refused; names the task.
  """
  found = {}
  for name in config.tasks:
    try:
      found[name] = PromptTaskSpec.from_dict(config.tasks[name].to_dict())
    except ValueError as error:
      raise ValueError(f"tasks.{name}.{error}") from error
  return found


def experiments(config: Any) -> dict[str, Any]:
  """Returns the experiments that are run, by name: those of the toys, or those of the checkpoint's tasks.

  Without a checkpoint these are the experiments whose families are toys. With one they are those whose
  families are in `tasks`, their files all named.
  """
  if is_toy(config):
    return {name: each for name, each in config.experiments.items() if not _has_tasks(config, each)}
  given = {name for name, spec in task_specs(config).items() if spec.is_given}
  return {
    name: each
    for name, each in config.experiments.items()
    if _has_tasks(config, each) and set(each.families) <= given
  }


def tasks_run(config: Any) -> list[str]:
  """Returns the names of toys, or tasks, that experiments which are run have, each once."""
  return list(dict.fromkeys(family for each in experiments(config).values() for family in each.families))


def _has_tasks(config: Any, experiment: Any) -> bool:
  """Whether an experiment is of tasks, and not of toys (or of names that nobody knows)."""
  return any(family in config.tasks for family in experiment.families)


def left_out(config: Any) -> dict[str, list[str]]:
  """Returns the experiments of the checkpoint's tasks that are not run, with the config fields that they miss."""
  if is_toy(config):
    return {}
  specs, run = task_specs(config), experiments(config)
  return {
    name: [f"tasks.{family}.{field}" for family in each.families for field in specs[family].missing]
    for name, each in config.experiments.items()
    if _has_tasks(config, each) and name not in run
  }


def number_of(*names: Any) -> int:
  """Returns a number below 2**31 that names decide: a seed of its own for every purpose."""
  text = "/".join(map(str, names))
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def random_of(*names: Any) -> np.random.Generator:
  """Returns NumPy's generator for a purpose."""
  return np.random.default_rng(number_of(*names))


def key_of(*names: Any) -> jax.Array:
  """Returns a JAX key for a purpose."""
  return jax.random.key(number_of(*names))
