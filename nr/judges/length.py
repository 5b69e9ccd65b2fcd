r"""Words of a text, as the benchmarks AlpacaEval-LI and MT-Bench-LI count them.

LEN(text): tokens of NLTK's `word_tokenize` that are no substring of Python's
`string.punctuation`. Single punctuation marks do not count, but an ellipsis, a double
dash and converted quotes (`` and '') do. Source: arXiv 2406.17744, appendix B.

`word_tokenize` first splits sentences, for which it needs the data file punkt. That
changes counts only around full stops inside a text ("etc. and", abbreviations in
front of a quote); the two other counters leave it out and agree with each other.
Every report names its counter.
"""

import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from nr.judges.protocol import Item, Judgement
from nr.names import unknown

# The rules of NLTK's NLTKWordTokenizer (Apache 2.0; after R. MacIntyre's Penn Treebank script), in
# their order: each rule sees the spaces that those before it made.
_OPENING = (
  (r"[«“‘„]|`+", r" \g<0> "),
  (r'^"', "``"),
  (r"``", r" \g<0> "),
  (r"(?<=[ (\[{<])(?:\"|'')", " `` "),
  (r"(?i)(?<!\w)'(?=\w)(?!(?:re|ve|ll|m|t|s|d|n)\b)", "' "),
)
_PUNCTUATION = (
  (r"(?<=[^.])\.([\])}>\"'»”’ ]*+)\s*$", r" . \1 "),
  (r"([:,])(\D)", r" \1 \2"),
  (r"[:,]$", r" \g<0> "),
  (r"\.{2,}", r" \g<0> "),
  (r"[;@#$%&]", r" \g<0> "),
  (r"[‒–—―]", r" \g<0> "),
  (r"(?<=[^.])\.([\])}>\"']*)\s*$", r" .\1 "),
  (r"[?!]", r" \g<0> "),
  (r"(?<=[^'])' ", " ' "),
  (r"\*", r" \g<0> "),
  (r"[][(){}<>]", r" \g<0> "),
  (r"--", r" \g<0> "),
)
_CLOSING = (
  (r"[»”’]", r" \g<0> "),
  (r"''|\"", " '' "),
  (r"\s+", " "),
  (r"(?<=[^' ])('[sS]|'[mM]|'[dD]|') ", r" \1 "),
  (r"(?<=[^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r" \1 "),
)
_JOINED = (
  (
    r"(?i)\b(can|d|gim|gon|got|lem)((?<=can)not|(?<=d)'ye|(?<=gim)me|(?<=gon)na|(?<=got)ta|(?<=lem)me)\b",
    r" \1 \2 ",
  ),
  (r"(?i)\b(more)('n)\b", r" \1 \2 "),
  (r"(?i)\b(wan)(na)(?=\s)", r" \1 \2 "),
  (r"(?i) ('t)(is)\b", r" \1 \2 "),
  (r"(?i) ('t)(was)\b", r" \1 \2 "),
)


@functools.cache
def _compiled(rules: tuple[tuple[str, str], ...]) -> tuple[tuple[re.Pattern, str], ...]:
  return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


def words_of(text: str) -> list[str]:
  """Returns the tokens that NLTK's NLTKWordTokenizer finds in a text, punctuation included.

  Our own so that counting needs no package: tests compare the two on random text.
  """
  for rules in (_OPENING, _PUNCTUATION):
    for pattern, replacement in _compiled(rules):
      text = pattern.sub(replacement, text)
  text = f" {text} "
  for rules in (_CLOSING, _JOINED):
    for pattern, replacement in _compiled(rules):
      text = pattern.sub(replacement, text)
  return text.split()


def _nltk_words(text: str) -> list[str]:
  return _nltk("nltk").NLTKWordTokenizer().tokenize(text)


def _nltk_sentence_words(text: str) -> list[str]:
  try:
    return _nltk("nltk_sentences").word_tokenize(text)
  except LookupError as error:
    raise LookupError(
      "counter='nltk_sentences' needs NLTK's data file punkt: python -m nltk.downloader punkt_tab, or take 'words'"
    ) from error


def _nltk(counter: str) -> Any:
  try:
    from nltk import tokenize
  except ImportError as error:
    raise ImportError(
      f"counter={counter!r} needs nltk: pip install 'nr[synthesis]', or take 'words'"
    ) from error
  return tokenize


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
  "words": words_of,
  "nltk": _nltk_words,
  "nltk_sentences": _nltk_sentence_words,
}


def count_words(text: str, counter: str = "words") -> int:
  """Returns LEN(text).

  Args:
    text: to count.
    counter: "words" (ours), "nltk" (the same rules in NLTK), "nltk_sentences" (the paper's
      word_tokenize, with its data file), or "spaces" (what stands between spaces: toys).

  Raises:
    ValueError: an unknown counter.
    ImportError, LookupError: a counter whose package or data is not there.

  >>> count_words("Don't stop, please!")
  4
  """
  if counter == "spaces":
    return len(text.split())
  if counter not in TOKENIZERS:
    raise ValueError(unknown("counter", counter, [*TOKENIZERS, "spaces"]))
  return sum(token not in string.punctuation for token in TOKENIZERS[counter](text))


class WithinLimit:
  """1 where a response has at most as many words as its reference says, else 0; details hold the words.

  Args:
    counter: see `count_words`.
  """

  def __init__(self, counter: str = "words"):
    count_words("", counter)
    self.counter, self.name = counter, f"within limit ({counter})"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item; None where the reference is no number."""
    return [self._judged(item) for item in items]

  def _judged(self, item: Item) -> Judgement:
    if isinstance(item.reference, bool) or not isinstance(item.reference, int | float):
      return Judgement(None, f"reference={item.reference!r} is no limit of words")
    words = count_words(item.response, self.counter)
    return Judgement(float(words <= item.reference), "", {"words": words})


class WordCount:
  """1 where a response has exactly so many words, else 0; details hold the words."""

  def __init__(self, words: int, counter: str = "words"):
    count_words("", counter)
    self.words, self.counter, self.name = words, counter, f"{words} words ({counter})"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item."""
    counts = [count_words(item.response, self.counter) for item in items]
    return [
      Judgement(float(count == self.words), "" if count == self.words else f"{count} words", {"words": count})
      for count in counts
    ]
