"""Counted operations against formulas for programs small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from nr.evaluation.flops import count_flops


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_batched_product():
  assert (
    count_flops(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), shape(2, 3, 4), shape(2, 4, 5))
    == 2 * 2 * 3 * 4 * 5
  )


def test_scan_multiplies_by_its_length():
  def repeated(x, w):
    return jax.lax.scan(lambda carry, _: (carry @ w, None), x, length=7)[0]

  assert count_flops(repeated, shape(3, 4), shape(4, 4)) == 7 * 2 * 3 * 4 * 4


def test_gradient_of_a_product_costs_two_more_products():
  def loss(x, w):
    return jnp.tanh(x @ w).sum()

  forward = 2 * 3 * 4 * 5
  assert count_flops(loss, shape(3, 4), shape(4, 5)) == forward
  assert count_flops(jax.grad(loss, argnums=(0, 1)), shape(3, 4), shape(4, 5)) == 3 * forward


def test_recomputation_is_counted():
  def loss(x, w):
    return jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w).sum())(x)

  plain = count_flops(jax.grad(lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w).sum()), shape(3, 4), shape(4, 4))
  assert count_flops(jax.grad(loss), shape(3, 4), shape(4, 4)) > plain


def test_jit_and_cond_are_looked_into():
  def branch(flag, x):
    return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert count_flops(jax.jit(branch), jax.ShapeDtypeStruct((), bool), shape(4, 4)) == 2 * 2 * 4**3


def test_convolution():
  def convolve(x, k):
    return jax.lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

  assert count_flops(convolve, shape(2, 10, 3), shape(5, 3, 4)) == 2 * 2 * 10 * 4 * 5 * 3


def test_a_loop_without_a_trip_count_is_refused():
  with pytest.raises(ValueError, match="trip count"):
    count_flops(lambda x: jax.lax.while_loop(lambda x: (x < 3).all(), lambda x: x @ x, x), shape(4, 4))
