"""Records through tensorflow-datasets, and its datasets as corpora, without TensorFlow."""

import json
import sys

import pytest

from nr.data.bad_records import DataError
from nr.data.records import write_records
from nr.data.sources import documents

SCHEMA = {"text": "str", "n": "int", "scores": "list[float]", "ok": "bool", "note": "str?", "extra": "object"}


def good(n):
  return {"text": f"é {n}", "n": n, "scores": [0.5] * n, "ok": n > 2, "extra": {"deep": [n]}}


def test_records_come_back_in_order_and_serve_as_a_corpus(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  from nr.data.tfds_records import export

  sources = {
    "train": write_records(tmp_path / "a", map(good, range(7)), SCHEMA),
    "test": write_records(tmp_path / "b", map(good, range(7, 9)), SCHEMA, format="jsonl"),
  }
  builder = export(sources, "toy", tmp_path / "tfds")
  found = builder.as_data_source(split="train")
  assert len(found) == 7 and "tensorflow" not in sys.modules
  for n in range(7):
    record = found[n]
    assert (record["text"].decode(), record["n"], record["ok"]) == (f"é {n}", n, n > 2)
    assert list(record["scores"]) == [0.5] * n
    assert json.loads(record["note"]) is None and json.loads(record["extra"]) == {"deep": [n]}

  corpus = {"name": "tfds:nr_records/toy", "data_dir": str(tmp_path / "tfds"), "source_split": "test"}
  assert [document.text for document in documents(corpus)] == ["é 7", "é 8"]
  with pytest.raises(DataError, match="cannot read split 'dev'"):
    documents({**corpus, "source_split": "dev"})
  with pytest.raises(DataError, match="record 0, field 'txt': is missing"):
    list(documents({**corpus, "text_field": "txt"}))
