"""Stages run once, resume, and never mix what two configs made."""

import hashlib
import json
import os
import time

import ml_collections
import pytest

from nr.recipes import input_files
from nr.recipes import stages as stages_lib
from nr.recipes.input_files import FileHashes


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


def reading(calls, *fields):
  def read(context):
    calls.append("read")
    return {"text": "".join(open(context.config.data[field]).read() for field in fields)}

  files = tuple(f"data.{field}" for field in fields)
  return [
    stages_lib.Stage("read", read, sections=("data",), files=files),
    stages_lib.Stage("use", lambda context: context.inputs["read"], inputs=("read",)),
  ]


def test_a_changed_file_under_the_same_path_is_noticed(tmp_path):
  path, workdir, calls = tmp_path / "pairs.jsonl", tmp_path / "run", []
  path.write_text("one")
  config = ml_collections.ConfigDict({"data": {"pairs": str(path), "none": ""}})
  stages_lib.run_stages(reading(calls, "pairs"), config, workdir)
  entry = stages_lib.read_manifest(workdir)["read"]
  assert entry["files"] == {"data.pairs": {"bytes": 3, "sha256": hashlib.sha256(b"one").hexdigest()}}
  assert "files" not in stages_lib.read_manifest(workdir)["use"]
  path.touch()
  stages_lib.run_stages(reading(calls, "pairs"), config, workdir)
  assert calls == ["read"]
  path.write_text("two")
  message = r"'read'.*the content of data\.pairs='\S*pairs.jsonl' is another: 3 bytes, .* 3 bytes.*rm -r \S*read \S*use"
  with pytest.raises(stages_lib.StageError, match=message):
    stages_lib.run_stages(reading(calls, "pairs"), config, workdir)
  path.unlink()
  with pytest.raises(stages_lib.StageError, match="3 bytes, sha256 [0-9a-f]{12} there, nothing now"):
    stages_lib.run_stages(reading(calls, "pairs"), config, workdir)


def test_stages_without_files_have_the_fingerprint_that_they_had(config, tmp_path):
  stages_lib.run_stages(recipe([]), config, tmp_path)
  before = stages_lib.read_manifest(tmp_path)["first"]["fingerprint"]
  content = {
    "config": {"first": {"value": 2}, "seed": 0},
    "inputs": {},
    "versions": stages_lib.versions(),
  }
  assert before == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
  assert not (tmp_path / input_files.CACHE).exists()


def test_folders_count_by_their_files_and_hidden_ones_do_not(tmp_path):
  folder = tmp_path / "model"
  (folder / "deep").mkdir(parents=True)
  (folder / "config.json").write_text("{}")
  (folder / "deep" / "weights").write_bytes(bytes(range(256)))
  first = FileHashes(tmp_path).describe(folder)
  assert first["bytes"] == 258 and first["files"] == 2
  (folder / ".cache").write_text("x")
  (folder / ".git").mkdir()
  (folder / ".git" / "HEAD").write_text("x")
  assert FileHashes(tmp_path).describe(folder) == first
  # A copy elsewhere, and links to the files as model hubs make them, hold the same.
  linked = tmp_path / "linked"
  (linked / "deep").mkdir(parents=True)
  for name in ("config.json", "deep/weights"):
    (linked / name).symlink_to(folder / name)
  assert FileHashes(tmp_path).describe(linked) == first
  (folder / "deep" / "weights").write_bytes(bytes(range(255)) + b"\0")
  changed = FileHashes(tmp_path).describe(folder)
  assert changed["bytes"] == 258 and changed != first
  (folder / "deep" / "weights").rename(folder / "weights")
  assert FileHashes(tmp_path).describe(folder) != changed
  assert FileHashes(tmp_path).describe(tmp_path / "nothing") is None


def test_a_run_directory_counts_by_what_its_finished_stages_made(config, tmp_path):
  run = tmp_path / "other"
  stages_lib.run_stages(recipe([]), config, run)
  first = FileHashes(tmp_path).describe(run)
  (run / "log.txt").write_text("a later line")
  stages_lib.run_stages(recipe([]), config, run)
  assert FileHashes(tmp_path).describe(run) == first
  manifest = stages_lib.read_manifest(run)
  manifest["first"]["artifact"] = {"value": 3}
  stages_lib.write_json(run / "manifest.json", manifest)
  assert FileHashes(tmp_path).describe(run) != first


def test_large_files_are_read_once(tmp_path, monkeypatch):
  path, hashed = tmp_path / "weights", []
  path.write_bytes(b"w" * 1000)
  real = hashlib.file_digest
  monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: hashed.append(1) or real(*arguments))
  # Written just now: it could be written again within the same tick of the file system's clock.
  fresh = FileHashes(tmp_path)
  expected = fresh.describe(path)
  fresh.save()
  assert not (tmp_path / input_files.CACHE).exists()
  later = time.time() + 60
  monkeypatch.setattr(time, "time", lambda: later)
  for _ in range(3):
    hashes = FileHashes(tmp_path)
    assert hashes.describe(path) == expected
    hashes.save()
  assert len(hashed) == 2
  # The same size and the same modification time: the inode's own time tells.
  state = path.stat()
  path.write_bytes(b"v" * 1000)
  os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
  assert FileHashes(tmp_path).describe(path) != expected
  (tmp_path / input_files.CACHE).write_text("{broken")
  assert FileHashes(tmp_path).describe(path) != expected
