"""Stages run once, resume, and never mix what two configs made."""

import json

import ml_collections
import pytest

from nr.recipes import stages as stages_lib


@pytest.fixture
def config():
  return ml_collections.ConfigDict({"first": {"value": 2}, "second": {"factor": 3}, "seed": 0})


def recipe(calls):
  def first(context):
    calls.append("first")
    return {"value": context.config.first.value}

  def second(context):
    calls.append("second")
    return {"product": context.inputs["first"]["value"] * context.config.second.factor}

  return [
    stages_lib.Stage("first", first, sections=("first", "seed")),
    stages_lib.Stage("second", second, sections=("second",), inputs=("first",)),
  ]


def test_stages_run_in_order_and_pass_artifacts(config, tmp_path):
  calls = []
  artifacts = stages_lib.run_stages(recipe(calls), config, tmp_path)
  assert calls == ["first", "second"]
  assert artifacts["second"] == {"product": 6}


def test_finished_stages_are_skipped(config, tmp_path):
  stages_lib.run_stages(recipe([]), config, tmp_path)
  calls = []
  artifacts = stages_lib.run_stages(recipe(calls), config, tmp_path)
  assert calls == []
  assert artifacts["second"] == {"product": 6}


def test_an_interrupted_stage_runs_again_and_its_time_adds_up(config, tmp_path):
  def interrupted(context):
    (context.directory / "partial").write_text("half")
    raise KeyboardInterrupt

  broken = [stages_lib.Stage("first", interrupted, sections=("first", "seed"))]
  with pytest.raises(KeyboardInterrupt):
    stages_lib.run_stages(broken, config, tmp_path)
  entry = stages_lib.read_manifest(tmp_path)["first"]
  assert entry["status"] == "running" and entry["seconds"] >= 0

  seen = []
  resumed = [
    stages_lib.Stage(
      "first",
      lambda context: seen.append((context.directory / "partial").read_text()) or {"value": 1},
      sections=("first", "seed"),
    )
  ]
  assert stages_lib.run_stages(resumed, config, tmp_path) == {"first": {"value": 1}}
  assert seen == ["half"]


def test_a_work_directory_made_by_another_config_is_refused(config, tmp_path):
  stages_lib.run_stages(recipe([]), config, tmp_path)
  config.second.factor = 4
  with pytest.raises(
    stages_lib.StageError, match=r"'second'.*second\.factor: 3 there, 4 now.*rm -r \S*second$"
  ):
    stages_lib.run_stages(recipe([]), config, tmp_path)


def test_operational_fields_of_training_may_change(tmp_path):
  config = ml_collections.ConfigDict(
    {"first": {"value": 2, "train": {"steps": 5, "log_every": 1}}, "second": {"factor": 3}, "seed": 0}
  )
  stages_lib.run_stages(recipe([]), config, tmp_path)
  config.first.train.log_every = 7
  calls = []
  stages_lib.run_stages(recipe(calls), config, tmp_path)
  assert calls == []
  config.first.train.steps = 6
  with pytest.raises(stages_lib.StageError, match=r"first\.train\.steps: 5 there, 6 now"):
    stages_lib.run_stages(recipe([]), config, tmp_path)


def test_numbers_that_are_not_finite_become_null(tmp_path):
  stages_lib.write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.5]})
  assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5]}


def test_a_full_disk_does_not_hide_what_went_wrong(config, tmp_path, monkeypatch):
  real = stages_lib.replace_text

  def fail(context):
    def full(path, text):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages_lib, "replace_text", full)
    raise RuntimeError("the checkpoint could not be written")

  broken = [stages_lib.Stage("first", fail, sections=("first",))]
  with pytest.raises(RuntimeError, match="checkpoint could not be written"):
    stages_lib.run_stages(broken, config, tmp_path)
  monkeypatch.setattr(stages_lib, "replace_text", real)


def test_a_change_upstream_names_everything_downstream(config, tmp_path):
  stages_lib.run_stages(recipe([]), config, tmp_path)
  config.first.value = 5
  with pytest.raises(stages_lib.StageError, match=r"'first'.*rm -r \S*first \S*second"):
    stages_lib.run_stages(recipe([]), config, tmp_path)


def test_removed_folders_are_made_again(config, tmp_path):
  stages_lib.run_stages(recipe([]), config, tmp_path)
  config.second.factor = 4
  (tmp_path / "second").rmdir()
  calls = []
  assert stages_lib.run_stages(recipe(calls), config, tmp_path)["second"] == {"product": 8}
  assert calls == ["second"]


def test_one_stage_alone_needs_its_inputs(config, tmp_path):
  with pytest.raises(stages_lib.StageError, match="needs the finished stage 'first'"):
    stages_lib.run_stages(recipe([]), config, tmp_path, only="second")
  calls = []
  stages_lib.run_stages(recipe(calls), config, tmp_path, only="first")
  assert calls == ["first"]


def test_an_unknown_stage_names_the_nearest(config, tmp_path):
  with pytest.raises(stages_lib.StageError, match="did you mean 'second'"):
    stages_lib.run_stages(recipe([]), config, tmp_path, only="secnd")


def test_a_damaged_manifest_is_one_clear_error(config, tmp_path):
  (tmp_path / "manifest.json").write_text("{broken")
  with pytest.raises(stages_lib.StageError, match="not valid JSON"):
    stages_lib.run_stages(recipe([]), config, tmp_path)


def test_config_is_kept_with_the_run(config, tmp_path):
  stages_lib.run_stages(recipe([]), config, tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["first"] == {"value": 2}
