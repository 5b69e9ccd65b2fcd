"""The recipe with other autoencoders: trained architectures, given files, the cache of activations."""

import json
import logging

import jax
import numpy as np
import pytest

from nr.interchange.sae_save import save_saelens
from nr.labels import NO_LABEL
from nr.training.model_files import load_model
from nr.training.writers import read_metrics
from tests.end_to_end.cocomix_runs import make_config, run


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A run directory with tokenizer and teacher, which every test goes on from."""
  workdir = tmp_path_factory.mktemp("begun") / "run"
  run(make_config(), workdir, "teacher")
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "last"), [("matryoshka", "sae"), ("gated", "labels")])
def test_an_architecture_is_trained_measured_and_labels(begun, tmp_path, arch, last):
  artifacts = run(make_config(**{"sae.arch": arch}), tmp_path / "run", last, begun)
  sae = artifacts["sae"]
  model = load_model(tmp_path / "run" / sae["model"])
  assert sae["arch"] == arch and model.spec.arch == ("jumprelu" if arch == "matryoshka" else arch)
  assert model.spec.max_active == 32  # 4 k
  assert 0 < sae["l0"] <= 64 and np.isfinite(sae["fvu"]) and sae["all_metrics"]["kl_zero"] > 0
  rows = [row for row in read_metrics(tmp_path / "run" / sae["directory"]) if "fvu" in row]
  assert ("fvu_first_14" in rows[-1]) == (arch == "matryoshka") and rows[-1]["fvu"] < rows[0]["fvu"]
  if last == "labels":
    split = artifacts["labels"]["splits"]["train"]
    cached = np.load(tmp_path / "run" / split["directory"] / "labels.npy")
    assert ((cached < 64) | (cached == NO_LABEL)).all() and (cached < 64).mean() > 0.5


@pytest.mark.slow
def test_cached_activations_train_the_same_autoencoder(begun, tmp_path):
  """To the last bit: they are read on the mesh that trains, here of two devices, and stored as they are."""
  changes = {"sae.train.mesh.data": 2}
  plain = run(make_config(**changes), tmp_path / "plain", "sae", begun)["sae"]
  cache = tmp_path / "cache"
  changes["sae.activation_cache.directory"] = str(cache)
  cached = run(make_config(**changes), tmp_path / "cached", "sae", begun)["sae"]
  assert cached["fingerprint"] == plain["fingerprint"]
  shard = cache / "activations-00000.npy"
  before = shard.stat().st_mtime_ns
  np.save(shard, -np.load(shard))  # of the same size: what is read next is seen to come from here
  again = run(make_config(**changes), tmp_path / "again", "sae", begun)["sae"]
  assert again["fingerprint"] != plain["fingerprint"] and shard.stat().st_mtime_ns > before
  header = json.loads((cache / "dataset.json").read_text())
  (cache / "dataset.json").write_text(json.dumps({**header, "teacher": "another"}))
  with pytest.raises(ValueError, match="field 'teacher': the activations were made with 'another'"):
    run(make_config(**changes), tmp_path / "other", "sae", begun)


@pytest.mark.slow
def test_a_given_autoencoder_is_opened_and_measured_like_the_trained_one(begun, tmp_path, caplog):
  own = {"sae.arch": "relu", "sae.max_active": 8}
  trained = run(make_config(**own), tmp_path / "trained", "sae", begun)["sae"]
  model = load_model(tmp_path / "trained" / trained["model"])
  folder = tmp_path / "saelens"
  save_saelens(folder, model.spec, jax.device_get(model.params), {"hook_name": "blocks.0.hook_resid_post"})
  given = {**own, "sae.checkpoint": str(folder)}
  with caplog.at_level(logging.WARNING):
    found = run(make_config(**given), tmp_path / "given", "sae", begun)["sae"]
  assert "raise sae.max_active" in caplog.text and found["all_metrics"]["crowded_fraction"] > 0.5
  assert found["fingerprint"] == trained["fingerprint"] and found["all_metrics"] == trained["all_metrics"]
  assert found["origin"] == {"format": "saelens", "hook_name": "blocks.0.hook_resid_post"}
  for changes, message in (
    ({"sae.arch": "gated"}, r"has arch='relu', which the config says otherwise; set --config.sae.arch=relu"),
    ({"sae.num_latents": 32}, r"has num_latents=64.*set --config.sae.num_latents=64"),
    ({"teacher.tap_layer": 1}, r"after block 0; the config says teacher.tap_layer=1, set it to 0"),
    ({"teacher.model.model_dim": 48}, r"of width 32, the teacher's are 48"),
    ({"sae.activation_cache.directory": "x"}, "leave one of them empty"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      make_config(**{**given, **changes})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sae.k_aux": 8, "sae.arch": "relu"}, "k_aux=8 decides nothing for arch='relu'; leave it unset"),
    ({"sae.penalty": "l1", "sae.arch": "jumprelu"}, "penalty='l1' is unknown: Valid: l0, target, tanh"),
    ({"sae.activation_cache.dtype": "float8"}, "sae.activation_cache.dtype='float8' is unknown"),
    ({"sae.activation_cache.dtype": "float16"}, "decides nothing without sae.activation_cache.directory"),
    ({"sae.prefixes": (8, 32), "sae.arch": "matryoshka"}, "must ascend from 1 or more to num_latents=64"),
  ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(changes, message):
  with pytest.raises(ValueError, match=message):
    make_config(**changes)


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka", "jumprelu", "gated", "relu"])
def test_one_value_chooses_the_architecture(arch):
  assert make_config(**{"sae.arch": arch}).sae.arch == arch
