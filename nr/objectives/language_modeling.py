"""Next-token loss that never holds all logits when the vocabulary is large."""

import jax
import jax.numpy as jnp

from nr.objectives.chunks import over_positions
from nr.objectives.weighted import Weighted


def _nll(unembedding_VD: jax.Array, hidden_BLD: jax.Array, targets_BL: jax.Array) -> jax.Array:
  head_VD = unembedding_VD.astype(hidden_BLD.dtype)
  wide = jnp.promote_types(hidden_BLD.dtype, jnp.float32)
  logits_BLV = jnp.einsum("bld,vd->blv", hidden_BLD, head_VD, preferred_element_type=wide)
  # A comparison instead of a look-up: no scatter in the gradient, and no gather
  # across devices when the vocabulary is sharded.
  is_target_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
  target_BL = jnp.where(is_target_BLV, logits_BLV, 0.0).sum(axis=-1)
  return jax.nn.logsumexp(logits_BLV, axis=-1) - target_BL


def token_nll(
  hidden_BLD: jax.Array,
  unembedding_VD: jax.Array,
  targets_BL: jax.Array,
  *,
  chunk_size: int | None = None,
) -> jax.Array:
  """Negative log-likelihood of each target, in nats: `logsumexp(z) - z[target]`.

  Args:
    hidden_BLD: final-normed hidden states; their type is the type of the matrix
      product, the logits are float32 in any case.
    unembedding_VD: output head.
    targets_BL: int32 target ids. An id outside [0, V) gives logsumexp, finite.
    chunk_size: about how many tokens to hold logits for at a time, at least one
      position of every row; None: all. Exact: see `over_positions`.

  Returns:
    float32 [B, L].

  Raises:
    ValueError: if chunk_size is not positive.
  """
  return over_positions(_nll, unembedding_VD, (hidden_BLD, targets_BL), chunk_size)


def next_token_loss(
  hidden_BLD: jax.Array,
  unembedding_VD: jax.Array,
  targets_BL: jax.Array,
  weights_BL: jax.Array,
  chunk_size: int | None = None,
) -> Weighted:
  """Sum over tokens of weight times negative log-likelihood, in nats, with the sum of weights.

  Args:
    hidden_BLD: final-normed hidden states.
    unembedding_VD: output head.
    targets_BL: int32, the token after each position; arbitrary where the weight is 0.
    weights_BL: float32, 0 where a target is not scored.
    chunk_size: as in `token_nll`.
  """
  return Weighted.of(token_nll(hidden_BLD, unembedding_VD, targets_BL, chunk_size=chunk_size), weights_BL)
