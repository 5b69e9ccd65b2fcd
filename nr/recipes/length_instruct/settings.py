"""From the config to what stages work with, the same for a world of toys and for a model of the world."""

from typing import Any

import jax

from nr.data.examples import LengthLimits
from nr.data.instructions import InstructionFields
from nr.generators.checkpoints import make_network
from nr.generators.in_process import InProcess
from nr.objectives.preference import PreferenceSpec
from nr.recipes.languages import Language, kept_language, plain_language
from nr.recipes.length_instruct.augmentation import LiftSpec
from nr.recipes.length_instruct.toy import World
from nr.recipes.policies import model_mesh
from nr.recipes.stages import StageContext
from nr.training.model_files import load_model

ARMS = ("dpo", "r_dpo_small", "r_dpo_large", "lift_augmented_only", "lift", "lift_no_nll")
REFERENCE_ARM = "sft"
"""The model that every arm begins from, measured like an arm."""

JUDGES = ("reference", "words", "reward_model", "language_model")
"""What may decide which of two responses is preferred; see `sampled_pairs`."""


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


def instruction_fields(config: Any) -> InstructionFields:
  """Returns where records of `pools.instructions` hold what."""
  return InstructionFields.from_dict(config.pools.fields.to_dict())


def is_sampling(config: Any) -> bool:
  """Whether a checkpoint makes its own pairs: instructions are given, and no pairs."""
  return bool(not is_toy(config) and config.pools.instructions and not config.data.pairs)


def toy_language(config: Any) -> Language:
  """Returns the language of the toy world."""
  return plain_language(world_of(config).tokenizer())


def language_of(context: StageContext) -> Language:
  """Returns the language that stage `base` has kept with its models."""
  if is_toy(context.config):
    return toy_language(context.config)
  return kept_language(context, context.inputs["base"])


def mesh_of(config: Any) -> jax.sharding.Mesh | None:
  """Returns the mesh that given models lie on; None for one device, and for toys, which need no more."""
  return None if is_toy(config) else model_mesh(config.train.mesh)


def open_model(context: StageContext, artifact: dict[str, Any]) -> tuple[Any, Any]:
  """Returns (spec, parameters) of a model that a stage has written."""
  model = load_model(context.path(artifact["model"]), mesh=mesh_of(context.config))
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
    mesh=mesh_of(config),
  )
