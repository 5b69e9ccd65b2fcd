"""JSON lines with a schema: read with every bad line named, written whole or appended line by line."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from nr.data.bad_records import DataError, Quarantine
from nr.data.records import problem_of
from nr.files import replace_text

Problem = tuple[str | None, str] | None


def read_json_lines(
  path: str | pathlib.Path,
  schema: Mapping[str, str],
  quarantine: Quarantine,
  check: Callable[[dict[str, Any]], Problem] = lambda record: None,
  *,
  may_end_in_half_a_line: bool = False,
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number from 1, record) of every good line; blank lines are passed over.

  Args:
    path: UTF-8 file, one JSON object a line.
    schema: field -> type, see `nr.data.records.check_schema`.
    quarantine: takes the bad lines.
    check: record that keeps to the schema -> (field, problem), or None if it is good.
    may_end_in_half_a_line: the file is appended to, and a kill may have cut its last
      line: that one is left out with a warning that names it.

  Raises:
    DataError: no such file, or a bad line under the policy "raise".
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise DataError(f"{path}: no such file; give a JSON lines file")
  with open(path, "rb") as stream:
    for number, raw in enumerate(stream, start=1):
      if not raw.strip():
        continue
      try:
        record = json.loads(raw)
      except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if may_end_in_half_a_line and not raw.endswith(b"\n"):
          logging.warning(
            "%s, line %d: was cut off (%d bytes without an end); left out", path, number, len(raw)
          )
          return
        problem = None, f"is not valid JSON in UTF-8 ({error})"
      else:
        problem = problem_of(record, schema) or check(record)
      if problem is None:
        yield number, record
      else:
        quarantine.reject(path, f"line {number}", *problem, "correct the record", raw)
  quarantine.report(path)


def json_line(record: Mapping[str, Any], what: str, *, is_ascii: bool = False) -> str:
  """Returns a record as one line of JSON with its end.

  Args:
    record: JSON values; numbers must be finite.
    what: names the record in the error.
    is_ascii: escape all that is not ASCII; lone surrogates can then be written, and read back.

  Raises:
    DataError: it cannot be written as JSON.
  """
  try:
    line = json.dumps(record, ensure_ascii=is_ascii, allow_nan=False) + "\n"
    line.encode("utf-8")
  except (TypeError, ValueError) as error:  # not JSON, not finite, or a lone surrogate
    raise DataError(f"{what} cannot be written as JSON ({error}); correct the record") from error
  return line


def write_json_lines(path: str | pathlib.Path, lines: Iterable[str]) -> None:
  """Writes a file of lines made by `json_line`; a reader sees the old content or the new."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  replace_text(path, "".join(lines))


class LineAppender:
  """Appends lines to a file, each on disk before the next; one writer a file.

  A last line that a kill cut in half is taken off when the file is opened again,
  with a warning that names it: its content was never reported as written.

  Args:
    path: the file; made when missing.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    self._mend()

  def _mend(self) -> None:
    """Ends or removes an unfinished last line."""
    content = self.path.read_bytes()
    half = content[content.rfind(b"\n") + 1 :]
    if not half:
      return
    try:
      is_whole = isinstance(json.loads(half), dict)
    except ValueError:
      is_whole = False
    if is_whole:  # an object is only complete with its last brace: nothing but the line end is missing
      os.write(self._file, b"\n")
      return
    number = content.count(b"\n") + 1
    logging.warning(
      "%s, line %d: was cut off (%d bytes without an end); removed", self.path, number, len(half)
    )
    os.ftruncate(self._file, len(content) - len(half))
    os.fsync(self._file)

  def append(self, line: str) -> None:
    """Writes one line, made by `json_line`, through to the disk."""
    rest = memoryview(line.encode("utf-8"))
    while rest:
      rest = rest[os.write(self._file, rest) :]
    os.fsync(self._file)

  def close(self) -> None:
    """Closes the file."""
    if self._file >= 0:
      os.close(self._file)
    self._file = -1
