"""Rules about single tokens: allowed, banned and forced ones, lengths, thinking budgets, loops."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import (
  Context,
  Parameter,
  State,
  Transform,
  all_equal,
  column,
  keep,
  row,
  static,
  table,
  transform,
)
from nr.generation.transforms.biases import WithTokens
from nr.generation.transforms.history import (
  counted,
  is_tail,
  sequence_ends,
  tail,
  tail_after,
  token_ids,
)

SCOPES = ("generated", "all")


@transform("allowed_tokens")
class AllowedTokens(WithTokens):
  """Bans all tokens but those listed.

  Attributes:
    tokens: token ids.
  """

  tokens: Any = table()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans the others."""
    return keep(logits_BV, self.is_member(logits_BV))


@transform("suppress_tokens")
class SuppressTokens(WithTokens):
  """Bans tokens, always or at the beginning only.

  Attributes:
    tokens: token ids.
    steps: ban them among the first so many generated tokens; -1 always, 0 is off.
  """

  tokens: Any = table()
  steps: Parameter = row(-1, dtype=jnp.int32, least=-1)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans them."""
    is_on_B1 = (column(self.steps) < 0) | (context.generated_B[:, None] < column(self.steps))
    return keep(logits_BV, ~(is_on_B1 & self.is_member(logits_BV)))

  def is_off(self) -> bool:
    """Whether it lasts 0 steps everywhere."""
    return all_equal(self.steps, 0)


@transform("min_length")
class MinLength(WithTokens):
  """Bans tokens, such as the end of text, before a length.

  Attributes:
    tokens: ids that would end the text.
    least: tokens before they are allowed; 0 is off.
    scope: "generated", or "all" to count the prompt too.
  """

  tokens: Any = table()
  least: Parameter = row(dtype=jnp.int32, least=0)
  scope: str = static("generated", SCOPES)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans them while the text is too short."""
    is_short_B1 = counted(context, self.scope)[:, None] < column(self.least)
    return keep(logits_BV, ~(is_short_B1 & self.is_member(logits_BV)))

  def is_off(self) -> bool:
    """Whether the length is 0 everywhere."""
    return all_equal(self.least, 0)


@transform("max_length")
class MaxLength(WithTokens):
  """Forces tokens, such as the end of text, where a length is reached.

  Attributes:
    tokens: ids of which one must be chosen then; all equally probable.
    most: length with that token, from which on it is forced; 0 is off.
    scope: "generated", or "all" to count the prompt too.
  """

  tokens: Any = table()
  most: Parameter = row(dtype=jnp.int32, least=0)
  scope: str = static("generated", SCOPES)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Forces them at the last position."""
    most_B1 = column(self.most)
    is_last_B1 = (most_B1 > 0) & (counted(context, self.scope)[:, None] >= most_B1 - 1)
    return _forced(logits_BV, is_last_B1, self.is_member(logits_BV))

  def is_off(self) -> bool:
    """Whether the length is 0 everywhere."""
    return all_equal(self.most, 0)


@transform("forced_tokens")
class ForcedTokens(WithTokens):
  """Forces tokens at one position, such as the beginning of text.

  Attributes:
    tokens: ids of which one must be chosen there; all equally probable.
    position: how many tokens come before it; -1 is off.
    scope: "generated", or "all" to count the prompt too.
  """

  tokens: Any = table()
  position: Parameter = row(0, dtype=jnp.int32, least=-1)
  scope: str = static("generated", SCOPES)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Forces them at that position."""
    is_there_B1 = counted(context, self.scope)[:, None] == column(self.position)
    return _forced(logits_BV, is_there_B1, self.is_member(logits_BV))

  def is_off(self) -> bool:
    """Whether the position is -1 everywhere."""
    return all_equal(self.position, -1)


@transform("exponential_decay")
class ExponentialDecay(WithTokens):
  """Raises the logits of tokens, such as the end of text, ever faster: z += |z| (factor^n - 1).

  n counts the generated tokens beyond `start`. Rule as in transformers.

  Attributes:
    tokens: ids that would end the text.
    start: generated tokens before it begins.
    factor: above 1 presses for an end; 1 is off.
  """

  tokens: Any = table()
  start: Parameter = row(dtype=jnp.int32, least=0)
  factor: Parameter = row(above=0)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns raised logits."""
    beyond_B1 = jnp.maximum(context.generated_B[:, None] - column(self.start), 0)
    # A banned token stays so: |-inf| times 0 or more would be NaN or lift the ban.
    size_BV = jnp.where(jnp.isfinite(logits_BV), jnp.abs(logits_BV), 0.0)
    raised_BV = logits_BV + size_BV * (column(self.factor) ** beyond_B1 - 1)
    return jnp.where(self.is_member(logits_BV), raised_BV, logits_BV)

  def is_off(self) -> bool:
    """Whether the factor is 1 everywhere."""
    return all_equal(self.factor, 1)


@transform("thinking_budget")
class ThinkingBudget(Transform):
  """Ends thinking at a budget: once it is spent, only the end sequence can be said.

  Thinking begins with the token `start`, also within the prompt, and is over when
  the end sequence is complete. What was said of that sequence already is not said twice.

  Attributes:
    start: id that opens thinking.
    end: ids that close it, in order.
    budget: tokens between them; -1 is off.
  """

  start: Any = table()
  end: Any = table()
  budget: Parameter = row(dtype=jnp.int32, least=-1)

  def prepared(self) -> Self:
    """Returns it with arrays.

    Raises:
      ValueError: no token ids, or the start is part of the end.
    """
    start_1 = token_ids("thinking_budget.start", self.start)
    end_K = token_ids("thinking_budget.end", self.end)
    if start_1.size != 1:
      raise ValueError(f"thinking_budget.start={self.start!r}: give one token id")
    if not isinstance(start_1, jax.core.Tracer) and start_1[0] in end_K:
      raise ValueError(f"thinking_budget.end={self.end!r} contains the start {self.start!r}; give another")
    return dataclasses.replace(super().prepared(), start=start_1[0], end=end_K)

  def init(self, context: Context, vocab_size: int) -> jax.Array:
    """Returns int32 [B], how many tokens of thinking there are; -1 outside of it."""
    slots_S = jnp.arange(context.tokens_BS.shape[1])
    is_text_BS = slots_S < context.lengths_B[:, None]
    is_end_BS = sequence_ends(self._end()[None], context.tokens_BS) & is_text_BS
    last_end_B1 = jnp.where(is_end_BS, slots_S, -1).max(axis=1, keepdims=True)
    is_open_BS = (context.tokens_BS == self.start) & is_text_BS & (slots_S > last_end_B1)
    opened_B = jnp.argmax(is_open_BS, axis=1)
    return jnp.where(is_open_BS.any(axis=1), context.lengths_B - 1 - opened_B, -1)

  def apply(self, logits_BV: jax.Array, state: jax.Array, context: Context) -> jax.Array:
    """Forces the next token of the end sequence where the budget is spent."""
    end_K = self._end()
    size = end_K.shape[0]
    recent_BK = tail(context, size)
    said_B = jnp.zeros_like(state)  # how much of the end sequence the text ends with
    for count in range(1, size):
      is_said_B = (recent_BK[:, size - count :] == end_K[:count]).all(axis=1)
      said_B = jnp.where(is_said_B, count, said_B)
    budget_B1 = column(self.budget)
    is_spent_B1 = (budget_B1 >= 0) & (state[:, None] >= jnp.maximum(budget_B1, 0))
    is_next_BV = jnp.arange(logits_BV.shape[1]) == end_K[said_B][:, None]
    return _forced(logits_BV, is_spent_B1, is_next_BV)

  def commit(self, state: jax.Array, tokens_B: jax.Array, context: Context) -> jax.Array:
    """Counts the token, or opens or closes thinking by it."""
    end_K = self._end()
    is_over_B = is_tail(end_K[None], tail_after(context, tokens_B, end_K.shape[0]))[:, 0]
    opened_B = jnp.where(tokens_B == self.start, 0, -1)
    going_B = jnp.where(is_over_B, -1, state + 1)
    return jnp.where(state >= 0, going_B, opened_B)

  def is_off(self) -> bool:
    """Whether the budget is -1 everywhere."""
    return all_equal(self.budget, -1)

  def _end(self) -> jax.Array:
    return token_ids("thinking_budget.end", self.end)


def _forced(logits_BV: jax.Array, is_forced_B1: jax.Array, is_member_BV: jax.Array) -> jax.Array:
  forced_BV = jnp.where(is_member_BV, 0.0, -jnp.inf)
  # A NaN stays, so that its row is still seen to be broken.
  return jnp.where(is_forced_B1 & ~jnp.isnan(logits_BV), forced_BV, logits_BV)


def is_looping(context: Context, most_period: int, repeats: int) -> jax.Array:
  """Says which rows ended in a pattern said again and again.

  Args:
    context: the history; only generated tokens count.
    most_period: patterns of up to so many tokens are looked for; 0 for none.
    repeats: how often a pattern must come in a row, at least 2.

  Returns:
    bool [B].

  Source: the rule of vLLM's repetition detection, `check_sequence_repetition`.
  """
  if repeats < 2:
    raise ValueError(f"repeats={repeats}: give 2 or more")
  size = min(most_period * repeats, context.tokens_BS.shape[1])
  if size < 2:
    return jnp.zeros(context.lengths_B.shape, bool)
  recent_BK = tail(context, size)
  back_K = jnp.arange(size, 0, -1)  # 1 is the last token

  def add(period: jax.Array, is_found_B: jax.Array) -> jax.Array:
    earlier_BK = jnp.roll(recent_BK, period, axis=1)
    is_asked_K = back_K <= period * (repeats - 1)
    is_pattern_B = (~is_asked_K | (recent_BK == earlier_BK)).all(axis=1)
    return is_found_B | (is_pattern_B & (period * repeats <= context.generated_B))

  none_B = jnp.zeros(context.lengths_B.shape, bool)
  return jax.lax.fori_loop(1, min(most_period, size // repeats) + 1, add, none_B)
