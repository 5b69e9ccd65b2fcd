"""The label cache: round trip, resumption, and refusal of whatever does not match."""

import dataclasses

import numpy as np
import pytest

from nr.data import concept_labels
from nr.data.bad_records import DataError
from nr.data.concept_labels import LabelCache, LabelHeader, LabelWriter


def make_header(**changes):
  fields = {
    "teacher": "t0",
    "autoencoder": "s0",
    "tokenizer": "k0",
    "dataset": "d0",
    "layer": 1,
    "attribution": {"k_attr": 4, "sign": "paper"},
    "window": 8,
    "stride": 8,
    "num_concepts": 50,
    "num_tokens": 43,
    **changes,
  }
  return LabelHeader(**fields)


def labels_of(span, header):
  """Labels that say which token of the stream they belong to."""
  tokens = np.arange(span.start, span.start + header.window)
  return np.stack([(tokens * 7 + slot) % header.num_concepts for slot in range(4)], -1)


def write(writer, batch_size=2, batches=None):
  for index, spans in enumerate(writer.remaining(batch_size)):
    if index == batches:
      return None
    labels = np.stack([labels_of(span, writer.header) for span in spans])
    positive = labels[..., 0] % 7
    writer.write(spans, labels, positive, np.ones(positive.shape, bool))
  return writer.finish()


def expected_labels(header):
  tokens = np.arange(header.num_tokens)
  return np.stack([(tokens * 7 + slot) % header.num_concepts for slot in range(4)], -1)


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_spans_label_every_token_once_with_enough_context(stride):
  spans = concept_labels.label_spans(43, 8, stride)
  covered = np.concatenate([np.arange(span.first, span.stop) for span in spans])
  np.testing.assert_array_equal(covered, np.arange(43))
  for index, span in enumerate(spans):
    assert span.start <= span.first < span.stop <= span.start + 8 <= 43
    if index:
      assert span.first - span.start >= 8 - stride - 1


def test_24_round_trip_and_counts(tmp_path):
  header = make_header()
  cache = write(LabelWriter(tmp_path, header))
  cache = LabelCache.open(tmp_path, header, verify_hash=True)
  np.testing.assert_array_equal(cache.labels, expected_labels(header))
  assert cache.labels.dtype == np.uint16 and not cache.labels.flags.writeable
  positive = expected_labels(header)[:, 0] % 7
  assert cache.counts["mean_positive"] == pytest.approx(positive.mean())
  assert cache.counts["fewer_than_labels"] == pytest.approx((positive < 4).mean())
  assert cache.counts["coverage"] == len(np.unique(cache.labels)) / 50


def test_a_stopped_run_goes_on_and_gives_the_same_file(tmp_path):
  header = make_header(stride=3)
  whole = write(LabelWriter(tmp_path / "whole", header))
  writer = LabelWriter(tmp_path / "parts", header)
  write(writer, batches=2)
  writer.save()
  write(writer, batches=1)  # written, but lost: progress was not saved after it
  with pytest.raises(DataError, match="is not finished"):
    LabelCache.open(tmp_path / "parts")
  again = LabelWriter(tmp_path / "parts", header)
  assert again.windows_done == 4
  parts = write(again)
  assert parts.header == whole.header  # the hash and the counts included


def weights_of(span, header):
  """Float16 numbers that say which token of the stream they belong to."""
  tokens = np.arange(span.start, span.start + header.window)
  return np.stack([tokens / 64 + slot for slot in range(4)], -1).astype(np.float16)


def test_24_weights_are_kept_beside_labels_and_resume_with_them(tmp_path):
  header = make_header(attribution={"k_attr": 4, "weights": "score"}, stride=4)
  writer = LabelWriter(tmp_path, header)
  for _ in range(2):
    for spans in writer.remaining(2):
      ones = np.ones((len(spans), 8), bool)
      labels, weights = (np.stack([of(span, header) for span in spans]) for of in (labels_of, weights_of))
      # Rows that fill up a batch are left out.
      filled = (np.concatenate([array, array[:1]]) for array in (labels, ones, ones, weights))
      writer.write(spans, *filled)
      if writer.windows_done == 4:
        writer.save()
        writer = LabelWriter(tmp_path, header)
        break
  cache = writer.finish()
  cache = LabelCache.open(tmp_path, header, verify_hash=True)
  np.testing.assert_array_equal(cache.labels, expected_labels(header))
  expected = np.stack([np.arange(header.num_tokens) / 64 + slot for slot in range(4)], -1)
  np.testing.assert_array_equal(cache.weights, expected.astype(np.float16))
  assert not cache.weights.flags.writeable and set(cache.header["files"]) == {"labels.npy", "weights.npy"}
  with pytest.raises(
    DataError, match="'attribution.weights': labels were made with 'score', expected 'uniform'"
  ):
    LabelCache.open(tmp_path, {"attribution": {"weights": "uniform"}})
  # Labels without weights in the same folder leave nothing of them behind.
  assert write(LabelWriter(tmp_path, make_header())).weights is None
  assert not (tmp_path / "weights.npy").exists()


def test_weights_that_are_missing_unasked_or_bad_are_refused(tmp_path):
  weighted = make_header(attribution={"weights": "score"})
  for header, weights, message in [
    (weighted, None, "attribution.weights='score', yet none were given"),
    (make_header(), np.ones((1, 8, 4)), "attribution.weights=None, yet some were given"),
    (weighted, np.full((1, 8, 4), np.nan), "must be finite"),
    (weighted, -np.ones((1, 8, 4)), "and not negative"),
  ]:
    writer = LabelWriter(tmp_path / message[:30].replace("/", ""), header)
    spans = next(writer.remaining(1))
    ones = np.ones((1, 8), bool)
    with pytest.raises(DataError, match=message):
      writer.write(spans, labels_of(spans[0], header)[None], ones, ones, weights)


@pytest.mark.parametrize(
  "field, value",
  [("teacher", "t1"), ("autoencoder", "s1"), ("tokenizer", "k1"), ("dataset", "d1"), ("layer", 2),
   ("window", 9), ("stride", 4), ("num_concepts", 51), ("reset_at_documents", True)],
)  # fmt: skip
def test_24_a_cache_made_with_something_else_is_refused(tmp_path, field, value):
  header = make_header()
  write(LabelWriter(tmp_path, header))
  other = dataclasses.replace(header, **{field: value})
  was = header.to_dict()[field]
  with pytest.raises(
    DataError, match=f"field '{field}': labels were made with {was!r}, expected {value!r}; lab"
  ):
    LabelCache.open(tmp_path, other)


def test_24_attribution_variant_is_compared_field_by_field(tmp_path):
  write(LabelWriter(tmp_path, make_header()))
  with pytest.raises(
    DataError, match="field 'attribution.sign': labels were made with 'paper', expected 'abs'"
  ):
    LabelCache.open(tmp_path, {"attribution": {"sign": "abs"}})


def test_24_a_partial_cache_made_with_something_else_is_refused(tmp_path):
  write(LabelWriter(tmp_path, make_header()), batches=1)
  with pytest.raises(DataError, match="field 'teacher': .* remove .* and label again"):
    LabelWriter(tmp_path, make_header(teacher="t1"))


def test_a_flipped_byte_is_noticed(tmp_path):
  write(LabelWriter(tmp_path, make_header()))
  path = tmp_path / "labels.npy"
  content = bytearray(path.read_bytes())
  content[-5] ^= 1
  path.write_bytes(content)
  with pytest.raises(DataError, match=r"labels\.npy has sha256"):
    LabelCache.open(tmp_path, verify_hash=True)


def test_bad_settings_and_labels_are_refused(tmp_path):
  with pytest.raises(DataError, match="num_concepts=65536 does not fit"):
    make_header(num_concepts=65_536)
  make_header(num_concepts=65_535)
  with pytest.raises(DataError, match="window=44 must lie between 2 and the 43 tokens"):
    make_header(window=44, stride=44)
  with pytest.raises(DataError, match="stride=9 must lie"):
    make_header(stride=9)
  writer = LabelWriter(tmp_path, make_header())
  spans = next(writer.remaining(1))
  ones = np.ones((1, 8), np.int32)
  with pytest.raises(DataError, match="label 50 is not below num_concepts=50"):
    writer.write(spans, np.full((1, 8, 4), 50), ones, ones > 0)
  with pytest.raises(DataError, match="6 of 6 windows have no labels yet"):
    writer.finish()
