"""T7: the optimum at every position is known, and the losses find it from one offline round of pairs.

Sixteen positions, twelve words. At every fourth position one word is right, with probability 0.6 at
temperature 1; elsewhere p(v) is proportional to 1 / rank. Reward: the share of right words, and on ties
how many of the free words are distinct. Greedy is best where a word must be right, temperature 1 elsewhere.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nr.evaluation.winrates import wins
from nr.objectives.latent_preference import LatentPreferenceSpec, lpo_loss, tempered_from_logits, token_scores
from nr.recipes.adaptive_decoding.pair_rules import Scores, correctness, make_pair, ngram_repeats

T, V, PROMPTS, N = 16, 12, 1000, 16
TAUS = np.asarray([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
IS_BOUND_T = np.arange(T) % 4 == 0
TABLE_TV = np.where(
  IS_BOUND_T[:, None],
  np.where(np.arange(V) == 0, 0.6, 0.4 / (V - 1)),
  1 / np.arange(1, V + 1) / (1 / np.arange(1, V + 1)).sum(),
)
LOGITS_TV = jnp.log(jnp.asarray(TABLE_TV, jnp.float32))
EVERY_TV = jnp.broadcast_to(LOGITS_TV[:, None], (T, V, V))
# log p(v | position, temperature) of every word: [T, V, K].
WORDS_TVK = tempered_from_logits(EVERY_TV, jnp.broadcast_to(jnp.arange(V), (T, V)), jnp.asarray(TAUS))
LAWS_TVK = np.exp(np.asarray(WORDS_TVK, np.float64))


def write(choices_RT, random):
  """Draws texts with the given temperatures."""
  cumulative_RTV = LAWS_TVK[np.arange(T), :, choices_RT].cumsum(-1)
  return (cumulative_RTV < random.random(choices_RT.shape)[..., None]).sum(-1).clip(0, V - 1)


def scores_of(texts_RT):
  right_R = (texts_RT[:, IS_BOUND_T] == 0).mean(1)
  distinct_R = (
    np.asarray([len(set(text)) for text in texts_RT[:, ~IS_BOUND_T].tolist()]) / (~IS_BOUND_T).sum()
  )
  return right_R, distinct_R


@functools.cache
def pairs(seed):
  """One round from a uniform head: choices and texts [pairs, 2, T]."""
  random = np.random.default_rng(seed)
  choices_RT = random.integers(0, len(TAUS), (PROMPTS * N, T))
  texts_RT = write(choices_RT, random)
  right_R, distinct_R = scores_of(texts_RT)
  found = []
  for start in range(0, PROMPTS * N, N):
    rows = slice(start, start + N)
    pair = make_pair("constraint", Scores(right_R[rows], distinct_R[rows]), random, 4)
    found += [] if pair is None else [(start + pair[0], start + pair[1])]
  found = np.asarray(found)
  assert len(found) > 0.95 * PROMPTS
  return choices_RT[found], texts_RT[found]


@functools.cache
def learned(variant, seed):
  """Log pi [T, K] of a head that is a table, after 600 steps on all pairs."""
  choices_P2T, texts_P2T = pairs(seed)
  spec = LatentPreferenceSpec(variant=variant, level="token")
  words_P2TK = WORDS_TVK[np.arange(T), texts_P2T]
  ones_PT = jnp.ones((len(choices_P2T), T))

  def loss(scores_TK):
    log_pi = jnp.broadcast_to(jax.nn.log_softmax(scores_TK), (len(choices_P2T), T, len(TAUS)))
    sides = [token_scores(spec, log_pi, choices_P2T[:, k], ones_PT, words_P2TK[:, k]) for k in (0, 1)]
    return lpo_loss(spec, *sides)[0].mean()

  optimizer = optax.adam(0.05)

  def step(carry, _):
    scores_TK, state = carry
    updates, state = optimizer.update(jax.grad(loss)(scores_TK), state)
    return (optax.apply_updates(scores_TK, updates), state), None

  start = jnp.zeros((T, len(TAUS)))
  (scores_TK, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=600))(
    (start, optimizer.init(start))
  )
  return np.asarray(jax.nn.log_softmax(scores_TK))


def mean_temperatures(log_pi_TK):
  """Mean temperature where a word must be right, and where it is free."""
  mean_T = np.exp(log_pi_TK) @ TAUS
  return mean_T[IS_BOUND_T].mean(), mean_T[~IS_BOUND_T].mean()


@pytest.mark.parametrize("seed", range(3))
def test_t7_the_best_temperature_of_every_position_is_found(seed):
  bound, free = mean_temperatures(learned("separate", seed))
  assert bound < 0.35 and free > 0.8
  extreme_bound, extreme_free = mean_temperatures(learned("latent", seed))
  assert extreme_bound <= bound and extreme_free >= free
  assert extreme_bound < 0.02 and extreme_free > 0.98
  weak_bound, weak_free = mean_temperatures(learned("nll", seed))
  assert 0.4 < weak_bound < 0.5 and 0.5 < weak_free < 0.62


@pytest.mark.parametrize("seed", range(3))
def test_t7_greedy_selection_beats_every_fixed_temperature(seed):
  random, count = np.random.default_rng(100 + seed), 1000
  picked_T = learned("separate", seed).argmax(-1)
  ours = np.stack(scores_of(write(np.broadcast_to(picked_T, (count, T)), random)), -1)[:, None]
  rates = []
  for k in range(len(TAUS)):
    theirs = np.stack(scores_of(write(np.full((count, T), k), random)), -1)[:, None]
    rates.append(wins(ours, theirs).mean())
  assert min(rates) > 0.8, rates


# The rules themselves.


def draws(rule, reward, quality=None, top=4, count=600):
  random = np.random.default_rng(0)
  reward = np.asarray(reward, float)
  scores = Scores(reward, reward if quality is None else np.asarray(quality, float))
  return [make_pair(rule, scores, random, top) for _ in range(count)]


def test_extremes_breaks_ties_at_random_and_leaves_out_equal_scores():
  found = draws("extremes", [3, 1, 3, 2, 1])
  assert {pair[0] for pair in found} == {0, 2} and {pair[1] for pair in found} == {1, 4}
  assert 240 < sum(pair == (0, 1) for pair in found) * 2 < 360
  assert set(draws("extremes", [2, 2, 2])) == {None}


def test_correctness_pairs_a_right_answer_with_a_wrong_one():
  found = draws("correctness", [0, 1, 1, 0])
  assert {pair[0] for pair in found} == {1, 2} and {pair[1] for pair in found} == {0, 3}
  assert set(draws("correctness", [1, 1])) == {None}
  with pytest.raises(ValueError, match=r"reward 0.5 is neither 0 nor 1"):
    correctness(Scores(np.asarray([0.5, 1]), np.zeros(2)), np.random.default_rng(0), 4)


def test_random_pair_is_ordered_and_reaches_all():
  found = [pair for pair in draws("random_pair", [0, 1, 1, 2]) if pair]
  assert all([0, 1, 1, 2][pair[0]] > [0, 1, 1, 2][pair[1]] for pair in found)
  assert set(found) == {(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)}
  assert 0 < draws("random_pair", [0, 1, 1, 2]).count(None) < 200


def test_the_constraint_rule_looks_at_the_best_and_the_worst_in_quality():
  quality = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
  reward = [0, 1, 1, 0, 5, -5, 0, 0, -1, 0]
  found = draws("constraint", reward, quality)
  # Chosen among 0..3 by reward (1 and 2 tie), rejected among 6..9; 4 and 5 are never looked at.
  assert {pair[0] for pair in found} == {1, 2} and {pair[1] for pair in found} == {8}
  assert set(draws("constraint", [1] * 8, [2] * 8)) == {None}
  # Ties of quality at the border of the top are broken at random.
  assert {pair[0] for pair in draws("constraint", [0, 1, 2, 3], [1, 1, 1, 1], top=2)} == {1, 2, 3}


def test_what_makes_no_pair_is_refused():
  for arguments, message in (
    (("extrems", [1, 2]), "did you mean 'extremes'"),
    (("extremes", [1]), "num_samples=1"),
    (("constraint", [1, 2, 3], [1, 2, 3], 2), "pair_top=2"),
  ):
    with pytest.raises(ValueError, match=message):
      draws(*arguments, count=1)


def test_repeats_of_ngrams():
  assert ngram_repeats([1, 2, 3]) == 0 and ngram_repeats([1, 2]) == 0
  assert ngram_repeats([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
