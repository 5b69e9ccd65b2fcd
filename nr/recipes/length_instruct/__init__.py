"""LIFT: following length constraints in instructions (arXiv 2406.17744).

A model with a bias towards length -> preference pairs -> the same pairs with limits of
words in their prompts -> DPO, R-DPO and LIFT from the same model -> violations, wins and
words, with limits, with scaled limits and without -> report. `augmentation` is the method,
`benchmarks` the evaluator of AlpacaEval-LI and MT-Bench-LI, `toy` the offline world; the
other modules are stages. Read them in that order.
"""

from typing import Any

from nr.recipes.length_instruct import arms, base, checks, evaluate, pairs, report
from nr.recipes.stages import Stage

validate = checks.validate


def stages(config: Any) -> list[Stage]:
  """Returns the stages of the recipe, in order."""
  del config
  shared = ("world", "lift", "data", "seed", "seeds")
  return [
    Stage("base", base.run, sections=("base", *shared)),
    Stage("pairs", pairs.run_pairs, sections=shared, inputs=("base",)),
    Stage("augment", pairs.run_augment, sections=("lift",), inputs=("pairs",)),
    Stage("arms", arms.run, sections=("arms", "train", *shared), inputs=("base", "pairs", "augment")),
    Stage("evaluate", evaluate.run, sections=("evaluate", *shared), inputs=("base", "arms")),
    Stage(
      "report",
      report.run,
      sections=("recipe", "variant"),
      inputs=("base", "pairs", "augment", "arms", "evaluate"),
    ),
  ]
