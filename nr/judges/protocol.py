"""Where scores come from: a score, or None and why there is none. Never a silent zero."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Item:
  """One response to judge.

  Attributes:
    id: names it.
    prompt: what was asked.
    response: what was answered.
    reference: what the judge compares with: an answer, a limit of words; None: nothing.
  """

  id: str
  prompt: str
  response: str
  reference: Any = None


class Judgement(NamedTuple):
  """What a judge says of one response.

  Attributes:
    score: higher is better; None: it could not be judged.
    reason: why there is no score, or what the score is for.
    details: whatever else was found.
  """

  score: float | None
  reason: str = ""
  details: Mapping[str, Any] = {}


@runtime_checkable
class Judge(Protocol):
  """Scores responses one by one.

  Attributes:
    name: for reports.
  """

  name: str

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item, in their order."""
    ...


class Comparison(NamedTuple):
  """Two responses to one prompt.

  Attributes:
    id: names it; unique among those given together.
    prompt: what was asked.
    first: a response.
    second: another.
  """

  id: str
  prompt: str
  first: str
  second: str


class Verdict(NamedTuple):
  """What a judge says of two responses.

  Attributes:
    first_score: 1: the first is better, 0.5: a tie, 0: the second is; None: could not be judged.
    reason: why there is no verdict, or what it is for.
    details: whatever else was found.
  """

  first_score: float | None
  reason: str = ""
  details: Mapping[str, Any] = {}


@runtime_checkable
class PairJudge(Protocol):
  """Compares two responses.

  Attributes:
    name: for reports.
  """

  name: str

  def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Returns a verdict for each comparison, in their order."""
    ...


def judgement(score: float, reason: str = "", **details: Any) -> Judgement:
  """Returns a judgement; a score that is no finite number is none, and says so.

  >>> judgement(float("nan"))
  Judgement(score=None, reason='the score is nan', details={})
  """
  score = float(score)
  if not math.isfinite(score):
    return Judgement(None, f"the score is {score}", details)
  return Judgement(score, reason, details)


class ScorePairs:
  """A pair judge that prefers the response with the higher score.

  Args:
    judge: scores responses.
    margin: scores that differ by no more are a tie.
  """

  def __init__(self, judge: Judge, margin: float = 0.0):
    self._judge, self.margin = judge, margin
    self.name = f"pairs by {judge.name}"

  def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Returns a verdict for each comparison; None where one of the two has no score."""
    items = [
      Item(f"{each.id}/{place}", each.prompt, response)
      for each in comparisons
      for place, response in (("first", each.first), ("second", each.second))
    ]
    judged = self._judge.judge(items)
    return [self._verdict(*pair) for pair in zip(judged[::2], judged[1::2], strict=True)]

  def _verdict(self, first: Judgement, second: Judgement) -> Verdict:
    for place, each in (("first", first), ("second", second)):
      if each.score is None:
        return Verdict(None, f"the {place} could not be judged: {each.reason}")
    gap = first.score - second.score
    score = 0.5 if abs(gap) <= self.margin else float(gap > 0)
    return Verdict(score, "", {"first": first.score, "second": second.score})


class Rule:
  """A judge that calls a function.

  Args:
    rule: of the item; returns a number, True or False, or None where it cannot say.
    name: for reports.
  """

  def __init__(self, rule: Callable[[Item], float | bool | None], name: str):
    self._rule, self.name = rule, name

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item; None, with the error, where the function raises."""
    return [self._judged(item) for item in items]

  def _judged(self, item: Item) -> Judgement:
    try:
      score = self._rule(item)
    except Exception as error:  # whatever a user's function raises
      return Judgement(None, f"{self.name} failed: {type(error).__name__}: {error}")
    return Judgement(None, f"{self.name} cannot say") if score is None else judgement(score)


class Gated:
  """A judge's score where a condition holds, a fixed one where it does not.

  Args:
    condition: a judge whose score says whether: above 0 it does.
    judge: scores the responses for which it does.
    otherwise: score of the others.
  """

  def __init__(self, condition: Judge, judge: Judge, otherwise: float = 0.0):
    self._condition, self._judge, self.otherwise = condition, judge, otherwise
    self.name = f"{judge.name} where {condition.name}"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item; None where the condition could not be judged."""
    found = self._condition.judge(items)
    open_items = [
      item for item, each in zip(items, found, strict=True) if each.score is not None and each.score > 0
    ]
    scored = iter(self._judge.judge(open_items))
    return [self._joined(each, scored) for each in found]

  def _joined(self, condition: Judgement, scored: Iterable[Judgement]) -> Judgement:
    if condition.score is None:
      return condition
    if condition.score > 0:
      return next(scored)
    return Judgement(self.otherwise, condition.reason, condition.details)


def summarize(judgements: Sequence[Judgement]) -> dict[str, Any]:
  """Returns {"count", "judged", "mean", "reasons"}: the mean over what was judged, None without any,
  and how often each reason stood in the way."""
  scores = [each.score for each in judgements if each.score is not None]
  reasons: dict[str, int] = {}
  for each in judgements:
    if each.score is None:
      reasons[each.reason] = reasons.get(each.reason, 0) + 1
  mean = statistics.fmean(scores) if scores else None
  return {"count": len(judgements), "judged": len(scores), "mean": mean, "reasons": reasons}
