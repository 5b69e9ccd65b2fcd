"""Judges that are rules: numbers, beginnings of sentences, variety of words, repeats."""

import re
from collections.abc import Sequence

from nr.judges.diversity import plain_words
from nr.judges.protocol import Item, Judgement
from nr.judges.verifiable import after
from nr.recipes.adaptive_decoding.pair_rules import ngram_repeats

# A minus belongs to a number where no number or word stands before it.
_NUMBER = re.compile(r"(?<![\w.])(?:-(?=\d))?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
# A sentence ends at its last stop, with the quotes and brackets that close behind it, or with its line.
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)\]*_]*\s+|\s*\n\s*")
_OPENINGS = "\"'“‘(*_#>-–—• \t"


def last_number(text: str) -> str | None:
  """Returns the last number in a text, without commas and without needless zeros; None without any.

  >>> last_number("12 - 5 is $1,007.50."), last_number("-3.0"), last_number("no")
  ('1007.5', '-3', None)
  """
  found = _NUMBER.findall(text)
  if not found:
    return None
  whole, _, fraction = found[-1].replace(",", "").lstrip("-").partition(".")
  number = ".".join(part for part in (whole.lstrip("0") or "0", fraction.rstrip("0")) if part)
  return f"-{number}" if found[-1].startswith("-") and number != "0" else number


def sentences(text: str) -> list[str]:
  """Returns the sentences of a text: cut behind ".", "!" and "?" that a space follows, and at line ends.

  Our reading: the paper does not say how sentences are told. Openings such as quotes, and what holds no
  letter or digit, are left out.

  >>> sentences('Abby ran. "About time!" said Abe... Then 3.5 miles\\n* Abel')
  ['Abby ran.', 'About time!', 'said Abe...', 'Then 3.5 miles', 'Abel']
  """
  pieces = (piece.strip().lstrip(_OPENINGS) for piece in _END_OF_SENTENCE.split(text))
  return [piece for piece in pieces if any(map(str.isalnum, piece))]


class NumberAnswer:
  """1 where the last number of the response is the reference's, else 0; details hold the answer.

  Args:
    marker: the number stands behind the last of it; "": anywhere.
  """

  def __init__(self, marker: str = ""):
    self._marker, self.name = marker, "number"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item; None without a number in the reference."""
    return [self._judged(item) for item in items]

  def _judged(self, item: Item) -> Judgement:
    wanted = None if item.reference is None else last_number(str(item.reference))
    if wanted is None:
      return Judgement(None, "there is no number in the reference")
    text = after(self._marker)(item.response) if self._marker else item.response
    answer = None if text is None else last_number(text)
    if answer is None:
      return Judgement(0.0, "no answer found")
    return Judgement(float(answer == wanted), "", {"answer": answer})


class SentenceBeginnings:
  """The share of sentences whose first word begins as asked (arXiv 2411.09661, section 4.4 and appendix A.5).

  Args:
    beginning: letters, in either case.
  """

  def __init__(self, beginning: str = "Ab"):
    if not beginning.isalnum():
      raise ValueError(f"beginning={beginning!r}: give the letters that every sentence is to begin with")
    self._beginning, self.name = beginning.casefold(), f"sentences begin with {beginning}"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item: 0 for a response without a sentence."""
    return [self._judged(item.response) for item in items]

  def _judged(self, text: str) -> Judgement:
    found = sentences(text)
    if not found:
      return Judgement(0.0, "no sentence")
    held = sum(sentence.casefold().startswith(self._beginning) for sentence in found)
    return Judgement(held / len(found), "", {"sentences": len(found)})


class Variety:
  """How many different words a response has, of those that are wanted: at most 1.

  Words are those of `nr.judges.diversity.plain_words`. Text that is short loses, so that saying little does
  not pay; beyond the wanted number nothing is gained. Ours: the paper has reward models here.

  Args:
    words: wanted.
  """

  def __init__(self, words: int):
    if words < 1:
      raise ValueError(f"words={words}: give at least 1")
    self._words, self.name = words, f"variety of {words} words"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item."""
    counts = [len(set(plain_words(item.response))) for item in items]
    return [Judgement(min(1.0, count / self._words), "", {"different": count}) for count in counts]


class FewRepeats:
  """Minus the share of n-grams of words that are repeats (arXiv 2411.09661, section 4.2 and appendix A.1).

  A response with fewer than n words has none. Words are what stands between spaces: our choice, the paper
  does not say of what its 3-grams are.

  Args:
    n: words of a gram.
  """

  def __init__(self, n: int = 3):
    if n < 1:
      raise ValueError(f"ngram={n}: give at least 1")
    self._n, self.name = n, f"few {n}-gram repeats"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item."""
    return [Judgement(-ngram_repeats(item.response.split(), self._n)) for item in items]
