"""launch/tpu_pod.py: the gcloud commands of each action, word for word."""

import pathlib
import shlex
import subprocess
import sys

import pytest

from tests.launch.programs import load

ROOT = pathlib.Path(__file__).parents[2]
WHERE = ["--name=nr", "--zone=us-west4-a"]


tpu_pod = load("tpu_pod")


def dry(capsys, *argv):
  assert tpu_pod.main([*argv, "--dry_run"]) == 0
  return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_create_asks_for_each_slice_and_for_its_state(capsys):
  lines = dry(capsys, "create", *WHERE, "--count=2", "--type=v5litepod-16", "--spot", "--project=p")
  assert lines[1] == [
    "gcloud", "compute", "tpus", "queued-resources", "create", "nr-1", "--zone=us-west4-a", "--project=p",
    "--node-id=nr-1", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
  ]  # fmt: skip
  assert lines[2][4:] == [
    "describe",
    "nr-0",
    "--zone=us-west4-a",
    "--project=p",
    "--format=value(state.state)",
  ]
  assert len(lines) == 4


def test_run_gives_each_slice_its_share():
  arguments = tpu_pod.parse(
    ["run", *WHERE, "--count=2", "--", "-m", "nr.sweep", "--only=rate=0.1 *", "--shard={index}/{count}"]
  )
  first, second = tpu_pod.run_commands(arguments)
  assert second[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "nr-1", "--zone=us-west4-a"]
  assert second[7] == "--worker=all"
  shell = second[8].removeprefix("--command=")
  assert shell.startswith("cd nr && ")
  assert shlex.split(shell)[3:] == [".venv/bin/python", "-m", "nr.sweep", "--only=rate=0.1 *", "--shard=1/2"]
  assert "--shard=0/2" in first[8]


def test_one_slice_has_the_name_itself():
  assert tpu_pod.slices("nr", 1) == ["nr"] and tpu_pod.slices("nr", 2) == ["nr-0", "nr-1"]


def test_install_brings_the_code_to_all_hosts():
  arguments = tpu_pod.parse(["install", *WHERE])
  [[copy, install]] = tpu_pod.install_commands(arguments, "/tmp/a/nr.tar.gz")
  assert copy[3:] == [
    "tpu-vm",
    "scp",
    "/tmp/a/nr.tar.gz",
    "nr:nr.tar.gz",
    "--zone=us-west4-a",
    "--worker=all",
  ]
  script = install[-1].removeprefix("--command=")
  subprocess.run(["bash", "-n", "-c", script], check=True)
  assert "-e '.[tpu]'" in script and "tar -xzf nr.tar.gz -C nr" in script


def test_collect_and_delete(capsys):
  [collect] = dry(capsys, "collect", *WHERE, "--path=runs/beta")
  assert collect[3:] == [
    "tpu-vm", "scp", "nr:nr/runs/beta", "runs", "--zone=us-west4-a", "--recurse", "--worker=0",
  ]  # fmt: skip
  [delete] = dry(capsys, "delete", *WHERE)
  assert delete[3:] == ["queued-resources", "delete", "nr", "--zone=us-west4-a", "--force", "--quiet"]


@pytest.mark.parametrize(
  "argv, words",
  [
    (["create", *WHERE], "create needs --type"),
    (["run", *WHERE], "run needs a command after --"),
    (["collect", *WHERE], "collect needs --path"),
    (["delete", *WHERE, "--count=0"], "--count=0: give at least 1"),
    (["delete", "--name=nr"], "--zone"),
  ],
)
def test_what_is_missing_is_named(argv, words, capsys):
  with pytest.raises(SystemExit):
    tpu_pod.parse(argv)
  assert words in capsys.readouterr().err


def test_unknown_types_need_a_runtime(capsys):
  assert tpu_pod.main(["create", *WHERE, "--type=v9-8", "--dry_run"]) == 2
  assert "for others give --runtime" in capsys.readouterr().err
  [create, _] = dry(capsys, "create", *WHERE, "--type=v9-8", "--runtime=new")
  assert "--runtime-version=new" in create


def test_slices_run_at_the_same_time_and_a_failure_is_told(tmp_path, capsys):
  wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
  python = [sys.executable, "-S", "-c"]
  chains = [
    [[*python, wait]],
    [[*python, f"open({str(tmp_path / 'go')!r}, 'w')"], [*python, "raise SystemExit(3)"], [*python, "never"]],
  ]
  assert tpu_pod.run_all(chains, False) == 1
  assert "SystemExit(3)" in capsys.readouterr().err


def test_help_needs_nothing():
  path = ROOT / "launch" / "tpu_pod.py"
  found = subprocess.run(
    [sys.executable, "-S", str(path), "--help"], capture_output=True, text=True, check=True
  )
  assert "--dry_run" in found.stdout and "delete" in found.stdout
