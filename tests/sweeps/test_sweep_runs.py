"""Points as processes: stages are shared, failures stop nothing, a second run has nothing to do, signals pass on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from nr import sweep as nr_sweep
from nr.recipes import stages as stages_lib
from nr.sweeps import reuse
from nr.sweeps.points import SweepError, applied, expand, load_sweep
from nr.sweeps.runner import Runner, last_line
from tests.sweeps import toy_recipe
from tests.sweeps.toy_config import get_config

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TOY, CONFIG = HERE / "toy_sweeps.py", HERE / "toy_config.py"


def works_of(workdir, name="grid"):
  config = get_config()
  return [
    reuse.make_work(point, applied(config, point.overrides), workdir / point.name, workdir)
    for point in expand(load_sweep(f"{TOY}:{name}" if name else str(TOY)), config)
  ]


def finish(work):
  config = applied(get_config(), work.point.overrides)
  stages_lib.run_stages(toy_recipe.stages(config), config, work.directory)


def script(work, text):
  """A command that runs without any import of ours."""
  return [sys.executable, "-S", "-c", text, str(work.directory)]


def test_a_stage_of_the_same_fingerprint_is_copied(tmp_path):
  first, second, other_size, _ = works_of(tmp_path)
  finish(first)
  assert reuse.is_finished(first) and not reuse.is_finished(second)
  second.directory.mkdir()
  assert reuse.adopt(second, [first, other_size]) == ["base"]
  assert (second.directory / "base" / "made_in.txt").read_text() == first.point.name
  finish(second)
  manifest = stages_lib.read_manifest(second.directory)
  assert manifest["base"]["copied_from"] == first.point.name and "copied_from" not in manifest["train"]
  assert json.loads((second.directory / "report.json").read_text())["arms"]["lift 0.5"]["loss"] == 2 * 1.0
  other_size.directory.mkdir()
  assert reuse.adopt(other_size, [first, second]) == []


def test_a_stage_that_was_begun_is_not_replaced(tmp_path):
  first, second, *_ = works_of(tmp_path)
  finish(first)
  (second.directory / "base").mkdir(parents=True)
  assert reuse.adopt(second, [first]) == []


def test_a_stage_with_a_path_of_its_own_run_is_not_copied(tmp_path):
  first, second, *_ = works_of(tmp_path)
  finish(first)
  manifest = stages_lib.read_manifest(first.directory)
  manifest["base"]["artifact"]["path"] = str(first.directory / "base")
  stages_lib.write_json(first.directory / stages_lib.MANIFEST, manifest)
  second.directory.mkdir()
  assert reuse.adopt(second, [first]) == []
  assert not (second.directory / "base").exists()


def test_a_point_waits_for_a_stage_that_a_running_one_makes(tmp_path):
  works = works_of(tmp_path)
  small, small_too, large, _ = works
  waiting = [small_too, large]
  assert reuse.next_ready(waiting, [small], works) is large
  finish(small)
  assert reuse.next_ready(waiting, [], works) is small_too
  # Its next stage is its own once the shared one can be copied.
  assert reuse.next_ready(waiting, [small], works) is small_too


def test_points_of_the_report_alone_share_nothing(tmp_path):
  work = works_of(tmp_path)[0]
  assert work.shared == {"base", "train"}


def test_a_failure_is_told_and_the_others_go_on(tmp_path):
  works = works_of(tmp_path)
  text = "import sys; print('one'); sys.exit('error: no luck') if 'rate=0.1' in sys.argv[1] else None"
  ended = []
  runner = Runner(
    lambda work: script(work, text), [""], None, lambda work, outcome: ended.append(work.point.name)
  )
  outcomes = runner.run(works)
  assert [outcomes[work.point.name].status for work in works] == ["failed", "finished"] * 2
  assert outcomes[works[0].point.name].message.startswith("error: no luck [")
  assert ended == [work.point.name for work in works], "one slot: in the order of the sweep"
  assert (works[1].directory / "output.txt").read_text() == "one\n"


def test_slots_run_at_the_same_time_with_devices_of_their_own(tmp_path):
  # Each process ends only when it sees the other's file.
  text = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "devices").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
while len(list(folder.parent.glob("*/devices"))) < 2:
  time.sleep(0.01)
"""
  works = works_of(tmp_path)[:2]
  outcomes = Runner(lambda work: script(work, text), ["0", "1,2"], None).run(works)
  assert {outcome.status for outcome in outcomes.values()} == {"finished"}
  assert sorted((work.directory / "devices").read_text() for work in works) == ["0", "1,2"]


def test_a_process_that_is_killed_is_a_failure(tmp_path):
  [work, *_] = works_of(tmp_path)
  text = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
  assert (
    "ended by signal 9"
    in Runner(lambda work: script(work, text), [""], None).run([work])[work.point.name].message
  )


def test_sigterm_is_passed_on_and_no_other_point_begins(tmp_path):
  text = """
import pathlib, signal, sys, time
def leave(number, frame):
  (pathlib.Path(sys.argv[1]) / "saved").touch()
  sys.exit(143)
signal.signal(signal.SIGTERM, leave)
(pathlib.Path(sys.argv[1]) / "ready").touch()
time.sleep(60)
"""
  works = works_of(tmp_path)

  def interrupt():
    while not (works[0].directory / "ready").exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=interrupt)
  thread.start()
  runner = Runner(lambda work: script(work, text), [""], None)
  outcomes = runner.run(works)
  thread.join()
  assert {name: outcome.status for name, outcome in outcomes.items()} == {works[0].point.name: "stopped"}
  assert (works[0].directory / "saved").exists() and runner.signal == signal.SIGTERM
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_finished_points_are_not_run(tmp_path):
  works = works_of(tmp_path)
  finish(works[0])
  outcomes = Runner(lambda work: script(work, "raise SystemExit(3)"), [""], works).run([works[0]])
  assert outcomes[works[0].point.name].status == "finished"


def test_the_last_line_is_short_and_not_empty(tmp_path):
  path = tmp_path / "output.txt"
  path.write_bytes(b"first\n" + b"x" * 20_000 + b"\nlast \xff\n\n")
  assert last_line(path) == "last \ufffd"
  path.write_bytes(b"")
  assert last_line(path) == ""


def test_points_are_chosen_by_name_and_share():
  points = expand(load_sweep(f"{TOY}:grid"), get_config())
  names = [point.name for point in points]
  chosen = lambda *arguments: [point.name for point in nr_sweep.choose(points, *arguments)]  # noqa: E731
  assert chosen([], "") == names
  assert chosen(["size=2*"], "") == names[:2]
  assert chosen([names[3], "size=2__rate=0.1"], "") == [names[0], names[3]]
  assert sorted(chosen([], "0/3") + chosen([], "1/3") + chosen([], "2/3")) == sorted(names)
  with pytest.raises(SweepError, match="--only='size=2__rate=0.2' is unknown: did you mean"):
    chosen(["size=2__rate=0.2"], "")
  for shard in ("3/3", "1", "-1/2", "a/b"):
    with pytest.raises(SweepError, match="--shard"):
      chosen([], shard)


def test_slots_are_processes_or_groups_of_devices():
  assert nr_sweep.slots(None, "") == [""]
  assert nr_sweep.slots(3, "") == ["", "", ""]
  assert nr_sweep.slots(None, "0 1 2,3") == ["0", "1", "2,3"]
  with pytest.raises(SweepError, match="leave --parallel out"):
    nr_sweep.slots(2, "0 1 2")


def test_a_work_directory_of_another_sweep_is_refused(tmp_path):
  config = get_config()
  grid, arms = (load_sweep(f"{TOY}:{name}") for name in ("grid", "arms"))
  nr_sweep.remember(tmp_path, grid, "toy.py", {}, expand(grid, config))
  nr_sweep.remember(tmp_path, grid, "toy.py", {}, expand(grid, config))
  with pytest.raises(SweepError, match="holds a sweep with sweep"):
    nr_sweep.remember(tmp_path, arms, "toy.py", {}, expand(arms, config))
  with pytest.raises(SweepError, match="holds a sweep with given"):
    nr_sweep.remember(tmp_path, grid, "toy.py", {"seed": 1}, expand(grid, config))


def command(*flags):
  return [sys.executable, "-m", "nr.sweep", f"--config={CONFIG}", f"--sweep={TOY}", *flags]


def call(*flags):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.run(
    command(*flags), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )


def test_a_whole_sweep_from_the_command_line(tmp_path):
  first = call(f"--workdir={tmp_path}", "--parallel=2", "--config.seed=2")
  assert first.returncode == 1, first.stderr
  assert "failed: rate=0.75: error: the loss is not finite" in first.stderr
  assert "Table of 2 of 3 points" in first.stdout
  copied = [
    name
    for name in ("rate=0.25", "rate=0.5", "rate=0.75")
    if "copied_from" in stages_lib.read_manifest(tmp_path / "points" / name)["base"]
  ]
  assert len(copied) == 2, "two points take the stage of the third"
  table = json.loads((tmp_path / "table.json").read_text())
  losses = {row["name"]: row["metrics"].get("loss") for row in table["rows"]}
  assert losses == {"rate=0.25": 2.5, "rate=0.5": 5.0, "rate=0.75": None}
  report = (tmp_path / "points" / "rate=0.5" / "report.json").stat()
  again = call(f"--workdir={tmp_path}", "--config.seed=2", "--only=rate=0.5")
  assert again.returncode == 0, again.stderr
  assert (tmp_path / "points" / "rate=0.5" / "report.json").stat().st_mtime_ns == report.st_mtime_ns


def test_a_point_that_the_recipe_refuses_stops_the_sweep_before_it_runs():
  request = nr_sweep.Request(f"{TOY}:refused", get_config(), str(CONFIG), {})
  assert nr_sweep.check(request.points, request.config) == {
    "rate=2.0": "train.rate=2.0: at most 1 [ValueError]"
  }
