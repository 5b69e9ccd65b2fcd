"""The HTTP client against a local server that fails: nothing lost, nothing doubled, nothing asked twice."""

import email.utils
import json
import logging
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from nr.data.bad_records import DataError
from nr.generators.openai_compatible import OpenAICompatible, seconds_of
from nr.generators.openai_wire import seed_of
from nr.generators.protocol import Request, samples_by_request, total_cost
from tests.generators.server import FAULTS, serving

QUICK = dict(base_wait=0.005, max_wait=0.1, timeout=0.5, max_attempts=30)


def client(server, **settings):
  return OpenAICompatible(server.url, "served", **{**QUICK, **settings})


def requests(count, **settings):
  return [Request(f"r{number}", f"prompt {number}", **settings) for number in range(count)]


def texts(grouped):
  return [[sample.text for sample in group] for group in grouped]


def expected(asked):
  return [
    [f"{each.prompt}|{seed_of(each, 0)}|{place}" for place in range(each.num_samples)] for each in asked
  ]


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_nothing_is_lost_or_doubled_under_faults(fault):
  asked = requests(24, num_samples=3)
  share = 0.0 if fault is None else 0.3
  with serving(fault_share=share, faults=(fault,), silence=0.8) as server:
    generator = client(server, concurrency=6, timeout=0.3 if fault == "silent" else 5.0)
    grouped = samples_by_request(asked, generator.generate(asked))
    assert bool(server.failures) == (fault is not None)
    assert server.most_running <= 6 + len(server.failures)  # a silent call runs on where nobody waits
  assert texts(grouped) == expected(asked)
  assert all(sample.error is None and sample.model == "served" for group in grouped for sample in group)
  cost = total_cost(sample for group in grouped for sample in group)
  assert (cost.prompt_tokens, cost.generated_tokens) == (24 * 7, 24 * 9)
  assert cost.calls == pytest.approx(24 + len(server.failures))


def test_concurrency_is_bounded_and_used():
  with serving(delay=0.05) as server:
    list(client(server, concurrency=4).generate(requests(16)))
    assert server.most_running == 4


def test_all_faults_at_once_with_a_cache_asks_for_nothing_twice(tmp_path):
  asked = requests(40, num_samples=2)
  path = tmp_path / "cache" / "answers.jsonl"
  with serving(fault_share=0.3, silence=0.6) as server:
    first = samples_by_request(asked, client(server, cache=path).generate(asked))
    count = len(server.bodies)
    again = samples_by_request(asked, client(server, cache=path).generate(asked))
    assert len(server.bodies) == count and again == first and len(set(server.failures)) >= 5
    # More samples ask for the missing ones only.
    more = [Request(each.id, each.prompt, num_samples=3) for each in asked]
    grown = samples_by_request(more, client(server, cache=path).generate(more))
    assert [group[:2] for group in grown] == first
    assert all(body["n"] == 1 for _, body in server.bodies[count:])
    # Whatever decides the answer is part of the key.
    before = len(server.bodies)
    list(client(server, cache=path, body={"top_k": 5}).generate(asked[:1]))
    list(client(server, cache=path).generate([Request("r0", "prompt 0", chain="temperature(0.5)")]))
    assert len(server.bodies) >= before + 2
  keys = [(entry["key"], entry["sample"]["index"]) for entry in map(json.loads, path.open())]
  assert len(keys) == len(set(keys)) == 40 * 3 + 2 + 1


SCRIPT = """
import sys
from nr.generators.openai_compatible import OpenAICompatible
from nr.generators.protocol import Request
generator = OpenAICompatible(sys.argv[1], "served", cache=sys.argv[2], concurrency=4, base_wait=0.005, max_attempts=30)
asked = [Request(f"r{number}", f"prompt {number}", num_samples=2) for number in range(200)]
for sample in generator.generate(asked):
  print(sample.request_id, sample.index, flush=True)
"""


def test_killed_in_the_middle_and_taken_up_again(tmp_path):
  asked, path = requests(200, num_samples=2), tmp_path / "answers.jsonl"
  with serving(fault_share=0.3, faults=("429", "500", "reset"), delay=0.01) as server:
    arguments = [sys.executable, "-c", SCRIPT, server.url, str(path)]
    process = subprocess.Popen(
      arguments, stdout=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parents[2]
    )
    printed = [process.stdout.readline().split() for _ in range(60)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)  # calls of the dead client end
    kept = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    there = {(entry["sample"]["request_id"], entry["sample"]["index"]) for entry in kept}
    # What was handed on had been written before; the run was really cut short.
    assert {(name, int(index)) for name, index in printed} <= there and 60 <= len(there) < 400
    before = len(server.answered)
    grouped = samples_by_request(asked, client(server, cache=path).generate(asked))
    assert texts(grouped) == expected(asked)
    asked_again = {body["prompt"] for body in server.answered[before:]}
    assert asked_again == {each.prompt for each in asked} - {
      each.prompt for each in asked if (each.id, 0) in there and (each.id, 1) in there
    }
  keys = [(entry["key"], entry["sample"]["index"]) for entry in map(json.loads, path.open())]
  assert len(keys) == len(set(keys)) == 400


def test_a_line_cut_off_is_dropped_and_named(tmp_path, caplog):
  asked, path = requests(4), tmp_path / "answers.jsonl"
  with serving() as server:
    whole = samples_by_request(asked, client(server, cache=path).generate(asked))
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(content[:-20])
    with caplog.at_level(logging.WARNING):
      again = samples_by_request(asked, client(server, cache=path).generate(asked))
    assert "line 4" in caplog.text and len(server.bodies) == 5
    assert texts(again) == texts(whole) and len(path.read_bytes().splitlines()) == 4
    # Damage elsewhere is no kill.
    path.write_bytes(lines[0] + b"garbage\n" + lines[1])
    with pytest.raises(DataError, match="line 2"):
      list(client(server, cache=path).generate(asked))


def test_two_writers_are_refused(tmp_path):
  with serving() as server:
    open_one = client(server, cache=tmp_path / "a.jsonl").generate(requests(2))
    next(open_one)
    with pytest.raises(DataError, match="another process"):
      next(client(server, cache=tmp_path / "a.jsonl").generate(requests(2)))
    open_one.close()
    assert len(list(client(server, cache=tmp_path / "a.jsonl").generate(requests(2)))) == 2


def test_final_refusals_fail_at_once_and_the_key_stays_secret(tmp_path, monkeypatch, caplog):
  monkeypatch.setenv("TEST_KEY", "sk-secret")
  path = tmp_path / "answers.jsonl"
  for fault in ("401", "302", "500"):
    with serving(fault_share=1.0, faults=(fault,)) as server, caplog.at_level(logging.DEBUG):
      settings = dict(api_key_variable="TEST_KEY", cache=path, max_attempts=3)
      (found,) = client(server, **settings).generate(requests(1))
      assert found.text is None and f"HTTP {fault}" in found.error and found.finish_reason == "error"
      assert len(server.bodies) == (3 if fault == "500" else 1)
      assert server.headers[0]["Authorization"] == "Bearer sk-secret"
      assert "sk-secret" not in found.error + caplog.text + path.read_text()
  with serving() as server:  # failures were not kept
    (found,) = client(server, api_key_variable="TEST_KEY", cache=path).generate(requests(1))
    assert found.error is None and "sk-secret" not in path.read_text()
  with pytest.raises(ValueError, match="NO_SUCH_KEY"):
    OpenAICompatible("http://localhost", "m", api_key_variable="NO_SUCH_KEY")


def test_too_few_texts_are_not_asked_for_again():
  with serving(fault_share=1.0, faults=("few",)) as server:
    found = list(client(server).generate(requests(1, num_samples=2)))
    assert len(server.bodies) == 1 and all("1 texts for n=2" in each.error for each in found)


@pytest.mark.parametrize(
  "change",
  [
    {"message": "x"},
    {"index": None, "text": "x"},
    {"logprobs": {"tokens": [1], "token_logprobs": [0]}},
    {"logprobs": {"tokens": ["a"], "token_logprobs": ["b"]}},
    {"logprobs": {"tokens": ["token_id:x"], "token_logprobs": [0]}},
  ],
)
def test_an_answer_of_another_form_loses_no_other(change, tmp_path):
  with serving(change=lambda prompt, choice: choice | (change if prompt == "prompt 1" else {})) as server:
    generator = client(server, max_attempts=2, cache=tmp_path / "answers.jsonl")
    asked = requests(3, num_samples=2)
    one, two, three = samples_by_request(asked, generator.generate(asked))
  assert all(each.text is None and "not of the form" in each.error for each in two)
  assert texts([one, three]) == [expected(asked)[0], expected(asked)[2]]


def test_what_json_cannot_write_is_no_reason_to_stop(tmp_path):
  def change(prompt, choice):
    choice["text"] += "\ud83d\ude00 \ud83d"
    choice["logprobs"] |= (
      {"token_logprobs": [-0.5, float("-inf")]} if prompt == "prompt 1" else {"tokens": ["\ud83d", "b"]}
    )
    return choice

  asked = requests(2)
  with serving(change=change) as server:
    first, again = (
      samples_by_request(
        asked, client(server, use_log_probs=True, cache=tmp_path / "a.jsonl").generate(asked)
      )
      for _ in range(2)
    )
    assert len(server.bodies) == 2 and again == first
  ((one,), (two,)) = first
  # A whole pair is one character; half of one is U+FFFD, and UTF-8 can write the text.
  assert one.text.endswith("\U0001f600 \ufffd") and one.text.encode() and one.error is None
  assert one.log_probs == (-0.5, -1.5) and one.extras["token_texts"] == ["\ud83d", "b"]
  assert two.log_probs is None and two.error is None


def test_a_sample_that_the_cache_refuses_is_handed_on(tmp_path, monkeypatch, caplog):
  def put(*_):
    raise DataError("cannot be written")

  monkeypatch.setattr("nr.generators.sample_cache.SampleCache.put", put)
  with serving() as server, caplog.at_level(logging.WARNING):
    (found,) = client(server, cache=tmp_path / "a.jsonl").generate(requests(1))
  assert found.error is None and "request 'r0' is not kept in the cache: cannot be written" in caplog.text


def test_nobody_there():
  (found,) = OpenAICompatible("http://127.0.0.1:9", "m", max_attempts=2, base_wait=0.001).generate(
    requests(1)
  )
  assert found.text is None and "no answer" in found.error


def test_retry_after_is_honoured():
  assert seconds_of("3") == 3 and seconds_of(None) is None and seconds_of("soon") is None
  later = email.utils.formatdate(time.time() + 30, usegmt=True)
  assert 25 < seconds_of(later) < 31
  with serving(fault_share=1.0, faults=("429",)) as server:
    began = time.monotonic()
    list(client(server, base_wait=1e-6, max_attempts=5).generate(requests(1)))
    # Four waits of 0.02 s that the server asked for.
    assert time.monotonic() - began >= 0.08


def test_leaving_early_stops_asking():
  with serving(delay=0.02) as server:
    samples = client(server, concurrency=2).generate(requests(200))
    next(samples)
    samples.close()
    count = len(server.bodies)
    time.sleep(0.1)
    assert len(server.bodies) == count < 20


def test_what_is_sent():
  with serving() as server:
    chat = Request(
      "c",
      [("system", "s"), ("user", "u")],
      max_new_tokens=5,
      stop=("\n",),
      chain="temperature(0.5)|top_p(0.9)",
    )
    text = Request("t", "x", chain="frequency_presence(0.1, 0.2)|temperature(0.7)|min_p(0.1)|top_k(5)")
    (one,) = client(server, use_log_probs=True, max_tokens_field="max_completion_tokens").generate([chat])
    (two,) = client(server, use_log_probs=True).generate([text])
    (path, sent), (other_path, other) = server.bodies
  assert path == "/v1/chat/completions" and other_path == "/v1/completions"
  assert sent["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
  assert (sent["temperature"], sent["top_p"], sent["stop"]) == (0.5, pytest.approx(0.9), ["\n"])
  assert sent["max_completion_tokens"] == 5 and "max_tokens" not in sent
  assert (
    other["top_p"] == 1.0
    and other["top_k"] == 5
    and other["presence_penalty"] == 0.2
    and other["min_p"] == 0.1
  )
  assert one.log_probs == two.log_probs == (-0.5, -1.5) and one.transformed_log_probs is None
  assert one.extras["token_texts"] == ["a", "b"] and one.is_complete
  for wrong in (
    "top_p(0.9)|temperature(0.5)",
    "typical(0.9)",
    "top_p(0.9, 2)",
    "temperature(1)|temperature(2)",
  ):
    with pytest.raises(ValueError, match="request 'a'"):
      next(OpenAICompatible("http://localhost", "m").generate([Request("a", "x", chain=wrong)]))


def test_settings_are_checked():
  for wrong in (dict(concurrency=0), dict(max_attempts=0), dict(samples_per_call=0)):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      OpenAICompatible("http://localhost", "m", **wrong)
  with pytest.raises(ValueError, match="url"):
    OpenAICompatible("localhost:8000", "m")
