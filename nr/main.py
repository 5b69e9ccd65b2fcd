"""Runs a paper from its config to its report.

  python -m nr.main --config=configs/cocomix.py:tiny --workdir=runs/cocomix

The text after the colon chooses a variant of the config; any field can be set
on the command line, for example --config.seed=1. Stages that are finished in
the work directory are skipped and interrupted ones are resumed, so the same
command continues a run that was stopped. --stage=NAME runs one stage alone.
--distributed joins the processes of several hosts, each started with the same
command, into one run (see docs/launching.md).
"""

import contextlib
import importlib
import logging
import pathlib
import sys
import traceback

import jax
from absl import app, flags
from ml_collections import config_flags

from nr.recipes import stages
from nr.training import guards

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Recipe config, as path.py or path.py:variant; fields by --config.field=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory: artifacts, checkpoints, report.")
_STAGE = flags.DEFINE_string("stage", None, "Run this stage alone; its inputs must be finished.")
_DISTRIBUTED = flags.DEFINE_string(
  "distributed",
  "",
  "Be one of several processes: 'auto' asks Cloud TPU, Slurm, Kubernetes or Open MPI for the others; else "
  "ADDRESS:PORT,COUNT,INDEX with the address of the first process.",
)


def log_to(path: pathlib.Path) -> None:
  """Sends log lines to the terminal and to the run directory's log.txt.

  Other packages report every phase of every save at INFO level, through the
  same logger as ours; of theirs only warnings pass.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  ours = str(pathlib.Path(__file__).parent)
  logger = logging.getLogger()
  logger.handlers.clear()
  logger.setLevel(logging.INFO)
  for handler, layout in (
    (logging.StreamHandler(), "%(asctime)s %(message)s"),
    (logging.FileHandler(path), "%(asctime)s %(levelname)s %(module)s: %(message)s"),
  ):
    handler.setFormatter(logging.Formatter(layout, datefmt="%H:%M:%S"))
    handler.addFilter(lambda line: line.pathname.startswith(ours) or line.levelno >= logging.WARNING)
    logger.addHandler(handler)
  logging.getLogger("absl").handlers.clear()
  logging.getLogger("absl").propagate = True


def join(distributed: str) -> None:
  """Connects this process with the others of a distributed run, before any device is used.

  Args:
    distributed: "auto", or "ADDRESS:PORT,COUNT,INDEX".

  Raises:
    ValueError: neither of them, or "auto" where nothing says which processes there are.
  """
  if distributed == "auto":
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise ValueError(
        f"--distributed=auto: this is no Cloud TPU, Slurm, Kubernetes or Open MPI job ({error}); give "
        "ADDRESS:PORT,COUNT,INDEX"
      ) from error
    return
  address, *numbers = distributed.split(",")
  if ":" not in address or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
    raise ValueError(
      f"--distributed={distributed!r}: give 'auto' or ADDRESS:PORT,COUNT,INDEX, such as host0:1234,2,0"
    )
  count, index = map(int, numbers)
  if not index < count:
    raise ValueError(f"--distributed={distributed!r}: INDEX counts from 0 to COUNT - 1 = {count - 1}")
  jax.distributed.initialize(address, num_processes=count, process_id=index)


def log_name() -> str:
  """Returns the name of this process's log file: log.txt, of further processes log.process1.txt and so on."""
  if not _DISTRIBUTED.value or jax.process_index() == 0:
    return "log.txt"
  return f"log.process{jax.process_index()}.txt"


def run(config, workdir: pathlib.Path, stage: str | None = None) -> dict[str, stages.Artifact]:
  """Runs a recipe in this process; what the command line and notebooks call.

  Args:
    config: a ConfigDict whose field `recipe` names a module with functions
      `stages(config)` and `validate(config)`.
    workdir: run directory.
    stage: name of the one stage to run; all when None.

  Returns:
    The artifact of every stage that has been finished.
  """
  recipe = importlib.import_module(config.recipe)
  stages.require_distributed(recipe.stages(config), config.recipe, jax.process_count())
  recipe.validate(config)
  return stages.run_stages(recipe.stages(config), config, workdir, stage)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags and config; a mistake in either is answered in one line."""
  try:
    return flags.FLAGS(argv)
  except Exception as error:  # config files run any code, so they may raise anything
    print(f"error: {one_line(error)}; see --help", file=sys.stderr)
    sys.exit(2)


def one_line(error: BaseException) -> str:
  """Returns an error's message without line breaks, and of a traceback inside it only the end."""
  text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  if "Traceback (most recent call last)" in text:
    text = text.strip().splitlines()[-1]
  return " ".join(text.split()) or type(error).__name__


def main(argv: list[str]) -> int:
  """Entry point of `python -m nr.main`: one line on error, the traceback in log.txt."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; everything is given by --flags")
  workdir = pathlib.Path(_WORKDIR.value)
  log = workdir / "log.txt"
  try:
    if _DISTRIBUTED.value:
      join(_DISTRIBUTED.value)
    log = workdir / log_name()
    log_to(log)
    run(_CONFIG.value, workdir, _STAGE.value)
  except guards.Interrupted as stop:  # the loop has saved its state
    print(stop.message, file=sys.stderr)
    return stop.code
  except KeyboardInterrupt:
    print("\nStopped. The same command continues where it left off.", file=sys.stderr)
    return 130
  except Exception as error:  # the one place that turns any failure into one line
    with contextlib.suppress(OSError), open(log, "a") as stream:
      traceback.print_exc(file=stream)
    print(f"error: {one_line(error)} [{type(error).__name__}; traceback in {log}]", file=sys.stderr)
    return 1
  if log.name == "log.txt" and (workdir / "report.md").exists():
    print(f"Report: {workdir / 'report.md'}")
  return 0


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=parse_flags)
