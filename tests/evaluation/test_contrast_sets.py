"""Contrast sets against scipy, closed forms and definitions."""

import numpy as np
import pytest
from scipy import stats

from nr.evaluation.contrast_sets import (
  area_under_curve,
  auc_interval,
  auc_variance,
  contrast,
  distinctive,
  find_features,
)


def test_differences_and_areas_are_scipy_s():
  random = np.random.default_rng(0)
  first, second = random.normal(0.4, 1.0, (13, 3)), random.normal(0.0, 2.0, (9, 3))
  second[:4, 1] = first[:4, 1]  # ties
  found = contrast(first, second)
  for column in range(3):
    test = stats.ttest_ind(first[:, column], second[:, column], equal_var=False)
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose([found.low_C[column], found.high_C[column]], interval, rtol=1e-9)
    statistic = stats.mannwhitneyu(first[:, column], second[:, column]).statistic
    assert found.auc_C[column] == pytest.approx(statistic / (13 * 9))


def test_the_variance_of_an_area_is_known_where_sets_are_alike():
  for size, other in ((5, 5), (30, 7)):
    exact = (size + other + 1) / (12 * size * other)  # of the Mann-Whitney statistic under equality
    assert auc_variance(np.array(0.5), size, other) == pytest.approx(exact)


def test_bounds_of_an_area_are_z_standard_errors_away():
  estimates = np.array([0.0, 0.2, 0.5, 0.93, 1.0])
  low, high = auc_interval(estimates, 20, 12)
  z = stats.norm.ppf(0.975)
  for bound in (low[1:], high[:-1]):
    estimate = estimates[1:] if bound[-1] == low[-1] else estimates[:-1]
    np.testing.assert_allclose((estimate - bound) ** 2, z**2 * auc_variance(bound, 20, 12), rtol=1e-6)
  assert low[0] == 0 and high[-1] == 1
  assert 0.5 < low[-1] < 1  # perfect separation in few texts is not certainty
  np.testing.assert_allclose(low, 1 - auc_interval(1 - estimates, 12, 20)[1], atol=1e-9)  # sets exchanged


def test_intervals_of_an_area_cover():
  random, truth = np.random.default_rng(1), stats.norm.cdf(1 / np.sqrt(2))
  first, second = random.normal(1.0, 1.0, (25, 2000)), random.normal(0.0, 1.0, (25, 2000))
  low, high = auc_interval(area_under_curve(first, second), 25, 25)
  assert 0.93 < np.mean((low <= truth) & (truth <= high)) < 0.975


def test_a_planted_feature_is_found_and_luck_is_not_reported():
  random = np.random.default_rng(2)
  first, second = random.normal(size=(40, 300)), random.normal(size=(40, 300))
  first[:, 17] += 2.0
  found, measured = find_features(first, second, 5)
  assert found[0] == 17 and measured.auc_low_C[0] > 0.5 and measured.low_C[0] > 0
  chosen = contrast(first[::2], second[::2]).auc_C[found[1:]]
  assert chosen.min() > 0.65  # the best of 300 by luck
  assert abs(measured.auc_C[1:].mean() - 0.5) < 0.1
  with pytest.raises(ValueError, match="give two texts or more of each"):
    find_features(first[:2], second, 1)


def test_distinctive_tokens_are_the_equation():
  counts, others = np.array([30.0, 5.0, 0.0, 100.0]), np.array([40.0, 50.0, 3.0, 900.0])
  found = distinctive(counts, others, prior=50.0)
  prior = 50.0 * (counts + others) / (counts + others).sum()
  for token in range(4):
    odds = []
    for counted in (counts, others):
      mass = counted[token] + prior[token]
      odds.append(np.log(mass / (counted.sum() + 50.0 - mass)))
    variance = sum(1 / (counted[token] + prior[token]) for counted in (counts, others))
    assert found[token] == pytest.approx((odds[0] - odds[1]) / np.sqrt(variance), rel=1e-3)
  np.testing.assert_allclose(found, -distinctive(others, counts, prior=50.0))
  np.testing.assert_allclose(distinctive(counts, 3 * counts), 0.0, atol=0.05)
  assert found.argmax() == 0
