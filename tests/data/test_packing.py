"""Documents packed into rows."""

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer, random_dataset

from nr.data.bad_records import DataError
from nr.data.packing import ChunkSource, packed_batches
from nr.data.sources import Document
from nr.data.token_dataset import write_token_dataset
from nr.labels import NO_LABEL


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return random_dataset(tmp_path_factory.mktemp("data") / "d", count=40, longest=70)


def test_chunks_by_hand(tmp_path):
  toy = write_token_dataset(tmp_path / "d", [Document("a", "abcd"), Document("b", "xy")], ByteTokenizer())
  source = ChunkSource(toy, 4)
  assert [chunk["tokens"].tolist() for chunk in map(source.__getitem__, range(len(source)))] == [
    [97, 98, 99, 100],
    [120, 121, 256],  # end of text alone predicts nothing, and is predicted by "d"
  ]
  assert source[0]["targets"].tolist() == [98, 99, 100, 256] and source[0]["weights"].tolist() == [1] * 4
  assert source[1]["targets"].tolist()[:2] == [121, 256] and source[1]["weights"].tolist() == [1, 1, 0]


def test_every_token_but_each_document_s_first_is_scored_once(dataset):
  source = ChunkSource(dataset, 16)
  chunks = [source[i] for i in range(len(source))]
  assert sum(chunk["weights"].sum() for chunk in chunks) == dataset.num_tokens - dataset.num_documents
  scored = np.concatenate([chunk["targets"][chunk["weights"] > 0] for chunk in chunks])
  not_first = np.setdiff1d(np.arange(dataset.num_tokens), dataset.document_starts)
  np.testing.assert_array_equal(scored, dataset.tokens[not_first])


def segments(batches, label=False):
  """The packed chunks of all rows, padding left out, as bytes."""
  found = []
  for batch in batches:
    for row in range(len(batch["tokens"])):
      ids = batch["segment_ids"][row]
      for id in range(1, ids.max() + 1):
        inside = ids == id
        assert (np.diff(np.flatnonzero(inside)) == 1).all(), "a chunk stays in one piece"
        np.testing.assert_array_equal(batch["positions"][row][inside], np.arange(inside.sum()))
        if label:
          np.testing.assert_array_equal(
            batch["labels"][row][inside][:, 0] % 256, batch["tokens"][row][inside] % 256
          )
        found.append(batch["tokens"][row][inside].tobytes())
      assert not batch["weights"][row][ids == 0].any()
  return found


def test_rows_hold_whole_chunks_and_lose_none(dataset):
  labels = np.stack([np.asarray(dataset.tokens)] * 4, axis=1)
  source = ChunkSource(dataset, 32, labels)
  batches = list(packed_batches(source, 1, seed=0, epochs=1, num_rows=4))
  expected = sorted(source[i]["tokens"].tobytes() for i in range(len(source)))
  assert sorted(segments(batches, label=True)) == expected
  filled = np.mean([batch["segment_ids"] > 0 for batch in batches])
  assert filled > 0.75 and any(batch["segment_ids"].max() > 1 for batch in batches)
  padding = np.concatenate([batch["labels"][batch["segment_ids"] == 0] for batch in batches])
  assert (padding == NO_LABEL).all()
  assert {value.dtype.name for name, value in batches[0].items() if name != "weights"} == {"int32"}


def test_processes_pack_different_chunks(dataset):
  source = ChunkSource(dataset, 32)
  shares = [segments(packed_batches(source, 2, 0, 1, process_index=p, process_count=2)) for p in range(2)]
  expected = sorted(source[i]["tokens"].tobytes() for i in range(len(source)))
  assert sorted(shares[0] + shares[1]) == expected


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact(dataset, prefetch):
  def make():
    return iter(packed_batches(ChunkSource(dataset, 32), 3, seed=7, prefetch=prefetch))

  step = int(np.random.default_rng().integers(1, 30))
  running = make()
  for _ in range(step):
    next(running)
  state = running.get_state()
  expected = [next(running) for _ in range(12)]
  fresh = make()
  fresh.set_state(state)
  for one in expected:
    other = next(fresh)
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  for iterator in (running, fresh):
    iterator.close()


def test_bad_settings(dataset):
  with pytest.raises(DataError, match="batch_size=1000 is more than the .* chunks"):
    packed_batches(ChunkSource(dataset, 32), 1000, 0)
  with pytest.raises(DataError, match="length=1 must"):
    ChunkSource(dataset, 1)
  with pytest.raises(DataError, match="labels cover 2 tokens"):
    ChunkSource(dataset, 8, np.zeros((2, 4)))
