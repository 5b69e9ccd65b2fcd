"""Key-value caches of fixed size, and their updates.

A cache covers a range of blocks and is an argument and a result of every call
that extends it. Rows of a batch share the next free slot; a row that has nothing
to put there (left padding) marks the slot with segment 0, and nobody attends it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
  """Keys and values of the tokens seen so far, for a range of N blocks.

  Attributes:
    keys: [N, B, S, J, K] for stacked blocks, else a tuple of N arrays [B, S, J, K].
    values: like `keys`.
    segment_ids_BS: int32, 0 where a slot is empty or padding.
    length: int32 scalar, the next free slot. Writing beyond S slots is an error
      that compiled code cannot report: allocate enough.
  """

  keys: Any
  values: Any
  segment_ids_BS: jax.Array
  length: jax.Array

  @property
  def capacity(self) -> int:
    """Number of slots S."""
    return self.segment_ids_BS.shape[1]


def make_cache(
  num_layers: int,
  batch: int,
  capacity: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: Any,
  stacked: bool,
) -> KVCache:
  """Makes an empty cache of `capacity` slots for `num_layers` blocks."""
  shape = (batch, capacity, num_kv_heads, head_dim)
  if stacked:
    keys, values = (jnp.zeros((num_layers, *shape), dtype) for _ in range(2))
  else:
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for _ in range(2))
  return KVCache(keys, values, jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((), jnp.int32))


def write_rows(
  stored: jax.Array,
  rows_BLJK: jax.Array,
  slot: jax.Array,
  layer: jax.Array | None,
) -> jax.Array:
  """Writes new rows at `slot`, into one layer of a stacked array when `layer` is given."""
  rows_BLJK = rows_BLJK.astype(stored.dtype)
  if layer is None:
    return jax.lax.dynamic_update_slice(stored, rows_BLJK, (0, slot, 0, 0))
  return jax.lax.dynamic_update_slice(stored, rows_BLJK[None], (layer, 0, slot, 0, 0))


def read_layer(stored: jax.Array, layer: jax.Array | None) -> jax.Array:
  """Returns the [B, S, J, K] of one layer."""
  if layer is None:
    return stored
  return jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False)


def mark_rows(cache: KVCache, segment_ids_BL: jax.Array) -> jax.Array:
  """Returns the slots' segment ids with those of L new rows written at the free end."""
  segment_ids_BL = segment_ids_BL.astype(jnp.int32)
  return jax.lax.dynamic_update_slice(cache.segment_ids_BS, segment_ids_BL, (0, cache.length))


def take_rows(cache: KVCache, rows_B: jax.Array) -> KVCache:
  """Gathers batch rows (beams that survive, a prefill shared by several samples).

  Args:
    cache: any cache.
    rows_B: int32, the row of `cache` that each new row continues; any number.
  """

  def take(stored: jax.Array) -> jax.Array:
    return jnp.take(stored, rows_B, axis=stored.ndim - 4)

  return KVCache(
    jax.tree.map(take, cache.keys),
    jax.tree.map(take, cache.values),
    jnp.take(cache.segment_ids_BS, rows_B, axis=0),
    cache.length,
  )


def count_tokens(cache: KVCache) -> jax.Array:
  """Returns int32 [B], how many real tokens each row holds: the next token's position."""
  return (cache.segment_ids_BS != 0).sum(axis=1, dtype=jnp.int32)
