"""Transformer blocks: one of them, all of them stacked or listed, and what their backward pass recomputes."""

from typing import Any

import jax
from flax import nnx

from nr.models.attention import RowContext, SelfAttention
from nr.models.layers import Mlp, drop, make_norm
from nr.models.parameters import LAYERS
from nr.models.partitioning import constrain
from nr.models.transformer_spec import TransformerSpec


class Block(nnx.Module):
  """Pre-norm transformer block: attention, then an MLP, each added to the stream."""

  def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
    self.attention_norm = make_norm(spec, rngs=rngs)
    self.attention = SelfAttention(spec, rngs=rngs)
    self.mlp_norm = make_norm(spec, rngs=rngs)
    self.mlp = Mlp(spec, rngs=rngs)
    self.dropout = spec.dropout

  def __call__(
    self,
    x_BLD: jax.Array,
    context: RowContext,
    stored: Any = None,
    layer: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """Returns the stream [B, L, D] and the cached arrays `stored`, extended."""
    keys = (None, None, None) if key is None or self.dropout == 0 else jax.random.split(key, 3)
    mixed_BLD, stored = self.attention(self.attention_norm(x_BLD), context, stored, layer, key=keys[0])
    x_BLD = x_BLD + drop(mixed_BLD, self.dropout, keys[1])
    x_BLD = x_BLD + drop(self.mlp(self.mlp_norm(x_BLD)), self.dropout, keys[2])
    return constrain(x_BLD, "batch", "length", "activation_embed"), stored


def make_blocks(spec: TransformerSpec, *, rngs: nnx.Rngs) -> nnx.Module:
  """Makes all blocks: one module with a leading layer axis on every leaf, or a list.

  Both have the same initial values for the same key.
  """
  keys_N = jax.random.split(rngs.params(), spec.num_layers)
  if spec.layers == "unroll":
    return nnx.List([Block(spec, rngs=nnx.Rngs(key)) for key in keys_N])

  def initialise(key: jax.Array) -> dict:
    return nnx.to_pure_dict(nnx.state(Block(spec, rngs=nnx.Rngs(key)), nnx.Param))

  values = jax.vmap(initialise)(keys_N)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(spec, rngs=nnx.Rngs(0))))
  for _, variable in nnx.to_flat_state(state):
    variable.set_metadata(axes=(LAYERS, *variable.get_metadata()["axes"]))
  nnx.replace_by_pure_dict(state, values)
  return nnx.merge(graphdef, state)


def rematerialise(function: Any, policy: str, *, is_scanned: bool) -> Any:
  """Wraps a block so that its backward pass recomputes what `policy` does not save."""
  if policy == "none":
    return function
  saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
  # Inside scan, common subexpressions cannot undo the recomputation; elsewhere they can.
  return jax.checkpoint(function, policy=saved, prevent_cse=not is_scanned)
