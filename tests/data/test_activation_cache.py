"""The cache of activations on disk: what is read back, going on after a stop, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from nr.data import activation_cache
from nr.data.activation_cache import ActivationCache, ActivationHeader, ActivationWriter
from nr.data.bad_records import DataError

HEADER = ActivationHeader(
  teacher="t" * 64, tokenizer="k" * 64, dataset="d" * 64, layer=1, window=6, reset_at_documents=False,
  num_windows=11, model_dim=4,
)  # fmt: skip
VALUES = np.random.default_rng(0).normal(size=(11, 6, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
  monkeypatch.setattr(activation_cache, "_SHARD_BYTES", 3 * 6 * 4 * 4)  # three windows


def write(directory, header=HEADER, stop=None, count=2):
  writer = ActivationWriter(directory, header)
  for some in writer.remaining(count):
    if stop is not None and some.start >= stop:
      return None
    writer.write(VALUES[some.start : some.stop])
  return writer.finish()


def test_windows_are_read_in_any_order(tmp_path):
  cache = write(tmp_path)
  order = np.array([10, 0, 5, 5, 3])
  assert cache.read(order).dtype == np.float32
  np.testing.assert_array_equal(cache.read(order), VALUES[order])
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    *(f"activations-0000{shard}.npy" for shard in range(4)), "dataset.json",
  ]  # fmt: skip
  again = ActivationCache.open(tmp_path, HEADER, verify_hash=True)
  np.testing.assert_array_equal(again.read(np.arange(11)), VALUES)


@pytest.mark.parametrize("stop", [0, 2, 3, 5, 9])
def test_a_stopped_writer_goes_on_after_its_last_whole_shard(tmp_path, stop):
  assert write(tmp_path, stop=stop) is None
  assert not ActivationCache.is_there(tmp_path)
  with pytest.raises(DataError, match="is not finished"):
    ActivationCache.open(tmp_path, HEADER)
  assert ActivationWriter(tmp_path, HEADER).windows_done == stop // 3 * 3
  np.testing.assert_array_equal(write(tmp_path, count=5).read(np.arange(11)), VALUES)
  assert ActivationCache.is_there(tmp_path)


@pytest.mark.parametrize(
  "field", ["teacher", "tokenizer", "dataset", "layer", "window", "model_dim", "num_windows"]
)
def test_a_cache_of_something_else_is_refused(tmp_path, field):
  write(tmp_path)
  value = getattr(HEADER, field)
  other = dataclasses.replace(HEADER, **{field: value + 1 if isinstance(value, int) else "x" * 64})
  with pytest.raises(
    DataError, match=rf"field '{field}': the activations were made with .*expected .*remove"
  ):
    ActivationCache.open(tmp_path, other)
  with pytest.raises(DataError, match="holds a finished dataset"):
    ActivationWriter(tmp_path, other)


def test_a_partial_cache_of_something_else_is_refused(tmp_path):
  write(tmp_path, stop=4)
  with pytest.raises(DataError, match="field 'layer'"):
    ActivationWriter(tmp_path, dataclasses.replace(HEADER, layer=2))


def test_damage_is_noticed(tmp_path):
  write(tmp_path)
  shard = tmp_path / "activations-00001.npy"
  content = bytearray(shard.read_bytes())
  content[-1] ^= 1
  shard.write_bytes(content)
  with pytest.raises(DataError, match="sha256"):
    ActivationCache.open(tmp_path, HEADER, verify_hash=True)
  shard.write_bytes(content[:-8])
  with pytest.raises(DataError, match="cut off"):
    ActivationCache.open(tmp_path, HEADER)
  shard.unlink()
  with pytest.raises(DataError, match="activations-00001.npy is missing"):
    ActivationCache.open(tmp_path, HEADER)
  recorded = json.loads((tmp_path / "dataset.json").read_text())
  assert recorded["teacher"] == HEADER.teacher and recorded["layer"] == 1


def test_half_precision_rounds_and_refuses_what_it_cannot_hold(tmp_path):
  half = dataclasses.replace(HEADER, dtype="float16")
  cache = write(tmp_path / "half", half)
  np.testing.assert_array_equal(cache.read(np.arange(11)), VALUES.astype(np.float16).astype(np.float32))
  assert half.bytes * 2 == HEADER.bytes
  with pytest.raises(DataError, match="not finite in float16; use float32"):
    ActivationWriter(tmp_path / "large", half).write(VALUES[:2] * 1e6)
  with pytest.raises(DataError, match="dtype='bfloat16' is unknown"):
    dataclasses.replace(HEADER, dtype="bfloat16")


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
  writer = ActivationWriter(tmp_path, HEADER)
  with pytest.raises(DataError, match="do not fit windows of 6 tokens and a width of 4"):
    writer.write(VALUES[:2, :5])
  with pytest.raises(DataError, match="11 of 11 windows are not written"):
    writer.finish()

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "save", full)
  with pytest.raises(DataError, match="No space left on device.*1056 bytes"):
    writer.write(VALUES[:3])
  assert not list(tmp_path.glob("*.partial"))
