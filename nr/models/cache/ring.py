"""The last tokens only: a sliding window in a ring of slots.

Row t lies in slot t mod S, and a token sees itself and the window - 1 tokens before it,
by position; that equals a full cache with a window mask. Keys are stored rotated to
their absolute positions. With some slack the newest tokens can be taken back, because
what the window will need then has not been overwritten.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from nr.models.cache import storage
from nr.models.cache.base import Cache, View, visible_slots
from nr.models.cache.spec import CacheSpec


class RingView(NamedTuple):
  """How one run reads and writes a ring.

  Attributes:
    slots_BL: int32, where the new rows go; S for those that are not kept.
    mask_BLS: bool [B, L, S], or [B, L, S + L] before the new rows are written.
    is_written_first: whether the new rows push out nothing that they still see.
  """

  slots_BL: jax.Array
  mask_BLS: jax.Array
  is_written_first: bool

  def attend(self, query_BLHK, key_BLJK, value_BLJK, stored, layer):
    """See `View.attend`."""
    rows = [storage.encode(new, old) for old, new in zip(stored, (key_BLJK, value_BLJK))]
    written = tuple(self._write(old, new, layer) for old, new in zip(stored, rows))
    if self.is_written_first:
      seen = [storage.read_layer(part, layer) for part in written]
    else:
      held = [storage.read_layer(part, layer) for part in stored]
      seen = [jax.tree.map(_behind, old, new) for old, new in zip(held, rows)]
    return storage.attend(query_BLHK, *seen, self.mask_BLS)[0], written

  def _write(self, old: Any, new: Any, layer: jax.Array | None) -> Any:
    batch_B1 = jnp.arange(self.slots_BL.shape[0])[:, None]
    return storage.write_at(old, new, batch_B1, self.slots_BL, layer)


def _behind(old: jax.Array, new: jax.Array) -> jax.Array:
  return jnp.concatenate([old, new], axis=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache(Cache):
  """Keys and values of the last tokens, for a range of N blocks.

  Attributes:
    keys: storage of S slots; see `Cache`.
    values: like `keys`.
    segment_ids_BS: int32, 0 where a slot is empty or padding.
    positions_BS: int32, the token that a slot's row belongs to.
    num_tokens_B: int32, real rows read.
    length: int32, rows read; a scalar, or [B] in an uneven cache.
    window: tokens that a token sees, itself included.
    slack: tokens that may be taken back.
    rows_per_token: rows of a token.
  """

  keys: Any
  values: Any
  segment_ids_BS: jax.Array
  positions_BS: jax.Array
  num_tokens_B: jax.Array
  length: jax.Array
  window: int = dataclasses.field(metadata=dict(static=True))
  slack: int = dataclasses.field(metadata=dict(static=True))
  rows_per_token: int = dataclasses.field(metadata=dict(static=True))

  @property
  def capacity(self) -> int:
    """Number of slots S."""
    return self.segment_ids_BS.shape[1]

  def check_rows(self, length: int) -> None:
    """Any number of rows passes through a ring."""

  def _held_rows(self) -> jax.Array:
    """Returns int32 [S] or [B, S]: the row of each slot, counted from the next one; -1 is the newest."""
    newest = self.length[..., None] - 1
    return -1 - (newest - jnp.arange(self.capacity)) % self.capacity

  def begin(self, positions_BL, segment_ids_BL, visible_BLL) -> tuple[Self, View]:
    """Finds the slots of L new rows, and what the window leaves them."""
    batch, length = segment_ids_BL.shape
    if visible_BLL is not None and length > (self.slack + 1) * self.rows_per_token:
      raise ValueError(
        f"CacheSpec.slack={self.slack}: a tree of {length // self.rows_per_token} tokens needs a ring "
        f"with a slack of {length // self.rows_per_token - 1}"
      )
    is_kept_BL = jnp.ones((batch, length), bool) if not self.is_uneven else segment_ids_BL != 0
    count_B1 = is_kept_BL.sum(axis=1, dtype=jnp.int32, keepdims=True)
    is_kept_BL &= jnp.arange(length) >= count_B1 - self.capacity
    ring_BL = (self.length[..., None] + jnp.arange(length)) % self.capacity
    slots_BL = jnp.where(is_kept_BL, ring_BL, self.capacity)
    place = (jnp.arange(batch)[:, None], slots_BL)
    segment_ids_BS = self.segment_ids_BS.at[place].set(segment_ids_BL.astype(jnp.int32), mode="drop")
    positions_BS = self.positions_BS.at[place].set(positions_BL.astype(jnp.int32), mode="drop")
    is_written_first = length <= (self.slack + 1) * self.rows_per_token
    offsets_BS = jnp.broadcast_to(self._held_rows(), self.segment_ids_BS.shape)
    if is_written_first:
      new_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
      offsets_BS = offsets_BS.at[place].set(new_BL, mode="drop")
      seen = (segment_ids_BS, positions_BS, offsets_BS)
    else:
      new = (segment_ids_BL, positions_BL, jnp.broadcast_to(jnp.arange(length), (batch, length)))
      old = (self.segment_ids_BS, self.positions_BS, offsets_BS)
      seen = tuple(jnp.concatenate(pair, axis=1) for pair in zip(old, new))
    mask_BLS = visible_slots(segment_ids_BL, seen[0], seen[2], visible_BLL)
    mask_BLS &= positions_BL[:, :, None] - seen[1][:, None] < self.window
    num_tokens_B = self.num_tokens_B + (segment_ids_BL != 0).sum(axis=1, dtype=jnp.int32)
    cache = dataclasses.replace(
      self, segment_ids_BS=segment_ids_BS, positions_BS=positions_BS, num_tokens_B=num_tokens_B
    )
    return cache, RingView(slots_BL, mask_BLS, is_written_first)

  def count_tokens(self) -> jax.Array:
    """Returns int32 [B], how many real tokens each row has read."""
    return self.num_tokens_B

  def take_rows(self, rows_B: jax.Array) -> Self:
    """Gathers batch rows."""
    gathered = {
      name: jnp.take(getattr(self, name), rows_B, axis=0)
      for name in ("segment_ids_BS", "positions_BS", "num_tokens_B")
    }
    return dataclasses.replace(
      self,
      keys=storage.take_batch(self.keys, rows_B),
      values=storage.take_batch(self.values, rows_B),
      length=jnp.take(self.length, rows_B, axis=0) if self.is_uneven else self.length,
      **gathered,
    )

  def _check_slack(self, what: str) -> None:
    if self.slack == 0:
      raise ValueError(
        f"CacheSpec.slack=0: a ring without slack cannot {what}; set slack to the most tokens taken back"
      )

  def rollback(self, length: jax.Array) -> Self:
    """Forgets everything from row `length` on; exact up to `slack` tokens.

    Raises:
      ValueError: when the ring has no slack.
    """
    self._check_slack("roll back")
    length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), self.length.shape)
    is_forgotten_BS = self.length[..., None] + self._held_rows() >= length[..., None]
    num_forgotten_B = (is_forgotten_BS & (self.segment_ids_BS != 0)).sum(axis=1, dtype=jnp.int32)
    return dataclasses.replace(
      self,
      segment_ids_BS=jnp.where(is_forgotten_BS, 0, self.segment_ids_BS),
      num_tokens_B=self.num_tokens_B - num_forgotten_B,
      length=length,
    )

  def keep_path(self, start_B: jax.Array, offsets_BA: jax.Array) -> Self:
    """Moves the entries of an uneven cache; see `nr.models.cache.keep_path`."""
    self._check_slack("keep a path of a tree")
    source_BA = (start_B[:, None] + offsets_BA) % self.capacity
    target_BA = (start_B[:, None] + jnp.arange(offsets_BA.shape[1])) % self.capacity
    batch_B1 = jnp.arange(start_B.shape[0])[:, None]

    def move(leaf_BS: jax.Array) -> jax.Array:
      return leaf_BS.at[batch_B1, target_BA].set(leaf_BS[batch_B1, source_BA])

    return dataclasses.replace(
      self,
      keys=storage.move_slots(self.keys, source_BA, target_BA),
      values=storage.move_slots(self.values, source_BA, target_BA),
      segment_ids_BS=move(self.segment_ids_BS),
      positions_BS=move(self.positions_BS),
    )


def make_ring(sizes: Any, spec: CacheSpec, dtype: Any, stacked: bool, uneven: bool) -> RingCache:
  """Makes an empty ring of window + slack tokens, whatever the capacity asked for."""
  slots = sizes.rows_per_token * (spec.window + spec.slack)
  shape = (sizes.batch, sizes.num_kv_heads, slots, sizes.head_dim)
  keys, values = (
    storage.empty_layers(sizes.num_layers, shape, dtype, spec.quantization, stacked) for _ in range(2)
  )
  segment_ids_BS, positions_BS = (jnp.zeros((sizes.batch, slots), jnp.int32) for _ in range(2))
  length = jnp.zeros((sizes.batch,) * uneven, jnp.int32)
  fixed = (spec.window, spec.slack, sizes.rows_per_token)
  return RingCache(
    keys, values, segment_ids_BS, positions_BS, jnp.zeros(sizes.batch, jnp.int32), length, *fixed
  )
