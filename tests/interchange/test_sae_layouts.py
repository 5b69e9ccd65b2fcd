"""Sparse autoencoders of OpenAI, sparsify and SAELens: committed files of theirs, round trips, and faults."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.interchange.sae import open_autoencoder, tap_layer
from nr.interchange.sae_save import save_openai, save_saelens, save_sparsify
from nr.models import parameters
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors (extra [hub])")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SAELENS = ("standard", "topk", "topk_rescaled", "jumprelu", "gated", "batchtopk")
ARCHITECTURES = {"standard": "relu", "topk_rescaled": "topk", "batchtopk": "jumprelu"}
K = {"topk": None, "topk_rescaled": None}


def module_of(spec, params):
  graphdef = parameters.split(SparseAutoencoder(spec, rngs=nnx.Rngs(0)))[0]
  return parameters.merge(graphdef, jax.tree.map(jnp.asarray, params))


def check_scores(spec, params, expected):
  """Latents and reconstruction are those that the other project computed."""
  module = module_of(spec, params)
  normalised = module.normalise(jnp.asarray(expected["x"]))
  latents = module.activations(normalised.values_TD)
  outputs = module.decode_activations(latents) + module.pre_bias[...]
  np.testing.assert_allclose(latents, expected["latents"], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    module.denormalise(outputs, normalised), expected["reconstruction"], rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize("name", SAELENS)
def test_files_of_saelens_score_what_saelens_says(name):
  folder = GOLDEN / f"sae_saelens_{name}"
  found = open_autoencoder(folder, k=K.get(name, 3))
  assert found.spec.arch == ARCHITECTURES.get(name, name) and found.origin["format"] == "saelens"
  if name != "batchtopk":
    assert tap_layer(found.origin["hook_name"]) == 5
  check_scores(found.spec, found.read_params(), np.load(folder / "expected.npz"))


@pytest.mark.parametrize("name", SAELENS)
def test_files_of_saelens_are_written_back_as_they_were(name, tmp_path):
  folder = GOLDEN / f"sae_saelens_{name}"
  found = open_autoencoder(folder, k=K.get(name, 3))
  theirs = json.loads((folder / "cfg.json").read_text())
  save_saelens(tmp_path, found.spec, found.read_params(), theirs["metadata"])
  before, after = (
    safetensors_numpy.load_file(place / "sae_weights.safetensors") for place in (folder, tmp_path)
  )
  assert set(before) == set(after)
  for tensor, values in before.items():
    np.testing.assert_array_equal(after[tensor], np.maximum(values, 0) if tensor == "threshold" else values)
  ours = json.loads((tmp_path / "cfg.json").read_text())
  assert {name: value for name, value in theirs.items() if name != "metadata"} == {
    name: value for name, value in ours.items() if name != "metadata"
  }
  again = open_autoencoder(tmp_path, k=3 if found.spec.arch != "topk" else None)
  assert again.spec == found.spec and again.origin == found.origin


def test_the_torch_file_of_openai_is_read_as_data_and_scores_what_its_equations_say(tmp_path):
  found = open_autoencoder(GOLDEN / "sae_openai" / "autoencoder.pt", decoding="dense", max_active=3)
  spec = found.spec
  assert (spec.arch, spec.k, spec.normalisation, spec.decoding) == ("topk", 3, "layer_norm_unbiased", "dense")
  params, expected = found.read_params(), np.load(GOLDEN / "sae_openai" / "expected.npz")
  check_scores(spec, params, expected)
  save_openai(tmp_path / "sae.safetensors", spec, params)
  again = open_autoencoder(tmp_path / "sae.safetensors", decoding="dense")
  assert again.spec == spec
  jax.tree.map(np.testing.assert_array_equal, again.read_params(), params)


def random_autoencoder(**settings):
  spec = SparseAutoencoderSpec(**{"model_dim": 6, "num_latents": 10, "k": 3, **settings})
  params = parameters.split(SparseAutoencoder(spec, rngs=nnx.Rngs(0)))[1]
  keys = iter(jax.random.split(jax.random.key(1), 9))
  return spec, jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype), params)


def test_files_of_sparsify_score_what_sparsify_says_and_are_written_back_as_they_were(tmp_path):
  folder = GOLDEN / "sae_sparsify"
  found = open_autoencoder(folder)
  assert (found.spec.arch, found.spec.k, found.spec.normalisation) == ("topk", 3, "none")
  check_scores(found.spec, found.read_params(), np.load(folder / "expected.npz"))
  save_sparsify(tmp_path, found.spec, found.read_params())
  before, after = (safetensors_numpy.load_file(place / "sae.safetensors") for place in (folder, tmp_path))
  assert set(before) == set(after)
  for tensor, values in before.items():
    np.testing.assert_array_equal(after[tensor], values)
  assert json.loads((folder / "cfg.json").read_text()) == json.loads((tmp_path / "cfg.json").read_text())


def test_parameters_keep_their_type_and_are_read_in_the_one_asked_for(tmp_path):
  spec, params = random_autoencoder(normalisation="none", param_dtype="bfloat16")
  save_sparsify(tmp_path, spec, params)
  tensors = safetensors_numpy.load_file(tmp_path / "sae.safetensors")
  assert all(leaf.dtype.name == "bfloat16" for leaf in tensors.values())
  assert open_autoencoder(tmp_path).spec == dataclasses.replace(spec, param_dtype="float32")
  half = open_autoencoder(tmp_path, param_dtype="bfloat16")
  assert half.spec == spec
  jax.tree.map(np.testing.assert_array_equal, half.read_params(), jax.tree.map(np.asarray, params))


def test_configs_of_older_versions_are_understood(tmp_path):
  spec, params = random_autoencoder()
  save_saelens(tmp_path, spec, params)
  old = {
    "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "d_in": 6, "d_sae": 10,
    "dtype": "torch.float32", "model_name": "gpt2-small", "hook_name": "blocks.6.hook_resid_pre", "hook_layer": 6,
    "normalize_activations": "layer_norm", "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
  }  # fmt: skip
  (tmp_path / "cfg.json").write_text(json.dumps(old))
  found = open_autoencoder(tmp_path)
  assert found.spec == spec and tap_layer(found.origin["hook_name"]) == 5
  assert found.origin["model_name"] == "gpt2-small"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"architecture": "temporal"}, "field 'architecture'='temporal' is unknown"),
    ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in' needs a factor"),
    (
      {"reshape_activations": "hook_z"},
      "field 'reshape_activations': 'hook_z' is not supported, only 'none'",
    ),
    ({"finetuning_scaling_factor": True}, "field 'finetuning_scaling_factor': True is not supported"),
    ({"d_in": "6"}, "field 'd_in': '6' is not a positive integer"),
    ({"d_sae": 11}, r"tensor W_enc has shape \(6, 10\) instead of \(6, 11\)"),
    ({"k": None}, "field 'k': None is not a positive integer"),
    ({"architecture": "gated", "k": 3}, "b_gate, b_mag, r_mag: tensors missing"),
  ],
)
def test_files_that_mean_something_else_are_refused_by_field(changes, message, tmp_path):
  save_saelens(tmp_path, *random_autoencoder())
  config = json.loads((tmp_path / "cfg.json").read_text())
  (tmp_path / "cfg.json").write_text(json.dumps({**config, **changes}))
  with pytest.raises(ValueError, match=message):
    open_autoencoder(tmp_path, k=3)


def test_settings_that_a_layout_cannot_say_are_refused_by_field(tmp_path):
  def refused(save, message, **settings):
    with pytest.raises(ValueError, match=message):
      save(tmp_path / "out", *random_autoencoder(**settings))

  refused(
    save_openai, "arch='gated' cannot be written in OpenAI's layout: it knows 'topk', 'relu'", arch="gated"
  )
  refused(save_openai, "normalisation='none' cannot be written", normalisation="none")
  refused(save_openai, "epsilon=0.1 cannot", epsilon=0.1)
  refused(save_sparsify, "normalisation='layer_norm_unbiased' cannot be written in sparsify's layout")
  refused(save_saelens, "arch='batchtopk' cannot be written in SAELens.*inference_form", arch="batchtopk")
  refused(save_saelens, "decoder_norm='scaled' cannot.*inference_form", arch="relu", decoder_norm="scaled")
  refused(save_saelens, "epsilon=0.1 cannot", epsilon=0.1)
  assert not (tmp_path / "out").exists()


def test_what_is_no_autoencoder_is_refused(tmp_path):
  with pytest.raises(
    FileNotFoundError, match="no sparse autoencoder there; give an OpenAI .safetensors or .pt"
  ):
    open_autoencoder(tmp_path)
  path = tmp_path / "sae.safetensors"
  spec, params = random_autoencoder()
  save_openai(path, spec, params)
  tensors = safetensors_numpy.load_file(path)
  safetensors_numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match=r"activation None is not TopK or ReLU.*metadata=.*\"k\": \"32\""):
    open_autoencoder(path)
  metadata = {"activation": "TopK", "k": "3", "postact_fn": "ReLU"}
  tensors["encoder.weight"][0, 0] = np.nan
  safetensors_numpy.save_file(tensors, path, metadata=metadata)
  with pytest.raises(ValueError, match="tensor encoder.weight holds numbers that are not finite"):
    open_autoencoder(path).read_params()
  safetensors_numpy.save_file({**tensors, "extra": tensors["pre_bias"]}, path, metadata=metadata)
  with pytest.raises(ValueError, match="extra: tensors not known for this architecture"):
    open_autoencoder(path)
  path.write_bytes(b"no tensors here")
  with pytest.raises(ValueError, match="not a readable safetensors file"):
    open_autoencoder(path)
  with pytest.raises(ValueError, match="says no number of active latents; pass k"):
    open_autoencoder(GOLDEN / "sae_saelens_jumprelu")
  with pytest.raises(ValueError, match=r"num_latents=99 \(the file: 10\); leave out what the file says"):
    open_autoencoder(GOLDEN / "sae_openai" / "autoencoder.pt", num_latents=99)


@pytest.mark.parametrize(
  "hook", ["blocks.5.hook_mlp_out", "blocks.0.hook_resid_pre", "ln_final.hook_normalized"]
)
def test_hooks_that_are_no_residual_stream_after_a_block_are_refused(hook):
  with pytest.raises(ValueError, match="is not the residual stream after a block"):
    tap_layer(hook)
