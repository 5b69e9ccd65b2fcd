"""Bootstrap and paired intervals against cases with known answers."""

import numpy as np
import pytest

from nr.evaluation.perplexity import DocumentScores, loss_difference_interval, score_documents
from nr.evaluation.statistics import bootstrap_ratio, mean_interval, paired_difference


def test_equal_documents_have_no_spread():
  interval = bootstrap_ratio(np.full(20, 6.0), np.full(20, 2.0), seed=0)
  assert interval == (3.0, 3.0, 3.0)


def test_bootstrap_width_matches_the_normal_approximation():
  values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
  interval = bootstrap_ratio(values, np.ones(400), seed=1)
  half = 1.96 * values.std() / np.sqrt(400)
  assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)
  assert interval.estimate == pytest.approx(values.mean())


def test_coverage_of_the_bootstrap_interval():
  generator = np.random.default_rng(2)
  hits = 0
  for trial in range(200):
    lengths = generator.integers(50, 150, size=80)
    totals = lengths * 3.0 + generator.normal(0, 10, size=80)
    interval = bootstrap_ratio(totals, lengths, seed=trial, samples=400)
    hits += interval.low <= 3.0 <= interval.high
  assert 0.88 <= hits / 200 <= 0.99  # nominal 0.95, percentile bootstrap of 80 documents


def test_documents_without_tokens_do_not_count():
  with_empty = bootstrap_ratio(np.array([2.0, 4.0, 0.0]), np.array([1.0, 2.0, 0.0]), seed=0)
  assert with_empty.estimate == 2.0
  with pytest.raises(ValueError, match="empty"):
    bootstrap_ratio(np.zeros(3), np.zeros(3), seed=0)


def test_mean_interval_is_students():
  # Three values of mean 5 and standard deviation 1: t at 97.5 % with 2 degrees is 4.302653.
  interval = mean_interval(np.array([4.0, 5.0, 6.0]))
  half = 4.302653 / np.sqrt(3)
  np.testing.assert_allclose(interval, (5.0, 5.0 - half, 5.0 + half), rtol=1e-6)
  assert mean_interval(np.array([2.0])) == (2.0, float("-inf"), float("inf"))


def test_paired_difference_is_students_interval():
  interval = paired_difference(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 1.0]))
  # differences 1, 0, 2: mean 1, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
  assert interval.estimate == pytest.approx(1.0)
  assert interval.high - 1.0 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
  assert paired_difference(np.array([1.0]), np.array([2.0])) == (-1.0, float("-inf"), float("inf"))


def test_scores_add_up_by_document():
  batches = [
    {
      "weights": np.array([[1, 1, 0]]),
      "documents": np.array([[0, 1, 1]]),
      "nll": np.array([[1.0, 2.0, 9.0]]),
    },
    {
      "weights": np.array([[1, 0, 1]]),
      "documents": np.array([[1, 0, 2]]),
      "nll": np.array([[3.0, 9.0, 4.0]]),
    },
  ]
  scores = score_documents(lambda batch: batch["nll"], batches, np.array([10, 20, 30]))
  np.testing.assert_array_equal(scores.nll, [1.0, 5.0, 4.0])
  np.testing.assert_array_equal(scores.tokens, [1, 2, 1])
  assert scores.loss() == 2.5
  assert scores.perplexity() == pytest.approx(np.exp(2.5))
  assert scores.bits_per_byte() == pytest.approx(10 / np.log(2) / 60)


def test_models_scored_on_different_tokens_are_not_compared():
  first = DocumentScores(np.array([1.0]), np.array([2.0]), np.array([5]))
  second = DocumentScores(np.array([1.0]), np.array([3.0]), np.array([5]))
  with pytest.raises(ValueError, match="different tokens"):
    loss_difference_interval(first, second, seed=0)
