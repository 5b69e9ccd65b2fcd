"""Matchers: constraints that live on the host and say step by step what may come next.

A matcher follows one row. `AutomatonMatcher` reads the tables of an automaton;
`GrammarMatcher` wraps llguidance (extra [constraints]) for what has no tables:
context-free grammars and JSON schemas of any nesting.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from nr.generation.constraints.automaton import DEAD, Automaton
from nr.generation.constraints.vocabulary import Bytes, token_bytes


class Matcher(Protocol):
  """What the grammar driver asks of the constraint of one row.

  Attributes:
    num_tokens: size of the vocabulary it knows.
    end_of_text_ids: what it allows once the text is complete.
    error: why it allows nothing any more; "" while all is well.
  """

  num_tokens: int
  end_of_text_ids: tuple[int, ...]
  error: str

  def fill(self, words_W: np.ndarray) -> None:
    """Writes which tokens may come next: bit k % 32 of int32 word k // 32 says it of token k."""
    ...

  def consume(self, token: int) -> bool:
    """Reads one token; False (and `error`) where it may not come."""
    ...

  def forced(self) -> list[int]:
    """Returns the tokens that must come next, one after the other; empty where there is a choice."""
    ...

  def fork(self) -> Self:
    """Returns a matcher of its own for another row with the same history."""
    ...


def num_words(num_tokens: int) -> int:
  """Returns W, how many int32 words hold one bit a token."""
  return -(-num_tokens // 32)


class AutomatonMatcher:
  """Follows an automaton on the host; see `Matcher`.

  Args:
    automaton: with one start.
    end_of_text_ids: allowed in accepting states only.
  """

  def __init__(self, automaton: Automaton, end_of_text_ids: Iterable[int]):
    self.num_tokens = automaton.num_tokens
    self.end_of_text_ids = tuple(int(id) for id in end_of_text_ids)
    self.error = ""
    self._next_SC = np.asarray(automaton.next_SC)
    self._accepting_S = np.asarray(automaton.accepting_S)
    self._class_V = np.array(automaton.class_V[:-1])
    # A column of its own, in which nothing follows.
    self._class_V[list(self.end_of_text_ids)] = self._next_SC.shape[1]
    self._next_SC = np.pad(self._next_SC, ((0, 0), (0, 1)), constant_values=DEAD)
    self._sizes_C = np.bincount(self._class_V, minlength=self._next_SC.shape[1])
    self._state = int(automaton.start)

  def fill(self, words_W: np.ndarray) -> None:
    """Writes the mask; see `Matcher`."""
    is_allowed_V = np.zeros(32 * len(words_W), bool)
    if self._state != DEAD:
      is_allowed_V[: self.num_tokens] = (self._next_SC[self._state] != DEAD)[self._class_V]
      is_allowed_V[list(self.end_of_text_ids)] = self._accepting_S[self._state]
    words_W[:] = np.packbits(is_allowed_V, bitorder="little").view(np.int32)

  def consume(self, token: int) -> bool:
    """Reads one token; see `Matcher`."""
    is_end = token in self.end_of_text_ids
    if self._state != DEAD and not (is_end and self._accepting_S[self._state]):
      inside = not is_end and 0 <= token < self.num_tokens
      self._state = int(self._next_SC[self._state, self._class_V[token]]) if inside else DEAD
      if self._state == DEAD:
        self.error = f"token {token} may not come here"
    return self._state != DEAD

  def forced(self) -> list[int]:
    """Returns the tokens that must come next; see `Matcher`."""
    found, state, seen = [], self._state, set()
    while state != DEAD and state not in seen and not self._accepting_S[state]:
      seen.add(state)  # a forced cycle has no end
      (classes,) = np.nonzero((self._next_SC[state] != DEAD) & (self._sizes_C > 0))
      if len(classes) != 1 or self._sizes_C[classes[0]] != 1:
        break
      found.append(int(np.argmax(self._class_V == classes[0])))
      state = int(self._next_SC[state, classes[0]])
    return found

  def fork(self) -> Self:
    """Returns a copy; the tables are shared."""
    copy = object.__new__(type(self))
    copy.__dict__.update(self.__dict__)
    return copy


def _llguidance() -> Any:
  try:
    import llguidance
  except ImportError as error:
    raise ImportError("grammars need llguidance: pip install 'nr[constraints]'") from error
  return llguidance


class _Spelling:
  """A vocabulary in the shape that llguidance asks for."""

  bos_token_id = None

  def __init__(self, spelled: Sequence[Bytes], ends: tuple[int, ...], encode: Callable | None):
    self.eos_token_id = ends[0]
    special = {id for id, piece in enumerate(spelled) if piece is None} | set(ends)
    # A byte that no UTF-8 text holds marks what is no text.
    self.tokens = [b"\xff<%d>" % id if id in special else piece for id, piece in enumerate(spelled)]
    self.special_token_ids = sorted(special)
    self._ids = {piece: id for id, piece in enumerate(self.tokens) if id not in special}
    self._longest = max(map(len, self._ids), default=0)
    self._encode = encode

  def __call__(self, text: bytes) -> list[int]:
    if self._encode is not None:
      ids = self._encode(text.decode("utf-8"))
      # A tokenizer may put a space in front; what does not spell the text is of no use here.
      if b"".join(self.tokens[id] for id in ids) == text:
        return ids
    ids = []
    while text:
      sizes = range(min(self._longest, len(text)), 0, -1)
      piece = next((text[:size] for size in sizes if text[:size] in self._ids), None)
      if piece is None:
        break
      ids.append(self._ids[piece])
      text = text[len(piece) :]
    return ids


def grammar_vocabulary(tokenizer: Any, end_of_text_ids: Iterable[int] | None = None) -> Any:
  """Prepares a vocabulary for llguidance; once for all grammars (a second for 128k tokens).

  Args:
    tokenizer: as for `token_bytes`. One that encodes cuts forced text its own way;
      with a list of bytes the longest token comes first.
    end_of_text_ids: None for the tokenizer's own.

  Returns:
    An llguidance.LLTokenizer.

  Raises:
    ImportError: llguidance is not installed.
    ValueError: no end of text.
  """
  library = _llguidance()
  if end_of_text_ids is None and hasattr(tokenizer, "end_of_text_id"):
    end_of_text_ids = [tokenizer.end_of_text_id]
  ends = tuple(int(id) for id in end_of_text_ids or ())
  if not ends:
    raise ValueError("end_of_text_ids: give at least one; a grammar says with it that a text is complete")
  spelling = _Spelling(token_bytes(tokenizer), ends, getattr(tokenizer, "encode", None))
  return library.LLTokenizer(library.TokenizerWrapper(spelling), eos_token=list(ends))


class GrammarMatcher:
  """Follows a grammar with llguidance; see `Matcher`.

  Where the next bytes are forced, llguidance allows only the token that the
  tokenizer would write them with, and not others that spell their beginning. Its
  masks are then a strict subset of what the language allows; elsewhere they are equal.
  It does not ask whether the vocabulary can spell what is left of a text: with one
  that lacks bytes a row can come to a dead end, which `error` tells.

  Args:
    grammar: in llguidance's form; made by `lark_grammar` and its like.
    vocabulary: of `grammar_vocabulary`.
    what: name for messages.

  Raises:
    ValueError: the grammar is malformed, or cannot be satisfied with these tokens.
  """

  def __init__(self, grammar: str, vocabulary: Any, what: str):
    library = _llguidance()
    problem = library.LLMatcher.validate_grammar(grammar, vocabulary)
    if problem and not problem.startswith("WARNING"):
      raise ValueError(f"{what} is not understood: {problem.strip()}")
    self.num_tokens = vocabulary.vocab_size
    self.end_of_text_ids = tuple(vocabulary.eos_tokens)
    self._matcher = library.LLMatcher(vocabulary, grammar, log_level=0)
    self.fill(np.zeros(num_words(self.num_tokens), np.int32))
    if self.error:
      raise ValueError(f"{what} cannot be satisfied with this vocabulary's tokens: {self.error}")

  @property
  def error(self) -> str:
    """Why it allows nothing any more; "" while all is well."""
    return (self._matcher.get_error().strip().splitlines() or [""])[0] if self._matcher.is_error() else ""

  def fill(self, words_W: np.ndarray) -> None:
    """Writes the mask; see `Matcher`."""
    words_W[:] = 0
    own_W = words_W[: num_words(self.num_tokens)]
    self._matcher.unsafe_compute_mask_ptr(own_W.ctypes.data, own_W.nbytes)
    if self._matcher.is_error():
      # In an error llguidance allows the end of text, as if the text were complete.
      words_W[:] = 0

  def consume(self, token: int) -> bool:
    """Reads one token; see `Matcher`."""
    return self._matcher.consume_token(token)

  def forced(self) -> list[int]:
    """Returns the tokens that must come next; see `Matcher`."""
    return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

  def accepts(self, tokens: Sequence[int]) -> bool:
    """Says whether the language goes on with `tokens`, canonical or not. Nothing is read."""
    return self._matcher.validate_tokens(list(tokens)) == len(tokens)

  def fork(self) -> Self:
    """Returns a copy with the same history."""
    copy = object.__new__(type(self))
    copy.__dict__.update(self.__dict__)
    copy._matcher = self._matcher.deep_copy()
    return copy


def lark_grammar(grammar: str, vocabulary: Any) -> GrammarMatcher:
  """Returns the matcher of a context-free grammar in llguidance's variant of Lark, from its rule `start`.

  >>> lark_grammar('start: "(" start ")" | "x"', grammar_vocabulary([b"(", b")", b"x", None], [3])).error
  ''
  """
  return GrammarMatcher(_llguidance().LLMatcher.grammar_from_lark(grammar), vocabulary, "Lark grammar")


def json_grammar(schema: Mapping[str, Any] | str, vocabulary: Any, **options: Any) -> GrammarMatcher:
  """Returns the matcher of a JSON schema, nested without bound.

  Args:
    schema: a JSON schema, or its text.
    vocabulary: of `grammar_vocabulary`.
    **options: of llguidance's JSON compiler: whitespace_flexible, item_separator,
      key_separator, and others.

  Raises:
    ImportError: llguidance is not installed.
    ValueError: a schema that is malformed or asks for what llguidance does not know.
  """
  library = _llguidance()
  try:
    described = json.loads(schema) if isinstance(schema, str) else dict(schema)
  except ValueError as error:
    raise ValueError(f"JSON schema is not JSON: {error}") from error
  grammar = library.LLMatcher.grammar_from_json_schema(described, overrides=options or None)
  return GrammarMatcher(grammar, vocabulary, "JSON schema")


def regex_grammar(pattern: str, vocabulary: Any) -> GrammarMatcher:
  """Returns the matcher of a regular expression; `regular.regex` makes tables of it instead."""
  return GrammarMatcher(_llguidance().LLMatcher.grammar_from_regex(pattern), vocabulary, f"regex {pattern!r}")
