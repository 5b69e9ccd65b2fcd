"""Runs a recipe at many settings and puts the results into one table.

  python -m nr.sweep --config=configs/divpo.py:tiny --sweep=configs/sweeps/divpo.py:beta --workdir=runs/beta

The sweep file's function gives the points (see nr.sweeps.points); all are checked before the first one
runs. Each is a run of nr.main in workdir/points/NAME, so the same command continues a sweep that was
stopped: finished points and stages are skipped. Stages that points have in common are computed once.
A point that fails is reported, the others go on. At the end table.csv, table.json, table.md and plots/
hold the metrics that the sweep file names.

  --list          prints the points and runs nothing
  --check         checks every point with its recipe, on the devices of this machine, and runs nothing
  --collect       makes the table of what is there and runs nothing
  --parallel=4    four points at a time; --gpus="0 1 2,3" gives three of them devices of their own
  --only=PATTERN  points whose name fits, such as 'beta=0.1*'; may be given again
  --shard=0/4     the first of four machines; they may share the work directory or not (then copy points/
                  together and use --collect)
"""

import fnmatch
import importlib
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from absl import app, flags

from nr import main as nr_main
from nr import names
from nr.recipes.stages import write_json
from nr.sweeps import points as points_lib
from nr.sweeps import results, reuse
from nr.sweeps.points import Point, Sweep, SweepError
from nr.sweeps.reuse import Work
from nr.sweeps.runner import Outcome, Runner

_SWEEP = flags.DEFINE_string("sweep", None, "Sweep, as path.py or path.py:name.")
_LIST = flags.DEFINE_bool("list", False, "Print the points; run nothing.")
_CHECK = flags.DEFINE_bool("check", False, "Check every point with its recipe; run nothing.")
_COLLECT = flags.DEFINE_bool("collect", False, "Make the table of what is there; run nothing.")
_PARALLEL = flags.DEFINE_integer("parallel", None, "Points at a time.", lower_bound=1)
_GPUS = flags.DEFINE_string("gpus", "", "Devices of each process, such as '0 1 2,3' for three processes.")
_ONLY = flags.DEFINE_multi_string("only", [], "Names of points, or patterns with * and ?.")
_SHARD = flags.DEFINE_string("shard", "", "i/n: every n-th point from the i-th on, counted from 0.")
_REUSE = flags.DEFINE_bool("reuse", True, "Copy stages that points have in common.")

SWEEP_FILE = "sweep.json"


def choose(points: Sequence[Point], only: Sequence[str], shard: str) -> list[Point]:
  """Returns the points that this process is asked to run.

  Args:
    points: of the sweep.
    only: names or patterns; all points where there is none.
    shard: "i/n", or "" for all.

  Raises:
    SweepError: a pattern that fits no name, or a shard that there is not.
  """
  known = [point.name for point in points]
  for pattern in only:
    if not fnmatch.filter(known, pattern):
      raise SweepError(names.unknown("--only", pattern, known))
  chosen = [point for point in points if not only or any(fnmatch.fnmatch(point.name, each) for each in only)]
  if not shard:
    return chosen
  first, _, count = shard.partition("/")
  if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
    raise SweepError(f"--shard={shard!r}: give i/n with i from 0 to n - 1, such as 0/4")
  return chosen[int(first) :: int(count)]


def slots(parallel: int | None, gpus: str) -> list[str]:
  """Returns what each process that runs at a time is given as CUDA_VISIBLE_DEVICES; "" leaves it alone.

  Raises:
    SweepError: another number of groups of devices than of processes.
  """
  groups = gpus.split()
  if groups and parallel not in (None, len(groups)):
    raise SweepError(
      f"--parallel={parallel} and --gpus={gpus!r}, which is {len(groups)} group(s): leave --parallel out"
    )
  return groups or [""] * (parallel or 1)


def check(points: Iterable[Point], config: Any) -> dict[str, str]:
  """Returns what the recipe refuses, by name of the point."""
  refused = {}
  for point in points:
    changed = points_lib.applied(config, point.overrides)
    try:
      importlib.import_module(changed.recipe).validate(changed)
    except Exception as error:  # whatever it is, the point could not run
      refused[point.name] = f"{nr_main.one_line(error)} [{type(error).__name__}]"
  return refused


def remember(
  workdir: pathlib.Path, sweep: Sweep, config: str, given: dict[str, Any], points: Sequence[Point]
) -> None:
  """Writes sweep.json; a work directory of another sweep is refused.

  Raises:
    SweepError: the work directory holds another sweep, or points of these names with other settings.
  """
  path = workdir / SWEEP_FILE
  now = {
    "sweep": sweep.text,
    "config": config,
    "given": given,
    "points": {point.name: point.overrides for point in points},
  }
  now = json.loads(json.dumps(now))
  if path.exists():
    before = json.loads(path.read_text(encoding="utf-8"))
    for field in ("sweep", "config", "given"):
      if before[field] != now[field]:
        raise SweepError(
          f"--workdir={workdir}: it holds a sweep with {field} {before[field]!r}, this one has {now[field]!r}; "
          "choose another --workdir"
        )
    for name, overrides in now["points"].items():
      if before["points"].get(name, overrides) != overrides:
        raise SweepError(
          f"--workdir={workdir}: point {name!r} had other settings there; choose another --workdir"
        )
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(path, now)


class Request:
  """What the command line asks for: a sweep over a config, with what is set for all points."""

  def __init__(self, sweep: str, config: Any, config_text: str, given: dict[str, Any]):
    self.sweep, self.config = points_lib.load_sweep(sweep), config
    self.config_text, self.given = config_text, dict(given)
    self.points = points_lib.expand(self.sweep, config, given)

  def arguments(self) -> list[str]:
    """Returns the flags that name the config and what is set for all points."""
    return [f"--config={self.config_text}", *(points_lib.argument(*item) for item in self.given.items())]

  def command(self, work: Work) -> list[str]:
    """Returns the command that runs a point."""
    overrides = [points_lib.argument(*item) for item in work.point.overrides.items()]
    run = [sys.executable, "-m", "nr.main", *self.arguments(), *overrides, f"--workdir={work.directory}"]
    return [*run, f"--stage={flags.FLAGS.stage}"] if flags.FLAGS.stage else run

  def check_command(self, points: Sequence[Point]) -> list[str]:
    """Returns the command that checks points, in a process that lets go of the devices when it ends."""
    only = [f"--only={point.name}" for point in points]
    return [
      sys.executable,
      "-m",
      "nr.sweep",
      *self.arguments(),
      f"--sweep={self.sweep.text}",
      *only,
      "--check",
    ]

  def works(self, workdir: pathlib.Path) -> list[Work]:
    """Returns the points with their run directories."""
    return [
      reuse.make_work(
        point, points_lib.applied(self.config, point.overrides), workdir / "points" / point.name, workdir
      )
      for point in self.points
    ]


def print_points(points: Sequence[Point]) -> None:
  """Prints what --list is asked for."""
  for number, point in enumerate(points):
    print(f"{number:3}  {point.name}")
    for field, value in point.overrides.items():
      print(f"       {field} = {value!r}")
  print(f"{len(points)} points")


def run(request: Request, chosen: Sequence[Point], workdir: pathlib.Path) -> int:
  """Runs points and writes the table; returns the exit status."""
  every_slot = slots(_PARALLEL.value, _GPUS.value)
  remember(workdir, request.sweep, request.config_text, request.given, request.points)
  nr_main.log_to(workdir / "log.txt")
  works = request.works(workdir)
  picked = {point.name for point in chosen}
  todo = [work for work in works if work.point.name in picked]
  outcomes, stopped = {}, 0
  if not _COLLECT.value:
    if open_ := [work.point for work in todo if not reuse.is_finished(work)]:
      # In a process of its own: checking takes hold of the devices, which the points need.
      if (status := subprocess.run(request.check_command(open_), check=False).returncode) != 0:
        return status
    runner = Runner(
      request.command, every_slot, works if _REUSE.value else None, description=request.sweep.text
    )
    outcomes = runner.run(todo)
    stopped = runner.signal
  problems = _write_table(request, works, workdir)
  return _conclude(outcomes, problems, stopped)


def _write_table(request: Request, works: Sequence[Work], workdir: pathlib.Path) -> list[str]:
  metrics = dict(request.sweep.metrics(request.config))
  rows, problems = results.collect(works, metrics)
  command = shlex.join(["python", "-m", "nr.sweep", *request.arguments(), f"--sweep={request.sweep.text}"])
  results.write_tables(workdir, f"Sweep `{request.sweep.text}`", command, rows, list(metrics), problems)
  finished = sum(row.status == "finished" for row in rows)
  print(f"Table of {finished} of {len(rows)} points: {workdir / 'table.md'}")
  return problems


def _conclude(outcomes: dict[str, Outcome], problems: Sequence[str], stopped: int) -> int:
  """Prints what went wrong; returns the exit status."""
  failed = {name: outcome for name, outcome in outcomes.items() if outcome.status == "failed"}
  for name, outcome in failed.items():
    print(f"failed: {name}: {outcome.message}", file=sys.stderr)
  for problem in problems:
    print(f"problem: {problem}", file=sys.stderr)
  if stopped:
    print("Stopped. The same command continues where it left off.", file=sys.stderr)
    return 128 + stopped
  return 1 if failed or problems else 0


def main(argv: list[str]) -> int:
  """Entry point of `python -m nr.sweep`: one line on a mistake."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; everything is given by --flags")
  config_flag = flags.FLAGS["config"]
  try:
    request = Request(
      _SWEEP.value, config_flag.value, config_flag.config_filename, config_flag.override_values
    )
    chosen = choose(request.points, _ONLY.value, _SHARD.value)
    if _LIST.value:
      print_points(chosen)
      return 0
    if _CHECK.value:
      refused = check(chosen, request.config)
      for name, reason in refused.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
      return 2 if refused else 0
    if not flags.FLAGS.workdir:
      raise SweepError("--workdir: name a folder for the runs and their table")
    return run(request, chosen, pathlib.Path(flags.FLAGS.workdir))
  except Exception as error:  # sweep files run any code, so they may raise anything
    print(f"error: {nr_main.one_line(error)} [{type(error).__name__}]", file=sys.stderr)
    return 2


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "sweep"])
  app.run(main, flags_parser=nr_main.parse_flags)
