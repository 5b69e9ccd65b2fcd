"""Two processes of one run: they train as one, one of them writes, and what cannot work is refused."""

import json
import pathlib

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from nr import main
from nr.recipes import processes, stages
from nr.training import writers
from tests.recipes import toy_distributed
from tests.recipes.two_processes import run_two

TOY = pathlib.Path(toy_distributed.__file__)


def test_two_processes_train_as_one_and_one_writes(tmp_path):
  run = tmp_path / "run"
  codes, errors = run_two(TOY, run)
  assert codes == [0, 0], errors
  report = json.loads((run / "report.json").read_text())
  assert (report["processes"], report["devices"], report["made_by"]) == (2, 4, 0)
  noted = {path.stem: sorted(path.read_text().split()) for path in run.glob("*.processes")}
  assert noted == {"alone": ["0"], "together": ["0", "1"], "report": ["0"]}
  assert (run / "log.txt").exists() and (run / "log.process1.txt").exists()
  expected, loss = toy_distributed.trained(tmp_path / "one")
  rows, expected_rows = (writers.read_metrics(path) for path in (run / "together", tmp_path / "one"))
  assert [row["step"] for row in rows] == [row["step"] for row in expected_rows], "both processes wrote rows"
  with np.load(run / "together" / "params.npz") as found:
    for name, array in expected.items():
      np.testing.assert_allclose(found[name], array, rtol=2e-5, atol=1e-6)
  assert report["loss"] == pytest.approx(loss, rel=1e-5)


def test_what_one_process_alone_can_run_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  words = "2 processes: no stage of recipe 'tests.recipes.toy_distributed' is for several"
  with pytest.raises(stages.StageError, match=words):
    main.run(toy_distributed.get_config("one"), tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_failure_of_the_first_process_ends_the_others(tmp_path, monkeypatch):
  found = processes.Processes()
  found.index, found.count, found.attempt = 1, 2, 7
  monkeypatch.setattr(processes, "_POLL_SECONDS", 0.01)
  manifest = tmp_path / stages.MANIFEST
  manifest.write_text(json.dumps({"alone": {"status": "failed", "attempt": 7}}))
  with pytest.raises(processes.ProcessError, match="stage 'alone' failed on the first process"):
    found.wait_for(manifest, "alone")
  manifest.write_text(json.dumps({"alone": {"status": "finished", "attempt": 7, "artifact": {"a": 1}}}))
  assert found.wait_for(manifest, "alone")["artifact"] == {"a": 1}


def test_folders_that_are_not_shared_are_noticed(tmp_path, monkeypatch):
  second = processes.Processes()
  second.index, second.count = 1, 2
  monkeypatch.setattr(processes, "_SHARED_SECONDS", 0.02)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value: np.int32(5))
  monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: np.array([True, bool(value)]))
  with pytest.raises(processes.ProcessError, match="not all of the 2 processes see what the first one wrote"):
    second.meet(tmp_path)
  (tmp_path / processes.ATTEMPT).write_text(json.dumps({"attempt": 5}))
  second.meet(tmp_path)


def test_one_process_waits_for_nothing(tmp_path):
  alone = processes.Processes()
  alone.meet(tmp_path)
  assert alone.is_first and not (tmp_path / processes.ATTEMPT).exists()


@pytest.mark.parametrize(
  "text, words",
  [
    ("host", "give 'auto' or ADDRESS:PORT,COUNT,INDEX"),
    ("host:1,2", "give 'auto' or"),
    ("host:1,2,x", "give 'auto' or"),
    ("host:1,2,2", "INDEX counts from 0 to COUNT - 1 = 1"),
  ],
)
def test_mistakes_of_the_flag_are_named(text, words):
  with pytest.raises(ValueError, match=words):
    main.join(text)


def test_without_a_cluster_auto_says_what_to_give(monkeypatch):
  def initialize():  # as JAX answers where it finds no cluster
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(ValueError, match="no Cloud TPU, Slurm, Kubernetes or Open MPI job .*; give ADDRESS"):
    main.join("auto")
