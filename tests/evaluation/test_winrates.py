"""Winrates: ties, lexicographic scores, the identity for binary tasks, coverage of the interval."""

import numpy as np
import pytest

from nr.evaluation.winrates import winrate, wins


def test_binary_winrate_is_50_plus_half_the_difference_in_accuracy():
  random = np.random.default_rng(0)
  first, second = (random.random((400, 1)) < share for share in (0.7, 0.4))
  rate = winrate([{"task": wins(first, second)}], seed=0).estimate
  assert 100 * rate == pytest.approx(50 + 50 * (first.mean() - second.mean()))


def test_ties_give_half_and_all_samples_are_compared():
  np.testing.assert_allclose(wins([[1.0, 0.0]], [[0.0, 0.0, 1.0]]), [(1 + 1 + 0.5 + 0.5 + 0.5 + 0) / 6])
  np.testing.assert_array_equal(wins([[2.0], [1.0]], [[2.0], [3.0]]), [0.5, 0.0])


def test_a_later_score_decides_only_where_earlier_ones_tie():
  first = [[[1.0, 0.0]], [[1.0, 5.0]], [[0.0, 9.0]], [[1.0, 2.0]]]
  second = [[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, 0.0]], [[1.0, 2.0]]]
  np.testing.assert_array_equal(wins(first, second), [0.0, 1.0, 0.0, 0.5])
  with pytest.raises(ValueError, match="cannot be compared"):
    wins(first, [[1.0]])


def test_tasks_count_alike_and_the_interval_covers():
  points = [{"a": np.ones(10), "b": np.zeros(1000)}]
  assert winrate(points, seed=0) == (0.5, 0.5, 0.5)
  random, inside = np.random.default_rng(1), 0
  for trial in range(200):
    # Each seed has a level of its own: an interval over prompts alone would be far too narrow.
    levels = np.clip(random.normal(0.6, 0.08, 8), 0, 1)
    seeds = [{"a": (random.random(100) < level).astype(float)} for level in levels]
    found = winrate(seeds, seed=trial, samples=300)
    inside += found.low <= 0.6 <= found.high
  assert 170 <= inside <= 200
  with pytest.raises(ValueError, match="at least one prompt"):
    winrate([{"a": np.zeros(0)}], seed=0)
