"""Words as the length benchmarks count them: the published table and NLTK itself."""

import random

import pytest

from nr.judges.length import WithinLimit, WordCount, count_words, words_of
from nr.judges.protocol import Item

PIECES = (
  "a can not cannot gonna wanna d'ye more'n 'tis 'Twas lemme gimme gotta don't DON'T I'm he's they'll we've ' '' \" ` "
  "`` . .. ... , : 3 4.5 1,000 - -- --- ( ) [ ] { } < > ? ! * & % $ # @ ; « » “ ” ‘ ’ „ – — é 日本 _ / \\ = + I s t re "
  "x' 'em 'n'"
).split(" ") + [" ", "  ", "\n", "\t", "\u00a0", "\r\n", "\u2028"]  # fmt: skip


@pytest.mark.parametrize("counter", ["nltk", "nltk_sentences"])
def test_the_counters_that_need_packages_agree(counter):
  pytest.importorskip("nltk", reason="needs nltk (extra [synthesis])")
  text = 'He said "yes" twice. Costs $5 (about 4,50 EUR).'
  try:
    assert count_words(text, counter) == count_words(text)
  except LookupError as error:
    assert counter == "nltk_sentences" and "punkt" in str(error)


def test_tokens_are_those_of_nltk_on_random_text():
  tokenize = pytest.importorskip("nltk.tokenize", reason="needs nltk (extra [synthesis])")
  theirs, draws = tokenize.NLTKWordTokenizer(), random.Random(0)
  for _ in range(20_000):
    pieces = [draws.choice(PIECES) + " " * (draws.random() < 0.35) for _ in range(draws.randint(1, 12))]
    text = "".join(pieces)
    assert words_of(text) == theirs.tokenize(text), text


def test_limits_are_inclusive_and_judged_in_words():
  def judged(response, limit):
    return WithinLimit().judge([Item("a", "p", response, limit)])[0]

  assert judged("one two three.", 3).score == 1 and judged("one two three four.", 3).score == 0
  assert judged("Don't stop, please!", 3).details["words"] == 4
  assert judged("a", None).score is None and judged("a", "3").score is None
  assert [each.score for each in WordCount(3).judge([Item("a", "p", "a b c"), Item("b", "p", "a b")])] == [
    1,
    0,
  ]
  assert count_words("-- a ...", "spaces") == 3
  with pytest.raises(ValueError, match="counter='word'"):
    WithinLimit("word")
