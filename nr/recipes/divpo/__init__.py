"""DivPO: Diverse Preference Optimization (arXiv 2501.18101).

A model that writes personas -> arms from the same model: DPO and DivPO, online and
offline, that draw pools, score them by a rule, pick pairs and train -> what each arm
writes: how much of it is valid, and how diverse -> report. Each stage is a module of
this package; read them in that order.
"""

from typing import Any

from nr.recipes.divpo import arms, base, checks, evaluate, report
from nr.recipes.stages import Stage

validate = checks.validate


def stages(config: Any) -> list[Stage]:
  """Returns the stages of the recipe, in order."""
  del config
  return [
    Stage("base", base.run, sections=("seeds", "seed", "task", "base"), files=("base.checkpoint",)),
    Stage(
      "arms",
      arms.run,
      sections=("seeds", "seed", "task", "sampling", "adapter", "compute", "arms", "train"),
      inputs=("base",),
    ),
    Stage(
      "evaluate",
      evaluate.run,
      sections=("seeds", "seed", "task", "sampling", "evaluate"),
      inputs=("base", "arms"),
    ),
    Stage("report", report.run, sections=("recipe", "variant"), inputs=("base", "arms", "evaluate")),
  ]
