"""What every cache layout is to a model: rows begin, blocks attend, rows are kept."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from nr.models.cache import storage


class View:
  """How the blocks of one run read and write a cache; made once before the blocks."""

  def attend(
    self,
    query_BLHK: jax.Array,
    key_BLJK: jax.Array,
    value_BLJK: jax.Array,
    stored: tuple,
    layer: jax.Array | None,
  ) -> tuple[jax.Array, tuple]:
    """Stores the new keys and values of one block and attends to what its queries see.

    Args:
      query_BLHK: rotated queries of the new rows.
      key_BLJK: rotated keys.
      value_BLJK: values.
      stored: parts of `Cache.stored` of this block or, with `layer`, of all.
      layer: index into stacked storage.

    Returns:
      The output [B, L, H, K] (finite and meaningless at padding) and `stored`, extended.
    """
    raise NotImplementedError


class Cache:
  """Base of the layouts: frozen dataclasses that are pytrees.

  Attributes:
    keys: storage of N blocks, [N, B, J, S, K] or a tuple of N; see `storage`.
    values: like `keys`.
    length: int32, how many rows were read, padding included: a scalar that all
      rows of the batch share, or [B] in an uneven cache.
  """

  keys: Any
  values: Any
  length: jax.Array

  @property
  def is_uneven(self) -> bool:
    """Whether every row has a free end of its own."""
    return self.length.ndim == 1

  @property
  def num_layers(self) -> int:
    """Number N of blocks."""
    return storage.num_layers(self.keys)

  @property
  def is_stacked(self) -> bool:
    """Whether the blocks are stacked."""
    return storage.is_stacked(self.keys)

  @property
  def capacity(self) -> int:
    """Number of rows that fit, or that are kept."""
    raise NotImplementedError

  def check_rows(self, length: int) -> None:
    """Raises ValueError if L new rows fit in no cache of this size."""
    if length > self.capacity:
      raise ValueError(f"cache has {self.capacity} slots: {length} rows need a longer one")

  def begin(
    self, positions_BL: jax.Array, segment_ids_BL: jax.Array, visible_BLL: jax.Array | None
  ) -> tuple[Self, View]:
    """Makes room for L new rows; see `nr.models.attention.AttentionInputs`."""
    raise NotImplementedError

  @property
  def stored(self) -> tuple:
    """What the blocks carry: a tuple of storages of N blocks."""
    return self.keys, self.values

  def finish(self, stored: tuple, segment_ids_BL: jax.Array) -> Self:
    """Returns the cache after the blocks have written L new rows."""
    keys, values = stored
    return dataclasses.replace(self, keys=keys, values=values, length=advance(self.length, segment_ids_BL))

  def count_tokens(self) -> jax.Array:
    """Returns int32 [B], how many real tokens each row holds: the next token's position."""
    raise NotImplementedError

  def take_rows(self, rows_B: jax.Array) -> Self:
    """Returns a cache whose row b continues row `rows_B[b]`; any number of rows."""
    raise NotImplementedError

  def rollback(self, length: jax.Array) -> Self:
    """Forgets everything from row `length` on (scalar, or [B] for an uneven cache)."""
    raise NotImplementedError

  def keep_path(self, start_B: jax.Array, offsets_BA: jax.Array) -> Self:
    """Moves the rows at `start_B + offsets_BA` to the A places from `start_B` on."""
    raise NotImplementedError

  def take_layers(self, start: int, stop: int) -> Self:
    """Returns the cache of blocks `start` to `stop` (exclusive)."""
    keys, values = (storage.take_range(part, start, stop) for part in (self.keys, self.values))
    return dataclasses.replace(self, keys=keys, values=values)

  def with_layers(self, pieces: list[Self]) -> Self:
    """Returns this cache with the blocks of all pieces, one after the other."""
    keys = storage.join([piece.keys for piece in pieces])
    return dataclasses.replace(self, keys=keys, values=storage.join([piece.values for piece in pieces]))


def advance(length: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
  """Returns the free end after new rows; padding on the right of an uneven cache takes no slot."""
  if length.ndim == 1:
    return length + (segment_ids_BL != 0).sum(axis=1, dtype=jnp.int32)
  return length + segment_ids_BL.shape[1]


def visible_slots(
  segment_ids_BL: jax.Array,
  slot_segment_ids_BS: jax.Array,
  offsets: jax.Array,
  visible_BLL: jax.Array | None = None,
) -> jax.Array:
  """Returns bool [B, L, S]: which slots L new rows may see.

  Args:
    segment_ids_BL: int32, of the new rows.
    slot_segment_ids_BS: int32, of the slots, the new rows written.
    offsets: int32 [S] or [B, S], which row a slot holds, counted from the first
      new one; negative for earlier rows.
    visible_BLL: which new rows each new row sees; see `AttentionInputs`.
  """
  length = segment_ids_BL.shape[1]
  if visible_BLL is None:
    is_earlier = offsets[..., None, :] <= jnp.arange(length)[:, None]
  else:
    batch = segment_ids_BL.shape[0]
    offsets_BS = jnp.broadcast_to(offsets, (batch, offsets.shape[-1]))
    visible_BLL = jnp.broadcast_to(visible_BLL, (batch, length, length))
    nearest_BLS = jnp.broadcast_to(
      jnp.clip(offsets_BS, 0, length - 1)[:, None], (batch, length, offsets_BS.shape[1])
    )
    seen_BLS = jnp.take_along_axis(visible_BLL, nearest_BLS, axis=2)
    is_new_BLS = ((offsets_BS >= 0) & (offsets_BS < length))[:, None]
    is_earlier = jnp.where(is_new_BLS, seen_BLS, (offsets_BS < 0)[:, None])
  return is_earlier & (segment_ids_BL[:, :, None] == slot_segment_ids_BS[:, None, :])
