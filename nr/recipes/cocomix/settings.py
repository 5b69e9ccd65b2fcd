"""From the config to the specs that models and targets take."""

from typing import Any

import jax

from nr import names
from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.sparse_autoencoder import SparseAutoencoderSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.attribution import AttributionSpec
from nr.training.model_files import ConceptMixingModelSpec

FAMILIES = ("gpt2", "llama")
OPTIONAL_SIZES = ("num_kv_heads", "mlp_dim", "rotary_base")
"""Fields of a model section in which 0 stands for the family's own value."""


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
  for name in OPTIONAL_SIZES:
    if not fields[name]:
      del fields[name]
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
  fields = (
    "arch",
    "normalisation",
    "num_latents",
    "k",
    "k_aux",
    "alpha",
    "dead_tokens",
    "decoding",
    "top_k",
    "dtype",
  )
  return SparseAutoencoderSpec(
    model_dim=config.teacher.model.model_dim, **{name: config.sae[name] for name in fields}
  )


def attribution_spec(config: Any) -> AttributionSpec:
  """Returns which variant of the concept targets is asked for."""
  fields = config.targets.to_dict()
  del fields["source"]  # where labels come from, not what they are
  return AttributionSpec.from_dict(fields)


def loss_chunk(config: Any) -> int | None:
  """Returns how many tokens' logits are held at a time, None for all."""
  return config.compute.loss_chunk or None


def training_config(section: Any, seed: int) -> Any:
  """Returns a copy of a training section with the seed of the run added to its own."""
  section = section.copy_and_resolve_references()
  section.seed = section.seed + seed
  return section
