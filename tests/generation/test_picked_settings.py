"""Picked settings: they come back with the tokens, as the head's law says, and the trainer finds the same.

T10 of the specification (sampler and trainer agree) is here for both levels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.generation.adaptive_decoding import (
  ACTIONS,
  AdaptiveNetwork,
  DrawnSetting,
  check_values,
  sample_adaptively,
)
from nr.generation.sample import sample
from nr.generation.stopping import Stop
from nr.generation.transforms import AdaptiveTemperature, Temperature, chain
from nr.models import parameters
from nr.models.adaptive_decoder import AdaptiveDecoder, AdaptiveDecoderSpec
from nr.objectives.latent_preference import LatentPreferenceSpec, sequence_scores, token_scores
from tests.generation.toy import random_prompts, tiny_network

TAUS = (0.0, 0.3, 0.7, 1.0, 1.5)
PROMPTS = jnp.asarray(random_prompts((5,) * 6))


def adaptive(seed=0, **settings):
  """A tiny network with a head off its uniform start."""
  network = tiny_network(seed=seed)
  spec = AdaptiveDecoderSpec(16, len(TAUS), hidden_dim=8)
  graphdef, params = parameters.split(AdaptiveDecoder(spec, rngs=nnx.Rngs(seed)))
  params = jax.tree.map(lambda x: x + 0.4 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  return AdaptiveNetwork(network.graphdef, network.params, head_graphdef=graphdef, head_params=params)


def trained_view(model, found, prompts):
  """Hidden states and log pi where each new token was predicted, as a trainer computes them."""
  tokens = np.concatenate([np.asarray(prompts).repeat(len(found.choices_RN) // len(prompts), 0),
                           np.asarray(found.generation.tokens_RN)], axis=1)  # fmt: skip
  hidden_RLD = model.model().hidden(jnp.asarray(tokens))[:, prompts.shape[1] - 1 : -1]
  return parameters.merge(model.head_graphdef, model.head_params)(hidden_RLD)


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("selection", ("sample", "greedy"))
def test_t10_the_trainer_finds_the_sampler_s_log_probabilities(level, selection):
  model = adaptive()
  found = sample_adaptively(
    model,
    PROMPTS,
    key=jax.random.key(3),
    law=DrawnSetting(TAUS, level=level, selection=selection),
    max_new_tokens=7,
    num_samples=4,
    stop=Stop(ids_E=jnp.asarray([5, 9])),
  )
  weights_RN = (jnp.arange(7) < found.generation.lengths_R[:, None]).astype(jnp.float32)
  assert 0 < float(weights_RN.sum()) < weights_RN.size  # Some rows ended early.
  np.testing.assert_array_equal(found.choices_RN < 0, weights_RN == 0)
  log_pi_RNK = trained_view(model, found, PROMPTS)
  choices_RN = found.choices_RN.astype(jnp.int32)
  spec = LatentPreferenceSpec(level=level)
  if level == "token":
    scores = token_scores(spec, log_pi_RNK, choices_RN, weights_RN)
    assert len(np.unique(found.choices_RN)) > 2
  else:
    scores = sequence_scores(spec, log_pi_RNK[:, 0], choices_RN[:, 0])
    same = (choices_RN == choices_RN[:, :1]) | (weights_RN == 0)
    assert bool(same.all())
  np.testing.assert_allclose(found.choice_log_probs_RN.sum(1), scores.choices, atol=1e-4)
  if selection == "greedy":
    np.testing.assert_array_equal(choices_RN[:, 0], log_pi_RNK[:, 0].argmax(-1))


def test_tokens_follow_the_picked_temperatures():
  model = adaptive()
  found = sample_adaptively(
    model, PROMPTS, key=jax.random.key(0), law=DrawnSetting(TAUS), max_new_tokens=6, num_samples=8
  )
  generation, taus_RN = found.generation, np.asarray(TAUS)[np.asarray(found.choices_RN)]
  tokens_RN = np.asarray(generation.tokens_RN)
  rows = np.concatenate([np.asarray(PROMPTS).repeat(8, 0), tokens_RN], axis=1)
  logits_RNV = np.asarray(model.model()(jnp.asarray(rows))[:, 4:-1])
  is_greedy = taus_RN == 0
  assert is_greedy.any() and not is_greedy.all()
  np.testing.assert_array_equal(tokens_RN[is_greedy], logits_RNV.argmax(-1)[is_greedy])
  law_RNV = jax.nn.log_softmax(logits_RNV / np.where(is_greedy, 1, taus_RN)[..., None])
  drawn_RN = np.take_along_axis(np.asarray(law_RNV), tokens_RN[..., None], -1)[..., 0]
  transformed_RN = np.asarray(generation.transformed_log_probs_RN)
  np.testing.assert_allclose(transformed_RN, np.where(is_greedy, 0.0, drawn_RN), atol=1e-4)


def test_frequencies_of_the_picks_are_the_head_s_probabilities():
  model = adaptive(1)
  found = sample_adaptively(
    model, PROMPTS[:1], key=jax.random.key(1), law=DrawnSetting(TAUS, level="sequence"), max_new_tokens=1,
    num_samples=8000,
  )  # fmt: skip
  shares = np.bincount(np.asarray(found.choices_RN[:, 0]), minlength=len(TAUS)) / 8000
  expected = jnp.exp(trained_view(model, found, PROMPTS[:1])[0, 0])
  np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / 8000))
  assert float(jnp.abs(expected - 0.2).max()) > 0.05


def test_drawn_anew_at_every_token_it_is_the_mixture():
  """Eq. 5 and Eq. 6 give the same law of the next token."""
  model, count = adaptive(), 20_000
  found = sample_adaptively(
    model, PROMPTS[:1], key=jax.random.key(1), law=DrawnSetting(TAUS), max_new_tokens=1, num_samples=count
  )
  mixed = sample(
    model, PROMPTS[:1], key=jax.random.key(2), chain=chain(AdaptiveTemperature(TAUS)), max_new_tokens=1,
    num_samples=count,
  )  # fmt: skip
  shares = [
    np.bincount(np.asarray(x.tokens_RN[:, 0]), minlength=32) / count for x in (found.generation, mixed)
  ]
  np.testing.assert_allclose(shares[0], shares[1], atol=4 * np.sqrt(2 * 0.25 / count))


def test_samples_do_not_depend_on_the_batch():
  model = adaptive()
  law = DrawnSetting(TAUS)
  settings = dict(key=jax.random.key(0), law=law, max_new_tokens=5)
  whole = sample_adaptively(model, PROMPTS, **settings)
  part = sample_adaptively(model, PROMPTS[4:], row_ids_B=jnp.asarray([4, 5]), **settings)
  np.testing.assert_array_equal(whole.generation.tokens_RN[4:], part.generation.tokens_RN)
  np.testing.assert_array_equal(whole.choices_RN[4:], part.choices_RN)


def test_without_a_head_all_settings_are_equally_likely():
  network = tiny_network()
  model = AdaptiveNetwork(network.graphdef, network.params, num_settings=5)
  found = sample_adaptively(
    model, PROMPTS, key=jax.random.key(0), law=DrawnSetting(TAUS, level="sequence"), max_new_tokens=1,
    num_samples=2000,
  )  # fmt: skip
  np.testing.assert_allclose(np.bincount(np.asarray(found.choices_RN[:, 0])) / 12_000, 0.2, atol=0.02)
  np.testing.assert_allclose(found.choice_log_probs_RN, -np.log(5), rtol=1e-5)
  with pytest.raises(ValueError, match="num_settings=0"):
    AdaptiveNetwork(network.graphdef, network.params).check()


def test_further_transforms_come_behind_the_setting():
  model = adaptive()
  law = DrawnSetting((1.0, 2.0, 3.0, 4.0, 5.0))
  found = sample_adaptively(
    model, PROMPTS, key=jax.random.key(0), law=law, after=Temperature(0.0), max_new_tokens=4
  )
  greedy = sample(model, PROMPTS, max_new_tokens=4)
  np.testing.assert_array_equal(found.generation.tokens_RN, greedy.tokens_RN)


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_is_its_transform_row_by_row(action):
  from nr.generation.transforms import parse

  values = dict(temperature=(0.5, 1.5), top_k=(1, 4), top_p=(0.3, 0.9), min_p=(0.5, 0.05))[action]
  logits_BV = jax.random.normal(jax.random.key(0), (2, 12)) * 2
  found = ACTIONS[action](logits_BV, jnp.asarray(values, jnp.float32))
  for row, value in enumerate(values):
    (alone,) = parse(f"{action}({value})").prepared().transforms
    np.testing.assert_array_equal(found[row], alone.apply(logits_BV[row : row + 1], (), None)[0])


def test_what_cannot_be_picked_is_refused():
  with pytest.raises(ValueError, match="did you mean 'top_k'"):
    check_values("top_kk", (1,))
  with pytest.raises(ValueError, match="temperature.tau"):
    check_values("temperature", (-1.0, 1.0))
  with pytest.raises(ValueError, match="give a whole number"):
    check_values("top_k", (1.5, 2))
  with pytest.raises(ValueError, match="hidden:adaptive"):
    sample_adaptively(
      tiny_network(), PROMPTS, key=jax.random.key(0), law=DrawnSetting(TAUS), max_new_tokens=2
    )
