"""The upper half of a transformer with every row taken apart from the others, in one pass.

CoCoMix (arXiv 2502.08524, Eq. 1) asks at every position t for the gradient of the loss of token t + 1
alone with respect to the stream h_t alone, and asks it at another value of h_t while every other row
keeps its own. Read literally that is a forward and a backward pass a position. It needs one:

- In a causal model the only way from h_t to the loss of position t leads through row t of every block.
  So keys and values reach other rows as constants and their own row as variables; the gradient of the
  summed losses is then d loss_t / d h_t for all t at once, and all values are those of the plain pass.
- Those constants may come from a second stream: from `context`, the rows as they are, run as usual.
  Row t of `x` then computes what row t of the model computes when row t alone is replaced by it.

Both are exact. What no single pass gives is the gradient of LATER losses with row t alone replaced:
every later row then differs for every t, so there are as many passes to run as positions
(`nr.objectives.attribution.replaced_gradient` runs them).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models.attention import (
  MASKED_SCORE,
  QUERY_BLOCK,
  RowContext,
  full_attention,
  rotary_angles,
  zero_padding,
)
from nr.models.blocks import Block, rematerialise
from nr.models.layers import wide_type
from nr.models.partitioning import constrain
from nr.models.residual_tap import TapInputs, check_layer
from nr.models.transformer import Transformer


def hidden_apart(
  model: Transformer,
  x_BLD: jax.Array,
  inputs: TapInputs,
  layer: int,
  *,
  context_BLD: jax.Array | None = None,
) -> jax.Array:
  """Runs the blocks above a tap with every row apart from the others.

  Row t of the result is what `residual_tap.hidden_from` gives at row t when row t of its input is
  `x_BLD[:, t]` and earlier rows are the context. Its gradient reaches `x_BLD[:, t]` and nothing else.

  Args:
    model: a transformer; no dropout is applied.
    x_BLD: stream after block `layer`, one value for each row.
    inputs: tokens, positions and segments of the rows.
    layer: the tapped block, from 0.
    context_BLD: the stream that other rows see; `x_BLD` itself when None, which saves running it.

  Returns:
    Final-normed hidden states [B, L, D] in the compute type.
  """
  check_layer(model.spec.num_layers, layer)
  spec, attention = model.spec, inputs.attention()
  rotation = rotary_angles(attention.positions_BL, spec) if spec.positions == "rotary" else None
  rows = RowContext(rotation, attention.segment_ids_BL)
  if context_BLD is not None:
    context_BLD = jax.lax.stop_gradient(context_BLD.astype(spec.dtype))

  def advance(block: Block, streams: tuple) -> tuple:
    return _advance(block, *streams, rows)

  x_BLD, _ = _fold_blocks(model, advance, (x_BLD.astype(spec.dtype), context_BLD), layer + 1)
  return model.final_norm(x_BLD)


def _fold_blocks(model: Transformer, advance: Callable, streams: tuple, start: int) -> tuple:
  """Applies `advance(block, streams)` to blocks `start` and later, in the model's layout."""
  spec = model.spec
  if start == spec.num_layers:
    return streams
  if spec.layers == "unroll":
    for index in range(start, spec.num_layers):
      graphdef, state = nnx.split(model.blocks[index])
      step = _step(graphdef, advance)
      streams = rematerialise(step, spec.remat, is_scanned=False)(streams, state)[0]
    return streams
  graphdef, state = nnx.split(model.blocks)
  step = rematerialise(_step(graphdef, advance), spec.remat, is_scanned=True)
  return jax.lax.scan(step, streams, jax.tree.map(lambda leaf: leaf[start:], state))[0]


def _step(graphdef: nnx.GraphDef, advance: Callable) -> Callable:
  """Returns the function from (streams, parameters of a block) to the streams behind it, for a scan."""

  def step(streams: tuple, state: Any) -> tuple[tuple, None]:
    return advance(nnx.merge(graphdef, state), streams), None

  return step


def _advance(block: Block, x_BLD: jax.Array, context_BLD: jax.Array | None, rows: RowContext) -> tuple:
  """Returns the rows apart and their context (or None) behind one block."""
  module, segment_ids_BL = block.attention, rows.segment_ids_BL
  query_BLHK, own_key_BLJK, own_value_BLJK = module.project(block.attention_norm(x_BLD), rows)
  if context_BLD is None:
    key_BLJK, value_BLJK = own_key_BLJK, own_value_BLJK
  else:
    context_query_BLHK, key_BLJK, value_BLJK = module.project(block.attention_norm(context_BLD), rows)
    plain = module.spec.attention
    mixed_BLHK = full_attention(
      context_query_BLHK, key_BLJK, value_BLJK, segment_ids_BL, implementation=plain
    )
    context_BLD = _finish(block, context_BLD, mixed_BLHK)
  key_BLJK, value_BLJK = jax.lax.stop_gradient((key_BLJK, value_BLJK))
  mixed_BLHK = own_row_attention(
    query_BLHK, own_key_BLJK, own_value_BLJK, key_BLJK, value_BLJK, segment_ids_BL
  )
  return _finish(block, x_BLD, zero_padding(mixed_BLHK, segment_ids_BL)), context_BLD


def _finish(block: Block, x_BLD: jax.Array, mixed_BLHK: jax.Array) -> jax.Array:
  """Returns the stream behind a block from what its heads have gathered."""
  mixed_BLHK = constrain(mixed_BLHK, "batch", "length", "activation_heads", None)
  x_BLD = x_BLD + block.attention.output(mixed_BLHK)
  x_BLD = x_BLD + block.mlp(block.mlp_norm(x_BLD))
  return constrain(x_BLD, "batch", "length", "activation_embed")


def own_row_attention(
  query_BLHK: jax.Array,
  own_key_BLJK: jax.Array,
  own_value_BLJK: jax.Array,
  key_BLJK: jax.Array,
  value_BLJK: jax.Array,
  segment_ids_BL: jax.Array | None = None,
  *,
  block: int = QUERY_BLOCK,
) -> jax.Array:
  """Attention of every row to its own key and value, and to the given ones of earlier rows.

  With own ones equal to the given ones this is causal attention. Static blocks of queries, each against
  the keys up to its own end, as `blocked_causal_attention`; softmax is float32 at least.

  Args:
    query_BLHK: queries; head h reads key head h // (H / J).
    own_key_BLJK: the key that row t alone sees at t.
    own_value_BLJK: its value.
    key_BLJK: keys that later rows see.
    value_BLJK: their values.
    segment_ids_BL: rows see rows of their own segment only.
    block: queries in a block.

  Returns:
    [B, L, H, K] in the type of the queries; padding rows (segment 0) hold some finite value.
  """
  B, L, H, K = query_BLHK.shape
  J = key_BLJK.shape[2]
  wide = wide_type(query_BLHK)
  query_BJGLK = (query_BLHK * K**-0.5).reshape(B, L, J, H // J, K).transpose(0, 2, 3, 1, 4)
  own_key_BJLK, own_value_BJLK = own_key_BLJK.transpose(0, 2, 1, 3), own_value_BLJK.transpose(0, 2, 1, 3)
  key_BJMK, value_BJMK = key_BLJK.transpose(0, 2, 1, 3), value_BLJK.transpose(0, 2, 1, 3)
  own_BJGL = jnp.einsum("bjglk,bjlk->bjgl", query_BJGLK, own_key_BJLK, preferred_element_type=wide)
  outputs = []
  for start in range(0, L, block):
    stop = min(start + block, L)
    scores = jnp.einsum(
      "bjglk,bjmk->bjglm",
      query_BJGLK[:, :, :, start:stop],
      key_BJMK[:, :, :stop],
      preferred_element_type=wide,
    )
    is_seen = (jnp.arange(start, stop)[:, None] > jnp.arange(stop))[None]
    if segment_ids_BL is not None:
      is_seen = is_seen & (segment_ids_BL[:, start:stop, None] == segment_ids_BL[:, None, :stop])
    scores = scores + jnp.where(is_seen, 0, MASKED_SCORE)[:, None, None]
    own_score = own_BJGL[:, :, :, start:stop, None]
    largest = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), own_score))
    weights, own_weight = jnp.exp(scores - largest), jnp.exp(own_score - largest)
    mixed = jnp.einsum(
      "bjglm,bjmk->bjglk",
      weights.astype(value_BJMK.dtype),
      value_BJMK[:, :, :stop],
      preferred_element_type=wide,
    )
    mixed = mixed + own_weight * own_value_BJLK[:, :, None, start:stop].astype(wide)
    total = weights.sum(axis=-1, keepdims=True) + own_weight
    outputs.append((mixed / total).astype(query_BLHK.dtype))
  output_BJGLK = jnp.concatenate(outputs, axis=3)
  return output_BJGLK.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)
