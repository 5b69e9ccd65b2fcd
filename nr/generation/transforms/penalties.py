"""Penalties for what was said before: by token, by n-gram, by repeated sequence.

Counts are kept as [B, V] state and changed by one scatter a step. What repeated
sequences need is kept by slot of the history, [B, S], so that no step costs more
than one pass over it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import (
  Context,
  Parameter,
  State,
  Transform,
  all_equal,
  column,
  row,
  static,
  table,
  transform,
)
from nr.generation.transforms.history import (
  NOTHING,
  extend_repeats,
  history_starts,
  is_tail,
  mark,
  members,
  repeats_before,
  sequence_ends,
  sequence_table,
  tail_after,
)
from nr.generation.transforms.thresholds import scattered

SCOPES = ("all", "generated")


class _Counted(Transform):
  """Keeps int32 counts [B, V] of the tokens in scope, at most `window` back."""

  scope: str
  window: Parameter

  def init(self, context: Context, vocab_size: int) -> jax.Array:
    """Counts the history."""
    slots_S = jnp.arange(context.tokens_BS.shape[1])
    starts_B = history_starts(context, self.scope, self.window)
    is_counted_BS = (slots_S >= starts_B[:, None]) & (slots_S < context.lengths_B[:, None])
    tokens_BS = jnp.where(is_counted_BS, context.tokens_BS, vocab_size)
    return scattered(jnp.zeros((tokens_BS.shape[0], vocab_size), jnp.int32), tokens_BS, 1, "add")

  def commit(self, state: jax.Array, tokens_B: jax.Array, context: Context) -> jax.Array:
    """Counts the new token, and takes back the one that leaves the window."""
    leaving_B = context.lengths_B - jnp.asarray(self.window)
    is_leaving_B = (jnp.asarray(self.window) > 0) & (leaving_B >= history_starts(context, self.scope, 0))
    slots_B1 = jnp.maximum(leaving_B, 0)[:, None]
    left_B = jnp.take_along_axis(context.tokens_BS, slots_B1, axis=1, mode="clip")[:, 0]
    left_B = jnp.where(is_leaving_B, left_B, state.shape[1])
    changed_B2 = jnp.stack([tokens_B, left_B], axis=1)
    return scattered(state, changed_B2, jnp.array([1, -1]), "add")


@transform("repetition_penalty")
class RepetitionPenalty(_Counted):
  """Makes tokens that occurred less probable: z / penalty where z > 0, else z * penalty.

  Source: arXiv:1909.05858, with the multiplication of negative logits that every peer has.

  Attributes:
    penalty: 1 is off; below 1 favours what occurred.
    scope: "all" counts the prompt too, as transformers and vLLM do; or "generated".
    window: how many of the last tokens count; 0 for all.
  """

  penalty: Parameter = row(above=0)
  scope: str = static("all", SCOPES)
  window: Parameter = row(0, dtype=jnp.int32, least=0)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns penalised logits."""
    penalty_B1 = column(self.penalty)
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(state > 0, penalised_BV, logits_BV)

  def is_off(self) -> bool:
    """Whether the penalty is 1 everywhere."""
    return all_equal(self.penalty, 1)


@transform("frequency_presence")
class FrequencyPresence(_Counted):
  """Subtracts frequency * count + presence * [count > 0].

  Attributes:
    frequency: nats an occurrence; 0 is off.
    presence: nats once; 0 is off.
    scope: "generated", as vLLM and SGLang count; or "all", as llama.cpp does.
    window: how many of the last tokens count; 0 for all.
  """

  frequency: Parameter = row(0.0)
  presence: Parameter = row(0.0)
  scope: str = static("generated", SCOPES)
  window: Parameter = row(0, dtype=jnp.int32, least=0)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns penalised logits."""
    return logits_BV - column(self.frequency) * state - jnp.where(state > 0, column(self.presence), 0.0)

  def is_off(self) -> bool:
    """Whether both are 0 everywhere."""
    return all_equal(self.frequency, 0) and all_equal(self.presence, 0)


@transform("no_repeat_ngram")
class NoRepeatNgram(Transform):
  """Bans tokens that would make an n-gram occur a second time, prompt included.

  Attributes:
    n: its length; 1 bans every token that occurred, 0 is off.
  """

  n: Parameter = row(dtype=jnp.int32, least=0)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans what followed the last n - 1 tokens before."""
    n_B1 = column(self.n)
    repeats_BS = repeats_before(context, jnp.max(n_B1) - 1)
    is_past_BS = jnp.arange(repeats_BS.shape[1]) < context.lengths_B[:, None]
    is_banned_BS = is_past_BS & (repeats_BS >= n_B1 - 1) & (n_B1 > 0)
    return jnp.where(mark(context.tokens_BS, is_banned_BS, logits_BV.shape[1]), -jnp.inf, logits_BV)

  def is_off(self) -> bool:
    """Whether n is 0 everywhere."""
    return all_equal(self.n, 0)


@transform("dry")
class Dry(Transform):
  """Penalises the token that would extend a repetition, the more the longer it is.

  Where the last r tokens occurred before, what followed them there loses
  multiplier * base^(r - allowed_length), if r >= allowed_length; the longest such r
  counts. A repetition does not reach across a breaker, and single-token breakers are
  never penalised. Source: llama.cpp, `llama_sampler_dry_apply`; breakers are given
  as tokens here, and the one that was completed last counts.

  The state is how far the text before each slot agrees with the end of the text,
  int32 [B, S], and the number of tokens since a breaker, [B]: a token more costs
  one pass over the history, however long the repetition.

  Attributes:
    multiplier: 0 is off.
    base: at least 1.
    allowed_length: tokens that may repeat freely.
    window: how many of the last tokens are looked at; 0 for all.
    breakers: token ids, or sequences of them.
  """

  multiplier: Parameter = row(least=0)
  base: Parameter = row(1.75, least=1)
  allowed_length: Parameter = row(2, dtype=jnp.int32, least=0)
  window: Parameter = row(0, dtype=jnp.int32, least=0)
  breakers: Any = table(())

  def prepared(self) -> "Dry":
    """Returns it with the breakers as one array [N, K], padded in front.

    Raises:
      ValueError: a breaker that is no sequence of token ids.
    """
    checked = super().prepared()
    return dataclasses.replace(checked, breakers=self._breakers())

  def init(self, context: Context, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Reads the history."""
    slots_S = jnp.arange(context.tokens_BS.shape[1])
    lengths_B1 = context.lengths_B[:, None]
    ends_BS = sequence_ends(self._breakers(), context.tokens_BS) & (slots_S < lengths_B1)
    last_B = jnp.where(ends_BS, slots_S, -1).max(axis=1, initial=-1)
    return repeats_before(context, context.tokens_BS.shape[1]), context.lengths_B - 1 - last_B

  def apply(self, logits_BV: jax.Array, state: tuple[jax.Array, jax.Array], context: Context) -> jax.Array:
    """Subtracts the penalties."""
    repeats_BS, since_breaker_B = state
    slots_S, starts_B = jnp.arange(repeats_BS.shape[1]), history_starts(context, "all", self.window)
    ahead_BS = slots_S - starts_B[:, None]  # tokens of the window before each slot
    lengths_BS = jnp.minimum(jnp.minimum(repeats_BS, ahead_BS), since_breaker_B[:, None])
    excess_BS = lengths_BS - column(self.allowed_length)
    is_repeat_BS = (excess_BS >= 0) & (ahead_BS > 0) & (slots_S < context.lengths_B[:, None])
    # As far as float32 reaches; base 1 has no bound.
    log_base_B1 = jnp.log(column(self.base))
    most_B1 = jnp.where(log_base_B1 > 1e-6, jnp.floor(88.72 / jnp.maximum(log_base_B1, 1e-6)), jnp.inf)
    penalties_BS = column(self.multiplier) * column(self.base) ** jnp.clip(excess_BS, 0, most_B1)
    tokens_BS = jnp.where(is_repeat_BS, context.tokens_BS, logits_BV.shape[1])
    penalties_BV = scattered(jnp.zeros(logits_BV.shape, jnp.float32), tokens_BS, penalties_BS, "max")
    breakers_NK = self._breakers()
    is_single_N = (breakers_NK[:, :-1] == NOTHING).all(axis=1)
    singles_N = jnp.where(is_single_N, breakers_NK[:, -1], logits_BV.shape[1])
    return logits_BV - jnp.where(members(singles_N, logits_BV.shape[1]), 0.0, penalties_BV)

  def commit(
    self, state: tuple[jax.Array, jax.Array], tokens_B: jax.Array, context: Context
  ) -> tuple[jax.Array, jax.Array]:
    """Extends or ends the agreements by the new token."""
    repeats_BS, since_breaker_B = state
    breakers_NK = self._breakers()
    recent_BK = tail_after(context, tokens_B, breakers_NK.shape[1])
    is_end_B = is_tail(breakers_NK, recent_BK).any(axis=1)
    return extend_repeats(repeats_BS, tokens_B, context), jnp.where(is_end_B, 0, since_breaker_B + 1)

  def is_off(self) -> bool:
    """Whether the multiplier is 0 everywhere."""
    return all_equal(self.multiplier, 0)

  def _breakers(self) -> jax.Array:
    return sequence_table("dry.breakers", self.breakers)
