"""The stream of teacher activations: what it holds, its order, and exact resumption."""

import json

import numpy as np
import pytest

from nr.data.bad_records import DataError
from nr.recipes.activations import ActivationBatches, kept_rows

LENGTH, WINDOWS = 6, 40


class Windows:
  """Windows whose tokens are their place in the stream."""

  def __len__(self):
    return WINDOWS

  def __getitem__(self, index):
    weights = np.ones(LENGTH, np.float32)
    weights[-1] = 0
    return {"tokens": np.arange(index * LENGTH, (index + 1) * LENGTH), "weights": weights}


def tap(batch):
  return np.stack([batch["tokens"], batch["tokens"] ** 2], -1)


def make(**changes):
  settings = {"batch_size": 7, "seed": 3, "chunk_batches": 4, "windows_per_call": 4, **changes}
  return ActivationBatches(Windows(), tap, **settings)


def tokens_of(batches, count):
  iterator = iter(batches)
  return np.stack([next(iterator)["activations"][:, 0].astype(int) for _ in range(count)])


def test_batches_hold_shuffled_activations_of_all_but_the_first_positions():
  dataset = make()
  batch = next(iter(dataset))
  assert batch["activations"].dtype == np.float32 and batch["activations"].shape == (7, 2)
  np.testing.assert_array_equal(batch["activations"][:, 1], batch["activations"][:, 0] ** 2)
  np.testing.assert_array_equal(batch["weights"], 1)
  # 40 windows of 5 rows; chunks of 6 windows give 30 rows: 4 batches and 2 rows left out.
  tokens = tokens_of(dataset, 4 * 6)
  assert (tokens % LENGTH != 0).all()
  assert len(np.unique(tokens)) == tokens.size
  assert len(np.unique(tokens[0] // LENGTH)) > 2  # shuffled across windows
  assert (np.diff(tokens[0]) < 0).any()
  assert (tokens_of(make(skip_first=False), 24) % LENGTH == 0).any()


def test_order_depends_on_the_seed_alone():
  np.testing.assert_array_equal(tokens_of(make(), 9), tokens_of(make(windows_per_call=3), 9))
  assert (tokens_of(make(), 9) != tokens_of(make(seed=4), 9)).any()


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 9])
def test_resumed_stream_equals_the_uninterrupted_one(stop):
  whole = iter(make())
  expected = [next(whole) for _ in range(14)]
  first = iter(make())
  for _ in range(stop):
    next(first)
  state = json.loads(json.dumps(first.get_state()))
  second = iter(make())
  next(second)
  second.set_state(state)
  for batch in expected[stop:]:
    np.testing.assert_array_equal(next(second)["activations"], batch["activations"])
  assert second.get_state() == whole.get_state()


def test_processes_share_the_windows():
  parts = [tokens_of(make(batch_size=8, process_index=index, process_count=2), 5) for index in range(2)]
  assert parts[0].shape == (5, 4)
  assert not set(parts[0].ravel()) & set(parts[1].ravel())


def test_sample_is_taken_from_one_pass():
  assert make().sample(20).shape == (20, 2)
  sample = make().sample(10_000)
  assert 200 <= len(sample) <= 210


def test_padding_and_starts_of_documents_are_left_out():
  weights = np.array([[1, 1, 0, 1, 1, 0, 0, 0]])
  batch = {
    "weights": weights,
    "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 0, 0]]),
    "positions": np.array([[0, 1, 2, 0, 1, 2, 0, 0]]),
  }
  np.testing.assert_array_equal(kept_rows(batch, False), [[1, 1, 1, 1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(kept_rows(batch, True), [[0, 1, 1, 0, 1, 1, 0, 0]])
  np.testing.assert_array_equal(kept_rows({"weights": weights[:, 3:]}, True), [[0, 1, 1, 0, 0]])


def test_settings_that_cannot_work_are_refused():
  with pytest.raises(DataError, match="batch_size=7 must be a positive multiple of the 2 processes"):
    make(process_count=2)
  with pytest.raises(DataError, match="41 processes"):
    make(process_count=41, batch_size=41)
