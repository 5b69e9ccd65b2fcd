"""Intervals: bootstrap over documents and paired differences over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
  """A point estimate with a confidence interval, in the unit of the estimate."""

  estimate: float
  low: float
  high: float


def bootstrap_ratio(
  totals: np.ndarray, weights: np.ndarray, *, seed: int, samples: int = 10_000, level: float = 0.95
) -> Interval:
  """Percentile bootstrap of sum(totals) / sum(weights), resampling documents.

  Documents, not tokens, are drawn with replacement, since tokens of one
  document are not independent.

  Args:
    totals: [documents] sums, for example of negative log-likelihood in nats.
    weights: [documents] their weights, for example token counts.
    seed: seed of the resampling.
    samples: number of bootstrap samples.
    level: coverage of the interval.

  Returns:
    The ratio on the data itself and the percentile interval.

  Raises:
    ValueError: no document has any weight.
  """
  totals, weights = np.asarray(totals, np.float64), np.asarray(weights, np.float64)
  scored = weights > 0
  totals, weights = totals[scored], weights[scored]
  if not len(weights):
    raise ValueError("bootstrap_ratio: no document with a positive weight; the split is empty")
  counts = np.random.default_rng(seed).multinomial(
    len(weights), np.full(len(weights), 1 / len(weights)), size=samples
  )
  ratios = (counts @ totals) / (counts @ weights)
  tail = (1 - level) / 2
  low, high = np.quantile(ratios, [tail, 1 - tail])
  return Interval(float(totals.sum() / weights.sum()), float(low), float(high))


def mean_over_runs(values: Sequence[float], *, seed: int = 0) -> Interval | None:
  """Returns the mean over runs with its 95 % bootstrap interval.

  Args:
    values: a statistic of each run (each seed).
    seed: of the resampling.

  Returns:
    None without a run; infinite bounds with a single one.
  """
  if not len(values):
    return None
  if len(values) == 1:
    return Interval(float(values[0]), float("-inf"), float("inf"))
  return bootstrap_ratio(np.asarray(values), np.ones(len(values)), seed=seed)


def mean_interval(values: np.ndarray, *, level: float = 0.95) -> Interval:
  """Student's t interval of the mean of independent runs.

  Args:
    values: [runs] a statistic of each run, at least one.
    level: coverage.

  Returns:
    Mean and its interval; infinite bounds with a single run.
  """
  from scipy import stats

  values = np.asarray(values, np.float64)
  mean = float(values.mean())
  if len(values) < 2:
    return Interval(mean, float("-inf"), float("inf"))
  error = values.std(ddof=1) / np.sqrt(len(values))
  half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * error)
  return Interval(mean, mean - half, mean + half)


def paired_difference(first: np.ndarray, second: np.ndarray, *, level: float = 0.95) -> Interval:
  """Student's t interval of mean(first - second) over paired runs (same seeds).

  Args:
    first: [runs] a statistic of the first system.
    second: [runs] the same of the second, in the same order.
    level: coverage.

  Returns:
    Mean difference and its interval; infinite bounds with a single pair.
  """
  return mean_interval(np.asarray(first, np.float64) - np.asarray(second, np.float64), level=level)
