"""A reward model: a transformer whose last token's hidden state is read by one linear map.

model = RewardModel(RewardModelSpec(transformer_spec), rngs=nnx.Rngs(0))
rewards_B = model(tokens_BL, lengths_B)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models import parameters
from nr.models.layers import Linear
from nr.models.transformer import Transformer, TransformerSpec
from nr.names import unknown


@dataclasses.dataclass(frozen=True)
class RewardModelSpec:
  """Settings of a reward model.

  Attributes:
    transformer: of the trunk, a language model's.
  """

  transformer: TransformerSpec

  def to_dict(self) -> dict[str, Any]:
    """Returns the settings as plain values that JSON can hold."""
    return {"transformer": self.transformer.to_dict()}

  @classmethod
  def from_dict(cls, settings: Mapping[str, Any]) -> Self:
    """Makes the settings from plain values; raises ValueError for an unknown field."""
    for name in settings:
      if name != "transformer":
        raise ValueError(unknown("field of RewardModelSpec", name, ("transformer",)))
    return cls(TransformerSpec.from_dict(settings["transformer"]))


class RewardModel(nnx.Module):
  """Transformer and scalar head; parameters transformer/... and reward/kernel.

  The trunk keeps the tree of a language model, so that one can be put in its place (`from_language_model`).
  An untied un-embedding stays in the tree, unread.
  """

  def __init__(self, spec: RewardModelSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    self.transformer = Transformer(spec.transformer, rngs=rngs)
    # No bias: comparisons cannot tell it.
    self.reward = Linear(
      (spec.transformer.model_dim, 1),
      ("norm", "norm"),
      std=spec.transformer.init_std,
      use_bias=False,
      dtype=spec.transformer.param_dtype,
      rngs=rngs,
    )

  def token_rewards(
    self,
    tokens_BL: jax.Array,
    *,
    segment_ids_BL: jax.Array | None = None,
    positions_BL: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Returns float32 [B, L], the reward of each text if it ended there; arguments as in `Transformer`."""
    hidden_BLD = self.transformer.hidden(
      tokens_BL, segment_ids_BL=segment_ids_BL, positions_BL=positions_BL, key=key
    )
    return self.reward(hidden_BLD.astype(jnp.float32))[..., 0]

  def __call__(
    self, tokens: jax.Array, lengths: jax.Array | None = None, *, key: jax.Array | None = None
  ) -> jax.Array:
    """Returns the rewards of whole texts.

    Args:
      tokens: int32 [..., L], padded on the right; any leading shape, such as pairs [B, 2].
      lengths: int32 [...], tokens of each text; None: all L. A length of 0 reads the first slot.
      key: random key for dropout.

    Returns:
      float32 [...], read at the last token.
    """
    leading, length = tokens.shape[:-1], tokens.shape[-1]
    rewards_BL = self.token_rewards(tokens.reshape(-1, length), key=key)
    lengths = jnp.full(leading, length) if lengths is None else lengths
    last_B1 = jnp.maximum(lengths.reshape(-1, 1) - 1, 0)
    return jnp.take_along_axis(rewards_BL, last_B1, axis=1)[:, 0].reshape(leading)


def from_language_model(spec: RewardModelSpec, params: Mapping, key: jax.Array) -> dict:
  """Returns the parameters of a reward model whose trunk is a trained language model.

  Args:
    spec: of the reward model.
    params: of the language model, in the layout that the spec asks for.
    key: random key of the scalar head.
  """
  _, fresh = parameters.split(RewardModel(spec, rngs=nnx.Rngs(params=key)))
  if jax.tree.structure(fresh["transformer"]) != jax.tree.structure(params):
    raise ValueError("params: the language model's tree is not that of spec.transformer; give its own spec")
  return {**fresh, "transformer": params}
