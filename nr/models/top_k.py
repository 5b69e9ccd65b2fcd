"""Exact top-k over a long axis, with ties given to the lowest index.

`jax.lax.top_k` orders whole rows, which is slow for tens of thousands of
concepts. Both alternatives here return the same values and indices:

- `chunked` takes the maximum of every chunk of the row, keeps the k chunks with
  the largest maxima and orders only their elements. Any element outside those
  chunks has k elements before it, one in each kept chunk, so nothing is lost.
- `bitsearch` finds the k-th value by binary search over the bits of the
  order-preserving integer image of float32: 32 counting passes and no sort.

`chunked` is the default: on CPU it is the quickest for tens of thousands of
columns and equals `lax` for a few thousand. Accelerators have not been measured.
"""

import math

import jax
import jax.numpy as jnp

from nr.names import unknown

IMPLEMENTATIONS = ("chunked", "bitsearch", "lax")

_SIGN_BIT = 0x80000000


def top_k(scores: jax.Array, k: int, *, implementation: str = "chunked") -> tuple[jax.Array, jax.Array]:
  """Returns the k largest entries of the last axis, largest first.

  The gradient reaches the selected entries only; the choice itself is not
  differentiated. Zeros of either sign are equal.

  Args:
    scores: float32 [..., C].
    k: how many to keep, 1 <= k <= C.
    implementation: one of `IMPLEMENTATIONS`; the result does not depend on it.

  Returns:
    values float32 [..., k] and indices int32 [..., k]; among equal values the
    lowest index comes first.

  Raises:
    ValueError: for an unknown implementation or a k outside 1..C.
  """
  size = scores.shape[-1]
  if not 1 <= k <= size:
    raise ValueError(f"k = {k} must be between 1 and the {size} entries of a row")
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(unknown("implementation", implementation, IMPLEMENTATIONS))
  indices = top_k_indices(jax.lax.stop_gradient(scores), k, implementation=implementation)
  return jnp.take_along_axis(scores, indices, axis=-1), indices


def top_k_indices(scores: jax.Array, k: int, *, implementation: str = "chunked") -> jax.Array:
  """Returns the int32 [..., k] indices of `top_k`, without its checks."""
  find = {"chunked": _chunked_indices, "bitsearch": _bitsearch_indices, "lax": _lax_indices}[implementation]
  return find(scores, k)


def merge_top_k(
  values: jax.Array, indices: jax.Array, more_values: jax.Array, more_indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the k largest of k kept entries and some more, as `top_k` of all that they were taken from.

  Args:
    values: [..., k], largest first, ties by index.
    indices: int [..., k] where they stand.
    more_values: [..., j], largest first, ties by index.
    more_indices: int [..., j], each above all of `indices`.
  """
  k = values.shape[-1]
  values = jnp.concatenate([values, more_values], axis=-1)
  indices = jnp.concatenate([indices, more_indices], axis=-1)
  # Kept entries come first, so that position orders ties by index.
  best = _lax_indices(values, k)
  return jnp.take_along_axis(values, best, axis=-1), jnp.take_along_axis(indices, best, axis=-1)


def _with_one_zero(scores: jax.Array) -> jax.Array:
  """Turns -0.0 into 0.0, which lax.top_k ranks above it; compilers fold an addition of 0.0 away."""
  return jnp.where(scores == 0, jnp.zeros((), scores.dtype), scores)


def _lax_indices(scores: jax.Array, k: int) -> jax.Array:
  return jax.lax.top_k(_with_one_zero(scores), k)[1]


def _chunked_indices(scores: jax.Array, k: int) -> jax.Array:
  """Finds the indices among the k chunks with the largest maxima."""
  size = scores.shape[-1]
  # Both rounds order about sqrt(C k) numbers when chunks hold about sqrt(C / k).
  chunk = 2 ** round(math.log2(max(1.0, math.sqrt(size / k))))
  chunks = -(-size // chunk)
  if chunks <= k or chunk == 1:
    return _lax_indices(scores, k)
  padding = [(0, 0)] * (scores.ndim - 1) + [(0, chunks * chunk - size)]
  # Padding sits at the end, so it loses every tie against a real entry of -inf.
  padded = jnp.pad(scores, padding, constant_values=-jnp.inf) if chunks * chunk > size else scores
  grouped = padded.reshape(*scores.shape[:-1], chunks, chunk)
  # Kept chunks go back to ascending order, so that position orders ties by index.
  kept = jnp.sort(_lax_indices(grouped.max(axis=-1), k), axis=-1)
  candidates = jnp.take_along_axis(grouped, kept[..., None], axis=-2)
  winners = _lax_indices(candidates.reshape(*scores.shape[:-1], k * chunk), k)
  return jnp.take_along_axis(kept, winners // chunk, axis=-1) * chunk + winners % chunk


def _bitsearch_indices(scores: jax.Array, k: int) -> jax.Array:
  """Finds the indices from the k-th value, itself found bit by bit."""
  bits = jax.lax.bitcast_convert_type(_with_one_zero(scores.astype(jnp.float32)), jnp.uint32)
  # Larger floats have larger keys: flip all bits of negatives, the sign of the others.
  sign = jnp.uint32(_SIGN_BIT)
  keys = jnp.where(bits >= sign, ~bits, bits | sign)

  def set_bit(step: int, threshold: jax.Array) -> jax.Array:
    trial = threshold | (sign >> jax.lax.convert_element_type(step, jnp.uint32))
    enough = (keys >= trial[..., None]).sum(axis=-1, dtype=jnp.int32) >= k
    return jnp.where(enough, trial, threshold)

  threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(keys.shape[:-1], jnp.uint32))[..., None]
  above = keys > threshold
  room_for_ties = k - above.sum(axis=-1, keepdims=True, dtype=jnp.int32)
  equal = keys == threshold
  selected = above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room_for_ties))
  count = jnp.cumsum(selected, axis=-1, dtype=jnp.int32)
  # The j-th selected index is the number of places where fewer than j were counted.
  flat = count.reshape(-1, count.shape[-1])
  wanted = jnp.arange(1, k + 1, dtype=jnp.int32)
  found = jax.vmap(lambda row: jnp.searchsorted(row, wanted))(flat).astype(jnp.int32)
  found = found.reshape(*scores.shape[:-1], k)
  order = _lax_indices(jnp.take_along_axis(scores, found, axis=-1), k)
  return jnp.take_along_axis(found, order, axis=-1)
