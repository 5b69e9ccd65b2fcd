"""A slot for every token: the plain cache.

Either the rows of a batch share the next free slot, and a row that has nothing to put
there (left padding) marks the slot with segment 0, which nobody attends; or the cache
is uneven: every row has a free end of its own, as speculative decoding needs, padding
stands on the right and is overwritten by what comes next.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from nr.models.cache import storage
from nr.models.cache.base import Cache, View, visible_slots
from nr.models.cache.spec import CacheSpec


class StaticView(NamedTuple):
  """Attributes: slot of the first new row (scalar or [B]); bool mask_BLS of what is seen."""

  slot: jax.Array
  mask_BLS: jax.Array

  def attend(self, query_BLHK, key_BLJK, value_BLJK, stored, layer):
    """See `View.attend`."""
    mixed_BLHK, _, stored = self.attend_parts(query_BLHK, key_BLJK, value_BLJK, stored, layer)
    return mixed_BLHK, stored

  def attend_parts(self, query_BLHK, key_BLJK, value_BLJK, stored, layer):
    """As `attend`, with the log-sum-exp of the scores between the two results."""
    stored = tuple(
      storage.write_behind(old, storage.encode(new, old), self.slot, layer)
      for old, new in zip(stored, (key_BLJK, value_BLJK))
    )
    keys, values = (storage.read_layer(part, layer) for part in stored)
    mixed_BLHK, log_total_BLH = storage.attend(query_BLHK, keys, values, self.mask_BLS)
    return mixed_BLHK, log_total_BLH, stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(Cache):
  """Keys and values of the tokens seen so far, for a range of N blocks.

  Attributes:
    keys: [N, B, J, S, K] for stacked blocks, else a tuple of N arrays [B, J, S, K]
      (or `Int8Rows` of these shapes).
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

  def begin(self, positions_BL, segment_ids_BL, visible_BLL) -> tuple[Self, View]:
    """Marks the slots of L new rows."""
    segment_ids_BS = self._mark(segment_ids_BL)
    offsets = jnp.arange(self.capacity) - self.length[..., None]
    mask_BLS = visible_slots(segment_ids_BL, segment_ids_BS, offsets, visible_BLL)
    return dataclasses.replace(self, segment_ids_BS=segment_ids_BS), StaticView(self.length, mask_BLS)

  def _mark(self, segment_ids_BL: jax.Array) -> jax.Array:
    segment_ids_BL = segment_ids_BL.astype(jnp.int32)
    if self.is_uneven:
      place = _uneven_slots(self.length, segment_ids_BL.shape[1])
      return self.segment_ids_BS.at[place].set(segment_ids_BL, mode="drop")
    return jax.lax.dynamic_update_slice(self.segment_ids_BS, segment_ids_BL, (0, self.length))

  def count_tokens(self) -> jax.Array:
    """Returns int32 [B], how many real tokens each row holds."""
    return (self.segment_ids_BS != 0).sum(axis=1, dtype=jnp.int32)

  def take_rows(self, rows_B: jax.Array) -> Self:
    """Gathers batch rows."""
    return KVCache(
      storage.take_batch(self.keys, rows_B),
      storage.take_batch(self.values, rows_B),
      jnp.take(self.segment_ids_BS, rows_B, axis=0),
      jnp.take(self.length, rows_B, axis=0) if self.is_uneven else self.length,
    )

  def rollback(self, length: jax.Array) -> Self:
    """Forgets everything from slot `length` on; nothing is moved."""
    length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), self.length.shape)
    is_kept = jnp.arange(self.capacity) < length[..., None]
    segment_ids_BS = jnp.where(is_kept, self.segment_ids_BS, 0)
    return dataclasses.replace(self, segment_ids_BS=segment_ids_BS, length=length)

  def keep_path(self, start_B: jax.Array, offsets_BA: jax.Array) -> Self:
    """Moves the entries of an uneven cache; see `nr.models.cache.keep_path`."""
    batch_B1, slots_BA = _uneven_slots(start_B, offsets_BA.shape[1])
    source_BA = start_B[:, None] + offsets_BA
    moved_BA = self.segment_ids_BS[batch_B1, source_BA]
    return dataclasses.replace(
      self,
      keys=storage.move_slots(self.keys, source_BA, slots_BA),
      values=storage.move_slots(self.values, source_BA, slots_BA),
      segment_ids_BS=self.segment_ids_BS.at[batch_B1, slots_BA].set(moved_BA, mode="drop"),
    )


def _uneven_slots(slot_B: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
  """Returns the rows [B, 1] and the slots [B, L] of `length` new entries behind `slot_B`."""
  return jnp.arange(slot_B.shape[0])[:, None], slot_B[:, None] + jnp.arange(length)


def make_static(sizes: Any, spec: CacheSpec, dtype: Any, stacked: bool, uneven: bool) -> KVCache:
  """Makes an empty cache; `sizes` as in `nr.models.cache.make_cache`."""
  shape = (sizes.batch, sizes.num_kv_heads, sizes.capacity, sizes.head_dim)
  keys, values = (
    storage.empty_layers(sizes.num_layers, shape, dtype, spec.quantization, stacked) for _ in range(2)
  )
  segment_ids_BS = jnp.zeros((sizes.batch, sizes.capacity), jnp.int32)
  return KVCache(keys, values, segment_ids_BS, jnp.zeros((sizes.batch,) * uneven, jnp.int32))
