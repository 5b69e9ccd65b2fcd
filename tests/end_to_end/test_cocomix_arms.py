"""Arms beyond the two default ones, and a given teacher: through the recipe's stages."""

import importlib.util
import pathlib

import pytest

from nr.recipes import cocomix
from nr.recipes.stages import run_stages

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
def test_a_given_teacher_brings_its_tokenizer_and_is_scored_like_the_trained_one(begun, tmp_path):
  workdir, trained = begun
  teacher = str(workdir / "teacher" / "model")
  artifacts = run(make_config(**{"teacher.checkpoint": teacher}), tmp_path / "run", "teacher")
  assert artifacts["tokenizer"]["fingerprint"] == trained["tokenizer"]["fingerprint"]
  for name in ("fingerprint", "params", "val_loss"):
    assert artifacts["teacher"][name] == trained["teacher"][name], name
  assert artifacts["teacher"]["checkpoint"] == teacher


def test_stages_that_no_arm_needs_are_left_out():
  names = lambda **changes: [stage.name for stage in cocomix.stages(make_config(**changes))]  # noqa: E731
  pause = {"students.arms.cocomix.concept.mode": "pause"}
  assert names(**pause) == ["tokenizer", "students", "evaluate", "report"]
  assert names(**pause, **{"students.arms.ntp.kd_weight": 0.1})[:3] == ["tokenizer", "teacher", "students"]
  predicting = {"students.arms.cocomix.concept.mode": "prediction_only"}
  assert names(**predicting)[-3:] == ["students", "evaluate", "report"] and "labels" in names(**predicting)
  assert "steer" in names()
