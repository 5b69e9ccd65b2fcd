"""From the config to what stages work with, the same for a world of toys and for a model of the world."""

from typing import Any, NamedTuple

from nr.data.chat import ChatFormat, ChatTemplate, ChatTokenizer, load_chat_template
from nr.data.examples import LengthLimits, PlainText, TextFormat
from nr.data.tokenizers import load_tokenizer
from nr.generators.checkpoints import Checkpoint, make_network
from nr.generators.in_process import InProcess
from nr.objectives.preference import PreferenceSpec
from nr.recipes.length_instruct.augmentation import LiftSpec
from nr.recipes.length_instruct.toy import World
from nr.recipes.stages import StageContext
from nr.training.model_files import load_model

ARMS = ("dpo", "r_dpo_small", "r_dpo_large", "lift_augmented_only", "lift", "lift_no_nll")
REFERENCE_ARM = "sft"
"""The model that every arm begins from, measured like an arm."""

OWN_TEMPLATE = "own"
"""Value of `data.chat_template` for the template in the checkpoint's folder."""


class Language(NamedTuple):
  """How a model's texts become tokens.

  Attributes:
    tokenizer: of the model.
    format: prompts and responses to ids, the same for training and for answering.
    begin_ids: in front of prompts that are plain text.
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


def train_section(config: Any, arm: str) -> Any:
  """Returns the training section of an arm: the config's, with the fields that the arm sets in `train`.

  Raises:
    ValueError: a field that training sections do not have.
  """
  section = config.train.copy_and_resolve_references()
  try:
    section.lock().update(config.arms[arm].get("train", {}))
  except (KeyError, TypeError) as error:
    raise ValueError(f"{error.args[0]}; give fields of the section train") from error
  return section


def length_limits(config: Any) -> LengthLimits:
  """Returns how long examples may be. A response is never cut: without its end it would teach none."""
  return LengthLimits(config.data.max_length, when_long="drop")


def encoded_lengths(config: Any) -> tuple[int, ...]:
  """Returns the lengths of batches: powers of two from 32, and the longest."""
  longest = config.data.max_length
  shorter = [2**power for power in range(5, longest.bit_length()) if 2**power < longest]
  return (*shorter, longest)


def toy_language(config: Any) -> Language:
  """Returns the language of the toy world."""
  tokenizer = world_of(config).tokenizer()
  return Language(tokenizer, PlainText(tokenizer), (), (tokenizer.end_of_text_id,))


def checkpoint_language(config: Any, checkpoint: Checkpoint) -> Language:
  """Returns the language of a checkpoint: its tokenizer, with a chat template where the config names one.

  Raises:
    DataError: a template that is not there, or that the tokenizer cannot write.
  """
  tokenizer, name = checkpoint.tokenizer, config.data.chat_template
  if name:
    template = (
      load_chat_template(config.base.checkpoint) if name == OWN_TEMPLATE else ChatTemplate.named(name)
    )
    tokenizer = ChatTokenizer(tokenizer, template)
  return _language(config, tokenizer, checkpoint.begin_ids, checkpoint.end_ids)


def language_of(context: StageContext) -> Language:
  """Returns the language that stage `base` has kept with its models."""
  config, base = context.config, context.inputs["base"]
  if is_toy(config):
    return toy_language(config)
  folder = context.path(base["tokenizer_folder"])
  tokenizer = load_tokenizer(folder)
  if config.data.chat_template:
    tokenizer = ChatTokenizer(tokenizer, load_chat_template(folder))
  return _language(config, tokenizer, tuple(base["begin_ids"]), tuple(base["end_ids"]))


def _language(config: Any, tokenizer: Any, begin_ids: tuple[int, ...], end_ids: tuple[int, ...]) -> Language:
  format = ChatFormat(tokenizer) if config.data.chat_template else PlainText(tokenizer, begin_ids)
  return Language(tokenizer, format, begin_ids, tuple(dict.fromkeys([*end_ids, format.end_id])))


def open_model(context: StageContext, artifact: dict[str, Any]) -> tuple[Any, Any]:
  """Returns (spec, parameters) of a model that a stage has written."""
  model = load_model(context.path(artifact["model"]))
  return model.spec, model.params


def make_generator(config: Any, spec: Any, params: Any, language: Language, model: str) -> InProcess:
  """Returns the generator of a model."""
  return InProcess(
    make_network(spec, params),
    language.tokenizer,
    format=language.format,
    end_ids=language.end_ids,
    model=model,
    batch_size=config.data.rows_per_call,
  )
