"""Key-value caches of fixed size, and their updates.

A cache covers a range of blocks and is an argument and a result of every call
that extends it. Either the rows of a batch share the next free slot, and a row that
has nothing to put there (left padding) marks the slot with segment 0, which nobody
attends; or the cache is uneven: every row has a free end of its own, as speculative
decoding needs, padding stands on the right and is overwritten by what comes next.
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
    length: int32, the next free slot: a scalar that all rows share, or [B] in an
      uneven cache. Writing beyond S slots is an error that compiled code cannot
      report: allocate enough.
  """

  keys: Any
  values: Any
  segment_ids_BS: jax.Array
  length: jax.Array

  @property
  def capacity(self) -> int:
    """Number of slots S."""
    return self.segment_ids_BS.shape[1]

  @property
  def is_uneven(self) -> bool:
    """Whether every row has a free end of its own."""
    return self.length.ndim == 1


def make_cache(
  num_layers: int,
  batch: int,
  capacity: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: Any,
  stacked: bool,
  uneven: bool = False,
) -> KVCache:
  """Makes an empty cache of `capacity` slots for `num_layers` blocks; see `KVCache` for `uneven`."""
  shape = (batch, capacity, num_kv_heads, head_dim)
  if stacked:
    keys, values = (jnp.zeros((num_layers, *shape), dtype) for _ in range(2))
  else:
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for _ in range(2))
  return KVCache(keys, values, jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((batch,) * uneven, jnp.int32))


def write_rows(
  stored: jax.Array,
  rows_BLJK: jax.Array,
  slot: jax.Array,
  layer: jax.Array | None,
) -> jax.Array:
  """Writes new rows at `slot` (scalar or [B]), into one layer of a stacked array when `layer` is given."""
  rows_BLJK = rows_BLJK.astype(stored.dtype)
  if slot.ndim == 1:
    batch_B1, slots_BL = _uneven_slots(slot, rows_BLJK.shape[1])
    place = (batch_B1, slots_BL) if layer is None else (layer, batch_B1, slots_BL)
    return stored.at[place].set(rows_BLJK, mode="drop")
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
  if cache.is_uneven:
    place = _uneven_slots(cache.length, segment_ids_BL.shape[1])
    return cache.segment_ids_BS.at[place].set(segment_ids_BL, mode="drop")
  return jax.lax.dynamic_update_slice(cache.segment_ids_BS, segment_ids_BL, (0, cache.length))


def _uneven_slots(slot_B: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
  """Returns the rows [B, 1] and the slots [B, L] of `length` new entries behind `slot_B`."""
  return jnp.arange(slot_B.shape[0])[:, None], slot_B[:, None] + jnp.arange(length)


def advance(length: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
  """Returns the free end after new rows; padding on the right of an uneven cache takes no slot."""
  if length.ndim == 1:
    return length + (segment_ids_BL != 0).sum(axis=1, dtype=jnp.int32)
  return length + segment_ids_BL.shape[1]


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
    jnp.take(cache.length, rows_B, axis=0) if cache.is_uneven else cache.length,
  )


def rollback(cache: KVCache, length: jax.Array) -> KVCache:
  """Forgets everything from slot `length` on (scalar, or [B] for an uneven cache); nothing is moved."""
  length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), cache.length.shape)
  is_kept = jnp.arange(cache.capacity) < length[..., None]
  return cache._replace(segment_ids_BS=jnp.where(is_kept, cache.segment_ids_BS, 0), length=length)


def keep_path(cache: KVCache, start_B: jax.Array, offsets_BA: jax.Array) -> KVCache:
  """Moves the entries at `start_B + offsets_BA` to the A slots from `start_B` on.

  After a tree of drafts was read, this keeps one path of it. Roll back to the end
  of the path afterwards.

  Args:
    cache: an uneven cache.
    start_B: int32, the first slot of the tree.
    offsets_BA: int32, increasing along A: where the path's entries are in the tree.
  """
  batch_B1, slots_BA = _uneven_slots(start_B, offsets_BA.shape[1])
  source_BA = start_B[:, None] + offsets_BA

  def move(stored: jax.Array) -> jax.Array:
    if stored.ndim == 5:
      return stored.at[:, batch_B1, slots_BA].set(stored[:, batch_B1, source_BA], mode="drop")
    return stored.at[batch_B1, slots_BA].set(stored[batch_B1, source_BA], mode="drop")

  return cache._replace(
    keys=jax.tree.map(move, cache.keys),
    values=jax.tree.map(move, cache.values),
    segment_ids_BS=move(cache.segment_ids_BS),
  )


def count_tokens(cache: KVCache) -> jax.Array:
  """Returns int32 [B], how many real tokens each row holds: the next token's position."""
  return (cache.segment_ids_BS != 0).sum(axis=1, dtype=jnp.int32)


def take_layers(cache: KVCache, start: int, stop: int) -> KVCache:
  """Returns the cache of blocks `start` to `stop` (exclusive) of a cache of all blocks."""
  return cache._replace(keys=cache.keys[start:stop], values=cache.values[start:stop])


def join_layers(pieces: list[KVCache]) -> KVCache:
  """Puts caches of consecutive blocks together; inverse of `take_layers`."""

  def join(parts: list[Any]) -> Any:
    return jnp.concatenate(parts) if isinstance(parts[0], jax.Array) else tuple(layer for part in parts for layer in part)

  keys, values = join([piece.keys for piece in pieces]), join([piece.values for piece in pieces])
  return pieces[-1]._replace(keys=keys, values=values)
