"""Keywords: how much of a text is about something that a few words give away."""

import re
from collections.abc import Sequence

from nr.judges.protocol import Item, Judgement, judgement


class KeywordShare:
  """The share of a response's words (what stands between spaces) that hold a keyword, 0 to 1.

  Details hold the words that did.

  Args:
    keywords: texts to look for, as they are. One that begins with a space, as the pieces of tokenizers do, is
      the beginning of a word; any other may stand anywhere in it.
    is_regex: whether they are regular expressions, each searched in every word.

  Raises:
    ValueError: no keyword, one that is no single word, or one that is no regular expression.
  """

  def __init__(self, keywords: Sequence[str], *, is_regex: bool = False):
    if not len(keywords) or any(not word for word in keywords):
      raise ValueError(f"keywords={list(keywords)!r}: give at least one, and none that is empty")
    if not is_regex and any(len(word.split()) != 1 for word in keywords):
      raise ValueError(f"keywords={list(keywords)!r}: each must lie within a word, without spaces inside")
    try:
      self._pattern = re.compile("|".join(f"(?:{word if is_regex else _plain(word)})" for word in keywords))
    except re.error as error:
      raise ValueError(f"keywords={list(keywords)!r}: no regular expression ({error})") from error
    self.keywords, self.name = tuple(keywords), "share of words with a keyword"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item; None for a response without words."""
    return [self._judged(item.response) for item in items]

  def _judged(self, text: str) -> Judgement:
    words = text.split()
    if not words:
      return Judgement(None, "the response has no words")
    found = [word for word in words if self._pattern.search(word)]
    return judgement(len(found) / len(words), found=found)


def _plain(keyword: str) -> str:
  """Returns the expression of a keyword inside a single word."""
  start = "^" if keyword[0].isspace() else ""
  return start + re.escape(keyword.strip())
