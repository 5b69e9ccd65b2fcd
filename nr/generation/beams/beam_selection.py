"""What one step of a beam search decides: which continuations there are, which go on, which have ended.

Pure functions of arrays, for one group of W beams a prompt. A sum of -inf marks a
beam that does not exist.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr.generation.stopping import DEAD_END, LENGTH
from nr.models.top_k import top_k

NORMALIZATIONS = ("power", "gnmt", "additive")
STOP_RULES = ("never", "when_full", "heuristic")


class Candidates(NamedTuple):
  """M continuations of the beams of each prompt.

  Attributes:
    sums_BM: float32 accumulated selection score, nats; -inf: none.
    parents_BM: int32, the beam 0..W-1 that each continues.
    tokens_BM: int32, by which token.
    places_BM: int32; only those before W may end.
    ranks_BM: float32; the W largest of those that have not ended go on.
  """

  sums_BM: jax.Array
  parents_BM: jax.Array
  tokens_BM: jax.Array
  places_BM: jax.Array
  ranks_BM: jax.Array


class Ended(NamedTuple):
  """The best texts that have ended, best first; W a prompt and group.

  Attributes:
    tokens_BWN: int32 generated tokens.
    lengths_BW: int32, the stop id included.
    scores_BW: float32 normalised selection score; -inf: an empty slot.
    log_probs_BW: float32 nats, under the model.
    transformed_BW: float32 nats, under the chain's law.
    finish_BW: int32 finish codes.
  """

  tokens_BWN: jax.Array
  lengths_BW: jax.Array
  scores_BW: jax.Array
  log_probs_BW: jax.Array
  transformed_BW: jax.Array
  finish_BW: jax.Array


def normalised(sums: jax.Array, lengths: jax.Array, penalty: jax.Array, normalization: str) -> jax.Array:
  """Returns the score of ended texts.

  "power" is sum / length ** penalty, as transformers 5.23.0 has it; "gnmt" is
  sum / ((5 + length) / 6) ** penalty; "additive" is sum + penalty * length.

  Args:
    sums: float32 nats.
    lengths: int32 tokens, the stop id included.
    penalty: float32, 0 leaves the sum as it is; shapes broadcast.
    normalization: one of `NORMALIZATIONS`.
  """
  lengths = lengths.astype(jnp.float32)
  if normalization == "additive":
    return sums + penalty * lengths
  base = lengths if normalization == "power" else (5.0 + lengths) / 6.0
  return sums / base**penalty


def best_candidates(totals_BWV: jax.Array, count: int) -> Candidates:
  """Returns the `count` continuations with the largest sums, best first; the lowest beam and id among equals."""
  batch, _, vocab_size = totals_BWV.shape
  sums_BM, flat_BM = top_k(totals_BWV.reshape(batch, -1), count)
  places_BM = jnp.broadcast_to(jnp.arange(count), sums_BM.shape)
  return Candidates(sums_BM, flat_BM // vocab_size, flat_BM % vocab_size, places_BM, sums_BM)


def drawn_candidates(totals_BWV: jax.Array, count: int, keys_B: jax.Array) -> Candidates:
  """Draws `count` continuations without replacement from the softmax of the sums, in the order drawn.

  Those that go on are the best of those drawn, as in transformers 5.23.0.
  """
  batch, _, vocab_size = totals_BWV.shape
  totals_BX = totals_BWV.reshape(batch, -1)
  noise_BX = jax.vmap(lambda key: jax.random.gumbel(key, totals_BX.shape[1:]))(keys_B)
  flat_BM = top_k(totals_BX + noise_BX, count)[1]
  sums_BM = jnp.take_along_axis(totals_BX, flat_BM, axis=1)
  places_BM = jnp.broadcast_to(jnp.arange(count), sums_BM.shape)
  return Candidates(sums_BM, flat_BM // vocab_size, flat_BM % vocab_size, places_BM, sums_BM)


def survivors(candidates: Candidates, can_go_on_BM: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
  """Chooses the beams that go on.

  Returns:
    int32 [B, W] which candidates, and their sums, -inf where there is none.
  """
  sums_BM = jnp.where(can_go_on_BM, candidates.sums_BM, -jnp.inf)
  picked_BW = top_k(jnp.where(sums_BM > -jnp.inf, candidates.ranks_BM, -jnp.inf), width)[1]
  return picked_BW, jnp.take_along_axis(sums_BM, picked_BW, axis=1)


def merged(ended: Ended, new: Ended) -> Ended:
  """Returns the W best of two lists; the earlier one among equals."""
  both = jax.tree.map(lambda old, more: jnp.concatenate([old, more], axis=1), ended, new)
  return best_of(both, ended.scores_BW.shape[1])


def best_of(ended: Ended, count: int) -> Ended:
  """Returns the `count` best, best first."""
  picked_BW = top_k(ended.scores_BW, count)[1]
  return jax.tree.map(lambda leaf: picked(leaf, picked_BW), ended)


def picked(leaf_BM: jax.Array, picked_BW: jax.Array) -> jax.Array:
  """Gathers along the second axis of an array with any further axes, by indices that are never outside."""
  # Without the checks of an ordinary gather, which make up a good part of the program.
  inside = dict(mode="promise_in_bounds", wrap_negative_indices=False)
  return jax.vmap(lambda leaf_M, picked_W: leaf_M.at[picked_W].get(**inside))(leaf_BM, picked_BW)


def nothing_ended(
  shape: tuple[int, int], limits_B: jax.Array, max_new_tokens: int, filler: jax.Array
) -> Ended:
  """Returns [B, *shape] empty slots, except for prompts that may add nothing: their empty text has ended."""
  shape = (limits_B.shape[0], *shape)
  is_whole = jnp.broadcast_to((limits_B[:, None, None] == 0) & (jnp.arange(shape[-1]) == 0), shape)
  empty = jnp.where(is_whole, 0.0, -jnp.inf)
  finish = jnp.where(is_whole, LENGTH, DEAD_END).astype(jnp.int32)
  tokens = jnp.full((*shape, max_new_tokens), filler)
  return Ended(tokens, jnp.zeros(shape, jnp.int32), empty, empty, empty, finish)


def can_improve(
  sums_BW: jax.Array,
  ended: Ended,
  lengths_B: jax.Array,
  limits_B: jax.Array,
  penalty_B: jax.Array,
  normalization: str,
  rule: jax.Array,
) -> jax.Array:
  """Says which prompts go on, by the rules of transformers 5.23.0.

  "when_full" (`early_stopping=True`) ends with W ended texts. The others go on until
  there are W of them and the best beam cannot reach the worst; what it could reach
  is estimated at its present length by "heuristic" (`early_stopping=False`), and by
  "never" at the limit when the penalty favours length. For log-probabilities
  without per-step rewards "never" is exact.

  Args:
    sums_BW: of the beams that go on.
    ended: the W best texts so far.
    lengths_B: int32, tokens of the beams.
    limits_B: int32, most tokens.
    penalty_B: float32.
    normalization: one of `NORMALIZATIONS`.
    rule: int32, place in `STOP_RULES`; traced, so that no rule compiles anew.
  """
  best_B, worst_B = sums_BW.max(axis=1), ended.scores_BW.min(axis=1)
  is_never, is_when_full = (rule == STOP_RULES.index(name) for name in ("never", "when_full"))
  lengths_B = jnp.where(is_never & (penalty_B > 0), limits_B, lengths_B)
  reach_B = normalised(best_B, lengths_B, penalty_B, normalization)
  return (reach_B > worst_B) & ~(is_when_full & (worst_B > -jnp.inf))
