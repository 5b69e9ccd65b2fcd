"""Which of many features tell two sets apart: mean differences, AUC, distinctive tokens, each with its uncertainty."""

from typing import NamedTuple

import numpy as np

_HALVINGS = 60
"""Steps of the search for the bounds of an AUC; they reach the precision of float64."""


class Contrast(NamedTuple):
  """How each of C features differs between two sets of texts.

  Attributes:
    difference_C: mean in the first set minus mean in the second.
    low_C: lower bound of its interval.
    high_C: upper bound.
    auc_C: probability that a text of the first set has more of it than one of the second, ties counted half.
    auc_low_C: lower bound of its interval.
    auc_high_C: upper bound.
  """

  difference_C: np.ndarray
  low_C: np.ndarray
  high_C: np.ndarray
  auc_C: np.ndarray
  auc_low_C: np.ndarray
  auc_high_C: np.ndarray


def contrast(first_NC: np.ndarray, second_MC: np.ndarray, *, level: float = 0.95) -> Contrast:
  """Compares two sets, feature by feature.

  Intervals hold for a feature that was chosen beforehand. The largest of many differences is too large: choose on
  one half of the texts and read the other, as `find_features` does.

  Args:
    first_NC: features of N texts that have a property.
    second_MC: features of M texts without it.
    level: coverage of the intervals.

  Returns:
    Differences with Welch's t interval, and AUC with the bounds of `auc_interval`.

  Raises:
    ValueError: fewer than two texts in a set, or another number of features.
  """
  from scipy import stats

  first_NC, second_MC = np.asarray(first_NC, np.float64), np.asarray(second_MC, np.float64)
  if min(len(first_NC), len(second_MC)) < 2 or first_NC.shape[1:] != second_MC.shape[1:]:
    raise ValueError(
      f"sets of shapes {first_NC.shape} and {second_MC.shape}: give two texts or more of each, and the same features"
    )
  sizes = len(first_NC), len(second_MC)
  errors = [each.var(axis=0, ddof=1) / len(each) for each in (first_NC, second_MC)]
  error_C = errors[0] + errors[1]
  # Welch-Satterthwaite; where nothing varies any number of degrees of freedom gives a width of 0.
  parts = [error**2 / (size - 1) for error, size in zip(errors, sizes)]
  degrees_C = error_C**2 / np.where(error_C > 0, parts[0] + parts[1], 1)
  half_C = stats.t.ppf((1 + level) / 2, np.maximum(degrees_C, 1)) * np.sqrt(error_C)
  difference_C = first_NC.mean(axis=0) - second_MC.mean(axis=0)
  auc_C = area_under_curve(first_NC, second_MC)
  return Contrast(
    difference_C,
    difference_C - half_C,
    difference_C + half_C,
    auc_C,
    *auc_interval(auc_C, *sizes, level=level),
  )


def area_under_curve(first_NC: np.ndarray, second_MC: np.ndarray) -> np.ndarray:
  """Returns [C]: the share of pairs in which the first set has more, ties counted half (Mann-Whitney U / NM)."""
  from scipy import stats

  size, other = len(first_NC), len(second_MC)
  ranks = stats.rankdata(np.concatenate([first_NC, second_MC]), axis=0)
  return (ranks[:size].sum(axis=0) - size * (size + 1) / 2) / (size * other)


def auc_interval(
  auc_C: np.ndarray, size: int, other: int, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
  """Returns bounds [C] of an AUC: the values from which the estimate is z standard errors away.

  With the standard error at the bound and not at the estimate the interval stays inside 0..1 and does not
  shrink to a point where two sets separate perfectly. Source: variance of Hanley and McNeil (Radiology 143,
  1982), inverted as in Newcombe (Statistics in Medicine 25, 2006).

  Args:
    auc_C: estimates.
    size: texts of the first set.
    other: texts of the second.
    level: coverage.
  """
  from scipy import stats

  z = stats.norm.ppf((1 + level) / 2)
  auc_C = np.asarray(auc_C, np.float64)

  def bound(end: float) -> np.ndarray:
    near_C, far_C = auc_C.copy(), np.full_like(auc_C, end)
    for _ in range(_HALVINGS):
      middle_C = (near_C + far_C) / 2
      is_inside_C = (auc_C - middle_C) ** 2 <= z**2 * auc_variance(middle_C, size, other)
      near_C, far_C = np.where(is_inside_C, middle_C, near_C), np.where(is_inside_C, far_C, middle_C)
    return near_C

  return bound(0.0), bound(1.0)


def auc_variance(auc: np.ndarray, size: int, other: int) -> np.ndarray:
  """Returns Hanley and McNeil's variance of an estimated AUC, for exponentially distributed scores."""
  first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
  sums = auc * (1 - auc) + (size - 1) * (first - auc**2) + (other - 1) * (second - auc**2)
  return sums / (size * other)


def find_features(
  first_NC: np.ndarray, second_MC: np.ndarray, count: int, *, level: float = 0.95
) -> tuple[np.ndarray, Contrast]:
  """Finds the features that most speak for the first set.

  Texts at even places choose (by AUC, ties by mean difference), texts at odd places measure: the contrast that
  is returned is not the luck of the choice.

  Args:
    first_NC: as in `contrast`; at least four texts.
    second_MC: likewise.
    count: how many to return.
    level: coverage of the intervals.

  Returns:
    Features [count], and their contrast on the other half, in that order.

  Raises:
    ValueError: as `contrast`, of the halves.
  """
  chosen = contrast(first_NC[::2], second_MC[::2])
  found = np.lexsort((-chosen.difference_C, -chosen.auc_C))[:count]
  return found, contrast(first_NC[1::2][:, found], second_MC[1::2][:, found], level=level)


def distinctive(counts_V: np.ndarray, others_V: np.ndarray, *, prior: float = 500.0) -> np.ndarray:
  """Returns z-scores [V] of tokens that are more frequent in one collection than in another.

  Log odds ratio with a Dirichlet prior of the two collections' mean frequencies: Monroe, Colaresi and Quinn,
  "Fightin' Words" (Political Analysis 16, 2008), equations 16 and 22. Rare tokens are neither favoured nor lost.

  Args:
    counts_V: how often each token occurs in the first.
    others_V: likewise in the second.
    prior: tokens that the prior is worth (ours).
  """
  counts_V, others_V = np.asarray(counts_V, np.float64), np.asarray(others_V, np.float64)
  together_V = counts_V + others_V
  # A token that occurs nowhere tells nothing: it gets a hair of the prior, and a score of about 0.
  prior_V = prior * (together_V + 1e-3) / (together_V + 1e-3).sum()

  def log_odds(counted_V: np.ndarray) -> np.ndarray:
    mass_V = counted_V + prior_V
    return np.log(mass_V) - np.log(mass_V.sum() - mass_V)

  variance_V = 1 / (counts_V + prior_V) + 1 / (others_V + prior_V)
  return (log_odds(counts_V) - log_odds(others_V)) / np.sqrt(variance_V)
