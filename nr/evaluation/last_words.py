"""Last-word accuracy: does a model guess the word that ends a passage? The measure of LAMBADA (arXiv 1606.06031).

    passages = [document.text for document in documents("lambada_test.jsonl")]    # nr.data.sources
    scores = score_last_words(scorer, passages)
    scores.accuracy(seed=0), scores.perplexity()

LAMBADA's passages were chosen by people who could guess the word from the passage but not from its
last sentence. Passages cut from other text (`cut_passages`, ours) were not: their numbers compare models with
each other, not with LAMBADA's.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from nr.evaluation.log_likelihoods import TextScorer
from nr.evaluation.statistics import Interval, bootstrap_ratio

_WORD = re.compile(r"\S+")
_LETTERS = re.compile(r"[^\W\d_]+")


class LastWordScores(NamedTuple):
  """Scores of the last words of passages.

  Attributes:
    nll: [passages] float64, nats summed over the word's tokens.
    tokens: [passages] tokens of the word.
    is_right: [passages] bool, whether greedy decoding gives the whole word.
  """

  nll: np.ndarray
  tokens: np.ndarray
  is_right: np.ndarray

  def accuracy(self, seed: int) -> Interval:
    """Share of words that greedy decoding gives, with its 95 % bootstrap interval over passages."""
    return bootstrap_ratio(self.is_right, np.ones(len(self.is_right)), seed=seed)

  def perplexity(self) -> float:
    """exp of the mean nats a word, as lm-evaluation-harness reports LAMBADA's."""
    return math.exp(self.nll.mean())


def split_last_word(passage: str) -> tuple[str, str]:
  """Splits a passage at its last space, which goes with the word.

  Raises:
    ValueError: a passage of less than two words.

  >>> split_last_word("he said hello")
  ('he said', ' hello')
  """
  words = list(_WORD.finditer(passage))
  if len(words) < 2:
    raise ValueError(f"passage {passage[:60]!r}: it has {len(words)} words; give at least two")
  return passage[: words[-2].end()], passage[words[-2].end() : words[-1].end()]


def score_last_words(
  scorer: TextScorer, passages: Sequence[str], description: str = "scoring last words"
) -> LastWordScores:
  """Scores the last word of every passage, given the rest.

  Raises:
    ValueError: no passage, or one of less than two words.
  """
  if not passages:
    raise ValueError("passages: there are none; give at least one")
  scores = scorer.continuations([split_last_word(passage) for passage in passages], description)
  return LastWordScores(
    np.array([-each.total() for each in scores]),
    np.array([len(each.log_probs_M) for each in scores]),
    np.array([each.is_greedy() for each in scores]),
  )


def cut_passages(texts: Iterable[str], count: int, words: int) -> list[str]:
  """Cuts passages that end on a word of letters, punctuation behind it left out; our choice.

  Args:
    texts: each is cut into runs of `words` words, a shorter rest is left out. A run whose last word
      has anything but letters, or letters and punctuation behind them, gives none.
    count: most passages; where there are more, they are taken at even distances.
    words: words of a passage, at least 2.

  Raises:
    ValueError: numbers out of bounds, or text without a passage.

  >>> cut_passages(["one two three. four five 6"], count=4, words=3)
  ['one two three']
  """
  if count < 1 or words < 2:
    raise ValueError(f"count={count}, words={words}: give at least 1 passage of at least 2 words")
  passages = [passage for text in texts for passage in _passages_of(text, words)]
  if not passages:
    raise ValueError(
      f"words={words}: no text has so many words with a word of letters at the end; give fewer"
    )
  chosen = np.unique(np.linspace(0, len(passages) - 1, min(count, len(passages))).round().astype(int))
  return [passages[place] for place in chosen]


def _passages_of(text: str, words: int) -> list[str]:
  found = list(_WORD.finditer(text))
  passages = []
  for last in range(words - 1, len(found), words):
    start, end = found[last - words + 1], found[last]
    letters = _LETTERS.match(text, end.start())
    if letters and not any(character.isalnum() for character in text[letters.end() : end.end()]):
      passages.append(text[start.start() : letters.end()])
  return passages
