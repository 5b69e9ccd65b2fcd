"""CoCoMix: pretraining with continuous concepts (arXiv 2502.08524).

Raw text -> tokenizer -> teacher language model -> sparse autoencoder on the
teacher's activations -> concept labels for every token -> students from the
same batches (next-token baseline, CoCoMix, and any other arm of the config) ->
comparison -> steering -> report.
Each stage is a module of this package; read them in that order.
"""

from typing import Any

from nr.data.sources import BUILT_IN
from nr.recipes.cocomix import (
  autoencoder,
  checks,
  corpus,
  evaluate,
  labels,
  report,
  settings,
  steer,
  students,
  teacher,
)
from nr.recipes.stages import Stage

validate = checks.validate


def stages(config: Any) -> list[Stage]:
  """Returns the stages of the recipe that the config's arms need, in order."""
  arms = settings.arm_names(config)
  has_labels = any(settings.predicts_concepts(config, arm) for arm in arms)
  has_teacher = has_labels or any(settings.learns_from_teacher(config, arm) for arm in arms)
  is_steered = settings.steered_arm(config) is not None
  is_run = any(settings.runs_teacher(config, arm) for arm in arms)
  is_online = any(settings.is_online(config, arm) for arm in arms)
  text = () if config.corpus.name in BUILT_IN else ("corpus.name",)
  tokenizer = (
    "tokenizer.path" if config.tokenizer.path else "teacher.checkpoint"
  )  # whose it is; "" names none
  upstream = (*["teacher"] * has_teacher, *["sae", "labels"] * has_labels)
  found = {
    "tokenizer": Stage("tokenizer", corpus.run, sections=("corpus", "tokenizer"), files=(*text, tokenizer)),
    "teacher": Stage(
      "teacher",
      teacher.run,
      sections=("teacher", "window", "compute", "seed"),
      inputs=("tokenizer",),
      files=("teacher.checkpoint",),
      every_process=not config.teacher.checkpoint,
    ),
    "sae": Stage(
      "sae",
      autoencoder.run,
      sections=("sae", "window", "seed"),
      inputs=("tokenizer", "teacher"),
      files=("sae.checkpoint",),
      every_process=not config.sae.checkpoint,
    ),
    "labels": Stage(
      "labels",
      labels.run,
      sections=("targets", "labels", "window", "compute"),
      inputs=("tokenizer", "teacher", "sae"),
    ),
    "students": Stage(
      "students",
      students.run,
      sections=("students", "window", "compute", "seed"),
      inputs=("tokenizer", *["teacher"] * is_run, *["sae"] * is_online, *["labels"] * has_labels),
      every_process=True,
    ),
    "evaluate": Stage(
      "evaluate",
      evaluate.run,
      sections=("evaluate", "compute", "seed"),
      inputs=("tokenizer", *["labels"] * has_labels, "students"),
      files=("evaluate.last_word_file",),
    ),
    "steer": Stage(
      "steer",
      steer.run,
      sections=("steer", "seed"),
      inputs=("tokenizer", "teacher", "sae", "labels", "students"),
    ),
    "report": Stage(
      "report",
      report.run,
      sections=("recipe", "variant"),
      inputs=("tokenizer", *upstream, "students", "evaluate", *["steer"] * is_steered),
    ),
  }
  needed = {"tokenizer", *upstream, "students", "evaluate", "report", *["steer"] * is_steered}
  return [stage for name, stage in found.items() if name in needed]
