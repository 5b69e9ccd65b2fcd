"""Thresholds that tell which tokens a truncation keeps, by sorting or by search.

Every rule here is free of order: whether a token is kept depends on the values of
the others, never on their places, so equal scores are kept or dropped together and
a row has one threshold. Two ways lead to it:

- `sort`: sort the vocabulary, sum along it, read the threshold off.
- `search`: build the threshold bit by bit. float32 has a view as uint32 that keeps
  the order, so 32 masked sums over the vocabulary find it exactly. Where the
  vocabulary is cut over devices these sums cross them as [B] numbers, while a sort
  would first gather all logits on each.

`auto` searches where the vocabulary is sharded or larger than a few hundred tokens,
from where on sorting was the slower of the two on CPU; it sorts elsewhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import keep, static
from nr.models.partitioning import constrain, shard_count

VOCABULARY = "activation_vocab"

# Vocabularies up to here are sorted by `auto`.
SMALL = 256


def implementation() -> Any:
  """Declares the setting of a truncation that picks how its threshold is found."""
  return static("auto", ("auto", "sort", "search"))


def is_search(implementation: str, size: int) -> bool:
  """Whether to search, given the setting, V, and the sharding that is being traced under."""
  is_better = size > SMALL or shard_count(VOCABULARY) > 1
  return implementation == "search" or (implementation == "auto" and is_better)


def over_vocabulary(x_BV: jax.Array) -> jax.Array:
  """Lays an array [B, V] out as logits are."""
  return constrain(x_BV, "batch", VOCABULARY)


def scattered(x_BV: jax.Array, tokens_BK: jax.Array, values: jax.Array | int, how: str) -> jax.Array:
  """Returns an array [B, V] with values [B, K], or one, put at the tokens of each row.

  Args:
    x_BV: laid out as logits are.
    tokens_BK: int32; those beyond V are left out.
    values: what is put there.
    how: "add", "max" or "set".
  """
  values_BK = jnp.broadcast_to(jnp.asarray(values, x_BV.dtype), tokens_BK.shape)

  def put(x_V: jax.Array, tokens_K: jax.Array, values_K: jax.Array) -> jax.Array:
    return getattr(x_V.at[tokens_K], how)(values_K, mode="drop")

  # By row, so that the partitioner sees that rows need nothing of each other.
  return over_vocabulary(jax.vmap(put)(over_vocabulary(x_BV), tokens_BK, values_BK))


def truncated(logits_BV: jax.Array, is_kept_BV: jax.Array) -> jax.Array:
  """Bans what is not kept; a NaN stays, so that its row is still seen to be broken."""
  return keep(logits_BV, is_kept_BV | jnp.isnan(logits_BV))


def entropy(log_probs_BV: jax.Array) -> jax.Array:
  """Returns the entropy [B, 1] of log-probabilities, nats; banned tokens count nothing."""
  terms_BV = jnp.where(log_probs_BV > -jnp.inf, jnp.exp(log_probs_BV) * log_probs_BV, 0.0)
  # NaN compares false above, and must not turn into a finite entropy.
  return -jnp.where(jnp.isnan(log_probs_BV), jnp.nan, terms_BV).sum(axis=-1, keepdims=True)


def ordered_bits(scores_BV: jax.Array) -> jax.Array:
  """Returns uint32 that compare as the float32 scores do; 0 stands below all of them."""
  scores_BV = jnp.where(scores_BV == 0, 0.0, scores_BV)  # one zero, not two
  bits_BV = jax.lax.bitcast_convert_type(scores_BV.astype(jnp.float32), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)


def bisect(is_low: Callable[[jax.Array], jax.Array], batch: int) -> jax.Array:
  """Returns uint32 [B, 1], the largest threshold for which `is_low` holds in each row.

  Args:
    is_low: from uint32 [B, 1] to bool [B, 1], true up to some point and false above it.
    batch: B.

  Returns:
    The thresholds; 0 in rows where it holds nowhere.
  """

  def set_bit(step: jax.Array, thresholds_B1: jax.Array) -> jax.Array:
    raised_B1 = thresholds_B1 | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
    return jnp.where(is_low(raised_B1), raised_B1, thresholds_B1)

  return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((batch, 1), jnp.uint32))


def keep_most(scores_BV: jax.Array, counts_B1: jax.Array | int, implementation: str = "auto") -> jax.Array:
  """Keeps the tokens that fewer than `counts` others exceed: the highest scores, ties included.

  Args:
    scores_BV: float32.
    counts_B1: int32 [B, 1] or [1, 1] or a number, at least 1; above V keeps all.
    implementation: "auto", "sort" or "search".

  Returns:
    bool [B, V].
  """
  batch, size = scores_BV.shape
  if isinstance(counts_B1, int) and counts_B1 == 1:
    return scores_BV >= scores_BV.max(axis=-1, keepdims=True)
  counts_B1 = jnp.broadcast_to(jnp.asarray(counts_B1, jnp.int32), (batch, 1))
  if is_search(implementation, scores_BV.shape[1]):
    bits_BV = ordered_bits(scores_BV)
    return bits_BV >= bisect(lambda t: (bits_BV >= t).sum(axis=-1, keepdims=True) >= counts_B1, batch)
  sorted_BV = jnp.sort(scores_BV, axis=-1, descending=True)
  last_B1 = jnp.clip(counts_B1, 1, size) - 1
  return scores_BV >= jnp.take_along_axis(sorted_BV, last_B1, axis=-1)


def keep_first(
  scores_BV: jax.Array,
  weights_BV: jax.Array,
  targets_B1: jax.Array,
  implementation: str = "auto",
  least: int = 1,
) -> jax.Array:
  """Keeps a token if all that score higher weigh less than the target together.

  That is the shortest prefix in order of score whose weight reaches the target,
  and what ties with its last.

  Args:
    scores_BV: float32.
    weights_BV: float32, not negative.
    targets_B1: float32 [B, 1] or [1, 1].
    implementation: "auto", "sort" or "search".
    least: how many of the highest scores are kept in any case.

  Returns:
    bool [B, V].
  """
  if is_search(implementation, scores_BV.shape[1]):
    bits_BV = ordered_bits(scores_BV)

    def is_reached(thresholds_B1: jax.Array) -> jax.Array:
      weights_above_BV = jnp.where(bits_BV >= thresholds_B1, weights_BV, 0)
      return weights_above_BV.sum(axis=-1, keepdims=True) >= targets_B1

    is_kept_BV = bits_BV >= bisect(is_reached, scores_BV.shape[0])
  else:
    negative_BV, sorted_BV = jax.lax.sort((-scores_BV, weights_BV), num_keys=1)
    above_BV = jnp.pad(jnp.cumsum(sorted_BV, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    counts_B1 = (above_BV < targets_B1).sum(axis=-1, keepdims=True)
    last_B1 = jnp.maximum(counts_B1, 1) - 1
    is_kept_BV = scores_BV >= -jnp.take_along_axis(negative_BV, last_B1, axis=-1)
  return is_kept_BV | keep_most(scores_BV, least, implementation)


def top_values(logits_BV: jax.Array, count: int) -> jax.Array:
  """Returns the highest logits [B, min(count, V)], in falling order.

  Where the vocabulary is sharded, each piece finds its own first, and only those meet.
  """
  batch, size = logits_BV.shape
  count, pieces = min(count, size), shard_count(VOCABULARY)
  if pieces > 1 and size % pieces == 0:
    blocks_BPV = constrain(logits_BV.reshape(batch, pieces, -1), "batch", VOCABULARY, None)
    # Sorted, not top_k, which is gathered also where only its batch is cut.
    blocks_BPV = jnp.sort(blocks_BPV, axis=-1, descending=True)
    logits_BV = blocks_BPV[..., :count].reshape(batch, -1)
  return jax.lax.top_k(logits_BV, count)[0]
