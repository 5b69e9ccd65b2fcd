"""Particles on a chain with 40 texts: every number of the specification's second fixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation import resampling
from nr.generation.metropolis import metropolis
from nr.generation.particle_filter import particle_filter
from nr.generation.potentials import (
  Final,
  HardConstraint,
  Reweighting,
  TokenCount,
  product,
  twist_table,
)
from nr.generation.rejection import rejection_sample
from nr.generation.sample import sample
from nr.generation.samplers import Replay
from nr.generation.steering import steer
from nr.generation.stopping import LENGTH, STOP_ID, Stop
from nr.generation.transforms.algebra import IDENTITY, chain
from nr.generation.transforms.temperature import Temperature
from nr.generation.transforms.truncation import TopP
from tests.generation import toy

STOP = Stop(ids_E=[toy.EOS])
SETTINGS = dict(max_new_tokens=toy.MAX_NEW, stop=STOP)
RUNS = 20_000
OUTCOMES = toy.outcomes()
NAMES = list(OUTCOMES)
P = np.array(list(OUTCOMES.values()))
COUNTS = np.array([name.count("c") for name in NAMES])
HAS_NO_B = np.array(["b" not in name for name in NAMES])


def target_of(log_b, log_c):
  """Returns phi = exp(log_b #b + log_c #c), b forbidden for -inf; one program for all values."""
  return product(HardConstraint(TokenCount(log_b, [toy.B])), TokenCount(log_c, [toy.C]))


NO_B, MANY_C, NO_B_MANY_C = target_of(-jnp.inf, 0.0), target_of(0.0, 1.0), target_of(-jnp.inf, 1.0)


def contains_c(_, context):
  slots_S = jnp.arange(context.tokens_BS.shape[1])
  is_text_BS = (slots_S >= context.prompt_lengths_B[:, None]) & (slots_S < context.lengths_B[:, None])
  return jnp.where(((context.tokens_BS == toy.C) & is_text_BS).any(axis=1), 0.0, -jnp.inf)


def exact_twists():
  """Returns log E[exp(#c to come)] after each generated token, [T, V]: a backward recursion in NumPy."""
  future_TV = np.ones((toy.MAX_NEW, 4))
  for step in reversed(range(toy.MAX_NEW - 1)):
    factors_V = np.where(np.arange(4) == toy.C, np.e, 1.0) * future_TV[step + 1]
    future_TV[step, :3] = toy.TARGET_CV[:3] @ factors_V
  return np.log(future_TV)


def weigh(potential, proposal="locally_optimal", law=IDENTITY):
  """Returns float64 [40], the weight of every text when it is drawn, and its particles."""
  prompts = jnp.full((40, 1), toy.BOS)
  particles = particle_filter(
    toy.TOY,
    prompts,
    None,
    jax.random.key(0),
    potential=potential,
    proposal=proposal,
    chain=law,
    sampler=Replay(jnp.asarray(toy.padded())),
    num_particles=1,
    **SETTINGS,
  )
  return np.exp(np.asarray(particles.log_weights_BK[:, 0], np.float64)), particles


def runs(potential, size=8, driver=particle_filter, seed=0, **settings):
  prompts = jnp.full((RUNS, 1), toy.BOS)
  return driver(
    toy.TOY,
    prompts,
    None,
    jax.random.key(seed),
    potential=potential,
    num_particles=size,
    **SETTINGS,
    **settings,
  )


def text_weights(particles):
  """Returns float64 [runs, 40], the mean weight that each run gives to each text."""
  tokens_RKN = np.asarray(particles.tokens_BKN)
  codes = toy.padded() @ [1, 4, 16]
  which_RK = np.argsort(codes)[np.searchsorted(np.sort(codes), tokens_RKN @ [1, 4, 16]).clip(0, 39)]
  weights_RK = np.exp(np.asarray(particles.log_weights_BK, np.float64)) / tokens_RKN.shape[1]
  found = np.zeros((len(tokens_RKN), 40))
  np.add.at(found, (np.arange(len(tokens_RKN))[:, None], which_RK), weights_RK)
  return found


def assert_unbiased(found, expected, allowance=1e-5):
  error = found.std(axis=0) / np.sqrt(len(found))
  np.testing.assert_array_less(np.abs(found.mean(axis=0) - expected), 4.5 * error + allowance)


def assert_drawn_from(law, tokens_RN):
  """Compares the counts of texts; some are so rare that none may be found."""
  found = (np.asarray(tokens_RN) @ [1, 4, 16])[:, None] == toy.padded() @ [1, 4, 16]
  assert found.any(axis=1).all()
  error = np.sqrt(law * (1 - law) / len(found))
  np.testing.assert_array_less(np.abs(found.mean(axis=0) - law), 4.5 * error + 3 / len(found))


def at(name):
  return NAMES.index(name)


def test_weights_of_decoding_under_a_mask():
  weights, particles = weigh(NO_B)
  for name, weight in dict(aE=0.52, cE=0.4875, acE=0.39, E=0.65).items():
    np.testing.assert_allclose(weights[at(name)], weight, atol=1e-6)
  assert HAS_NO_B.sum() == 15
  assert (weights[~HAS_NO_B] == 0).all() and (weights[HAS_NO_B] > 0).all()
  target = np.where(HAS_NO_B, P, 0)
  masked = np.divide(target, weights, out=np.zeros(40), where=HAS_NO_B)
  np.testing.assert_allclose(masked.sum(), 1, atol=1e-6)
  for name, local, exact in [
    ("aE", 0.307692, 0.342612),
    ("cE", 0.164103, 0.171306),
    ("acE", 0.123077, 0.102784),
    ("E", 0.076923, 0.107066),
  ]:
    np.testing.assert_allclose([masked[at(name)], target[at(name)] / 0.467], [local, exact], atol=1e-6)
  mean = (masked * weights).sum()
  variance = (masked * weights**2).sum() - mean**2
  np.testing.assert_allclose(mean, 0.467, atol=1e-6)
  np.testing.assert_allclose(variance, 0.006107, atol=1e-6)
  np.testing.assert_allclose(mean**2 / (mean**2 + variance), 0.972759, atol=1e-6)
  kept = masked[HAS_NO_B]
  np.testing.assert_allclose((kept * np.log(kept / (target[HAS_NO_B] / 0.467))).sum(), 0.013435, atol=1e-6)
  log_probs = np.asarray(particles.log_probs_BK[:, 0])
  np.testing.assert_allclose(np.exp(log_probs[HAS_NO_B]), P[HAS_NO_B], rtol=1e-5)


def test_evidence_of_a_hard_constraint_is_unbiased():
  particles = runs(NO_B, threshold=0.9)
  evidence = np.exp(np.asarray(particles.log_evidence_B, np.float64))
  error = evidence.std() / np.sqrt(RUNS)
  assert abs(evidence.mean() - 0.467) < 4 * error
  np.testing.assert_allclose(error, 0.000195, atol=5e-6)
  assert_unbiased(text_weights(particles), np.where(HAS_NO_B, P, 0))


def test_resampling_changes_no_expectation():
  # Half of the runs resample at .9, the other half whenever weights differ.
  threshold_B = jnp.where(jnp.arange(RUNS) % 2 == 0, 0.9, 1.0)
  particles = runs(NO_B_MANY_C, proposal="model", threshold=threshold_B)
  assert float(particles.is_resampled_BN[:, :2].mean()) > 0.5
  assert_unbiased(text_weights(particles), np.where(HAS_NO_B, P, 0) * np.exp(COUNTS))
  has_weight_B = np.asarray(particles.log_evidence_B) > -np.inf
  np.testing.assert_allclose(particles.weights_BK.sum(axis=1), has_weight_B, atol=1e-5)


def test_soft_potential_with_exact_twists_draws_the_target():
  twists_TV = exact_twists()
  values = np.exp(twists_TV[0] + np.log([1, 1, np.e, 1]))
  np.testing.assert_allclose(values, [1.724339, 1.139338, 3.721017, 1.0], atol=1e-6)
  twisted = twist_table(MANY_C, twists_TV)
  weights, _ = weigh(twisted)
  np.testing.assert_allclose(weights, 1.882707, atol=2e-6)
  # In a chain, the same potential edits the law of each step: with exact twists, into the target.
  settings = dict(chain=chain(twisted), sampler=Replay(jnp.asarray(toy.padded())), **SETTINGS)
  drawn = sample(toy.TOY, jnp.full((40, 1), toy.BOS), **settings)
  law = np.exp(np.asarray(drawn.transformed_log_probs_RN, np.float64))
  target = P * np.exp(COUNTS) / 1.882707
  np.testing.assert_allclose(law.prod(axis=1), target, atol=1e-6)
  for name, probability in dict(bE=0.158017, cE=0.115505, aE=0.084984).items():
    np.testing.assert_allclose(law.prod(axis=1)[at(name)], probability, atol=1e-6)
  firsts = [law[at(name), 0] for name in ("aE", "bE", "cE", "E")]
  np.testing.assert_allclose(firsts, [0.366353, 0.211806, 0.395284, 0.026558], atol=1e-6)


def test_any_lookahead_and_any_proposal_have_the_same_target():
  target = P * np.exp(COUNTS)
  np.testing.assert_allclose(target.sum(), 1.882707, atol=1e-6)
  wrong_TV = np.random.default_rng(0).normal(size=(2, 4))
  for potential, proposal in [
    (twist_table(MANY_C, np.zeros((2, 4))), "model"),
    (twist_table(MANY_C, wrong_TV), "model"),
    (twist_table(MANY_C, wrong_TV), chain(MANY_C, Temperature(0.5))),
  ]:
    weights, particles = weigh(potential, proposal)
    if proposal == "model":
      drawn = P
    else:
      settings = dict(chain=proposal, sampler=Replay(jnp.asarray(toy.padded())), **SETTINGS)
      law = sample(toy.TOY, jnp.full((40, 1), toy.BOS), **settings).transformed_log_probs_RN
      drawn = np.exp(np.asarray(law, np.float64).sum(axis=1))
    np.testing.assert_allclose(drawn * weights, target, rtol=2e-5)


def test_final_potential_that_no_prefix_can_check():
  weights, particles = weigh(Final(contains_c), "model")
  np.testing.assert_allclose((P * weights).sum(), 0.359625, atol=1e-6)
  assert (weights > 0).sum() == 25
  assert set(np.asarray(particles.finish_BK).ravel()) == {STOP_ID, LENGTH}


def test_global_truncation_and_global_temperature():
  nucleus = HardConstraint(TopP(0.7))
  weights, _ = weigh(nucleus)
  is_kept = weights > 0
  assert [name for name, kept in zip(NAMES, is_kept) if kept] == ["aE", "bE", "aca", "acb", "acE"]
  np.testing.assert_allclose(P[is_kept].sum(), 0.5655, atol=1e-6)
  local = P[is_kept] / weights[is_kept]
  np.testing.assert_allclose(local, [0.304762, 0.466667, 0.063492, 0.063492, 0.101587], atol=1e-6)
  exact = P[is_kept] / P[is_kept].sum()
  np.testing.assert_allclose((local * np.log(local / exact)).sum(), 0.007788, atol=1e-6)
  weights, _ = weigh(Reweighting(Temperature(0.5)))
  # weights * local law = p^2, the local law being that of temperature .5.
  square = P**2 / (P**2).sum()
  np.testing.assert_allclose([square[at("bE")], square[at("aE")]], [0.653158, 0.188923], atol=1e-6)
  np.testing.assert_allclose(P[at("bE")] ** 2 / weights[at("bE")], 0.373051, atol=1e-6)
  np.testing.assert_allclose(P[at("aE")] ** 2 / weights[at("aE")], 0.262564, atol=1e-6)


def test_without_a_potential_particles_are_samples():
  prompts, key = jnp.full((20, 1), toy.BOS), jax.random.key(3)
  particles = particle_filter(
    toy.TOY, prompts, None, key, potential=target_of(0.0, 0.0), num_particles=512, threshold=1.0, **SETTINGS
  )
  drawn = sample(toy.TOY, prompts, None, key, num_samples=512, **SETTINGS)
  np.testing.assert_array_equal(particles.tokens_RN, drawn.tokens_RN)
  np.testing.assert_array_equal(particles.finish_BK.reshape(-1), drawn.finish_R)
  assert (np.asarray(particles.log_weights_BK) == 0).all() and (
    np.asarray(particles.log_evidence_B) == 0
  ).all()
  assert not np.asarray(particles.is_resampled_BN).any()


def test_steering_is_unbiased_and_keeps_no_text_twice():
  # Two branches of each particle; all of them in the next test.
  found = text_weights(runs(MANY_C, size=4, driver=steer, num_branches=2))
  assert_unbiased(found, P * np.exp(COUNTS))
  assert_unbiased(found.sum(axis=1), 1.882707)
  assert ((found > 0).sum(axis=1) == 4).all()


def test_steering_with_enough_particles_enumerates():
  particles = steer(
    toy.TOY, toy.PROMPT, None, jax.random.key(0), potential=MANY_C, num_particles=64, **SETTINGS
  )
  np.testing.assert_allclose(text_weights(particles)[0], P * np.exp(COUNTS), rtol=1e-5)
  np.testing.assert_allclose(np.exp(particles.log_evidence_B), 1.882707, atol=2e-6)
  assert int((particles.log_weights_BK > -jnp.inf).sum()) == 40


def test_rejection_draws_the_exact_law():
  prompts, settings = jnp.full((20, 1), toy.BOS), dict(drafts_per_round=512, max_attempts=4096, **SETTINGS)
  # Weights of decoding under a mask are at most 1.
  accepted = rejection_sample(
    toy.TOY,
    prompts,
    None,
    jax.random.key(5),
    potential=NO_B,
    proposal="locally_optimal",
    num_samples=200,
    **settings,
  )
  assert (accepted.found_B == 200).all()
  rate, attempts = accepted.accepted_B.sum() / accepted.attempts_B.sum(), accepted.attempts_B.sum()
  assert abs(rate - 0.467) < 4.5 * np.sqrt(0.467 * 0.533 / attempts)
  assert_drawn_from(np.where(HAS_NO_B, P, 0) / 0.467, accepted.tokens_BGN.reshape(-1, 3))


def test_metropolis_chains_reach_the_power_law():
  exponent_B = jnp.array([1.0, 2.0])
  chains = metropolis(
    toy.TOY,
    jnp.full((2, 1), toy.BOS),
    None,
    jax.random.key(6),
    exponent=exponent_B,
    num_chains=20_000,
    num_steps=24,
    **SETTINGS,
  )
  assert_drawn_from(P, chains.tokens_BKN[0])
  assert_drawn_from(P**2 / (P**2).sum(), chains.tokens_BKN[1])
  rates_B = chains.acceptance_rates_BK.mean(axis=1)
  assert 0.1 < rates_B[1] < rates_B[0] < 1


WEIGHTS = np.array([[0.05, 0.3, 0.0, 0.4, 0.25], [0.2] * 5, [0.0, 0.0, 1.0, 0.0, 0.0]])


@pytest.mark.parametrize("scheme", resampling.SCHEMES)
def test_resampling_expects_n_times_the_weight(scheme):
  log_weights_BK = jnp.tile(jnp.log(jnp.asarray(WEIGHTS)) + 7, (4000, 1))
  keys_B = jax.random.split(jax.random.key(1), len(log_weights_BK))
  parents_BK = np.asarray(jax.jit(resampling.SCHEMES[scheme])(log_weights_BK, keys_B))
  copies = (parents_BK[..., None] == np.arange(5)).sum(axis=1).reshape(4000, 3, 5)
  for row, weights in enumerate(WEIGHTS):
    assert_unbiased(copies[:, row].astype(np.float64), 5 * weights)
  assert (copies[:, 2] == [0, 0, 5, 0, 0]).all() and (copies[..., 2][:, 0] == 0).all()
  if scheme in ("systematic", "residual"):
    assert (copies >= np.floor(5 * WEIGHTS + 1e-6)).all()
  if scheme == "systematic":
    assert (copies <= np.ceil(5 * WEIGHTS - 1e-6)).all()
  if scheme != "multinomial":
    assert (copies[:, 1] == 1).all()


def test_systematic_resampling_at_known_uniforms():
  weights_BK = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 2.0]])
  parents_BN = resampling.systematic_at(weights_BK, jnp.array([0.2, 0.9, 0.999999]), 4)
  # Points .05 .3 .55 .8 and .225 .475 .725 .975 against .1 .3 .6 1.
  np.testing.assert_array_equal(parents_BN, [[0, 2, 2, 3], [1, 2, 3, 3], [3, 3, 3, 3]])


def test_optimal_resampling_keeps_the_heavy_and_is_unbiased():
  weights = np.array([0.5, 0.02, 0.2, 0.08, 0.1, 0.1])
  # N = 3: .5 stays, the other .5 has 2 places, so c = .25 and nothing else is certain.
  log_weights_BM = jnp.broadcast_to(jnp.log(jnp.asarray(weights, jnp.float32)) - 3, (20_000, 6))
  uniforms_B = jax.random.uniform(jax.random.key(2), (20_000,))
  kept_BN, new_BN = jax.jit(resampling.optimal, static_argnums=1)(log_weights_BM, 3, uniforms_B)
  kept_BN, new_BN = np.asarray(kept_BN), np.exp(np.asarray(new_BN, np.float64) + 3)
  np.testing.assert_allclose(np.sort(new_BN, axis=1), np.tile([0.25, 0.25, 0.5], (20_000, 1)), atol=1e-5)
  found = (new_BN[..., None] * (kept_BN[..., None] == np.arange(6))).sum(axis=1)
  assert_unbiased(found, weights)
  assert all(len(set(row)) == 3 for row in kept_BN[:500])
  few, _ = resampling.optimal(jnp.log(jnp.array([[0.3, 0.0, 0.7]])), 3, jnp.array([0.4]))
  assert sorted(few[0].tolist()) == [0, 1, 2]


def test_effective_sizes_and_means_of_weights():
  log_weights_BK = jnp.array([[1.0] * 4, [0.0, -jnp.inf, -jnp.inf, -jnp.inf], [-jnp.inf] * 4]) + 200
  np.testing.assert_array_equal(resampling.effective_sample_size(log_weights_BK), [4, 1, 0])
  expected = [201, 200 - np.log(4), -np.inf]
  np.testing.assert_allclose(resampling.log_mean_exp(log_weights_BK), expected, rtol=1e-6)
  np.testing.assert_allclose(resampling.normalised(log_weights_BK).sum(axis=1), [1, 1, 0], rtol=1e-6)
