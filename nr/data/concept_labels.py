"""The cache of concept labels: a few latents for every token of a corpus, on disk.

    directory/
      labels.npy      [num_tokens, labels_per_token] uint16, aligned with the token stream, 65535 = none
      weights.npy     float16, as many: weights of the labels; only where the attribution asks for them
      dataset.json    what the labels were made from and with, what was counted, hashes of the files

Teacher and autoencoder are frozen, so labels depend on the window only and are computed once. The
header names everything they depend on, and a cache that differs in any of it is refused. While it is
being written, `progress.json` stands in place of `dataset.json`; a stopped run goes on from there.

One cache serves any number of epochs. Labels belong to tokens: where training shifts its windows from
epoch to epoch (`nr.data.windows.shuffled_batches`, `shift`), labels move with their tokens and stay what
the teacher made of its own, fixed windows. With a stride of half the window, a window's second half is
kept: every token but those of the stream's first window then has at least window / 2 - 1 tokens of
context, and none but the stream's last goes without labels for being the last of a window. Labels of
the very windows that a student sees, however shifted, are made in the train step instead
(`targets.source="online"`).
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from nr.data.bad_records import DataError
from nr.data.dataset_files import HEADER, check_files, describe_file, header_text, read_header
from nr.files import replace_text
from nr.labels import MAX_CONCEPTS, NO_LABEL

FORMAT = "nr.concept_labels"
VERSION = 1
LABELS = "labels.npy"
WEIGHTS = "weights.npy"
PROGRESS = "progress.json"
_SECONDS_BETWEEN_SAVES = 10.0


@dataclasses.dataclass(frozen=True)
class LabelHeader:
  """Everything that labels depend on.

  Attributes:
    teacher: hash of the teacher's parameters.
    autoencoder: hash of the sparse autoencoder's parameters.
    tokenizer: fingerprint of the tokenizer.
    dataset: fingerprint of the token dataset.
    layer: the block (from 0) whose output is tapped.
    attribution: settings of the attribution variant.
    window: tokens of context the teacher sees at once.
    stride: tokens between the beginnings of windows, at most `window`.
    num_concepts: latents of the autoencoder; label values lie below it.
    num_tokens: length of the stream.
    labels_per_token: labels a token.
    reset_at_documents: whether the teacher's attention stayed within documents.
  """

  teacher: str
  autoencoder: str
  tokenizer: str
  dataset: str
  layer: int
  attribution: Mapping[str, Any]
  window: int
  stride: int
  num_concepts: int
  num_tokens: int
  labels_per_token: int = 4
  reset_at_documents: bool = False

  def __post_init__(self):
    if self.num_concepts > MAX_CONCEPTS:
      raise DataError(
        f"num_concepts={self.num_concepts} does not fit the cache's uint16 labels; "
        f"use at most {MAX_CONCEPTS} latents"
      )
    if not 2 <= self.window <= self.num_tokens:
      raise DataError(
        f"window={self.window} must lie between 2 and the {self.num_tokens} tokens of the stream"
      )
    if not 1 <= self.stride <= self.window:
      raise DataError(f"stride={self.stride} must lie between 1 and window={self.window}")

  @property
  def is_weighted(self) -> bool:
    """Whether labels carry weights."""
    return self.attribution.get("weights", "uniform") != "uniform"

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON values."""
    return {**dataclasses.asdict(self), "attribution": dict(self.attribution)}


class LabelSpan(NamedTuple):
  """One window of the labelling job.

  Attributes:
    start: first token of the window.
    first: first token whose labels are kept from this window.
    stop: one past the last such token.
  """

  start: int
  first: int
  stop: int


def label_spans(num_tokens: int, window: int, stride: int) -> list[LabelSpan]:
  """Plans the windows so that every token is labelled exactly once.

  With stride = window these are the training windows. With a smaller stride every token but the first
  ones has at least window - stride - 1 tokens of context, and a window's last token (on which no loss
  depends) is left to the next window. A last window that would run over the end begins earlier.
  """
  starts = list(range(0, num_tokens - window + 1, stride))
  if starts[-1] + window < num_tokens:
    starts.append(num_tokens - window)
  spans, first = [], 0
  for start in starts:
    is_last = start == starts[-1]
    stop = start + window - (0 if is_last or stride == window else 1)
    spans.append(LabelSpan(start, first, stop))
    first = stop
  return spans


class LabelWriter:
  """Writes a label cache window by window; a partial one with the same header is continued.

  Args:
    directory: where the cache goes.
    header: what the labels depend on.

  Raises:
    DataError: a partial cache made from something else, or no room on the disk.
  """

  def __init__(self, directory: str | pathlib.Path, header: LabelHeader):
    self.directory, self.header = pathlib.Path(directory), header
    self.directory.mkdir(parents=True, exist_ok=True)
    self.spans = label_spans(header.num_tokens, header.window, header.stride)
    self._state = {"windows": 0, "scored": 0, "positive": 0, "fewer": 0}
    path = self.directory / PROGRESS
    if path.is_file():
      progress = json.loads(path.read_text(encoding="utf-8"))
      _check_equal(path, progress["header"], header.to_dict(), f"remove {self.directory} and label again")
      self._state = progress["state"]
      self._arrays = {
        name: np.lib.format.open_memmap(self.directory / name, mode="r+") for name in self._files()
      }
    else:
      for name in (HEADER, WEIGHTS):  # of an earlier cache
        (self.directory / name).unlink(missing_ok=True)
      self._arrays = {name: self._create(name, dtype) for name, dtype in self._files().items()}
      self.save()
    self._saved_at = time.monotonic()

  @property
  def windows_done(self) -> int:
    """Number of windows already written, of `len(self.spans)`."""
    return self._state["windows"]

  def remaining(self, batch_size: int) -> Iterator[list[LabelSpan]]:
    """Yields the windows still to be labelled, in order, at most `batch_size` at a time."""
    for begin in range(self.windows_done, len(self.spans), batch_size):
      yield self.spans[begin : begin + batch_size]

  def write(
    self,
    spans: list[LabelSpan],
    labels_BLA: np.ndarray,
    positive_BL: np.ndarray,
    scored_BL: np.ndarray,
    weights_BLA: np.ndarray | None = None,
  ) -> None:
    """Writes the labels of the next windows.

    Args:
      spans: the windows, as `remaining` gave them.
      labels_BLA: labels of all their positions, 65535 for none. Rows behind those of the windows (a
        batch that was filled up) are left out, here and below.
      positive_BL: candidates with a positive score.
      scored_BL: positions that may carry labels.
      weights_BLA: weights of the labels, where the header's attribution weighs them.

    Raises:
      DataError: windows out of order, a label that is no latent, or weights that are missing, not asked
        for, negative or not finite.
    """
    if spans != self.spans[self.windows_done : self.windows_done + len(spans)]:
      raise DataError(f"{self.directory}: windows must be written in order; the next is {self.windows_done}")
    wrong = (labels_BLA != NO_LABEL) & ((labels_BLA < 0) | (labels_BLA >= self.header.num_concepts))
    if wrong.any():
      raise DataError(f"label {labels_BLA[wrong][0]} is not below num_concepts={self.header.num_concepts}")
    if (weights_BLA is not None) != self.header.is_weighted:
      given = "none were given" if weights_BLA is None else "some were given"
      raise DataError(f"attribution.weights={self.header.attribution.get('weights')!r}, yet {given}")
    if weights_BLA is not None and not (np.isfinite(weights_BLA) & (weights_BLA >= 0)).all():
      raise DataError("weights of labels must be finite and not negative")
    for row, (start, first, stop) in enumerate(spans):
      kept = slice(first - start, stop - start)
      self._arrays[LABELS][first:stop] = labels_BLA[row, kept]
      if weights_BLA is not None:
        self._arrays[WEIGHTS][first:stop] = weights_BLA[row, kept]
      scored = scored_BL[row, kept]
      positive = positive_BL[row, kept][scored]
      self._state["scored"] += int(scored.sum())
      self._state["positive"] += int(positive.sum())
      self._state["fewer"] += int((positive < self.header.labels_per_token).sum())
    self._state["windows"] += len(spans)
    if time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES:
      self.save()

  def save(self) -> None:
    """Makes everything written so far survive a kill."""
    # Labels first: progress must never run ahead of them.
    for array in self._arrays.values():
      array.flush()
    progress = {"header": self.header.to_dict(), "state": self._state}
    replace_text(self.directory / PROGRESS, json.dumps(progress) + "\n")
    self._saved_at = time.monotonic()

  def finish(self) -> "LabelCache":
    """Counts, hashes and seals the cache.

    Raises:
      DataError: windows are missing.
    """
    missing = len(self.spans) - self.windows_done
    if missing:
      raise DataError(f"{self.directory}: {missing} of {len(self.spans)} windows have no labels yet")
    self.save()
    scored = max(1, self._state["scored"])
    counts = {
      "scored": self._state["scored"],
      "mean_positive": self._state["positive"] / scored,
      "fewer_than_labels": self._state["fewer"] / scored,
      "coverage": float((latent_counts(self._arrays[LABELS], self.header.num_concepts) > 0).mean()),
    }
    header = {
      "format": FORMAT,
      "version": VERSION,
      **self.header.to_dict(),
      "counts": counts,
      "files": {name: describe_file(self.directory / name) for name in self._files()},
    }
    replace_text(self.directory / HEADER, header_text(header))
    (self.directory / PROGRESS).unlink()
    return LabelCache.open(self.directory)

  def _files(self) -> dict[str, Any]:
    """The arrays of this cache: file name and type."""
    return {LABELS: np.uint16, WEIGHTS: np.float16} if self.header.is_weighted else {LABELS: np.uint16}

  def _create(self, name: str, dtype: Any) -> np.ndarray:
    path = self.directory / name
    shape = (self.header.num_tokens, self.header.labels_per_token)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
      # A full disk is answered now, not by a signal when a mapped page cannot be written.
      try:
        with open(path, "r+b") as stream:
          os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
      except OSError as error:
        raise DataError(
          f"{path}: no room for {array.nbytes} bytes of labels ({error.strerror}); "
          "free space or choose another workdir"
        ) from error
    return array


class LabelCache:
  """A finished label cache; make it with `open`.

  Attributes:
    directory: where it is.
    header: content of dataset.json.
    labels: [num_tokens, labels_per_token] uint16, memory-mapped, read only.
    weights: float16 like the labels, 0 where there is none; None where labels count equally.
  """

  def __init__(self, directory: pathlib.Path, header: dict[str, Any]):
    self.directory, self.header = directory, header
    self.labels = np.load(directory / LABELS, mmap_mode="r", allow_pickle=False)
    self.weights = None
    if WEIGHTS in header["files"]:
      self.weights = np.load(directory / WEIGHTS, mmap_mode="r", allow_pickle=False)

  @classmethod
  def open(
    cls,
    directory: str | pathlib.Path,
    expected: LabelHeader | Mapping[str, Any] | None = None,
    *,
    verify_hash: bool = False,
  ) -> "LabelCache":
    """Opens a cache after checking it.

    Args:
      directory: written by `LabelWriter`.
      expected: the header in use, or some of its fields; None to take any.
      verify_hash: also read the file and compare its sha256.

    Raises:
      DataError: unfinished, missing or damaged files, another version, or a field that differs from
        what is expected (named with both values).
    """
    directory = pathlib.Path(directory)
    if (directory / PROGRESS).is_file():
      raise DataError(f"{directory} is not finished; run the stage that writes labels to its end")
    header = read_header(directory, FORMAT, VERSION)
    if expected is not None:
      wanted = expected.to_dict() if isinstance(expected, LabelHeader) else dict(expected)
      remedy = "label the corpus again, or use what these labels were made with"
      _check_equal(directory / HEADER, header, wanted, remedy)
    check_files(directory, header["files"], verify_hash)
    return cls(directory, header)

  @property
  def counts(self) -> dict[str, float]:
    """What was counted: scored (tokens), mean_positive, fewer_than_labels (share), coverage (share)."""
    return self.header["counts"]


def latent_counts(labels: np.ndarray, num_concepts: int, chunk: int = 1 << 20) -> np.ndarray:
  """Returns how often each latent is a label, int64 [num_concepts], reading the cache in pieces."""
  counts = np.zeros(NO_LABEL + 1, np.int64)
  for begin in range(0, len(labels), chunk):
    counts += np.bincount(np.asarray(labels[begin : begin + chunk]).ravel(), minlength=NO_LABEL + 1)
  return counts[:num_concepts]


def _check_equal(path: pathlib.Path, found: Mapping, wanted: Mapping, remedy: str, prefix: str = "") -> None:
  """Raises DataError at the first field of `wanted` that differs, naming it and both values."""
  for name, value in wanted.items():
    there = found.get(name)
    if isinstance(value, Mapping) and isinstance(there, Mapping):
      _check_equal(path, there, value, remedy, f"{prefix}{name}.")
    elif there != value:
      raise DataError(
        f"{path}, field {prefix + name!r}: labels were made with {there!r}, expected {value!r}; {remedy}"
      )
