"""Where inserted rows stand: behind every token, or behind every n-th.

Above the insertion the stream has a row for each token and, behind it, one for what is inserted. Token
first, insertion second; an inserted row has the position and the segment of its token. With `insert_every`
n only tokens at positions n - 1, 2n - 1, ... have such a row. Positions count, not places in a batch, so that
padding and packing change nothing. (The paper inserts behind every token.)
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from nr.models.attention import AttentionInputs
from nr.models.partitioning import constrain

UNSEEN = 1 << 20
"""Added to the segment of a row that nobody may see; documents of a window are fewer."""


class RowLayout(NamedTuple):
  """The rows of a stream of L tokens above the insertion.

  Attributes:
    length: L.
    every: n; token n - 1 of every n has a row behind it.
    is_seen_BL: None where there are exactly these rows, L + L // n of them. Else there is one behind each
      token, 2L rows, and those where this is False nobody sees: for tokens whose positions are not known
      while tracing.
  """

  length: int
  every: int = 1
  is_seen_BL: jax.Array | None = None

  @classmethod
  def of(cls, attention: AttentionInputs, every: int, is_counted_from_0: bool) -> Self:
    """Returns the layout for rows of tokens; `is_counted_from_0` says that their positions are 0, 1, ..., L - 1."""
    length = attention.positions_BL.shape[1]
    if every == 1 or is_counted_from_0:
      return cls(length, every)
    return cls(length, 1, (attention.positions_BL + 1) % every == 0)

  def parents(self, x_BLD: jax.Array) -> jax.Array:
    """Returns the rows [B, M, ...] of those tokens that have a row behind them."""
    return x_BLD if self.every == 1 else x_BLD[:, self.every - 1 :: self.every]

  def insert(self, tokens_BLD: jax.Array, inserted_BMD: jax.Array) -> jax.Array:
    """Returns all rows: those of the tokens, and the inserted ones behind their parents."""
    rows = self._join(tokens_BLD, inserted_BMD)
    return constrain(rows, "batch", "length", "activation_embed")

  def attention(self, tokens: AttentionInputs) -> AttentionInputs:
    """Returns what attention knows of all rows.

    In a tree, both rows of a token see both rows of its ancestors, its own token row,
    and only the inserted row sees itself.
    """
    positions_BR = self._join(tokens.positions_BL, self.parents(tokens.positions_BL))
    segment_ids_BR, visible_BRR = tokens.segment_ids_BL, tokens.visible_BLL
    if self.is_seen_BL is not None:
      whole_BL = jnp.ones_like(tokens.positions_BL) if segment_ids_BR is None else segment_ids_BR
      unseen_BL = jnp.where((whole_BL == 0) | self.is_seen_BL, whole_BL, whole_BL + UNSEEN)
      segment_ids_BR = self._join(whole_BL, unseen_BL)
    elif segment_ids_BR is not None:
      segment_ids_BR = self._join(segment_ids_BR, self.parents(segment_ids_BR))
    if visible_BRR is not None:
      visible_BRR = jnp.repeat(jnp.repeat(visible_BRR, 2, axis=1), 2, axis=2)
      visible_BRR = visible_BRR & jnp.tril(jnp.ones(visible_BRR.shape[1:], bool))
    return AttentionInputs(positions_BR, segment_ids_BR, visible_BRR)

  def tokens(self, rows_BRD: jax.Array) -> jax.Array:
    """Returns the rows [B, L, D] of the tokens themselves."""
    grouped_BMND, tail = self._split(rows_BRD)
    return self._flatten(grouped_BMND[:, :, :-1], tail)

  def readout(self, rows_BRD: jax.Array) -> jax.Array:
    """Returns the rows [B, L, D] at which next tokens are read: the inserted one where a token has one."""
    grouped_BMND, tail = self._split(rows_BRD)
    if self.every == 1:
      read_BLD = grouped_BMND[:, :, 1]
    else:
      read_BMND = jnp.concatenate([grouped_BMND[:, :, :-2], grouped_BMND[:, :, -1:]], axis=2)
      read_BLD = self._flatten(read_BMND, tail)
    if self.is_seen_BL is None:
      return read_BLD
    return jnp.where(self.is_seen_BL[..., None], read_BLD, grouped_BMND[:, :, 0])

  def _join(self, tokens: jax.Array, inserted: jax.Array) -> jax.Array:
    """Puts inserted entry m behind token (m + 1) n - 1, along axis 1."""
    groups = self.length // self.every
    whole = groups * self.every
    grouped = tokens[:, :whole].reshape(tokens.shape[0], groups, self.every, *tokens.shape[2:])
    return self._flatten(jnp.concatenate([grouped, inserted[:, :, None]], axis=2), tokens[:, whole:])

  def _split(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns rows in groups [B, M, n + 1, ...], and those behind the last group."""
    groups = self.length // self.every
    whole = groups * (self.every + 1)
    grouped = rows[:, :whole].reshape(rows.shape[0], groups, self.every + 1, *rows.shape[2:])
    return grouped, rows[:, whole:]

  def _flatten(self, grouped: jax.Array, tail: jax.Array) -> jax.Array:
    """Undoes the grouping."""
    batch, groups, size = grouped.shape[:3]
    flat = grouped.reshape(batch, groups * size, *grouped.shape[3:])
    return flat if tail.shape[1] == 0 else jnp.concatenate([flat, tail], axis=1)
