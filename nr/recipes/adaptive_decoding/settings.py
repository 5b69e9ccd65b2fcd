"""From the config to the specs that models, losses and samplers take."""

import hashlib
from typing import Any

import jax
import numpy as np

from nr import names
from nr.models.adaptive_decoder import AdaptiveDecoderSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.latent_preference import LatentPreferenceSpec
from nr.recipes.adaptive_decoding import families

FAMILIES = ("gpt2", "llama")


def transformer_spec(config: Any) -> TransformerSpec:
  """Returns the settings of the language model.

  Raises:
    ValueError: unknown family, or values that do not fit together.
  """
  fields = config.language_model.model.to_dict()
  family = fields.pop("family")
  if family not in FAMILIES:
    raise ValueError(names.unknown("language_model.model.family", family, FAMILIES))
  if fields["layers"] == "auto":
    # Slicing stacked arrays copies them on CPU; accelerators lose nothing and compile faster.
    fields["layers"] = "unroll" if jax.default_backend() == "cpu" else "scan"
  for name in ("num_kv_heads", "mlp_dim"):
    if not fields[name]:
      del fields[name]
  fields = {
    "vocab_size": families.TOKENIZER.vocab_size,
    "max_length": families.LENGTH,
    "dropout": 0.0,
    **fields,
  }
  return getattr(TransformerSpec, family)(**fields)


def head_spec(config: Any, experiment: Any) -> AdaptiveDecoderSpec:
  """Returns the settings of an experiment's head."""
  return AdaptiveDecoderSpec(
    config.language_model.model.model_dim, len(experiment["values"]), **config.heads.model.to_dict()
  )


def loss_spec(config: Any, experiment: Any, variant: str) -> LatentPreferenceSpec:
  """Returns the settings of the loss for one variant, at the level of an experiment."""
  return LatentPreferenceSpec(variant=variant, level=experiment.level, **config.heads.lpo.to_dict())


def training_config(section: Any, seed: int) -> Any:
  """Returns a copy of a training section with the seed of the run added to its own."""
  section = section.copy_and_resolve_references()
  section.seed = section.seed + seed
  return section


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
