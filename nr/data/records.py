"""Records on disk: directories of ArrayRecord shards (training) or JSON lines (humans).

    directory/
      records-00000-of-00002.arrayrecord    or .jsonl
      records-00001-of-00002.arrayrecord
      dataset.json    version, schema, count, provenance, size and sha256 of each shard

A record is a JSON object, in both formats: readable anywhere, and nothing is ever
unpickled. `RecordSource` reads at random, so it stands where Grain wants a source.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from nr.data.bad_records import DataError, Quarantine
from nr.data.dataset_files import HEADER, check_files, describe_file, header_text, new_folder, read_header
from nr.names import unknown

FORMAT = "nr.records"
VERSION = 1
SUFFIXES = {"array_record": ".arrayrecord", "jsonl": ".jsonl"}
Record = dict[str, Any]

_SCALARS = {"str": str, "int": int, "float": (int, float), "bool": bool, "object": object}
_TYPE = re.compile(r"(list\[)?(str|int|float|bool|object)(?(1)\])(\?)?")


def check_schema(schema: Mapping[str, str]) -> None:
  """Checks a schema: field -> type.

  Types are str, int, float, bool, object (any JSON), list[TYPE] of these, and
  any of them with "?" behind: the field may be null or missing.

  Raises:
    DataError: no fields, or an unknown type.
  """
  if not schema:
    raise DataError("schema has no field; give at least one, such as {'text': 'str'}")
  for field, kind in schema.items():
    if not isinstance(kind, str) or not _TYPE.fullmatch(kind):
      raise DataError(
        unknown(f"schema, type of field {field!r}", str(kind), _SCALARS) + ", list[TYPE], TYPE?"
      )


def problem_of(record: Any, schema: Mapping[str, str]) -> tuple[str | None, str] | None:
  """Returns (field, problem) of a record that breaks the schema, None for a good one."""
  if not isinstance(record, dict):
    return None, f"is a {type(record).__name__}, not an object"
  for field, kind in schema.items():
    element, is_list, is_optional = _parsed(kind)
    if record.get(field) is None:
      if is_optional:
        continue
      return field, "is null" if field in record else "is missing"
    value = record[field]
    if is_list and not isinstance(value, list):
      return field, f"is a {type(value).__name__}, the schema says {kind}"
    for item in value if is_list else [value]:
      if not isinstance(item, _SCALARS[element]) or (isinstance(item, bool) and element in ("int", "float")):
        return field, f"holds a {type(item).__name__}, the schema says {kind}"
  for field in record:
    if field not in schema:
      return str(field), f"is not in the schema ({', '.join(schema)})"
  return None


def _parsed(kind: str) -> tuple[str, bool, bool]:
  """Returns (element type, is a list, is optional)."""
  is_list, element, is_optional = _TYPE.fullmatch(kind).groups()
  return element, bool(is_list), bool(is_optional)


def write_records(
  directory: str | pathlib.Path,
  records: Iterable[Mapping[str, Any]],
  schema: Mapping[str, str],
  *,
  format: str = "array_record",
  records_per_shard: int = 100_000,
  provenance: Mapping[str, Any] | None = None,
  quarantine: Quarantine | None = None,
  overwrite: bool = False,
) -> "RecordSource":
  """Writes records into a directory, in bounded memory; finished or not there at all.

  Args:
    directory: must not exist unless `overwrite`.
    records: JSON objects; numbers must be finite.
    schema: field -> type, see `check_schema`.
    format: "array_record" or "jsonl".
    records_per_shard: records a file.
    provenance: where they come from, kept as JSON.
    quarantine: takes records that break the schema; None refuses the first.
    overwrite: replace a directory that exists.

  Returns:
    The source, opened.

  Raises:
    DataError: a bad schema or record, an unknown format, or a directory that exists.
  """
  check_schema(schema)
  directory, quarantine = pathlib.Path(directory), quarantine or Quarantine()
  if format not in SUFFIXES:
    raise DataError(unknown("format", format, SUFFIXES))
  with new_folder(directory, overwrite=overwrite) as partial:
    encoded = (_encoded(record, index, directory, schema, quarantine) for index, record in enumerate(records))
    counts = _write_shards(partial, (raw for raw in encoded if raw is not None), format, records_per_shard)
    quarantine.report(directory)
    header = {
      "format": FORMAT,
      "version": VERSION,
      "storage": format,
      "schema": dict(schema),
      "count": sum(counts.values()),
      "set_aside": quarantine.count,
      "provenance": dict(provenance or {}),
      "files": {name: {"records": count, **describe_file(partial / name)} for name, count in counts.items()},
    }
    (partial / HEADER).write_text(header_text(header), encoding="utf-8")
  return RecordSource(directory)


def _write_shards(
  folder: pathlib.Path, encoded: Iterable[bytes], format: str, records_per_shard: int
) -> dict[str, int]:
  """Writes records into numbered files; returns the number of records by file name."""
  counts: list[int] = []
  writer = None
  for raw in encoded:
    if writer is None or counts[-1] == records_per_shard:
      if writer:
        writer.close()
      writer = _open_writer(folder / f"{len(counts):05d}", format)
      counts.append(0)
    writer.write(raw)
    counts[-1] += 1
  if writer:
    writer.close()
  names = [f"records-{number:05d}-of-{len(counts):05d}{SUFFIXES[format]}" for number in range(len(counts))]
  for number, name in enumerate(names):
    os.rename(folder / f"{number:05d}", folder / name)  # only now is it known of how many
  return dict(zip(names, counts))


def _encoded(
  record: Any, index: int, directory: pathlib.Path, schema: Mapping[str, str], quarantine: Quarantine
) -> bytes | None:
  """Returns the JSON text of a good record, None for one that was set aside."""
  record = dict(record) if isinstance(record, Mapping) else record
  found = problem_of(record, schema)
  if found is None:
    try:
      return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:  # not JSON, not finite, or a lone surrogate
      found = None, f"cannot be written as JSON ({error})"
  quarantine.reject(
    f"records for {directory}", f"record {index}", *found, "correct the record or the schema", record
  )
  return None


class _LineWriter:
  """Writes JSON lines with the interface of an ArrayRecord writer."""

  def __init__(self, path: pathlib.Path):
    self._stream = open(path, "wb")

  def write(self, raw: bytes) -> None:
    self._stream.write(raw + b"\n")

  def close(self) -> None:
    self._stream.close()


def _open_writer(path: pathlib.Path, format: str) -> Any:
  if format == "jsonl":
    return _LineWriter(path)
  from array_record.python.array_record_module import ArrayRecordWriter

  # One record a group: training reads single records at random.
  return ArrayRecordWriter(str(path), "group_size:1")


class RecordSource:
  """Random access to a directory of records; a source for `grain.MapDataset.source`.

  Args:
    directory: written by `write_records`.
    on_bad_record: "raise", or "quarantine": a bad record is written to
      `quarantine_path`, counted once, and read as None (Grain passes over None).
    quarantine_path: JSON lines file for bad records.
    quarantine: use this one in place of the two settings above.
    verify_hash: also compare the sha256 of every shard.

  Attributes:
    header: content of dataset.json.
    schema: field -> type.
    quarantine: holds the count of records set aside so far.

  Raises:
    DataError: missing or damaged files, another version; on reading, a bad record
      by file, record and field.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    on_bad_record: str = "raise",
    quarantine_path: str | pathlib.Path | None = None,
    quarantine: Quarantine | None = None,
    verify_hash: bool = False,
  ):
    self.directory = pathlib.Path(directory)
    self.header = read_header(self.directory, FORMAT, VERSION)
    self.schema = self.header["schema"]
    check_schema(self.schema)
    check_files(self.directory, self.header["files"], verify_hash)
    self.quarantine = quarantine or Quarantine(on_bad_record, quarantine_path)
    self._set_aside: set[int] = set()
    self._names = list(self.header["files"])
    shards = self.header["files"].values()
    self._starts = np.cumsum([0, *(shard["records"] for shard in shards)])
    self._readers: dict[int, Any] = {}
    if self._starts[-1] != self.header["count"]:
      raise DataError(
        f"{self.directory / HEADER}, field 'count': is {self.header['count']}, "
        f"the shards hold {self._starts[-1]}"
      )

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getstate__(self) -> dict[str, Any]:
    """Leaves open files behind when a worker process gets a copy."""
    return {**self.__dict__, "_readers": {}}

  def __getitem__(self, index: int) -> Record | None:
    """Returns record `index`, or None for one that was set aside."""
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)} in {self.directory}")
    shard = int(np.searchsorted(self._starts, index, side="right")) - 1
    raw, field, problem = None, None, None
    try:
      raw = self._reader(shard).read_one(index - int(self._starts[shard]))
      record = json.loads(raw)
      found = problem_of(record, self.schema)
      if found is None:
        return record
      field, problem = found
    except (ValueError, RuntimeError) as error:  # JSON or UTF-8; ArrayRecord's own checks
      problem = f"cannot be read ({str(error).splitlines()[0]})"
    if index not in self._set_aside:
      file = self.directory / self._names[shard]
      unit = "line" if self.header["storage"] == "jsonl" else "record"
      where = f"{unit} {index - int(self._starts[shard]) + (unit == 'line')}"
      self.quarantine.reject(file, where, field, problem, "write the dataset again", raw)
      self._set_aside.add(index)
    return None

  def __iter__(self) -> Iterator[Record]:
    """Yields the good records in order, and logs how many were set aside."""
    for index in range(len(self)):
      record = self[index]
      if record is not None:
        yield record
    self.quarantine.report(self.directory)

  def _reader(self, shard: int) -> Any:
    """Returns the opened shard."""
    if shard not in self._readers:
      kind = _LineReader if self.header["storage"] == "jsonl" else _ArrayRecordReader
      self._readers[shard] = kind(self.directory / self._names[shard])
    return self._readers[shard]


class _ArrayRecordReader:
  """One ArrayRecord shard."""

  def __init__(self, path: pathlib.Path):
    from array_record.python.array_record_module import ArrayRecordReader

    self._reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")

  def read_one(self, index: int) -> bytes:
    """Returns one record. Raises ValueError where the file is damaged."""
    try:
      found = self._reader.read([index])
    except Exception as error:  # the library raises its own kinds
      raise ValueError(str(error) or type(error).__name__) from error
    if len(found) != 1:
      raise ValueError("the shard holds no such record")
    return found[0]


class _LineReader:
  """One JSON lines shard, with the place of every line."""

  def __init__(self, path: pathlib.Path):
    self._path, self._places = path, [0]
    with open(path, "rb") as stream:
      for line in stream:
        self._places.append(self._places[-1] + len(line))

  def read_one(self, index: int) -> bytes:
    """Returns one line. Raises ValueError where there are fewer."""
    if index + 1 >= len(self._places):
      raise ValueError("the shard holds no such line")
    with open(self._path, "rb") as stream:
      stream.seek(self._places[index])
      return stream.read(self._places[index + 1] - self._places[index])
