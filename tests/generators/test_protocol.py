import json

import pytest

from nr.generators.protocol import (
  Cost,
  Message,
  Request,
  Sample,
  check_requests,
  failed,
  request_hash,
  sample_from_json,
  samples_by_request,
  to_json,
  total_cost,
)


def test_requests_are_checked():
  chat = Request("a", [{"role": "user", "content": "Hello"}, ("assistant", "Hi")], stop=["\n"])
  assert chat.prompt == (Message("user", "Hello"), Message("assistant", "Hi"))
  hash(chat)
  for settings in (dict(id=""), dict(num_samples=0), dict(max_new_tokens=0), dict(prompt=())):
    with pytest.raises(ValueError):
      Request(**{"id": "a", "prompt": "b", **settings})
  with pytest.raises(ValueError, match="'a' is given twice"):
    check_requests([chat, chat])


def test_samples_are_neither_lost_nor_doubled():
  requests = [Request("a", "x", num_samples=2), Request("b", "y")]
  samples = [Sample("b", 0, "t"), Sample("a", 1, "t"), failed(requests[0], 0, "m", "timeout")]
  grouped = samples_by_request(requests, samples)
  assert [[sample.index for sample in group] for group in grouped] == [[0, 1], [0]]
  assert grouped[0][0].text is None and grouped[0][0].error == "timeout"
  for wrong in (
    samples[:2],
    samples + samples[:1],
    samples + [Sample("c", 0, "t")],
    samples + [Sample("b", 1, "t")],
  ):
    with pytest.raises(ValueError):
      samples_by_request(requests, wrong)


def test_json_keeps_everything():
  sample = Sample("a", 1, "é", (1, 2), (-0.5, -1.0), None, "length", "m", Cost(1, 2, 1, 0.5), {"k": [1]})
  again = sample_from_json(json.loads(json.dumps(to_json(sample))))
  assert again == sample and not again.is_complete
  with pytest.raises(ValueError):
    sample_from_json({"text": "a"})


def test_hash_knows_every_field():
  base = Request("a", "x")
  others = [
    Request("b", "x"), Request("a", "y"), Request("a", "x", 2), Request("a", "x", seed=1),
    Request("a", "x", chain="top_p(0.5)"), Request("a", "x", stop=("s",)), Request("a", (Message("user", "x"),)),
  ]  # fmt: skip
  assert len({request_hash(each, "m") for each in [base, *others]} | {request_hash(base, "n")}) == 9
  assert request_hash(base, "m") == request_hash(Request("a", "x"), "m")


def test_costs_add():
  assert total_cost(
    [Sample("a", 0, "t", cost=Cost(1, 2, 1, 0.5)), Sample("a", 1, "t", cost=Cost(0, 3))]
  ) == Cost(1, 5, 1, 0.5)
