"""Samples on disk, one JSON line each, appended as they come: what a killed run need not ask for again."""

import dataclasses
import json
import pathlib
import threading
from collections.abc import Iterable

from absl import logging

from nr.data.bad_records import DataError
from nr.generators.protocol import Request, Sample, request_hash, sample_from_json, to_json


class SampleCache:
  """Samples by (hash of the request, index).

  The hash covers everything that decides the answer except how many samples are
  wanted, so that asking for more asks only for those that are missing. A line is
  written whole and flushed to the system before its sample is handed on. One
  process writes at a time.

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
    self._stream = open(self.path, "a+b")
    try:
      _hold(self._stream, self.path)
      self._found = self._read()
    except BaseException:
      self._stream.close()
      raise

  def _read(self) -> dict[tuple[str, int], Sample]:
    found: dict[tuple[str, int], Sample] = {}
    self._stream.seek(0)
    good = 0
    for number, line in enumerate(self._stream, start=1):
      try:
        if not line.endswith(b"\n"):
          raise ValueError("it is cut off")
        entry = json.loads(line)
        sample = sample_from_json(entry["sample"])
        found.setdefault((entry["key"], sample.index), sample)
      except (ValueError, KeyError, TypeError) as error:
        if line.endswith(b"\n"):
          raise DataError(
            f"{self.path}, line {number}: no sample ({error}); remove the line, its sample will be asked for again"
          ) from error
        logging.warning(
          "%s, line %d: cut off by a kill, dropped; its sample is asked for again", self.path, number
        )
        break
      good += len(line)
    self._stream.truncate(good)
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
      lines = [json.dumps({"key": key, "sample": to_json(each)}) + "\n" for each in new]
      self._stream.write("".join(lines).encode("ascii"))
      self._stream.flush()
      self._found |= {(key, each.index): each for each in new}

  def close(self) -> None:
    """Closes the file, for another process to write."""
    self._stream.close()


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
