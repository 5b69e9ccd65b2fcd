"""The concept head over chunks of concepts is the one that holds all logits: ties, types, and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.labels import NO_LABEL
from nr.models.concept_head import predict_concepts
from nr.models.top_k import IMPLEMENTATIONS, merge_top_k, top_k

BATCH, LENGTH, WIDTH, CONCEPTS, K = 2, 5, 8, 50, 7


def _operands(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  u = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH)).astype(dtype)
  kernel = jax.random.normal(keys[1], (WIDTH, CONCEPTS)).astype(dtype)
  return u, kernel, jax.random.normal(keys[2], (CONCEPTS,))


def _labels(concepts=CONCEPTS, batch=BATCH, length=LENGTH):
  labels = np.random.RandomState(1).randint(0, concepts, (batch, length, 3))
  labels[0, 0, 1], labels[-1, -1] = NO_LABEL, NO_LABEL
  return jnp.asarray(labels)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_across_chunks_go_to_the_lowest_index(implementation):
  # Small integers: every logit is exact, and many are equal.
  random = np.random.RandomState(0)
  u = random.randint(-1, 2, (BATCH, LENGTH, WIDTH)).astype(np.float32)
  kernel = random.randint(-1, 2, (WIDTH, CONCEPTS)).astype(np.float32)
  z = u @ kernel
  order = np.argsort(-(z + 0.0), axis=-1, kind="stable")[..., :K]
  labels = _labels()
  for chunk in (25, 16, 3):  # a divisor and others, above and below K
    settings = dict(k=K, labels_BLA=labels, top_k_impl=implementation, concept_chunk=chunk)
    predict = jax.jit(functools.partial(predict_concepts, **settings))
    found = predict(u, kernel, jnp.zeros(CONCEPTS))
    np.testing.assert_array_equal(found.indices_BLK, order)
    np.testing.assert_array_equal(found.values_BLK, np.take_along_axis(z, order, axis=-1))
    safe = np.where(labels == NO_LABEL, 0, labels)
    np.testing.assert_array_equal(found.label_logits_BLA, np.take_along_axis(z, safe, axis=-1))
    np.testing.assert_allclose(found.log_normalizer_BL, np.log(np.exp(z).sum(-1)), rtol=1e-6)


def test_merging_kept_entries_is_top_k_of_all():
  x = jnp.asarray(np.round(2 * np.random.RandomState(3).randn(4, 30)) / 2, jnp.float32)
  kept = top_k(x[:, :10], 6)
  for start, stop in ((10, 20), (20, 25), (25, 30)):
    values, indices = top_k(x[:, start:stop], min(6, stop - start))
    kept = merge_top_k(*kept, values, indices + start)
  for found, expected in zip(kept, top_k(x, 6, implementation="lax")):
    np.testing.assert_array_equal(found, expected)


def _loss(u, kernel, bias, labels, direction, chunk):
  """Every output has a say: the normaliser, the labels with unequal weights, the values that are mixed."""
  found = predict_concepts(u, kernel, bias, k=K, labels_BLA=labels, concept_chunk=chunk)
  weights = jnp.where(labels == NO_LABEL, 0.0, jnp.arange(1.0, 4.0))
  picked = (weights * found.label_logits_BLA).sum()
  return (found.log_normalizer_BL**2).sum() - picked + (jax.nn.relu(found.values_BLK) * direction).sum()


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_gradients_are_those_of_all_logits_at_once(dtype, tolerance):
  operands, labels = _operands(dtype), _labels()
  direction = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, K))
  whole = jax.jit(jax.value_and_grad(functools.partial(_loss, chunk=None), argnums=(0, 1, 2)))
  chunked = jax.jit(jax.value_and_grad(functools.partial(_loss, chunk=12), argnums=(0, 1, 2)))
  value, gradient = whole(*operands, labels, direction)
  found, found_gradient = chunked(*operands, labels, direction)
  np.testing.assert_allclose(found, value, rtol=1e-6)
  for ours, theirs, operand in zip(found_gradient, gradient, operands):
    assert ours.dtype == operand.dtype
    size = np.abs(np.asarray(theirs, np.float32)).max()
    np.testing.assert_allclose(
      np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=tolerance * size, rtol=0
    )


def test_memory_of_the_fused_head_does_not_grow_with_the_concepts():
  batch, length, width, chunk = 2, 64, 32, 1024

  def temporary(concepts, concept_chunk):
    labels = _labels(concepts, batch, length)

    def loss(u, kernel, bias):
      found = predict_concepts(u, kernel, bias, k=8, labels_BLA=labels, concept_chunk=concept_chunk)
      return found.log_normalizer_BL.sum() + found.values_BLK.sum() - found.label_logits_BLA.sum()

    shapes = [(batch, length, width), (width, concepts), (concepts,)]
    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*abstract).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = temporary(4096, chunk), temporary(32768, chunk)
  assert many < 1.05 * few
  # Some logits of a chunk, far from those of all concepts, which the other form holds.
  logits = 4 * batch * length
  assert many < 5 * logits * chunk < logits * 32768 < temporary(32768, None)
