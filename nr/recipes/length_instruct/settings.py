"""From the config to what stages work with, the same for a world of toys and for a model of the world."""

from typing import Any, NamedTuple

from nr.data.examples import LengthLimits, PlainText, TextFormat
from nr.generators.checkpoints import make_network, open_checkpoint
from nr.generators.in_process import InProcess
from nr.objectives.preference import PreferenceSpec
from nr.recipes.length_instruct.augmentation import LiftSpec
from nr.recipes.length_instruct.toy import World
from nr.recipes.stages import StageContext
from nr.training.model_files import load_model

ARMS = ("dpo", "r_dpo_small", "r_dpo_large", "lift_augmented_only", "lift", "lift_nll")
REFERENCE_ARM = "sft"
"""The model that every arm begins from, measured like an arm."""


class Language(NamedTuple):
  """How a model's texts become tokens.

  Attributes:
    tokenizer: of the model.
    format: prompts and responses to ids.
    begin_ids: in front of prompts.
    end_ids: that end a text.
  """

  tokenizer: Any
  format: TextFormat
  begin_ids: tuple[int, ...]
  end_ids: tuple[int, ...]


def is_toy(config: Any) -> bool:
  """Whether the run plays in the toy world: no checkpoint was given."""
  return not config.base.checkpoint


def world_of(config: Any) -> World:
  """Returns the toy world."""
  return World.from_dict(config.world.to_dict())


def lift_spec(config: Any) -> LiftSpec:
  """Returns how limits are put into prompts."""
  return LiftSpec.from_dict(config.lift.to_dict())


def arm_names(config: Any) -> list[str]:
  """Returns the arms that are trained: those of the paper in its order, then others by name."""
  known = {name: place for place, name in enumerate(ARMS)}
  trained = [name for name in config.arms if config.arms[name].mix]
  return sorted(trained, key=lambda name: (known.get(name, len(known)), name))


def preference_spec(config: Any, arm: str) -> PreferenceSpec:
  """Returns the loss of an arm."""
  return PreferenceSpec.from_dict(config.arms[arm].loss.to_dict())


def length_limits(config: Any) -> LengthLimits:
  """Returns how long examples may be. A response is never cut: without its end it would teach none."""
  return LengthLimits(config.data.max_length, when_long="drop")


def encoded_lengths(config: Any) -> tuple[int, ...]:
  """Returns the lengths of batches: powers of two from 32, and the longest."""
  longest = config.data.max_length
  shorter = [2**power for power in range(5, longest.bit_length()) if 2**power < longest]
  return (*shorter, longest)


def language_of(config: Any) -> Language:
  """Returns the tokenizer of the run with what belongs to it."""
  if is_toy(config):
    tokenizer = world_of(config).tokenizer()
    return Language(tokenizer, PlainText(tokenizer), (), (tokenizer.end_of_text_id,))
  checkpoint = open_checkpoint(config.base.checkpoint)
  tokenizer, begin, ends = checkpoint.tokenizer, checkpoint.begin_ids, checkpoint.end_ids
  return Language(tokenizer, PlainText(tokenizer, begin), begin, ends)


def open_model(context: StageContext, artifact: dict[str, Any]) -> tuple[Any, Any]:
  """Returns (spec, parameters) of a model that a stage has written."""
  model = load_model(context.path(artifact["model"]))
  return model.spec, model.params


def make_generator(config: Any, spec: Any, params: Any, language: Language, model: str) -> InProcess:
  """Returns the generator of a model."""
  return InProcess(
    make_network(spec, params),
    language.tokenizer,
    begin_ids=language.begin_ids,
    end_ids=language.end_ids,
    model=model,
    batch_size=config.evaluate.batch_size,
  )
