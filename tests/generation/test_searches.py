"""Stochastic beams, arithmetic samples and best-first search: chains, invariance, ends, errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.arithmetic_sampling import _refreshed, arithmetic_sample, bucket
from nr.generation.beams.best_first import best_first_search
from nr.generation.beams.stochastic_beam_search import conditional_perturbations, stochastic_beam_search
from nr.generation.decoding import pad_prompts
from nr.generation.markov import Markov
from nr.generation.stopping import Stop
from nr.generation.streams import Stream, WithStreams
from nr.generation.transforms import MirostatV2
from nr.generation.transforms.algebra import chain
from tests.generation import toy
from tests.generation.searching import END, MAX_NEW, PROMPTS, STRENGTH, WIDTH, Tally, assert_told_alike

MARKOV = Markov(2 * jax.random.normal(jax.random.key(8), (12, 12)))
DRIVERS = [stochastic_beam_search, arithmetic_sample]
KEY = jax.random.key(3)


def run(driver, model, prompts=PROMPTS, strength=STRENGTH, **settings):
  settings = {
    **dict(
      key=KEY, num_samples=WIDTH, max_new_tokens=MAX_NEW, stop=Stop(ids_E=[END]), row_ids_B=jnp.arange(3)
    ),
    **settings,
  }
  return driver(model, *pad_prompts(prompts), chain=chain(Tally(strength)), **settings)


def test_stochastic_beams_tell_of_their_texts_what_replaying_them_does():
  network = toy.tiny_network()
  beams = run(stochastic_beam_search, network)
  sums = (beams.log_probs_BK, beams.transformed_log_probs_BK)
  assert_told_alike(network, beams.tokens_BKN, beams.lengths_BK, beams.finish_BK, *sums)
  assert (np.diff(beams.perturbed_BK, axis=1) < 0).all()
  assert (beams.perturbed_BK > beams.threshold_B[:, None]).all()


def test_arithmetic_samples_tell_of_their_texts_what_replaying_them_does():
  network = toy.tiny_network()
  drawn = run(arithmetic_sample, network, is_permuted=True)
  per_row = (
    drawn.lengths_R,
    drawn.finish_R,
    drawn.log_probs_RN.sum(1),
    drawn.transformed_log_probs_RN.sum(1),
  )
  told = [leaf.reshape(-1, WIDTH) for leaf in per_row]
  assert_told_alike(network, drawn.tokens_RN.reshape(-1, WIDTH, MAX_NEW), *told)


@pytest.mark.parametrize("driver", DRIVERS)
def test_draws_belong_to_the_key_and_the_row(driver):
  network, order = toy.tiny_network(), np.array([2, 0, 1])
  settings = dict(is_permuted=True) if driver is arithmetic_sample else {}
  drawn = run(driver, network, **settings)
  permuted = run(
    driver, network, [PROMPTS[i] for i in order], STRENGTH[order], row_ids_B=jnp.array(order), **settings
  )
  np.testing.assert_array_equal(permuted[0].reshape(3, -1), drawn[0].reshape(3, -1)[order])
  other = run(driver, network, key=jax.random.key(4), **settings)
  assert (other[0] != drawn[0]).any()
  ended = run(driver, network, stop=Stop(ids_E=[END], limits_B=[MAX_NEW, 2, 0]), **settings)
  lengths = np.asarray(ended[1]).reshape(3, WIDTH)
  assert lengths[0].max() > 2 and lengths[1].max() == 2 and (lengths[2] == 0).all()


def test_conditional_perturbations_have_the_given_maximum_and_law():
  log_probs = jnp.log(jnp.array([0.5, 0.3, 0.2, 0.0]))
  noise = jax.random.gumbel(jax.random.key(0), (20_000, 4))
  largest = jnp.full(20_000, 1.3)
  shifted = jax.jit(conditional_perturbations)(largest, log_probs + noise)
  np.testing.assert_allclose(shifted.max(axis=1), 1.3, atol=1e-6)
  assert (shifted[:, 3] == -np.inf).all() and not np.isnan(shifted).any()
  # Below the maximum each is a Gumbel variable cut at 1.3: P(g < t) / P(g < 1.3).
  below = np.asarray(shifted[:, 1])[np.asarray(shifted.argmax(axis=1)) != 1]
  for at in (-2.0, -1.0, 0.0, 1.0):
    expected = np.exp(-0.3 * np.exp(-at)) / np.exp(-0.3 * np.exp(-1.3))
    assert abs((below < at).mean() - expected) < 5 * 0.5 / np.sqrt(len(below))
  # The most probable one is at the top, as often as its probability says.
  assert abs((shifted.argmax(axis=1) == 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(20_000)
  # Float32 keeps gaps that a direct formula loses, and rows that do not exist.
  extreme = conditional_perturbations(jnp.array([-90.0, -jnp.inf]), jnp.array([[-100.0, -200.0]] * 2))
  np.testing.assert_allclose(extreme[0], [-90.0, -200.0], atol=1e-3)
  assert (extreme[1] == -np.inf).all()


def test_buckets_leave_out_what_is_banned_and_never_overflow():
  log_probs = jnp.log(jnp.array([[0.0, 0.25, 0.75, 0.0]]))
  codes = jnp.array([0.0, 0.2499, 0.25, 1 - 2.0**-24])
  tokens, places, widths = bucket(jnp.repeat(log_probs, 4, axis=0), codes)
  np.testing.assert_array_equal(tokens, [1, 1, 2, 2])
  np.testing.assert_allclose(places, [0.0, 0.9996, 0.0, 1.0], atol=1e-6)
  np.testing.assert_allclose(widths, [0.25, 0.25, 0.75, 0.75], rtol=1e-6)
  assert float(places.max()) < 1


def test_worn_out_codes_are_renewed_and_long_texts_keep_the_law():
  codes, widths = _refreshed(jnp.array([0.5, 0.5]), jnp.array([2.0**-21, 2.0**-19]), jax.random.split(KEY, 2))
  assert 0.5 <= float(codes[0]) < 0.5 + 1 / 8 and float(codes[1]) == 0.5
  np.testing.assert_array_equal(widths, [1.0, 2.0**-19])
  count, length = 2_000, 40
  drawn = arithmetic_sample(MARKOV, jnp.ones((count, 1)), key=KEY, num_samples=3, max_new_tokens=length)
  late = np.asarray(drawn.tokens_RN)[:, 25:]
  pairs = np.zeros((12, 12))
  np.add.at(pairs, (late[:, :-1].ravel(), late[:, 1:].ravel()), 1)
  totals = pairs.sum(axis=1, keepdims=True)
  law = np.asarray(jax.nn.softmax(MARKOV.logits_CV))
  assert (np.abs(pairs / totals - law) < 5 * np.sqrt(law * (1 - law) / totals) + 1e-4).all()


def test_best_first_search_with_a_chain_lists_texts_in_order():
  strength, length = 1.5, 3
  logits = np.asarray(MARKOV.logits_CV, np.float64)

  def log_prob(text):
    total, counts, last = 0.0, np.zeros(12), 1
    for token in text:
      row = logits[last] - strength * counts
      total += row[token] - np.log(np.exp(row).sum())
      counts[token] += 1
      last = token
    return total

  found = best_first_search(MARKOV, [1], chain=chain(Tally(strength)), max_new_tokens=length, num_return=20)
  expected = sorted(itertools.product(range(12), repeat=length), key=log_prob, reverse=True)[:20]
  assert [text.tokens for text in found.texts] == expected
  np.testing.assert_allclose(
    [text.log_prob for text in found.texts], [log_prob(text) for text in expected], atol=1e-5
  )
  assert all(text.finish == "length" for text in found.texts)
  assert not found.is_exhausted and found.scored < found.pops


def test_a_budget_of_pops_ends_a_search_and_a_limit_of_none_is_the_empty_text():
  found = best_first_search(MARKOV, [1], max_new_tokens=3, max_pops=5)
  assert (found.texts, found.pops, found.is_exhausted) == ([], 5, False)
  empty = best_first_search(MARKOV, [1], max_new_tokens=3, stop=Stop(limits_B=[0]))
  assert (empty.texts[0].tokens, empty.texts[0].finish, empty.calls) == ((), "length", 0)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(key=None), "give a random key"),
    (dict(num_samples=0), "num_samples=0"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(stop=Stop(ids_E=[12])), "stop ids"),
    (dict(strength=jnp.zeros(2)), "2 values for 3 prompts"),
    (dict(row_ids_B=jnp.arange(2)), "row_ids_B has shape"),
  ],
)
def test_mistakes_are_answered(driver, settings, message):
  with pytest.raises(ValueError, match=message):
    run(driver, MARKOV, [[1], [2], [3]], **settings)


@pytest.mark.parametrize("offsets, message", [(1.0, r"numbers in \[0, 1\)"), ([0.1, 0.2], r"shape \(2,\)")])
def test_mistaken_offsets_are_answered(offsets, message):
  with pytest.raises(ValueError, match=message):
    run(arithmetic_sample, MARKOV, [[1], [2], [3]], offsets_B=offsets)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(cost="lewin"), "did you mean 'levin'"),
    (dict(batch=0), "batch=0: give at least 1"),
    (dict(beam_width=0), "beam_width=0: give at least 1"),
    (dict(prompt=[]), "prompts\\[0\\] is empty"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(chain=chain(Tally(jnp.zeros(1)))), "give scalar parameters"),
    (dict(stop=Stop(loop_period=2)), "loop_period=2"),
    (dict(model=WithStreams(MARKOV, {"other": Stream(MARKOV, jnp.ones((1, 1), int))})), "stream 'other'"),
  ],
)
def test_mistakes_in_best_first_search_are_answered(settings, message):
  settings = {**dict(model=MARKOV, prompt=[1], max_new_tokens=3), **settings}
  with pytest.raises(ValueError, match=message):
    best_first_search(settings.pop("model"), settings.pop("prompt"), **settings)


def test_best_first_search_refuses_what_remembers_probabilities():
  with pytest.raises(ValueError, match="mirostat_v2.. remembers probabilities of the past"):
    best_first_search(toy.TOY, [toy.BOS], chain=MirostatV2(), max_new_tokens=3)
