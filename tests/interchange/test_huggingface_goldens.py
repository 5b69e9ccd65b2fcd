"""Hugging Face checkpoints against committed numbers of `transformers`, and what a bad folder is told."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from nr.interchange import families, names
from nr.interchange.huggingface import load_huggingface, save_huggingface
from nr.models import parameters
from nr.models.transformer import Transformer, TransformerSpec

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors (extra [hub])")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = (
  "gpt2",
  "llama",
  "llama_tied",
  "llama_scaled",
  "llama_biased",
  "mistral",
  "qwen2",
  "qwen3",
  "gemma",
)


def logits_of(spec, params, tokens):
  """Logits of a loaded model; the module's own parameters are only shapes."""
  graphdef = jax.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0)))
  graphdef = nnx.split(graphdef)[0]
  return np.asarray(jax.jit(lambda p, t: parameters.merge(graphdef, p)(t))(params, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
  spec, params = load_huggingface(GOLDEN / f"huggingface_{family}")
  expected = np.load(GOLDEN / f"huggingface_{family}" / "expected.npz", allow_pickle=False)
  logits = logits_of(spec, params, expected["tokens"])
  assert np.abs(expected["logits"]).max() > 0.1
  np.testing.assert_allclose(logits, expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_gives_the_same_tensors_and_loads_again(family, tmp_path):
  folder = GOLDEN / f"huggingface_{family}"
  spec, params = load_huggingface(folder)
  save_huggingface(tmp_path, spec, parameters.unstack_layers(params))  # either layout is taken
  stored = {}
  for path in folder.glob("*.safetensors"):
    stored |= safetensors_numpy.load_file(path)
  written = safetensors_numpy.load_file(tmp_path / "model.safetensors")
  assert sorted(written) == sorted(stored)
  for name, tensor in stored.items():
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)
  again, params_again = load_huggingface(tmp_path)
  assert again == spec
  jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_every_path_of_ours_is_in_the_table_once():
  for family in FAMILIES:
    spec, params = load_huggingface(GOLDEN / f"huggingface_{family}")
    paths = [p for row in families.family_of_spec(spec).table(spec) for p in row.paths]
    assert sorted(paths) == sorted(names.flatten(params))


def copy(family, tmp_path):
  return pathlib.Path(shutil.copytree(GOLDEN / f"huggingface_{family}", tmp_path / "copy"))


def rewrite(folder, change):
  path = folder / "model.safetensors"
  tensors = change(dict(safetensors_numpy.load_file(path)))
  safetensors_numpy.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family, prefix", [("gpt2", "transformer."), ("qwen2", "model.")])
def test_names_without_prefix_are_read(family, prefix, tmp_path):
  folder = copy(family, tmp_path)
  rewrite(folder, lambda tensors: {name.removeprefix(prefix): t for name, t in tensors.items()})
  _, params = load_huggingface(folder)
  jax.tree.map(np.testing.assert_array_equal, params, load_huggingface(GOLDEN / f"huggingface_{family}")[1])


def test_buffers_are_left_out_and_a_stored_copy_of_the_tied_head_is_accepted(tmp_path):
  folder = copy("gpt2", tmp_path)
  extra = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
  rewrite(folder, lambda t: {**t, **extra, "lm_head.weight": t["transformer.wte.weight"]})
  _, params = load_huggingface(folder)
  assert "unembedding" not in params


def test_a_tied_head_that_differs_is_refused_and_can_be_untied(tmp_path):
  folder = copy("gpt2", tmp_path)
  rewrite(folder, lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] + 1})
  with pytest.raises(ValueError, match="lm_head.weight differs from transformer.wte.weight"):
    load_huggingface(folder)
  spec, params = load_huggingface(folder, tied_head=False)
  assert not spec.tied_head
  np.testing.assert_array_equal(params["unembedding"], params["token_embedding"] + 1)


def test_missing_and_unknown_tensors_are_named(tmp_path):
  folder = copy("qwen2", tmp_path)
  rewrite(folder, lambda t: {name: x for name, x in t.items() if name != "model.layers.1.mlp.up_proj.weight"})
  with pytest.raises(ValueError, match="1 missing from the checkpoint: model.layers.1.mlp.up_proj.weight"):
    load_huggingface(folder)
  folder = copy("gpt2", tmp_path / "other")
  rewrite(folder, lambda t: {**t, "transformer.h.0.adapter.weight": np.zeros(3, np.float32)})
  with pytest.raises(ValueError, match="not in the name map: transformer.h.0.adapter.weight"):
    load_huggingface(folder)


def test_a_tensor_of_a_wrong_shape_is_named(tmp_path):
  folder = copy("gpt2", tmp_path)
  rewrite(folder, lambda t: {**t, "transformer.wpe.weight": np.zeros((9, 8), np.float32)})
  with pytest.raises(ValueError, match=r"position_embedding \(9, 8\) instead of \(24, 8\)"):
    load_huggingface(folder)


@pytest.mark.parametrize(
  "family, field, value, message",
  [
    ("gpt2", "model_type", "bloom", "model_type 'bloom' is not supported"),
    ("gpt2", "activation_function", "relu", "activation_function 'relu' is not supported"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx True"),
    (
      "llama",
      "rope_parameters",
      {"rope_type": "yarn", "rope_theta": 1.0},
      "rope_type 'yarn' is not supported",
    ),
    ("llama", "mlp_bias", True, "mlp_bias True is not supported"),
    ("mistral", "sliding_window", 7, "sliding_window 7 is not supported"),
  ],
)
def test_settings_beyond_the_transformer_are_named(family, field, value, message, tmp_path):
  folder = copy(family, tmp_path)
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**config, field: value}))
  with pytest.raises(ValueError, match=message):
    load_huggingface(folder)


def test_a_missing_config_field_is_named(tmp_path):
  folder = copy("gpt2", tmp_path)
  config = json.loads((folder / "config.json").read_text())
  del config["n_embd"]
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="config.json: field 'n_embd' is missing"):
    load_huggingface(folder)


def test_the_old_spelling_of_the_rotary_base_is_read(tmp_path):
  folder = copy("llama", tmp_path)
  config = json.loads((folder / "config.json").read_text())
  config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
  (folder / "config.json").write_text(json.dumps(config))
  assert load_huggingface(folder)[0].rotary_base == 500.0


def test_pickles_missing_shards_and_escaping_shards_are_refused(tmp_path):
  folder = copy("gpt2", tmp_path)
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match="pickled weights are never opened"):
    load_huggingface(folder)
  folder = copy("llama", tmp_path / "shards")
  shard = sorted(folder.glob("*.safetensors"))[0]
  shard.unlink()
  with pytest.raises(FileNotFoundError, match=shard.name):
    load_huggingface(folder)
  (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
  with pytest.raises(ValueError, match="not a file name inside the folder"):
    load_huggingface(folder)


def test_a_truncated_file_is_named(tmp_path):
  folder = copy("gpt2", tmp_path)
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
    load_huggingface(folder)


def test_a_spec_that_no_family_computes_says_why(tmp_path):
  spec, params = load_huggingface(GOLDEN / "huggingface_llama")
  with pytest.raises(ValueError, match="no Hugging Face family .*llama: cannot express scale_embedding"):
    save_huggingface(tmp_path, dataclasses.replace(spec, scale_embedding=True), params)


def test_bfloat16_is_kept_when_asked_for(tmp_path):
  spec, params = load_huggingface(GOLDEN / "huggingface_llama", param_dtype="bfloat16")
  save_huggingface(tmp_path, spec, params)
  assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
  _, again = load_huggingface(tmp_path, param_dtype="bfloat16")
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_tables_can_be_nested_in_a_larger_model():
  spec = TransformerSpec.gpt2(vocab_size=19, num_layers=2, model_dim=8, num_heads=2, max_length=5)
  _, params = parameters.split(Transformer(spec, rngs=nnx.Rngs(0)))
  table = (
    *names.prefixed(families.GPT2, theirs="base.", ours="transformer/"),
    names.Row("concept_head.weight", "concepts/head/kernel", names.TRANSPOSE),
  )
  kernel = np.arange(24.0, dtype=np.float32).reshape(8, 3)
  tree = {"transformer": params, "concepts": {"head": {"kernel": kernel}}}
  tensors = names.to_theirs(table, tree, spec)
  assert tensors["concept_head.weight"].shape == (3, 8)
  assert tensors["base.transformer.h.1.attn.c_attn.weight"].shape == (8, 24)
  jax.tree.map(np.testing.assert_array_equal, names.to_ours(table, tensors, spec, np.float32), tree)
