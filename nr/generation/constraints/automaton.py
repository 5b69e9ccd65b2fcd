"""Finite automata over tokens, and the transform that keeps a text inside one.

The tables live on the device and each row carries one int32, so a constraint costs
one gather a step inside the compiled loop. Ids that no state tells apart share a
column: next[state, class] instead of next[state, id].
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.transforms.algebra import Context, Parameter, Transform, keep, row, table, transform

DEAD = -1
# Our choice: tables beyond a quarter of a gibibyte are more likely a mistake than a wish.
MAX_BYTES = 1 << 28


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
  """A deterministic automaton that reads tokens. Built by the other modules of this room.

  Attributes:
    class_V: int32 [V + 1], the column of each id; the last entry is that of ids
      from V on (a padded output layer).
    next_SC: int32, the next state by state and class; -1: there is none.
    accepting_S: bool, where the text may end.
    start: int32, the first state; [A] where A automata were joined.
  """

  class_V: jax.Array
  next_SC: jax.Array
  accepting_S: jax.Array
  start: jax.Array

  @property
  def num_tokens(self) -> int:
    """Size V of the vocabulary it was built for."""
    return self.class_V.shape[0] - 1

  @property
  def num_states(self) -> int:
    """Number of states S."""
    return self.next_SC.shape[0]

  @property
  def num_bytes(self) -> int:
    """What the tables take on a device."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

  def allowed(self, states_B: jax.Array, vocab_size: int | None = None) -> jax.Array:
    """Returns bool [B, V], the tokens that have a next state; none in a dead one.

    Args:
      states_B: int32.
      vocab_size: how many ids to tell of, if not `num_tokens`.
    """
    has_next_BC = (self.next_SC[jnp.maximum(states_B, 0)] >= 0) & (states_B >= 0)[:, None]
    ids_V = np.minimum(np.arange(vocab_size or self.num_tokens), self.num_tokens)
    return has_next_BC[:, self.class_V[ids_V]]

  def step(self, states_B: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """Returns int32 [B], the states after one token each; dead ones stay dead."""
    classes_B = self.class_V[jnp.clip(tokens_B, 0, self.num_tokens)]
    return jnp.where(states_B >= 0, self.next_SC[jnp.maximum(states_B, 0), classes_B], DEAD)

  def is_accepting(self, states_B: jax.Array) -> jax.Array:
    """Returns bool [B], where the text may end."""
    return self.accepting_S[jnp.maximum(states_B, 0)] & (states_B >= 0)


def check_size(num_states: int, num_classes: int, num_tokens: int, max_bytes: int, what: str) -> None:
  """Refuses tables that would be too large.

  Raises:
    ValueError: names states and classes, the bytes they take, and what helps.
  """
  needed = 4 * (num_states * num_classes + num_tokens + 1) + num_states
  if needed > max_bytes:
    raise ValueError(
      f"{what}: a table of {num_states} states x {num_classes} token classes takes at least {needed} bytes, "
      f"more than max_bytes={max_bytes}. Use a simpler constraint (bounded repetitions multiply states), raise "
      "max_bytes, or generate with nr.generation.constraints.grammar, which keeps no table"
    )


def from_tables(
  class_V: np.ndarray, next_SC: np.ndarray, accepting_S: np.ndarray, start: Any, what: str
) -> Automaton:
  """Makes an automaton of host tables without the states that a text never reaches or never ends from.

  So a token is allowed only where the text can still be completed with tokens: a
  row of an automaton never meets a dead end by itself.

  Args:
    class_V: int [V + 1].
    next_SC: int, -1 where there is no next state.
    accepting_S: bool.
    start: the first state.
    what: name of the constraint, for the message.

  Raises:
    ValueError: no sequence of tokens leads from the start to an accepting state.
  """
  sources, classes = np.nonzero(next_SC >= 0)
  targets = next_SC[sources, classes]
  live_S = _reached(targets, sources, np.nonzero(accepting_S)[0], len(accepting_S))
  live_S &= _reached(sources, targets, np.array([start]), len(accepting_S))
  if not live_S[start]:
    raise ValueError(f"{what} cannot be satisfied: no sequence of this vocabulary's tokens completes it")
  # -1 finds the last entry, so that what is dead stays dead.
  renamed = np.append(np.where(live_S, np.cumsum(live_S) - 1, DEAD), DEAD)
  columns_CS, merged = unique_rows(renamed[next_SC[live_S]].T.astype(np.int32))
  return Automaton(
    jnp.asarray(merged[class_V], jnp.int32),
    jnp.asarray(columns_CS.T),
    jnp.asarray(accepting_S[live_S]),
    jnp.asarray(renamed[start], jnp.int32),
  )


def _reached(sources: np.ndarray, targets: np.ndarray, seeds: np.ndarray, num_states: int) -> np.ndarray:
  """Returns bool [S], what the edges source -> target reach from the seeds."""
  sources, targets = np.divmod(np.unique(sources.astype(np.int64) * num_states + targets), num_states)
  begins = np.searchsorted(sources, np.arange(num_states + 1))
  is_reached_S = np.zeros(num_states, bool)
  is_reached_S[seeds] = True
  waiting = list(seeds)
  while waiting:
    state = waiting.pop()
    following = targets[begins[state] : begins[state + 1]]
    fresh = following[~is_reached_S[following]]
    is_reached_S[fresh] = True
    waiting.extend(fresh)
  return is_reached_S


def unique_rows(rows_KS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the different rows of an int32 table, and int [K], which of them each row is."""
  rows_KS = np.ascontiguousarray(rows_KS)
  whole_K = rows_KS.view(np.dtype((np.void, rows_KS.itemsize * rows_KS.shape[1])))[:, 0]
  _, first, which_K = np.unique(whole_K, return_index=True, return_inverse=True)
  return rows_KS[first], which_K


def join(automata: Sequence[Automaton], max_bytes: int = MAX_BYTES) -> Automaton:
  """Puts automata over one vocabulary into one table, for batches whose rows differ.

  Args:
    automata: each with one start.
    max_bytes: the largest table.

  Returns:
    An automaton with `start` [A]: give `Constrain` the start of each row,
    `joined.start[jnp.array([1, 0, 0, ...])]`.

  Raises:
    ValueError: none, different vocabularies, or a table too large.
  """
  if not automata or len({each.num_tokens for each in automata}) > 1:
    sizes = ", ".join(str(each.num_tokens) for each in automata)
    raise ValueError(f"join needs automata of one vocabulary, not of sizes {sizes or '(none given)'}")
  kinds_CA, class_V = unique_rows(np.stack([np.asarray(each.class_V) for each in automata], axis=1))
  num_states = sum(each.num_states for each in automata)
  check_size(num_states, len(kinds_CA), automata[0].num_tokens, max_bytes, f"{len(automata)} joined automata")
  tables, starts, offset = [], [], 0
  for index, each in enumerate(automata):
    next_SC = np.asarray(each.next_SC)[:, kinds_CA[:, index]]
    tables.append(np.where(next_SC >= 0, next_SC + offset, DEAD))
    starts.append(int(each.start) + offset)
    offset += each.num_states
  return Automaton(
    jnp.asarray(class_V, jnp.int32),
    jnp.asarray(np.concatenate(tables), jnp.int32),
    jnp.concatenate([each.accepting_S for each in automata]),
    jnp.asarray(starts, jnp.int32),
  )


def anything(num_tokens: int) -> Automaton:
  """Returns the automaton that allows everything: the rows without a constraint in `join`."""
  zeros = jnp.zeros(num_tokens + 1, jnp.int32)
  return Automaton(zeros, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, bool), jnp.zeros((), jnp.int32))


@transform("constrain")
class Constrain(Transform):
  """Bans tokens after which no text of the automaton's language can follow.

  Each step is renormalised by itself, so the law is not the model's law given the
  constraint: a text has the probability p(text) / product of the masses kept on its
  way. Those masses are the weights that the particle drivers correct for.

  End of text is allowed exactly in accepting states. A row whose automaton allows
  nothing (it is dead, it was left with other transforms' bans, or it is complete and
  there is no end-of-text id) has no finite logit; the drivers replace its law by the
  model's most probable token and report the row as broken.

  Attributes:
    automaton: over the model's vocabulary.
    end_of_text_ids: ids that end the text.
    start: first state of each row; None for the automaton's own.

  Source: arXiv:2307.09702 (finite-state guides); the classes of tokens are our
  choice: tables of V columns do not fit for vocabularies in use.
  """

  automaton: Automaton = table()
  end_of_text_ids: Any = table(())
  start: Parameter = row(None, dtype=jnp.int32, least=0)

  def prepared(self) -> "Constrain":
    """Returns it with arrays for parameters. Run outside `jit`.

    Raises:
      ValueError: what is no automaton, or joined automata without a start for each row.
    """
    if not isinstance(self.automaton, Automaton):
      raise ValueError(
        f"constrain.automaton={self.automaton!r}: build one with nr.generation.constraints (regular, choices)"
      )
    if self.start is None and jnp.ndim(self.automaton.start):
      raise ValueError(
        f"constrain.start is missing: {self.automaton.start.size} automata were joined; "
        "give each row its own, automaton.start[which_B]"
      )
    ends = dataclasses.replace(self, end_of_text_ids=jnp.asarray(self.end_of_text_ids, jnp.int32).reshape(-1))
    return super(Constrain, ends).prepared()

  def init(self, context: Context, vocab_size: int) -> jax.Array:
    """Returns int32 [B], the states after the generated tokens of the history (the prompt is not read)."""
    if self.automaton.num_tokens > vocab_size:
      raise ValueError(
        f"constrain.automaton was built for {self.automaton.num_tokens} tokens, the model has {vocab_size}: "
        "build it with the model's tokenizer"
      )
    batch, slots = context.tokens_BS.shape
    start = self.automaton.start if self.start is None else self.start
    states_B = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))

    def read(slot: jax.Array, states_B: jax.Array) -> jax.Array:
      tokens_B = jax.lax.dynamic_index_in_dim(context.tokens_BS, slot, axis=1, keepdims=False)
      is_generated_B = (slot >= context.prompt_lengths_B) & (slot < context.lengths_B)
      return jnp.where(is_generated_B, self._step(states_B, tokens_B), states_B)

    first, last = context.prompt_lengths_B.min(), jnp.minimum(context.lengths_B.max(), slots)
    return jax.lax.fori_loop(first, last, read, states_B)

  def _ends(self) -> jax.Array:
    return jnp.asarray(self.end_of_text_ids, jnp.int32).reshape(-1)

  def _step(self, states_B: jax.Array, tokens_B: jax.Array) -> jax.Array:
    is_end_B = (tokens_B[:, None] == self._ends()).any(axis=1)
    ended_B = jnp.where(self.automaton.is_accepting(states_B), states_B, DEAD)
    return jnp.where(is_end_B, ended_B, self.automaton.step(states_B, tokens_B))

  def apply(self, logits_BV: jax.Array, state: jax.Array, context: Context) -> jax.Array:
    """Bans what the states do not allow."""
    vocab_size = logits_BV.shape[1]
    is_end_V = jnp.zeros(vocab_size, bool).at[self._ends()].set(True, mode="drop")
    may_end_B1 = self.automaton.is_accepting(state)[:, None]
    return keep(logits_BV, jnp.where(is_end_V, may_end_B1, self.automaton.allowed(state, vocab_size)))

  def commit(self, state: jax.Array, tokens_B: jax.Array, context: Context) -> jax.Array:
    """Returns the states after the tokens."""
    return self._step(state, tokens_B)

  def is_complete(self, state: jax.Array) -> jax.Array:
    """Returns bool [B], the rows whose text may end where it is."""
    return self.automaton.is_accepting(state)
