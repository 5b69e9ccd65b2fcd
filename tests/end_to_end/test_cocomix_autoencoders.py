"""The recipe with other autoencoders: trained architectures, given files, the cache of activations."""

import importlib.util
import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest

from nr.interchange.sae_save import save_saelens
from nr.labels import NO_LABEL
from nr.recipes import cocomix
from nr.recipes.stages import run_stages
from nr.training.model_files import load_model

CONFIG_FILE = pathlib.Path(__file__).parents[2] / "configs" / "cocomix.py"


def make_config(**changes):
  spec = importlib.util.spec_from_file_location("cocomix_config", CONFIG_FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config("miniature")
  config.teacher.train.update(steps=4, eval_every=0)
  config.sae.train.update(steps=8)
  config.update_from_flattened_dict(changes)
  cocomix.validate(config)
  return config


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A run directory with tokenizer and teacher, which every test goes on from."""
  workdir = tmp_path_factory.mktemp("begun") / "run"
  config = make_config()
  for stage in ("tokenizer", "teacher"):
    run_stages(cocomix.stages(config), config, workdir, only=stage)
  return workdir


def go_on(begun, workdir, stages=("sae",), **changes):
  """Runs stages from a copy of the begun run; returns the artifacts."""
  shutil.copytree(begun, workdir)
  config = make_config(**changes)
  for stage in stages:
    artifacts = run_stages(cocomix.stages(config), config, workdir, only=stage)
  return artifacts


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["matryoshka", "gated"])
def test_an_architecture_runs_up_to_its_labels(begun, tmp_path, arch):
  artifacts = go_on(begun, tmp_path / "run", ("sae", "labels"), **{"sae.arch": arch})
  sae, labels = artifacts["sae"], artifacts["labels"]
  model = load_model(tmp_path / "run" / sae["model"])
  assert sae["arch"] == arch and model.spec.arch == ("jumprelu" if arch == "matryoshka" else arch)
  assert model.spec.max_active == 32  # 4 k
  assert 0 < sae["l0"] <= 64 and np.isfinite(sae["fvu"]) and sae["all_metrics"]["kl_zero"] > 0
  rows = [json.loads(line) for line in (tmp_path / "run/sae/metrics/metrics.jsonl").read_text().splitlines()]
  assert ("fvu_first_14" in rows[-1]) == (arch == "matryoshka") and rows[-1]["fvu"] < rows[0]["fvu"]
  cached = np.load(tmp_path / "run" / labels["splits"]["train"]["directory"] / "labels.npy")
  assert ((cached < 64) | (cached == NO_LABEL)).all() and (cached < 64).mean() > 0.5


@pytest.mark.slow
def test_cached_activations_train_the_same_autoencoder(begun, tmp_path):
  changes = {"sae.train.steps": 30}  # more than the corpus holds: windows are read again
  plain = go_on(begun, tmp_path / "plain", **changes)["sae"]
  cache = tmp_path / "cache"
  cached = go_on(begun, tmp_path / "cached", **changes, **{"sae.activation_cache.directory": str(cache)})[
    "sae"
  ]
  assert cached["fingerprint"] == plain["fingerprint"]
  shard = cache / "activations-00000.npy"
  before = shard.stat().st_mtime_ns
  again = go_on(begun, tmp_path / "again", **changes, **{"sae.activation_cache.directory": str(cache)})["sae"]
  assert again["fingerprint"] == plain["fingerprint"] and shard.stat().st_mtime_ns == before
  header = json.loads((cache / "dataset.json").read_text())
  header["teacher"] = "another"
  (cache / "dataset.json").write_text(json.dumps(header))
  with pytest.raises(ValueError, match="field 'teacher': the activations were made with 'another'"):
    go_on(begun, tmp_path / "other", **changes, **{"sae.activation_cache.directory": str(cache)})


@pytest.mark.slow
def test_a_given_autoencoder_is_opened_and_measured_like_the_trained_one(begun, tmp_path, caplog):
  trained = go_on(begun, tmp_path / "trained", **{"sae.arch": "relu", "sae.max_active": 8})["sae"]
  model = load_model(tmp_path / "trained" / trained["model"])
  folder = tmp_path / "saelens"
  save_saelens(folder, model.spec, jax.device_get(model.params), {"hook_name": "blocks.0.hook_resid_post"})
  given = {"sae.arch": "relu", "sae.checkpoint": str(folder), "sae.max_active": 8}
  with caplog.at_level(logging.WARNING):
    found = go_on(begun, tmp_path / "given", ("sae", "labels"), **given)["sae"]
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
