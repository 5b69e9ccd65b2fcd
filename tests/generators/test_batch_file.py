import json
import random

import pytest

from nr.data.bad_records import DataError
from nr.generators.batch_file import BatchFile
from nr.generators.protocol import Request, samples_by_request
from nr.generators.scripted import Scripted

ASKED = [Request("a", "x", num_samples=3, max_new_tokens=4), Request("b", [("user", "y")])]


def answer(line):
  """What a server makes of a line of requests."""
  body = line["body"]
  prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
  key = "message" if "messages" in body else "text"
  texts = [f"{prompt}{place}" for place in range(body["n"])]
  choices = [
    {"index": place, key: {"content": text} if key == "message" else text, "finish_reason": "length"}
    for place, text in enumerate(texts)
  ]
  return {
    "custom_id": line["custom_id"],
    "response": {"status_code": 200, "body": {"choices": choices}},
    "error": None,
  }


@pytest.fixture
def files(tmp_path):
  return tmp_path / "in" / "requests.jsonl", tmp_path / "results.jsonl"


def make(files, **settings):
  return BatchFile(*files, model="m", **settings)


def lines_of(files, **settings):
  make(files, **settings).write(ASKED)
  return [json.loads(line) for line in files[0].read_text().splitlines()]


def write(path, entries):
  path.write_text("".join(entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries))


@pytest.mark.parametrize("samples_per_call", [None, 1, 2])
def test_written_and_read_back_in_any_order(files, samples_per_call):
  with pytest.raises(DataError, match="no results yet.*run-batch"):
    list(make(files, samples_per_call=samples_per_call).generate(ASKED))
  lines = [json.loads(line) for line in files[0].read_text().splitlines()]
  assert len(lines) == {None: 2, 1: 4, 2: 3}[samples_per_call]
  assert {line["method"] for line in lines} == {"POST"} and len({line["custom_id"] for line in lines}) == len(
    lines
  )
  assert lines[0]["url"] == "/v1/completions" and lines[-1]["url"] == "/v1/chat/completions"
  assert lines[0]["body"]["max_tokens"] == 4 and lines[0]["body"]["model"] == "m"
  entries = [answer(line) for line in lines]
  random.Random(0).shuffle(entries)
  write(files[1], entries)
  (a, b) = samples_by_request(ASKED, make(files, samples_per_call=samples_per_call).generate(ASKED))
  size = samples_per_call or 3
  assert [sample.text for sample in a] == [f"x{index % size}" for index in range(3)] and b[0].text == "y0"


def test_failures_are_samples(files):
  first, second = lines_of(files)
  write(files[1], [{**answer(first), "response": {"status_code": 429, "body": {"m": "slow"}}}])
  (a, b) = samples_by_request(ASKED, make(files).generate(ASKED))
  assert all(sample.text is None and "HTTP 429" in sample.error for sample in a)
  assert "no line for custom_id 'b#0#" in b[0].error
  write(
    files[1],
    [{**answer(first), "error": {"code": "expired"}, "response": None}, {**answer(second), "response": {}}],
  )
  (a, b) = samples_by_request(ASKED, make(files).generate(ASKED))
  assert "expired" in a[0].error and "choices" in b[0].error


def test_results_of_other_requests_are_not_taken(files):
  write(files[1], [answer(line) for line in lines_of(files)])
  changed = [Request("a", "another", num_samples=3, max_new_tokens=4), ASKED[1]]
  with pytest.raises(DataError, match="'a#0#.*' was not asked for"):
    list(make(files).generate(changed))
  (a, b) = samples_by_request(changed, make(files, on_bad_line="skip").generate(changed))
  assert all(sample.text is None and "no line for custom_id" in sample.error for sample in a)
  assert b[0].text == "y0"
  with pytest.raises(DataError, match="was not asked for"):
    list(make(files, body={"top_k": 1}).generate(ASKED))


def test_bad_lines_are_named(files):
  first, second = map(answer, lines_of(files))
  doubled = {**second, "response": {"status_code": 200, "body": {"choices": [{"text": "again"}]}}}
  for bad, problem in (
    ('{"custom_id"\n', "no result"),
    ("[]\n", "no result"),
    ({**first, "custom_id": "other"}, "'other' was not asked for"),
    (doubled, "came in line 2 already"),
  ):
    write(files[1], [first, second, bad])
    with pytest.raises(DataError, match=f"results.jsonl, line 3: .*{problem}"):
      list(make(files).generate(ASKED))
    (a, b) = samples_by_request(ASKED, make(files, on_bad_line="skip").generate(ASKED))
    assert [sample.text for sample in a + b] == ["x0", "x1", "x2", "y0"]
  with pytest.raises(ValueError, match="on_bad_line"):
    make(files, on_bad_line="ignore")


def test_scripted():
  generator = Scripted({"x": ["one", "two"]})
  (a, b) = samples_by_request(ASKED, generator.generate(ASKED))
  assert [sample.text for sample in a] == ["one", "two", "one"] and b[0].error and b[0].text is None
  assert generator.requests == ASKED
  (a, _) = samples_by_request(ASKED, Scripted(lambda request, index: f"{request.id}{index}").generate(ASKED))
  assert [sample.text for sample in a] == ["a0", "a1", "a2"]
