"""From the config to what stages work with."""

from typing import Any

import jax

from nr.generators.checkpoints import make_network
from nr.generators.in_process import InProcess
from nr.names import unknown
from nr.objectives.group_relative import GroupRelativeSpec
from nr.objectives.preference import PreferenceSpec
from nr.recipes.divpo.pairs import SelectionSpec
from nr.recipes.divpo.personas import TASKS, Task
from nr.recipes.languages import Language, kept_language, plain_language
from nr.recipes.policies import model_mesh
from nr.recipes.sampling_rounds import RoundSpec
from nr.recipes.sections import training_config
from nr.recipes.stages import StageContext
from nr.training.model_files import Model, load_model

BASE = "base"
"""The model that every arm begins from, measured like an arm."""


def is_toy(config: Any) -> bool:
  """Whether personas are written in the small language: no checkpoint was given."""
  return not config.base.checkpoint


def task_of(config: Any) -> Task:
  """Returns what is written."""
  kind = config.task.kind
  if kind not in TASKS:
    raise ValueError(unknown("task.kind", kind, TASKS))
  if (kind == "world") != is_toy(config):
    raise ValueError(
      f"task.kind={kind!r} and base.checkpoint={config.base.checkpoint!r}: 'world' is written by a model "
      "pre-trained in the run, everything else by a checkpoint"
    )
  return TASKS[kind].from_dict(config.task[kind].to_dict())


def toy_language(config: Any) -> Language:
  """Returns the small language."""
  return plain_language(task_of(config).tokenizer())


def language_of(context: StageContext) -> Language:
  """Returns the language that stage `base` has kept with its models."""
  if is_toy(context.config):
    return toy_language(context.config)
  return kept_language(context, context.inputs["base"])


def arm_names(config: Any) -> list[str]:
  """Returns the arms that are trained, in the order of the config."""
  return [name for name in config.arms if config.arms[name].select.method]


def selection_spec(config: Any, arm: str) -> SelectionSpec:
  """Returns which pair an arm picks from a pool."""
  return SelectionSpec.from_dict(config.arms[arm].select.to_dict())


def preference_spec(config: Any, arm: str) -> PreferenceSpec:
  """Returns the loss of an arm."""
  return PreferenceSpec.from_dict(config.arms[arm].loss.to_dict())


def group_spec(config: Any, arm: str) -> GroupRelativeSpec:
  """Returns the loss of an arm that learns by GRPO."""
  return GroupRelativeSpec.from_dict(config.arms[arm].group.to_dict())


def training_of(config: Any, arm: str, seed: int) -> Any:
  """Returns the training section of an arm, with the run's seed in it."""
  training, section = training_config(config.train, config.seed + seed), config.arms[arm]
  if section.steps:
    training.steps = section.steps
  if selection_spec(config, arm).method == "grpo":
    # The rows are responses, all of the pools that give other arms a pair each.
    training.batch_size *= config.sampling.num_samples
  if section.learning_rate:
    training.optimizer.learning_rate = section.learning_rate
  return training


def round_spec(config: Any, arm: str, seed: int) -> RoundSpec:
  """Returns how an arm samples: a round as long as the run is offline."""
  sampling, section = config.sampling, config.arms[arm]
  is_offline = section.steps_per_round == 0
  steps = training_of(config, arm, seed).steps if is_offline else section.steps_per_round
  # A pool gives a pair (or all of its responses).
  pools = steps * config.train.batch_size
  prompts = section.prompts_per_round or pools
  # Online, a pool without a pair gives an empty slot; offline its place is taken by another pair.
  is_repeated = is_offline or prompts != pools
  return RoundSpec(
    steps_per_round=steps,
    prompts_per_round=prompts,
    num_samples=sampling.num_samples,
    max_new_tokens=sampling.max_new_tokens,
    chain=sampling.chain,
    seed=config.seed + seed,
    is_repeated=is_repeated,
  )


def mesh_of(config: Any) -> jax.sharding.Mesh | None:
  """Returns the mesh that given models lie on; None for one device, and for toys, which need no more."""
  return None if is_toy(config) else model_mesh(config.train.mesh)


def open_model(context: StageContext, artifact: dict[str, Any]) -> Model:
  """Opens a model that a stage has written."""
  return load_model(context.path(artifact["model"]), mesh=mesh_of(context.config))


def make_generator(config: Any, spec: Any, params: Any, language: Language, model: str) -> InProcess:
  """Returns the generator of a model."""
  return InProcess(
    make_network(spec, params),
    language.tokenizer,
    format=language.format,
    end_ids=language.end_ids,
    model=model,
    batch_size=config.sampling.batch_size,
    mesh=mesh_of(config),
  )
