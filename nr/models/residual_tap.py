"""A transformer cut in two at a layer: activations below it, hidden states from changed ones above.

Used where something reads or replaces the residual stream: training data of the sparse autoencoder,
the teacher's partial backward, and the measurement of what a substitution costs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from nr.models.attention import AttentionInputs, default_positions
from nr.models.transformer import Transformer


class TapInputs(NamedTuple):
  """What both halves need to know of a batch.

  Attributes:
    tokens_BL: int32 token ids.
    positions_BL: int32 positions; None counts from each segment's start.
    segment_ids_BL: int32, 0 is padding; None when all rows are one segment.
  """

  tokens_BL: jax.Array
  positions_BL: jax.Array | None = None
  segment_ids_BL: jax.Array | None = None

  @classmethod
  def of(cls, batch: Mapping[str, jax.Array]) -> "TapInputs":
    """Takes `tokens` and, where they are there, `positions` and `segment_ids` of a batch."""
    return cls(batch["tokens"], batch.get("positions"), batch.get("segment_ids"))

  def attention(self) -> AttentionInputs:
    """Returns what the blocks need besides the stream."""
    positions_BL = self.positions_BL
    if positions_BL is None:
      positions_BL = default_positions(*self.tokens_BL.shape, self.segment_ids_BL)
    return AttentionInputs(positions_BL, self.segment_ids_BL)


def check_layer(num_layers: int, layer: int) -> None:
  """Raises ValueError where there is no block `layer` (counted from 0) to tap."""
  if not 0 <= layer < num_layers:
    raise ValueError(
      f"layer={layer} is outside the model: choose 0..{num_layers - 1}, its blocks counted from 0"
    )


def activations_at(model: Transformer, inputs: TapInputs, layer: int) -> jax.Array:
  """Returns the residual stream [B, L, D] after block `layer` (from 0), in the compute type."""
  check_layer(model.spec.num_layers, layer)
  x_BLD, attention = model.enter(*inputs)
  return model.run_blocks(x_BLD, 0, layer + 1, attention=attention)[0]


def hidden_from(model: Transformer, x_BLD: jax.Array, inputs: TapInputs, layer: int) -> jax.Array:
  """Returns final-normed hidden states [B, L, D] from the stream after block `layer` (from 0)."""
  check_layer(model.spec.num_layers, layer)
  x_BLD = x_BLD.astype(model.spec.dtype)
  x_BLD = model.run_blocks(x_BLD, layer + 1, None, attention=inputs.attention())[0]
  return model.final_norm(x_BLD)
