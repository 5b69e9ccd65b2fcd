"""Arms beyond the two default ones, and a given teacher: through the recipe's stages."""

import importlib.util
import pathlib
import shutil

import numpy as np
import pytest

from nr.data.tokenizers import SentencePieceTokenizer, load_tokenizer
from nr.recipes import cocomix
from nr.recipes.cocomix import settings
from nr.recipes.stages import run_stages
from nr.training.writers import read_metrics

CONFIG_FILE = pathlib.Path(__file__).parents[2] / "configs" / "cocomix.py"


def make_config(**changes):
  spec = importlib.util.spec_from_file_location("cocomix_config", CONFIG_FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config("miniature")
  config.corpus.max_documents = 8
  for train in (config.teacher.train, config.sae.train, config.students.train):
    train.update(steps=2, eval_every=0, log_every=1)
    train.schedule.warmup_steps = 0
    train.checkpoint.every = 0
  config.update_from_flattened_dict(changes)
  cocomix.validate(config)
  return config


def run(config, workdir, last):
  for stage in cocomix.stages(config):
    artifacts = run_stages(cocomix.stages(config), config, workdir, only=stage.name)
    if stage.name == last:
      return artifacts
  raise AssertionError(f"no stage {last}")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A run directory with tokenizer and teacher, and their artifacts."""
  workdir = tmp_path_factory.mktemp("arms") / "run"
  return workdir, run(make_config(), workdir, "teacher")


@pytest.mark.slow
def test_labels_of_two_kinds_lie_side_by_side_and_an_arm_learns_from_teacher_and_online_labels(
  begun, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(begun[0], workdir)
  config = make_config()
  with config.unlocked():
    config.targets.variants = {
      "negated": {"sign": "negated"},
      "made_again": {"sign": "negated", "source": "online"},
    }
  config.students.arms.cocomix.update(labels="made_again", kd_weight=0.1)
  cocomix.validate(config)
  artifacts = run(config, workdir, "evaluate")

  labels, negated = artifacts["labels"], settings.attribution_id(settings.attribution_spec(config, "negated"))
  assert list(labels["variants"]) == [negated]
  kinds = [labels, labels["variants"][negated]]
  assert [kind["splits"]["train"]["header"]["attribution"]["sign"] for kind in kinds] == ["paper", "negated"]
  found = [np.load(workdir / kind["splits"]["train"]["directory"] / "labels.npy") for kind in kinds]
  assert (found[0] != found[1]).any(axis=1).mean() > 0.9

  students = artifacts["students"]
  assert students["arms"] == ["ntp", "cocomix"] and students["predicting"] == ["cocomix"]
  assert students["runs"]["cocomix_seed0"]["labels"] == "made_again"
  rows = read_metrics(workdir / students["runs"]["cocomix_seed0"]["directory"])
  assert {"distillation_loss", "concept_loss", "label_recall"} <= set().union(*rows)
  # The teacher, its partial backward and the autoencoder run in the step, and are counted.
  flops = [students["runs"][f"{arm}_seed0"]["train_flops_per_token"] for arm in students["arms"]]
  assert flops[1] > 2 * flops[0]
  assert set(artifacts["evaluate"]["comparisons"]) == {"cocomix"}
  assert 0 <= artifacts["evaluate"]["runs"]["cocomix_seed0"]["label_recall"] <= 1


@pytest.mark.slow
def test_a_given_teacher_brings_its_tokenizer_and_is_scored_like_the_trained_one(begun, tmp_path):
  workdir, trained = begun
  teacher = str(workdir / "teacher" / "model")
  artifacts = run(make_config(**{"teacher.checkpoint": teacher}), tmp_path / "run", "teacher")
  assert artifacts["tokenizer"]["fingerprint"] == trained["tokenizer"]["fingerprint"]
  for name in ("fingerprint", "params", "val_loss"):
    assert artifacts["teacher"][name] == trained["teacher"][name], name
  assert artifacts["teacher"]["checkpoint"] == teacher

  folder = tmp_path / "other"  # the same pieces, another end of text
  own = load_tokenizer(workdir / "tokenizer" / "tokenizer")
  SentencePieceTokenizer((workdir / "tokenizer" / "tokenizer" / "tokenizer.model").read_bytes(), 1).save(
    folder
  )
  assert own.end_of_text_id != 1
  for changes, message in (
    (
      {"teacher.model.num_layers": 3},
      r"has num_layers=2, which the config says otherwise; set --config.teacher.mod",
    ),
    ({"window.length": 64}, r"window.length=64 is more than the 32 positions of teacher.checkpoint"),
    (
      {"tokenizer.path": str(folder)},
      r"is not the tokenizer of teacher.checkpoint=.* leave tokenizer.path empty",
    ),
    ({"teacher.checkpoint": "nowhere"}, r"teacher.checkpoint='nowhere': no such file or folder"),
  ):
    with pytest.raises(ValueError, match=message):
      make_config(**{"teacher.checkpoint": teacher, **changes})


def test_stages_that_no_arm_needs_are_left_out():
  names = lambda **changes: [stage.name for stage in cocomix.stages(make_config(**changes))]  # noqa: E731
  pause = {"students.arms.cocomix.concept.mode": "pause"}
  assert names(**pause) == ["tokenizer", "students", "evaluate", "report"]
  assert names(**pause, **{"students.arms.ntp.kd_weight": 0.1})[:3] == ["tokenizer", "teacher", "students"]
  predicting = {"students.arms.cocomix.concept.mode": "prediction_only"}
  assert names(**predicting)[-3:] == ["students", "evaluate", "report"] and "labels" in names(**predicting)
  assert "steer" in names()
