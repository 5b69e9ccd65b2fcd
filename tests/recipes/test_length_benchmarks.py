"""The length-instructed benchmarks: their files as published, faults named, and a run with a scripted model."""

import json

import pytest

from configs.length_instruct import get_config
from nr.data.bad_records import DataError
from nr.data.examples import Response
from nr.data.preferences import PreferencePair
from nr.generators.protocol import Request
from nr.generators.scripted import Scripted
from nr.judges.protocol import Rule, ScorePairs
from nr.recipes.length_instruct.augmentation import (
  LiftSpec,
  lift_of,
  limited_response,
  limited_samples,
  statistics,
)
from nr.recipes.length_instruct.benchmarks import (
  LengthCase,
  Outcome,
  answer,
  as_records,
  evaluate,
  judge_cases,
  load_alpaca_eval_li,
  load_answered,
  load_mt_bench_li,
  make_case,
  summarize,
)
from nr.recipes.length_instruct.evaluate import open_judge

# Shapes of the entries in the authors' README.
ALPACA = {
  "dataset": "helpful_base",
  "instruction": "Answer the following instruction using 4 words or less.\n\nWho created Superman?",
  "output": "Siegel and Shuster did.",
  "generator": "AlpacaEval-LI",
  "max_len": 4,
  "original_instruction": "Who created Superman?",
}
QUESTION = {
  "question_id": 162,
  "category": "writing",
  "turns": ["Answer the following instruction using 9 words or less.\n\nDraft an email."],
  "max_len": [9],
  "original_turns": ["Draft an email.", "Evaluate it."],
}
BASELINE = {"question_id": 162, "choices": [{"index": 0, "turns": ["Dear all."]}]}


def write(path, entries, lines=True):
  path.write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(entries))
  return path


def test_files_as_published(tmp_path):
  (case,) = load_alpaca_eval_li(write(tmp_path / "a.json", [ALPACA], lines=False))
  assert case == LengthCase(
    "0", "Who created Superman?", 4, ALPACA["instruction"], "Siegel and Shuster did.", "helpful_base"
  )
  assert case.prompt == LiftSpec().render(case.instruction, case.limit)
  questions, baselines = write(tmp_path / "q.jsonl", [QUESTION]), write(tmp_path / "b.jsonl", [BASELINE])
  (case,) = load_mt_bench_li(questions, baselines)
  assert case == LengthCase("162", "Draft an email.", 9, QUESTION["turns"][0], "Dear all.", "writing")
  assert load_mt_bench_li(questions)[0].baseline is None


@pytest.mark.parametrize(
  "change, problem",
  [
    ({"max_len": "4"}, "entry 1, field 'max_len'"),
    ({"max_len": 0}, "entry 1, field 'max_len'"),
    ({"output": None}, "entry 1, field 'output'"),
    ({"original_instruction": 3}, "entry 1, field 'original_instruction'"),
  ],
)
def test_bad_entries_are_named(tmp_path, change, problem):
  with pytest.raises(DataError, match=problem):
    load_alpaca_eval_li(write(tmp_path / "a.json", [ALPACA, {**ALPACA, **change}], lines=False))


def test_bad_files_are_named(tmp_path):
  questions = tmp_path / "q.jsonl"
  for entries, problem in (
    ([QUESTION, QUESTION], "line 2, field 'question_id': 162 is there twice"),
    ([{**QUESTION, "max_len": [True]}], "line 1, field 'max_len'"),
    ([{**QUESTION, "turns": []}], "line 1: turns"),
    ([{**QUESTION, "turns": "x"}], "line 1, field 'turns'"),
  ):
    with pytest.raises(DataError, match=problem):
      load_mt_bench_li(write(questions, entries))
  questions.write_text("{")
  with pytest.raises(DataError, match="line 1: is not JSON"):
    load_mt_bench_li(questions)
  with pytest.raises(DataError, match="no answer to question 162"):
    load_mt_bench_li(
      write(questions, [QUESTION]), write(tmp_path / "b.jsonl", [{**BASELINE, "question_id": 1}])
    )
  with pytest.raises(DataError, match="field 'choices'"):
    load_mt_bench_li(questions, write(tmp_path / "b.jsonl", [{**BASELINE, "choices": []}]))
  for path in (tmp_path / "none.json", questions):
    with pytest.raises(DataError, match=path.name):
      load_alpaca_eval_li(path)


def test_prompts_that_strong_models_have_answered(tmp_path):
  entry = {"id": "a", "instruction": "Say it.", "responses": ["one two three", "one two"], "input": "Hello"}
  path = write(tmp_path / "own.jsonl", [entry, {**entry, "id": "b", "input": "", "responses": {"m": "x"}}])
  one, two = load_answered(path, LiftSpec())
  assert one.instruction == "Say it.\n\nHello" and (one.limit, one.baseline) == (2, "one two")
  assert one.prompt == LiftSpec().render(one.instruction, 2) and (two.instruction, two.limit) == (
    "Say it.",
    1,
  )
  for change, problem in (
    ({}, "line 2, field 'id'"),
    ({"id": "c", "responses": [""]}, "line 2, field 'responses'"),
  ):
    with pytest.raises(DataError, match=problem):
      load_answered(write(path, [entry, {**entry, **change}]), LiftSpec())


def test_other_line_ends_inside_json_cut_nothing(tmp_path):
  entry = {"id": "a", "instruction": "Say\u2028it\x85.", "responses": ["one"]}
  path = tmp_path / "own.jsonl"
  path.write_bytes(("\r\n".join([json.dumps(entry, ensure_ascii=False)] * 2)).encode())
  with pytest.raises(DataError, match="line 2, field 'id'"):
    load_answered(path, LiftSpec())
  path.write_text(json.dumps(entry, ensure_ascii=False), encoding="utf-8")
  assert load_answered(path, LiftSpec())[0].instruction == entry["instruction"]


def cases():
  return [make_case(f"c{n}", f"topic {n}", ["a b c d", "a b c", "a b c d e"], LiftSpec()) for n in range(4)]


def test_cases_of_ones_own():
  (case, *_) = cases()
  assert case.limit == 3 and case.baseline == "a b c" and case.prompt.endswith("3 words or less.\n\ntopic 0")
  with pytest.raises(ValueError, match="'x'"):
    make_case("x", "i", [], LiftSpec())


def test_a_benchmark_from_end_to_end():
  judge = ScorePairs(Rule(lambda item: float(len(set(item.response.split()))), "different words"))

  def model(request, index):
    # Case 0 obeys and wins, 1 obeys and loses, 2 violates, 3 fails.
    return {"0": "x y z", "1": "x", "2": "x y z w", "3": None}[request.prompt[-1]]

  generator = Scripted(model)
  report = evaluate(cases(), generator, judge, LiftSpec(), scales=(0.5,), chain="temperature(0)")
  assert (report["violation"], report["win"]) == (1 / 3, pytest.approx(0.5 / 3)) and report["words"] == 8 / 3
  assert (report["count"], report["answered"], report["obeying"], report["judged"]) == (4, 3, 2, 2)
  assert report["counter"] == "words" and report["judge"] == "pairs by different words"
  # Limits of 2 words, unjudged.
  assert report["scales"]["0.5"]["violation"] == 2 / 3 and report["scales"]["0.5"]["win"] is None
  assert "using 2 words" in generator.requests[-1].prompt and generator.requests[0].chain == "temperature(0)"
  without = evaluate(cases(), generator, None, LiftSpec(), scales=())
  assert without["win"] is None and without["violation"] == 1 / 3 and without["judge"] is None
  bare = [case._replace(baseline=None) for case in cases()]
  with pytest.raises(ValueError, match="'c0' has no baseline"):
    evaluate(bare, generator, judge, LiftSpec())
  samples = answer(cases(), generator, max_new_tokens=9)
  records = as_records(cases(), samples, judge_cases(cases(), samples, judge, "words"))
  assert json.loads(json.dumps(records))[2]["reason"] == "violation" and records[3]["answer"] is None


def test_verdicts_that_are_missing_are_not_lost():
  kept, broken, lost = Outcome(1, False, 1.0), Outcome(9, True, 0.0), Outcome(1, False, None, "no verdict")
  found = summarize([kept, lost, broken, broken])
  # Half obey, and of those the one that was judged won.
  assert found["win"] == 0.5 and (found["obeying"], found["judged"]) == (2, 1)
  assert summarize([lost, lost, broken])["win"] is None and summarize([lost, broken])["judged"] == 0
  assert summarize([broken, broken])["win"] == 0.0 and summarize([broken._replace(win=None)])["win"] is None
  assert summarize([Outcome(None, None, None, "no answer")])["win"] is None


def test_a_judge_is_asked_in_the_field_that_it_knows():
  config = get_config("paper")
  config.evaluate.judge.update(url="http://localhost:1", model="m")
  for field in ("max_tokens", "max_completion_tokens"):
    config.evaluate.judge.max_tokens_field = field
    wire = open_judge(config, None)._asking._generator.wire
    assert field in wire.body_of(Request("a", [("user", "x")]), [0])


def test_limits_in_conversations_and_in_fine_tuning():
  spec = LiftSpec(min_difference=1, template="At most {limit}: {instruction}")
  turns = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go {x}"},
  )
  pair = PreferencePair(
    "p", turns, "a b", "a", chosen_tokens=(1, 2), rejected_tokens=(3,), prompt_tokens=(9,)
  )
  loose, tight = limited_samples(pair, spec)
  assert [turn["content"] for turn in loose.prompt] == ["Hi", "Yes?", "At most 12: Go {x}"]
  assert tight.prompt[-1]["content"] == "At most 1: Go {x}" and turns[-1]["content"] == "Go {x}"
  # Tokens of the responses go with them; those of the prompt without the limit are gone.
  assert (tight.chosen_tokens, tight.rejected_tokens, tight.prompt_tokens) == ((3,), (1, 2), None)
  assert lift_of(tight)["is_swapped"] and lift_of(pair) is None
  with pytest.raises(DataError, match="turn of the user"):
    limited_samples(pair._replace(prompt=turns[1:2]), spec)
  with pytest.raises(DataError, match="pair 'p', field 'chosen'"):
    limited_samples(pair._replace(chosen=None), spec)
  limits = set()
  for number in range(60):
    (head, tail) = limited_response(Response(str(number), "Go", "a b c"), spec).prompt.split(": ")
    assert tail == "Go"
    limits.add(int(head.removeprefix("At most ")))
  assert limits == set(range(3, 14))


def test_a_word_against_none_has_no_limit_between():
  spec = LiftSpec(min_difference=1)
  pair = PreferencePair("p", "Go", "a", "")
  assert limited_samples(pair, spec) == [] and statistics([pair], spec)["kept"] == 0
  (_, tight) = limited_samples(pair._replace(chosen="a b"), spec)
  assert lift_of(tight)["limit"] == 1


@pytest.mark.parametrize(
  "field, value",
  [("template", "{limit} words"), ("template", "{limit}{limit}{instruction}"), ("counter", "tokens"),
   ("min_difference", 0), ("margin", -1)],
)  # fmt: skip
def test_settings_are_checked(field, value):
  with pytest.raises(ValueError, match=field):
    LiftSpec(**{field: value})
