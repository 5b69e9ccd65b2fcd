"""Pairs and responses as tokens and as batches."""

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer

from nr.data.bad_records import DataError
from nr.data.example_batches import packed_batches, padded_batches
from nr.data.examples import (
  EncodedExample,
  LengthLimits,
  PlainText,
  Response,
  chosen_responses,
  encode_pairs,
  encode_responses,
)
from nr.data.preferences import PreferencePair, ReferenceScore

END, BEGIN = 256, 257
FORMAT = PlainText(ByteTokenizer(), begin_ids=(BEGIN,))
ROOMY = LengthLimits(64)


def ids(text):
  return list(text.encode())


def encode(*pairs, limits=ROOMY, format=FORMAT):
  return encode_pairs(pairs, format, limits)


def random_pairs(count, seed=0, longest=12):
  generator = np.random.default_rng(seed)
  text = lambda: "".join(map(chr, generator.integers(97, 123, generator.integers(1, longest))))  # noqa: E731
  return [PreferencePair(f"p{i}", f"{i} {text()}", text() + "!", text() + "?") for i in range(count)]


def test_a_pair_by_hand():
  encoded = encode(PreferencePair("a", "hi", "yes", "n", weight=0.5))
  (example,) = encoded.examples
  assert [sequence.tolist() for sequence in example.tokens] == [
    [BEGIN, *ids("hi"), *ids("yes"), END],
    [BEGIN, *ids("hi"), *ids("n"), END],
  ]
  assert [mask.tolist() for mask in example.is_response] == [
    [False] * 3 + [True] * 4,
    [False] * 3 + [True] * 2,
  ]
  (batch,) = padded_batches(encoded.examples, 1, (8, 16), seed=0, epochs=1)
  assert batch["tokens"].tolist() == [[[BEGIN, *ids("hiyes"), END, 0], [BEGIN, *ids("hin"), END, 0, 0, 0]]]
  assert batch["targets"].tolist() == [[[*ids("hiyes"), END, 0, 0], [*ids("hin"), END, 0, 0, 0, 0]]]
  assert batch["weights"].tolist() == [[[0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]]
  assert batch["pair_weights"].tolist() == [[0.5]] and batch["indices"].tolist() == [[0]]
  (packed,) = packed_batches(encoded.examples, 1, 16, seed=0, epochs=1, slots=2)
  assert packed["tokens"].tolist() == [[[BEGIN, *ids("hiyes"), END, BEGIN, *ids("hin"), END] + [0] * 4]]
  assert packed["segment_ids"].tolist() == [[[1] * 7 + [2] * 5 + [0] * 4]]
  assert packed["positions"].tolist() == [[[*range(7), *range(5), 0, 0, 0, 0]]]
  assert packed["weights"].tolist() == [[[0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]]]
  assert packed["pair_weights"].tolist() == [[0.5, 0]] and packed["indices"].tolist() == [[0, -1]]
  types = {name: array.dtype.name for name, array in packed.items()}
  assert {name for name, type in types.items() if type == "float32"} == {"weights", "pair_weights"}
  assert set(types.values()) == {"float32", "int32"}


def test_what_is_left_out_is_counted_with_its_reason():
  report = encode(
    PreferencePair("good", "p", "x", "y"),
    PreferencePair("same", "p", "x", "x"),
    PreferencePair("sampled", "p", "x", None, rejected_tokens=(*ids("x"), END)),
    PreferencePair("void", "p", "", "x"),
    PreferencePair("end", "p", "x", None, rejected_tokens=(END,)),
    PreferencePair("bare", "p", "x", "y", prompt_tokens=()),
    PreferencePair("long", "p", "x" * 64, "y"),
  ).report
  assert report.dropped == {
    "identical responses": ["same", "sampled"],
    "empty response": ["void", "end"],
    "empty prompt": ["bare"],
    "response too long": ["long"],
  }
  assert (report.total, report.kept, report.shortened) == (7, 1, 0)
  assert report.text() == (
    "kept 1 of 7; left out 6 (empty prompt: 1, as bare; empty response: 2, as void; "
    "identical responses: 2, as same; response too long: 1, as long)"
  )
  with pytest.raises(DataError, match="no example is left: kept 0 of 1; left out 1"):
    encode(PreferencePair("same", "p", "x", "x"))


def test_tokens_are_used_as_they_were_sampled():
  cut = PreferencePair("a", "p", "x", None, prompt_tokens=(1, 2), rejected_tokens=(7, 8))
  encoded = encode(cut)
  assert encoded.examples[0].tokens[1].tolist() == [1, 2, 7, 8], "a response cut at a limit gets no end"
  assert encoded.examples[0].tokens[0].tolist() == [1, 2, *ids("x"), END]
  assert encoded.report.without_end == 1 and "1 sampled responses without an end" in encoded.report.text()
  ended = encode(cut._replace(rejected_tokens=(7, END)))
  assert ended.examples[0].tokens[1].tolist() == [1, 2, 7, END] and ended.report.without_end == 0


def test_an_end_that_the_text_spells_is_not_written_twice():
  lines = PlainText(ByteTokenizer(), end_id=ord("\n"))
  encoded = encode(PreferencePair("a", "p", "x\n", "y"), format=lines)
  assert [ids.tolist() for ids in encoded.examples[0].tokens] == [[*b"px\n"], [*b"py\n"]]
  assert PlainText(ByteTokenizer()).encode_prompt("") == [END], "nothing is the end of text before it"


def test_a_digest_knows_tokens_and_which_are_learnt():
  (example,) = encode(PreferencePair("a", "pq", "x", "y")).examples
  (other,) = encode(PreferencePair("a", "p", "qx", "qy")).examples
  assert all(np.array_equal(a, b) for a, b in zip(example.tokens, other.tokens))
  assert example.digest != other.digest
  assert example.digest == encode(PreferencePair("b", "pq", "x", "y", weight=2.0)).examples[0].digest


def test_long_prompts():
  pair = PreferencePair("a", "0123456789", "yes", "n")
  assert encode(pair, limits=LengthLimits(15)).report.shortened == 0, "11 + 4 just fit"
  for limits, kept in ((LengthLimits(14), "123456789"), (LengthLimits(6), "9"), (LengthLimits(64, 4), "789")):
    encoded = encode(pair, limits=limits)
    assert encoded.report.shortened == 1 and "1 with a shortened prompt" in encoded.report.text()
    swapped = encode(pair._replace(chosen="n", rejected="yes"), limits=limits).examples[0]
    chosen, rejected = (sequence.tolist() for sequence in encoded.examples[0].tokens)
    assert [sequence.tolist() for sequence in swapped.tokens] == [rejected, chosen]
    assert chosen == [BEGIN, *ids(kept), *ids("yes"), END], "begin of text, the last tokens and the end stay"
    assert rejected == [BEGIN, *ids(kept), *ids("n"), END], "both sides see the same prompt"
  other = PreferencePair("b", "0", "a", "b")
  assert encode(pair, other, limits=LengthLimits(5)).report.dropped == {"response too long": ["a"]}
  assert encode(pair, other, limits=LengthLimits(14, when_long="drop")).report.dropped == {"too long": ["a"]}
  with pytest.raises(
    DataError, match="example 'a': 11 tokens of prompt and 4 of response do not fit max_length=14"
  ):
    encode(pair, other, limits=LengthLimits(14, when_long="raise"))


def test_settings_are_checked():
  for call, match in (
    (lambda: LengthLimits(8, when_long="truncate"), "did you mean 'truncate_prompt'"),
    (lambda: LengthLimits(1), "max_length=1"),
    (lambda: LengthLimits(8, 0), "max_prompt_length=0"),
    (lambda: FORMAT.encode_prompt(({"role": "user", "content": "x"},)), "ChatFormat"),
  ):
    with pytest.raises(DataError, match=match):
      call()
  examples = encode(*random_pairs(4)).examples
  single = encode_responses([Response("r", "p", "x")], FORMAT, ROOMY).examples
  for call, match in (
    (lambda: padded_batches(examples, 1, (8, 16), 0), "the longest row has 16"),
    (lambda: packed_batches(examples, 1, 32, 0), "takes .* tokens and the longest row has 32"),
    (lambda: padded_batches(examples, 3, (64,), 0, process_count=2), "batch_size=3"),
    (lambda: padded_batches(examples, 2, (64, 32), 0), "lengths"),
    (lambda: packed_batches(examples, 2, 64, 0, slots=0), "slots=0"),
    (lambda: padded_batches([], 2, (64,), 0), "no examples"),
    (lambda: padded_batches(examples + single, 2, (64,), 0), r"\[1, 2\] sequences"),
  ):
    with pytest.raises(DataError, match=match):
      call()


PAIRS = random_pairs(23)
EXAMPLES = encode(*PAIRS).examples


def padded(**settings):
  return padded_batches(EXAMPLES, 4, (18, 24, 40), **{"seed": 3, **settings})


def packed(**settings):
  return packed_batches(EXAMPLES, 4, 80, **{"seed": 3, "slots": 3, "num_open": 3, **settings})


LAYOUTS = pytest.mark.parametrize("make", [padded, packed])


def contents(batch):
  """(index, weight, tokens that are responses) of every pair of a batch, read off its arrays alone."""
  found = []
  for row in range(len(batch["tokens"])):
    for slot, index in enumerate(batch["indices"][row]):
      if index < 0:
        assert batch["pair_weights"][row, slot] == 0
        continue
      sides = []
      for side in range(2):
        if "segment_ids" in batch:
          inside = batch["segment_ids"][row, 0] == 2 * slot + side + 1
          np.testing.assert_array_equal(batch["positions"][row, 0][inside], np.arange(inside.sum()))
          tokens, targets, weights = (batch[n][row, 0][inside] for n in ("tokens", "targets", "weights"))
        else:
          tokens, targets, weights = (batch[n][row, side] for n in ("tokens", "targets", "weights"))
        np.testing.assert_array_equal(targets[:-1][weights[:-1] > 0], tokens[1:][weights[:-1] > 0])
        assert targets[weights > 0][-1] == END
        sides.append(bytes(targets[weights > 0][:-1].astype(np.uint8)).decode())
      found.append((int(index), *sides))
  return found


@LAYOUTS
def test_every_pair_once_an_epoch_whole_and_in_another_order(make):
  iterator = iter(make())
  lengths, epochs = set(), []
  count = len(list(make(epochs=1)))
  for _ in range(2):
    found = []
    for _ in range(count):
      batch = next(iterator)
      assert len(batch["tokens"]) == 4
      lengths.add(batch["tokens"].shape[-1])
      found += contents(batch)
    assert sorted(found) == [(i, pair.chosen, pair.rejected) for i, pair in enumerate(PAIRS)]
    epochs.append(found)
  assert epochs[0] != epochs[1], "each epoch has its own order"
  assert lengths == ({18, 24, 40} if make is padded else {80})
  other = [entry for batch in make(seed=4, epochs=1) for entry in contents(batch)]
  assert other != epochs[0] and sorted(other) == sorted(epochs[0])
  again = [entry for batch in make(epochs=1) for entry in contents(batch)]
  assert again == epochs[0], "the seed decides the order"


def of_sizes(*sizes):
  """Single responses that take so many tokens."""
  return [
    EncodedExample(str(i), (np.full(size, i, np.int32),), (np.arange(size) > 0,), 1.0)
    for i, size in enumerate(sizes)
  ]


def test_what_is_left_over_of_each_length_is_joined():
  examples = of_sizes(*[8] * 3, *[16] * 3, *[32] * 3, 8)
  batches = list(padded_batches(examples, 4, (8, 16, 32), None, 1))
  found = [(batch["tokens"].shape, sorted(batch["indices"][:, 0].tolist())) for batch in batches]
  assert found == [((4, 8), [0, 1, 2, 9]), ((4, 32), [3, 4, 5, 6]), ((4, 32), [-1, -1, 7, 8])]
  (small,) = padded_batches(of_sizes(5, 9), 4, (8, 16, 32), None, 1)
  assert small["tokens"].shape == (4, 16), "the shortest length that holds them"


def test_the_fullest_row_closes_when_no_row_has_room():
  batches = list(packed_batches(of_sizes(8, 5, 6, 5), 1, 10, None, 1, num_open=2))
  rows = [batch["indices"][0][batch["indices"][0] >= 0].tolist() for batch in batches]
  assert rows == [[0], [1, 3], [2]]


def test_batches_that_are_not_full_come_anywhere():
  count, iterator = len(list(padded(epochs=1))), iter(padded())
  places = {place % count for place in range(6 * count) if (next(iterator)["indices"] < 0).any()}
  assert len(places) > 1


def test_packing_wastes_little():
  batches = list(packed_batches(EXAMPLES, 1, 160, 0, 1, slots=8))
  assert np.mean([batch["segment_ids"] > 0 for batch in batches]) > 0.8
  slots = [int((batch["indices"] >= 0).sum()) for batch in packed_batches(EXAMPLES, 1, 80, 0, 1, slots=2)]
  assert max(slots) == 2


def test_evaluation_keeps_the_order():
  batches = list(padded_batches(EXAMPLES, 4, (64,), None, 1))
  order = [index for batch in batches for index in batch["indices"][:, 0].tolist()]
  assert order == [*range(23), -1]
  again = list(padded_batches(EXAMPLES, 4, (64,), None, 1))
  for one, two in zip(batches, again, strict=True):
    assert_equal_batches(one, two)


def assert_equal_batches(one, two):
  assert one.keys() == two.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@LAYOUTS
def test_resume_is_exact(make):
  iterator = iter(make(epochs=2))
  for _ in range(7):
    state = iterator.get_state()
    resumed = iter(make(epochs=2))
    resumed.set_state(state)
    expected = next(iterator)
    assert_equal_batches(next(resumed), expected)
  state = iter(make(seed=4)).get_state()
  with pytest.raises(DataError, match="other examples or batch settings"):
    iter(make()).set_state(state)
  other = [example._replace(tokens=tuple(ids + 1 for ids in example.tokens)) for example in EXAMPLES]
  with pytest.raises(DataError, match="other examples or batch settings"):
    iter(padded_batches(other, 4, (18, 24, 40), 3)).set_state(iter(padded()).get_state())
  finished = iter(make(epochs=1))
  list(finished)
  at_end = iter(make(epochs=1))
  at_end.set_state(finished.get_state())
  assert list(at_end) == []


@LAYOUTS
def test_processes_share_the_global_batch(make):
  whole = list(make(epochs=1))
  shares = [list(make(epochs=1, process_index=p, process_count=2)) for p in range(2)]
  assert len(whole) == len(shares[0]) == len(shares[1])
  for batch, *parts in zip(whole, *shares):
    assert_equal_batches(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})


def scores(changed=None, **change):
  found = {e.id: ReferenceScore(e.digest, (-float(i), -0.5 * i)) for i, e in enumerate(EXAMPLES)}
  if changed:
    found[changed] = found[changed]._replace(**change)
  return found


@LAYOUTS
def test_reference_scores_are_joined_by_id(make):
  for batch in make(reference=scores(), epochs=1):
    indices, found = batch["indices"], batch["reference_log_probs"]
    assert found.shape == (*indices.shape, 2) and found.dtype == np.float32
    expected = np.where(indices[..., None] >= 0, np.stack([-indices, -0.5 * indices], -1), 0)
    np.testing.assert_array_equal(found, expected)
  missing = scores()
  del missing["p7"]
  with pytest.raises(DataError, match="id 'p7' is missing"):
    make(reference=missing)
  with pytest.raises(DataError, match="id 'p7' was scored for other tokens"):
    make(reference=scores("p7", digest="0" * 16))
  with pytest.raises(DataError, match="id 'p7' was scored for other tokens"):
    make(reference=scores("p7", log_probs=(0.0,)))


def test_single_responses():
  records = [*chosen_responses(PAIRS), Response("w", "p", "x", weight=0.5)]
  examples = encode_responses(records, FORMAT, ROOMY).examples
  for batch in (
    next(iter(packed_batches(examples, 2, 200, None, 1, slots=24))),
    next(iter(padded_batches(examples, 24, (64,), None, 1))),
  ):
    assert batch.keys() >= {"tokens", "targets", "weights", "indices"} and "pair_weights" not in batch
    assert batch["tokens"].ndim == 2
    if "segment_ids" not in batch:
      learnt = [bytes(row[weights > 0][:-1].astype(np.uint8)).decode() for row, weights in
                zip(batch["targets"], batch["weights"])]  # fmt: skip
      assert learnt == [record.response for record in records]
      assert batch["weights"][-1].max() == 0.5 and batch["weights"][:-1].max() == 1
    else:
      assert batch["segment_ids"].shape == (2, 200) and batch["segment_ids"].max() > 2
