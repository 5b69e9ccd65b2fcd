"""launch/xm.py: points become jobs of XManager; what it cannot launch is refused."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

from nr import sweep as nr_sweep
from nr.sweeps.points import SweepError
from tests.launch.programs import load
from tests.sweeps.toy_config import get_config

ROOT = pathlib.Path(__file__).parents[2]
TOY = ROOT / "tests" / "sweeps"


@pytest.fixture(scope="module")
def xm():
  return load("xm")


def request_of():
  return nr_sweep.Request(f"{TOY / 'toy_sweeps.py'}:grid", get_config(), "toy_config.py:tiny", {"seed": 3})


def test_a_job_is_a_run_of_nr_main(xm):
  [job, other] = xm.job_specs(request_of(), ["*rate=1.0"], "", pathlib.Path("runs/x"))
  assert job.name == "size=2__rate=1.0" and other.name == "size=4__rate=1.0"
  assert job.arguments == [
    "-m",
    "nr.main",
    "--config=toy_config.py:tiny",
    "--config.seed=3",
    "--config.base.size=2",
    "--config.train.rate=1.0",
    "--config.arms.first.mode=on",
    "--workdir=runs/x/points/size=2__rate=1.0",
  ]


def test_requirements_are_numbers_or_topologies(xm):
  assert xm.requirements(["a100=8", "cpu=48", "tpu_v3=2x2"]) == {"a100": 8, "cpu": 48, "tpu_v3": "2x2"}
  with pytest.raises(SweepError, match="give RESOURCE=COUNT"):
    xm.requirements(["a100"])
  with pytest.raises(SweepError, match="tpu_v2 and tpu_v3 only; use launch/tpu_pod.py"):
    xm.requirements(["tpu_v5e=4x4"])


def test_the_extra_is_named(xm, monkeypatch):
  monkeypatch.setitem(sys.modules, "xmanager", None)
  with pytest.raises(ImportError, match=r"pip install 'nr\[launch\]'"):
    xm.import_xmanager()


def recording_xmanager(calls):
  """Stands in for XManager: what is packaged and added is written down."""

  class Experiment:
    def __enter__(self):
      return self

    def __exit__(self, *unused):
      calls.append("closed")

    def package(self, packageables):
      calls.append(("package", packageables[0]))
      return ["executable"]

    def add(self, job):
      calls.append(("add", job))

  record = lambda kind: lambda *args, **kwargs: (kind, args, kwargs)  # noqa: E731
  xm = types.SimpleNamespace(
    Binary=record("binary"),
    Container=record("container"),
    Packageable=record("packageable"),
    Job=record("job"),
    JobRequirements=record("requirements"),
    SequentialArgs=types.SimpleNamespace(from_list=list),
  )
  local, vertex = (types.SimpleNamespace(Spec=record("spec")) for _ in range(2))
  local_type = type("Local", (), {"Spec": staticmethod(local.Spec)})
  vertex_type = type(
    "Vertex", (), {"Spec": staticmethod(vertex.Spec), "__init__": lambda self, requirements: None}
  )
  made = lambda experiment_title: calls.append(experiment_title) or Experiment()  # noqa: E731
  return xm, types.SimpleNamespace(Local=local_type, Vertex=vertex_type, create_experiment=made)


def test_jobs_are_added_one_a_point(xm, monkeypatch, tmp_path):
  calls = []
  monkeypatch.setattr(xm, "import_xmanager", lambda: recording_xmanager(calls))
  specs = xm.job_specs(request_of(), [], "", tmp_path)
  xm.launch(specs, "a title")
  assert calls[0] == "a title" and calls[-1] == "closed"
  assert calls[1][1][1][0] == ("binary", (), {"path": sys.executable})
  assert [call[1][2]["args"] for call in calls[2:-1]] == [spec.arguments for spec in specs]


def test_a_dry_run_prints_the_jobs_and_needs_no_xmanager(tmp_path):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  flags = [f"--config={TOY / 'toy_config.py'}", f"--sweep={TOY / 'toy_sweeps.py'}", f"--workdir={tmp_path}/x"]
  command = [sys.executable, str(ROOT / "launch" / "xm.py"), *flags, "--dry_run", "--only=rate=0.5"]
  found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
  [line] = found.stdout.splitlines()
  assert line.startswith("python -m nr.main --config=") and "--config.train.rate=0.5" in line
  assert not (tmp_path / "x").exists()
