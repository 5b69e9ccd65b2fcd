"""Sampling: greedy limits, batch independence, early end, and the distribution itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.generation.sampling import generate, sample_tokens
from nr.models.parameters import split
from nr.models.transformer import Transformer, TransformerSpec

SIZES = dict(vocab_size=31, num_layers=2, model_dim=16, num_heads=2, max_length=24)
SPEC = TransformerSpec.gpt2(init_std=0.3, **SIZES)
PROMPTS = jax.random.randint(jax.random.key(2), (3, 6), 0, 31)


def _model():
  return split(Transformer(SPEC, rngs=nnx.Rngs(0)))


def test_a_row_samples_the_same_in_any_batch_and_with_any_padding():
  model, key = _model(), jax.random.key(5)
  together = generate(*model, PROMPTS, None, key, max_new_tokens=7)
  alone = generate(*model, PROMPTS[1:2], None, key, max_new_tokens=7, row_ids_B=jnp.array([1]))
  np.testing.assert_array_equal(together.tokens_BN[1:2], alone.tokens_BN)
  padded = jnp.pad(PROMPTS, ((0, 0), (2, 0)))
  valid = jnp.arange(8) >= jnp.full((3, 1), 2)
  shifted = generate(*model, padded, valid, key, max_new_tokens=7)
  np.testing.assert_array_equal(together.tokens_BN, shifted.tokens_BN)
  assert len({tuple(row) for row in np.asarray(together.tokens_BN)}) == 3
  other = generate(*model, PROMPTS, None, jax.random.key(6), max_new_tokens=7)
  assert (together.tokens_BN != other.tokens_BN).any()


def test_temperature_zero_and_top_one_are_greedy_and_temperature_is_traced():
  model, key = _model(), jax.random.key(0)
  greedy = generate(*model, PROMPTS, max_new_tokens=5, temperature=0.0)
  top_one = generate(*model, PROMPTS, None, key, max_new_tokens=5, top_k=1)
  np.testing.assert_array_equal(greedy.tokens_BN, top_one.tokens_BN)
  mixed = generate(*model, PROMPTS, None, key, max_new_tokens=5, temperature=jnp.array([0.0, 1.0, 0.0]))
  np.testing.assert_array_equal(mixed.tokens_BN[::2], greedy.tokens_BN[::2])
  assert (greedy.log_probs_BN < 0).all()


def test_rows_end_with_the_end_of_text():
  model = _model()
  free = generate(*model, PROMPTS, max_new_tokens=6, temperature=0.0)
  end = int(free.tokens_BN[0, 2])
  ended = generate(*model, PROMPTS, max_new_tokens=6, temperature=0.0, end_of_text_id=end)
  for row in range(3):
    text = np.asarray(free.tokens_BN[row])
    length = int(np.argmax(text == end)) + 1 if (text == end).any() else 6
    assert int(ended.lengths_B[row]) == length
    np.testing.assert_array_equal(ended.tokens_BN[row, :length], text[:length])
    assert (ended.tokens_BN[row, length:] == end).all() and (ended.log_probs_BN[row, length:] == 0).all()


def test_samples_follow_the_softmax_at_the_temperature():
  logits = jnp.array([2.0, 1.0, 0.0, -1.0])
  keys = jax.random.split(jax.random.key(0), 40_000)
  rows = jnp.broadcast_to(logits, (len(keys), 4))
  for temperature, top_k in ((0.7, None), (1.5, 2)):
    drawn = sample_tokens(rows, keys, jnp.full(len(keys), temperature), top_k)
    allowed = logits if top_k is None else jnp.where(jnp.arange(4) < top_k, logits, -jnp.inf)
    expected = jax.nn.softmax(allowed / temperature)
    # Five standard errors of a proportion over 40,000 draws.
    np.testing.assert_allclose(jnp.bincount(drawn, length=4) / len(keys), expected, atol=0.0125)


@pytest.mark.parametrize(
  "arguments, settings, message",
  [
    ((PROMPTS,), dict(max_new_tokens=4), "needs a random key"),
    ((PROMPTS[:, :0],), dict(max_new_tokens=4, temperature=0.0), "give at least one token"),
    ((PROMPTS,), dict(max_new_tokens=20, temperature=0.0), "need 25 positions; .* max_length = 24"),
    ((PROMPTS, jnp.zeros(PROMPTS.shape)), dict(max_new_tokens=4, temperature=0.0), "padded on the left"),
    ((PROMPTS,), dict(max_new_tokens=4, temperature=0.0, intervene_on="late"), "Valid: all, generation"),
  ],
)
def test_bad_arguments_are_named(arguments, settings, message):
  with pytest.raises(ValueError, match=message):
    generate(*_model(), *arguments, **settings)
