"""A text among given ones: a trie over bytes, or over token ids."""

from collections.abc import Sequence

import numpy as np

from nr.generation.constraints.automaton import DEAD, MAX_BYTES, Automaton, check_size, from_tables
from nr.generation.constraints.lifting import ByteAutomaton, lift
from nr.generation.constraints.vocabulary import Bytes


def choices(
  options: Sequence[str] | Sequence[Sequence[int]],
  spelled: Sequence[Bytes],
  *,
  after: bytes = b"",
  max_bytes: int = MAX_BYTES,
) -> Automaton:
  """Builds the automaton of a list of options.

  Args:
    options: texts, each accepted however it is cut into tokens; or lists of token
      ids, each accepted as it is (entity names in a canonical tokenization).
    spelled: what each id spells, from `token_bytes`.
    after: bytes that come first, before texts: what `heal` took off the prompt.
    max_bytes: the largest table.

  Raises:
    ValueError: no option, an id out of range, a text that the tokens cannot spell,
      or a table too large.

  Source: the trie over token ids is that of arXiv:2010.00904.
  """
  options = list(options)
  if not options:
    raise ValueError("choices: give at least one option")
  if all(isinstance(option, str) for option in options):
    automaton = _byte_trie([option.encode("utf-8") for option in options], len(spelled), max_bytes)
    return lift(automaton.behind(after), spelled, f"{len(options)} choices", max_bytes=max_bytes)
  if after or any(isinstance(option, str) for option in options):
    raise ValueError("choices: give texts, or lists of token ids (which take no `after`), not both")
  return _token_trie([[int(id) for id in option] for option in options], len(spelled), max_bytes)


def _trie(options: Sequence[Sequence[int]]) -> tuple[list[dict[int, int]], list[bool]]:
  """Returns the children of each state by symbol, and which states end an option."""
  children: list[dict[int, int]] = [{}]
  is_end = [False]
  for option in options:
    state = 0
    for symbol in option:
      if symbol not in children[state]:
        children[state][symbol] = len(children)
        children.append({})
        is_end.append(False)
      state = children[state][symbol]
    is_end[state] = True
  return children, is_end


def _byte_trie(options: Sequence[bytes], num_tokens: int, max_bytes: int) -> ByteAutomaton:
  children, is_end = _trie(options)
  check_size(len(children), 256, num_tokens, max_bytes, f"{len(options)} choices (bytes in place of classes)")
  next_SQ = np.full((len(children), 256), DEAD, np.int32)
  for state, edges in enumerate(children):
    next_SQ[state, list(edges)] = list(edges.values())
  return ByteAutomaton(next_SQ, np.array(is_end))


def _token_trie(options: Sequence[Sequence[int]], num_tokens: int, max_bytes: int) -> Automaton:
  what = f"{len(options)} choices"
  used = sorted({id for option in options for id in option})
  if used and not 0 <= used[0] <= used[-1] < num_tokens:
    wrong = used[0] if used[0] < 0 else used[-1]
    raise ValueError(f"choices: {wrong} is no token id; give ids in 0..{num_tokens - 1}")
  children, is_end = _trie(options)
  check_size(len(children), len(used) + 1, num_tokens, max_bytes, what)
  class_V = np.full(num_tokens + 1, len(used))
  class_V[used] = np.arange(len(used))
  next_SC = np.full((len(children), len(used) + 1), DEAD, np.int32)
  for state, edges in enumerate(children):
    next_SC[state, class_V[list(edges)]] = list(edges.values())
  return from_tables(class_V, next_SC, np.array(is_end), 0, what)
