"""CoCoMix: pretraining with continuous concepts (arXiv 2502.08524).

Raw text -> tokenizer -> teacher language model -> sparse autoencoder on the
teacher's activations -> concept labels for every token -> two students from the
same batches (next-token baseline and CoCoMix) -> comparison -> steering -> report.
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
  steer,
  students,
  teacher,
)
from nr.recipes.stages import Stage

validate = checks.validate


def stages(config: Any) -> list[Stage]:
  """Returns the stages of the recipe, in order."""
  text = () if config.corpus.name in BUILT_IN else ("corpus.name",)
  return [
    Stage("tokenizer", corpus.run, sections=("corpus", "tokenizer"), files=(*text, "tokenizer.path")),
    Stage("teacher", teacher.run, sections=("teacher", "window", "compute", "seed"), inputs=("tokenizer",)),
    Stage("sae", autoencoder.run, sections=("sae", "window", "seed"), inputs=("tokenizer", "teacher")),
    Stage(
      "labels",
      labels.run,
      sections=("targets", "labels", "window", "compute"),
      inputs=("tokenizer", "teacher", "sae"),
    ),
    Stage(
      "students",
      students.run,
      sections=("students", "window", "compute", "seed"),
      inputs=("tokenizer", "labels"),
    ),
    Stage(
      "evaluate",
      evaluate.run,
      sections=("evaluate", "compute", "seed"),
      inputs=("tokenizer", "labels", "students"),
    ),
    Stage(
      "steer",
      steer.run,
      sections=("steer", "seed"),
      inputs=("tokenizer", "teacher", "sae", "labels", "students"),
    ),
    Stage(
      "report",
      report.run,
      sections=("recipe", "variant"),
      inputs=("tokenizer", "teacher", "sae", "labels", "students", "evaluate", "steer"),
    ),
  ]
