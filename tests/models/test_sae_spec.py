"""Settings of sparse autoencoders: every option is read by the architecture that has it, or refused."""

import json

import pytest

from nr.models.sparse_autoencoder_spec import ARCHITECTURES, OPTIONS, SparseAutoencoderSpec

GIVEN = {
  "k_aux": 3,
  "alpha": 0.5,
  "max_active": 9,
  "threshold_rate": 0.5,
  "prefixes": (4, 64),
  "penalty": "tanh",
  "bandwidth": 0.5,
  "initial_threshold": 0.5,
  "tanh_scale": 2.0,
  "sparsity": 0.5,
  "sparsity_warmup": 3,
  "is_decoder_frozen": False,
}


def make(arch="topk", **changes):
  return SparseAutoencoderSpec(**{"model_dim": 32, "num_latents": 64, "k": 4, "arch": arch, **changes})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_unset_options_become_the_architectures_own_or_stay_unset(arch):
  spec = make(arch)
  for name, option in OPTIONS.items():
    if name in ("tanh_scale", "max_active"):
      continue
    assert (getattr(spec, name) is not None) == (arch in option.architectures), name
  assert spec.max_active == (4 if arch == "topk" else 16)
  assert SparseAutoencoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
  hash(spec)  # part of a graph definition


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", GIVEN)
def test_an_option_is_taken_or_refused(arch, name):
  changes = {name: GIVEN[name]} | ({"penalty": "tanh"} if (arch, name) == ("jumprelu", "tanh_scale") else {})
  if arch in OPTIONS[name].architectures:
    assert getattr(make(arch, **changes), name) == GIVEN[name]
  else:
    with pytest.raises(ValueError, match=rf"{name}=.* decides nothing for arch='{arch}'; leave it unset"):
      make(arch, **changes)


def test_values_of_other_options_decide_values():
  assert make(k_aux=None).k_aux == 16  # half the width, whatever the number of latents
  assert make(num_latents=640).k_aux == 16 and make().alpha == 1 / 32
  assert make("jumprelu").tanh_scale is None and make("jumprelu", penalty="tanh").tanh_scale == 4
  assert make("jumprelu", penalty="target").sparsity == 1 and make("jumprelu").sparsity == 1e-3
  assert make("matryoshka").prefixes == (2, 6, 14, 30, 64)
  assert make("matryoshka", num_latents=8).prefixes == (1, 3, 8)
  assert make(k_aux=48, model_dim=2).k_aux == 48


def test_settings_are_carried_to_another_architecture_without_what_it_does_not_read():
  spec = make("matryoshka", max_active=9, dead_tokens=7).in_architecture("jumprelu")
  assert spec == make("jumprelu", max_active=9, dead_tokens=7)
  assert spec.in_architecture("topk") == make(dead_tokens=7)


@pytest.mark.parametrize(
  ("arch", "changes", "message"),
  [
    ("top-k", {}, "arch='top-k' is unknown: did you mean 'topk'"),
    ("topk", {"k_aux": 65}, "k_aux=65 must lie between 1 and num_latents=64"),
    ("topk", {"k": 65}, "k=65 must lie between 1 and num_latents=64"),
    ("topk", {"normalisation": "layer_norm"}, "normalisation='layer_norm' is unknown: did you mean"),
    ("topk", {"dead_tokens": 0}, "dead_tokens=0 must lie"),
    ("topk", {"alpha": -1.0}, "alpha=-1.0 must not be negative"),
    ("topk", {"max_active": 9}, "max_active=9 decides nothing for arch='topk'"),
    ("topk", {"decoder_norm": "free"}, "decoder_norm='free' is unknown"),
    ("relu", {"max_active": 65}, "max_active=65 must lie between"),
    ("batchtopk", {"threshold_rate": 0.0}, "threshold_rate=0.0 must lie above 0"),
    ("matryoshka", {"prefixes": (4, 32)}, r"prefixes=\(4, 32\) must ascend from 1 or more to num_latents=64"),
    ("matryoshka", {"prefixes": (8, 4, 64)}, "must ascend"),
    ("jumprelu", {"penalty": "l1"}, "penalty='l1' is unknown: Valid: l0, target, tanh"),
    ("jumprelu", {"tanh_scale": 2.0}, "tanh_scale=2.0 decides nothing for penalty='l0'"),
    ("jumprelu", {"bandwidth": 0.0}, "bandwidth=0.0 must be positive"),
    ("jumprelu", {"initial_threshold": -0.1}, "initial_threshold=-0.1 must not be negative"),
  ],
)
def test_what_makes_no_sense_is_refused(arch, changes, message):
  with pytest.raises(ValueError, match=message):
    make(arch, **changes)
