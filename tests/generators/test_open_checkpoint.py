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
from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.parameters import split
from nr.models.transformer import TransformerSpec
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
