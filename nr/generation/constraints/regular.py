"""Regular expressions and JSON schemas as automata over tokens (extra [constraints])."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nr.generation.constraints.automaton import DEAD, MAX_BYTES, Automaton
from nr.generation.constraints.lifting import ByteAutomaton, lift
from nr.generation.constraints.vocabulary import Bytes


def _outlines_core() -> Any:
  try:
    import outlines_core
    import outlines_core.json_schema
  except ImportError as error:
    raise ImportError(
      "regular expressions and JSON schemas need outlines-core: pip install 'nr[constraints]'"
    ) from error
  return outlines_core


def byte_automaton(pattern: str) -> ByteAutomaton:
  """Returns the automaton over UTF-8 bytes of the texts that match a pattern as a whole.

  outlines-core 0.2.14 prefers alternatives in their order: for it "a|ab" ends with
  "a". So it is given the pattern with a mark behind, which no text holds, and a text
  is accepted where the mark could follow.

  Args:
    pattern: in the syntax of Rust's crate regex; "\\d" means every Unicode digit, and "[0-9]" needs far
      fewer states. no look-around, no word boundaries.
      "^" in front and "$" behind are redundant and taken off.

  Raises:
    ImportError: outlines-core is not installed.
    ValueError: the pattern is malformed, uses what no automaton has, or matches nothing.
  """
  library = _outlines_core()
  end = 256
  vocabulary = library.Vocabulary(end, {bytes([byte]): [byte] for byte in range(256)})
  try:
    index = library.Index(rf"(?:{_without_anchors(pattern)}){_MARK}", vocabulary)
  except ValueError as error:
    reason = str(error).strip().splitlines()[-1]
    if "incompatible with the regex" in reason:
      raise ValueError(
        f"regex {pattern!r} cannot be satisfied: no text matches it (or a part of it)"
      ) from error
    raise ValueError(
      f"regex {pattern!r} is not understood ({reason}); write it in the syntax of Rust's crate regex, without "
      "look-around and word boundaries"
    ) from error
  transitions = index.get_transitions()
  first = index.get_initial_state()
  names = {first, *transitions, *index.get_final_states()}
  names.update(state for edges in transitions.values() for state in edges.values())
  number = {name: place for place, name in enumerate(sorted(names))}
  next_SQ = np.full((len(number), 256), DEAD, np.int32)
  for name, edges in transitions.items():
    for byte, following in edges.items():
      if byte != end:
        next_SQ[number[name], byte] = number[following]
  is_marked_S = np.zeros(len(number) + 1, bool)
  is_marked_S[[number[name] for name in index.get_final_states()]] = True
  behind_S = np.arange(len(number))
  for byte in _MARK.encode("utf-8"):
    behind_S = np.where(behind_S == DEAD, DEAD, next_SQ[behind_S, byte])
  return ByteAutomaton(next_SQ, is_marked_S[behind_S], number[first])


# The last code point, which Unicode promises never to assign.
_MARK = "\U0010ffff"


def _without_anchors(pattern: str) -> str:
  pattern = pattern.removeprefix("^")
  bare = pattern.removesuffix("$")
  is_escaped = (len(bare) - len(bare.rstrip("\\"))) % 2 == 1
  return pattern if is_escaped else bare


def regex(
  pattern: str, spelled: Sequence[Bytes], *, after: bytes = b"", max_bytes: int = MAX_BYTES
) -> Automaton:
  """Builds the automaton of all token sequences that spell a text matching a pattern as a whole.

  Args:
    pattern: in the syntax of Rust's crate regex; "\\d" means every Unicode digit, and "[0-9]" needs far
      fewer states.
    spelled: what each id spells, from `token_bytes`.
    after: bytes that come first: what `heal` took off the prompt.
    max_bytes: the largest table.

  Raises:
    ImportError: outlines-core is not installed.
    ValueError: the pattern is not understood or cannot be satisfied with these
      tokens, or its table is too large.
  """
  return lift(byte_automaton(pattern).behind(after), spelled, f"regex {pattern!r}", max_bytes=max_bytes)


def json_schema(
  schema: Mapping[str, Any] | str,
  spelled: Sequence[Bytes],
  *,
  whitespace: str = "[ ]?",
  max_depth: int = 3,
  after: bytes = b"",
  max_bytes: int = MAX_BYTES,
) -> Automaton:
  """Builds the automaton of the JSON texts that a schema describes, properties in the schema's order.

  Through outlines-core's regular expression of the schema; what a regular expression
  cannot say (unbounded nesting, unordered properties) needs `grammar.json_grammar`.

  Args:
    schema: a JSON schema, or its text.
    spelled: what each id spells, from `token_bytes`.
    whitespace: pattern of what may stand around values.
    max_depth: how often a recursive reference is followed.
    after: as in `regex`.
    max_bytes: the largest table.

  Raises:
    ImportError: outlines-core is not installed.
    ValueError: a schema that is malformed or has no regular expression, or a table too large.
  """
  text = schema if isinstance(schema, str) else json.dumps(schema)
  library = _outlines_core()
  try:
    pattern = library.json_schema.build_regex_from_schema(text, whitespace, max_depth)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"no regular expression for this JSON schema ({error}); correct it, or use "
      "nr.generation.constraints.grammar.json_grammar"
    ) from error
  what = f"JSON schema {text if len(text) < 80 else text[:77] + '...'}"
  return lift(byte_automaton(pattern).behind(after), spelled, what, max_bytes=max_bytes)
