"""Particles on networks and at the edges: caches, states, batches, dead ends, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.constraints.automaton import Constrain
from nr.generation.constraints.choices import choices
from nr.generation.decoding import pad_prompts
from nr.generation.particles import particle_filter as driver
from nr.generation.particles.metropolis import Redraw
from nr.generation.particles.particle_filter import particle_filter
from nr.generation.particles.potentials import Final, HardConstraint, Lookahead, TokenCount, product
from nr.generation.particles.rejection import rejection_sample
from nr.generation.particles.steering import steer
from nr.generation.particles.weighted_texts import draw_index
from nr.generation.stopping import BROKEN, DEAD_END, LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import chain
from nr.generation.transforms.penalties import FrequencyPresence, NoRepeatNgram
from nr.generation.transforms.temperature import Temperature
from tests.generation import toy

KEY = jax.random.key(4)
STOP = Stop(ids_E=[toy.EOS])
TOY_SETTINGS = dict(max_new_tokens=toy.MAX_NEW, stop=STOP)
PROMPTS = toy.random_prompts([3, 7, 5])
EVEN = list(range(0, 32, 2))
NEW, SIZE = 6, 4
ALL = jnp.arange(3)


def network_settings(rows=slice(None)):
  """Returns a request whose law, potential and proposal have states and parameters of each prompt."""

  def some(*values):
    return jnp.asarray(values)[rows]

  return dict(
    chain=chain(FrequencyPresence(frequency=some(0.5, 1.0, 2.0)), Temperature(some(0.7, 1.0, 1.5))),
    potential=TokenCount(some(2.0, -1.0, 3.0), EVEN),
    proposal=chain(FrequencyPresence(presence=some(0.1, 0.2, 0.3)), Temperature(some(1.5, 1.0, 0.9))),
    stop=Stop(ids_E=[5, 9], limits_B=some(6, 5, 6)),
    max_new_tokens=NEW,
    num_particles=SIZE,
  )


def filtered(model, texts=None, order=ALL, length=8, threshold=1.0):
  """Draws particles, or weighs given texts by the same program; without resampling nothing is gathered."""
  prompts, valid = pad_prompts([PROMPTS[row] for row in order], length=length)
  rows = len(order) * SIZE
  tokens_RN = jnp.zeros((rows, NEW), jnp.int32) if texts is None else texts
  redraw = Redraw(tokens_RN, jnp.full(rows, 0 if texts is None else NEW, jnp.int32))
  settings = dict(threshold=threshold, sampler=redraw, row_ids_B=order, **network_settings(order))
  return particle_filter(model, prompts, valid, KEY, **settings)


def assert_law_is_that_of_the_texts(model, particles):
  """Reads all texts again, each by itself: a wrong gather of a cache or a state would show."""
  again = filtered(model, particles.tokens_RN, threshold=0.0)
  is_alive_BK = np.asarray(particles.log_weights_BK) > -np.inf
  assert is_alive_BK.all()
  np.testing.assert_array_equal(particles.lengths_BK, again.lengths_BK)
  np.testing.assert_array_equal(particles.finish_BK, again.finish_BK)
  np.testing.assert_allclose(particles.log_probs_BK, again.log_probs_BK, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["concepts", pytest.param("transformer", marks=pytest.mark.slow)])
def test_resampled_caches_and_states_are_those_of_the_texts(kind):
  model = toy.tiny_network(kind)
  particles = filtered(model)
  assert np.asarray(particles.is_resampled_BN).sum() >= 8
  assert (np.asarray(particles.finish_BK) != RUNNING).all()
  assert_law_is_that_of_the_texts(model, particles)
  settings = network_settings()
  del settings["proposal"]
  steered = steer(model, *pad_prompts(PROMPTS), KEY, num_branches=5, **settings)
  assert_law_is_that_of_the_texts(model, steered)
  assert all(len({tuple(text) for text in prompt}) == SIZE for prompt in np.asarray(steered.tokens_BKN))


def test_neither_batch_nor_padding_changes_a_prompt():
  model, order = toy.tiny_network("concepts"), jnp.array([2, 1])
  whole, part = filtered(model), filtered(model, order=order, length=16)
  for name in ("tokens_BKN", "lengths_BK", "finish_BK", "is_resampled_BN"):
    np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[order])
  for name in ("log_weights_BK", "log_evidence_B", "log_probs_BK", "effective_sample_size_BN"):
    np.testing.assert_allclose(getattr(part, name), getattr(whole, name)[order], rtol=1e-4, atol=1e-4)


def last_factor(parameters, context):
  values_R, slope = parameters
  return values_R + slope * context.generated_B


def toy_potential(first=0.0, second=0.0, values_R=0.0, slope=0.0):
  """Returns one program for all values: `first` nats each token, `second` each end of text, and a last factor."""
  first, second = (jnp.broadcast_to(jnp.asarray(value, jnp.float32), (4,)) for value in (first, second))
  values_R = jnp.broadcast_to(jnp.asarray(values_R, jnp.float32), (16,))
  every, end = TokenCount(first, range(4)), TokenCount(second, [toy.EOS])
  return product(every, end, Final(last_factor, (values_R, jnp.float32(slope))))


def toy_particles(potential, size=4, stop=STOP, **settings):
  """Draws 4 prompts' particles."""
  settings = dict(num_particles=size, max_new_tokens=toy.MAX_NEW, stop=stop, **settings)
  return particle_filter(toy.TOY, jnp.full((4, 1), toy.BOS), None, KEY, potential=potential, **settings)


def assert_no_nan(particles):
  assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(particles))


def test_dead_ends_are_flagged_and_touch_nobody_else():
  # Nothing is allowed in prompt 0; in prompt 1 whatever the end of text; nobody minds in 2 and 3.
  potential = toy_potential(jnp.array([-jnp.inf, 0.0, 0.0, 0.0]), jnp.array([0.0, -jnp.inf, 0.0, 0.0]))
  for proposal in ("locally_optimal", "model"):
    particles = toy_particles(potential, proposal=proposal)
    assert_no_nan(particles)
    evidence_B = np.asarray(particles.log_evidence_B)
    assert evidence_B[0] == -np.inf and (evidence_B[2:] == 0).all() and evidence_B[1] < 0
    assert (np.asarray(particles.finish_BK)[0] == DEAD_END).all()
    assert (np.asarray(particles.lengths_BK)[0] == 0).all()
    assert (np.asarray(particles.weights_BK)[0] == 0).all()
    index_B = np.asarray(draw_index(particles, KEY))
    assert index_B[0] == -1 and (index_B[1:] >= 0).all()
    alive = np.asarray(particles.log_weights_BK)[1] > -np.inf
    assert (np.asarray(particles.finish_BK)[1][alive] == LENGTH).all()
  request = (toy.TOY, jnp.full((4, 1), toy.BOS), None, KEY)
  steered = steer(*request, potential=potential, num_particles=4, **TOY_SETTINGS)
  assert_no_nan(steered)
  assert steered.log_evidence_B[0] == -jnp.inf and (np.asarray(steered.finish_BK)[0] == DEAD_END).all()


def test_factors_that_are_no_numbers_break_the_particle_only():
  values_R = jnp.zeros(16).at[8:12].set(jnp.nan)
  potential = toy_potential(0.0, jnp.array([jnp.nan, jnp.inf, 0.0, 0.0]), values_R)
  particles = toy_particles(potential, proposal="model")
  assert_no_nan(particles)
  finish_BK, log_weights_BK = np.asarray(particles.finish_BK), np.asarray(particles.log_weights_BK)
  assert (finish_BK[2] == BROKEN).all() and (log_weights_BK[2] == -np.inf).all()
  assert ((finish_BK == BROKEN) <= (log_weights_BK == -np.inf)).all()
  assert (log_weights_BK[3] == 0).all() and (finish_BK[3] != BROKEN).all()
  nobody = toy_particles(toy_potential(jnp.nan))
  assert_no_nan(nobody)
  assert (np.asarray(nobody.finish_BK) == BROKEN).all()


def test_texts_of_no_token_get_the_final_factor():
  stop = Stop(ids_E=[toy.EOS], limits_B=jnp.array([0, 1, 2, 3]))
  particles = toy_particles(toy_potential(values_R=1.0, slope=3.0), stop=stop, threshold=0.0)
  np.testing.assert_allclose(particles.log_weights_BK, 1 + 3 * np.asarray(particles.lengths_BK))
  assert (np.asarray(particles.lengths_BK)[0] == 0).all()
  assert (np.asarray(particles.finish_BK)[0] == LENGTH).all()


def test_sweeping_parameters_compiles_once():
  toy_particles(toy_potential(1.0), threshold=0.5)
  before = driver._run._cache_size()
  toy_particles(toy_potential(-2.0, 1.0), threshold=0.9)
  toy_particles(toy_potential(0.0, -jnp.inf), threshold=jnp.array([0.0, 0.1, 0.2, 1.0]))
  assert driver._run._cache_size() == before


def test_texts_that_end_before_their_automaton_have_no_weight():
  automaton = choices([[0, 1], [2, 2, 2], [2, 0, 0, 0]], [b"a", b"b", b"c", None])
  constraint = HardConstraint(Constrain(automaton, end_of_text_ids=(toy.EOS,)))
  particles = steer(toy.TOY, toy.PROMPT, None, KEY, potential=constraint, num_particles=8, **TOY_SETTINGS)
  found = {
    toy.name(text[:length]): np.exp(weight) / 8
    for text, length, weight in zip(
      np.asarray(particles.tokens_BKN[0]), particles.lengths_BK[0], particles.log_weights_BK[0]
    )
    if weight > -np.inf
  }
  outcomes = toy.outcomes()
  assert set(found) == {"abE", "ccc"}
  np.testing.assert_allclose(found["abE"], outcomes["abE"], rtol=1e-5)
  np.testing.assert_allclose(found["ccc"], outcomes["ccc"], rtol=1e-5)


def test_values_of_hidden_states_look_ahead():
  model = dataclasses.replace(toy.TOY, hidden_CD={"last": jax.random.normal(jax.random.key(2), (5, 3))})
  head_DV = jax.random.normal(jax.random.key(1), (3, 4))
  twisted = Lookahead(
    TokenCount(1.0, [toy.C]),
    lambda head_DV, context: context.hidden["last"] @ head_DV,
    head_DV,
    ("hidden:last",),
  )
  request = (jnp.full((4, 1), toy.BOS), None, KEY)
  settings = dict(potential=twisted, proposal="model", num_particles=4, threshold=0.0, **TOY_SETTINGS)
  particles = particle_filter(model, *request, **settings)
  # The lookahead is divided out at the end.
  counts_BK = (np.asarray(particles.tokens_BKN) == toy.C).sum(axis=2)
  assert counts_BK.any()
  np.testing.assert_allclose(particles.log_weights_BK, counts_BK, atol=1e-5)
  with pytest.raises(ValueError, match="needs 'hidden:last'"):
    particle_filter(toy.TOY, *request, **settings)


def test_rejection_with_a_host_potential():
  def starts_with_a(tokens_RN, lengths_R, prompts_R):
    assert (lengths_R > 0).all() and set(prompts_R) <= set(range(4))
    return np.where((tokens_RN[:, 0] == toy.A) & (prompts_R == 0), 0.0, -np.inf)

  request = (toy.TOY, jnp.full((4, 1), toy.BOS), None, KEY)
  settings = dict(
    potential=toy_potential(), num_samples=3, drafts_per_round=4, max_attempts=46, **TOY_SETTINGS
  )
  accepted = rejection_sample(*request, log_potential=starts_with_a, **settings)
  assert accepted.found_B.tolist() == [3, 0, 0, 0] and accepted.attempts_B.tolist() == [46] * 4
  assert (accepted.tokens_BGN[0, :, 0] == toy.A).all() and (accepted.lengths_BG[1:] == 0).all()
  assert 0 < accepted.acceptance_rates_B[0] < 1 and accepted.acceptance_rates_B[1] == 0
  log_probs = [
    toy.probability(text[:size]) for text, size in zip(accepted.tokens_BGN[0], accepted.lengths_BG[0])
  ]
  np.testing.assert_allclose(np.exp(accepted.log_probs_BG[0]), log_probs, rtol=1e-5)
  with pytest.raises(ValueError, match="log_bound=0.0: a text has log-weight 1"):
    rejection_sample(*request, log_potential=lambda tokens, *_: np.ones(len(tokens)), **settings)
  with pytest.raises(ValueError, match="NaN in"):
    rejection_sample(*request, log_potential=lambda tokens, *_: np.full(len(tokens), np.nan), **settings)
  with pytest.raises(ValueError, match="max_attempts=2"):
    rejection_sample(*request, **{**settings, "max_attempts": 2})


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(scheme="sistematic"), "did you mean 'systematic'"),
    (dict(proposal="local"), "proposal='local' is unknown"),
    (dict(threshold=1.5), r"threshold=1.5: give a number in \[0, 1\]"),
    (dict(threshold=jnp.zeros(2)), "one a prompt"),
    (dict(size=0), "num_particles=0"),
    (dict(potential=TokenCount(jnp.zeros(3), [1])), "has 3 values for 4 prompts"),
    (dict(proposal=Temperature(jnp.full(3, 2.0))), "has 3 values for 4 prompts"),
  ],
)
def test_mistakes_are_told_before_device_time(changes, message):
  with pytest.raises(ValueError, match=message):
    toy_particles(**{"potential": product(), **changes})


def test_a_transform_is_no_potential():
  with pytest.raises(TypeError, match="wrap a transform in HardConstraint"):
    toy_particles(NoRepeatNgram(2))
  with pytest.raises(ValueError, match="num_branches=0"):
    steer(
      toy.TOY, toy.PROMPT, None, KEY, potential=product(), num_particles=2, num_branches=0, **TOY_SETTINGS
    )
