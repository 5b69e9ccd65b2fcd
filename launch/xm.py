"""Launches the points of a sweep with XManager, a job a point. Needs the extra [launch].

  xmanager launch launch/xm.py -- --config=configs/divpo.py:tiny --sweep=configs/sweeps/divpo.py:beta \
    --workdir=runs/beta

--executor=local runs processes on this machine, without Docker, all at a time (nr.sweep --parallel runs
some at a time, and copies stages that points share); --python names theirs where XManager has another one.
--executor=vertex runs containers on Vertex AI: name an --image whose entry point is `python` and which
holds nr (launch/Dockerfile makes one), the hardware with --requirements=a100=8, and a --workdir that the
containers see, such as /gcs/BUCKET/runs/beta. XManager's Vertex back end knows TPU v2 and v3 only; for newer
ones there is launch/tpu_pod.py.

--only and --shard choose points as in nr.sweep; --dry_run prints the jobs, and needs no XManager. When all
jobs have ended, `python -m nr.sweep ... --collect` makes the table.
"""

import importlib
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

from absl import app, flags

from nr import main as nr_main
from nr import sweep as nr_sweep
from nr.sweeps.points import SweepError

if "xmanager" in sys.modules:  # the command `xmanager launch` passes a flag that this import defines
  importlib.import_module("xmanager.xm")

_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "vertex"], "Where jobs run.")
_REQUIREMENTS = flags.DEFINE_list(
  "requirements", [], "Of a Vertex job: RESOURCE=COUNT, such as a100=8,cpu=48."
)
_IMAGE = flags.DEFINE_string("image", None, "Container image of a Vertex job.")
_PYTHON = flags.DEFINE_string(
  "python", sys.executable, "Python of local jobs, where XManager has another one."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the jobs; launch nothing.")

TPU_OF_VERTEX = ("tpu_v2", "tpu_v3")


class JobSpec(NamedTuple):
  """A job.

  Attributes:
    name: of the point.
    arguments: of the Python that runs it.
  """

  name: str
  arguments: list[str]


def job_specs(request: nr_sweep.Request, only: list[str], shard: str, workdir: pathlib.Path) -> list[JobSpec]:
  """Returns a job a point."""
  names = {point.name for point in nr_sweep.choose(request.points, only, shard)}
  works = [work for work in request.works(workdir) if work.point.name in names]
  return [JobSpec(work.point.name, request.command(work)[1:]) for work in works]


def requirements(texts: list[str]) -> dict[str, int | str]:
  """Returns the resources of a Vertex job, as XManager's JobRequirements take them.

  Raises:
    SweepError: not RESOURCE=COUNT, or a TPU that XManager cannot launch on Vertex.
  """
  found: dict[str, int | str] = {}
  for text in texts:
    name, is_there, count = text.partition("=")
    if not is_there:
      raise SweepError(f"--requirements={text}: give RESOURCE=COUNT, such as a100=8 or tpu_v3=2x2")
    if name.startswith("tpu") and name not in TPU_OF_VERTEX:
      raise SweepError(
        f"--requirements={text}: XManager's Vertex back end knows {' and '.join(TPU_OF_VERTEX)} only; "
        "use launch/tpu_pod.py"
      )
    found[name] = int(count) if count.isdigit() else count
  return found


def import_xmanager() -> tuple[Any, Any]:
  """Returns the modules xm and xm_local.

  Raises:
    ImportError: naming the extra.
  """
  try:
    from xmanager import xm, xm_local
  except ImportError as error:
    raise ImportError(f"XManager is not installed ({error}): pip install 'nr[launch]'") from error
  return xm, xm_local


def executable_and_executor(xm: Any, xm_local: Any) -> tuple[Any, Any]:
  """Returns what runs a job, and where."""
  if _EXECUTOR.value == "local":
    executor = xm_local.Local()
    return xm.Packageable(xm.Binary(path=_PYTHON.value), xm_local.Local.Spec()), executor
  if not _IMAGE.value:
    raise SweepError(
      "--image: Vertex runs containers; name an image whose entry point is python and which holds nr"
    )
  executor = xm_local.Vertex(requirements=xm.JobRequirements(**requirements(_REQUIREMENTS.value)))
  return xm.Packageable(xm.Container(image_path=_IMAGE.value), xm_local.Vertex.Spec()), executor


def launch(specs: list[JobSpec], title: str) -> None:
  """Hands the jobs to XManager."""
  xm, xm_local = import_xmanager()
  packageable, executor = executable_and_executor(xm, xm_local)
  with xm_local.create_experiment(experiment_title=title) as experiment:
    [executable] = experiment.package([packageable])
    for spec in specs:
      experiment.add(xm.Job(executable, executor, name=spec.name, args=spec.arguments))


def main(argv: list[str]) -> None:
  """Entry point; one line on a mistake."""
  del argv
  config_flag, values = flags.FLAGS["config"], flags.FLAGS
  try:
    for name in ("config", "sweep", "workdir"):
      if values[name].value is None:
        raise SweepError(f"--{name} is missing")
    config = config_flag.value
    request = nr_sweep.Request(values.sweep, config, config_flag.config_filename, config_flag.override_values)
    workdir = pathlib.Path(values.workdir)
    specs = job_specs(request, values.only, values.shard, workdir)
    if _EXECUTOR.value == "vertex":
      requirements(_REQUIREMENTS.value)
    if _DRY_RUN.value:
      for spec in specs:
        print(shlex.join(["python", *spec.arguments]))
      return
    if _EXECUTOR.value == "local":
      nr_sweep.remember(workdir, request.sweep, request.config_text, request.given, request.points)
    launch(specs, f"nr {request.sweep.text}")
  except (SweepError, ImportError, RuntimeError) as error:  # the last when a local job has failed
    sys.exit(f"error: {nr_main.one_line(error)}")


if __name__ == "__main__":
  app.run(main, flags_parser=nr_main.parse_flags)
