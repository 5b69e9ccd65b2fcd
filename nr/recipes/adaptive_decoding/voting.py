"""Majority votes: the most frequent final answer of several samples (arXiv 2411.09661, section 4.5).

A head votes against the fixed setting that votes best on training prompts, and writes one sample against the
fixed setting whose single samples are best there.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nr.data.pools import Pool
from nr.evaluation.winrates import winrate
from nr.recipes.adaptive_decoding import settings
from nr.recipes.adaptive_decoding.drawing import answers_of, scores_of

Votes = dict[str, np.ndarray]
"""By task, float64 [P, 2]: whether a prompt's vote is right, and the share of its samples that are; NaN: unknown."""


def majority(answers: Sequence[str | None]) -> str | None:
  """Returns the most frequent answer, of equally frequent ones the first; None where nobody has one.

  >>> majority(["7", None, "12", "12", "7"])
  '7'
  """
  counts = collections.Counter(answer for answer in answers if answer is not None)
  return max(counts, key=counts.get) if counts else None


def votes_of(pools: Sequence[Pool], count: int) -> np.ndarray:
  """Returns float64 [P, 2]: whether the vote of the first `count` samples is right, and the share that is.

  A vote without any answer is wrong, as a sample without one is. A prompt is unknown (NaN) where one of these
  samples could not be judged.

  Args:
    pools: scored by a judge that finds answers, 1 for a right one.
    count: samples that vote.

  Raises:
    ValueError: a score other than 0 and 1.
  """
  rewards_PN = scores_of(pools)[:, :count, 0]
  known = rewards_PN[np.isfinite(rewards_PN)]
  if not np.isin(known, (0, 1)).all():
    raise ValueError(
      f"votes={count}: score {known[~np.isin(known, (0, 1))][0]} is neither 0 nor 1; vote on right and wrong answers"
    )
  found = []
  for answers, rewards_N in zip(answers_of(pools), rewards_PN):
    chosen = majority(answers[:count])
    is_right = [
      reward for answer, reward in zip(answers, rewards_N) if answer == chosen and answer is not None
    ]
    found.append((is_right[0] if is_right else 0.0, rewards_N.mean()))
    if not np.isfinite(rewards_N).all():
      found[-1] = (np.nan, np.nan)
  return np.asarray(found, np.float64)


def vote_report(
  votes: Mapping[int, Mapping[str, Votes]],
  tuning: Mapping[int, Mapping[str, Votes]],
  heads: Sequence[str],
  count: int,
  *,
  purpose: tuple[Any, ...],
  samples: int,
) -> dict[str, Any]:
  """Returns accuracies of all arms, and the heads against the fixed settings that are best in training.

  Args:
    votes: by seed and arm, on test prompts.
    tuning: by seed and fixed arm, on training prompts.
    heads: arms that are no fixed ones.
    count: samples that vote.
    purpose: names that decide the bootstrap's random numbers.
    samples: of the bootstrap.

  Returns:
    `count`; `arms`: by arm, `vote` and `one`, accuracies with intervals over prompts and seeds; `tuned`: by
    seed, the arms whose `vote` and whose `one` is best in training (the first of equals); `against_tuned`: by
    head, `vote` and `one`, the winrate over those (ties 0.5) with its interval.
  """
  arms = list(next(iter(votes.values())))

  def interval(points: list[dict[str, np.ndarray]], name: str) -> dict[str, float]:
    number = settings.number_of(*purpose, name)
    return winrate([_known(tasks) for tasks in points], seed=number, samples=samples)._asdict()

  tuned = {str(number): _best(of_arms) for number, of_arms in tuning.items()}
  found: dict[str, Any] = {"count": count, "arms": {}, "tuned": tuned, "against_tuned": {}}
  for column, kind in enumerate(("vote", "one")):
    for arm in arms:
      points = [_column(of_seed[arm], column) for of_seed in votes.values()]
      found["arms"].setdefault(arm, {})[kind] = interval(points, arm)
    for head in heads:
      points = []
      for number, of_seed in votes.items():
        others = _column(of_seed[tuned[str(number)][kind]], column)
        mine = _column(of_seed[head], column)
        points.append({task: 0.5 * (1 + mine[task] - others[task]) for task in mine})
      found["against_tuned"].setdefault(head, {})[kind] = interval(points, f"{head} against tuned")
  return found


def _column(votes: Votes, column: int) -> dict[str, np.ndarray]:
  return {task: values_P2[:, column] for task, values_P2 in votes.items()}


def _known(tasks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {task: values[np.isfinite(values)] for task, values in tasks.items()}


def _best(of_arms: Mapping[str, Votes]) -> dict[str, str]:
  """Returns the best arms by `vote` and by `one`: by the unweighted mean over tasks."""
  best = {}
  for column, kind in enumerate(("vote", "one")):
    means = {
      arm: np.mean([values.mean() for values in _known(_column(votes, column)).values()])
      for arm, votes in of_arms.items()
    }
    best[kind] = max(means, key=means.get)
  return best
