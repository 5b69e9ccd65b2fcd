"""launch/xm.py: points become jobs of XManager; what it cannot launch is refused."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl.testing import flagsaver

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


def flags_of(workdir):
  return [f"--config={TOY / 'toy_config.py'}", f"--sweep={TOY / 'toy_sweeps.py'}", f"--workdir={workdir}"]


def test_a_dry_run_prints_the_jobs_and_needs_no_xmanager(tmp_path):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  flags = [*flags_of(tmp_path / "x"), "--dry_run", "--only=rate=0.5"]
  command = [sys.executable, str(ROOT / "launch" / "xm.py"), *flags]
  found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
  [line] = found.stdout.splitlines()
  assert line.startswith("python -m nr.main --config=") and "--config.train.rate=0.5" in line
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  "start", [["-m", "xmanager.cli.cli", "launch", "launch/xm.py", "--"], ["launch/xm.py"]]
)
def test_xmanager_runs_the_jobs_on_this_machine(start, tmp_path):
  pytest.importorskip("xmanager", reason="needs the extra [launch]")
  # XManager keeps its experiments in the home folder.
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
  only = ["--only=rate=0.5", "--only=rate=0.75", "--config.seeds=(3, 4)"]
  command = [sys.executable, *start, *flags_of(tmp_path / "x"), *only]
  found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert found.returncode == 1 and "error: Process" in found.stderr, "rate=0.75 fails"
  held = json.loads((tmp_path / "x" / "points" / "rate=0.5" / "report.json").read_text())
  assert held["arms"]["lift 0.5"]["loss"] == 4.0


def test_a_vertex_job_is_a_container(xm):
  real_xm = pytest.importorskip("xmanager.xm", reason="needs the extra [launch]")
  from xmanager import xm_local

  with flagsaver.flagsaver(executor="vertex", requirements=["a100=8", "cpu=48"], image="registry/nr"):
    packageable, executor = xm.executable_and_executor(real_xm, xm_local)
  assert packageable.executable_spec.image_path == "registry/nr"
  assert executor.requirements.task_requirements[real_xm.ResourceType.A100] == 8
  job = real_xm.Job(packageable, executor, name="x", args=["-m", "nr.main", "--config.seeds=(3, 4)"])
  assert job.args.to_list(real_xm.utils.ARGV_ESCAPER) == ["-m", "nr.main", "--config.seeds=(3, 4)"]


def test_vertex_needs_an_image(xm):
  with flagsaver.flagsaver(executor="vertex"):
    with pytest.raises(SweepError, match="--image: Vertex runs containers"):
      xm.executable_and_executor(None, None)
