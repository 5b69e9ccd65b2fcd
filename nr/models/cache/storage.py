"""Where rows of keys and values are stored, as they are or as int8, and attention over them.

Stored rows are head-major, [B, J, S, K]: the products of attention read them without
transposing, and one scatter a step writes in place. What is stored for N blocks is one
pytree with a leading axis N (stacked blocks) or a tuple of N pytrees.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nr.models.partitioning import target_platform

# Finite, so that a row with nothing to attend to stays finite.
MASKED_SCORE = -1e30
INT8_MAX = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Rows:
  """Rows quantised symmetrically, with one scale for each slot and head.

  With s = max |x| / 127 over K and q = round(x / s), no entry is off by more than
  s / 2 (float32 scales; arithmetic of our choice, in the form that is common:
  symmetric, scales a token and head).

  Attributes:
    codes: int8 [..., S, K].
    scales: float32 [..., S].
  """

  codes: jax.Array
  scales: jax.Array

  @property
  def dtype(self) -> Any:
    """Type of the codes."""
    return self.codes.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the codes."""
    return self.codes.shape


def quantize_rows(rows: jax.Array) -> Int8Rows:
  """Quantises [..., K] to int8 with one scale for each vector of K; see `Int8Rows`."""
  wide = rows.astype(jnp.float32)
  scales = jnp.abs(wide).max(axis=-1) / INT8_MAX
  safe = jnp.where(scales > 0, scales, 1.0)
  return Int8Rows(jnp.round(wide / safe[..., None]).astype(jnp.int8), scales)


def empty_rows(shape: tuple[int, ...], dtype: Any, quantization: str | None) -> Any:
  """Makes storage [..., S, K] that holds zeros."""
  if quantization is None:
    return jnp.zeros(shape, dtype)
  return Int8Rows(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))


def empty_layers(
  num_layers: int, shape: tuple[int, ...], dtype: Any, quantization: str | None, stacked: bool
) -> Any:
  """Makes storage of N blocks: one pytree with a leading axis, or a tuple of pytrees."""
  if stacked:
    return empty_rows((num_layers, *shape), dtype, quantization)
  return tuple(empty_rows(shape, dtype, quantization) for _ in range(num_layers))


def is_stacked(layers: Any) -> bool:
  """Says whether storage of N blocks is one pytree with a leading axis."""
  return not isinstance(layers, tuple)


def num_layers(layers: Any) -> int:
  """Returns the number N of blocks of a storage."""
  return jax.tree.leaves(layers)[0].shape[0] if is_stacked(layers) else len(layers)


def encode(rows_BLJK: jax.Array, stored: Any) -> Any:
  """Returns new rows head-major, [B, J, L, K], in the form that `stored` has."""
  rows_BJLK = rows_BLJK.transpose(0, 2, 1, 3)
  return quantize_rows(rows_BJLK) if isinstance(stored, Int8Rows) else rows_BJLK.astype(stored.dtype)


def read_layer(stored: Any, layer: jax.Array | None) -> Any:
  """Returns the storage [B, J, S, K] of one block."""
  if layer is None:
    return stored
  return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stored)


def write_behind(stored: Any, rows: Any, slot: jax.Array, layer: jax.Array | None) -> Any:
  """Writes L encoded rows at slots `slot`, `slot + 1`, ...: a scalar, or [B]."""
  length = jax.tree.leaves(rows)[0].shape[2]
  # One row is scattered on CPU: an update of a slice that a product reads there is
  # copied first when the batch is 1 (seen in the compiled program).
  if slot.ndim == 1 or (length == 1 and target_platform() == "cpu"):
    batch = jax.tree.leaves(rows)[0].shape[0]
    slots_BL = jnp.broadcast_to(slot[..., None] + jnp.arange(length), (batch, length))
    return write_at(stored, rows, jnp.arange(batch)[:, None], slots_BL, layer)

  def write(old: jax.Array, new: jax.Array) -> jax.Array:
    start = (0, 0, slot) + (0,) * (new.ndim - 3)
    if layer is None:
      return jax.lax.dynamic_update_slice(old, new, start)
    return jax.lax.dynamic_update_slice(old, new[None], (layer, *start))

  return jax.tree.map(write, stored, rows)


def write_at(
  stored: Any, rows: Any, first_BL: jax.Array, slots_BL: jax.Array, layer: jax.Array | None
) -> Any:
  """Writes encoded rows [B, J, L, K] at (first, slot) of storage; those out of range are dropped.

  Args:
    stored: [B or pages, J, S, K], with a leading axis of blocks when `layer` is given.
    rows: [B, J, L, K].
    first_BL: int32 [B, L] or [B, 1], the row of the batch, or the page.
    slots_BL: int32, the slot.
    layer: which block.
  """

  def write(old: jax.Array, new: jax.Array) -> jax.Array:
    place = (first_BL[:, None], jnp.arange(new.shape[1])[:, None], slots_BL[:, None])
    return old.at[place if layer is None else (layer, *place)].set(new, mode="drop")

  return jax.tree.map(write, stored, rows)


def take_range(layers: Any, start: int, stop: int) -> Any:
  """Returns the storage of blocks `start` to `stop` (exclusive)."""
  return jax.tree.map(lambda leaf: leaf[start:stop], layers) if is_stacked(layers) else layers[start:stop]


def join(parts: list[Any]) -> Any:
  """Puts storages of consecutive blocks together; inverse of `take_range`."""
  if is_stacked(parts[0]):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
  return tuple(layer for part in parts for layer in part)


def take_batch(layers: Any, rows_B: jax.Array) -> Any:
  """Gathers batch rows of the storage of N blocks."""
  axis = 1 if is_stacked(layers) else 0
  return jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=axis), layers)


def move_slots(layers: Any, source_BA: jax.Array, target_BA: jax.Array) -> Any:
  """Copies what is in slots `source_BA` to `target_BA`, in every block; out of range is dropped."""
  rows_B11, is_deep = jnp.arange(source_BA.shape[0])[:, None, None], is_stacked(layers)

  def move(leaf: jax.Array) -> jax.Array:
    heads_J1 = jnp.arange(leaf.shape[2 if is_deep else 1])[:, None]
    before = (slice(None),) if is_deep else ()
    source, target = (rows_B11, heads_J1, source_BA[:, None]), (rows_B11, heads_J1, target_BA[:, None])
    return leaf.at[(*before, *target)].set(leaf[(*before, *source)], mode="drop")

  return jax.tree.map(move, layers)


def attend(query_BLHK: jax.Array, keys: Any, values: Any, mask_BLS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Attends to stored rows; softmax and accumulation are float32.

  Int8 rows are never dequantised: a key's scale multiplies its score, a value's
  scale its weight.

  Args:
    query_BLHK: queries; head h reads key head h // (H / J).
    keys: storage [B, J, S, K].
    values: likewise.
    mask_BLS: bool, which slots are seen.

  Returns:
    The output [B, L, H, K] in the type of the queries, and float32 [B, L, H], the
    log-sum-exp of the scores: about `MASKED_SCORE` where nothing is seen, and the
    output then means nothing.
  """
  B, L, H, K = query_BLHK.shape
  key_codes, key_scales = _parts(keys)
  value_codes, value_scales = _parts(values)
  J = key_codes.shape[1]
  G, dtype = H // J, query_BLHK.dtype
  # The queries of a group are rows R = G L of one product with the keys they share.
  query_BJRK = (query_BLHK * K**-0.5).reshape(B, L, J, G, K).transpose(0, 2, 3, 1, 4).reshape(B, J, G * L, K)
  scores = jnp.einsum(
    "bjrk,bjsk->bjrs", query_BJRK, key_codes.astype(dtype), preferred_element_type=jnp.float32
  )
  if key_scales is not None:
    scores = scores * key_scales[:, :, None]
  scores = jnp.where(jnp.tile(mask_BLS, (1, G, 1))[:, None], scores, MASKED_SCORE)
  peak = scores.max(axis=-1, keepdims=True)
  weights = jnp.exp(scores - peak)
  total = weights.sum(axis=-1, keepdims=True)
  if value_scales is not None:
    weights = weights * value_scales[:, :, None]
  mixed = jnp.einsum(
    "bjrs,bjsk->bjrk", weights.astype(dtype), value_codes.astype(dtype), preferred_element_type=jnp.float32
  )
  mixed = (mixed / total).astype(dtype).reshape(B, J, G, L, K).transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)
  log_total = (peak + jnp.log(total)).reshape(B, J, G, L).transpose(0, 3, 1, 2).reshape(B, L, H)
  return mixed, log_total


def _parts(rows: Any) -> tuple[jax.Array, jax.Array | None]:
  return (rows.codes, rows.scales) if isinstance(rows, Int8Rows) else (rows, None)


def merge_attention(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Joins attention over two disjoint sets of keys by their log-sum-exps (arXiv:2402.05099, section 3.1).

  Args:
    first: output [B, L, H, K] and log-sum-exp [B, L, H].
    second: likewise.

  Returns:
    The output over both sets, in the type of the outputs.
  """
  (mixed_1, log_1), (mixed_2, log_2) = first, second
  share = jax.nn.sigmoid(log_1 - log_2)[..., None]
  joined = mixed_1.astype(jnp.float32) * share + mixed_2.astype(jnp.float32) * (1 - share)
  return joined.astype(mixed_1.dtype)
