"""A tokenizer of whole words: a closed list, with single spaces between them.

What toys speak: every word is one token, so that a law over texts can be written
down and counted. It has no way to spell what it does not know, and says so.
"""

import json
import pathlib
from collections.abc import Sequence

from nr.data.bad_records import DataError
from nr.names import nearest
from nr.tokenizer_files import fingerprint_of, save_files

WORDS_FILE = "words.json"
_SHOWN = 8


class WordTokenizer:
  """Words by number: id 0 ends a text, word i of the list has id i + 1.

  Args:
    words: none empty, none with a space in it, none twice.

  Raises:
    DataError: no word, or one that is refused; names it.

  >>> words = WordTokenizer(["a", "cat"])
  >>> words.encode("a cat a"), words.decode([2, 1, 0])
  ([1, 2, 1], 'cat a')
  """

  kind = "words"
  end_of_text_id = 0

  def __init__(self, words: Sequence[str]):
    if isinstance(words, str) or len(words) == 0:
      raise DataError(f"words={words!r}: give a list with at least one word")
    self._ids: dict[str, int] = {}
    for place, word in enumerate(words):
      if not isinstance(word, str) or not word or " " in word:
        raise DataError(f"words[{place}]={word!r}: give a text without spaces, at least one character long")
      if word in self._ids:
        raise DataError(f"words[{place}]={word!r} is given twice; leave one out")
      self._ids[word] = place + 1
    self.words = tuple(words)
    self.vocab_size = len(self.words) + 1
    self.fingerprint = fingerprint_of(self.kind, self.end_of_text_id, self._files())

  def _files(self) -> dict[str, bytes]:
    return {WORDS_FILE: (json.dumps(list(self.words), indent=0) + "\n").encode("ascii")}

  def id_of(self, word: str) -> int:
    """Returns the id of a word. Raises DataError naming one that is not in the list."""
    if word not in self._ids:
      near = nearest(word, self.words)
      hint = f"did you mean {near!r}? " if near else ""
      known = ", ".join(self.words[:_SHOWN]) + (", ..." if len(self.words) > _SHOWN else "")
      raise DataError(
        f"word {word!r} is not in this tokenizer's list of {len(self.words)}: {hint}Known: {known}"
      )
    return self._ids[word]

  def encode(self, text: str) -> list[int]:
    """Returns the id of each word; [] for "".

    Raises:
      DataError: a word that is not in the list (named), or spaces that are not single.
    """
    if not text:
      return []
    words = text.split(" ")
    if not all(words):
      raise DataError(f"{text!r}: words are separated by one space, with none in front or behind")
    return [self.id_of(word) for word in words]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the words with spaces between them; the end of text gives nothing.

    Raises:
      DataError: an id that no word has.
    """
    words = []
    for id in map(int, ids):
      if not 0 <= id < self.vocab_size:
        raise DataError(f"id {id} is no word; ids are 0..{self.vocab_size - 1}")
      if id != self.end_of_text_id:
        words.append(self.words[id - 1])
    return " ".join(words)

  def token_bytes(self) -> list[bytes | None]:
    """Returns the UTF-8 bytes that each id spells, None for the end of text.

    Each word spells a space in front of it; `decode` takes the first off.
    """
    return [None, *((" " + word).encode("utf-8") for word in self.words)]

  def save(self, path: str | pathlib.Path) -> None:
    """Writes words.json and the settings into a folder that `load_tokenizer` reads."""
    save_files(path, self.kind, self.end_of_text_id, self.fingerprint, self._files())


def load_words(content: bytes) -> WordTokenizer:
  """Returns the tokenizer of a words.json.

  Raises:
    DataError: no JSON list of words.
  """
  try:
    words = json.loads(content)
  except ValueError as error:
    raise DataError(f"{WORDS_FILE} is damaged ({error}); save the tokenizer again") from error
  if not isinstance(words, list):
    raise DataError(
      f"{WORDS_FILE} holds a {type(words).__name__}, not a list of words; save the tokenizer again"
    )
  return WordTokenizer(words)
