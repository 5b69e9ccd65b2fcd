"""From the config to the specs that models and targets take, and the checks before device time."""

from typing import Any

import jax

from nr import names
from nr.data.concept_labels import MAX_CONCEPTS
from nr.models.concept_intervention import InterventionMode
from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.sparse_autoencoder import SparseAutoencoderSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.attribution import AttributionSpec
from nr.training import defaults, sharding
from nr.training.model_files import ConceptMixingModelSpec

FAMILIES = ("gpt2", "llama")


def transformer_spec(model: Any, vocab_size: int, length: int) -> TransformerSpec:
  """Returns the settings of a transformer from its config section.

  Args:
    model: section with `family` and any fields of `TransformerSpec`.
    vocab_size: number of token ids.
    length: longest sequence in tokens.

  Raises:
    ValueError: unknown family or field, or values that do not fit together.
  """
  fields = model.to_dict()
  family = fields.pop("family")
  if family not in FAMILIES:
    raise ValueError(names.unknown("model.family", family, FAMILIES))
  if fields["layers"] == "auto":
    # Slicing stacked arrays copies them on CPU; accelerators lose nothing and compile faster.
    fields["layers"] = "unroll" if jax.default_backend() == "cpu" else "scan"
  fields = {"vocab_size": vocab_size, "max_length": length, **fields}
  return getattr(TransformerSpec, family)(**fields)


def student_spec(config: Any, kind: str, vocab_size: int) -> TransformerSpec | ConceptMixingModelSpec:
  """Returns the settings of a student, "ntp" or "cocomix"."""
  section = config.students[kind]
  transformer = transformer_spec(section.model, vocab_size, config.window.length)
  if kind == "ntp":
    return transformer
  concepts = {"num_concepts": config.sae.num_latents, **section.concept.to_dict()}
  return ConceptMixingModelSpec(transformer, ConceptMixingSpec.from_dict(concepts))


def autoencoder_spec(config: Any) -> SparseAutoencoderSpec:
  """Returns the settings of the sparse autoencoder on the teacher's stream."""
  fields = ("arch", "num_latents", "k", "k_aux", "alpha", "dead_tokens", "decoding", "top_k")
  return SparseAutoencoderSpec(
    model_dim=config.teacher.model.model_dim, **{name: config.sae[name] for name in fields}
  )


def attribution_spec(config: Any) -> AttributionSpec:
  """Returns which variant of the concept targets is asked for."""
  return AttributionSpec(**config.targets.to_dict())


def loss_chunk(config: Any) -> int | None:
  """Returns how many tokens' logits are held at a time, None for all."""
  return config.compute.loss_chunk or None


def training_config(section: Any, seed: int) -> Any:
  """Returns a copy of a training section with the seed of the run added to its own."""
  section = section.copy_and_resolve_references()
  section.seed = section.seed + seed
  return section


def validate(config: Any) -> None:
  """Checks everything that can be checked without data or device.

  Raises:
    ValueError: one line with field, value and remedy.
  """
  vocab_size = config.tokenizer.vocab_size
  transformer_spec(config.teacher.model, vocab_size, config.window.length)
  layers = config.teacher.model.num_layers
  if not 0 <= config.teacher.tap_layer < layers:
    raise ValueError(
      f"teacher.tap_layer={config.teacher.tap_layer} is outside the teacher: choose 0..{layers - 1}, its blocks from 0"
    )
  if config.sae.num_latents > MAX_CONCEPTS:
    raise ValueError(
      f"sae.num_latents={config.sae.num_latents}: labels are stored as uint16; use at most {MAX_CONCEPTS}"
    )
  attribution_spec(config).check(autoencoder_spec(config).k)
  for kind in ("ntp", "cocomix"):
    student_spec(config, kind, vocab_size)
  if not config.students.seeds:
    raise ValueError("students.seeds=() is empty; name at least one seed, for example (0,)")
  for name in ("teacher", "sae", "students"):
    _validate_training(name, config[name].train)
  _validate_steering(config)


def _validate_training(name: str, section: Any) -> None:
  """Checks a training section against the devices that are there."""
  try:
    sizes = sharding.mesh_sizes(section.mesh, jax.device_count())
    defaults.validate(section, sizes, jax.process_count())
  except ValueError as error:
    raise ValueError(f"{name}.train: {error}") from error


def _validate_steering(config: Any) -> None:
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
