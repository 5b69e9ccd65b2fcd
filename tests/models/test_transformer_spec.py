"""Settings are checked where they are made, and survive JSON."""

import json

import pytest

from nr.models.transformer_spec import RotaryScaling, TransformerSpec

SIZES = dict(vocab_size=10, num_layers=1, model_dim=12, num_heads=3)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(vocab_size=0), "TransformerSpec.vocab_size=0: give a positive integer"),
    (dict(num_heads=5), "TransformerSpec.num_heads=5: it must divide model_dim=12"),
    (dict(num_kv_heads=2), "TransformerSpec.num_kv_heads=2: it must divide num_heads=3"),
    (dict(norm="batch_norm"), "TransformerSpec.norm='batch_norm': choose one of layer_norm, rms_norm"),
    (dict(dropout=1.0), r"TransformerSpec.dropout=1.0: give a probability in \[0, 1\)"),
    (dict(positions="rotary", head_dim=5), "TransformerSpec.head_dim=5: rotary positions need an even"),
    (dict(rotary_scaling=RotaryScaling()), "it needs positions='rotary'"),
    (dict(mlp_dim=-1), "TransformerSpec.mlp_dim=-1: give a positive integer, or None"),
  ],
)
def test_errors_name_field_value_and_remedy(settings, message):
  with pytest.raises(ValueError, match=message):
    TransformerSpec(**(SIZES | settings))


def test_unknown_and_missing_fields_are_refused():
  with pytest.raises(
    ValueError, match="field of TransformerSpec='num_layer' is unknown: did you mean 'num_layers'"
  ):
    TransformerSpec.from_dict(SIZES | dict(num_layer=2))
  with pytest.raises(ValueError, match="TransformerSpec.vocab_size is missing"):
    TransformerSpec.from_dict(dict(num_layers=1, model_dim=12, num_heads=3))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", "gemma"])
def test_specs_survive_json(family):
  spec = getattr(TransformerSpec, family)(**SIZES)
  if spec.positions == "rotary":
    spec = spec.replace(rotary_scaling=RotaryScaling(factor=4.0))
  assert TransformerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
  assert hash(spec) == hash(spec.replace())
