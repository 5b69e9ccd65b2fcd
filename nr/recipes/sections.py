"""Sections that configs of several recipes share: a language model, a training."""

from typing import Any

import jax
from ml_collections import ConfigDict

from nr import names
from nr.models.transformer import TransformerSpec

FAMILIES = ("gpt2", "llama")
OPTIONAL_SIZES = ("num_kv_heads", "mlp_dim", "rotary_base")
"""Fields of a model section in which 0 stands for the family's own value."""


def model_section(**changes: Any) -> ConfigDict:
  """Returns the section of a small language model: fields of `TransformerSpec`, 0 for the family's own sizes."""
  section = {
    "family": "llama",  # gpt2 | llama
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 0,  # 0: as many as query heads
    "mlp_dim": 0,  # 0: the family's ratio
    "rotary_base": 0.0,  # 0: the family's base
    "dropout": 0.0,
    "dtype": "float32",  # compute type; bfloat16 on accelerators
    "layers": "auto",  # scan | unroll | auto: unrolled on CPU, scanned on accelerators
    "remat": "none",  # none | dots | full
  }
  return ConfigDict({**section, **changes})


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
    if not fields.get(name, True):
      del fields[name]
  fields = {"vocab_size": vocab_size, "max_length": length, **fields}
  return getattr(TransformerSpec, family)(**fields)


def training_config(section: Any, seed: int) -> Any:
  """Returns a copy of a training section with the seed of the run added to its own."""
  section = section.copy_and_resolve_references()
  section.seed = section.seed + seed
  return section
