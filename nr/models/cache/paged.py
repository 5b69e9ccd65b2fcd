"""Pages of tokens that rows share: forks copy page numbers, not keys and values.

A row's tokens lie in the pages that its page table names. A fork copies the table and
counts one more reference to each page; who writes to a page that others see copies it
first, so only the last, partly filled page of a row is ever copied. A page that no row
refers to is free. Everything is on the device, with static shapes.

This is the reference path: attention gathers a row's pages. JAX has kernels that do
not (`jax.experimental.pallas.ops.tpu.paged_attention`, `.ragged_paged_attention`,
`...ops.gpu.paged_attention`); they would take the place of `PagedView.attend`.
Scheme: arXiv:2309.06180, sections 4.2 to 4.4; code our own.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from nr.models.cache import storage
from nr.models.cache.base import Cache, View, visible_slots
from nr.models.cache.spec import CacheSpec


class PagedView(NamedTuple):
  """How one run reads and writes pages.

  Attributes:
    pages_BL: int32, the page of each new row; out of range for those that are not kept.
    slots_BL: int32, the place in its page.
    table_BP: int32, each row's pages, some in-range page where it has none.
    mask_BLS: bool, which of the P * page_size places are seen.
    has_failed_B: rows for which there was no page.
  """

  pages_BL: jax.Array
  slots_BL: jax.Array
  table_BP: jax.Array
  mask_BLS: jax.Array
  has_failed_B: jax.Array

  def attend(self, query_BLHK, key_BLJK, value_BLJK, stored, layer):
    """See `View.attend`; rows without a page come out as NaN."""
    stored = tuple(
      storage.write_at(old, storage.encode(new, old), self.pages_BL, self.slots_BL, layer)
      for old, new in zip(stored, (key_BLJK, value_BLJK))
    )
    keys, values = (jax.tree.map(lambda leaf: self._gather(leaf, layer), part) for part in stored)
    # What stands in unseen places may be another row's NaN, which a weight of 0 would not undo.
    is_seen_BS = self.mask_BLS.any(axis=1)
    values = jax.tree.map(lambda leaf: jnp.where(_over(is_seen_BS, leaf), leaf, 0), values)
    mixed_BLHK, _ = storage.attend(query_BLHK, keys, values, self.mask_BLS)
    return jnp.where(self.has_failed_B[:, None, None, None], jnp.nan, mixed_BLHK), stored

  def _gather(self, leaf: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Returns [B, J, P * page_size, ...] of one block."""
    pages = leaf[self.table_BP] if layer is None else leaf[layer, self.table_BP]
    pages = jnp.moveaxis(pages, 1, 2)
    return pages.reshape(*pages.shape[:2], -1, *pages.shape[4:])


def _over(is_seen_BS: jax.Array, leaf: jax.Array) -> jax.Array:
  """Gives [B, S] the axes of a leaf [B, J, S, ...]."""
  return is_seen_BS.reshape(is_seen_BS.shape[0], 1, -1, *(1,) * (leaf.ndim - 3))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache(Cache):
  """Keys and values in pages; always uneven: padding stands on the right and takes no place.

  Attributes:
    keys: storage [pages, J, page_size, K], for N blocks; see `Cache`.
    values: like `keys`.
    table_BP: int32, the page of each run of page_size tokens of a row; the number of
      pages where there is none.
    references: int32 [pages], how often the table names a page; 0: free.
    length: int32 [B], tokens read.
    has_failed_B: bool, rows that found no free page. Their outputs are NaN from then
      on; nothing else is harmed. Give `CacheSpec.num_pages` more.
  """

  keys: Any
  values: Any
  table_BP: jax.Array
  references: jax.Array
  length: jax.Array
  has_failed_B: jax.Array

  @property
  def num_pages(self) -> int:
    """Number of pages, and the number that stands for no page."""
    return self.references.shape[0]

  @property
  def page_size(self) -> int:
    """Rows of a page."""
    return jax.tree.leaves(self.keys)[0].shape[3 if self.is_stacked else 2]

  @property
  def capacity(self) -> int:
    """Number of rows that a page table has room for."""
    return self.table_BP.shape[1] * self.page_size

  def _pages_of(self, length_B: jax.Array) -> jax.Array:
    """Returns how many pages that many rows take."""
    return -(-length_B // self.page_size)

  def begin(self, positions_BL, segment_ids_BL, visible_BLL) -> tuple[Self, View]:
    """Gives pages to L new rows, copying a last page that others see."""
    is_new_BL = segment_ids_BL != 0
    cache = self._allocated(is_new_BL.sum(axis=1, dtype=jnp.int32), is_new_BL.shape[1])
    places_BL = self.length[:, None] + jnp.arange(is_new_BL.shape[1])
    numbers_BL = jnp.minimum(places_BL // self.page_size, self.table_BP.shape[1] - 1)
    pages_BL = jnp.take_along_axis(cache.table_BP, numbers_BL, axis=1)
    is_kept_BL = is_new_BL & (places_BL < self.capacity)
    # Row order is place order; what lies beyond the free end belongs to nobody.
    offsets_BS = jnp.arange(self.capacity) - self.length[:, None]
    is_used_BS = offsets_BS < is_new_BL.sum(axis=1, keepdims=True)
    mask_BLS = visible_slots(
      is_new_BL.astype(jnp.int32), is_used_BS.astype(jnp.int32), offsets_BS, visible_BLL
    )
    view = PagedView(
      jnp.where(is_kept_BL, pages_BL, self.num_pages),
      places_BL % self.page_size,
      jnp.minimum(cache.table_BP, self.num_pages - 1),
      mask_BLS,
      cache.has_failed_B,
    )
    return cache, view

  def _allocated(self, count_B: jax.Array, most: int) -> Self:
    """Returns the cache with pages for `count_B` (at most `most`) more rows, all its own."""
    batch, table_size = self.table_BP.shape
    held_B = self._pages_of(self.length)
    needed_B = self._pages_of(self.length + count_B)
    last_B = jnp.clip(held_B - 1, 0, table_size - 1)
    old_B = jnp.take_along_axis(self.table_BP, last_B[:, None], axis=1)[:, 0]
    is_shared_B = self.references.at[old_B].get(mode="fill", fill_value=0) > 1
    is_copied_B = (count_B > 0) & (self.length % self.page_size != 0) & is_shared_B
    # Wanted places of the table: the last page if it is to be copied, then new ones.
    new_BM = held_B[:, None] + jnp.arange(-(-most // self.page_size))
    numbers_BM = jnp.concatenate([last_B[:, None], new_BM], axis=1)
    is_wanted_BM = jnp.concatenate([is_copied_B[:, None], new_BM < needed_B[:, None]], axis=1)
    rank_BM = jnp.cumsum(is_wanted_BM.reshape(-1)).reshape(is_wanted_BM.shape) - 1
    free = jnp.nonzero(self.references == 0, size=is_wanted_BM.size, fill_value=self.num_pages)[0]
    page_BM = jnp.where(is_wanted_BM, free[rank_BM], self.num_pages).astype(jnp.int32)
    is_missing_B = (is_wanted_BM & (page_BM == self.num_pages)).any(axis=1) | (needed_B > table_size)
    table_BP = self.table_BP.at[
      jnp.arange(batch)[:, None], jnp.where(is_wanted_BM, numbers_BM, table_size)
    ].set(page_BM, mode="drop")
    references = self.references.at[page_BM].add(1, mode="drop")
    left_B = jnp.where(is_copied_B, old_B, self.num_pages)
    references = references.at[left_B].add(-1, mode="drop")
    copied = self._copied(old_B, page_BM[:, 0], is_copied_B.any())
    has_failed_B = self.has_failed_B | is_missing_B
    return dataclasses.replace(copied, table_BP=table_BP, references=references, has_failed_B=has_failed_B)

  def _copied(self, old_B: jax.Array, new_B: jax.Array, is_needed: jax.Array) -> Self:
    """Copies pages in every block; a new page out of range is none."""
    before = (slice(None),) if self.is_stacked else ()

    def copy(leaf: jax.Array) -> jax.Array:
      return leaf.at[(*before, new_B)].set(leaf[(*before, old_B)], mode="drop")

    both = (self.keys, self.values)
    keys, values = jax.lax.cond(is_needed, lambda both: jax.tree.map(copy, both), lambda both: both, both)
    return dataclasses.replace(self, keys=keys, values=values)

  def count_tokens(self) -> jax.Array:
    """Returns int32 [B], how many tokens each row holds."""
    return self.length

  def _counted(self, table_BP: jax.Array) -> jax.Array:
    """Returns int32 [pages], how often a table names each page."""
    return jnp.zeros_like(self.references).at[table_BP].add(1, mode="drop")

  def take_rows(self, rows_B: jax.Array) -> Self:
    """Copies page tables; keys and values stay where they are."""
    table_BP = jnp.take(self.table_BP, rows_B, axis=0)
    return dataclasses.replace(
      self,
      table_BP=table_BP,
      references=self.references + self._counted(table_BP) - self._counted(self.table_BP),
      length=jnp.take(self.length, rows_B, axis=0),
      has_failed_B=jnp.take(self.has_failed_B, rows_B, axis=0),
    )

  def rollback(self, length: jax.Array) -> Self:
    """Forgets everything from row `length` on, and gives back the pages that are then unused."""
    length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), self.length.shape)
    is_kept_BP = jnp.arange(self.table_BP.shape[1]) < self._pages_of(length)[:, None]
    given_back_BP = jnp.where(is_kept_BP, self.num_pages, self.table_BP)
    return dataclasses.replace(
      self,
      table_BP=jnp.where(is_kept_BP, self.table_BP, self.num_pages),
      references=self.references - self._counted(given_back_BP),
      length=length,
    )

  def release(self, is_released_B: jax.Array) -> Self:
    """Empties rows: their pages are given back, and they may start anew."""
    cache = self.rollback(jnp.where(is_released_B, 0, self.length))
    return dataclasses.replace(cache, has_failed_B=cache.has_failed_B & ~is_released_B)

  def keep_path(self, start_B: jax.Array, offsets_BA: jax.Array) -> Self:
    """Moves entries within pages that only their row sees; see `nr.models.cache.keep_path`."""
    source = self._place(start_B[:, None] + offsets_BA)
    target = self._place(start_B[:, None] + jnp.arange(offsets_BA.shape[1]))
    is_deep = self.is_stacked

    def move(leaf: jax.Array) -> jax.Array:
      before = (slice(None),) if is_deep else ()
      heads_J1 = jnp.arange(leaf.shape[2 if is_deep else 1])[:, None]
      (old_pages, old_slots), (pages, slots) = source, target
      moved = leaf[(*before, old_pages[:, None], heads_J1, old_slots[:, None])]
      return leaf.at[(*before, pages[:, None], heads_J1, slots[:, None])].set(moved, mode="drop")

    return dataclasses.replace(
      self, keys=jax.tree.map(move, self.keys), values=jax.tree.map(move, self.values)
    )

  def _place(self, places_BA: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns pages and slots of rows by number."""
    numbers_BA = jnp.minimum(places_BA // self.page_size, self.table_BP.shape[1] - 1)
    return jnp.take_along_axis(self.table_BP, numbers_BA, axis=1), places_BA % self.page_size


def make_paged(sizes: Any, spec: CacheSpec, dtype: Any, stacked: bool, uneven: bool) -> PagedCache:
  """Makes an empty cache; `uneven` is True. Pages hold page_size tokens, whatever their rows."""
  page_size = spec.page_size * sizes.rows_per_token
  shape = (spec.num_pages, sizes.num_kv_heads, page_size, sizes.head_dim)
  keys, values = (
    storage.empty_layers(sizes.num_layers, shape, dtype, spec.quantization, stacked) for _ in range(2)
  )
  table_BP = jnp.full((sizes.batch, -(-sizes.capacity // page_size)), spec.num_pages, jnp.int32)
  lengths_B, has_failed_B = jnp.zeros(sizes.batch, jnp.int32), jnp.zeros(sizes.batch, bool)
  return PagedCache(keys, values, table_BP, jnp.zeros(spec.num_pages, jnp.int32), lengths_B, has_failed_B)
