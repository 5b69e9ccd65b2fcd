"""Attention against a plain NumPy softmax, and one implementation against the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.models import attention
from nr.models.transformer_spec import RotaryScaling, TransformerSpec


def make(batch=2, length=11, heads=4, kv_heads=2, size=6, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  shapes = [(batch, length, n, size) for n in (heads, kv_heads, kv_heads)]
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def reference(query, key, value, segments):
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  group = query.shape[2] // key.shape[2]
  key, value = np.repeat(key, group, axis=2), np.repeat(value, group, axis=2)
  scores = np.einsum("blhk,bmhk->bhlm", query, key) / np.sqrt(query.shape[-1])
  is_same = (segments[:, :, None] == segments[:, None, :])[:, None]
  is_seen = np.tril(np.ones(scores.shape[-2:], bool)) & is_same
  scores = np.where(is_seen, scores, -np.inf)
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  output = np.einsum("bhlm,bmhk->blhk", weights / weights.sum(axis=-1, keepdims=True), value)
  return np.where((segments != 0)[..., None, None], output, 0)


SEGMENTS = np.array([[1] * 4 + [2] * 7, [0] * 3 + [5] * 6 + [0] * 2])


@pytest.mark.parametrize("implementation", ["dot_product", "blocked"])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_full_attention_equals_plain_softmax(implementation, segments):
  inputs = make()
  expected = reference(*inputs, np.ones((2, 11), int) if segments is None else segments)
  segment_ids = None if segments is None else jnp.asarray(segments)
  actual = attention.full_attention(*inputs, segment_ids, implementation=implementation)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 11, 128])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_blocks_equal_dot_product_attention_in_value_and_gradient(block, segments):
  inputs = make()
  mask = None if segments is None else jnp.asarray(segments[:, :, None] == segments[:, None, :])[:, None]
  segment_ids = None if segments is None else jnp.asarray(segments)

  def blocked(inputs):
    return attention.blocked_causal_attention(*inputs, segment_ids, block=block)

  def direct(inputs):
    return jax.nn.dot_product_attention(*inputs, mask=mask, is_causal=True)

  # A row of padding attends to rows of padding in both, so all rows can be compared.
  np.testing.assert_allclose(blocked(inputs), direct(inputs), atol=1e-6)
  first = jax.grad(lambda inputs: jnp.sin(blocked(inputs)).sum())(inputs)
  second = jax.grad(lambda inputs: jnp.sin(direct(inputs)).sum())(inputs)
  for a, b in zip(first, second):
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_blocks_skip_the_keys_that_no_query_sees():
  inputs = make(length=16)
  text = str(jax.make_jaxpr(lambda *x: attention.blocked_causal_attention(*x, block=4))(*inputs))
  for keys in (4, 8, 12, 16):
    assert f"[2,2,8,{keys}]" in text
  assert "[2,2,32,16]" not in text


def test_attention_dropout_keeps_the_mean_and_uses_blocks():
  inputs = make(length=5)
  plain = attention.full_attention(*inputs, None)

  def dropped(key):
    return attention.full_attention(*inputs, None, implementation="dot_product", dropout=0.2, dropout_key=key)

  samples = jax.vmap(dropped)(jax.random.split(jax.random.key(0), 4000))
  np.testing.assert_allclose(samples.mean(axis=0), plain, atol=0.1)
  assert float(jnp.abs(samples[0] - plain).max()) > 1e-2


def test_bfloat16_inputs_keep_float32_softmax():
  inputs = make(length=9)
  exact = attention.full_attention(*inputs, None)
  near = attention.full_attention(*[x.astype(jnp.bfloat16) for x in inputs], None, implementation="blocked")
  assert near.dtype == jnp.bfloat16
  np.testing.assert_allclose(near.astype(np.float32), exact, atol=0.05)


def test_default_positions_restart_at_every_segment():
  segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [0, 0, 3, 3, 3, 3, 4]])
  expected = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 0]]
  np.testing.assert_array_equal(attention.default_positions(2, 7, segments), expected)
  np.testing.assert_array_equal(attention.default_positions(1, 3), [[0, 1, 2]])


def test_rotation_depends_on_relative_positions_only():
  spec = TransformerSpec.llama(vocab_size=2, num_layers=1, model_dim=8, num_heads=1)
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def score(first, second):
    turned = [
      attention.rotate(x, attention.rotary_angles(jnp.asarray([[position]]), spec))
      for x, position in ((query, first), (key, second))
    ]
    return float((turned[0] * turned[1]).sum())

  assert abs(score(7, 3) - score(104, 100)) < 1e-4
  assert abs(score(7, 3) - score(8, 3)) > 1e-3


def test_rotary_scaling_keeps_fast_and_stretches_slow_frequencies():
  plain = TransformerSpec.llama(vocab_size=2, num_layers=1, model_dim=64, num_heads=1, rotary_base=500000.0)
  scaled = plain.replace(rotary_scaling=RotaryScaling(factor=8.0))
  position = jnp.asarray([[1]])

  def angle(spec):
    return np.arctan2(*[x[0, 0, 0] for x in attention.rotary_angles(position, spec)[::-1]])

  ratio = angle(scaled) / angle(plain)
  np.testing.assert_allclose(ratio[0], 1, rtol=1e-5)
  np.testing.assert_allclose(ratio[-1], 1 / 8, rtol=1e-5)
  assert np.all(np.diff(ratio) <= 1e-5)
