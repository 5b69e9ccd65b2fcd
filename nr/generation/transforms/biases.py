"""Biases of tokens and of sequences of tokens."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import Context, State, Transform, all_equal, table, transform
from nr.generation.transforms.history import is_tail, members, sequence_table, tail, token_ids
from nr.generation.transforms.thresholds import scattered


class WithTokens(Transform):
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


class WithSequences(Transform):
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
    last_BN = jnp.broadcast_to(sequences_NK[:, -1], biases_BN.shape)
    return scattered(logits_BV, last_BN, biases_BN, "add")


@transform("logit_bias")
class LogitBias(WithTokens):
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
class SequenceBias(WithSequences):
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
class BadWords(WithSequences):
  """Never lets a sequence of tokens be completed.

  Attributes:
    sequences: of token ids, of any lengths.
  """

  sequences: Any = table()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans the last token of each sequence that is all but complete."""
    return self.biased(logits_BV, -jnp.inf, context)
