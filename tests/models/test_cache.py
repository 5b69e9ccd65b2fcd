"""However a sequence is cut, the cache gives what one pass gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.models import cache as caches
from nr.models import parameters
from nr.models.transformer import AttentionInputs, Transformer, TransformerSpec

SIZES = dict(vocab_size=31, num_layers=3, model_dim=16, num_heads=4, mlp_dim=24, init_std=0.2)
SPECS = {
  "gpt2": TransformerSpec.gpt2(**SIZES, max_length=32),
  "llama": TransformerSpec.llama(**SIZES, num_kv_heads=2),
  "qwen3": TransformerSpec.qwen3(**SIZES, num_kv_heads=2),
}
LENGTH = 14


def build(family, layers):
  graphdef, params = parameters.split(Transformer(SPECS[family].replace(layers=layers), rngs=nnx.Rngs(0)))

  @jax.jit
  def extend(params, tokens, cache, valid):
    return parameters.merge(graphdef, params).extend(tokens, cache, valid)

  return parameters.merge(graphdef, params), lambda *inputs: extend(params, *inputs)


def tokens_of(batch, length=LENGTH, seed=2):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 31, (batch, length)), jnp.int32)


def extend_in_chunks(extend, model, tokens, chunk, valid=None, capacity=LENGTH + 3):
  cache, logits = model.init_cache(tokens.shape[0], capacity), []
  for start in range(0, tokens.shape[1], chunk):
    part = slice(start, start + chunk)
    new, cache = extend(tokens[:, part], cache, None if valid is None else valid[:, part])
    logits.append(new)
  return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("family", list(SPECS))
@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("chunk", [1, 2, 7, LENGTH])
def test_any_chunking_equals_one_pass(family, layers, chunk):
  model, extend = build(family, layers)
  tokens = tokens_of(2)
  logits, cache = extend_in_chunks(extend, model, tokens, chunk)
  np.testing.assert_allclose(logits, model(tokens), atol=1e-5)
  assert int(cache.length) == LENGTH
  np.testing.assert_array_equal(caches.count_tokens(cache), [LENGTH, LENGTH])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("chunk", [1, 5, LENGTH])
def test_left_padded_rows_equal_unpadded_rows(family, layers, chunk):
  model, extend = build(family, layers)
  tokens, padding = tokens_of(3), np.array([0, 4, 9])
  valid = jnp.arange(LENGTH) >= padding[:, None]
  logits, cache = extend_in_chunks(extend, model, tokens, chunk, valid)
  assert np.isfinite(logits).all()
  for row, start in enumerate(padding):
    np.testing.assert_allclose(logits[row, start:], model(tokens[row : row + 1, start:])[0], atol=1e-5)
  np.testing.assert_array_equal(caches.count_tokens(cache), LENGTH - padding)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_a_range_of_blocks_has_its_own_cache_and_positions(layers):
  """Lower blocks on T rows, upper blocks on 2 T rows with positions passed in."""
  model, _ = build("llama", layers)
  tokens = tokens_of(2, 6)
  positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
  double = jnp.repeat(positions, 2, axis=1)

  def upper_rows(x):
    return jnp.stack([x, jnp.cos(x)], axis=2).reshape(x.shape[0], -1, x.shape[2])

  @jax.jit
  def run(tokens, positions, double, lower, upper):
    attention = AttentionInputs(positions)
    x, lower = model.run_blocks(model.embed(tokens), 0, 1, attention=attention, cache=lower)
    x, upper = model.run_blocks(upper_rows(x), 1, attention=AttentionInputs(double), cache=upper)
    return x, lower, upper

  whole, _, _ = run(tokens, positions, double, None, None)
  lower, upper = model.init_cache(2, 8, stop=1), model.init_cache(2, 16, start=1)
  parts = []
  for start, stop in ((0, 3), (3, 4), (4, 6)):
    doubled = double[:, 2 * start : 2 * stop]
    x, lower, upper = run(tokens[:, start:stop], positions[:, start:stop], doubled, lower, upper)
    parts.append(x)
  np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
  assert (int(lower.length), int(upper.length)) == (6, 12)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_gathered_rows_continue_the_rows_they_came_from(layers):
  model, extend = build("llama", layers)
  tokens = tokens_of(2)
  _, cache = extend(tokens[:, :8], model.init_cache(2, LENGTH), None)
  rows = jnp.array([1, 0, 1])
  logits, _ = extend(tokens[rows, 8:], caches.take_rows(cache, rows), None)
  np.testing.assert_allclose(logits, model(tokens)[rows, 8:], atol=1e-5)


def test_decoding_inside_a_while_loop_equals_steps_outside():
  model, extend = build("gpt2", "unroll")
  cache = model.init_cache(2, 8)

  @jax.jit
  def decode(cache):
    def step(state):
      tokens, cache = state
      logits, cache = model.extend(tokens, cache)
      return logits[:, -1:].argmax(axis=-1).astype(jnp.int32), cache

    return jax.lax.while_loop(lambda state: state[1].length < 6, step, (jnp.zeros((2, 1), jnp.int32), cache))

  tokens, _ = decode(cache)
  expected = jnp.zeros((2, 1), jnp.int32)
  for _ in range(6):
    logits, cache = extend(expected, cache, None)
    expected = logits[:, -1:].argmax(axis=-1).astype(jnp.int32)
  np.testing.assert_array_equal(tokens, expected)


def test_cache_of_another_type_is_allowed():
  model, extend = build("llama", "scan")
  cache = model.init_cache(1, 6, jnp.bfloat16)
  assert cache.keys.dtype == jnp.bfloat16
  logits, _ = extend(tokens_of(1, 6), cache, None)
  np.testing.assert_allclose(logits, model(tokens_of(1, 6)), atol=0.1)
