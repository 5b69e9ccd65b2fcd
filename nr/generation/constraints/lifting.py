"""From automata over bytes to automata over tokens.

A token acts on the byte automaton as a map from states to states. Tokens with the
same map are one class. The maps are composed byte by byte for all tokens at once:
what is computed is as many maps as there are different ones, not states x tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nr.generation.constraints.automaton import (
  DEAD,
  MAX_BYTES,
  Automaton,
  check_size,
  from_tables,
  unique_rows,
)
from nr.generation.constraints.vocabulary import Bytes, packed


class ByteAutomaton(NamedTuple):
  """A deterministic automaton over bytes, on the host.

  Attributes:
    next_SQ: int32 [S, 256], -1 where there is no next state.
    accepting_S: bool.
    start: the first state.
    silent_S: int32, where an id without bytes leads (-1: it is not allowed); None:
      nowhere.
  """

  next_SQ: np.ndarray
  accepting_S: np.ndarray
  start: int = 0
  silent_S: np.ndarray | None = None

  def behind(self, prefix: bytes) -> "ByteAutomaton":
    """Returns the automaton of the same texts with `prefix` in front."""
    if not prefix:
      return self
    size, states = len(self.accepting_S), len(prefix)
    chain = np.full((states, 256), DEAD, np.int32)
    chain[np.arange(states), np.frombuffer(prefix, np.uint8)] = [*range(size + 1, size + states), self.start]
    silent_S = None
    if self.silent_S is not None:
      silent_S = np.concatenate([self.silent_S, np.full(states, DEAD, np.int32)])
    return ByteAutomaton(
      np.concatenate([self.next_SQ, chain]),
      np.concatenate([self.accepting_S, np.zeros(states, bool)]),
      size,
      silent_S,
    )


def lift(
  automaton: ByteAutomaton, spelled: Sequence[Bytes], what: str, *, max_bytes: int = MAX_BYTES
) -> Automaton:
  """Returns the automaton over tokens that accepts the token sequences whose bytes are accepted.

  Args:
    automaton: over bytes.
    spelled: what each id spells, from `token_bytes`.
    what: name of the constraint, for messages.
    max_bytes: the largest table.

  Raises:
    ValueError: the table is too large (told before it is made), or no sequence of
      tokens is accepted.
  """
  size = len(automaton.accepting_S)
  flat, begins_V, lengths_V = packed(spelled)
  bytes_RS, kind_Q = unique_rows(automaton.next_SQ.T)
  dead_S = np.full(size, DEAD, np.int32)
  maps = _Maps(size, len(spelled), max_bytes, what)
  dead = maps.add(dead_S)
  class_V = np.full(len(spelled) + 1, dead if automaton.silent_S is None else maps.add(automaton.silent_S))
  # Of the tokens not yet read to their end: which they are, and the map of what was read.
  active = np.nonzero(lengths_V)[0]
  prefix = np.zeros(len(active), np.int64)
  prefixes_KS = np.arange(size, dtype=np.int32)[None]
  position = -1
  while len(active):
    position += 1
    kinds = kind_Q[flat[begins_V[active] + position]]
    pairs, which = np.unique(prefix * len(bytes_RS) + kinds, return_inverse=True)
    prefixes_KS, merged = _compose(prefixes_KS, bytes_RS, pairs)
    check_size(size, len(prefixes_KS), len(spelled), max_bytes, what)
    prefix = merged[which]
    is_last = lengths_V[active] == position + 1
    ending = np.unique(prefix[is_last])
    number_K = np.zeros(len(prefixes_KS), np.int64)
    number_K[ending] = [maps.add(prefixes_KS[index]) for index in ending]
    class_V[active[is_last]] = number_K[prefix[is_last]]
    is_dead = (prefixes_KS < 0).all(axis=1)[prefix]
    class_V[active[is_dead]] = dead
    active, prefix = active[~is_last & ~is_dead], prefix[~is_last & ~is_dead]
  return from_tables(class_V, np.stack(maps.rows, axis=1), automaton.accepting_S, automaton.start, what)


# Entries of a table that are composed at a time: 64 MiB of int32.
_CHUNK = 1 << 24


def _compose(before_KS: np.ndarray, bytes_RS: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the different maps "first `before`, then a byte" of pairs (before * R + byte), and which each is."""
  found, numbers = [], []
  rows = max(1, _CHUNK // before_KS.shape[1])
  for begin in range(0, len(pairs), rows):
    first, then = np.divmod(pairs[begin : begin + rows], len(bytes_RS))
    moved_KS = np.take_along_axis(bytes_RS[then], np.maximum(before_KS[first], 0), axis=1)
    maps_KS, which = unique_rows(np.where(before_KS[first] >= 0, moved_KS, DEAD))
    numbers.append(which + sum(map(len, found)))
    found.append(maps_KS)
  maps_KS, merged = unique_rows(np.concatenate(found))
  return maps_KS, merged[np.concatenate(numbers)]


class _Maps:
  """The different maps met so far, numbered; refuses to grow beyond the limit."""

  def __init__(self, num_states: int, num_tokens: int, max_bytes: int, what: str):
    self.rows: list[np.ndarray] = []
    self._numbers: dict[bytes, int] = {}
    self._limits = (num_states, num_tokens, max_bytes, what)

  def add(self, map_S: np.ndarray) -> int:
    """Returns the number of a map."""
    key = map_S.tobytes()
    if key not in self._numbers:
      num_states, num_tokens, max_bytes, what = self._limits
      check_size(num_states, len(self.rows) + 1, num_tokens, max_bytes, what)
      self._numbers[key] = len(self.rows)
      self.rows.append(map_S.astype(np.int32))
    return self._numbers[key]
