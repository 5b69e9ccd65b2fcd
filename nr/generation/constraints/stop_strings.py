"""Stop strings: found in the bytes of tokens, wherever tokens begin and end."""

from collections.abc import Sequence

import numpy as np

from nr.generation.constraints.automaton import MAX_BYTES, Automaton
from nr.generation.constraints.lifting import ByteAutomaton, lift
from nr.generation.constraints.vocabulary import Bytes


def stop_strings(
  strings: Sequence[str | bytes], spelled: Sequence[Bytes], *, max_bytes: int = MAX_BYTES
) -> Automaton:
  """Builds the automaton that is accepting from the token on that completes a stop string.

  It allows every token in every state, and never leaves acceptance again; ids that
  spell nothing change nothing. The text of the last token may go on behind the stop
  string: cut it with `cut_text`.

  Args:
    strings: at least one, none empty.
    spelled: what each id spells, from `token_bytes`.
    max_bytes: the largest table.

  Raises:
    ValueError: no string, an empty one, or a table too large.

  Source: Aho and Corasick (1975), "Efficient string matching", over bytes.
  """
  patterns = _patterns(strings)
  return lift(search_automaton(patterns), spelled, f"stop strings {list(strings)!r}", max_bytes=max_bytes)


def _patterns(strings: Sequence[str | bytes]) -> list[bytes]:
  if isinstance(strings, (str, bytes)):
    raise ValueError(f"stop strings: give a list of strings, not {strings!r} alone")
  if not strings or not all(strings):
    raise ValueError(f"stop strings {list(strings)!r}: give at least one string, and none empty")
  return [string.encode("utf-8") if isinstance(string, str) else string for string in strings]


def search_automaton(patterns: Sequence[bytes]) -> ByteAutomaton:
  """Returns the automaton over bytes that accepts once one of the patterns was read."""
  children: list[dict[int, int]] = [{}]
  is_end = [False]
  for pattern in patterns:
    state = 0
    for byte in pattern:
      if byte not in children[state]:
        children[state][byte] = len(children)
        children.append({})
        is_end.append(False)
      state = children[state][byte]
    is_end[state] = True
  size = len(children)
  next_SQ = np.zeros((size, 256), np.int32)
  # Breadth first, so that the longest proper suffix of a state is complete before the state.
  waiting = [(child, byte, 0) for byte, child in children[0].items()]
  for byte, child in children[0].items():
    next_SQ[0, byte] = child
  for state, _, suffix in waiting:
    is_end[state] |= is_end[suffix]
    next_SQ[state] = next_SQ[suffix]
    for byte, child in children[state].items():
      waiting.append((child, byte, int(next_SQ[suffix, byte])))
      next_SQ[state, byte] = child
  accepting_S = np.array(is_end)
  next_SQ[accepting_S] = np.nonzero(accepting_S)[0][:, None]
  return ByteAutomaton(next_SQ, accepting_S, 0, np.arange(size, dtype=np.int32))


def cut_text(text: str, strings: Sequence[str]) -> int | None:
  """Returns the offset at which generated text is cut so that no stop string is left, or None.

  The string that is completed first counts, and among those that end together the
  longest: what a reader of the growing text would have seen.

  >>> "one\\n\\ntwo"[:cut_text("one\\n\\ntwo", ["\\n\\n"])]
  'one'
  """
  _patterns(strings)
  found = [(text.find(string) + len(string), text.find(string)) for string in strings if string in text]
  return min(found)[1] if found else None
