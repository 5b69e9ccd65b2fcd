"""Bradley-Terry rewards: closed forms, and calibration of simulated comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.objectives.reward_modeling import Calibration, bradley_terry_loss, calibration
from nr.objectives.weighted import add


def test_closed_forms():
  chosen, rejected = jnp.asarray([1.5, 0.0]), jnp.asarray([0.5, 0.0])
  loss, metrics = bradley_terry_loss(chosen, rejected)
  np.testing.assert_allclose(loss, [np.log1p(np.exp(-1.0)), np.log(2)], rtol=1e-6)
  np.testing.assert_array_equal(metrics["accuracy"], [1.0, 0.5])
  np.testing.assert_array_equal(metrics["margin"], [1.0, 0.0])
  held, _ = bradley_terry_loss(chosen, rejected, margin=jnp.asarray([1.0, 0.0]), centring=0.01)
  np.testing.assert_allclose(held, [np.log(2) + 0.04, np.log(2)], rtol=1e-6)
  with pytest.raises(ValueError, match="centring=-1"):
    bradley_terry_loss(chosen, rejected, centring=-1)


def test_a_constant_changes_nothing_but_the_centring():
  chosen, rejected = jax.random.normal(jax.random.key(0), (2, 6))

  def slope(constant, centring):
    return jax.grad(lambda c: bradley_terry_loss(chosen + c, rejected + c, centring=centring)[0].sum())(
      constant
    )

  assert float(slope(0.7, 0.0)) == pytest.approx(0.0, abs=1e-6)
  expected = 2 * 2 * 0.01 * float((chosen + rejected + 1.4).sum())
  assert float(slope(0.7, 0.01)) == pytest.approx(expected, rel=1e-4)


def test_rewards_are_recovered_from_comparisons():
  true = np.asarray([1.0, 0.3, -0.4, -0.9])
  pairs = np.random.default_rng(0).integers(0, 4, (40_000, 2))
  pairs = pairs[pairs[:, 0] != pairs[:, 1]]
  wins = np.random.default_rng(1).random(len(pairs)) < 1 / (1 + np.exp(true[pairs[:, 1]] - true[pairs[:, 0]]))
  pairs = jnp.asarray(np.where(wins[:, None], pairs, pairs[:, ::-1]))

  def loss(rewards):
    return bradley_terry_loss(rewards[pairs[:, 0]], rewards[pairs[:, 1]])[0].mean()

  rewards = jnp.zeros(4)
  for _ in range(300):
    rewards = rewards - 2.0 * jax.grad(loss)(rewards)
  np.testing.assert_allclose(rewards - rewards.mean(), true - true.mean(), atol=0.06)


def test_calibration_of_honest_and_of_overconfident_rewards():
  rng = np.random.default_rng(0)
  signed = rng.normal(0, 2, 200_000)
  wins = rng.random(signed.shape) < 1 / (1 + np.exp(-signed))
  differences = jnp.asarray(np.where(wins, signed, -signed), jnp.float32)
  weights = jnp.ones_like(differences)
  honest = float(calibration(differences, weights).expected_error())
  overconfident = float(calibration(3 * differences, weights).expected_error())
  assert honest < 0.005
  assert overconfident > 0.05


def test_calibration_adds_over_batches_and_ignores_padding():
  differences = jax.random.normal(jax.random.key(0), (40,))
  weights = jnp.ones(40).at[30:].set(0.0)
  whole = calibration(differences, weights)
  spoilt = jnp.where(weights == 0, jnp.nan, differences)
  parts = [calibration(spoilt[k : k + 20], weights[k : k + 20]) for k in (0, 20)]
  summed = Calibration(*(add(a, b) for a, b in zip(*parts)))
  np.testing.assert_allclose(summed.expected_error(), whole.expected_error(), rtol=1e-5)
  assert float(whole.confidence.weight.sum()) == 30
  # By hand: one pair ranked right with confidence sigma(1), one wrong with the same.
  one = calibration(jnp.asarray([1.0, -1.0]), jnp.ones(2))
  assert float(one.expected_error()) == pytest.approx(1 / (1 + np.exp(-1)) - 0.5, rel=1e-5)
  with pytest.raises(ValueError, match="num_bins=0"):
    calibration(differences, weights, num_bins=0)
