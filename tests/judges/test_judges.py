"""Judges: what they say, and that what cannot be judged is None with a reason, never a zero."""

import time

import pytest

from nr.generators.scripted import Scripted
from nr.judges.language_model import (
  LanguageModelPairs,
  LanguageModelScore,
  fill,
  parse_mark,
  position_statistics,
)
from nr.judges.protocol import (
  Comparison,
  Gated,
  Item,
  Judgement,
  Rule,
  ScorePairs,
  Verdict,
  judgement,
  summarize,
)
from nr.judges.verifiable import ExactMatch, JsonObject, Matches, MathAnswer, after, last_line


def items(*responses, reference=None):
  return [Item(f"i{number}", "prompt", response, reference) for number, response in enumerate(responses)]


def scores(judged):
  return [each.score for each in judged]


def test_numbers_that_are_none_are_no_scores():
  for value in (float("nan"), float("inf"), float("-inf")):
    found = judgement(value, words=3)
    assert found.score is None and str(value) in found.reason and found.details["words"] == 3
  judged = Rule(lambda item: float(item.response), "number").judge(items("1", "nan", "x"))
  assert scores(judged) == [1.0, None, None] and "ValueError" in judged[2].reason
  assert Rule(lambda item: None, "silent").judge(items("a"))[0] == Judgement(None, "silent cannot say")
  assert summarize(judged) == {
    "count": 3,
    "judged": 1,
    "mean": 1.0,
    "reasons": {j.reason: 1 for j in judged[1:]},
  }
  assert summarize([])["mean"] is None


def test_pairs_by_scores():
  judge = ScorePairs(Rule(lambda item: float(item.response), "number"), margin=0.1)
  asked = [
    Comparison(str(n), "p", *pair)
    for n, pair in enumerate([("2", "1"), ("1", "2"), ("1", "1.05"), ("1", "x")])
  ]
  assert [each.first_score for each in judge.compare(asked)] == [1, 0, 0.5, None]


def test_gates():
  condition = Rule(lambda item: {"bad": 0, "good": 1}.get(item.response), "form")
  judge = Gated(condition, Rule(lambda item: 0.7, "reward"))
  judged = judge.judge(items("good", "bad", "unknown", "good"))
  assert scores(judged) == [0.7, 0.0, None, 0.7] and "cannot say" in judged[2].reason


def test_exact_answers():
  assert scores(ExactMatch().judge(items(" Paris ", "paris", "", reference="Paris"))) == [1, 0, 0]
  assert scores(ExactMatch("casefold").judge(items("new  YORK", reference=["New York", "NYC"]))) == [1]
  assert ExactMatch().judge(items("a"))[0].score is None
  judged = ExactMatch(extract=after("Answer:")).judge(items("Answer: 3\nAnswer: 4\n", "four", reference=4))
  assert scores(judged) == [1, 0] and judged[1].reason == "no answer found"
  assert last_line("a\n b \n\n") == "b" and last_line(" ") is None
  with pytest.raises(ValueError, match="normalization"):
    ExactMatch("lower")


def test_forms():
  judge = JsonObject({"name": str, "age": int})
  good, wrong = '{"name": "Ann", "age": 3}', ['{"name": "Ann"}', '{"name": 1, "age": 3}', '{"name": "A", "age": true}',
    '{"name": "A", "age": 3, "x": 1}', "[]", "{", "sure: " + '{"name": "Ann", "age": 3}', "[" * 100_000]  # fmt: skip
  judged = judge.judge(items(good, *wrong))
  assert scores(judged) == [1] + [0] * len(wrong) and judged[0].details["object"]["name"] == "Ann"
  assert all(each.reason for each in judged[1:])
  embedded = JsonObject(["name", "age"], is_closed=False, is_embedded=True)
  assert scores(embedded.judge(items(wrong[3], wrong[6], "no"))) == [1, 1, 0]
  assert scores(Matches(r"(?P<n>\d+) cats").judge(items("3 cats", "3 cats.", "cats"))) == [1, 0, 0]


def test_mathematics_and_its_time_limit():
  pytest.importorskip("math_verify", reason="needs math-verify (extra [synthesis])")
  endless = "$9^{9^{9^{9^{9}}}}$"
  with MathAnswer(timeout=2.0) as judge:
    cases = [
      (r"so the answer is $\boxed{\frac{1}{2}}$", "0.5", 1.0),
      ("The answer is 3.", "4", 0.0),
      ("I do not know", "4", 0.0),
      (r"$\{1, 2\}$", r"$\{2, 1\}$", 1.0),
      ("4", None, None),
      ("4", "", None),
    ]
    judged = judge.judge([Item(str(n), "p", response, gold) for n, (response, gold, _) in enumerate(cases)])
    assert scores(judged) == [expected for *_, expected in cases]
    assert judged[2].reason == "no answer found"
    began = time.monotonic()
    judged = judge.judge(items(endless, "$7$", reference="$7$"))
    assert time.monotonic() - began < 20
    assert judged[0].score is None and "more than 2 s" in judged[0].reason
    assert judged[1].score == 1.0


def prefers_long(request, index):
  """A judge that looks at the answers' lengths."""
  text = request.prompt[-1].content
  first, second = (text.split(f"[Answer {letter}]\n")[1].split("\n")[0] for letter in "AB")
  return f"... [[{'A' if len(first) > len(second) else 'B' if len(second) > len(first) else 'C'}]]"


PAIRS = [
  Comparison("x", "p", "long answer", "short"),
  Comparison("y", "p {first}", "s", "longer"),
  Comparison("z", "p", "same", "same"),
]


def test_language_model_judges_are_asked_in_both_orders():
  generator = Scripted(prefers_long)
  judge = LanguageModelPairs(generator)
  verdicts = judge.compare(PAIRS)
  assert [each.first_score for each in verdicts] == [1, 0, 0.5]
  assert len(generator.requests) == 6 and {each.chain for each in generator.requests} == {"temperature(0)"}
  assert "p {first}" in generator.requests[2].prompt[0].content  # braces of prompts are no slots
  assert position_statistics(verdicts)["consistent"] == 1
  with pytest.raises(ValueError, match="'x' is given twice"):
    judge.compare(PAIRS[:1] * 2)


@pytest.mark.parametrize("on_disagreement, score", [("tie", 0.5), ("average", 0.5), ("none", None)])
def test_position_bias_is_seen(on_disagreement, score):
  judge = LanguageModelPairs(Scripted(lambda *_: "[[B]] no, [[A]]"), on_disagreement=on_disagreement)
  verdicts = judge.compare(PAIRS)
  assert [each.first_score for each in verdicts] == [score] * 3 and "disagree" in verdicts[0].reason
  found = position_statistics(verdicts)
  assert (found["consistent"], found["prefers_first"], found["prefers_second"]) == (0, 1, 0)
  (one, *_) = LanguageModelPairs(Scripted(lambda *_: "[[A]]"), use_both_orders=False).compare(PAIRS)
  assert one == Verdict(1.0, "", {"forward": 1.0})


def test_averages_of_a_win_and_a_tie():
  script = Scripted(lambda request, index: "[[A]]" if request.id.endswith("forward") else "[[C]]")
  assert LanguageModelPairs(script, on_disagreement="average").compare(PAIRS[:1])[0].first_score == 0.75
  assert LanguageModelPairs(script).compare(PAIRS[:1])[0].first_score == 0.5


@pytest.mark.parametrize("said", ["I like both.", "[[D]]", "[A]", "", None])
def test_malformed_answers_of_judges_are_no_verdicts(said):
  (verdict,) = LanguageModelPairs(Scripted(lambda *_: said)).compare(PAIRS[:1])
  assert verdict.first_score is None and verdict.reason.startswith("forward: the judge")
  half = Scripted(lambda request, index: "[[A]]" if request.id.endswith("forward") else said)
  (verdict,) = LanguageModelPairs(half).compare(PAIRS[:1])
  assert verdict.first_score is None and verdict.details["forward"] == 1
  assert (
    position_statistics([verdict])["judged"] == 0 and position_statistics([verdict])["consistent"] is None
  )


def test_a_template_with_a_reference_judges_nothing_without_one():
  script = Scripted(lambda request, index: "[[7]]")
  judge = LanguageModelScore(script, template="{prompt} {response} {reference}", use_chat=False)
  judged = judge.judge([Item("a", "p", "r"), Item("b", "p", "r", 4)])
  assert judged[0] == Judgement(None, "there is no reference") and judged[1].score == 7
  assert [request.prompt for request in script.requests] == ["p r 4"]
  with pytest.raises(ValueError, match="'a' is given twice"):
    judge.judge([Item("a", "p", "r"), Item("a", "p", "r")])
  assert LanguageModelScore(script).judge([Item("a", "p", "r")])[0].score == 7


def test_language_model_scores():
  script = Scripted(
    lambda request, index: {"i0": "[[3]] or rather [[7.5]]", "i1": "[[11]]", "i2": "good"}.get(request.id)
  )
  judged = LanguageModelScore(script).judge(items("a", "b", "c", "d"))
  assert scores(judged) == [7.5, None, None, None]
  assert [
    "outside" in judged[1].reason,
    "no verdict" in judged[2].reason,
    "no answer" in judged[3].reason,
  ] == [True] * 3
  with pytest.raises(ValueError, match="{response}"):
    LanguageModelScore(script, template="Rate {prompt}")
  with pytest.raises(ValueError, match="on_disagreement"):
    LanguageModelPairs(script, on_disagreement="first")
  assert fill("{a} {b} {", a="{b}") == "{b} {b} {" and parse_mark("[[C]]") == 0.5
