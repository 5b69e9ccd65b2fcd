"""Adaptive decoding by latent preference optimisation (arXiv 2411.09661), on toys or on a checkpoint.

A frozen language model (a tiny one that learns toy tasks, or a checkpoint) -> it answers prompts with
temperatures drawn at random -> of the answers to one prompt a good and a bad one make a pair -> a head learns
from the pairs which temperature the prompt, or the token, wants -> the head against every fixed temperature
and other adaptive rules, with intervals -> report. Each stage is a module of this package; `tasks` holds what
is asked and how answers are scored.
"""

from typing import Any

from nr.recipes.adaptive_decoding import (
  checks,
  evaluate,
  heads,
  language_model,
  pairs,
  pools,
  report,
  settings,
)
from nr.recipes.stages import Stage

validate = checks.validate


def stages(config: Any) -> list[Stage]:
  """Returns the stages of the recipe, in order."""
  everything = ("language_model", "pools", "pairs", "heads", "evaluate")
  files = task_files(config)
  return [
    Stage(
      "language_model",
      language_model.run,
      sections=("language_model", "seeds", "seed"),
      files=("language_model.checkpoint", "language_model.tokenizer"),
    ),
    Stage(
      "pools",
      pools.run,
      sections=("experiments", "tasks", "seeds", "seed"),
      inputs=("language_model",),
      files=files,
    ),
    Stage("pairs", pairs.run, sections=("experiments", "seeds", "seed"), inputs=("pools",)),
    Stage(
      "heads",
      heads.run,
      sections=("experiments", "heads", "seeds", "seed"),
      inputs=("language_model", "pairs"),
    ),
    Stage(
      "evaluate",
      evaluate.run,
      sections=("experiments", "tasks", "evaluate", "seeds", "seed"),
      inputs=("language_model", "pairs", "heads"),
      files=files,
    ),
    Stage("report", report.run, sections=("recipe", "variant"), inputs=everything),
  ]


def task_files(config: Any) -> tuple[str, ...]:
  """Returns the config fields that name files of tasks that are run: prompts, and models of judges."""
  found = []
  for name in (name for name in settings.tasks_run(config) if name in config.tasks):
    task = config.tasks[name]
    found += [f"tasks.{name}.{field}" for field in ("train", "test") if field in task]
    for judge in (judge for judge in ("judge", "quality") if judge in task):
      found += [f"tasks.{name}.{judge}.{field}" for field in ("path", "tokenizer") if field in task[judge]]
  return tuple(found)
