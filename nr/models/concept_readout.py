"""The last block of an interleaved model, computed only where it is read.

After the last block only concept rows are kept. Token rows still serve as keys
and values there, but their queries, output projection and MLP would be thrown
away: leaving them out is exact and saves 10 of the block's 12 D^2 products a token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models.attention import (
  MASKED_SCORE,
  QUERY_BLOCK,
  AttentionInputs,
  rotary_angles,
  rotate,
  zero_padding,
)
from nr.models.blocks import Block, rematerialise
from nr.models.layers import drop
from nr.models.partitioning import constrain
from nr.models.transformer import Transformer


def run_last_block(
  transformer: Transformer,
  x_BMD: jax.Array,
  attention: AttentionInputs,
  *,
  key: jax.Array | None = None,
) -> jax.Array:
  """Returns rows 1, 3, 5, ... of the last block's output.

  Args:
    transformer: the model.
    x_BMD: stream [B, 2L, D] that enters its last block.
    attention: positions and segments of the 2L rows.
    key: random key for dropout, as given to `run_blocks`.

  Returns:
    [B, L, D], equal to `run_blocks(x, N - 1)[0][:, 1::2]` up to rounding (and,
    with dropout, up to which entries are dropped).
  """
  spec = transformer.spec
  last = spec.num_layers - 1
  if spec.layers == "scan":
    graphdef, state = nnx.split(transformer.blocks)
    state = jax.tree.map(lambda leaf: leaf[last], state)
  else:
    graphdef, state = nnx.split(transformer.blocks[last])
  layer_key = None if key is None else jax.random.fold_in(key, last)

  def step(state: nnx.State, x_BMD: jax.Array, layer_key: jax.Array | None) -> jax.Array:
    return _run_block(nnx.merge(graphdef, state), x_BMD, attention, layer_key)

  return rematerialise(step, spec.remat, is_scanned=False)(state, x_BMD, layer_key)


def _run_block(block: Block, x_BMD: jax.Array, attention: AttentionInputs, key: Any) -> jax.Array:
  keys = (None, None, None) if key is None or block.dropout == 0 else jax.random.split(key, 3)
  mixed_BLD = _attend(block, block.attention_norm(x_BMD), attention, keys[0])
  x_BLD = x_BMD[:, 1::2] + drop(mixed_BLD, block.dropout, keys[1])
  x_BLD = x_BLD + drop(block.mlp(block.mlp_norm(x_BLD)), block.dropout, keys[2])
  return constrain(x_BLD, "batch", "length", "activation_embed")


def _attend(block: Block, x_BMD: jax.Array, attention: AttentionInputs, key: jax.Array | None) -> jax.Array:
  """Attends from the odd rows to all rows not behind them."""
  module = block.attention
  query_BLHK = constrain(module.query(x_BMD[:, 1::2]), "batch", "length", "activation_heads", None)
  key_BMJK = constrain(module.key(x_BMD), "batch", "length", "activation_kv_heads", None)
  value_BMJK = constrain(module.value(x_BMD), "batch", "length", "activation_kv_heads", None)
  if module.query_norm is not None:
    query_BLHK, key_BMJK = module.query_norm(query_BLHK), module.key_norm(key_BMJK)
  if module.spec.positions == "rotary":
    query_BLHK = rotate(query_BLHK, rotary_angles(attention.positions_BL[:, 1::2], module.spec))
    key_BMJK = rotate(key_BMJK, rotary_angles(attention.positions_BL, module.spec))
  segment_ids_BM = attention.segment_ids_BL
  mixed_BLHK = odd_row_attention(
    query_BLHK, key_BMJK, value_BMJK, segment_ids_BM, dropout=module.spec.dropout, dropout_key=key
  )
  mixed_BLHK = zero_padding(mixed_BLHK, None if segment_ids_BM is None else segment_ids_BM[:, 1::2])
  mixed_BLHK = constrain(mixed_BLHK, "batch", "length", "activation_heads", None)
  return constrain(module.output(mixed_BLHK), "batch", "length", "activation_embed")


def odd_row_attention(
  query_BLHK: jax.Array,
  key_BMJK: jax.Array,
  value_BMJK: jax.Array,
  segment_ids_BM: jax.Array | None,
  *,
  block: int = QUERY_BLOCK,
  dropout: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Causal attention of queries at rows 1, 3, 5, ... over 2L rows; float32 softmax.

  Static blocks of queries, each against the rows up to its own end, as
  `blocked_causal_attention`.

  Args:
    query_BLHK: query t stands at row 2t + 1; head h reads key head h // (H / J).
    key_BMJK: keys of all 2L rows.
    value_BMJK: values.
    segment_ids_BM: rows see rows of their own segment only.
    block: queries in a block.
    dropout: probability of dropping an attention weight.
    dropout_key: random key; no dropout without it.

  Returns:
    [B, L, H, K] in the type of the queries.
  """
  B, L, H, K = query_BLHK.shape
  J = key_BMJK.shape[2]
  query_BJGLK = (query_BLHK * K**-0.5).reshape(B, L, J, H // J, K).transpose(0, 2, 3, 1, 4)
  key_BJMK, value_BJMK = key_BMJK.transpose(0, 2, 1, 3), value_BMJK.transpose(0, 2, 1, 3)
  outputs = []
  for index, start in enumerate(range(0, L, block)):
    stop = min(start + block, L)
    scores = jnp.einsum(
      "bjglk,bjmk->bjglm",
      query_BJGLK[:, :, :, start:stop],
      key_BJMK[:, :, : 2 * stop],
      preferred_element_type=jnp.float32,
    )
    is_seen = (2 * jnp.arange(start, stop)[:, None] + 1 >= jnp.arange(2 * stop))[None]
    if segment_ids_BM is not None:
      own_BL = segment_ids_BM[:, 1::2][:, start:stop]
      is_seen = is_seen & (own_BL[:, :, None] == segment_ids_BM[:, None, : 2 * stop])
    weights = jax.nn.softmax(jnp.where(is_seen[:, None, None], scores, MASKED_SCORE), axis=-1)
    block_key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
    weights = drop(weights, dropout, block_key).astype(value_BJMK.dtype)
    outputs.append(jnp.einsum("bjglm,bjmk->bjglk", weights, value_BJMK[:, :, : 2 * stop]))
  output_BJGLK = jnp.concatenate(outputs, axis=3).astype(query_BLHK.dtype)
  return output_BJGLK.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)
