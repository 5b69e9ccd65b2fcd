"""AlpacaEval-LI and MT-Bench-LI: files, generation, and the metrics, with any judge of pairs.

    cases = load_alpaca_eval_li("length_instructed_alpaca_baseline.json")
    report = evaluate(cases, generator, judge, LiftSpec())
    print(report["violation"], report["win"], report["words"])

The files are public (README of facebookresearch/RAM, projects/length_instruct); its commands for
the evaluation never came. Source of the metrics: arXiv 2406.17744, section 3.1.3.
"""

import gzip
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nr.data.bad_records import DataError
from nr.evaluation.statistics import bootstrap_ratio
from nr.generators.protocol import Generator, Request, Sample, samples_by_request
from nr.judges.length import count_words
from nr.judges.protocol import Comparison, PairJudge
from nr.recipes.length_instruct.augmentation import LiftSpec

SCALES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


class LengthCase(NamedTuple):
  """One prompt with a limit.

  Attributes:
    id: unique among its benchmark's.
    instruction: without the limit: all that the judge sees.
    limit: most words, inclusive.
    prompt: with the limit, as the benchmark's file has it.
    baseline: an answer that obeys; None where none was given.
    category: of the prompt, "" without one.
  """

  id: str
  instruction: str
  limit: int
  prompt: str
  baseline: str | None = None
  category: str = ""


def make_case(
  id: str, instruction: str, answers: Sequence[str], spec: LiftSpec, category: str = ""
) -> LengthCase:
  """Returns the case that the benchmarks' rule makes of strong answers: the shortest is baseline and limit.

  Raises:
    ValueError: no answer.
  """
  if not answers:
    raise ValueError(f"case {id!r}: give at least one answer, whose length is the limit")
  counted = [count_words(answer, spec.counter) for answer in answers]
  shortest = counted.index(min(counted))
  limit = max(1, counted[shortest])
  return LengthCase(id, instruction, limit, spec.render(instruction, limit), answers[shortest], category)


def load_alpaca_eval_li(path: str | pathlib.Path) -> list[LengthCase]:
  """Reads AlpacaEval-LI: a JSON list with instruction, output, max_len, original_instruction.

  Raises:
    DataError: no such list, or an entry that is not so, by number and field.
  """
  path = pathlib.Path(path)
  entries = _read_json(path)
  cases = []
  for number, entry in enumerate(entries):
    where = f"{path}, entry {number}"
    limit = _field(entry, "max_len", int, where)
    cases.append(
      LengthCase(
        str(number),
        _field(entry, "original_instruction", str, where),
        _positive(limit, where),
        _field(entry, "instruction", str, where),
        _field(entry, "output", str, where),
        str(entry.get("dataset", "")),
      )
    )
  return cases


def load_mt_bench_li(
  questions: str | pathlib.Path, baselines: str | pathlib.Path | None = None
) -> list[LengthCase]:
  """Reads MT-Bench-LI: JSON lines with question_id, category, turns, max_len, original_turns.

  Args:
    questions: question.jsonl.
    baselines: length_instructed_turn1_baseline.jsonl: question_id and the answer, as FastChat
      writes it (choices[0].turns[0]); None: cases without a baseline.

  Raises:
    DataError: a line that is not so, or a question twice, by line and field.
  """
  answers = {} if baselines is None else _read_answers(pathlib.Path(baselines))
  path, cases, seen = pathlib.Path(questions), [], set()
  for number, entry in _read_lines(path):
    where = f"{path}, line {number}"
    id = str(_field(entry, "question_id", int | str, where))
    if id in seen:
      raise DataError(f"{where}, field 'question_id': {id} is there twice; leave one out")
    seen.add(id)
    turns, original = (_field(entry, name, list, where) for name in ("turns", "original_turns"))
    limits = _field(entry, "max_len", list, where)
    if not (turns and original and limits):
      raise DataError(f"{where}: turns, original_turns and max_len each need the first turn's entry")
    if baselines is not None and id not in answers:
      raise DataError(f"{where}: {baselines} has no answer to question {id}; give the whole file")
    case = LengthCase(id, original[0], _positive(limits[0], where), turns[0], answers.get(id))
    cases.append(case._replace(category=str(entry.get("category", ""))))
  return cases


def load_answered(path: str | pathlib.Path, spec: LiftSpec) -> list[LengthCase]:
  """Makes cases of one's own by the benchmarks' rule, from prompts that strong models have answered.

  Args:
    path: JSON lines {id, instruction, responses: [text] or {model: text}}, and optionally `input`
      (put behind the instruction, a blank line between) and `category`; may be gzipped.
    spec: counter of words, and template.

  Raises:
    DataError: a line that is not so, or an id twice, by line and field.
  """
  path, cases, seen = pathlib.Path(path), [], set()
  for number, entry in _read_lines(path):
    where = f"{path}, line {number}"
    id, instruction = (_field(entry, name, str, where) for name in ("id", "instruction"))
    if id in seen:
      raise DataError(f"{where}, field 'id': {id!r} is there twice; leave one out")
    seen.add(id)
    given = _field(entry, "responses", list | dict, where)
    answers = [text for text in (given.values() if isinstance(given, dict) else given) if text]
    if not answers or not all(isinstance(text, str) for text in answers):
      raise DataError(f"{where}, field 'responses': give at least one text")
    if entry.get("input"):
      instruction = f"{instruction}\n\n{entry['input']}"
    cases.append(make_case(id, instruction, answers, spec, str(entry.get("category", ""))))
  return cases


def _read_answers(path: pathlib.Path) -> dict[str, str]:
  found = {}
  for number, entry in _read_lines(path):
    where = f"{path}, line {number}"
    choices = _field(entry, "choices", list, where)
    try:
      found[str(_field(entry, "question_id", int | str, where))] = str(choices[0]["turns"][0])
    except (KeyError, IndexError, TypeError) as error:
      raise DataError(
        f"{where}, field 'choices': has no turns[0] in choices[0]; give FastChat's answers"
      ) from error
  return found


def _read_json(path: pathlib.Path) -> list:
  try:
    entries = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise DataError(f"{path} cannot be read as JSON ({error}); download it again") from error
  if not isinstance(entries, list) or not entries:
    raise DataError(f"{path}: give a JSON list with at least one entry")
  return entries


def _read_lines(path: pathlib.Path) -> list[tuple[int, dict]]:
  try:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
  except (OSError, EOFError, UnicodeDecodeError) as error:
    raise DataError(f"{path} cannot be read ({error}); download it again") from error
  found = []
  for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold U+2028
    if line.strip():
      try:
        found.append((number, json.loads(line)))
      except ValueError as error:
        raise DataError(f"{path}, line {number}: is not JSON ({error}); download the file again") from error
  return found


def _field(entry: Any, name: str, kind: Any, where: str) -> Any:
  value = entry.get(name) if isinstance(entry, dict) else None
  if not isinstance(value, kind) or isinstance(value, bool):
    raise DataError(f"{where}, field {name!r}: is {value!r:.60}; give the benchmark's file unchanged")
  return value


def _positive(limit: Any, where: str) -> int:
  if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
    raise DataError(f"{where}, field 'max_len': is {limit!r}, not a number of words from 1")
  return limit


def scaled_limit(limit: int, scale: float) -> int:
  """Returns max(1, round(scale * limit)), halves rounded to the even number as Python does.

  >>> scaled_limit(56, 0.9), scaled_limit(5, 0.5), scaled_limit(3, 0.1)
  (50, 2, 1)
  """
  return max(1, round(scale * limit))


def scale_cases(cases: Sequence[LengthCase], scale: float, spec: LiftSpec) -> list[LengthCase]:
  """Returns the cases with scaled limits, their prompts written anew."""
  limits = [scaled_limit(case.limit, scale) for case in cases]
  return [
    case._replace(limit=limit, prompt=spec.render(case.instruction, limit))
    for case, limit in zip(cases, limits)
  ]


def answer(
  cases: Sequence[LengthCase], generator: Generator, *, max_new_tokens: int, tag: str = "", **settings: Any
) -> list[Sample]:
  """Returns one answer to each case.

  Args:
    cases: what to answer.
    generator: the model.
    max_new_tokens: room well beyond the limits, so that a long answer is seen to be long.
    tag: put before the ids of the requests, so that two rounds draw differently.
    **settings: of the requests: chain, stop, seed.
  """
  requests = [
    Request(f"{tag}{case.id}", case.prompt, max_new_tokens=max_new_tokens, **settings) for case in cases
  ]
  return [samples[0] for samples in samples_by_request(requests, generator.generate(requests))]


class Outcome(NamedTuple):
  """What became of one case.

  Attributes:
    words: of the answer; None where there is none.
    is_violation: longer than the limit, or it did not end by itself; None where there is no answer.
    win: 0 for a violation, else what the judge says; None where it could not be judged.
    reason: why something is None.
  """

  words: int | None
  is_violation: bool | None
  win: float | None = None
  reason: str = ""


def outcome_of(case: LengthCase, sample: Sample, counter: str) -> Outcome:
  """Returns words and violation. An answer that was cut off violates: nobody knows how long it would be."""
  if sample.text is None:
    return Outcome(None, None, None, f"no answer: {sample.error}")
  words = count_words(sample.text, counter)
  return Outcome(words, words > case.limit or not sample.is_complete)


def judge_cases(
  cases: Sequence[LengthCase], samples: Sequence[Sample], judge: PairJudge | None, counter: str
) -> list[Outcome]:
  """Returns the outcome of each case.

  A violation loses without being judged. The others are compared with the baseline by a judge
  who sees the original instruction only.
  """
  outcomes = [outcome_of(case, sample, counter) for case, sample in zip(cases, samples, strict=True)]
  if judge is None:
    return outcomes
  places = [place for place, each in enumerate(outcomes) if each.is_violation is False]
  missing = [cases[place].id for place in places if cases[place].baseline is None]
  if missing:
    raise ValueError(
      f"case {missing[0]!r} has no baseline to compare with; give the file of baselines, or no judge"
    )
  verdicts = judge.compare(
    [
      Comparison(cases[place].id, cases[place].instruction, samples[place].text, cases[place].baseline)
      for place in places
    ]
  )
  judged = dict(zip(places, verdicts, strict=True))
  return [
    each._replace(win=judged[place].first_score, reason=judged[place].reason)
    if place in judged
    else (each._replace(win=0.0, reason="violation") if each.is_violation else each)
    for place, each in enumerate(outcomes)
  ]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
  """Returns violation, win (shares in 0..1) and mean words of the cases that were answered.

  A violation is known to lose, an answer that obeys and could not be judged may have won: win is
  the share that obeys times the mean verdict on those of them that were judged, so that a
  verdict that is missing does not count as lost.

  Returns:
    count, answered, obeying, judged (verdicts of the judge, of those that obey), violation, win,
    words; None where nothing is known, as win where some obey and none of them was judged. The mean
    answer is never shown without its words: an empty text obeys every limit.
  """

  def mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None

  answered = [each for each in outcomes if each.is_violation is not None]
  obeying = [each for each in answered if not each.is_violation]
  verdicts = [each.win for each in obeying if each.win is not None]
  win = None
  if verdicts:
    win = len(obeying) / len(answered) * math.fsum(verdicts) / len(verdicts)
  elif not obeying and any(each.win is not None for each in answered):
    win = 0.0  # all violate: there was a judge, and nothing to ask
  return {
    "count": len(outcomes),
    "answered": len(answered),
    "obeying": len(obeying),
    "judged": len(verdicts),
    "violation": mean([float(each.is_violation) for each in answered]),
    "win": win,
    "words": mean([float(each.words) for each in answered]),
  }


def by_case(outcomes: Sequence[Outcome]) -> dict[str, list[float | None]]:
  """Returns violation, words and win of each case; None where it is not known."""
  return {
    "violation": [None if each.is_violation is None else float(each.is_violation) for each in outcomes],
    "words": [None if each.words is None else float(each.words) for each in outcomes],
    "win": [each.win for each in outcomes],
  }


def intervals(outcomes: Sequence[Outcome]) -> dict[str, list[float] | None]:
  """Returns 95 % bootstrap intervals over cases of the violations and of the mean words.

  None where nothing was answered. A win has none: it is no mean over cases where verdicts are missing.
  """
  values = by_case(outcomes)
  found: dict[str, list[float] | None] = {}
  for name in ("violation", "words"):
    known = np.array([value for value in values[name] if value is not None], np.float64)
    interval = bootstrap_ratio(known, np.ones_like(known), seed=0, samples=1000) if len(known) else None
    found[f"{name}_ci95"] = None if interval is None else [interval.low, interval.high]
  return found


def sweep_scales(
  cases: Sequence[LengthCase],
  generator: Generator,
  spec: LiftSpec,
  scales: Sequence[float],
  **settings: Any,
) -> dict[str, dict[str, Any]]:
  """Returns `summarize`'s numbers with every limit scaled, by the factor; nobody judges.

  Settings are those of `answer`.
  """
  found = {}
  for scale in scales:
    scaled = scale_cases(cases, scale, spec)
    samples = answer(scaled, generator, tag=f"x{scale:g}:", **settings)
    found[f"{scale:g}"] = summarize(judge_cases(scaled, samples, None, spec.counter))
  return found


def evaluate(
  cases: Sequence[LengthCase],
  generator: Generator,
  judge: PairJudge | None,
  spec: LiftSpec,
  *,
  max_new_tokens: int = 2048,
  scales: Sequence[float] = SCALES,
  **settings: Any,
) -> dict[str, Any]:
  """Runs a benchmark on a model.

  Args:
    cases: of either benchmark.
    generator: the model.
    judge: compares answers; None: violations and words only.
    spec: counter of words, and the template of scaled limits.
    max_new_tokens: tokens of an answer; one that reaches them violates.
    scales: factors of the limits that are tried besides, without judging; () for none.
    **settings: of the requests.

  Returns:
    `summarize`'s numbers, with `counter`, `judge`, and `scales`: factor -> the same.
  """
  samples = answer(cases, generator, max_new_tokens=max_new_tokens, **settings)
  report: dict[str, Any] = summarize(judge_cases(cases, samples, judge, spec.counter))
  report |= {"counter": spec.counter, "judge": judge.name if judge is not None else None}
  report["scales"] = sweep_scales(cases, generator, spec, scales, max_new_tokens=max_new_tokens, **settings)
  return report


def as_records(
  cases: Sequence[LengthCase], samples: Sequence[Sample], outcomes: Sequence[Outcome]
) -> list[Mapping[str, Any]]:
  """Returns one JSON object a case: prompt, limit, answer, and what became of it."""
  return [
    {**case._asdict(), "answer": sample.text, "finish_reason": sample.finish_reason, **outcome._asdict()}
    for case, sample, outcome in zip(cases, samples, outcomes, strict=True)
  ]
