"""Instructions from files of any layout: fields by their paths, faults by file, place and field."""

import gzip
import json

import pytest

from nr.data.bad_records import DataError
from nr.data.instructions import Instruction, InstructionFields, read_instructions

SEED_TASK = {
  "id": "t0",
  "instruction": "Sort the words.",
  "instances": [{"input": "b a", "output": "a b"}, {"input": "", "output": "none"}],
}
FIELDS = InstructionFields(input="instances.0.input", reference="instances.0.output")


def lines(path, records):
  text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in records)
  path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
  return path


def test_fields_are_found_by_their_paths(tmp_path):
  expected = [Instruction("t0", "Sort the words.\n\nb a", "a b")]
  for name in ("a.jsonl", "a.jsonl.gz"):
    assert read_instructions(lines(tmp_path / name, [SEED_TASK, ""]), FIELDS) == expected
  (tmp_path / "a.json").write_text(json.dumps([SEED_TASK]))
  assert read_instructions(tmp_path / "a.json", FIELDS) == expected
  second = InstructionFields(input="instances.1.input", reference="instances.2.output", id="")
  assert read_instructions(tmp_path / "a.json", second) == [Instruction("a:0", "Sort the words.", None)]
  assert read_instructions(tmp_path / "a.json") == [Instruction("t0", "Sort the words.")]


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  table = pyarrow.table({"ask": ["one", "two"], "meta": [{"answer": "1"}, {"answer": None}], "more": [1, 2]})
  parquet.write_table(table, tmp_path / "a.parquet")
  fields = InstructionFields(instruction="ask", reference="meta.answer")
  assert read_instructions(tmp_path / "a.parquet", fields) == [
    Instruction("a:0", "one", "1"),
    Instruction("a:1", "two", None),
  ]
  with pytest.raises(DataError, match="a.parquet, row 0, field 'instruction': is missing.*ask, meta, more"):
    read_instructions(tmp_path / "a.parquet")


@pytest.mark.parametrize(
  "record, problem",
  [
    ({"id": "b"}, r"a\.jsonl, line 2, field 'instruction': is missing or empty \(the record has id\)"),
    ({"id": "b", "instruction": "  "}, "line 2, field 'instruction'"),
    ({"id": "b", "instruction": ["x"]}, "line 2, field 'instruction': is a list, not text"),
    (
      {"id": "b", "instruction": "x", "instances": [{"output": 3}]},
      r"field 'instances\.0\.output': is a int",
    ),
    ({"id": "t0", "instruction": "x"}, "line 2, field 'id': 't0' stands on line 1 already"),
    ("[1]", "line 2: holds a list, not an object"),
    ("{", "line 2: is not valid JSON"),
  ],
)
def test_faults_are_named_and_can_be_set_aside(tmp_path, record, problem):
  path = lines(tmp_path / "a.jsonl", [SEED_TASK, record, {"id": "c", "instruction": "x"}])
  with pytest.raises(DataError, match=problem):
    read_instructions(path, FIELDS)
  aside = tmp_path / "bad.jsonl"
  kept = read_instructions(path, FIELDS, on_bad_record="quarantine", quarantine_path=aside)
  assert [each.id for each in kept] == ["t0", "c"] and len(aside.read_text().splitlines()) == 1


def test_files_that_hold_none(tmp_path):
  for name, content, problem in (
    ("a.jsonl", "", "holds no instruction"),
    ("a.json", "{}", "holds a dict; give a JSON list"),
    ("a.json", "[", "is not valid JSON"),
    ("a.txt", "text", "files of this kind hold no records"),
  ):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=problem):
      read_instructions(tmp_path / name)
  with pytest.raises(DataError, match="no such file"):
    read_instructions(tmp_path / "none.jsonl")
  with pytest.raises(ValueError, match="instruction=''"):
    InstructionFields(instruction="")
