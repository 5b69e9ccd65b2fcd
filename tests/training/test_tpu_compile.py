"""Train steps compile for a real TPU slice, with the collectives the sharding rules intend."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.tpu_compile, pytest.mark.slow]

SCRIPT = pathlib.Path(__file__).parent / "compile_for_tpu.py"
MODES = ("dp", "fsdp", "tp", "fsdp+tp")
METHODS = ("next_token", "cocomix")
COMPLAINT = "Involuntary full rematerialization"
HBM_V5E = 15.75 * 2**30


@functools.cache
def run_compiler(size, *modes):
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs libtpu to compile for a TPU: pip install 'nr[tpu]'")
  path = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
  environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
  command = [sys.executable, str(SCRIPT), size, *modes]
  return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500, check=False)


def compile_all(size, *modes):
  """Returns (reports, compiler messages), each by program."""
  done = run_compiler(size, *modes)
  assert done.returncode == 0, done.stderr[-4000:]
  reports = {report["program"]: report for report in map(json.loads, done.stdout.splitlines())}
  sections = [section.partition("\n") for section in ("\n" + done.stderr).split("\n=== ")[1:]]
  return reports, {name: messages for name, _, messages in sections}


def compile_tiny():
  return compile_all("tiny", "control", *MODES)


def test_the_partitioner_is_heard_when_it_complains():
  _, messages = compile_tiny()
  assert COMPLAINT in messages["control"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_no_array_is_gathered_against_the_rules(method, mode):
  _, messages = compile_tiny()
  assert COMPLAINT not in messages[f"{method} {mode}"]


@pytest.mark.parametrize("method", METHODS)
def test_the_program_shows_the_collectives_of_its_mesh(method):
  reports, _ = compile_tiny()
  counts = {mode: reports[f"{method} {mode}"]["collectives"] for mode in MODES}
  # Copies of everything: gradients are summed, nothing else travels.
  assert counts["dp"]["all-reduce"] > 0
  assert sum(counts["dp"].values()) == counts["dp"]["all-reduce"]
  # Parameters are gathered before use, gradients are summed into shards.
  for mode in ("fsdp", "fsdp+tp"):
    assert counts[mode]["all-gather"] + counts[mode]["collective-permute"] > 0
    assert counts[mode]["reduce-scatter"] > 0
  # Row-parallel products are summed.
  assert counts["tp"]["all-reduce"] > counts["dp"]["all-reduce"]
  if method == "next_token":
    assert counts["tp"]["all-gather"] == counts["tp"]["reduce-scatter"] == 0


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("method", METHODS)
def test_state_is_split_and_donated(method, mode):
  reports, _ = compile_tiny()
  report, whole = reports[f"{method} {mode}"], reports[f"{method} dp"]
  # Far from 1/8 at this size, because the TPU pads every array to tiles of 8 x 128.
  assert report["argument_bytes"] < 0.5 * whole["argument_bytes"]
  assert report["alias_bytes"] > 0.9 * report["argument_bytes"]


@pytest.mark.parametrize("method", METHODS)
def test_the_69m_student_of_the_paper_fits(method):
  reports, messages = compile_all("paper", "fsdp+tp")
  report = reports[f"{method} fsdp+tp"]
  assert COMPLAINT not in messages[f"{method} fsdp+tp"]
  assert report["argument_bytes"] + report["temporary_bytes"] < HBM_V5E
  parameters = {"next_token": 51_500_032, "cocomix": 85_088_256}[method]
  # Weights and two moments in float32, over 8 chips; the batch and small copies are the rest.
  assert report["argument_bytes"] == pytest.approx(parameters * 12 / 8, rel=0.1)
