"""The toy tasks of `families`, as tasks."""

from collections.abc import Sequence

import numpy as np

from nr.recipes.adaptive_decoding import families
from nr.recipes.adaptive_decoding.sampling import Written
from nr.recipes.adaptive_decoding.tasks.protocol import Prompts, Scored, TaskPrompt


class ToyTask:
  """A toy task.

  All have room for the longest response of any, so that one program serves all; rows end by themselves.

  Args:
    name: of a family.
  """

  max_new_tokens = families.MAX_RESPONSE
  lengths = (families.PROMPT_LENGTH,)
  num_prompts = num_test_prompts = 0

  def __init__(self, name: str):
    self.name = families.family_of(name).name

  def prompts(self, part: str, count: int, random: np.random.Generator) -> Prompts:
    """Returns random prompts; repeats are likely."""
    made = families.make_prompts(self.name, count, random, part)
    found = [
      TaskPrompt(
        str(place),
        families.TOKENIZER.decode(tokens_T),
        tuple(tokens_T.tolist()),
        {"family": self.name, "is_hard": bool(is_hard)},
      )
      for place, (tokens_T, is_hard) in enumerate(zip(made.tokens_PT, made.is_hard_P))
    ]
    return Prompts(found, {})

  def score(self, prompts: Sequence[TaskPrompt], texts: Sequence[str | None], written: Written) -> Scored:
    """Scores words; what is written of sums is the answer."""
    of_family = families.Prompts(
      np.asarray([prompt.tokens for prompt in prompts]),
      np.asarray([prompt.reference["is_hard"] for prompt in prompts]),
    )
    scores_R2 = families.rewards(self.name, of_family, written.tokens_RN, written.lengths_R)
    answers = list(texts) if self.name == "sums" else [None] * len(texts)
    return Scored(scores_R2, answers, [""] * len(texts))
