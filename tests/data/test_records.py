"""Record directories: both formats, damage, and Grain."""

import copy
import json

import grain
import pytest

from nr.data.bad_records import DataError, Quarantine
from nr.data.records import RecordSource, check_schema, write_records

SCHEMA = {
  "text": "str",
  "n": "int",
  "scores": "list[float]",
  "note": "str?",
  "extra": "object?",
  "ok": "bool",
}
FORMATS = ("array_record", "jsonl")


def good(n):
  return {"text": f"é\n{n}", "n": n, "scores": [0.5, 1], "ok": True, "extra": {"deep": [None]}}


@pytest.fixture(params=FORMATS)
def format(request):
  return request.param


def write(path, format, count=10):
  return write_records(
    path, map(good, range(count)), SCHEMA, format=format, records_per_shard=4, provenance={"by": "us"}
  )


def test_round_trip_in_shards(tmp_path, format):
  source = write(tmp_path / "r", format)
  assert len(source) == 10 and list(source) == [good(n) for n in range(10)]
  assert source[7] == good(7) and source.header["provenance"] == {"by": "us"} and source.schema == SCHEMA
  assert [shard["records"] for shard in source.header["files"].values()] == [4, 4, 2]
  with pytest.raises(IndexError, match="record 10 of 10"):
    source[10]
  RecordSource(tmp_path / "r", verify_hash=True)
  assert not list(tmp_path.glob("*.partial"))
  with pytest.raises(DataError, match="exists"):
    write(tmp_path / "r", format)


def test_is_a_grain_source_that_resumes(tmp_path, format):
  source = write(tmp_path / "r", format)
  data = grain.MapDataset.source(source).seed(1).shuffle().to_iter_dataset(grain.ReadOptions(0, 0))
  iterator = iter(data)
  first = [next(iterator)["n"] for _ in range(4)]
  state = iterator.get_state()
  rest = [record["n"] for record in iterator]
  again = iter(data)
  again.set_state(state)
  assert [record["n"] for record in again] == rest and sorted(first + rest) == list(range(10))


def test_open_files_do_not_travel(tmp_path, format):
  source = write(tmp_path / "r", format)
  assert source[3] == good(3)
  assert copy.deepcopy(source)[3] == good(3), "copied as it is for Grain's workers"


@pytest.mark.parametrize(
  "record, field, message",
  [
    ({**good(1), "n": "1"}, "n", "holds a str, the schema says int"),
    ({**good(1), "n": True}, "n", "holds a bool, the schema says int"),
    ({**good(1), "scores": 1.0}, "scores", "is a float, the schema says list"),
    ({**good(1), "scores": ["x"]}, "scores", "holds a str"),
    ({**good(1), "text": None}, "text", "is null"),
    ({k: v for k, v in good(1).items() if k != "text"}, "text", "is missing"),
    ({**good(1), "txt": ""}, "txt", "is not in the schema"),
    ({**good(1), "scores": [float("nan")]}, None, "cannot be written as JSON"),
    ({**good(1), "text": "\ud800"}, None, "cannot be written as JSON"),
    ([1], None, "is a list, not an object"),
  ],
)
def test_bad_records_are_not_written(tmp_path, record, field, message):
  pattern = "record 1" + (f", field '{field}'" if field else "") + ": .*" + message
  with pytest.raises(DataError, match=pattern):
    write_records(tmp_path / "r", [good(0), record], SCHEMA)
  quarantine = Quarantine("quarantine", tmp_path / "aside.jsonl")
  source = write_records(tmp_path / "s", [good(0), record, good(2)], SCHEMA, quarantine=quarantine)
  assert len(source) == 2 and source.header["set_aside"] == quarantine.count == 1
  assert json.loads((tmp_path / "aside.jsonl").read_text())["field"] == field


def damage_line(path, line, content):
  """Replaces a line by another of the same length."""
  lines = path.read_bytes().split(b"\n")
  lines[line - 1] = content.ljust(len(lines[line - 1]))
  path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
  "content, message",
  [
    (b"{", "cannot be read"),
    (b"\xff", "cannot be read"),
    (b'{"text": "a"}', "field 'n': is missing"),
    (b"[]", "is a list"),
  ],
)
def test_bad_lines_are_named_or_set_aside(tmp_path, content, message):
  write(tmp_path / "r", "jsonl")
  damage_line(tmp_path / "r" / "records-00001-of-00003.jsonl", 2, content)
  with pytest.raises(DataError, match="records-00001-of-00003.jsonl, line 2.*" + message):
    list(RecordSource(tmp_path / "r"))
  aside = tmp_path / "aside.jsonl"
  source = RecordSource(tmp_path / "r", on_bad_record="quarantine", quarantine_path=aside)
  for _ in range(2):  # counted once
    assert [record["n"] for record in source] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
  assert source.quarantine.count == 1 and len(aside.read_text().splitlines()) == 1
  data = grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(0, 0))
  assert len(list(data)) == 9, "Grain passes over what was set aside"
  with pytest.raises(DataError, match="sha256"):
    RecordSource(tmp_path / "r", verify_hash=True)


def test_damaged_array_record_is_named(tmp_path):
  write(tmp_path / "r", "array_record")
  path = tmp_path / "r" / "records-00000-of-00003.arrayrecord"
  raw = bytearray(path.read_bytes())
  place = next(i for i in range(len(raw) // 2, len(raw)) if raw[i])
  raw[place + 50] ^= 0xFF
  path.write_bytes(bytes(raw))
  with pytest.raises(DataError, match="records-00000-of-00003.arrayrecord, record 0: cannot be read"):
    list(RecordSource(tmp_path / "r"))
  path.write_bytes(bytes(raw[:-1]))
  with pytest.raises(DataError, match="dataset.json records"):
    RecordSource(tmp_path / "r")


def test_schemas_and_formats_are_checked(tmp_path):
  check_schema({"a": "list[object]?"})
  with pytest.raises(DataError, match="type of field 'a'='string'.*did you mean 'str'"):
    check_schema({"a": "string"})
  with pytest.raises(DataError, match="no field"):
    check_schema({})
  with pytest.raises(DataError, match="did you mean 'array_record'"):
    write_records(tmp_path / "r", [], SCHEMA, format="arrayrecord")
  assert len(write_records(tmp_path / "r", [], SCHEMA)) == 0
