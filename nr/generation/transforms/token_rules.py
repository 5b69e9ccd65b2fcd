"""Hard and soft rules about single tokens: biases, bans, lengths, forced tokens, budgets, loops."""

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
from nr.generation.transforms.history import (
  counted,
  is_tail,
  members,
  sequence_ends,
  sequence_table,
  tail,
  token_ids,
)

SCOPES = ("generated", "all")


class _WithTokens(Transform):
  """Has a list `tokens` of token ids."""

  tokens: Any

  def prepared(self) -> Self:
    """Returns it with arrays.

    Raises:
      ValueError: no token ids, or a parameter outside its bounds.
    """
    return dataclasses.replace(super().prepared(), tokens=token_ids(f"{self.name}.tokens", self.tokens))

  def is_member(self, logits_BV: jax.Array) -> jax.Array:
    """Returns bool [1, V]: the tokens in the list."""
    return members(token_ids(f"{self.name}.tokens", self.tokens), logits_BV.shape[1])


class _WithSequences(Transform):
  """Has a list `sequences` of token sequences."""

  sequences: Any

  def prepared(self) -> Self:
    """Returns it with arrays.

    Raises:
      ValueError: no sequences of token ids, or a parameter outside its bounds.
    """
    return dataclasses.replace(super().prepared(), sequences=self.table())

  def table(self) -> jax.Array:
    """Returns the sequences, int32 [N, K]."""
    return sequence_table(f"{self.name}.sequences", self.sequences)

  def biased(self, logits_BV: jax.Array, biases: Any, context: Context) -> jax.Array:
    """Adds biases [N] to the last tokens of the sequences whose other tokens came last."""
    sequences_NK = self.table()
    recent_BK = tail(context, sequences_NK.shape[1] - 1)
    is_begun_BN = is_tail(sequences_NK[:, :-1], recent_BK)
    biases_BN = jnp.where(is_begun_BN, jnp.asarray(biases, jnp.float32), 0.0)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[rows_B1, sequences_NK[:, -1]].add(biases_BN, mode="drop")


@transform("logit_bias")
class LogitBias(_WithTokens):
  """Adds a bias to the logits of tokens.

  Attributes:
    tokens: token ids [K].
    biases: nats, [K] or one for all; -inf bans.
  """

  tokens: Any = table()
  biases: Any = table()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns biased logits."""
    ids_K = token_ids("logit_bias.tokens", self.tokens)
    biases_K = jnp.broadcast_to(jnp.asarray(self.biases, jnp.float32), ids_K.shape)
    bias_V = jnp.zeros(logits_BV.shape[1], jnp.float32).at[ids_K].add(biases_K, mode="drop")
    return logits_BV + bias_V

  def prepared(self) -> Self:
    """Returns it with arrays.

    Raises:
      ValueError: tokens and biases do not match.
    """
    checked = super().prepared()
    biases = jnp.asarray(self.biases, jnp.float32)
    if biases.ndim > 1 or biases.size not in (1, checked.tokens.size):
      raise ValueError(
        f"logit_bias.biases: {biases.size} for {checked.tokens.size} tokens; give one for each"
      )
    return dataclasses.replace(checked, biases=biases)

  def is_off(self) -> bool:
    """Whether all biases are 0."""
    return all_equal(self.biases, 0)


@transform("sequence_bias")
class SequenceBias(_WithSequences):
  """Adds a bias to the last token of a sequence, wherever the tokens before it came last.

  Attributes:
    sequences: of token ids, of any lengths.
    biases: nats, one for each.
  """

  sequences: Any = table()
  biases: Any = table()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns biased logits."""
    return self.biased(logits_BV, self.biases, context)

  def prepared(self) -> Self:
    """Returns it with arrays.

    Raises:
      ValueError: sequences and biases do not match.
    """
    checked = super().prepared()
    biases = jnp.asarray(self.biases, jnp.float32)
    if biases.shape != (checked.sequences.shape[0],):
      raise ValueError(
        f"sequence_bias.biases has shape {biases.shape} for {checked.sequences.shape[0]} sequences; "
        "give one for each"
      )
    return dataclasses.replace(checked, biases=biases)

  def is_off(self) -> bool:
    """Whether all biases are 0."""
    return all_equal(self.biases, 0)


@transform("bad_words")
class BadWords(_WithSequences):
  """Never lets a sequence of tokens be completed.

  Attributes:
    sequences: of token ids, of any lengths.
  """

  sequences: Any = table()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans the last token of each sequence that is all but complete."""
    return self.biased(logits_BV, -jnp.inf, context)


@transform("allowed_tokens")
class AllowedTokens(_WithTokens):
  """Bans all tokens but those listed.

  Attributes:
    tokens: token ids.
  """

  tokens: Any = table()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans the others."""
    return keep(logits_BV, self.is_member(logits_BV))


@transform("suppress_tokens")
class SuppressTokens(_WithTokens):
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
class MinLength(_WithTokens):
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
class MaxLength(_WithTokens):
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
class ForcedTokens(_WithTokens):
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
class ExponentialDecay(_WithTokens):
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
      is_said_B = (recent_BK[:, size - count :] == end_K[:count]).all(axis=1) & (count <= state)
      said_B = jnp.where(is_said_B, count, said_B)
    budget_B1 = column(self.budget)
    is_spent_B1 = (budget_B1 >= 0) & (state[:, None] >= jnp.maximum(budget_B1, 0))
    is_next_BV = jnp.arange(logits_BV.shape[1]) == end_K[said_B][:, None]
    return _forced(logits_BV, is_spent_B1, is_next_BV)

  def commit(self, state: jax.Array, tokens_B: jax.Array, context: Context) -> jax.Array:
    """Counts the token, or opens or closes thinking by it."""
    end_K = self._end()
    is_over_B = is_tail(end_K[None], tail(context.append(tokens_B), end_K.shape[0]))[:, 0]
    opened_B = jnp.where(tokens_B == self.start, 0, -1)
    going_B = jnp.where(is_over_B & (state + 1 >= end_K.shape[0]), -1, state + 1)
    return jnp.where(state >= 0, going_B, opened_B)

  def is_off(self) -> bool:
    """Whether the budget is -1 everywhere."""
    return all_equal(self.budget, -1)

  def _end(self) -> jax.Array:
    return token_ids("thinking_budget.end", self.end)


def _forced(logits_BV: jax.Array, is_forced_B1: jax.Array, is_member_BV: jax.Array) -> jax.Array:
  forced_BV = jnp.where(is_member_BV, 0.0, -jnp.inf)
  return jnp.where(is_forced_B1, forced_BV, logits_BV)


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
