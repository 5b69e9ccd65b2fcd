"""LIFT: following length constraints in instructions (arXiv 2406.17744).

A model with a bias towards length -> preference pairs -> the same pairs with limits of
words in their prompts -> DPO, R-DPO and LIFT from the same model -> violations, wins and
words, with limits, with scaled limits and without -> report. `augmentation` is the method,
`benchmarks` the evaluator of AlpacaEval-LI and MT-Bench-LI, `toy` the offline world,
`sampled_pairs` how a checkpoint makes its own pairs; the other modules are stages. Read
them in that order.
"""

from typing import Any

from nr.recipes.length_instruct import arms, base, checks, evaluate, pairs, report
from nr.recipes.stages import Stage

validate = checks.validate


def stages(config: Any) -> list[Stage]:
  """Returns the stages of the recipe, in order."""
  del config
  shared = ("world", "lift", "data", "seed", "seeds")
  benchmarks = ("alpaca_eval_li", "mt_bench_li", "mt_bench_li_baselines", "answered")
  return [
    Stage(
      "base", base.run, sections=("base", "compute", *shared), files=("base.checkpoint", "base.responses")
    ),
    Stage(
      "pairs",
      pairs.run_pairs,
      sections=("pools", *shared),
      inputs=("base",),
      files=("data.pairs", "pools.instructions", "pools.judge.path"),
    ),
    Stage("augment", pairs.run_augment, sections=("lift",), inputs=("pairs",)),
    Stage(
      "arms",
      arms.run,
      sections=("arms", "adapter", "compute", "train", *shared),
      inputs=("base", "pairs", "augment"),
    ),
    Stage(
      "evaluate",
      evaluate.run,
      sections=("evaluate", *shared),
      inputs=("base", "pairs", "arms"),
      files=tuple(f"evaluate.{name}" for name in benchmarks),
    ),
    Stage(
      "report",
      report.run,
      sections=("recipe", "variant"),
      inputs=("base", "pairs", "augment", "arms", "evaluate"),
    ),
  ]
