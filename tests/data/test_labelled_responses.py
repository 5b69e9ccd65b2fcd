"""Labelled responses: files, tokens, groups, and batches with mismatched sequences."""

import numpy as np
import pytest

from nr.data.bad_records import DataError
from nr.data.example_batches import padded_batches
from nr.data.examples import EncodedExample, LengthLimits, PlainText
from nr.data.labelled_responses import (
  LabelledResponse,
  encode_groups,
  encode_labelled,
  labelled_from_pairs,
  read_labelled,
  write_labelled,
)
from nr.data.preferences import PreferencePair
from nr.data.unpaired_batches import partners, unpaired_batches
from tests.data.byte_tokenizer import ByteTokenizer

FORMAT = PlainText(ByteTokenizer())
LIMITS = LengthLimits(24)


def said(id, prompt, response, is_desirable, **more):
  return LabelledResponse(id, prompt, is_desirable, response, **more)


def test_files_come_back_and_bad_ones_are_named(tmp_path):
  path = tmp_path / "labelled.jsonl"
  responses = [
    said("a", "hi", "yes", True, weight=0.5, provenance={"judge": "rule"}),
    said("b", ({"role": "user", "content": "hi"},), None, False, response_tokens=(3, 0), prompt_tokens=(1,)),
  ]
  write_labelled(path, responses)
  assert read_labelled(path) == responses
  for change, message in (
    ({"is_desirable": 1}, "field 'is_desirable'"),
    ({"response": None}, "is missing, and so is response_tokens"),
    ({"weight": -1.0}, "weight"),
    ({"prompt": ()}, "empty list"),
  ):
    with pytest.raises(DataError, match=message):
      write_labelled(path, [responses[0]._replace(**change)])
  assert read_labelled(path) == responses, "a file is written whole or not at all"
  path.write_text('{"id": "a", "prompt": "x", "response": "y", "is_desirable": "yes"}\n')
  with pytest.raises(DataError, match="line 1.*is_desirable"):
    read_labelled(path)


def test_pairs_come_apart_with_their_labels():
  pair = PreferencePair("p", "ask", "good", None, prompt_tokens=(1,), rejected_tokens=(2, 0), weight=2.0)
  chosen, rejected = labelled_from_pairs([pair])
  assert (chosen.id, chosen.is_desirable, chosen.response) == ("p/chosen", True, "good")
  assert (rejected.id, rejected.is_desirable, rejected.response_tokens) == ("p/rejected", False, (2, 0))
  assert chosen.weight == rejected.weight == 2.0 and chosen.prompt_tokens == (1,)


def test_encoded_responses_keep_their_labels_when_others_are_left_out():
  responses = [said("a", "hi", "x" * 40, True), said("b", "hi", "no", False), said("c", "ho", "yes", True)]
  encoded = encode_labelled(responses, FORMAT, LIMITS)
  assert [(each.id, each.labels) for each in encoded.examples] == [("b", (False,)), ("c", (True,))]
  assert dict(encoded.report.dropped) == {"response too long": ["a"]}
  with pytest.raises(DataError, match="'b' occurs twice"):
    encode_labelled([responses[1], responses[1]], FORMAT, LIMITS)


def test_groups_hold_all_of_a_prompt_and_leave_out_what_teaches_nothing():
  responses = [
    said("a", "hi", "one", True, weight=1.0),
    said("b", "ho", "two", True),
    said("c", "hi", "three", False, weight=3.0),
    said("d", "hi", "four", True, weight=2.0),
    said("e", "hu", "six", False),
    said("f", "hu", "seven", True),
  ]
  examples, report = encode_groups(responses, FORMAT, LIMITS)
  assert [(each.id, each.labels, each.weight) for each in examples] == [
    ("a", (True, False, True), 2.0),
    ("e", (False, True, False), 1.0),
  ]
  assert [mask.sum() for mask in examples[1].is_response] == [4, 6, 0]
  assert report.kept == 5 and list(report.dropped.values()) == [["b"]]
  batch = next(iter(padded_batches(examples, 2, (16,), None)))
  assert batch["tokens"].shape == (2, 3, 16)
  np.testing.assert_array_equal(batch["is_desirable"][:, 0], [[True, False, True], [False, True, False]])
  with pytest.raises(DataError, match="give good and bad responses to one prompt"):
    encode_groups(responses[:2], FORMAT, LIMITS)


def test_partners_are_the_rows_before_where_all_prompts_differ():
  assert partners("abcd") == [3, 0, 1, 2]  # TRL: (x_1, y_4), (x_2, y_1), (x_3, y_2), (x_4, y_3)
  assert partners("a") == [None] and partners("aaa") == [None] * 3


@pytest.mark.parametrize("prompts", ["aabb", "abab", "aabbcd", "abacbdeea", "aaab", "aaaabbc"])
def test_partners_have_other_prompts_and_every_response_serves_once(prompts):
  found = partners(prompts)
  used = [other for other in found if other is not None]
  assert len(set(used)) == len(used)
  assert all(prompts[row] != prompts[other] for row, other in enumerate(found) if other is not None)
  # Of a prompt with more than half of the rows, what is over stays alone; no one else does.
  largest = max(prompts.count(prompt) for prompt in set(prompts))
  assert found.count(None) == max(0, 2 * largest - len(prompts))


def single(id, prompt, response, label=True, weight=1.0):
  tokens = np.array([*prompt, *response], np.int32)
  return EncodedExample(str(id), (tokens,), (np.arange(len(tokens)) >= len(prompt),), weight, (label,))


def test_a_batch_holds_each_prompt_with_its_own_and_with_another_response():
  examples = [
    single(0, [1, 2], [11, 12, 13]),
    single(1, [3], [21], label=False, weight=0.5),
    single(2, [1, 2], [31, 32], label=False),
    single(3, [4, 5, 6, 7], [41]),
  ]
  batch = next(iter(unpaired_batches(examples, 4, (5, 8), seed=None)))
  assert batch["tokens"].shape == (4, 2, 8), (
    "five tokens hold each with its own response, not with the other's"
  )
  np.testing.assert_array_equal(batch["is_desirable"][:, 0, 0], [True, False, False, True])
  np.testing.assert_array_equal(batch["pair_weights"][:, 0], [1, 0.5, 1, 1])
  # Prompts by first appearance: rows 0 and 2, then 1, then 3; the step is 2, as wide as the first.
  expected = [[1, 2, 21], [3, 11, 12, 13], [1, 2, 41], [4, 5, 6, 7, 31, 32]]
  starts = [2, 1, 2, 4]
  for row, (ids, start) in enumerate(zip(expected, starts)):
    assert batch["tokens"][row, 1].tolist() == ids + [0] * (8 - len(ids))
    found = batch["targets"][row, 1][batch["weights"][row, 1] > 0].tolist()
    assert found == ids[start:], "only the response is scored"
    assert batch["targets"][row, 0][batch["weights"][row, 0] > 0].tolist() == (
      examples[row].tokens[0][start:].tolist()
    )


def test_a_mismatched_prompt_loses_its_oldest_tokens_where_rows_are_too_short():
  examples = [single(0, [1, 2, 3, 4], [11]), single(1, [5], [21, 22, 23])]
  batch = next(iter(unpaired_batches(examples, 2, (5,), seed=None)))
  np.testing.assert_array_equal(batch["tokens"][0], [[1, 2, 3, 4, 11], [3, 4, 21, 22, 23]])
  np.testing.assert_array_equal(batch["tokens"][1], [[5, 21, 22, 23, 0], [5, 11, 0, 0, 0]])


def many(count=10):
  draws = np.random.default_rng(0)
  return [
    single(i, draws.integers(1, 9, 1 + i % 3), draws.integers(9, 40, 1 + i % 4), label=i % 3 > 0)
    for i in range(count)
  ]


def test_batches_are_the_same_on_any_number_of_processes_and_resume():
  whole = unpaired_batches(many(), 4, (8,), seed=1)
  shares = [unpaired_batches(many(), 4, (8,), seed=1, process_index=i, process_count=2) for i in (0, 1)]
  iterators = [iter(share) for share in shares]
  for number, batch in zip(range(5), whole):
    parts = [next(iterator) for iterator in iterators]
    for field in batch:
      np.testing.assert_array_equal(np.concatenate([part[field] for part in parts]), batch[field])
    if number == 2:
      resumed = iter(unpaired_batches(many(), 4, (8,), seed=1))
      resumed.set_state(iterators[0].get_state())
  np.testing.assert_array_equal(next(resumed)["tokens"][:2], next(iter_from(whole, 3))["tokens"][:2])
  # One batch of the epoch has two examples: each is the other's partner, and its other rows are empty.
  counts = [
    ((batch["indices"][:, 0] >= 0).sum(), (batch["weights"][:, 1].sum(axis=-1) > 0).sum())
    for _, batch in zip(range(3), whole)
  ]
  assert sorted(counts) == [(2, 2), (4, 4), (4, 4)]


def iter_from(batches, position):
  iterator = iter(batches)
  for _ in range(position):
    next(iterator)
  return iterator


def test_what_cannot_be_matched_is_refused():
  with pytest.raises(DataError, match="batch_size=1"):
    unpaired_batches(many(), 1, (8,), seed=0)
  with pytest.raises(DataError, match="give single labelled responses"):
    unpaired_batches([each._replace(labels=()) for each in many()], 4, (8,), seed=0)
  with pytest.raises(DataError, match="labels each"):
    padded_batches([many()[0], many()[1]._replace(labels=())], 2, (8,), seed=0)
  other = [each._replace(labels=(not each.labels[0],)) for each in many()]
  state = iter(unpaired_batches(many(), 4, (8,), seed=0)).get_state()
  with pytest.raises(DataError, match="other examples"):
    iter(unpaired_batches(other, 4, (8,), seed=0)).set_state(state)
