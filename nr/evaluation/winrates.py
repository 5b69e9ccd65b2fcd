"""Pairwise winrates with intervals over prompts and seeds."""

from collections.abc import Mapping, Sequence

import numpy as np

from nr.evaluation.statistics import Interval


def wins(first_PN: np.ndarray, second_PM: np.ndarray) -> np.ndarray:
  """Points of the first system for each prompt: 1 where it is better, 0.5 for a tie, 0 where it is worse.

  Args:
    first_PN: scores of N responses to each of P prompts; [P, N, C] for scores of which a later one decides
      only where all earlier ones tie. NaN: there is no score.
    second_PM: scores of M responses to the same prompts.

  Returns:
    float64 [P], the mean over the N x M comparisons of a prompt that can be made: those that no missing score
    decides; NaN where there is none.

  Raises:
    ValueError: other prompts, or another number of scores.
  """
  first, second = (np.asarray(x, np.float64) for x in (first_PN, second_PM))
  if first.ndim == 2 and second.ndim == 2:
    first, second = first[..., None], second[..., None]
  if first.ndim != 3 or len(first) != len(second) or first.shape[2] != second.shape[-1]:
    raise ValueError(f"scores of shapes {np.shape(first_PN)} and {np.shape(second_PM)} cannot be compared")
  decided = np.zeros((len(first), first.shape[1], second.shape[1]))
  for score in range(first.shape[2]):
    sign = np.sign(first[:, :, None, score] - second[:, None, :, score])
    decided = np.where(decided == 0, sign, decided)
  points = 0.5 * (1 + decided)
  if not np.isnan(points).any():
    return points.mean(axis=(1, 2))
  count_P = np.isfinite(points).sum(axis=(1, 2))
  return np.where(count_P, np.nansum(points, axis=(1, 2)) / np.maximum(count_P, 1), np.nan)


def winrate(
  points: Sequence[Mapping[str, np.ndarray]], *, seed: int, samples: int = 2000, level: float = 0.95
) -> Interval:
  """Mean over seeds of the unweighted mean over tasks of the points, with a bootstrap interval.

  The bootstrap draws seeds with replacement, and within each drawn seed and task prompts with replacement.

  Args:
    points: for each seed, by task: [prompts] of `wins`.
    seed: of the resampling.
    samples: bootstrap samples.
    level: coverage of the interval.

  Raises:
    ValueError: no seed, or a task without prompts.
  """
  if not points or any(len(values) == 0 for tasks in points for values in tasks.values()):
    raise ValueError("winrate: give at least one seed, and at least one prompt of every task")
  random = np.random.default_rng(seed)
  estimate = np.mean([np.mean([values.mean() for values in tasks.values()]) for tasks in points])
  total_B = np.zeros(samples)
  for _ in points:
    drawn_B = random.integers(0, len(points), samples)
    for number, tasks in enumerate(points):
      rows = np.flatnonzero(drawn_B == number)
      total_B[rows] += _resampled(tasks, random, len(rows))
  low, high = np.quantile(total_B / len(points), [(1 - level) / 2, (1 + level) / 2])
  return Interval(float(estimate), float(low), float(high))


def _resampled(tasks: Mapping[str, np.ndarray], random: np.random.Generator, samples: int) -> np.ndarray:
  """Returns [samples], means over tasks of means over prompts drawn with replacement."""
  means = []
  for values in tasks.values():
    picked = random.integers(0, len(values), (samples, len(values)), np.int32)
    means.append(np.asarray(values, np.float64)[picked].mean(axis=1))
  return np.mean(means, axis=0)
