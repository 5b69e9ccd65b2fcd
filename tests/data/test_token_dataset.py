"""The token stream on disk."""

import json

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer, random_dataset, random_documents

from nr.data.bad_records import DataError
from nr.data.sources import Document
from nr.data.token_dataset import ArrayWriter, TokenDataset, token_dtype, write_token_dataset


def test_stream_holds_each_document_and_its_end(tmp_path):
  found = [Document("a\n", "é!"), Document("b", "xyz")]
  dataset = write_token_dataset(tmp_path / "d", iter(found), ByteTokenizer(), provenance={"corpus": "toy"})
  np.testing.assert_array_equal(dataset.tokens, [*"é!".encode(), 256, *b"xyz", 256])
  assert dataset.tokens.dtype == np.uint16 and isinstance(dataset.tokens, np.memmap)
  np.testing.assert_array_equal(dataset.document_starts, [0, 4])
  np.testing.assert_array_equal(dataset.document_bytes, [3, 3])
  assert dataset.document_ids() == ["a\n", "b"] and dataset.num_bytes == 6
  assert dataset.document_span(1) == (4, 8) and dataset.document_tokens(0).tolist()[-1] == 256
  np.testing.assert_array_equal(dataset.document_of(np.arange(8)), [0] * 4 + [1] * 4)
  assert dataset.header["provenance"] == {"corpus": "toy"}
  assert not list(tmp_path.glob("*.partial"))


def test_same_documents_same_bytes(tmp_path):
  first, second = random_dataset(tmp_path / "a"), random_dataset(tmp_path / "b")
  assert first.fingerprint == second.fingerprint and first.header == second.header


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
  assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32
  large = ByteTokenizer(70_000)
  dataset = write_token_dataset(tmp_path / "d", [Document("a", "b")], large)
  assert dataset.tokens.tolist() == [98, 69_999] and dataset.tokens.dtype == np.uint32
  with pytest.raises(
    DataError, match="dtype='uint16' holds ids up to 65535, the tokenizer has vocab_size=70000"
  ):
    write_token_dataset(tmp_path / "e", [Document("a", "b")], large, dtype="uint16")


def test_another_tokenizer_is_refused_with_both_named(tmp_path):
  dataset = random_dataset(tmp_path / "d")
  TokenDataset.open(tmp_path / "d", dataset.tokenizer, verify_hash=True)
  with pytest.raises(DataError, match=f"{dataset.tokenizer}.*feed"):
    TokenDataset.open(tmp_path / "d", "feed")


def test_existing_and_empty_datasets_are_refused(tmp_path):
  random_dataset(tmp_path / "d")
  with pytest.raises(DataError, match="exists"):
    random_dataset(tmp_path / "d")
  again = write_token_dataset(tmp_path / "d", random_documents(3), ByteTokenizer(), overwrite=True)
  assert again.num_documents == 3
  with pytest.raises(DataError, match="no documents"):
    write_token_dataset(tmp_path / "e", [], ByteTokenizer())
  assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_an_interrupted_write_leaves_nothing_that_looks_finished(tmp_path):
  def failing():
    yield from random_documents(3)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_token_dataset(tmp_path / "d", failing(), ByteTokenizer())
  with pytest.raises(DataError, match="dataset.json is missing"):
    TokenDataset.open(tmp_path / "d")
  assert random_dataset(tmp_path / "d").num_documents == 50


def test_damage_is_noticed(tmp_path):
  random_dataset(tmp_path / "d")
  tokens = tmp_path / "d" / "tokens.npy"
  whole = tokens.read_bytes()
  flipped = bytearray(whole)
  flipped[-3] ^= 1
  tokens.write_bytes(bytes(flipped))
  TokenDataset.open(tmp_path / "d")  # a flipped bit costs a full read to notice
  with pytest.raises(DataError, match="tokens.npy has sha256"):
    TokenDataset.open(tmp_path / "d", verify_hash=True)
  tokens.write_bytes(whole[:-2])
  with pytest.raises(DataError, match=r"tokens.npy has \d+ bytes, dataset.json records"):
    TokenDataset.open(tmp_path / "d")
  tokens.unlink()
  with pytest.raises(DataError, match="tokens.npy is missing"):
    TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize("field, value", [("format", "other"), ("version", 99), ("num_tokens", 1)])
def test_a_foreign_header_is_refused(tmp_path, field, value):
  dataset = random_dataset(tmp_path / "d")
  (tmp_path / "d" / "dataset.json").write_text(json.dumps({**dataset.header, field: value}))
  with pytest.raises(DataError, match=f"dataset.json, field '{field}'"):
    TokenDataset.open(tmp_path / "d")


def test_array_writer_grows(tmp_path):
  writer = ArrayWriter(tmp_path / "a.npy", np.uint16)
  parts = [np.arange(8), np.zeros(0), np.ones(12345)]
  for part in parts:
    writer.append(part)
  with pytest.raises(ValueError, match="one dimension"):
    writer.append(np.zeros((2, 3)))
  writer.close()
  found = np.load(tmp_path / "a.npy", mmap_mode="r", allow_pickle=False)
  np.testing.assert_array_equal(found, np.concatenate(parts))
