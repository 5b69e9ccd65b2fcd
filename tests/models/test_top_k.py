"""Every exact top-k equals `lax.top_k`, ties included, and passes gradients to what it selects."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.models.top_k import IMPLEMENTATIONS, top_k, top_k_indices

SIZES = [(2048, 32), (100, 7), (37, 5), (5, 5), (40, 1), (1000, 32)]


def _inputs(kind, size):
  x = np.random.RandomState(0).randn(6, size).astype(np.float32)
  if kind == "tied":
    x = np.round(2 * x) / 2  # also has zeros of both signs
  if kind == "mostly minus infinity":
    x[:, np.arange(size) % 7 > 0] = -np.inf
  if kind == "constant":
    x[:] = -1.5
  return jnp.asarray(x)


@pytest.mark.parametrize("kind", ["random", "tied", "mostly minus infinity", "constant"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_11_top_k_equals_lax_and_ties_go_to_the_lowest_index(implementation, kind):
  for size, k in SIZES:
    x = _inputs(kind, size)
    # The law in NumPy: a stable sort of descending values keeps ties in index order.
    order = np.argsort(-(np.asarray(x) + 0.0), axis=-1, kind="stable")[:, :k]
    values, indices = top_k(x, k, implementation=implementation)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, np.take_along_axis(np.asarray(x), order, axis=-1))
    np.testing.assert_array_equal(values, jax.lax.top_k(x, k)[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_11_zeros_of_both_signs_tie_in_compiled_programs_too(implementation):
  for size, k in SIZES[:2]:
    x = _inputs("tied", size)
    order = np.argsort(-(np.asarray(x) + 0.0), axis=-1, kind="stable")[:, :k]
    zeros = jnp.where(jnp.arange(size) % 3 > 0, 0.0, -0.0)[None]  # all alike: the first k
    find = jax.jit(functools.partial(top_k_indices, k=k, implementation=implementation))
    np.testing.assert_array_equal(find(x), order)
    np.testing.assert_array_equal(find(zeros), np.arange(k)[None])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_reaches_the_selected_entries_only(implementation):
  x = _inputs("random", 64)
  weights = jnp.arange(1.0, 9.0)
  gradient = jax.grad(lambda x: (top_k(x, 8, implementation=implementation)[0] * weights).sum())(x)
  _, indices = top_k(x, 8)
  expected = np.zeros(x.shape, np.float32)
  np.put_along_axis(expected, np.asarray(indices), np.broadcast_to(weights, indices.shape), axis=-1)
  np.testing.assert_array_equal(gradient, expected)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="k = 5 must be between 1 and the 4"):
    top_k(jnp.zeros((2, 4)), 5)
  with pytest.raises(ValueError, match="implementation='fast' is unknown"):
    top_k(jnp.zeros((2, 4)), 1, implementation="fast")
