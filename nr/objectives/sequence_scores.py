"""What preference losses know of a response: sums over its tokens, never all logits at once.

Arrays in this file: R rows (several sequences lie in a row when packed), L positions, D model,
V vocabulary, S slots of a row (one for each packed sequence).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenStatistics(NamedTuple):
  """What one pass over the logits says of every target token; float32.

  Attributes:
    log_probs_RL: log p(target), nats, at most 0.
    entropies_RL: entropy of the law that the target was drawn from, nats; None where not asked for.
    log_sum_squares_RL: log sum_v p(v)^2, at most 0 (arXiv 2406.11827 compares log p with it); None
      where not asked for.
    is_greedy_RL: bool, whether greedy decoding takes the target (of equals the lowest id); None where not
      asked for.
  """

  log_probs_RL: jax.Array
  entropies_RL: jax.Array | None = None
  log_sum_squares_RL: jax.Array | None = None
  is_greedy_RL: jax.Array | None = None


def _statistics(
  hidden_RLD, unembedding_VD, targets_RL, with_entropy, with_sum_squares, with_greedy
) -> TokenStatistics:
  head_VD = unembedding_VD.astype(hidden_RLD.dtype)
  logits_RLV = jnp.einsum("rld,vd->rlv", hidden_RLD, head_VD, preferred_element_type=jnp.float32)
  # A comparison instead of a look-up, as in `language_modeling`: no scatter, no gather across devices.
  is_target_RLV = jnp.arange(logits_RLV.shape[-1]) == targets_RL[..., None]
  target_RL = jnp.where(is_target_RLV, logits_RLV, 0.0).sum(axis=-1)
  normaliser_RL = jax.nn.logsumexp(logits_RLV, axis=-1)
  entropies_RL = log_sum_squares_RL = is_greedy_RL = None
  if with_entropy:
    log_law_RLV = logits_RLV - normaliser_RL[..., None]
    # exp(-inf) * -inf would be NaN for banned tokens; their share of the entropy is 0.
    entropies_RL = -jnp.where(log_law_RLV > -jnp.inf, jnp.exp(log_law_RLV) * log_law_RLV, 0.0).sum(axis=-1)
  if with_sum_squares:
    log_sum_squares_RL = jax.nn.logsumexp(2 * logits_RLV, axis=-1) - 2 * normaliser_RL
  if with_greedy:
    is_greedy_RL = jnp.argmax(logits_RLV, axis=-1) == targets_RL
  return TokenStatistics(target_RL - normaliser_RL, entropies_RL, log_sum_squares_RL, is_greedy_RL)


def token_statistics(
  hidden_RLD: jax.Array,
  unembedding_VD: jax.Array,
  targets_RL: jax.Array,
  *,
  chunk_size: int | None = None,
  with_entropy: bool = False,
  with_sum_squares: bool = False,
  with_greedy: bool = False,
) -> TokenStatistics:
  """Log-probability of each target, and what else of its law is asked for, in one pass.

  Args:
    hidden_RLD: final-normed hidden states; their type is the type of the matrix product, the logits are
      float32 in any case.
    unembedding_VD: output head.
    targets_RL: int32 target ids.
    chunk_size: about how many tokens to hold logits for at a time, at least one position of every row;
      None: all. Cut along L and computed again for the gradient, which is exact: neither pass ever holds
      [R, L, V].
    with_entropy: whether to give the entropies.
    with_sum_squares: whether to give log sum_v p(v)^2.
    with_greedy: whether to say which targets greedy decoding takes.

  Raises:
    ValueError: if chunk_size is not positive.
  """
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size!r}: give a positive number of tokens, or None for no chunks")
  asked = dict(with_entropy=with_entropy, with_sum_squares=with_sum_squares, with_greedy=with_greedy)
  compute = functools.partial(_statistics, **asked)
  R, L = targets_RL.shape
  if chunk_size is None or chunk_size >= R * L:
    return compute(hidden_RLD, unembedding_VD, targets_RL)
  num_chunks = -(-L // max(1, chunk_size // R))
  width = -(-L // num_chunks)
  padding = num_chunks * width - L

  def cut(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(R, num_chunks, width, *x.shape[2:]).swapaxes(0, 1)

  @jax.checkpoint
  def step(head_VD: jax.Array, hidden_RWD: jax.Array, targets_RW: jax.Array) -> TokenStatistics:
    return compute(hidden_RWD, head_VD, targets_RW)

  def scan_step(_, chunk):
    return None, step(unembedding_VD, *chunk)

  _, statistics_CRW = jax.lax.scan(scan_step, None, (cut(hidden_RLD), cut(targets_RL)))
  return jax.tree.map(
    lambda leaf_CRW: leaf_CRW.swapaxes(0, 1).reshape(R, num_chunks * width)[:, :L], statistics_CRW
  )


class SequenceScores(NamedTuple):
  """Sums over the tokens of responses; any shape, all alike. The notation is that of arXiv 2305.18290.

  Attributes:
    policy: S, sum of the log-probabilities of the response under the trained model, nats.
    tokens: n, number of response tokens, the end of text included.
    reference: the same sum under the reference model; None where the loss needs none.
    policy_head: sum over the first m tokens alone (see `first_tokens`), for LD-DPO.
    reference_head: the same under the reference model.
    aligned: mean over tokens of log p(token) - log sum_v p(v)^2, for WPO.
    entropy: mean entropy of a response token's law, nats.
  """

  policy: jax.Array
  tokens: jax.Array
  reference: jax.Array | None = None
  policy_head: jax.Array | None = None
  reference_head: jax.Array | None = None
  aligned: jax.Array | None = None
  entropy: jax.Array | None = None


def _in_slot(segment_ids_RL: jax.Array, slots: int) -> jax.Array:
  return segment_ids_RL[..., None] == jnp.arange(1, slots + 1)


def sum_responses(
  values_RL: jax.Array,
  weights_RL: jax.Array,
  segment_ids_RL: jax.Array | None = None,
  slots: int = 1,
) -> jax.Array:
  """Sums weight times value over the tokens of each sequence.

  Args:
    values_RL: one number a token; where the weight is 0 it never counts, even NaN.
    weights_RL: float32, 1 at response tokens.
    segment_ids_RL: int32, the sequence of each token, counted from 1 within a row; 0 is padding. None:
      a row is one sequence.
    slots: static, most sequences in a row.

  Returns:
    float32 [R, slots]; 0 where there is no such sequence.

  Raises:
    ValueError: several slots without segments.
  """
  values_RL = jnp.where(weights_RL == 0, 0.0, values_RL) * weights_RL
  if segment_ids_RL is None:
    if slots != 1:
      raise ValueError(f"slots={slots}: give segment_ids_RL, or one sequence a row")
    return values_RL.sum(axis=-1, keepdims=True)
  return jnp.where(_in_slot(segment_ids_RL, slots), values_RL[..., None], 0.0).sum(axis=-2)


def first_tokens(
  weights_RL: jax.Array, limits_RS: jax.Array, segment_ids_RL: jax.Array | None = None
) -> jax.Array:
  """Returns the weights with all but the first `limits_RS` response tokens of each sequence set to 0.

  Args:
    weights_RL: float32, 1 at response tokens.
    limits_RS: how many tokens of each sequence are kept.
    segment_ids_RL: as in `sum_responses`; the sequences of a row lie one behind another, in order.
  """
  counted_RL = (weights_RL != 0).astype(jnp.int32)
  rank_RL = jnp.cumsum(counted_RL, axis=-1)
  if segment_ids_RL is None:
    return jnp.where(rank_RL <= limits_RS[:, :1], weights_RL, 0.0)
  in_slot_RLS = _in_slot(segment_ids_RL, limits_RS.shape[-1])
  tokens_RS = jnp.where(in_slot_RLS, counted_RL[..., None], 0).sum(axis=-2)
  before_RS = jnp.cumsum(tokens_RS, axis=-1) - tokens_RS
  is_kept_RLS = in_slot_RLS & (rank_RL[..., None] <= (before_RS + limits_RS)[:, None, :])
  return jnp.where(is_kept_RLS.any(axis=-1), weights_RL, 0.0)
