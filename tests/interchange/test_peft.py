"""Adapters in PEFT's layout against committed numbers of PEFT, and what a bad folder is told."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from nr.interchange.huggingface import load_huggingface
from nr.interchange.peft import load_peft, save_peft
from nr.models import parameters
from nr.models.lora import LoraSpec, attach, init_adapter, merge
from nr.models.transformer import Transformer

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors (extra [hub])")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ADAPTERS = {
  "llama": "llama",
  "llama_head": "llama",
  "qwen2": "qwen2",
  "gpt2": "gpt2",
  "llama_dora": "llama",
  "gpt2_dora": "gpt2",
}


def logits_of(spec, params, tokens):
  graphdef = nnx.split(jax.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0))))[0]
  return np.asarray(jax.jit(lambda p, t: parameters.merge(graphdef, p)(t))(params, tokens))


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_are_those_of_peft(name, layers):
  spec, params = load_huggingface(GOLDEN / f"huggingface_{ADAPTERS[name]}", layers=layers)
  lora, adapter = load_peft(GOLDEN / f"peft_{name}", spec)
  expected = np.load(GOLDEN / f"peft_{name}" / "expected.npz", allow_pickle=False)
  if layers == "unroll":
    params, adapter = parameters.unstack_layers(params), parameters.unstack_layers(adapter)
  attached = logits_of(spec, attach(params, adapter, lora), expected["tokens"])
  np.testing.assert_allclose(attached, expected["logits"], atol=1e-5, rtol=0)
  merged = logits_of(spec, merge(params, adapter, lora), expected["tokens"])
  np.testing.assert_allclose(merged, expected["logits"], atol=1e-5, rtol=0)
  assert np.abs(logits_of(spec, params, expected["tokens"]) - expected["logits"]).max() > 0.1


@pytest.mark.parametrize("name", ADAPTERS)
def test_saving_gives_the_same_tensors_and_settings(name, tmp_path):
  spec, _ = load_huggingface(GOLDEN / f"huggingface_{ADAPTERS[name]}")
  lora, adapter = load_peft(GOLDEN / f"peft_{name}", spec)
  save_peft(tmp_path, spec, lora, parameters.unstack_layers(adapter, spec.num_layers), "base")
  stored = safetensors_numpy.load_file(GOLDEN / f"peft_{name}" / "adapter_model.safetensors")
  written = safetensors_numpy.load_file(tmp_path / "adapter_model.safetensors")
  assert sorted(written) == sorted(key for key in stored if "base_layer" not in key)
  for key, tensor in written.items():
    np.testing.assert_array_equal(tensor, stored[key], err_msg=key)
  before = json.loads((GOLDEN / f"peft_{name}" / "adapter_config.json").read_text())
  after = json.loads((tmp_path / "adapter_config.json").read_text())
  fields = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "fan_in_fan_out")
  for field in fields:
    assert after[field] == before[field], field
  assert {target.split(".")[-1] for target in after["target_modules"]} == set(before["target_modules"])
  again = load_peft(tmp_path, spec)
  assert again[0] == lora
  jax.tree.map(np.testing.assert_array_equal, again[1], adapter)


def test_adapters_born_here_come_back(tmp_path):
  spec, params = load_huggingface(GOLDEN / "huggingface_qwen3")
  lora = LoraSpec(
    rank=5,
    alpha=2.5,
    targets=("blocks/mlp/down/kernel", "blocks/attention/key/kernel"),
    dropout=0.1,
    is_weight_decomposed=True,
  )
  adapter = init_adapter(lora, params, jax.random.key(0))
  save_peft(tmp_path, spec, lora, adapter)
  found, again = load_peft(tmp_path, spec)
  assert (found.rank, found.scale, len(found.targets), found.is_weight_decomposed) == (5, 0.5, 2, True)
  # Dropout is told to PEFT, and does not come back: a training run asks for its own.
  assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.1
  assert found.dropout == 0
  jax.tree.map(np.testing.assert_array_equal, again, adapter)


def copy(name, tmp_path):
  return pathlib.Path(shutil.copytree(GOLDEN / f"peft_{name}", tmp_path / "copy"))


def change_tensors(folder, change):
  path = folder / "adapter_model.safetensors"
  safetensors_numpy.save_file(change(dict(safetensors_numpy.load_file(path))), path)


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
  "change, match",
  [
    (lambda t: {k: v for k, v in t.items() if k != KEY}, "layers.1.mlp.up_proj.lora_B.weight is missing"),
    (lambda t: {**t, KEY: t[KEY][:-1]}, r"up_proj.lora_B.weight: has shape \(11, 3\) instead of \(12, 3\)"),
    (lambda t: {**t, KEY.replace("_B", "_A"): np.zeros((2, 8), np.float32)}, r"lora_A.*\(2, 8\) instead"),
    (lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": t[KEY]}, "embed_tokens"),
    (lambda t: {"base_model.model.x.lora_A.weight": t[KEY]}, "fits no linear map"),
    (lambda t: {}, "no factors"),
  ],
)
def test_bad_tensors_are_named(change, match, tmp_path):
  folder = copy("llama", tmp_path)
  change_tensors(folder, change)
  spec, _ = load_huggingface(GOLDEN / "huggingface_llama")
  with pytest.raises(ValueError, match=match):
    load_peft(folder, spec)


@pytest.mark.parametrize(
  "field, value",
  [
    ("bias", "all"),
    ("peft_type", "IA3"),
    ("rank_pattern", {"q_proj": 4}),
    ("modules_to_save", ["lm_head"]),
    ("layers_to_transform", [0]),
    ("init_lora_weights", "pissa"),
    ("alora_invocation_tokens", [1, 2]),
    ("r", None),
  ],
)
def test_other_settings_are_named(field, value, tmp_path):
  folder = copy("llama", tmp_path)
  config = json.loads((folder / "adapter_config.json").read_text())
  (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
  spec, _ = load_huggingface(GOLDEN / "huggingface_llama")
  with pytest.raises(ValueError, match=f"adapter_config.json: .*{field}"):
    load_peft(folder, spec)


def test_dora_needs_its_magnitudes(tmp_path):
  folder = copy("llama_dora", tmp_path)
  key = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"
  spec, _ = load_huggingface(GOLDEN / "huggingface_llama")
  whole = dict(safetensors_numpy.load_file(folder / "adapter_model.safetensors"))
  change_tensors(folder, lambda t: {**t, key: t[key][:-1]})
  with pytest.raises(ValueError, match=r"magnitude_vector: has shape \(11,\) instead of \(12,\)"):
    load_peft(folder, spec)
  change_tensors(folder, lambda t: {k: v for k, v in whole.items() if k != key})
  with pytest.raises(ValueError, match="up_proj.lora_magnitude_vector is missing"):
    load_peft(folder, spec)


def test_other_files_and_models_are_refused(tmp_path):
  spec, _ = load_huggingface(GOLDEN / "huggingface_llama")
  folder = copy("llama", tmp_path)
  (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
  with pytest.raises(FileNotFoundError, match="pickled adapters are never opened"):
    load_peft(folder, spec)
  (folder / "adapter_model.safetensors").write_bytes(b"\0" * 20)
  with pytest.raises(ValueError, match="not a readable safetensors file"):
    load_peft(folder, spec)
  with pytest.raises(ValueError, match="fits no linear map"):
    load_peft(GOLDEN / "peft_llama", load_huggingface(GOLDEN / "huggingface_gpt2")[0])


def test_gpt2_s_three_projections_have_one_a_there(tmp_path):
  spec, params = load_huggingface(GOLDEN / "huggingface_gpt2")
  for lora, match in (
    (LoraSpec(rank=2), "have three here"),
    (LoraSpec(rank=2, targets=("blocks/attention/query/kernel",)), "only blocks/attention/query/kernel"),
  ):
    with pytest.raises(ValueError, match=match):
      save_peft(tmp_path, spec, lora, init_adapter(lora, params, jax.random.key(0)))
