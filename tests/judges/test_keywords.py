"""Keywords in texts one can count by eye."""

import pytest

from nr.judges.keywords import KeywordShare
from nr.judges.protocol import Item, Judge


def score(judge, text):
  return judge.judge([Item("one", "a prompt", text)])[0]


def test_words_with_a_keyword_are_counted_once_each():
  judge = KeywordShare([" op", "ened", "."])
  assert isinstance(judge, Judge)
  found = score(judge, "They opened it, happened to stop. Oops")
  assert found.details["found"] == ["opened", "happened", "stop."]
  assert found.score == pytest.approx(3 / 7)
  assert score(KeywordShare([" op"]), "stop the shop").score == 0.0
  assert score(judge, " \n").score is None


def test_regular_expressions_are_searched_in_each_word():
  assert score(KeywordShare([r"^wars?\b", "arm(y|ies)"], is_regex=True), "War, wars and armies").score == 0.5


@pytest.mark.parametrize(
  ("keywords", "is_regex", "words"),
  [
    ([], False, "at least one"),
    ([" "], False, "within a word"),
    (["of the"], False, "within a word"),
    (["("], True, "no regular"),
  ],
)
def test_what_is_no_keyword_is_refused(keywords, is_regex, words):
  with pytest.raises(ValueError, match=words):
    KeywordShare(keywords, is_regex=is_regex)
