"""Causal self-attention over full sequences and over caches; positions; masks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models.cache.base import View
from nr.models.cache.storage import MASKED_SCORE
from nr.models.layers import RMSNorm, drop, wide_type
from nr.models.parameters import parameter, zeros_parameter
from nr.models.partitioning import constrain, target_platform
from nr.models.transformer_spec import TransformerSpec
from nr.models.weights import contract

QUERY_BLOCK = 128


class AttentionInputs(NamedTuple):
  """What attention knows of the rows besides their contents.

  Rows attend to themselves and to earlier rows, by row order, always.

  Attributes:
    positions_BL: int32 rotary positions (ignored by models with learned ones).
    segment_ids_BL: int32, rows attend rows of their own segment only, and rows
      of segment 0 (padding) come out as zero; None when all rows are one segment.
    visible_BLL: bool [B or 1, L, L], with a cache only: which of the new rows each
      new row sees (a tree of drafts), instead of all earlier ones. None: a chain.
  """

  positions_BL: jax.Array
  segment_ids_BL: jax.Array | None = None
  visible_BLL: jax.Array | None = None


def default_positions(
  batch: int,
  length: int,
  segment_ids_BL: jax.Array | None = None,
) -> jax.Array:
  """Returns int32 [B, L] positions that start at 0 wherever a run of equal segment ids starts."""
  rows_L = jnp.arange(length, dtype=jnp.int32)
  if segment_ids_BL is None:
    return jnp.broadcast_to(rows_L, (batch, length))
  is_start = jnp.diff(segment_ids_BL, axis=1, prepend=segment_ids_BL[:, :1] - 1) != 0
  starts_BL = jax.lax.cummax(jnp.where(is_start, rows_L, 0), axis=1)
  return rows_L - starts_BL


def rotary_angles(positions_BL: jax.Array, spec: TransformerSpec) -> tuple[jax.Array, jax.Array]:
  """Returns float32 cosines and sines [B, L, 1, K/2] of the rotary angles.

  Source: arXiv:2104.09864; frequency scaling as released with Llama 3.
  """
  half = spec.head_dim // 2
  frequencies = spec.rotary_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  scaling = spec.rotary_scaling
  if scaling is not None:
    turns = scaling.original_max_length * frequencies / (2 * jnp.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = jnp.clip((turns - scaling.low_frequency_factor) / span, 0, 1)
    frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
  angles = positions_BL[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x_BLHK: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the pairs (i, i + K/2) of each head by the given angles, in float32 at least."""
  cos, sin = rotation
  first, second = jnp.split(x_BLHK.astype(wide_type(x_BLHK)), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BLHK.dtype)


def blocked_causal_attention(
  query_BLHK: jax.Array,
  key_BLJK: jax.Array,
  value_BLJK: jax.Array,
  segment_ids_BL: jax.Array | None = None,
  *,
  block: int = QUERY_BLOCK,
  dropout: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Causal attention in static blocks of queries, each against the keys up to its own end.

  Skips the keys that no query of a block can see, about half of all scores, which
  on CPU is faster than masking them. Our choice; same values as
  `jax.nn.dot_product_attention`. Softmax is float32 at least.

  Args:
    query_BLHK: queries; head h reads key head h // (H / J).
    key_BLJK: keys.
    value_BLJK: values.
    segment_ids_BL: as in `AttentionInputs`; padding rows come out as some finite value.
    block: number of queries in a block.
    dropout: probability of dropping an attention weight.
    dropout_key: random key; no dropout without it.

  Returns:
    [B, L, H, K] in the type of the queries.
  """
  B, L, H, K = query_BLHK.shape
  J = key_BLJK.shape[2]
  G = H // J
  wide = wide_type(query_BLHK)
  query_BJGLK = (query_BLHK * K**-0.5).reshape(B, L, J, G, K).transpose(0, 2, 3, 1, 4)
  key_BJMK = key_BLJK.transpose(0, 2, 1, 3)
  value_BJMK = value_BLJK.transpose(0, 2, 1, 3)
  outputs = []
  for index, start in enumerate(range(0, L, block)):
    stop = min(start + block, L)
    # The queries of a group are rows R of one product with the keys they share.
    query_BJRK = query_BJGLK[:, :, :, start:stop].reshape(B, J, G * (stop - start), K)
    scores = jnp.einsum("bjrk,bjmk->bjrm", query_BJRK, key_BJMK[:, :, :stop], preferred_element_type=wide)
    is_seen = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop))[None]
    if segment_ids_BL is not None:
      is_seen = is_seen & (segment_ids_BL[:, start:stop, None] == segment_ids_BL[:, None, :stop])
    # Adding instead of selecting spares a pass over the scores in the gradient.
    scores = scores + jnp.where(jnp.tile(is_seen, (1, G, 1))[:, None], 0, MASKED_SCORE)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    block_key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
    weights = drop(weights, dropout, block_key).astype(value_BJMK.dtype)
    mixed = jnp.einsum("bjrm,bjmk->bjrk", weights, value_BJMK[:, :, :stop], preferred_element_type=wide)
    outputs.append((mixed / total).astype(query_BLHK.dtype).reshape(B, J, G, stop - start, K))
  output_BJGLK = jnp.concatenate(outputs, axis=3)
  return output_BJGLK.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)


def full_attention(
  query_BLHK: jax.Array,
  key_BLJK: jax.Array,
  value_BLJK: jax.Array,
  segment_ids_BL: jax.Array | None,
  *,
  implementation: str = "auto",
  dropout: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Causal attention over whole sequences; padding rows come out as zero.

  Args:
    query_BLHK: queries.
    key_BLJK: keys.
    value_BLJK: values.
    segment_ids_BL: as in `AttentionInputs`.
    implementation: "dot_product", "blocked", or "auto": blocked on CPU. Dropout of
      attention weights exists only in "blocked", which is then used whatever is asked.
    dropout: probability of dropping an attention weight.
    dropout_key: random key; no dropout without it.

  Returns:
    [B, L, H, K] in the type of the queries.
  """
  is_dropping = dropout > 0 and dropout_key is not None
  is_blocked = implementation == "blocked" or (implementation == "auto" and target_platform() == "cpu")
  if is_blocked or is_dropping:
    output_BLHK = blocked_causal_attention(
      query_BLHK, key_BLJK, value_BLJK, segment_ids_BL, dropout=dropout, dropout_key=dropout_key
    )
  else:
    mask = None
    if segment_ids_BL is not None:
      mask = (segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :])[:, None]
    output_BLHK = jax.nn.dot_product_attention(query_BLHK, key_BLJK, value_BLJK, mask=mask, is_causal=True)
  return zero_padding(output_BLHK, segment_ids_BL)


def zero_padding(output_BLHK: jax.Array, segment_ids_BL: jax.Array | None) -> jax.Array:
  """Sets the rows of segment 0 to zero: nothing is seen there, whatever softmax made of it."""
  if segment_ids_BL is None:
    return output_BLHK
  return jnp.where((segment_ids_BL != 0)[:, :, None, None], output_BLHK, 0)


class RowContext(NamedTuple):
  """What every block of one run shares, computed once before the blocks.

  Attributes:
    rotation: cosines and sines, or None for learned positions.
    segment_ids_BL: of the rows, or None.
    view: how the blocks read and write the cache, or None without one.
  """

  rotation: tuple[jax.Array, jax.Array] | None
  segment_ids_BL: jax.Array | None
  view: View | None = None


class HeadProjection(nnx.Module):
  """Linear map from the residual stream to heads: [B, L, D] -> [B, L, heads, K]."""

  def __init__(self, heads: int, axis: str, spec: TransformerSpec, *, rngs: nnx.Rngs):
    normal = jax.nn.initializers.normal(spec.init_std)
    shape, axes = (spec.model_dim, heads, spec.head_dim), ("embed", axis, "head_dim")
    self.kernel = parameter(rngs.params(), normal, shape, axes, spec.param_dtype)
    self.bias = zeros_parameter(spec.use_qkv_bias, shape[1:], axes[1:], spec.param_dtype)

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    """Projects, in the type of `x_BLD`."""
    heads_BLHK = contract("bld,dhk->blhk", x_BLD, self.kernel[...])
    return heads_BLHK if self.bias is None else heads_BLHK + self.bias[...].astype(x_BLD.dtype)


class OutputProjection(nnx.Module):
  """Linear map from heads back to the residual stream: [B, L, H, K] -> [B, L, D]."""

  def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
    normal = jax.nn.initializers.normal(spec.init_std / (2 * spec.num_layers) ** 0.5)
    shape = (spec.num_heads, spec.head_dim, spec.model_dim)
    self.kernel = parameter(rngs.params(), normal, shape, ("heads", "head_dim", "embed"), spec.param_dtype)
    self.bias = zeros_parameter(spec.use_bias, (spec.model_dim,), ("embed",), spec.param_dtype)

  def __call__(self, heads_BLHK: jax.Array) -> jax.Array:
    """Projects, in the type of `heads_BLHK`."""
    x_BLD = contract("blhk,hkd->bld", heads_BLHK, self.kernel[...])
    return x_BLD if self.bias is None else x_BLD + self.bias[...].astype(x_BLD.dtype)


class SelfAttention(nnx.Module):
  """Grouped-query causal self-attention (arXiv:2305.13245), with or without a cache."""

  def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    self.query = HeadProjection(spec.num_heads, "heads", spec, rngs=rngs)
    self.key = HeadProjection(spec.num_kv_heads, "kv_heads", spec, rngs=rngs)
    self.value = HeadProjection(spec.num_kv_heads, "kv_heads", spec, rngs=rngs)
    self.query_norm = RMSNorm(spec.head_dim, "head_dim", spec, rngs=rngs) if spec.use_qk_norm else None
    self.key_norm = RMSNorm(spec.head_dim, "head_dim", spec, rngs=rngs) if spec.use_qk_norm else None
    self.output = OutputProjection(spec, rngs=rngs)

  def project(self, x_BLD: jax.Array, context: RowContext) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns normalised and rotated queries [B, L, H, K], keys and values [B, L, J, K]."""
    query = constrain(self.query(x_BLD), "batch", "length", "activation_heads", None)
    key = constrain(self.key(x_BLD), "batch", "length", "activation_kv_heads", None)
    value = constrain(self.value(x_BLD), "batch", "length", "activation_kv_heads", None)
    if self.query_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    if context.rotation is not None:
      query, key = rotate(query, context.rotation), rotate(key, context.rotation)
    return query, key, value

  def __call__(
    self,
    x_BLD: jax.Array,
    context: RowContext,
    stored: tuple | None = None,
    layer: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """Attends.

    Args:
      x_BLD: normalised residual stream.
      context: what all blocks of this run share.
      stored: what the cache stores, of this layer or (with `layer`) of all layers.
      layer: index into stacked `stored`.
      key: random key for dropout of attention weights; ignored with a cache.

    Returns:
      The output [B, L, D] and `stored` with the new rows written.
    """
    query, new_key, new_value = self.project(x_BLD, context)
    if stored is None:
      mixed = full_attention(
        query,
        new_key,
        new_value,
        context.segment_ids_BL,
        implementation=self.spec.attention,
        dropout=self.spec.dropout,
        dropout_key=key,
      )
    else:
      mixed, stored = context.view.attend(query, new_key, new_value, stored, layer)
      mixed = zero_padding(mixed, context.segment_ids_BL)
    mixed = constrain(mixed, "batch", "length", "activation_heads", None)
    return constrain(self.output(mixed), "batch", "length", "activation_embed"), stored
