"""Particles on a chain with 40 texts: every number of the specification's second fixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.particles import resampling
from nr.generation.particles.metropolis import Redraw, metropolis
from nr.generation.particles.particle_filter import particle_filter
from nr.generation.particles.potentials import (
  Final,
  HardConstraint,
  Reweighting,
  TokenCount,
  product,
  twist_table,
)
from nr.generation.particles.rejection import rejection_sample
from nr.generation.particles.steering import steer
from nr.generation.sample import sample
from nr.generation.samplers import Replay
from nr.generation.stopping import LENGTH, STOP_ID, Stop
from nr.generation.transforms.algebra import chain
from nr.generation.transforms.temperature import Temperature
from nr.generation.transforms.truncation import TopP
from tests.generation import toy

STOP = Stop(ids_E=[toy.EOS])
SETTINGS = dict(max_new_tokens=toy.MAX_NEW, stop=STOP)
OUTCOMES = toy.outcomes()
NAMES = list(OUTCOMES)
P = np.array(list(OUTCOMES.values()))
COUNTS = np.array([name.count("c") for name in NAMES])
HAS_NO_B = np.array(["b" not in name for name in NAMES])
CODES = toy.padded() @ [1, 4, 16]


def contains_c(is_asked, context):
  slots_S = jnp.arange(context.tokens_BS.shape[1])
  is_text_BS = (slots_S >= context.prompt_lengths_B[:, None]) & (slots_S < context.lengths_B[:, None])
  return jnp.where(((context.tokens_BS == toy.C) & is_text_BS).any(axis=1) | ~is_asked, 0.0, -jnp.inf)


def target_of(log_b=0.0, log_c=0.0, contains=False):
  """Returns phi = exp(log_b #b + log_c #c), b forbidden for -inf; one program for all values."""
  soft = TokenCount(log_c, [toy.C])
  return product(HardConstraint(TokenCount(log_b, [toy.B])), soft, Final(contains_c, jnp.array(contains)))


NO_B, MANY_C = target_of(log_b=-jnp.inf), target_of(log_c=1.0)


def exact_twists():
  """Returns log E[exp(#c to come)] after each generated token, [T, V]: a backward recursion in NumPy."""
  future_TV = np.ones((toy.MAX_NEW, 4))
  for step in reversed(range(toy.MAX_NEW - 1)):
    factors_V = np.where(np.arange(4) == toy.C, np.e, 1.0) * future_TV[step + 1]
    future_TV[step, :3] = toy.TARGET_CV[:3] @ factors_V
  return np.log(future_TV)


def weigh(potential, proposal="locally_optimal"):
  """Returns float64 [40], the weight of every text when it is drawn."""
  prompts, replay = jnp.full((40, 1), toy.BOS), Replay(jnp.asarray(toy.padded()))
  settings = dict(potential=potential, proposal=proposal, sampler=replay, num_particles=1, **SETTINGS)
  particles = particle_filter(toy.TOY, prompts, None, jax.random.key(0), **settings)
  return np.exp(np.asarray(particles.log_weights_BK[:, 0], np.float64))


def law_of(transform):
  """Returns float64 [40, 3], the probability of each token of every text under a chain; 1 behind the end."""
  settings = dict(chain=chain(transform), sampler=Replay(jnp.asarray(toy.padded())), **SETTINGS)
  drawn = sample(toy.TOY, jnp.full((40, 1), toy.BOS), **settings)
  return np.exp(np.asarray(drawn.transformed_log_probs_RN, np.float64))


def runs(count, size, driver=particle_filter, **settings):
  """Draws the particles of many prompts that are all the same."""
  prompts = jnp.full((count, 1), toy.BOS)
  return driver(toy.TOY, prompts, None, jax.random.key(0), num_particles=size, **SETTINGS, **settings)


def proposed_runs(**settings):
  """2,000 runs of 8 particles from the model; `Redraw` shares the program of `metropolis`."""
  redraw = Redraw(jnp.zeros((16_000, toy.MAX_NEW), jnp.int32), jnp.zeros(16_000, jnp.int32))
  return runs(2000, 8, proposal="model", sampler=redraw, **settings)


def text_weights(particles):
  """Returns float64 [runs, 40], the mean weight that each run gives to each text."""
  tokens_RKN = np.asarray(particles.tokens_BKN)
  sorted_codes, order = np.sort(CODES), np.argsort(CODES)
  which_RK = order[np.searchsorted(sorted_codes, tokens_RKN @ [1, 4, 16]).clip(0, 39)]
  weights_RK = np.exp(np.asarray(particles.log_weights_BK, np.float64)) / tokens_RKN.shape[1]
  found = np.zeros((len(tokens_RKN), 40))
  np.add.at(found, (np.arange(len(tokens_RKN))[:, None], which_RK), weights_RK)
  return found


def assert_unbiased(found, expected, allowance=1e-5):
  error = found.std(axis=0) / np.sqrt(len(found))
  np.testing.assert_array_less(np.abs(found.mean(axis=0) - expected), 4.5 * error + allowance)


def assert_drawn_from(law, tokens_RN):
  """Compares the counts of texts; some are so rare that none may be found."""
  found = (np.asarray(tokens_RN) @ [1, 4, 16])[:, None] == CODES
  assert found.any(axis=1).all()
  error = np.sqrt(law * (1 - law) / len(found))
  np.testing.assert_array_less(np.abs(found.mean(axis=0) - law), 4.5 * error + 3 / len(found))


def at(name):
  return NAMES.index(name)


def test_weights_of_decoding_under_a_mask():
  particles = runs(20_000, 8, potential=NO_B, threshold=0.0)
  is_text = np.asarray(particles.tokens_RN) @ [1, 4, 16] == CODES[:, None]
  assert is_text.sum(axis=0).all() and not is_text[~HAS_NO_B].any() and HAS_NO_B.sum() == 15
  log_weights_R, log_probs_R = (
    np.asarray(leaf, np.float64).ravel() for leaf in (particles.log_weights_BK, particles.log_probs_BK)
  )
  weights = np.zeros(40)
  for text in np.nonzero(HAS_NO_B)[0]:
    values = np.exp(log_weights_R[is_text[text]])
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_probs_R[is_text[text]]), P[text], rtol=1e-5)
    weights[text] = values[0]
  for name, weight in dict(aE=0.52, cE=0.4875, acE=0.39, E=0.65).items():
    np.testing.assert_allclose(weights[at(name)], weight, atol=1e-6)
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


def test_evidence_of_a_hard_constraint_is_unbiased():
  particles = runs(20_000, 8, potential=NO_B, threshold=0.9)
  evidence = np.exp(np.asarray(particles.log_evidence_B, np.float64))
  error = evidence.std() / np.sqrt(20_000)
  assert abs(evidence.mean() - 0.467) < 4 * error
  np.testing.assert_allclose(error, 0.000195, atol=5e-6)
  assert_unbiased(text_weights(particles), np.where(HAS_NO_B, P, 0))


def test_without_a_potential_particles_are_samples():
  particles = runs(20_000, 8, potential=target_of(), threshold=1.0)
  prompts = jnp.full((20_000, 1), toy.BOS)
  drawn = sample(toy.TOY, prompts, None, jax.random.key(0), num_samples=8, **SETTINGS)
  np.testing.assert_array_equal(particles.tokens_RN, drawn.tokens_RN)
  np.testing.assert_array_equal(particles.finish_BK.reshape(-1), drawn.finish_R)
  assert (np.asarray(particles.log_weights_BK) == 0).all() and (
    np.asarray(particles.log_evidence_B) == 0
  ).all()
  assert not np.asarray(particles.is_resampled_BN).any()


def test_rejection_draws_the_exact_law():
  # Weights of decoding under a mask are at most 1, so 0 bounds their logarithms.
  settings = dict(potential=NO_B, proposal="locally_optimal", drafts_per_round=8, max_attempts=64)
  prompts = jnp.full((20_000, 1), toy.BOS)
  accepted = rejection_sample(toy.TOY, prompts, None, jax.random.key(5), **settings, **SETTINGS)
  assert (accepted.found_B == 1).all()
  rate = accepted.acceptance_rates_B.mean()
  assert abs(rate - 0.467) < 0.005
  assert_drawn_from(np.where(HAS_NO_B, P, 0) / 0.467, accepted.tokens_BGN[:, 0])


def test_resampling_changes_no_expectation():
  # Half of the runs resample at .9, the other half whenever weights differ.
  threshold_B = jnp.where(jnp.arange(2000) % 2 == 0, 0.9, 1.0)
  particles = proposed_runs(potential=target_of(-jnp.inf, 1.0), threshold=threshold_B)
  assert float(particles.is_resampled_BN[:, :2].mean()) > 0.5
  assert_unbiased(text_weights(particles), np.where(HAS_NO_B, P, 0) * np.exp(COUNTS), 5e-4)
  has_weight_B = np.asarray(particles.log_evidence_B) > -np.inf
  np.testing.assert_allclose(particles.weights_BK.sum(axis=1), has_weight_B, atol=1e-5)


def test_final_potential_that_no_prefix_can_check():
  particles = proposed_runs(potential=target_of(contains=True), threshold=jnp.zeros(2000))
  has_c = COUNTS > 0
  assert has_c.sum() == 25
  np.testing.assert_allclose(P[has_c].sum(), 0.359625, atol=1e-6)
  is_text = np.asarray(particles.tokens_RN) @ [1, 4, 16] == CODES[:, None]
  np.testing.assert_array_equal(np.exp(particles.log_weights_BK).ravel(), is_text[has_c].any(axis=0))
  resampled = proposed_runs(potential=target_of(contains=True), threshold=jnp.full(2000, 0.9))
  for each in (particles, resampled):
    assert_unbiased(np.exp(np.asarray(each.log_evidence_B, np.float64)), 0.359625)
  assert set(np.asarray(particles.finish_BK).ravel()) == {STOP_ID, LENGTH}


def test_metropolis_chains_reach_the_power_law():
  exponent_B = jnp.where(jnp.arange(2000) < 1000, 1.0, 2.0)
  request = (toy.TOY, jnp.full((2000, 1), toy.BOS), None, jax.random.key(6))
  settings = dict(exponent=exponent_B, num_chains=8, **SETTINGS)
  chains = metropolis(*request, potential=target_of(), num_steps=24, **settings)
  plain, power = np.asarray(chains.tokens_BKN).reshape(2, -1, toy.MAX_NEW)
  assert_drawn_from(P, plain)
  assert_drawn_from(P**2 / (P**2).sum(), power)
  rates = chains.acceptance_rates_BK.reshape(2, -1).mean(axis=1)
  assert 0.1 < rates[1] < rates[0] < 1
  # Chains that start from a forbidden text leave it.
  chains = metropolis(*request, potential=NO_B, num_steps=24, **settings)
  tokens = np.asarray(chains.tokens_BKN).reshape(2, -1, toy.MAX_NEW)[0]
  assert_drawn_from(np.where(HAS_NO_B, P, 0) / 0.467, tokens)


def test_soft_potential_with_exact_twists_draws_the_target():
  twists_TV = exact_twists()
  values = np.exp(twists_TV[0] + np.log([1, 1, np.e, 1]))
  np.testing.assert_allclose(values, [1.724339, 1.139338, 3.721017, 1.0], atol=1e-6)
  twisted = twist_table(TokenCount(1.0, [toy.C]), twists_TV)
  np.testing.assert_allclose(weigh(twisted), 1.882707, atol=2e-6)
  # In a chain, the same potential edits the law of each step: with exact twists, into the target.
  law = law_of(twisted)
  np.testing.assert_allclose(law.prod(axis=1), P * np.exp(COUNTS) / 1.882707, atol=1e-6)
  for name, probability in dict(bE=0.158017, cE=0.115505, aE=0.084984).items():
    np.testing.assert_allclose(law.prod(axis=1)[at(name)], probability, atol=1e-6)
  firsts = [law[at(name), 0] for name in ("aE", "bE", "cE", "E")]
  np.testing.assert_allclose(firsts, [0.366353, 0.211806, 0.395284, 0.026558], atol=1e-6)


def test_wrong_lookahead_and_wrong_proposal_have_the_same_target():
  target = P * np.exp(COUNTS)
  np.testing.assert_allclose(target.sum(), 1.882707, atol=1e-6)
  one_TV, other_TV = np.random.default_rng(0).normal(size=(2, toy.MAX_NEW - 1, 4))
  proposal = twist_table(TokenCount(-0.5, [toy.C]), one_TV)
  weights = weigh(twist_table(TokenCount(1.0, [toy.C]), other_TV), proposal)
  np.testing.assert_allclose(law_of(proposal).prod(axis=1) * weights, target, rtol=2e-5)


def test_global_truncation_and_global_temperature():
  def narrowed(p, tau):
    return product(HardConstraint(TopP(p)), Reweighting(Temperature(tau)))

  weights = weigh(narrowed(0.7, 1.0))
  is_kept = weights > 0
  assert [name for name, kept in zip(NAMES, is_kept) if kept] == ["aE", "bE", "aca", "acb", "acE"]
  np.testing.assert_allclose(P[is_kept].sum(), 0.5655, atol=1e-6)
  local = P[is_kept] / weights[is_kept]
  np.testing.assert_allclose(local, [0.304762, 0.466667, 0.063492, 0.063492, 0.101587], atol=1e-6)
  exact = P[is_kept] / P[is_kept].sum()
  np.testing.assert_allclose((local * np.log(local / exact)).sum(), 0.007788, atol=1e-6)
  # The target is p^2; weights tell how far the local law of temperature .5 is from it.
  weights, square = weigh(narrowed(1.0, 0.5)), P**2 / (P**2).sum()
  np.testing.assert_allclose([square[at("bE")], square[at("aE")]], [0.653158, 0.188923], atol=1e-6)
  np.testing.assert_allclose(P[at("bE")] ** 2 / weights[at("bE")], 0.373051, atol=1e-6)
  np.testing.assert_allclose(P[at("aE")] ** 2 / weights[at("aE")], 0.262564, atol=1e-6)


def test_steering_is_unbiased_and_keeps_no_text_twice():
  # Two branches of each particle; all of them in the next test.
  found = text_weights(runs(20_000, 4, steer, potential=MANY_C, num_branches=2))
  assert_unbiased(found, P * np.exp(COUNTS))
  assert_unbiased(found.sum(axis=1), 1.882707)
  assert ((found > 0).sum(axis=1) == 4).all()


def test_steering_with_enough_particles_enumerates():
  particles = runs(1, 64, steer, potential=MANY_C)
  np.testing.assert_allclose(text_weights(particles)[0], P * np.exp(COUNTS), rtol=1e-5)
  np.testing.assert_allclose(np.exp(particles.log_evidence_B), 1.882707, atol=2e-6)
  assert int((particles.log_weights_BK > -jnp.inf).sum()) == 40


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
