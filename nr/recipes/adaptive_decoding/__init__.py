"""Adaptive decoding by latent preference optimisation (arXiv 2411.09661), on toys that need no download.

A tiny language model learns the tasks -> it answers prompts with temperatures drawn at random -> of the
answers to one prompt a good and a bad one make a pair -> a head learns from the pairs which temperature
the prompt, or the token, wants; the language model stays frozen -> the head against every fixed
temperature and other adaptive rules, with intervals -> report. Each stage is a module of this package.
"""

from typing import Any

from nr.recipes.adaptive_decoding import checks, evaluate, heads, language_model, pairs, pools, report
from nr.recipes.stages import Stage

validate = checks.validate


def stages(config: Any) -> list[Stage]:
  """Returns the stages of the recipe, in order."""
  del config
  everything = ("language_model", "pools", "pairs", "heads", "evaluate")
  return [
    Stage("language_model", language_model.run, sections=("language_model", "seeds", "seed")),
    Stage("pools", pools.run, sections=("experiments", "seeds", "seed"), inputs=("language_model",)),
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
      sections=("experiments", "evaluate", "seeds", "seed"),
      inputs=("language_model", "pairs", "heads"),
    ),
    Stage("report", report.run, sections=("recipe", "variant"), inputs=everything),
  ]
