"""Runs a paper from its config to its report.

  python -m nr.main --config=configs/cocomix.py:tiny --workdir=runs/cocomix

The text after the colon chooses a variant of the config; any field can be set
on the command line, for example --config.seed=1. Stages that are finished in
the work directory are skipped and interrupted ones are resumed, so the same
command continues a run that was stopped. --stage=NAME runs one stage alone.
"""

import importlib
import logging
import pathlib
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

from nr.recipes import stages
from nr.training import guards

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Recipe config, as path.py or path.py:variant; fields by --config.field=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory: artifacts, checkpoints, report.")
_STAGE = flags.DEFINE_string("stage", None, "Run this stage alone; its inputs must be finished.")


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
  recipe.validate(config)
  return stages.run_stages(recipe.stages(config), config, workdir, stage)


def main(argv: list[str]) -> int:
  """Entry point of `python -m nr.main`: one line on error, the traceback in log.txt."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; everything is given by --flags")
  workdir = pathlib.Path(_WORKDIR.value)
  log_to(workdir / "log.txt")
  try:
    run(_CONFIG.value, workdir, _STAGE.value)
  except guards.Interrupted as stop:  # the loop has saved its state
    print(stop.message, file=sys.stderr)
    return stop.code
  except KeyboardInterrupt:
    print("\nStopped. The same command continues where it left off.", file=sys.stderr)
    return 130
  except Exception as error:  # the one place that turns any failure into one line
    with open(workdir / "log.txt", "a") as log:
      traceback.print_exc(file=log)
    text = " ".join(str(error).split())
    print(f"error: {text} [{type(error).__name__}; traceback in {workdir / 'log.txt'}]", file=sys.stderr)
    return 1
  print(f"Report: {workdir / 'report.md'}") if (workdir / "report.md").exists() else None
  return 0


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
