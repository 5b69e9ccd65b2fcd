"""Key-value caches: what every layout offers, and how one is made.

A cache covers a range of blocks and is an argument and a result of every call that
extends it. `CacheSpec.layout` chooses how it keeps rows; models and decoders treat all
layouts alike, through the functions here.
"""

from typing import Any, NamedTuple

import jax

from nr.models.cache.base import Cache
from nr.models.cache.paged import PagedCache, make_paged
from nr.models.cache.prefix import PrefixCache, share_prefix
from nr.models.cache.ring import RingCache, make_ring
from nr.models.cache.spec import CacheSpec
from nr.models.cache.static import KVCache, make_static

__all__ = [
  "Cache",
  "CacheSizes",
  "CacheSpec",
  "KVCache",
  "PagedCache",
  "PrefixCache",
  "RingCache",
  "count_tokens",
  "join_layers",
  "keep_path",
  "make_cache",
  "rollback",
  "share_prefix",
  "take_layers",
  "take_rows",
]


class CacheSizes(NamedTuple):
  """Sizes of a cache.

  Attributes:
    num_layers: blocks N.
    batch: rows B.
    capacity: slots of a row, padding included.
    num_kv_heads: heads J.
    head_dim: size K of a head.
    rows_per_token: rows of a token in these blocks; windows and pages count tokens.
  """

  num_layers: int
  batch: int
  capacity: int
  num_kv_heads: int
  head_dim: int
  rows_per_token: int = 1


def make_cache(
  sizes: CacheSizes, dtype: Any, stacked: bool, uneven: bool = False, layout: CacheSpec | None = None
) -> Cache:
  """Makes an empty cache.

  Args:
    sizes: what it must hold.
    dtype: storage type of what is not quantised, unless `layout` names one.
    stacked: whether the blocks are stacked.
    uneven: whether every row has a free end of its own.
    layout: static when None.

  Raises:
    ValueError: when the layout exists for uneven rows only.
  """
  layout = CacheSpec() if layout is None else layout
  if layout.is_always_uneven and not uneven:
    raise ValueError(
      f"CacheSpec.layout={layout.layout!r}: every row has a free end of its own; pass uneven=True"
    )
  return _MAKERS[layout.layout](sizes, layout, layout.dtype or dtype, stacked, uneven)


# A prefix is shared once it has been read, see `share_prefix`; until then the cache is static.
_MAKERS = {"static": make_static, "ring": make_ring, "shared_prefix": make_static, "paged": make_paged}


def take_rows(cache: Cache, rows_B: jax.Array) -> Cache:
  """Gathers batch rows (beams that survive, a prefill shared by several samples).

  Args:
    cache: any cache.
    rows_B: int32, the row of `cache` that each new row continues; any number.
  """
  return cache.take_rows(rows_B)


def rollback(cache: Cache, length: jax.Array) -> Cache:
  """Forgets everything from row `length` on (scalar, or [B] for an uneven cache)."""
  return cache.rollback(length)


def keep_path(cache: Cache, start_B: jax.Array, offsets_BA: jax.Array) -> Cache:
  """Moves the entries at `start_B + offsets_BA` to the A places from `start_B` on.

  After a tree of drafts was read, this keeps one path of it. Roll back to the end
  of the path afterwards.

  Args:
    cache: an uneven cache.
    start_B: int32, the first row of the tree.
    offsets_BA: int32, increasing along A: where the path's entries are in the tree.
  """
  return cache.keep_path(start_B, offsets_BA)


def count_tokens(cache: Cache) -> jax.Array:
  """Returns int32 [B], how many real tokens each row holds: the next token's position."""
  return cache.count_tokens()


def take_layers(cache: Cache, start: int, stop: int) -> Cache:
  """Returns the cache of blocks `start` to `stop` (exclusive) of a cache of all blocks."""
  return cache.take_layers(start, stop)


def join_layers(pieces: list[Cache]) -> Cache:
  """Puts caches of consecutive blocks together; inverse of `take_layers`."""
  return pieces[-1].with_layers(pieces)
