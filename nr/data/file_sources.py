"""Documents from files: text, JSON lines, Parquet, folders of these, and record directories."""

import gzip
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

from absl import logging

from nr.data.bad_records import DataError, Quarantine
from nr.data.dataset_files import HEADER
from nr.data.sources import CorpusSpec, Document

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


def path_documents(path: pathlib.Path, spec: CorpusSpec, quarantine: Quarantine) -> Iterator[Document]:
  """Yields the documents of a file or a folder, chosen by suffix.

  Raises:
    DataError: a file of another kind, or a folder without a readable file.
  """
  if path.is_dir():
    if (path / HEADER).exists():
      return record_directory(path, spec, quarantine)
    return _folder(path, spec, quarantine)
  return _reader(path)(path, path.name[: -len(_suffix(path))], spec, quarantine)


def _suffix(path: pathlib.Path) -> str:
  """Returns the known suffix of a file, "" when it has none."""
  return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), "")


def _reader(path: pathlib.Path) -> Callable[..., Iterator[Document]]:
  """Returns the function that reads files of this suffix."""
  suffix = _suffix(path)
  if not suffix:
    raise DataError(
      f"corpus.name={str(path)!r}: files of this kind are not read; "
      f"give one of {', '.join(SUFFIXES)}, a folder of these, or a record directory"
    )
  if suffix.startswith(".txt"):
    return lambda path, stem, spec, quarantine: text_file(path, stem, spec.text_unit, quarantine)
  return parquet_file if suffix == ".parquet" else json_lines_file


def _folder(folder: pathlib.Path, spec: CorpusSpec, quarantine: Quarantine) -> Iterator[Document]:
  """Yields the documents of every readable file below a folder, in order of path."""
  files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
  readable = [path for path in files if _suffix(path)]
  if not readable:
    raise DataError(
      f"corpus.name={str(folder)!r} has no file that ends in {', '.join(SUFFIXES)}; "
      "put text there or name another folder"
    )
  if len(readable) < len(files):
    logging.warning("%s: %d files of other kinds are not read", folder, len(files) - len(readable))

  def read() -> Iterator[Document]:
    for path in readable:
      stem = path.relative_to(folder).as_posix()[: -len(_suffix(path))]
      yield from _reader(path)(path, stem, spec, quarantine)

  return read()


def _open_binary(path: pathlib.Path) -> IO[bytes]:
  return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  """Yields the lines of a file, names the file when its compression is broken."""
  try:
    with _open_binary(path) as stream:
      yield from stream
  except (gzip.BadGzipFile, EOFError) as error:
    raise DataError(f"{path} is not a whole gzip file ({error}); write it again") from error


def text_file(path: pathlib.Path, stem: str, unit: str, quarantine: Quarantine) -> Iterator[Document]:
  """Yields a .txt file as one document, or as one a block between blank lines.

  Args:
    path: a UTF-8 file, possibly .gz. A byte order mark is dropped.
    stem: id of the document; blocks get stem:LINE, the line they begin at (from 1).
    unit: "file" or "blank_line".
    quarantine: takes text that is not UTF-8, and files without text.
  """
  block, first_line, number = [], 1, 0
  for number, line in enumerate(_lines(path), start=1):
    if number == 1:
      line = line.removeprefix(b"\xef\xbb\xbf")
    if unit == "blank_line" and not line.strip():
      yield from _text_block(path, block, first_line, f"{stem}:{first_line}", quarantine)
      block = []
      continue
    if not block:
      first_line = number
    block.append(line)
  if unit == "blank_line":
    yield from _text_block(path, block, first_line, f"{stem}:{first_line}", quarantine)
  elif not b"".join(block).strip():
    quarantine.reject(path, "line 1", None, "the file has no text", "remove it or put text in it", b"")
  else:
    yield from _text_block(path, block, 1, stem, quarantine)


def _text_block(path: pathlib.Path, lines: list[bytes], first_line: int, id: str, quarantine: Quarantine):
  """Yields the document of these lines, if they hold any text and are UTF-8."""
  raw = b"".join(lines)
  if not raw.strip():
    return
  try:
    yield Document(id, raw.decode("utf-8"))
  except UnicodeDecodeError as error:
    line = first_line + raw.count(b"\n", 0, error.start)
    problem = f"byte 0x{raw[error.start]:02x} is not UTF-8"
    quarantine.reject(path, f"line {line}", None, problem, "convert the file to UTF-8", raw)


class FileRecord(NamedTuple):
  """A record of a file.

  Attributes:
    where: its place, such as "line 12".
    id: names it where it names itself by no field.
    fields: its content.
  """

  where: str
  id: str
  fields: Mapping[str, Any]


def json_records(path: pathlib.Path, stem: str, quarantine: Quarantine) -> Iterator[FileRecord]:
  """Yields the objects of a .jsonl file (possibly .gz), one a line; blank lines are passed over."""
  for number, raw in enumerate(_lines(path), start=1):
    if not raw.strip():
      continue
    where = f"line {number}"
    try:
      record = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      problem = f"is not valid JSON in UTF-8 ({error})"
      quarantine.reject(path, where, None, problem, "write one JSON object a line", raw)
      continue
    if not isinstance(record, dict):
      problem = f"holds a {type(record).__name__}, not an object"
      quarantine.reject(path, where, None, problem, "write one JSON object a line", raw)
      continue
    yield FileRecord(where, f"{stem}:{number}", record)


def json_lines_file(
  path: pathlib.Path, stem: str, spec: CorpusSpec, quarantine: Quarantine
) -> Iterator[Document]:
  """Yields one document a line of a .jsonl file (possibly .gz)."""
  for where, id, fields in json_records(path, stem, quarantine):
    yield from field_document(fields, path, where, id, spec, quarantine)


def field_document(
  record: Mapping[str, Any], file: Any, where: str, default_id: str, spec: CorpusSpec, quarantine: Quarantine
) -> Iterator[Document]:
  """Yields the document of a record's text field, or nothing when the record is bad.

  Text may be str or UTF-8 bytes (tensorflow-datasets gives bytes).
  """
  if spec.text_field not in record:
    has = ", ".join(map(str, record)) or "none"
    problem = f"is missing (the record has {has})"
    remedy = "set corpus.text_field to the field that holds the text"
    quarantine.reject(file, where, spec.text_field, problem, remedy, dict(record))
    return
  text = record[spec.text_field]
  problem = None
  try:
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    if not isinstance(text, str):
      problem = f"is a {type(text).__name__}, not text"
    elif not text.strip():
      problem = "is empty"
    else:
      text.encode("utf-8")
  except UnicodeError as error:
    problem = f"is not UTF-8 ({error.reason})"
  if problem:
    quarantine.reject(file, where, spec.text_field, problem, "correct the record", dict(record))
    return
  id = record.get(spec.id_field)
  id = id.decode("utf-8", "replace") if isinstance(id, bytes) else id
  yield Document(default_id if id is None else str(id), text)


def parquet_records(
  path: pathlib.Path, stem: str, columns: Sequence[str], required: str, setting: str
) -> Iterator[FileRecord]:
  """Yields the rows of a Parquet file, read in pieces; needs pyarrow.

  Args:
    path: the file.
    stem: in front of the rows' numbers in their ids.
    columns: what is read of it; those that are not there are passed over.
    required: the column that must be there.
    setting: the config field that names it, for the error.

  Raises:
    DataError: pyarrow is missing, the file is damaged, or the column is missing.
  """
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'nr[text]'") from error
  try:
    table = pyarrow.parquet.ParquetFile(path)
  except (pyarrow.ArrowException, OSError) as error:
    raise DataError(f"{path} is not a readable Parquet file ({error}); write it again") from error
  names = table.schema_arrow.names
  if required not in names:
    raise DataError(
      f"{path}, row 0, field {required!r}: is missing (the file has {', '.join(names)}); "
      f"set {setting} to the column that holds the text"
    )
  number = 0
  for batch in table.iter_batches(
    batch_size=256, columns=[name for name in dict.fromkeys(columns) if name in names]
  ):
    for record in batch.to_pylist():
      yield FileRecord(f"row {number}", f"{stem}:{number}", record)
      number += 1


def parquet_file(
  path: pathlib.Path, stem: str, spec: CorpusSpec, quarantine: Quarantine
) -> Iterator[Document]:
  """Yields one document a row of a Parquet file; errors as in `parquet_records`."""
  columns = spec.text_field, spec.id_field
  for where, id, fields in parquet_records(path, stem, columns, spec.text_field, "corpus.text_field"):
    yield from field_document(fields, path, where, id, spec, quarantine)


def record_directory(directory: pathlib.Path, spec: CorpusSpec, quarantine: Quarantine) -> Iterator[Document]:
  """Yields one document a record of a directory written by `nr.data.records`."""
  from nr.data.records import RecordSource

  source = RecordSource(directory, quarantine=quarantine)
  for index in range(len(source)):
    record = source[index]
    if record is not None:
      default_id = f"{directory.name}:{index}"
      yield from field_document(record, directory, f"record {index}", default_id, spec, quarantine)
