"""GRPO and its variants against numbers known in closed form and sums written out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.objectives.group_relative import (
  GroupRelativeSpec,
  PolicyTokens,
  group_advantages,
  group_relative_loss,
)
from nr.objectives.weighted import add

WEIGHTS = np.asarray([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], np.float32)
ADVANTAGES = np.asarray([1.0, -0.5, 0.3, -1.2], np.float32)


def policy(seed=0, **more):
  keys = jax.random.split(jax.random.key(seed), 5)
  names = ("log_probs", "old_log_probs", "reference_log_probs", "engine_log_probs")
  values = {name: -jax.random.uniform(key, WEIGHTS.shape, minval=0.1) for name, key in zip(names, keys)}
  values["entropies"] = jax.random.uniform(keys[4], WEIGHTS.shape)
  return PolicyTokens(**{**values, **more})


def test_advantages_of_the_fixture():
  rewards = jnp.asarray([[1.0, 0, 0, 1, 1]])
  expected = [0.730295, -1.095443, -1.095443, 0.730295, 0.730295]
  np.testing.assert_allclose(group_advantages(GroupRelativeSpec(), rewards)[0], expected, atol=1e-6)
  biased = group_advantages(GroupRelativeSpec(is_unbiased_deviation=False), rewards)[0]
  np.testing.assert_allclose(biased, np.asarray([0.4, -0.6, -0.6, 0.4, 0.4]) / np.sqrt(0.24), rtol=1e-5)
  plain = group_advantages(GroupRelativeSpec(scale="none"), rewards)[0]
  np.testing.assert_allclose(plain, [0.4, -0.6, -0.6, 0.4, 0.4], atol=1e-6)


@pytest.mark.parametrize("scale", ("group", "batch", "none"))
def test_rewards_that_tie_give_exactly_0(scale):
  rewards = jnp.full((2, 7), 0.1).at[1].set(jnp.arange(7.0))
  found = group_advantages(GroupRelativeSpec(scale=scale, epsilon=0.0), rewards)
  np.testing.assert_array_equal(found[0], 0.0)
  assert bool(jnp.isfinite(found).all()) and float(jnp.abs(found[1]).max()) > 0


def test_padding_of_a_group_does_not_count():
  rewards = jnp.asarray([[1.0, 0, 1, jnp.nan], [3.0, 1, 2, 5]])
  is_valid = jnp.asarray([[True, True, True, False], [True] * 4])
  found = group_advantages(GroupRelativeSpec(), rewards, is_valid)
  np.testing.assert_allclose(
    found[0, :3], group_advantages(GroupRelativeSpec(), rewards[:1, :3])[0], rtol=1e-6
  )
  assert float(found[0, 3]) == 0.0
  whole = group_advantages(GroupRelativeSpec(scale="batch"), jnp.nan_to_num(rewards), is_valid)
  deviation = np.std(np.asarray([1, 0, 1, 3, 1, 2, 5.0]), ddof=1)
  np.testing.assert_allclose(whole[1], (np.asarray([3, 1, 2, 5]) - 2.75) / deviation, rtol=1e-5)


def written_out(spec, tokens, weights):
  """The equations with loops, in float64."""
  log_probs, old, reference, engine, entropies = (np.asarray(x, np.float64) for x in tokens)
  per_response, counts = [], weights.sum(1)
  for i in range(len(weights)):
    total = 0.0
    scored = [t for t in range(weights.shape[1]) if weights[i, t]]
    mean = np.mean([log_probs[i, t] - old[i, t] for t in scored])
    for t in scored:
      ratio = np.exp(mean if spec.ratio_level == "sequence" else log_probs[i, t] - old[i, t])
      clipped = min(max(ratio, 1 - spec.clip_low), 1 + spec.clip_high)
      gain = min(ratio * ADVANTAGES[i], clipped * ADVANTAGES[i])
      if spec.importance_cap is not None:
        gain *= min(np.exp(old[i, t] - engine[i, t]), spec.importance_cap)
      x = reference[i, t] - log_probs[i, t]
      total -= gain - spec.kl_weight * (np.exp(x) - x - 1) + spec.entropy_weight * entropies[i, t]
    per_response.append(total)
  if spec.aggregation == "token_mean":
    return sum(per_response) / counts.sum()
  divisor = spec.max_length if spec.aggregation == "constant" else counts
  return float(np.mean(np.asarray(per_response) / divisor))


VARIANTS = {
  "grpo": GroupRelativeSpec(kl_weight=0.04),
  "dr_grpo": GroupRelativeSpec(scale="none", aggregation="constant", max_length=5),
  "dapo": GroupRelativeSpec(aggregation="token_mean", clip_high=0.28),
  "gspo": GroupRelativeSpec(ratio_level="sequence", clip_low=0.03, clip_high=0.04),
  "truncated": GroupRelativeSpec(importance_cap=1.1),
  "entropy": GroupRelativeSpec(entropy_weight=0.1, aggregation="token_mean"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_their_equations(name):
  loss, metrics = group_relative_loss(VARIANTS[name], policy(), jnp.asarray(ADVANTAGES), WEIGHTS)
  assert float(loss.mean()) == pytest.approx(written_out(VARIANTS[name], policy(), WEIGHTS), rel=1e-5)
  assert 0 < float(metrics["clip_share"].mean()) < 1
  assert float(metrics["kl"].mean()) > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_microbatches_add_and_padding_does_not_count(name):
  spec, tokens = VARIANTS[name], policy()
  whole, _ = group_relative_loss(spec, tokens, jnp.asarray(ADVANTAGES), WEIGHTS)
  dirty = PolicyTokens(*(jnp.where(WEIGHTS == 0, jnp.nan, x) for x in tokens))
  pieces = [
    group_relative_loss(
      spec, PolicyTokens(*(x[rows] for x in dirty)), jnp.asarray(ADVANTAGES[rows]), WEIGHTS[rows]
    )[0]
    for rows in (slice(0, 1), slice(1, 4))
  ]
  assert float(add(*pieces).mean()) == pytest.approx(float(whole.mean()), abs=1e-6)


def test_on_policy_gradient_is_that_of_the_plain_policy_gradient():
  tokens = policy(0)
  tokens = tokens._replace(old_log_probs=tokens.log_probs)

  def loss(log_probs):
    spec = GroupRelativeSpec(aggregation="token_mean")
    return group_relative_loss(spec, tokens._replace(log_probs=log_probs), jnp.asarray(ADVANTAGES), WEIGHTS)[
      0
    ].mean()

  expected = -ADVANTAGES[:, None] * WEIGHTS / WEIGHTS.sum()
  np.testing.assert_allclose(jax.grad(loss)(tokens.log_probs), expected, atol=1e-7)


def test_gradient_is_that_of_a_finite_difference():
  with jax.enable_x64(True):
    tokens = PolicyTokens(*(jnp.asarray(np.asarray(x), jnp.float64) for x in policy()))
    advantages, weights = jnp.asarray(ADVANTAGES, jnp.float64), jnp.asarray(WEIGHTS, jnp.float64)
    for spec in VARIANTS.values():

      def loss(log_probs, spec=spec):
        moved = tokens._replace(log_probs=log_probs)
        return group_relative_loss(spec, moved, advantages, weights)[0].total

      gradient = jax.grad(loss)(tokens.log_probs)
      for place in ((0, 1), (1, 0), (3, 4)):
        step = jnp.zeros_like(tokens.log_probs).at[place].set(1e-3)
        numeric = float(loss(tokens.log_probs + step) - loss(tokens.log_probs - step)) / 2e-3
        assert float(gradient[place]) == pytest.approx(numeric, abs=5e-4)


def test_the_kl_penalty_is_0_at_the_reference_and_pulls_towards_it():
  tokens = policy()
  spec = GroupRelativeSpec(kl_weight=1.0, aggregation="token_mean")

  def penalty(log_probs):
    moved = tokens._replace(log_probs=log_probs, old_log_probs=log_probs)
    return group_relative_loss(spec, moved, jnp.zeros(4), WEIGHTS)[0].mean()

  assert float(penalty(tokens.reference_log_probs)) == 0.0
  slope = jax.grad(penalty)(tokens.log_probs)
  sign = jnp.sign(tokens.log_probs - tokens.reference_log_probs) * WEIGHTS
  np.testing.assert_array_equal(jnp.sign(slope), sign)


REFUSED = [
  (dict(scale="grop"), "scale='grop'"),
  (dict(aggregation="constant"), "max_length=0"),
  (dict(max_length=4), "max_length=4"),
  (dict(clip_low=0.0), "clip_low"),
  (dict(importance_cap=0.0), "importance_cap"),
  (dict(kl_weight=-1.0), "kl_weight"),
]


@pytest.mark.parametrize("settings, message", REFUSED)
def test_invalid_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    GroupRelativeSpec(**settings)


def test_missing_log_probabilities_are_named():
  bare = PolicyTokens(*policy()[:2])
  for change, field in (
    (dict(kl_weight=0.1), "reference_log_probs"),
    (dict(importance_cap=2.0), "engine_log_probs"),
    (dict(entropy_weight=0.1), "entropies"),
  ):
    spec = dataclasses.replace(GroupRelativeSpec(), **change)
    with pytest.raises(ValueError, match=f"PolicyTokens.{field} is missing"):
      group_relative_loss(spec, bare, jnp.asarray(ADVANTAGES), WEIGHTS)
