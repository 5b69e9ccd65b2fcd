"""Laws of the concept loss and of its fused computation, by their numbers in the specification."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cocomix_models import CONCEPTS, LENGTH, concept_spec, make_labels, make_model, make_tokens

from nr.models.concept_head import concept_logits, mix_concepts, predict_concepts
from nr.models.parameters import merge, split
from nr.objectives.concept_prediction import concept_prediction_loss

WIDTH = 16


def _operands():
  keys = jax.random.split(jax.random.key(0), 3)
  h = jax.random.normal(keys[0], (2, LENGTH, WIDTH))
  return h, 0.3 * jax.random.normal(keys[1], (WIDTH, CONCEPTS)), jax.random.normal(keys[2], (CONCEPTS,))


def test_12_gather_and_dense_compression_agree():
  h, kernel, bias = _operands()
  compression = jax.random.normal(jax.random.key(5), (CONCEPTS, WIDTH))
  target = jax.random.normal(jax.random.key(6), h.shape)

  def loss(h, compression, implementation):
    prediction = predict_concepts(h, kernel, bias, k=6)
    mixed = mix_concepts(
      prediction.values_BLK, prediction.indices_BLK, compression, implementation=implementation
    )
    return ((mixed - target) ** 2).mean(), mixed

  results = [
    jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)(h, compression, name)
    for name in ("gather", "dense")
  ]
  np.testing.assert_allclose(results[0][0][1], results[1][0][1], rtol=1e-6, atol=2e-6)
  for gather, dense in zip(results[0][1], results[1][1]):
    np.testing.assert_allclose(gather, dense, atol=1e-5)
  # The law itself: the masked product.
  z = concept_logits(h, kernel, bias)
  masked = jnp.where(z >= jnp.sort(z, axis=-1)[..., -6, None], z, 0) @ compression
  np.testing.assert_allclose(results[0][0][1], masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("concept_chunk", [None, 5, 16, 47, CONCEPTS])
def test_13_fused_loss_equals_four_cross_entropies(concept_chunk):
  labels = make_labels()
  weights = jnp.ones((2, LENGTH)).at[1, 3].set(0.0).at[0, 2].set(2.5)
  direction = jax.random.normal(jax.random.key(9), (2, LENGTH, 6))

  def fused(h, kernel, bias):
    prediction = predict_concepts(h, kernel, bias, k=6, labels_BLA=labels, concept_chunk=concept_chunk)
    loss = concept_prediction_loss(
      prediction.log_normalizer_BL, prediction.label_logits_BLA, labels, prediction.indices_BLK, weights
    ).loss
    return loss.mean() + (prediction.values_BLK * direction).mean()

  def plain(h, kernel, bias):
    z = concept_logits(h, kernel, bias)
    is_label = labels != 65535
    calls = [
      optax.softmax_cross_entropy_with_integer_labels(z, jnp.where(is_label, labels, 0)[..., index])
      for index in range(4)
    ]
    count = is_label.sum(axis=-1)
    nll = jnp.where(is_label, jnp.stack(calls, axis=-1), 0).sum(axis=-1) / jnp.maximum(count, 1)
    scored = weights * (count > 0)
    return (nll * scored).sum() / scored.sum() + (jax.lax.top_k(z, 6)[0] * direction).mean()

  operands = _operands()
  value, gradient = jax.jit(jax.value_and_grad(fused, argnums=(0, 1, 2)))(*operands)
  expected, expected_gradient = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(*operands)
  np.testing.assert_allclose(value, expected, atol=1e-5)
  for ours, theirs in zip(gradient, expected_gradient):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_13_fused_never_holds_all_logits():
  h, kernel, bias = _operands()
  labels = make_labels()

  def holds(array, concept_chunk):
    def loss(h, kernel, bias):
      out = predict_concepts(h, kernel, bias, k=6, labels_BLA=labels, concept_chunk=concept_chunk)
      return out.log_normalizer_BL.sum() + out.values_BLK.sum() + out.label_logits_BLA.sum()

    return array in jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(h, kernel, bias).as_text()

  assert holds(f"tensor<2x{LENGTH}x{CONCEPTS}xf32>", None)
  assert not holds(f"tensor<2x{LENGTH}x{CONCEPTS}xf32>", 16)
  assert holds(f"tensor<2x{LENGTH}x1x16xf32>", 16)


def test_14_loss_is_at_least_the_log_of_the_number_of_labels():
  labels = make_labels()[:, 1:-1]
  z = jnp.full((*labels.shape[:2], CONCEPTS), -50.0)
  best = jnp.put_along_axis(z, labels, 50.0, axis=-1, inplace=False)
  for logits in (best, 3 * jax.random.normal(jax.random.key(1), z.shape)):
    indices = jax.lax.top_k(logits, 6)[1]
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    scored = concept_prediction_loss(normalizer, jnp.take_along_axis(logits, labels, -1), labels, indices)
    assert scored.loss.mean() >= math.log(4) - 1e-6
    if logits is best:
      np.testing.assert_allclose(scored.loss.mean(), math.log(4), rtol=1e-6)
      assert scored.recall.mean() == 1 and scored.recall_first.mean() == 1


def test_recall_counts_labels_among_the_selected_concepts():
  labels = jnp.array([[[1, 2, 3, 65535], [65535] * 4]])
  indices = jnp.array([[[7, 2, 9, 8, 1], [0, 1, 2, 3, 4]]])
  label_logits = jnp.array([[[0.5, 1.0, 0.0, 99.0]] * 2])
  scored = concept_prediction_loss(jnp.array([[2.0, 9.0]]), label_logits, labels, indices)
  np.testing.assert_allclose(scored.loss.mean(), 2.0 - 0.5)
  assert tuple(map(float, scored.loss)) == (1.5, 1.0)
  assert tuple(map(float, scored.recall)) == (2.0, 3.0)
  assert tuple(map(float, scored.recall_first)) == (1.0, 3.0)


def test_labels_as_uint16_serve_as_well():
  labels = make_labels()
  model = make_model()
  wide = model.forward(make_tokens(), labels_BLA=labels).concepts
  narrow = model.forward(make_tokens(), labels_BLA=labels.astype(jnp.uint16)).concepts
  np.testing.assert_array_equal(wide.label_logits_BLA, narrow.label_logits_BLA)
  scores = [
    concept_prediction_loss(wide.log_normalizer_BL, wide.label_logits_BLA, each, wide.indices_BLK).loss.total
    for each in (labels, labels.astype(jnp.uint16))
  ]
  assert scores[0] == scores[1]


def test_36_without_concept_loss_the_head_learns_on_selected_concepts_only():
  model = make_model(concepts=concept_spec(mode="mix_only"))
  graphdef, params = split(model)
  tokens = make_tokens()

  def loss(params):
    output = merge(graphdef, params).forward(tokens)
    return (output.hidden_BLD**2).mean(), output.concepts.indices_BLK

  gradient, indices = jax.jit(jax.grad(loss, has_aux=True))(params)
  is_selected = np.isin(np.arange(CONCEPTS), indices)
  assert 0 < is_selected.sum() < CONCEPTS
  size = np.abs(gradient["concepts"]["head"]["kernel"]).max(axis=0)
  np.testing.assert_array_equal(size > 0, is_selected)
  size = np.abs(gradient["concepts"]["compression"]["kernel"]).max(axis=1)
  np.testing.assert_array_equal(size > 0, is_selected)
