"""Latent preference optimisation: the numbers and laws of its specification, T1 to T6, T8, T9, F1 to F5.

T7 is in test_adaptive_decoding_tables.py, T10 in tests/generation/test_picked_settings.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.models import parameters
from nr.models.adaptive_decoder import AdaptiveDecoder, AdaptiveDecoderSpec, mixture, select
from nr.objectives.latent_preference import (
  LatentPreferenceSpec,
  LatentScores,
  lpo_loss,
  sequence_scores,
  tempered_from_logits,
  tempered_log_probs,
  token_scores,
)
from nr.objectives.weighted import LossOutput, Weighted
from nr.training.checkpoints import tree_hash
from nr.training.defaults import get_training_config
from nr.training.loop import train
from nr.training.method import Method
from tests.generation.toy import tiny_network

LN_2 = float(np.log(2))
SIX = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def separate(scores_K, chosen, rejected, beta=0.1):
  """Eq. 10 for one choice a response, of raw scores."""
  log_pi_1K = jax.nn.log_softmax(scores_K)[None]
  spec = LatentPreferenceSpec(beta=beta)
  sides = [sequence_scores(spec, log_pi_1K, jnp.asarray([k])) for k in (chosen, rejected)]
  return lpo_loss(spec, *sides)[0][0]


def test_t1_mixture():
  temperatures, pi = jnp.asarray([0.5, 1.0]), jnp.asarray([[0.25, 0.75]])
  log_laws_K1V = jnp.stack([jax.nn.log_softmax(jnp.asarray([[2.0, 0.0]]) / tau) for tau in temperatures])
  np.testing.assert_allclose(np.exp(log_laws_K1V[:, 0, 0]), [0.982014, 0.880797], atol=1e-6)
  law = jnp.exp(mixture(jnp.log(pi), log_laws_K1V))[0]
  assert float(law[0]) == pytest.approx(0.906101, abs=1e-6)
  assert float(law.sum()) == pytest.approx(1.0, abs=1e-6)
  # Eq. 5: draw a temperature, then a word.
  count = 100_000
  key_k, key_v = jax.random.split(jax.random.key(0))
  drawn = select(jnp.broadcast_to(jnp.log(pi), (count, 2)), key_k, selection="sample")
  words = jax.random.categorical(key_v, log_laws_K1V[drawn, 0])
  share = float((words == 0).mean())
  assert abs(share - 0.906101) < 4 * np.sqrt(0.906101 * 0.093899 / count)


def test_t2_loss_and_gradient_at_the_start():
  loss, gradient_K = jax.value_and_grad(separate)(jnp.zeros(6), 4, 1)
  assert float(loss) == pytest.approx(0.693147, abs=1e-6)
  np.testing.assert_allclose(gradient_K, [0, 0.05, 0, 0, -0.05, 0], atol=1e-8)
  assert float(jnp.abs(gradient_K[jnp.asarray([0, 2, 3, 5])]).max()) < 1e-9


def test_f1_and_f2_the_loss_is_bradley_terry_on_the_scores():
  scores_K, beta = jnp.asarray([0.3, -1.0, 2.0, 0.1]), 0.7
  loss, gradient_K = jax.value_and_grad(separate)(scores_K, 2, 0, beta)
  gap = beta * (2.0 - 0.3)
  assert float(loss) == pytest.approx(np.log1p(np.exp(-gap)), rel=1e-6)
  pull = beta / (1 + np.exp(gap))
  np.testing.assert_allclose(gradient_K, [pull, 0, -pull, 0], atol=1e-7)


@pytest.mark.parametrize("level", ("sequence", "token"))
def test_t3_a_constant_of_the_scores_changes_nothing(level):
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (2, 4) if level == "sequence" else (2, 5, 4)
  scores = jax.random.normal(keys[0], shape)
  choices = jax.random.randint(keys[1], shape[:-1], 0, 4)
  weights_RL = jnp.asarray([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], jnp.float32)
  spec = LatentPreferenceSpec(level=level)

  def loss(scores):
    log_pi = jax.nn.log_softmax(scores)
    if level == "sequence":
      sides = sequence_scores(spec, log_pi, choices)
    else:
      sides = token_scores(spec, log_pi, choices, weights_RL)
    chosen, rejected = (jax.tree.map(lambda x, k=k: x[k], sides) for k in (0, 1))
    return lpo_loss(spec, chosen, rejected)[0]

  # In a sequence one constant a prompt, in a token form one a position.
  moved = scores + jax.random.normal(keys[2], (*shape[:-1], 1))
  first, second = (jax.value_and_grad(loss)(value) for value in (scores, moved))
  np.testing.assert_allclose(first[0], second[0], rtol=1e-6)
  np.testing.assert_allclose(first[1], second[1], atol=1e-7)
  np.testing.assert_allclose(first[1].sum(-1), 0.0, atol=1e-7)
  assert float(jnp.abs(first[1]).max()) > 1e-3


def marginals(form, text):
  """The marginal of F4's example: temperatures {0, 1} equally likely, p(a) = 0.6 at 1."""
  logits_1LV = jnp.broadcast_to(jnp.log(jnp.asarray([0.6, 0.4])), (1, 2, 2))
  words_1LK = tempered_from_logits(logits_1LV, jnp.asarray([text]), jnp.asarray([0.0, 1.0]))
  spec = LatentPreferenceSpec(variant="latent", sequence_marginal=form)
  log_pi_1K = jnp.log(jnp.asarray([[0.5, 0.5]]))
  scores = sequence_scores(spec, log_pi_1K, jnp.asarray([1]), jnp.ones((1, 2)), words_1LK)
  # Uniform choices are the reference, so both marginals agree.
  np.testing.assert_allclose(scores.marginal, scores.reference_marginal, rtol=1e-6)
  return float(jnp.exp(scores.marginal[0]))


def test_t4_the_two_marginals_of_a_sequence():
  assert marginals("exact", [0, 0]) == pytest.approx(0.68, abs=1e-6)
  assert marginals("per_token", [0, 0]) == pytest.approx(0.64, abs=1e-6)
  assert marginals("exact", [1, 1]) == pytest.approx(0.08, abs=1e-6)
  assert marginals("per_token", [1, 1]) == pytest.approx(0.04, abs=1e-6)
  # The exact one is a law over texts.
  texts = [[a, b] for a in (0, 1) for b in (0, 1)]
  assert sum(marginals("exact", text) for text in texts) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("beta", (0.1, 1.0))
def test_t5_bradley_terry_scores_are_recovered(beta):
  true = np.asarray([1.0, 0.6, 0.2, -0.2, -0.6, -1.0])
  random = np.random.default_rng(0)
  pairs = random.integers(0, 6, (200_000, 2))
  wins = random.random(len(pairs)) < 1 / (1 + np.exp(true[pairs[:, 1]] - true[pairs[:, 0]]))
  pairs = np.where(wins[:, None], pairs, pairs[:, ::-1])
  # 36 kinds of pairs, weighted by how often each was drawn, are the same sum as 200,000 terms.
  kinds, counts = np.unique(pairs, axis=0, return_counts=True)
  spec, kinds = LatentPreferenceSpec(beta=beta), jnp.asarray(kinds)

  def loss(scores_K):
    log_pi_RK = jnp.broadcast_to(jax.nn.log_softmax(scores_K), (len(kinds), 6))
    sides = [sequence_scores(spec, log_pi_RK, kinds[:, k]) for k in (0, 1)]
    return (lpo_loss(spec, *sides)[0] * counts).sum() / counts.sum()

  def step(scores_K, _):
    return scores_K - 4.0 / beta**2 * jax.grad(loss)(scores_K), None

  scores_K, _ = jax.lax.scan(step, jnp.zeros(6), None, length=500)
  assert float(jnp.abs(jax.grad(loss)(scores_K)).max()) < 1e-5 * beta
  learned = beta * (scores_K - scores_K.mean())
  np.testing.assert_allclose(learned, true, atol=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_t6_nll_falls_for_variance_and_the_preference_loss_does_not(seed):
  random, taus = np.random.default_rng(seed), np.asarray(SIX)
  drawn = random.integers(0, 6, (4000, 16))
  rewards = random.normal(-0.3 * taus[drawn], (0.2 + taus[drawn]))
  rows = np.arange(4000)
  chosen, rejected = drawn[rows, rewards.argmax(1)], drawn[rows, rewards.argmin(1)]
  frequent = [np.bincount(side, minlength=6) / 4000 for side in (chosen, rejected)]
  np.testing.assert_allclose(frequent[0], [0.013, 0.064, 0.122, 0.204, 0.269, 0.328], atol=0.03)
  np.testing.assert_allclose(frequent[1], [0.002, 0.022, 0.086, 0.166, 0.308, 0.416], atol=0.03)
  picked = {}
  for variant in ("nll", "separate"):
    spec = LatentPreferenceSpec(variant=variant, beta=1.0)

    def loss(scores_K, spec=spec):
      log_pi_RK = jnp.broadcast_to(jax.nn.log_softmax(scores_K), (4000, 6))
      sides = [sequence_scores(spec, log_pi_RK, jnp.asarray(side)) for side in (chosen, rejected)]
      return lpo_loss(spec, *sides)[0].mean()

    def step(scores_K, _, loss=loss):
      return scores_K - 2.0 * jax.grad(loss)(scores_K), None

    scores_K = jax.lax.scan(step, jnp.zeros(6), None, length=300)[0]
    picked[variant] = SIX[int(select(scores_K))]
  assert picked == {"nll": 1.0, "separate": 0.0}


def test_f3_the_marginal_moves_towards_the_temperatures_that_explain_the_text():
  logits_1LV = jax.random.normal(jax.random.key(0), (1, 3, 5)) * 2
  targets = jnp.asarray([[0, 3, 2]])
  words_1LK = tempered_from_logits(logits_1LV, targets, jnp.asarray([0.3, 0.7, 1.5]))
  spec = LatentPreferenceSpec(variant="latent", level="token")

  def log_marginal(scores_1LK):
    log_pi = jax.nn.log_softmax(scores_1LK)
    return token_scores(spec, log_pi, jnp.zeros((1, 3), int), jnp.ones((1, 3)), words_1LK).marginal[0]

  scores_1LK = jax.random.normal(jax.random.key(1), (1, 3, 3))
  pi_1LK = jax.nn.softmax(scores_1LK)
  posterior_1LK = pi_1LK * jnp.exp(words_1LK)
  posterior_1LK = posterior_1LK / posterior_1LK.sum(-1, keepdims=True)
  np.testing.assert_allclose(jax.grad(log_marginal)(scores_1LK), posterior_1LK - pi_1LK, atol=1e-6)


def test_f5_every_token_of_the_chosen_response_pushes_its_own_temperature_up():
  scores = jnp.zeros((2, 4, 3))
  choices = jnp.asarray([[0, 2, 2, 1], [1, 1, 0, 2]])
  weights_RL = jnp.asarray([[0, 1, 1, 0], [0, 1, 1, 1]], jnp.float32)
  spec = LatentPreferenceSpec(level="token")

  def loss(scores):
    sides = token_scores(spec, jax.nn.log_softmax(scores), choices, weights_RL)
    return lpo_loss(spec, *(jax.tree.map(lambda x, k=k: x[k], sides) for k in (0, 1)))[0]

  pull = -jax.grad(loss)(scores)
  is_own = jax.nn.one_hot(choices, 3) * weights_RL[..., None]
  sign = jnp.asarray([1.0, -1.0])[:, None, None]
  expected = sign * (is_own - weights_RL[..., None] / 3) * 0.1 / (1 + np.exp(-0.1 * _surplus()))
  np.testing.assert_allclose(pull, expected, atol=1e-7)


def _surplus():
  """By how much log P of the rejected choices exceeds that of the chosen, all uniform: 2 against 3 of them."""
  return -3 * np.log(3) + 2 * np.log(3)


def network_words(params, network, tokens_RL, temperatures):
  model = parameters.merge(network.graphdef, params)
  hidden_RLD = model.hidden(tokens_RL)
  targets_RL = jnp.roll(tokens_RL, -1, axis=1)
  return hidden_RLD, tempered_log_probs(hidden_RLD, model.unembedding_VD, targets_RL, temperatures)


def test_t8_the_language_model_gets_no_gradient_and_does_not_change(tmp_path):
  network = tiny_network(tied_head=False)
  spec = AdaptiveDecoderSpec(16, 4, hidden_dim=8)
  graphdef, start = parameters.split(AdaptiveDecoder(spec, rngs=nnx.Rngs(0)))
  # Off its zero start, so that a gradient could leave through h if nothing stopped it.
  start = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), start)
  tokens_RL = jax.random.randint(jax.random.key(0), (8, 6), 0, 32)
  choices_RL = jax.random.randint(jax.random.key(2), (8, 6), 0, 4)
  lpo = LatentPreferenceSpec(level="token")

  def loss(head, frozen, extra, batch, key):
    del extra, key
    hidden_RLD, _ = network_words(frozen, network, batch["tokens"], jnp.asarray([0.0, 0.5, 1.0, 2.0]))
    log_pi_RLK = parameters.merge(graphdef, head)(hidden_RLD)
    sides = token_scores(lpo, log_pi_RLK, batch["choices"], jnp.ones(batch["tokens"].shape))
    chosen, rejected = (jax.tree.map(lambda x, k=k: x[k::2], sides) for k in (0, 1))
    losses, _ = lpo_loss(lpo, chosen, rejected)
    return LossOutput(Weighted.of(losses, jnp.ones_like(losses)), {})

  batch = {"tokens": np.asarray(tokens_RL), "choices": np.asarray(choices_RL)}
  gradients = jax.grad(lambda *both: loss(*both, (), batch, None).loss.total, argnums=(0, 1))(
    start, network.params
  )
  assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[0])) > 1e-4
  jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), gradients[1])
  axes = parameters.logical_axes(lambda: AdaptiveDecoder(spec, rngs=nnx.Rngs(0)))
  method = Method("lpo", lambda key: start, loss, axes, frozen=network.params)
  before = tree_hash(network.params)
  config = get_training_config()
  config.update(dict(steps=3, batch_size=8, progress=False))
  result = train(config, method, [batch] * 3, workdir=tmp_path)
  assert tree_hash(network.params) == before
  assert tree_hash(result.state.params) != tree_hash(start)


@pytest.mark.parametrize("level", ("sequence", "token"))
def test_t9_joint_is_separate_when_the_language_model_is_frozen(level):
  network, temperatures = tiny_network(), jnp.asarray(SIX)
  tokens_RL = jax.random.randint(jax.random.key(0), (2, 6), 0, 32)
  _, words_RLK = network_words(network.params, network, tokens_RL, temperatures)
  weights_RL = jnp.asarray([[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]], jnp.float32)
  key_s, key_c = jax.random.split(jax.random.key(1))
  shape = (2,) if level == "sequence" else (2, 6)
  log_pi = jax.nn.log_softmax(jax.random.normal(key_s, (*shape, 6)))
  # Greedy choices included: their words have probability 0 or 1.
  choices = jax.random.randint(key_c, shape, 0, 6).at[0].set(0)
  losses = {}
  for variant in ("joint", "separate"):
    spec = LatentPreferenceSpec(variant=variant, level=level)
    if level == "sequence":
      sides = sequence_scores(spec, log_pi, choices, weights_RL, words_RLK)
    else:
      sides = token_scores(spec, log_pi, choices, weights_RL, words_RLK)
    chosen, rejected = (jax.tree.map(lambda x, k=k: x[k], sides) for k in (0, 1))
    losses[variant] = float(lpo_loss(spec, chosen, rejected)[0])
  assert losses["joint"] == pytest.approx(losses["separate"], abs=1e-6)
  # With words that were trained it is not.
  moved = sides._replace(policy=sides.policy + jnp.asarray([1.0, -1.0]))
  chosen, rejected = (jax.tree.map(lambda x, k=k: x[k], moved) for k in (0, 1))
  spec = LatentPreferenceSpec(variant="joint", level=level)
  assert abs(float(lpo_loss(spec, chosen, rejected)[0]) - losses["separate"]) > 0.05


# What is not numbered there.


@pytest.mark.parametrize("chunk_size", (None, 1, 5, 8))
def test_tempered_log_probabilities_are_those_of_the_tempered_softmax(chunk_size):
  keys = jax.random.split(jax.random.key(0), 3)
  hidden_RLD, head_VD = jax.random.normal(keys[0], (2, 7, 4)), jax.random.normal(keys[1], (9, 4))
  targets_RL = jax.random.randint(keys[2], (2, 7), 0, 9)
  z = np.asarray(hidden_RLD, np.float64) @ np.asarray(head_VD, np.float64).T
  targets_RL = targets_RL.at[0, 0].set(int(z[0, 0].argmax()))
  found = tempered_log_probs(
    hidden_RLD, head_VD, targets_RL, jnp.asarray([0.0, 0.5, 2.0]), chunk_size=chunk_size
  )
  for k, tau in enumerate((0.5, 2.0), start=1):
    expected = z / tau - np.log(np.exp(z / tau).sum(-1, keepdims=True))
    expected = np.take_along_axis(expected, np.asarray(targets_RL)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found[..., k], expected, atol=1e-5)
  is_top = z.argmax(-1) == np.asarray(targets_RL)
  np.testing.assert_array_equal(found[..., 0], np.where(is_top, 0.0, -np.inf))
  assert is_top.any() and not is_top.all()


def test_ties_at_temperature_0_break_to_the_lowest_id():
  words = tempered_from_logits(jnp.asarray([[1.0, 3.0, 3.0]] * 2), jnp.asarray([1, 2]), jnp.asarray([0.0]))
  np.testing.assert_array_equal(words[:, 0], [0.0, -np.inf])


def test_no_array_of_tokens_by_temperatures_by_vocabulary_exists():
  def total(hidden_RLD, head_VD):
    targets_RL = jnp.zeros((2, 7), jnp.int32)
    return tempered_log_probs(
      hidden_RLD, head_VD, targets_RL, jnp.asarray([0.3, 0.7, 1.0]), chunk_size=4
    ).sum()

  text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(jnp.ones((2, 7, 4)), jnp.ones((11, 4))))
  assert "2,7,11]" not in text and "3,2,2,11]" not in text and "2,2,11]" in text


def test_greedy_words_leave_the_latent_loss_finite():
  temperatures = jnp.asarray(SIX)
  logits_RLV = jax.random.normal(jax.random.key(0), (4, 5, 8)) * 3
  targets_RL = jax.random.randint(jax.random.key(1), (4, 5), 0, 8)
  words_RLK = tempered_from_logits(logits_RLV, targets_RL, temperatures)
  assert bool((words_RLK == -jnp.inf).any())
  for level, form in (("sequence", "exact"), ("sequence", "per_token"), ("token", "per_token")):
    spec = LatentPreferenceSpec("latent", level, sequence_marginal=form)

    def loss(scores, spec=spec, level=level):
      make = sequence_scores if level == "sequence" else token_scores
      choices = jnp.zeros(scores.shape[:-1], jnp.int32)
      sides = make(spec, jax.nn.log_softmax(scores), choices, jnp.ones((4, 5)), words_RLK)
      chosen, rejected = (jax.tree.map(lambda x, k=k: x[k::2], sides) for k in (0, 1))
      return lpo_loss(spec, chosen, rejected)[0].sum()

    shape = (4, 6) if level == "sequence" else (4, 5, 6)
    value, slope = jax.value_and_grad(loss)(jnp.zeros(shape))
    assert float(value) == pytest.approx(2 * LN_2, rel=1e-5)  # Uniform = reference.
    assert bool(jnp.isfinite(slope).all()) and float(jnp.abs(slope).max()) > 0


def test_only_response_tokens_count():
  scores = jax.random.normal(jax.random.key(0), (1, 5, 3))
  weights_RL = jnp.asarray([[0, 1, 1, 0, 0]], jnp.float32)
  spec = LatentPreferenceSpec(level="token")
  words = jnp.full((1, 5, 3), jnp.nan).at[:, 1:3].set(-1.0)
  found = token_scores(spec, jax.nn.log_softmax(scores), jnp.asarray([[9, 1, 2, 9, -4]]), weights_RL, words)
  log_pi = jax.nn.log_softmax(scores)
  assert float(found.choices[0]) == pytest.approx(float(log_pi[0, 1, 1] + log_pi[0, 2, 2]), rel=1e-6)
  assert float(found.policy[0]) == -2.0 and float(found.count[0]) == 2.0
  assert float(found.marginal[0]) == pytest.approx(-2.0, rel=1e-6)


def test_length_normalisation_divides_by_the_number_of_choices():
  chosen = LatentScores(jnp.asarray(-6.0), jnp.asarray(3.0))
  rejected = LatentScores(jnp.asarray(-20.0), jnp.asarray(10.0))
  plain = LatentPreferenceSpec(level="token")
  even = LatentPreferenceSpec(level="token", is_length_normalised=True)
  assert float(lpo_loss(even, chosen, rejected)[0]) == pytest.approx(LN_2, abs=1e-6)
  assert float(lpo_loss(plain, chosen, rejected)[0]) == pytest.approx(np.log1p(np.exp(-1.4)), rel=1e-5)


def test_what_cannot_be_trained_is_refused():
  with pytest.raises(ValueError, match="greedy law gives most texts"):
    LatentPreferenceSpec(variant="latent").check_temperatures((0.0,))
  LatentPreferenceSpec(variant="latent").check_temperatures((0.0, 0.5))
  with pytest.raises(ValueError, match="0 or more"):
    LatentPreferenceSpec().check_temperatures((-0.1, 1.0))
  with pytest.raises(ValueError, match="did you mean 'latent'"):
    LatentPreferenceSpec(variant="latnet")
  with pytest.raises(ValueError, match="LatentScores.marginal is missing"):
    side = LatentScores(jnp.zeros(1), jnp.ones(1))
    lpo_loss(LatentPreferenceSpec(variant="latent"), side, side)
