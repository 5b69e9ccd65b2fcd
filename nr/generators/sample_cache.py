"""Samples on disk, one JSON line each, appended as they come: what a killed run need not ask for again."""

import dataclasses
import pathlib
import threading
from collections.abc import Iterable

from nr.data.bad_records import DataError, Quarantine
from nr.data.json_lines import LineAppender, json_line, read_json_lines
from nr.generators.protocol import Request, Sample, request_hash, sample_from_json, to_json

_SCHEMA = {"key": "str", "sample": "object"}


class SampleCache:
  """Samples by (hash of the request, index).

  The hash covers everything that decides the answer except how many samples are
  wanted, so that asking for more asks only for those that are missing. A line is on
  disk before its sample is handed on. One process writes at a time.

  Args:
    path: JSON lines file, made where there is none.
    source: what answers: model, address, settings; part of every hash.

  Raises:
    DataError: a damaged line that is not the last (named by file and line), or another
      process that writes the file. A last line that a kill cut off is dropped, with a warning.
  """

  def __init__(self, path: str | pathlib.Path, source: str):
    self.path, self.source = pathlib.Path(path), source
    self._lock = threading.Lock()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._held = open(self.path, "ab")
    try:
      _hold(self._held, self.path)
      self._appender = LineAppender(self.path)
      self._found = self._read()
    except BaseException:
      self.close()
      raise

  def _read(self) -> dict[tuple[str, int], Sample]:
    found: dict[tuple[str, int], Sample] = {}

    def check(entry: dict) -> tuple[str, str] | None:
      try:
        sample = sample_from_json(entry["sample"])
      except (ValueError, TypeError) as error:
        return "sample", str(error)
      found.setdefault((entry["key"], sample.index), sample)
      return None

    for _ in read_json_lines(self.path, _SCHEMA, Quarantine(), check):
      pass
    return found

  def __len__(self) -> int:
    return len(self._found)

  def _key(self, request: Request) -> str:
    return request_hash(dataclasses.replace(request, num_samples=1), self.source)

  def get(self, request: Request) -> dict[int, Sample]:
    """Returns what is known of a request, by index."""
    key = self._key(request)
    known = {index: self._found.get((key, index)) for index in range(request.num_samples)}
    return {index: sample for index, sample in known.items() if sample is not None}

  def put(self, request: Request, samples: Iterable[Sample]) -> None:
    """Appends samples that are new; those that failed are left out, so that they are asked for again."""
    key = self._key(request)
    with self._lock:
      new = [each for each in samples if each.error is None and (key, each.index) not in self._found]
      if not new:
        return
      lines = [
        json_line({"key": key, "sample": to_json(each)}, f"sample of {each.request_id!r}", is_ascii=True)
        for each in new
      ]
      self._appender.append("".join(lines))
      self._found |= {(key, each.index): each for each in new}

  def close(self) -> None:
    """Closes the file, for another process to write."""
    if hasattr(self, "_appender"):
      self._appender.close()
    self._held.close()


def _hold(stream, path: pathlib.Path) -> None:
  """Locks the file against other processes, where the system knows how."""
  try:
    import fcntl
  except ImportError:  # not POSIX
    return
  try:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    raise DataError(
      f"{path} is being written by another process; wait for it or name another file"
    ) from error
