"""The largest entries of a whole batch, exactly, without bringing the batch together.

BatchTopK (arXiv 2412.06410) keeps the B * k largest activations of a batch, wherever they are. The
smallest of them is found by binary search over the bits of a float: bits of non-negative floats, read as
integers, have their order. Each of the 31 passes counts entries, and counts of shards are summed: on a mesh
no entry travels, and the result is that of one device. Among equal entries the first of the flattened
batch are kept, as a sort would.

Arrays: N tokens, C latents.
"""

import jax
import jax.numpy as jnp

from nr.models.partitioning import shard_count

_HALF = 256


def keep_largest(values_NC: jax.Array, count: jax.Array | int) -> tuple[jax.Array, jax.Array]:
  """Keeps the `count` largest positive entries of a whole array and sets the others to 0.

  Gradients reach the kept entries; the choice itself is not differentiated.

  Args:
    values_NC: float32; entries that are not positive are never kept.
    count: int32, how many; fewer are kept where fewer are positive.

  Returns:
    the kept values [N, C]; the smallest kept value, infinite where none is.
  """
  fixed_NC = jax.lax.stop_gradient(values_NC).astype(jnp.float32)
  # Bits of positive floats; everything else counts as zero and is never kept.
  keys_NC = jnp.where(fixed_NC > 0, jax.lax.bitcast_convert_type(fixed_NC, jnp.int32), 0)
  threshold = _kth_largest(keys_NC, jnp.asarray(count, jnp.int32))
  above_NC = keys_NC > threshold
  tied_NC = (keys_NC == threshold) & (keys_NC > 0)
  room = count - above_NC.sum(dtype=jnp.int32)
  kept_NC = jax.lax.cond(
    tied_NC.sum(dtype=jnp.int32) > room,
    lambda: above_NC | (tied_NC & (_ranks(tied_NC) <= room)),
    lambda: above_NC | tied_NC,
  )
  smallest = jnp.min(jnp.where(kept_NC, fixed_NC, jnp.inf))
  return jnp.where(kept_NC, values_NC, 0), smallest


def _kth_largest(keys_NC: jax.Array, count: jax.Array) -> jax.Array:
  """Returns the largest key that at least `count` keys reach, 0 where there are not so many."""

  def set_bit(step: jax.Array, threshold: jax.Array) -> jax.Array:
    trial = threshold | (jnp.int32(1 << 30) >> step.astype(jnp.int32))
    return jnp.where(_reaches(keys_NC >= trial, count), trial, threshold)

  return jax.lax.fori_loop(0, 31, set_bit, jnp.int32(0))


def _reaches(marked_NC: jax.Array, count: jax.Array) -> jax.Array:
  """Says whether at least `count` entries are marked, in 32-bit integers.

  A large batch of a large dictionary has more than 2**31 entries, so the sum over
  tokens is kept in two parts.
  """
  marked_N = marked_NC.sum(-1, dtype=jnp.int32)
  low = (marked_N % _HALF).sum(dtype=jnp.int32)
  high = (marked_N // _HALF).sum(dtype=jnp.int32) + low // _HALF
  wanted_high, wanted_low = count // _HALF, count % _HALF
  return (high > wanted_high) | ((high == wanted_high) & (low % _HALF >= wanted_low))


def _ranks(marked_NC: jax.Array) -> jax.Array:
  """Numbers the marked entries in the order of the flattened array, from 1.

  Entries are counted within each shard of the latents; only the totals of shards are shared.
  """
  tokens, latents = marked_NC.shape
  shards = shard_count("activation_latents")
  shards = shards if latents % shards == 0 else 1
  within_NSC = jnp.cumsum(marked_NC.reshape(tokens, shards, -1), axis=-1, dtype=jnp.int32)
  totals = within_NSC[..., -1].reshape(-1)
  before_NS = (jnp.cumsum(totals, dtype=jnp.int32) - totals).reshape(tokens, shards, 1)
  return (before_NS + within_NSC).reshape(tokens, latents)
