"""Language models as judges, over any generator: of two responses in both orders, or of one by a number."""

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from nr.generators.protocol import Generator, Message, Request, Sample, samples_by_request
from nr.judges.protocol import Comparison, Item, Judgement, Verdict, judgement

PAIR_TEMPLATE = """Two assistants have answered the same request. Decide which answer serves the person better.
Weigh how far each does what was asked, and whether it is right, complete and clear. Do not let the order
of the answers or their length sway you.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Give your reasons in a few sentences. Then end with exactly one of these marks: [[A]] if answer A is better,
[[B]] if answer B is better, [[C]] if they are equally good."""

SCORE_TEMPLATE = """Rate how well the answer serves the person who asked, from 1 (useless) to 10 (could not be better).

[Request]
{prompt}

[Answer]
{response}

Give your reasons in a few sentences. Then end with the rating as a mark like [[5]]."""

_MARKS = {"A": 1.0, "B": 0.0, "C": 0.5}
DISAGREEMENTS = ("tie", "average", "none")


def parse_mark(text: str) -> float | None:
  """Returns what the last mark [[A]], [[B]] or [[C]] says: 1, 0 or 0.5; None without one."""
  marks = re.findall(r"\[\[([ABC])\]\]", text)
  return _MARKS[marks[-1]] if marks else None


def parse_number(text: str) -> float | None:
  """Returns the number in the last mark such as [[7]] or [[7.5]], or None."""
  marks = re.findall(r"\[\[(-?\d+(?:\.\d+)?)\]\]", text)
  return float(marks[-1]) if marks else None


def fill(template: str, **values: str) -> str:
  """Returns the template with each "{name}" replaced; other braces, and those in values, stay as they are."""
  return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


class _Asking:
  """What both judges share: putting questions to a generator, and reading its samples."""

  def __init__(
    self, generator: Generator, template: str, slots: Sequence[str], use_chat: bool, settings: dict
  ):
    missing = [slot for slot in slots if f"{{{slot}}}" not in template]
    if missing:
      raise ValueError(
        f"template has no slot {{{missing[0]}}}; give a text with {', '.join(f'{{{s}}}' for s in slots)}"
      )
    self._generator, self._template, self._use_chat = generator, template, use_chat
    self._settings = {"chain": "temperature(0)", "max_new_tokens": 1024, **settings}

  def needs(self, slot: str) -> bool:
    """Returns whether the template has a slot."""
    return f"{{{slot}}}" in self._template

  def ask(self, questions: dict[str, dict[str, str]]) -> dict[str, Sample]:
    """Returns the answer to each question: id -> values of the template's slots."""
    requests = []
    for id, values in questions.items():
      text = fill(self._template, **values)
      prompt = (Message("user", text),) if self._use_chat else text
      requests.append(Request(id, prompt, **self._settings))
    grouped = samples_by_request(requests, self._generator.generate(requests))
    return {request.id: samples[0] for request, samples in zip(requests, grouped)}


def _read(sample: Sample, parse: Callable[[str], float | None]) -> tuple[float | None, str]:
  """Returns (what the judge said, "") or (None, why it cannot be used)."""
  if sample.error is not None:
    return None, f"the judge gave no answer: {sample.error}"
  found = parse(sample.text)
  if found is None:
    return None, f"the judge's answer has no verdict ({sample.finish_reason}): {sample.text[-80:]!r}"
  return found, ""


class LanguageModelPairs:
  """A pair judge that asks a language model, in both orders of the responses.

  Args:
    generator: of the judge's model.
    template: with slots {prompt}, {first}, {second}.
    parse: what an answer says: 1 the first is better, 0.5 a tie, 0 the second; None: nothing.
    use_both_orders: ask a second time with the responses exchanged.
    on_disagreement: where the two orders differ: "tie", "average" of the two, or "none"
      (no verdict). Source of "tie": MT-Bench, arXiv 2306.05685, section 3.4.
    use_chat: put the question as a user's turn.
    name: for reports.
    **settings: of the requests: `chain` (greedy unless given), `max_new_tokens`, `stop`, `seed`.
  """

  def __init__(
    self,
    generator: Generator,
    *,
    template: str = PAIR_TEMPLATE,
    parse: Callable[[str], float | None] = parse_mark,
    use_both_orders: bool = True,
    on_disagreement: str = "tie",
    use_chat: bool = True,
    name: str | None = None,
    **settings: Any,
  ):
    if on_disagreement not in DISAGREEMENTS:
      raise ValueError(f"on_disagreement={on_disagreement!r}: give one of {', '.join(DISAGREEMENTS)}")
    self._asking = _Asking(generator, template, ("prompt", "first", "second"), use_chat, settings)
    self._parse, self.on_disagreement = parse, on_disagreement
    self._orders = ("forward", "backward") if use_both_orders else ("forward",)
    self.name = name or f"{generator.name} as judge of pairs"

  def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Returns a verdict for each comparison; None, with the reason, where an answer cannot be read.

    Details hold "forward" and "backward": what each order says of the first response.
    """
    questions = {}
    for each in comparisons:
      for order in self._orders:
        first, second = (each.first, each.second)[:: 1 if order == "forward" else -1]
        if f"{each.id}/{order}" in questions:
          raise ValueError(f"Comparison.id={each.id!r} is given twice: give each comparison an id of its own")
        questions[f"{each.id}/{order}"] = dict(prompt=each.prompt, first=first, second=second)
    answers = self._asking.ask(questions)
    return [self._verdict([answers[f"{each.id}/{order}"] for order in self._orders]) for each in comparisons]

  def _verdict(self, samples: list[Sample]) -> Verdict:
    read = [_read(sample, self._parse) for sample in samples]
    scores = [score if score is None or not place else 1 - score for place, (score, _) in enumerate(read)]
    details = dict(zip(self._orders, scores))
    for order, (score, reason) in zip(self._orders, read):
      if score is None:
        return Verdict(None, f"{order}: {reason}", details)
    if len(set(scores)) == 1:
      return Verdict(scores[0], "", details)
    if self.on_disagreement == "none":
      return Verdict(None, "the two orders disagree", details)
    score = 0.5 if self.on_disagreement == "tie" else statistics.fmean(scores)
    return Verdict(score, "the two orders disagree", details)


def position_statistics(verdicts: Sequence[Verdict]) -> dict[str, float | int | None]:
  """Returns how much a judge's verdicts depend on the order of the responses.

  Returns:
    count, judged (both orders read), consistent: share of those that say the same in both
    orders; prefers_first, prefers_second: shares of those that choose the response in the
    same place both times, by place. Shares are None when nothing was judged.
  """
  both = [(v.details.get("forward"), v.details.get("backward")) for v in verdicts]
  both = [pair for pair in both if None not in pair]

  def share(condition: Callable[[float, float], bool]) -> float | None:
    return sum(condition(*pair) for pair in both) / len(both) if both else None

  return {
    "count": len(verdicts),
    "judged": len(both),
    "consistent": share(lambda forward, backward: forward == backward),
    "prefers_first": share(lambda forward, backward: (forward, backward) == (1.0, 0.0)),
    "prefers_second": share(lambda forward, backward: (forward, backward) == (0.0, 1.0)),
  }


class LanguageModelScore:
  """A judge that asks a language model for a number.

  Args:
    generator: of the judge's model.
    template: with slots {prompt}, {response}, and where it is needed {reference}.
    parse: the number in an answer; None: nothing.
    lowest, highest: numbers outside are no score.
    use_chat: put the question as a user's turn.
    name: for reports.
    **settings: of the requests, as in `LanguageModelPairs`.
  """

  def __init__(
    self,
    generator: Generator,
    *,
    template: str = SCORE_TEMPLATE,
    parse: Callable[[str], float | None] = parse_number,
    lowest: float = 1.0,
    highest: float = 10.0,
    use_chat: bool = True,
    name: str | None = None,
    **settings: Any,
  ):
    self._asking = _Asking(generator, template, ("prompt", "response"), use_chat, settings)
    self._parse, self.lowest, self.highest = parse, lowest, highest
    self.name = name or f"{generator.name} as judge"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item; None, with the reason, where there is no number in the range."""
    questions, seen = {}, set()
    for item in items:
      if item.id in seen:
        raise ValueError(f"Item.id={item.id!r} is given twice: give each item an id of its own")
      seen.add(item.id)
      if item.reference is None and self._asking.needs("reference"):
        continue
      questions[item.id] = dict(prompt=item.prompt, response=item.response, reference=str(item.reference))
    answers = self._asking.ask(questions)
    return [
      self._judged(answers[item.id]) if item.id in answers else Judgement(None, "there is no reference")
      for item in items
    ]

  def _judged(self, sample: Sample) -> Judgement:
    score, reason = _read(sample, self._parse)
    if score is None:
      return Judgement(None, reason)
    if not self.lowest <= score <= self.highest:
      return Judgement(None, f"the judge's number {score:g} lies outside {self.lowest:g}..{self.highest:g}")
    return judgement(score)
