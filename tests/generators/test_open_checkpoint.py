"""Checkpoints of every kind become networks with their tokenizers; the rest is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.data.tokenizers import train_sentencepiece
from nr.generation.sample import sample, texts
from nr.generators.checkpoints import open_checkpoint
from nr.interchange.huggingface import save_huggingface
from nr.interchange.peft import save_peft
from nr.models import lora
from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.parameters import split, stack_layers
from nr.models.transformer import TransformerSpec
from nr.training.adapter_files import save_adapter
from nr.training.artifacts import save_tree
from nr.training.model_files import ConceptMixingModelSpec, build_model, save_model

TEXT = ["the sea the sea and the ships that sail on the sea", "a ship is on the sea and the sea is wide"] * 40
SIZES = dict(num_layers=2, model_dim=16, num_heads=2, max_length=48)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
  """A run with two models, as recipes leave them."""
  folder = tmp_path_factory.mktemp("run")
  tokenizer = train_sentencepiece(TEXT, 280)
  tokenizer.save(folder / "tokenizer" / "tokenizer")
  plain = TransformerSpec.gpt2(vocab_size=tokenizer.vocab_size, **SIZES)
  concepts = ConceptMixingModelSpec(plain, ConceptMixingSpec(num_concepts=24, top_k=4, insert_at=1))
  runs = {}
  for name, spec in (("ntp", plain), ("cocomix", concepts)):
    params = split(build_model(spec, jax.random.key(1)))[1]
    save_model(folder / "students" / name / "model", spec, params, tokenizer.fingerprint)
    runs[name] = {"model": f"students/{name}/model"}
  manifest = {"stages": {"students": {"artifact": {"runs": runs}}}}
  (folder / "manifest.json").write_text(json.dumps(manifest))
  return folder, plain, tokenizer


@pytest.mark.parametrize("name", ["ntp", "cocomix"])
def test_a_model_of_a_run_directory_generates(run_directory, name):
  folder, spec, tokenizer = run_directory
  checkpoint = open_checkpoint(folder, model=f"students/{name}/model")
  direct = open_checkpoint(folder / "students" / name / "model")
  assert checkpoint.tokenizer.fingerprint == tokenizer.fingerprint == direct.tokenizer.fingerprint
  assert checkpoint.begin_ids == (tokenizer.end_of_text_id,) and checkpoint.network.spec.layers == "unroll"
  prompt = jnp.array([[*checkpoint.begin_ids, *tokenizer.encode("the sea")]])
  drawn = sample(checkpoint.network, prompt, max_new_tokens=5)
  np.testing.assert_array_equal(drawn.tokens_RN, sample(direct.network, prompt, max_new_tokens=5).tokens_RN)
  stacked = open_checkpoint(folder, model=f"students/{name}/model", layers="scan")
  np.testing.assert_array_equal(drawn.tokens_RN, sample(stacked.network, prompt, max_new_tokens=5).tokens_RN)


def test_a_folder_in_hugging_face_format_generates_what_its_parameters_do(run_directory, tmp_path):
  folder, spec, tokenizer = run_directory
  ours = open_checkpoint(folder / "students" / "ntp" / "model", layers="scan")
  save_huggingface(tmp_path, spec, ours.network.params)
  theirs = open_checkpoint(tmp_path, tokenizer=folder / "tokenizer" / "tokenizer")
  prompt = jnp.array([[3, 4, 5]])
  np.testing.assert_array_equal(
    sample(theirs.network, prompt, max_new_tokens=5).tokens_RN,
    sample(ours.network, prompt, max_new_tokens=5).tokens_RN,
  )


def made_adapter(params, rank=2, **settings):
  """An adapter that changes what is said."""
  spec = lora.LoraSpec(rank=rank, alpha=8.0, targets=("blocks/mlp/(up|down)/kernel",), **settings)
  adapter = lora.init_adapter(spec, params, jax.random.key(3))
  return spec, jax.tree.map(lambda leaf: leaf + 0.5, adapter)


@pytest.mark.parametrize("layout, layers", [("ours", "unroll"), ("run", "scan"), ("peft", "scan")])
def test_an_adapter_is_added_into_the_weights_it_was_trained_on(run_directory, tmp_path, layout, layers):
  folder, _, _ = run_directory
  plain = open_checkpoint(folder, model="students/ntp/model", layers="scan")
  spec, adapter = made_adapter(plain.network.params, is_weight_decomposed=layout != "peft")
  if layout == "peft":
    pytest.importorskip("safetensors", reason="needs safetensors (extra [hub])")
    save_peft(tmp_path, plain.spec, spec, adapter)
  else:
    save_adapter(tmp_path / "arms" / "adapter", spec, adapter, plain.fingerprint)
    manifest = {"stages": {"arms": {"artifact": {"adapter": "arms/adapter"}}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  given = tmp_path / "arms" / "adapter" if layout == "ours" else tmp_path
  expected = lora.merge(plain.network.params, adapter, spec)
  found = open_checkpoint(folder, model="students/ntp/model", layers=layers, adapter=given)
  stacked = stack_layers(found.network.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stacked, expected)
  up, other = (tree["blocks"]["mlp"]["up"]["kernel"] for tree in (stacked, plain.network.params))
  assert np.abs(up - other).max() > 0.1 and str(given) in found.name


def test_an_adapter_that_does_not_fit_is_named(run_directory, tmp_path):
  folder, _, _ = run_directory
  ntp = dict(model="students/ntp/model", layers="scan")
  params = open_checkpoint(folder, **ntp).network.params
  spec, adapter = made_adapter(params)
  save_adapter(tmp_path / "other", spec, adapter, "0" * 64)
  narrow = jax.tree.map(lambda leaf: leaf[:1], adapter)
  save_adapter(tmp_path / "narrow", spec, narrow)
  save_tree(tmp_path / "model", {"a": jnp.zeros(2)}, {"kind": "transformer"})
  several = {"one": {"adapter": "a"}, "two": {"adapter": "b"}}
  (tmp_path / "manifest.json").write_text(json.dumps(several))
  for path, message in (
    ("nowhere", "no such folder"),
    ("other", "was trained on parameters 000000000000, and .* holds"),
    ("narrow", "does not fit .*students/ntp/model: adapter of blocks/mlp/"),
    ("model", "holds a transformer, not an adapter"),
    (".", "holds 2 adapters; give the folder of one: a, b"),
  ):
    with pytest.raises(ValueError, match=message):
      open_checkpoint(folder, **ntp, adapter=tmp_path / path)
  (tmp_path / "manifest.json").unlink()
  with pytest.raises(ValueError, match="holds no adapter that is known"):
    open_checkpoint(folder, **ntp, adapter=tmp_path)
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(ValueError, match="PEFT adapts plain transformers"):
    open_checkpoint(folder, model="students/cocomix/model", adapter=tmp_path)


def test_a_real_model_tells_the_story_that_is_known_of_it(nr_data):
  checkpoint = open_checkpoint(nr_data / "models" / "stories260k" / "stories260K.bin")
  expected = json.loads((nr_data / "models" / "stories260k" / "expected.json").read_text())
  drawn = sample(checkpoint.network, jnp.array([list(checkpoint.begin_ids)]), max_new_tokens=40)
  (text,) = texts(drawn, checkpoint.tokenizer.decode)
  assert text.startswith("Once upon a time, there was a little girl named Lily.") and expected


def test_what_cannot_be_opened_is_named(run_directory, tmp_path):
  folder, _, _ = run_directory
  for path, settings, message in (
    (tmp_path / "nowhere", {}, "no such file or folder"),
    (tmp_path, {}, "holds no model that is known"),
    (folder, {}, "choose one with --model: students/cocomix/model, students/ntp/model"),
    (folder, dict(model="students/ntp/modle"), "did you mean 'students/ntp/model'"),
  ):
    with pytest.raises(ValueError, match=message):
      open_checkpoint(path, **settings)
  other = train_sentencepiece([text.upper() for text in TEXT], 280)
  other.save(tmp_path / "other")
  with pytest.raises(ValueError, match="is not that one; name its folder with --tokenizer"):
    open_checkpoint(folder, model="students/ntp/model", tokenizer=tmp_path / "other")
