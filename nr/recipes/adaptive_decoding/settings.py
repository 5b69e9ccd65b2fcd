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


def transformer_spec(config: Any) -> TransformerSpec:
  """Returns the settings of the language model.

  Raises:
    ValueError: unknown family, or values that do not fit together.
  """
  try:
    model = config.language_model.model
    return sections.transformer_spec(model, families.TOKENIZER.vocab_size, families.LENGTH)
  except ValueError as error:
    raise ValueError(f"language_model.{error}") from error


def head_spec(config: Any, experiment: Any) -> AdaptiveDecoderSpec:
  """Returns the settings of an experiment's head."""
  return AdaptiveDecoderSpec(
    config.language_model.model.model_dim, len(experiment["values"]), **config.heads.model.to_dict()
  )


def loss_spec(config: Any, experiment: Any, variant: str) -> LatentPreferenceSpec:
  """Returns the settings of the loss for one variant, at the level of an experiment."""
  return LatentPreferenceSpec(variant=variant, level=experiment.level, **config.heads.lpo.to_dict())


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
