"""What every task is to the stages: prompts as tokens, and scores of what was written to them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from nr.data.preferences import Prompt
from nr.recipes.adaptive_decoding.sampling import Written

PARTS = ("train", "test")


class TaskPrompt(NamedTuple):
  """One prompt.

  Attributes:
    id: unique in its task.
    prompt: text or messages, as the model is asked.
    tokens: as the model reads it.
    reference: what judges compare with; any JSON value.
    asked: what judges see of the prompt.
  """

  id: str
  prompt: Prompt
  tokens: tuple[int, ...]
  reference: Any = None
  asked: str = ""


class Prompts(NamedTuple):
  """Prompts of a task.

  Attributes:
    prompts: in the order in which they are answered.
    left_out: how many were passed over, by reason.
  """

  prompts: list[TaskPrompt]
  left_out: dict[str, int]


class Scored(NamedTuple):
  """Scores of R responses.

  Attributes:
    scores_R2: float64, reward and quality; the quality decides where rewards tie. NaN: could not be judged.
    answers_R: the final answer that was found in each, for a majority vote; None where there is none.
    reasons_R: why there is no score; "" where there is.
  """

  scores_R2: np.ndarray
  answers_R: Sequence[str | None]
  reasons_R: Sequence[str]


class Task(Protocol):
  """A task.

  Attributes:
    name: unique in the run.
    max_new_tokens: most tokens of a response, its end included.
    lengths: growing; prompts are padded to the first that holds them.
    num_prompts: training prompts, where it is not the experiment's number; 0: it is.
    num_test_prompts: test prompts, likewise.
  """

  name: str
  max_new_tokens: int
  lengths: tuple[int, ...]
  num_prompts: int
  num_test_prompts: int

  def prompts(self, part: str, count: int, random: np.random.Generator) -> Prompts:
    """Returns `count` prompts of a part (0: all there are); "train" and "test" have none in common."""
    ...

  def score(self, prompts: Sequence[TaskPrompt], texts: Sequence[str | None], written: Written) -> Scored:
    """Scores the responses of a piece.

    Args:
      prompts: P of them; response r belongs to prompt r // (R / P).
      texts: R responses; None: none was written.
      written: the same as tokens.
    """
    ...
