"""From the config to what stages work with."""

from typing import Any, NamedTuple

import jax

from nr.data.examples import PlainText
from nr.generators.checkpoints import Checkpoint, make_network, open_checkpoint
from nr.generators.in_process import InProcess
from nr.models.lora import LoraSpec, merge
from nr.names import unknown
from nr.objectives.group_relative import GroupRelativeSpec
from nr.objectives.preference import PreferenceSpec
from nr.recipes.divpo.pairs import SelectionSpec
from nr.recipes.divpo.personas import TASKS, Task
from nr.recipes.sampling_rounds import RoundSpec
from nr.recipes.sections import training_config
from nr.training.policy import Policy, full_policy, lora_policy

BASE = "base"
"""The model that every arm begins from, measured like an arm."""


class Language(NamedTuple):
  """How texts become tokens.

  Attributes:
    tokenizer: of the model.
    begin_ids: in front of prompts that are no chat.
    end_ids: that end a text.
  """

  tokenizer: Any
  begin_ids: tuple[int, ...]
  end_ids: tuple[int, ...]


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


def open_base_checkpoint(config: Any) -> Checkpoint:
  """Opens the checkpoint that the config names."""
  return open_checkpoint(config.base.checkpoint, dtype=config.base.dtype)


def language_of(config: Any) -> Language:
  """Returns the tokenizer of the run with what belongs to it."""
  if is_toy(config):
    tokenizer = task_of(config).tokenizer()
    return Language(tokenizer, (), (tokenizer.end_of_text_id,))
  checkpoint = open_base_checkpoint(config)
  return Language(checkpoint.tokenizer, checkpoint.begin_ids, checkpoint.end_ids)


def text_format(language: Language) -> PlainText:
  """Returns how the toy's texts are encoded."""
  return PlainText(language.tokenizer, language.begin_ids)


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


def adapter_spec(config: Any) -> LoraSpec | None:
  """Returns the settings of the adapter; None where all of the model is trained."""
  return LoraSpec.from_dict(config.adapter.to_dict()) if config.adapter.rank else None


def make_policy(config: Any, spec: Any, params: Any, seed: int) -> Policy:
  """Returns what is trained: all of the model, or an adapter."""
  adapter = adapter_spec(config)
  if adapter is None:
    return full_policy(spec, params)
  return lora_policy(spec, params, adapter, jax.random.key(config.seed + seed))


def whole_params(config: Any, policy: Policy, trained: Any) -> Any:
  """Returns the parameters of the trained model, an adapter added into the weights."""
  adapter = adapter_spec(config)
  return trained if adapter is None else merge(policy.fixed, trained, adapter)


def make_generator(config: Any, spec: Any, params: Any, language: Language, model: str) -> InProcess:
  """Returns the generator of a model."""
  return InProcess(
    make_network(spec, params),
    language.tokenizer,
    begin_ids=language.begin_ids,
    end_ids=language.end_ids,
    model=model,
    batch_size=config.sampling.batch_size,
  )
