"""What transforms read from the history: its last tokens, its repetitions, lists of tokens."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.transforms.algebra import Context, Parameter
from nr.generation.transforms.thresholds import scattered

# Fills short sequences up in front; no token.
NOTHING = -1


def token_ids(label: str, tokens: Any) -> jax.Array:
  """Returns token ids as int32 [K]; a single id makes K = 1.

  Raises:
    ValueError: none, a negative one, or something else than whole numbers.
  """
  if isinstance(tokens, jax.Array):
    return jnp.atleast_1d(tokens)
  ids = np.atleast_1d(np.asarray(tokens))
  if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer) or (ids < 0).any():
    raise ValueError(f"{label}={tokens!r}: give one token id or a list of them, each 0 or more")
  return jnp.asarray(ids, jnp.int32)


def sequence_table(label: str, sequences: Any) -> jax.Array:
  """Returns sequences of token ids as int32 [N, K], padded in front; ids stand for sequences of one.

  Raises:
    ValueError: an empty sequence, or one of something else than token ids.
  """
  if isinstance(sequences, jax.Array | np.ndarray) and sequences.ndim == 2:
    return jnp.asarray(sequences, jnp.int32)
  rows = []
  for sequence in _iterable(label, sequences):
    try:
      rows.append(np.asarray(token_ids(label, sequence)))
    except ValueError as error:
      raise ValueError(f"{label}: {sequence!r} is no sequence of token ids of 0 or more") from error
  size = max((len(ids) for ids in rows), default=1)
  padded = [np.pad(ids, (size - len(ids), 0), constant_values=NOTHING) for ids in rows]
  return jnp.asarray(np.reshape(padded, (len(rows), size)), jnp.int32)


def _iterable(label: str, sequences: Any) -> Iterable:
  if isinstance(sequences, str) or not isinstance(sequences, Iterable):
    raise ValueError(f"{label}={sequences!r}: give a list of sequences of token ids")
  return sequences


def history_starts(context: Context, scope: str, window: Parameter) -> jax.Array:
  """Returns int32 [B], the first slot of the history that counts.

  Args:
    context: the history.
    scope: "all", or "generated" without the prompt.
    window: how many of the last tokens; 0 for all.
  """
  starts_B = context.prompt_lengths_B if scope == "generated" else jnp.zeros_like(context.lengths_B)
  window = jnp.asarray(window, jnp.int32)
  return jnp.where(window > 0, jnp.maximum(starts_B, context.lengths_B - window), starts_B)


def counted(context: Context, scope: str) -> jax.Array:
  """Returns int32 [B], tokens in scope: "all", or "generated"."""
  return context.generated_B if scope == "generated" else context.lengths_B


def tail(context: Context, size: int) -> jax.Array:
  """Returns the last tokens, int32 [B, size]; -2 where the history is shorter."""
  slots_BK = context.lengths_B[:, None] + jnp.arange(-size, 0)
  tokens_BK = jnp.take_along_axis(context.tokens_BS, jnp.maximum(slots_BK, 0), axis=1, mode="clip")
  return jnp.where(slots_BK >= 0, tokens_BK, NOTHING - 1)


def tail_after(context: Context, tokens_B: jax.Array, size: int) -> jax.Array:
  """Returns the last tokens once `tokens_B` will have been said, int32 [B, size]."""
  return jnp.concatenate([tail(context, size - 1), tokens_B[:, None].astype(jnp.int32)], axis=1)


def is_tail(sequences_NK: jax.Array, recent_BK: jax.Array) -> jax.Array:
  """Says which sequences the recent tokens end with, bool [B, N]."""
  return ((sequences_NK == NOTHING) | (sequences_NK == recent_BK[:, None])).all(axis=-1)


def sequence_ends(sequences_NK: jax.Array, tokens_BS: jax.Array) -> jax.Array:
  """Says in which slots one of the sequences is complete, bool [B, S]."""
  count, size = sequences_NK.shape
  if count == 0:
    return jnp.zeros(tokens_BS.shape, bool)
  slots_S = jnp.arange(tokens_BS.shape[1])

  # One sequence at a time: [B, S, N] would be far larger than the history.
  def add(index: jax.Array, ends_BS: jax.Array) -> jax.Array:
    is_end_BS = jnp.ones(tokens_BS.shape, bool)
    for back in range(size):
      wanted = sequences_NK[index, size - 1 - back]
      is_same_BS = (jnp.roll(tokens_BS, back, axis=1) == wanted) & (slots_S >= back)
      is_end_BS &= (wanted == NOTHING) | is_same_BS
    return ends_BS | is_end_BS

  return jax.lax.fori_loop(0, count, add, jnp.zeros(tokens_BS.shape, bool))


def mark(tokens_BS: jax.Array, is_marked_BS: jax.Array, vocab_size: int) -> jax.Array:
  """Returns bool [B, V]: the tokens of the marked slots."""
  ids_BS = jnp.where(is_marked_BS, tokens_BS, vocab_size)
  return scattered(jnp.zeros((tokens_BS.shape[0], vocab_size), bool), ids_BS, True, "set")


def members(ids_K: jax.Array, vocab_size: int) -> jax.Array:
  """Returns bool [1, V]: the tokens in a list."""
  return jnp.zeros((1, vocab_size), bool).at[0, ids_K].set(True, mode="drop")


def repeats_before(context: Context, most: jax.Array | int) -> jax.Array:
  """Tells how long the text before each slot agrees with the end of the text.

  Args:
    context: the history.
    most: agreements are counted up to here.

  Returns:
    int32 [B, S]: r in slot i says that the r tokens before slot i equal the last r of
    the history; 0 behind the history. Takes as many passes as the longest has tokens.
  """
  tokens_BS, lengths_B1 = context.tokens_BS, context.lengths_B[:, None]
  slots_S = jnp.arange(tokens_BS.shape[1])

  def is_going(carry: tuple) -> jax.Array:
    back, is_alive_BS, _ = carry
    return (back < most) & is_alive_BS.any()

  def compare(carry: tuple) -> tuple:
    back, is_alive_BS, repeats_BS = carry
    wanted_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(lengths_B1 - 1 - back, 0), axis=1, mode="clip")
    is_same_BS = jnp.roll(tokens_BS, back + 1, axis=1) == wanted_B1
    is_alive_BS = is_alive_BS & is_same_BS & (slots_S > back)
    return back + 1, is_alive_BS, repeats_BS + is_alive_BS

  start = (jnp.int32(0), slots_S < lengths_B1, jnp.zeros(tokens_BS.shape, jnp.int32))
  return jax.lax.while_loop(is_going, compare, start)[2]


def extend_repeats(repeats_BS: jax.Array, tokens_B: jax.Array, context: Context) -> jax.Array:
  """Returns `repeats_before` of the history with one more token, from that of `context`."""
  is_past_BS = jnp.arange(repeats_BS.shape[1]) < context.lengths_B[:, None]
  is_same_BS = is_past_BS & (context.tokens_BS == tokens_B[:, None])
  return jnp.pad(jnp.where(is_same_BS, repeats_BS + 1, 0)[:, :-1], ((0, 0), (1, 0)))
