"""When a row of generated text ends, and why."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.transforms.algebra import Context
from nr.generation.transforms.token_rules import is_looping

RUNNING, LENGTH, STOP_ID, STOP_STRING, LOOP, DEAD_END, BROKEN = range(7)
FINISH_REASONS = ("running", "length", "stop_id", "stop_string", "loop", "dead_end", "broken")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stop:
  """What ends a row.

  Attributes:
    ids_E: int32 token ids; a row ends with any of them. None: none does.
    strings: automaton over token ids (`nr.generation.constraints.stop_strings`); a
      row ends when it accepts. None: no stop strings.
    limits_B: int32, most new tokens of each prompt's rows; None: the driver's limit.
    loop_period: longest pattern looked for by loop detection; 0: off.
    loop_repeats: a row ends when its last pattern has occurred this often in a row.
  """

  ids_E: jax.Array | None = None
  strings: Any = None
  limits_B: jax.Array | None = None
  loop_period: int = dataclasses.field(default=0, metadata=dict(static=True))
  loop_repeats: int = dataclasses.field(default=3, metadata=dict(static=True))

  def prepared(self, batch: int, max_new_tokens: int, vocab_size: int) -> "Stop":
    """Returns it with arrays and with limits. Run outside `jit`.

    Raises:
      ValueError: an id outside the vocabulary, limits of another number of rows or
        above `max_new_tokens`, loop detection that compares nothing.
    """
    ids_E = None
    if self.ids_E is not None and np.size(self.ids_E):
      ids_E = jnp.asarray(self.ids_E, jnp.int32).reshape(-1)
      if bool((ids_E < 0).any() | (ids_E >= vocab_size).any()):
        raise ValueError(f"stop ids {ids_E.tolist()}: give ids in 0..{vocab_size - 1}")
    limits_B = jnp.asarray(max_new_tokens if self.limits_B is None else self.limits_B, jnp.int32)
    if limits_B.ndim and limits_B.shape != (batch,):
      raise ValueError(f"limits_B has shape {limits_B.shape}: give one limit for each of the {batch} prompts")
    if bool((limits_B < 0).any() | (limits_B > max_new_tokens).any()):
      raise ValueError(f"limits_B={limits_B.tolist()}: give limits in 0..max_new_tokens={max_new_tokens}")
    if self.loop_period < 0 or (self.loop_period > 0 and self.loop_repeats < 2):
      raise ValueError(
        f"loop_period={self.loop_period}, loop_repeats={self.loop_repeats}: give a period of at least 1 "
        "(0: off) and at least 2 repeats"
      )
    limits_B = jnp.broadcast_to(limits_B, (batch,))
    return dataclasses.replace(self, ids_E=ids_E, limits_B=limits_B)

  def take(self, rows_B: jax.Array) -> "Stop":
    """Gathers the limits."""
    return dataclasses.replace(self, limits_B=self.limits_B[rows_B])

  @property
  def filler(self) -> jax.Array:
    """The token that fills what follows the end: the first stop id, or 0."""
    return jnp.int32(0) if self.ids_E is None else self.ids_E[0]

  def init(self, batch: int) -> jax.Array:
    """Returns int32 [B], the states of the stop strings' automaton."""
    start = 0 if self.strings is None else self.strings.start
    return jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))

  def advance(
    self, states_B: jax.Array, tokens_B: jax.Array, context: Context, is_broken_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Says which rows end with `tokens_B`.

    Args:
      states_B: of the stop strings.
      tokens_B: int32, just chosen.
      context: the history, `tokens_B` included.
      is_broken_B: rows in which nothing could be drawn.

    Returns:
      int32 [B] finish codes (RUNNING where a row goes on) and the new states.
    """
    finish_B = jnp.where(context.generated_B >= self.limits_B, LENGTH, RUNNING)
    if self.loop_period:
      finish_B = jnp.where(is_looping(context, self.loop_period, self.loop_repeats), LOOP, finish_B)
    if self.strings is not None:
      states_B = self.strings.step(states_B, tokens_B)
      finish_B = jnp.where(self.strings.is_accepting(states_B), STOP_STRING, finish_B)
    if self.ids_E is not None:
      finish_B = jnp.where(is_stop_id(self.ids_E, tokens_B), STOP_ID, finish_B)
    return jnp.where(is_broken_B, BROKEN, finish_B).astype(jnp.int32), states_B


def is_stop_id(ids_E: jax.Array | None, tokens: jax.Array) -> jax.Array:
  """Returns bool of the shape of `tokens`: which of them are stop ids."""
  if ids_E is None:
    return jnp.zeros(tokens.shape, bool)
  return (tokens[..., None] == ids_E).any(axis=-1)
