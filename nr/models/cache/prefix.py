"""One copy of a prompt for all of its samples, and a suffix for each sample.

Attention to the prompt takes the queries of all samples as rows of one product, attention
to a sample's own suffix is that of a static cache, and their log-sum-exps join them
(Hydragen, arXiv:2402.05099, sections 3.1 and 3.2).
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from nr.models.cache import storage
from nr.models.cache.base import Cache, View
from nr.models.cache.static import KVCache, StaticView


class PrefixView(NamedTuple):
  """Attributes: suffix, the view of the suffixes; bool mask_PRS, what the rows of a prompt see of it."""

  suffix: StaticView
  mask_PRS: jax.Array

  def attend(self, query_BLHK, key_BLJK, value_BLJK, stored, layer):
    """See `View.attend`."""
    *own, prefix_keys, prefix_values = stored
    mixed, log_total, own = self.suffix.attend_parts(query_BLHK, key_BLJK, value_BLJK, tuple(own), layer)
    B, L, H, K = query_BLHK.shape
    query_PRHK = query_BLHK.reshape(self.mask_PRS.shape[0], -1, H, K)
    shared = (storage.read_layer(part, layer) for part in (prefix_keys, prefix_values))
    prefix_mixed, prefix_log_total = storage.attend(query_PRHK, *shared, self.mask_PRS)
    prefix = prefix_mixed.reshape(B, L, H, K), prefix_log_total.reshape(B, L, H)
    joined = storage.merge_attention(prefix, (mixed, log_total))
    return joined, (*own, prefix_keys, prefix_values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixCache(Cache):
  """Prompts that are stored once, and the rows that continue them.

  Row b continues prompt b // (B / P), always: rows move within their prompt only.

  Attributes:
    suffix: static cache of B rows.
    prefix_keys: storage of P prompts; see `Cache`.
    prefix_values: like `prefix_keys`.
    prefix_segment_ids_PS: int32, 0 where a slot of a prompt is empty or padding.
    prefix_length: int32, rows of the prompts, padding included: a scalar, or [P].
  """

  suffix: KVCache
  prefix_keys: Any
  prefix_values: Any
  prefix_segment_ids_PS: jax.Array
  prefix_length: jax.Array

  @property
  def keys(self) -> Any:
    """Keys of the suffixes."""
    return self.suffix.keys

  @property
  def values(self) -> Any:
    """Values of the suffixes."""
    return self.suffix.values

  @property
  def num_prompts(self) -> int:
    """Number of prompts P."""
    return self.prefix_segment_ids_PS.shape[0]

  def _per_row(self, leaf_P: jax.Array) -> jax.Array:
    """Repeats what belongs to prompts for their rows."""
    if leaf_P.ndim == 0:
      return leaf_P
    return jnp.repeat(leaf_P, self.suffix.segment_ids_BS.shape[0] // self.num_prompts, axis=0)

  @property
  def length(self) -> jax.Array:
    """Rows read, prompt and padding included: a scalar, or [B]."""
    return self._per_row(self.prefix_length) + self.suffix.length

  @property
  def capacity(self) -> int:
    """Number of slots for new rows."""
    return self.suffix.capacity

  def begin(self, positions_BL, segment_ids_BL, visible_BLL) -> tuple[Self, View]:
    """Marks the slots of L new rows in the suffixes."""
    suffix, view = self.suffix.begin(positions_BL, segment_ids_BL, visible_BLL)
    segment_ids_PR = segment_ids_BL.reshape(self.num_prompts, -1)
    mask_PRS = segment_ids_PR[:, :, None] == self.prefix_segment_ids_PS[:, None]
    return dataclasses.replace(self, suffix=suffix), PrefixView(view, mask_PRS)

  @property
  def stored(self) -> tuple:
    """Suffixes, then prefixes."""
    return *self.suffix.stored, self.prefix_keys, self.prefix_values

  def finish(self, stored: tuple, segment_ids_BL: jax.Array) -> Self:
    """Keeps what was written to the suffixes."""
    return dataclasses.replace(self, suffix=self.suffix.finish(stored[:2], segment_ids_BL))

  def count_tokens(self) -> jax.Array:
    """Returns int32 [B], how many real tokens each row holds, its prompt's included."""
    prompt_P = (self.prefix_segment_ids_PS != 0).sum(axis=1, dtype=jnp.int32)
    return self._per_row(prompt_P) + self.suffix.count_tokens()

  def take_rows(self, rows_B: jax.Array) -> Self:
    """Gathers suffixes; the number of rows a prompt may change, its rows must stay its own.

    Raises:
      ValueError: when the new rows do not divide evenly among the prompts or, where
        `rows_B` is concrete, a row would continue another prompt.
    """
    count, prompts = rows_B.shape[0], self.num_prompts
    if count % prompts:
      raise ValueError(f"rows_B has {count} rows for {prompts} shared prompts: give each prompt as many rows")
    if not isinstance(rows_B, jax.core.Tracer):
      its_prompt_B = rows_B // (self.suffix.segment_ids_BS.shape[0] // prompts)
      if bool((its_prompt_B != jnp.arange(count) // (count // prompts)).any()):
        raise ValueError(
          f"rows_B={list(map(int, rows_B))}: rows of a shared prefix stay with their prompt; "
          "use CacheSpec.layout='static' or 'paged' to move rows between prompts"
        )
    return dataclasses.replace(self, suffix=self.suffix.take_rows(rows_B))

  def rollback(self, length: jax.Array) -> Self:
    """Forgets everything from row `length` on; a shared prompt is never shortened."""
    own = jnp.maximum(jnp.asarray(length, jnp.int32) - self._per_row(self.prefix_length), 0)
    return dataclasses.replace(self, suffix=self.suffix.rollback(own))

  def keep_path(self, start_B: jax.Array, offsets_BA: jax.Array) -> Self:
    """Moves the entries of uneven suffixes; see `nr.models.cache.keep_path`."""
    own_B = start_B - self._per_row(self.prefix_length)
    return dataclasses.replace(self, suffix=self.suffix.keep_path(own_B, offsets_BA))

  def take_layers(self, start: int, stop: int) -> Self:
    """Returns the cache of blocks `start` to `stop` (exclusive)."""
    return dataclasses.replace(
      self,
      suffix=self.suffix.take_layers(start, stop),
      prefix_keys=storage.take_range(self.prefix_keys, start, stop),
      prefix_values=storage.take_range(self.prefix_values, start, stop),
    )

  def with_layers(self, pieces: list[Self]) -> Self:
    """Returns this cache with the blocks of all pieces, one after the other."""
    return dataclasses.replace(
      self,
      suffix=self.suffix.with_layers([piece.suffix for piece in pieces]),
      prefix_keys=storage.join([piece.prefix_keys for piece in pieces]),
      prefix_values=storage.join([piece.prefix_values for piece in pieces]),
    )


def share_prefix(cache: Cache, num_samples: int, prefix_capacity: int) -> PrefixCache:
  """Makes `num_samples` rows of each row of a static cache, which all read its one copy.

  Args:
    cache: static; nothing was written from slot `prefix_capacity` on.
    num_samples: rows a prompt; the rows of prompt p are p * num_samples and those behind it.
    prefix_capacity: slots that the prompts fill, padding included. The other slots
      are the suffix of each row.

  Raises:
    ValueError: when the cache is not static, or has no such slot.
  """
  if not isinstance(cache, KVCache):
    raise ValueError(f"cache is a {type(cache).__name__}: only a static one can be shared as a prefix")
  if not 0 < prefix_capacity < cache.capacity:
    raise ValueError(
      f"prefix_capacity={prefix_capacity}: give 1 to {cache.capacity - 1}, the cache's slots less one"
    )
  rows = cache.segment_ids_BS.shape[0] * num_samples
  axis = 3 if cache.is_stacked else 2
  batch_axis = axis - 2

  def cut(leaf: jax.Array) -> jax.Array:
    return jax.lax.slice_in_dim(leaf, 0, prefix_capacity, axis=axis)

  def empty(leaf: jax.Array) -> jax.Array:
    shape = list(leaf.shape)
    shape[batch_axis], shape[axis] = rows, cache.capacity - prefix_capacity
    return jnp.zeros(shape, leaf.dtype)

  suffix = KVCache(
    jax.tree.map(empty, cache.keys),
    jax.tree.map(empty, cache.values),
    jnp.zeros((rows, cache.capacity - prefix_capacity), jnp.int32),
    jnp.zeros((rows,) * cache.is_uneven, jnp.int32),
  )
  segment_ids_PS = cache.segment_ids_BS[:, :prefix_capacity]
  return PrefixCache(
    suffix, jax.tree.map(cut, cache.keys), jax.tree.map(cut, cache.values), segment_ids_PS, cache.length
  )
