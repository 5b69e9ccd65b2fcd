"""From the config to the specs that models and targets take."""

from typing import Any

from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.sparse_autoencoder import SparseAutoencoderSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.attribution import AttributionSpec
from nr.recipes.sections import transformer_spec
from nr.training.model_files import ConceptMixingModelSpec


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
