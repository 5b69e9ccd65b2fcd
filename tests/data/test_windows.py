"""Windows and the batches made of them."""

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer, random_dataset

from nr.data.bad_records import DataError
from nr.data.sources import Document
from nr.data.token_dataset import write_token_dataset
from nr.data.windows import WindowSource, ordered_batches, shuffled_batches
from nr.labels import NO_LABEL


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return random_dataset(tmp_path_factory.mktemp("data") / "d")


def take(batches, count):
  iterator = iter(batches)
  return [next(iterator) for _ in range(count)]


def assert_same(first, second):
  assert len(first) == len(second)
  for one, other in zip(first, second):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def test_an_element_by_hand(tmp_path):
  toy = write_token_dataset(tmp_path / "d", [Document("a", "abc"), Document("b", "d")], ByteTokenizer())
  source = WindowSource(
    toy,
    4,
    tail="pad",
    reset_at_documents=True,
    with_documents=True,
    labels=np.arange(24, dtype=np.uint16).reshape(6, 4),
    label_weights=np.arange(24, dtype=np.float16).reshape(6, 4) / 8,
  )
  assert len(source) == 2  # a b c . | d .
  np.testing.assert_array_equal(source[0]["tokens"], [97, 98, 99, 256])
  np.testing.assert_array_equal(source[0]["targets"][:3], [98, 99, 256])
  np.testing.assert_array_equal(source[0]["weights"], [1, 1, 1, 0])
  np.testing.assert_array_equal(source[0]["documents"], [0, 0, 0, -1])
  np.testing.assert_array_equal(source[1]["tokens"], [100, 256, 0, 0])
  np.testing.assert_array_equal(source[1]["weights"], [1, 0, 0, 0])
  np.testing.assert_array_equal(source[1]["segment_ids"], [1, 1, 0, 0])
  np.testing.assert_array_equal(source[1]["positions"], [0, 1, 0, 0])
  np.testing.assert_array_equal(source[1]["labels"][:, 0], [16, 20, NO_LABEL, NO_LABEL])
  np.testing.assert_array_equal(source[1]["label_weights"][:, 0], [2, 2.5, 0, 0])
  types = {name: value.dtype.name for name, value in source[0].items()}
  assert types.pop("weights") == types.pop("label_weights") == "float32" and set(types.values()) == {"int32"}
  crossing = WindowSource(toy, 3, tail="drop", reset_at_documents=True)[1]  # . d .
  np.testing.assert_array_equal(crossing["weights"], [0, 1, 0])
  np.testing.assert_array_equal(crossing["segment_ids"], [1, 2, 2])
  np.testing.assert_array_equal(crossing["positions"], [0, 0, 1])
  assert WindowSource(toy, 3)[1]["weights"].tolist() == [1, 1, 0], "without reset attention and targets cross"


def test_a_tail_of_one_token_has_nothing_to_score(tmp_path):
  toy = write_token_dataset(tmp_path / "d", [Document("a", "abcd")], ByteTokenizer())
  assert len(WindowSource(toy, 4, tail="pad")) == 1


def test_bad_settings_name_the_field(dataset):
  with pytest.raises(IndexError):
    WindowSource(dataset, 8)[len(WindowSource(dataset, 8))]
  for make, message in [
    (lambda: WindowSource(dataset, 1), "length=1 must be at least 2"),
    (lambda: WindowSource(dataset, 10**6), "length=1000000 is more than the"),
    (lambda: WindowSource(dataset, 8, tail="keep"), "tail='keep'"),
    (lambda: WindowSource(dataset, 8, labels=np.zeros((3, 4))), "labels cover 3 tokens"),
    (lambda: WindowSource(dataset, 8, label_weights=np.zeros((3, 4))), "belong to labels of shape None"),
    (
      lambda: shuffled_batches(WindowSource(dataset, 8), 1000, 0),
      "batch_size=1000 is more than the .* lower",
    ),
    (
      lambda: shuffled_batches(WindowSource(dataset, 8), 9, 0, process_count=2),
      "batch_size=9 must be a positive",
    ),
    (
      lambda: shuffled_batches(WindowSource(dataset, 8), 8, 0, process_index=2, process_count=2),
      "process_index=2",
    ),
    (lambda: shuffled_batches(WindowSource(dataset, 8), 8, 0, shift="smple"), "did you mean 'sample'"),
    (lambda: ordered_batches(WindowSource(dataset, 8), 0), "batch_size=0"),
  ]:
    with pytest.raises(DataError, match=message):
      make()


def test_order_depends_on_seed_and_epoch_alone(dataset):
  source = WindowSource(dataset, 16)
  first = take(shuffled_batches(source, 4, seed=3), 60)
  assert_same(first, take(shuffled_batches(source, 4, seed=3), 60))

  def rows(batches):
    return [row.tobytes() for batch in batches for row in batch["tokens"]]

  other = rows(take(shuffled_batches(source, 4, seed=4), 60))
  assert rows(first) != other
  epoch = len(source)
  assert rows(first)[:epoch] != rows(first)[epoch : 2 * epoch], "each epoch has its own order"
  assert sorted(rows(first)[:epoch]) == sorted(rows(first)[epoch : 2 * epoch])
  assert sorted(rows(first)[:epoch]) == sorted(source[i]["tokens"].tobytes() for i in range(epoch))


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("shift", ["none", "sample", "epoch"])
def test_resume_at_a_random_step_is_exact(dataset, shift, prefetch):
  source = WindowSource(dataset, 16)

  def make():
    return iter(shuffled_batches(source, 4, seed=1, shift=shift, prefetch=prefetch))

  step = int(np.random.default_rng().integers(1, 60))
  running = make()
  for _ in range(step):
    next(running)
  state = running.get_state()
  expected = [next(running) for _ in range(20)]
  fresh = make()
  next(fresh)
  fresh.set_state(state)
  assert_same([next(fresh) for _ in range(20)], expected)
  for iterator in (running, fresh):
    iterator.close()


def test_processes_hold_contiguous_shares_of_the_same_global_batches(dataset):
  source = WindowSource(dataset, 16)
  whole = take(shuffled_batches(source, 8, seed=5, shift="sample"), 10)
  shares = [
    take(shuffled_batches(source, 8, seed=5, shift="sample", process_index=p, process_count=4), 10)
    for p in range(4)
  ]
  for step, batch in enumerate(whole):
    joined = np.concatenate([share[step]["tokens"] for share in shares])
    np.testing.assert_array_equal(joined, batch["tokens"])


def test_a_number_of_epochs_ends(dataset):
  source = WindowSource(dataset, 16)
  batches = list(shuffled_batches(source, 4, seed=0, epochs=2))
  assert len(batches) == 2 * len(source) // 4


def test_shifts_have_the_stated_range(dataset):
  starts = []

  class Spy(WindowSource):
    def window(self, start):
      starts.append(start)
      return super().window(start)

  source = Spy(dataset, 8)
  for shift, allowed in (("sample", 9), ("epoch", 8)):
    starts.clear()
    list(shuffled_batches(source, 4, seed=0, epochs=40, shift=shift))
    last = dataset.num_tokens - 8
    free = np.array([start for start in starts if start != last])
    assert max(starts) <= last and set(free % 8) == set(range(8))
    assert (max(starts) == last) and (0 in starts)
    if shift == "epoch":
      per_epoch = [
        set(np.array([s for s in starts[e : e + len(source)] if s != last]) % 8)
        for e in range(0, len(starts), len(source))
      ]
      assert all(len(moves) == 1 for moves in per_epoch) and len(set.union(*per_epoch)) == allowed


def test_ordered_batches_fill_up_with_weight_nothing(dataset):
  labels = np.ones((dataset.num_tokens, 4), np.uint16)
  source = WindowSource(dataset, 16, labels, tail="pad", with_documents=True)
  batch_size = len(source) - 1
  batches = ordered_batches(source, batch_size)
  assert len(batches) == 2
  last = batches[1]
  assert last["weights"][0].any() and not last["weights"][1:].any()
  assert (last["documents"][1:] == -1).all() and (last["labels"][1:] == NO_LABEL).all()
  assert_same(list(batches), list(batches))
  size = 2 * (len(source) // 2 + 1)
  halves = [list(ordered_batches(source, size, process_index=p, process_count=2)) for p in range(2)]
  assert len(halves[0]) == len(halves[1]) == 1
  joined = np.concatenate([half[0]["weights"] for half in halves])
  np.testing.assert_array_equal(joined, ordered_batches(source, size)[0]["weights"])
  tiny = [list(ordered_batches(source, 2 * len(source), process_index=p, process_count=2)) for p in range(2)]
  assert not tiny[1][0]["weights"].any() and tiny[0][0]["weights"].any(), "a process may have nothing to do"
