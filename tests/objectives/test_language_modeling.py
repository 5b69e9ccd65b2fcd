"""Chunked cross-entropy against the dense formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.objectives.language_modeling import next_token_loss, token_nll

B, L, D, V = 3, 7, 5, 29
RNG = np.random.default_rng(0)
HIDDEN, HEAD = RNG.normal(size=(B, L, D)), RNG.normal(size=(V, D))
TARGETS, WEIGHTS = RNG.integers(0, V, (B, L)), RNG.uniform(0.5, 2, (B, L))
WEIGHTS[1, 2:5] = 0
CHUNKS = [None, 1, 3, 6, 7, 9, 12, 20, 21, 1000]


def dense(hidden=HIDDEN, head=HEAD):
  """Value a token, and gradients of the weighted sum, by hand in float64."""
  logits = hidden @ head.T
  logits = logits - logits.max(axis=-1, keepdims=True)
  probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  one_hot = np.eye(V)[TARGETS]
  nll = -np.log((probabilities * one_hot).sum(axis=-1))
  error = (probabilities - one_hot) * WEIGHTS[..., None]
  return nll, error @ head, np.einsum("blv,bld->vd", error, hidden)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_value_and_gradients_equal_the_dense_formula(chunk_size):
  nll, hidden_gradient, head_gradient = dense()
  targets, weights = jnp.asarray(TARGETS), jnp.asarray(WEIGHTS, jnp.float32)
  hidden, head = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(HEAD, jnp.float32)
  actual = token_nll(hidden, head, targets, chunk_size=chunk_size)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, nll, rtol=2e-6, atol=2e-6)

  def total(hidden, head):
    return next_token_loss(hidden, head, targets, weights, chunk_size).total

  first, second = jax.jit(jax.grad(total, (0, 1)))(hidden, head)
  np.testing.assert_allclose(first, hidden_gradient, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(second, head_gradient, rtol=1e-5, atol=1e-5)


def shapes_in(function, *inputs):
  """All shapes of values in a program, inner programs included."""
  found = set()

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      found.update(tuple(v.aval.shape) for v in equation.outvars)
      for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          visit(inner)

  visit(jax.make_jaxpr(function)(*inputs).jaxpr)
  return found


def test_neither_pass_holds_all_logits():
  hidden, head = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(HEAD, jnp.float32)
  targets, weights = jnp.asarray(TARGETS), jnp.asarray(WEIGHTS, jnp.float32)
  largest = {}
  for chunk_size in (None, 3):

    def loss(hidden, head, size=chunk_size):
      return next_token_loss(hidden, head, targets, weights, size).total

    shapes = shapes_in(jax.value_and_grad(loss, (0, 1)), hidden, head)
    largest[chunk_size] = max(int(np.prod(shape)) for shape in shapes if V in shape and shape != (V, D))
  assert largest[None] >= B * L * V
  assert largest[3] == B * V


def test_tokens_of_weight_zero_never_count():
  hidden, head = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(HEAD, jnp.float32)
  weights = jnp.asarray(WEIGHTS, jnp.float32)
  plain = next_token_loss(hidden, head, jnp.asarray(TARGETS), weights)
  targets = jnp.where(weights == 0, -100, jnp.asarray(TARGETS))
  odd = next_token_loss(hidden, head, targets, weights, chunk_size=5)
  np.testing.assert_allclose(plain.total, odd.total, rtol=1e-6)
  np.testing.assert_allclose(plain.weight, WEIGHTS.sum(), rtol=1e-6)
  np.testing.assert_allclose(plain.total, (dense()[0] * WEIGHTS).sum(), rtol=1e-5)


def test_bfloat16_hidden_states_give_float32_losses_and_gradients_of_their_own_type():
  hidden, head = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(HEAD, jnp.float32)

  def loss(hidden, head):
    return token_nll(hidden, head, jnp.asarray(TARGETS), chunk_size=6).sum()

  value, (first, second) = jax.value_and_grad(loss, (0, 1))(hidden, head)
  assert (value.dtype, first.dtype, second.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(value, dense()[0].sum(), rtol=0.02)


def test_large_logits_stay_finite():
  hidden, head = 1e3 * jnp.asarray(HIDDEN, jnp.float32), 1e3 * jnp.asarray(HEAD, jnp.float32)
  assert np.isfinite(token_nll(hidden, head, jnp.asarray(TARGETS), chunk_size=4)).all()


def test_uniform_logits_cost_log_vocabulary():
  nll = token_nll(jnp.zeros((1, 4, D)), jnp.asarray(HEAD, jnp.float32), jnp.zeros((1, 4), jnp.int32))
  np.testing.assert_allclose(nll, np.log(V), rtol=1e-6)


def test_a_chunk_of_no_tokens_is_refused():
  with pytest.raises(ValueError, match="chunk_size=0: give a positive number of tokens"):
    token_nll(jnp.zeros((1, 4, D)), jnp.zeros((V, D)), jnp.zeros((1, 4), jnp.int32), chunk_size=0)
