"""launch/slurm.sbatch: valid shell, and the commands that it hands to srun."""

import os
import pathlib
import shlex
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "slurm.sbatch"
SLURM = ("SLURM_", "NR_PYTHON", "NR_DRY_RUN")


def call(*arguments, **environment):
  clean = {name: value for name, value in os.environ.items() if not name.startswith(SLURM)}
  return subprocess.run(
    ["bash", str(SCRIPT), *arguments],
    env={**clean, **environment},
    capture_output=True,
    text=True,
    check=False,
  )


def command(*arguments, **environment):
  found = call("--dry-run", *arguments, **environment)
  assert found.returncode == 0, found.stderr
  return shlex.split(found.stdout)


def test_the_script_is_valid_and_explains_itself():
  subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
  found = call("--help")
  assert found.returncode == 0 and "NR_PYTHON" in found.stdout and "set -euo" not in found.stdout


def test_one_task_runs_by_itself():
  assert command("main", "--config=a.py:b", "--workdir=my runs") == [
    "srun", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "nr.main", "--config=a.py:b", "--workdir=my runs",
  ]  # fmt: skip


def test_several_tasks_are_one_run():
  words = command("main", "--config=a", SLURM_NTASKS="16", NR_PYTHON="/opt/python")
  assert words[2:] == ["/opt/python", "-m", "nr.main", "--config=a", "--distributed=auto"]


def test_an_array_shares_the_points():
  array = dict(SLURM_ARRAY_TASK_ID="6", SLURM_ARRAY_TASK_MIN="5", SLURM_ARRAY_TASK_COUNT="4")
  assert command("sweep", "--config=a", **array)[3:] == ["-m", "nr.sweep", "--config=a", "--shard=1/4"]
  assert command("sweep", "--config=a")[3:] == ["-m", "nr.sweep", "--config=a"]


@pytest.mark.parametrize(
  "arguments, environment, words",
  [
    ((), {}, "say main or sweep"),
    (("train",), {}, "'train' is neither main nor sweep"),
    (("sweep",), {"SLURM_NTASKS": "2"}, "a sweep takes one task a job"),
  ],
)
def test_mistakes_are_answered(arguments, environment, words):
  found = call(*arguments, **environment)
  assert found.returncode == 2 and words in found.stderr


def test_it_becomes_srun(tmp_path):
  srun = tmp_path / "srun"
  srun.write_text('#!/bin/sh\necho "$0" "$@"\nexit 7\n')
  srun.chmod(0o755)
  found = call("main", "--config=a", PATH=f"{tmp_path}:{os.environ['PATH']}")
  assert found.returncode == 7
  assert found.stdout.split() == [
    str(srun),
    "--kill-on-bad-exit=1",
    ".venv/bin/python",
    "-m",
    "nr.main",
    "--config=a",
  ]
