"""The cache of a teacher's activations on a corpus, on disk, read in any order through memory maps.

    directory/
      activations-00000.npy   [windows, length, model_dim], one shard of windows in order; then -00001, ...
      dataset.json            what the activations were made from and with; size and hash of every shard

They are the largest thing a run can write: tokens x model_dim x 4 bytes (float32). In return the teacher
runs over the corpus once, however many epochs and autoencoders read it. Every position is stored, so
leaving out position 0 is up to the reader. The header names all that activations depend on, and a cache
that differs in any of it is refused. Until `progress.json` gives way to `dataset.json` the cache is
unfinished; a stopped writer goes on after its last whole shard.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from nr.data.bad_records import DataError
from nr.data.dataset_files import HEADER, check_files, describe_file, header_text, read_header
from nr.files import replace_text
from nr.names import unknown

FORMAT = "nr.activations"
VERSION = 1
PROGRESS = "progress.json"
DTYPES = ("float32", "float16")
_SHARD_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class ActivationHeader:
  """Everything that activations depend on, and their sizes.

  Attributes:
    teacher: hash of the teacher's parameters.
    tokenizer: fingerprint of the tokenizer.
    dataset: fingerprint of the token dataset.
    layer: the block (from 0) whose output is tapped.
    window: tokens of a window.
    reset_at_documents: whether the teacher's attention stayed within documents.
    num_windows: windows of the corpus.
    model_dim: width of the teacher.
    dtype: "float32", exact; "float16" takes half the space and rounds.
  """

  teacher: str
  tokenizer: str
  dataset: str
  layer: int
  window: int
  reset_at_documents: bool
  num_windows: int
  model_dim: int
  dtype: str = "float32"

  def __post_init__(self):
    if self.dtype not in DTYPES:
      raise DataError(unknown("activation cache dtype", self.dtype, DTYPES))
    if self.num_windows < 1:
      raise DataError(f"num_windows={self.num_windows}: the corpus has no window; give more text")

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON values."""
    return dataclasses.asdict(self)

  @property
  def bytes(self) -> int:
    """Size of all activations on disk."""
    return self.num_windows * self._window_bytes

  @property
  def shard_windows(self) -> int:
    """Windows of a shard, the last one excepted."""
    return max(1, _SHARD_BYTES // self._window_bytes)

  @property
  def _window_bytes(self) -> int:
    return self.window * self.model_dim * np.dtype(self.dtype).itemsize


class ActivationWriter:
  """Writes a cache window by window; a partial one with the same header is continued.

  Args:
    directory: where the cache goes.
    header: what the activations depend on.

  Raises:
    DataError: a cache there, finished or not, that was made with something else.
  """

  def __init__(self, directory: str | pathlib.Path, header: ActivationHeader):
    self.directory, self.header = pathlib.Path(directory), header
    self.directory.mkdir(parents=True, exist_ok=True)
    self._files: dict[str, dict[str, Any]] = {}
    self._pending: list[np.ndarray] = []
    path = self.directory / PROGRESS
    if path.is_file():
      progress = json.loads(path.read_text(encoding="utf-8"))
      _check_header(path, progress["header"], header)
      self._files = progress["files"]
      check_files(self.directory, self._files, verify_hash=False)
    else:
      if (self.directory / HEADER).is_file():
        raise DataError(f"{self.directory} holds a finished dataset; remove it or name another folder")
      self._save()

  @property
  def windows_done(self) -> int:
    """Number of windows that would survive a kill, or wait for the rest of their shard."""
    return self._windows_saved + sum(len(piece) for piece in self._pending)

  def remaining(self, count: int) -> Iterator[range]:
    """Yields the windows still to be written, in order, at most `count` at a time and never across shards."""
    while (begin := self.windows_done) < self.header.num_windows:
      stop = (begin // self.header.shard_windows + 1) * self.header.shard_windows
      yield range(begin, min(begin + count, stop, self.header.num_windows))

  def write(self, activations_BLD: np.ndarray) -> None:
    """Writes the activations of the next windows, those that `remaining` named last.

    Raises:
      DataError: a wrong shape, numbers that the stored type cannot hold, or no room on the disk.
    """
    header = self.header
    if activations_BLD.shape[1:] != (header.window, header.model_dim):
      raise DataError(
        f"{self.directory}: activations of shape {activations_BLD.shape} do not fit windows of "
        f"{header.window} tokens and a width of {header.model_dim}"
      )
    with np.errstate(over="ignore"):
      stored_BLD = np.asarray(activations_BLD, header.dtype)
    if not np.isfinite(stored_BLD).all():
      raise DataError(
        f"{self.directory}: an activation between windows {self.windows_done} and "
        f"{self.windows_done + len(stored_BLD) - 1} is not finite in {header.dtype}; use float32 or look at the teacher"
      )
    self._pending.append(stored_BLD)
    full = self._windows_saved + header.shard_windows
    if self.windows_done >= min(full, header.num_windows):
      self._write_shard()

  def finish(self) -> "ActivationCache":
    """Seals the cache.

    Raises:
      DataError: windows are missing.
    """
    missing = self.header.num_windows - self.windows_done
    if missing or self._pending:
      raise DataError(f"{self.directory}: {missing} of {self.header.num_windows} windows are not written yet")
    header = {"format": FORMAT, "version": VERSION, **self.header.to_dict(), "files": self._files}
    replace_text(self.directory / HEADER, header_text(header))
    (self.directory / PROGRESS).unlink()
    return ActivationCache.open(self.directory, self.header)

  @property
  def _windows_saved(self) -> int:
    return min(len(self._files) * self.header.shard_windows, self.header.num_windows)

  def _write_shard(self) -> None:
    path = self.directory / f"activations-{len(self._files):05d}.npy"
    partial = path.with_name(path.name + ".partial")
    try:
      with open(partial, "wb") as stream:
        np.save(stream, np.concatenate(self._pending), allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    except OSError as error:
      partial.unlink(missing_ok=True)
      raise DataError(
        f"{path}: could not be written ({error.strerror}); all activations take {self.header.bytes} bytes, "
        "free space, name another folder, or do without the cache"
      ) from error
    os.replace(partial, path)
    self._files[path.name] = describe_file(path)
    self._pending = []
    self._save()

  def _save(self) -> None:
    progress = {"header": self.header.to_dict(), "files": self._files}
    replace_text(self.directory / PROGRESS, json.dumps(progress) + "\n")


class ActivationCache:
  """A finished cache; make it with `open`.

  Attributes:
    directory: where it is.
    header: what it was made from and with.
  """

  def __init__(self, directory: pathlib.Path, header: ActivationHeader, files: list[str]):
    self.directory, self.header = directory, header
    self._shards = [np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in files]

  @classmethod
  def is_there(cls, directory: str | pathlib.Path) -> bool:
    """Says whether a finished cache lies in a directory."""
    directory = pathlib.Path(directory)
    return (directory / HEADER).is_file() and not (directory / PROGRESS).is_file()

  @classmethod
  def open(
    cls, directory: str | pathlib.Path, expected: ActivationHeader, *, verify_hash: bool = False
  ) -> "ActivationCache":
    """Opens a cache after checking it.

    Args:
      directory: written by `ActivationWriter`.
      expected: the header in use.
      verify_hash: also read every shard and compare its sha256.

    Raises:
      DataError: unfinished, missing or damaged files, another version, or a field that differs from what
        is expected (named with both values).
    """
    directory = pathlib.Path(directory)
    if (directory / PROGRESS).is_file():
      raise DataError(f"{directory} is not finished; run the stage that writes the activations to its end")
    header = read_header(directory, FORMAT, VERSION)
    _check_header(directory / HEADER, header, expected)
    check_files(directory, header["files"], verify_hash)
    return cls(directory, expected, sorted(header["files"]))

  def read(self, windows: np.ndarray) -> np.ndarray:
    """Returns the activations [windows, length, model_dim] of windows by index, float32."""
    shards, places = np.divmod(np.asarray(windows), self.header.shard_windows)
    rows = [self._shards[shard][place] for shard, place in zip(shards, places)]
    return np.stack(rows).astype(np.float32, copy=False)


def _check_header(path: pathlib.Path, found: dict[str, Any], wanted: ActivationHeader) -> None:
  """Raises DataError at the first field that differs, naming it and both values."""
  for name, value in wanted.to_dict().items():
    if found.get(name) != value:
      raise DataError(
        f"{path}, field {name!r}: the activations were made with {found.get(name)!r}, expected {value!r}; "
        "name another folder or remove this one"
      )
