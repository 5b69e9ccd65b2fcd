"""Writers of metrics: JSON lines for programs, TensorBoard files for eyes.

The methods are those of clu's writers, which need TensorFlow; ours do not.
"""

import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from nr.files import replace_text


class Writer(Protocol):
  """What the loop writes to."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes numbers by name."""

  def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes vectors by name."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts by name."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the settings of the run."""

  def flush(self) -> None:
    """Makes everything written so far visible on disk."""

  def close(self) -> None:
    """Flushes and closes the files."""


class JsonLinesWriter:
  """One JSON object a line: {"step": 10, "loss": 3.2, ...}; vectors are lists."""

  def __init__(self, path: str | pathlib.Path, last_step: int | None = None):
    """Opens `path` for appending.

    Args:
      path: file to write.
      last_step: lines after this step, left by a run that was cut short after its
        last checkpoint, are dropped, and so is a line that was cut in half.
    """
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if last_step is not None and self._path.exists():
      kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= last_step]
      replace_text(self._path, "".join(line + "\n" for line in kept))
    self._file = self._path.open("a", encoding="utf-8")

  def _write(self, step: int, values: Mapping[str, Any]) -> None:
    self._file.write(json.dumps({"step": int(step), **values}) + "\n")
    self._file.flush()

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes numbers by name as one line."""
    self._write(step, {name: float(value) for name, value in scalars.items()})

  def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes vectors by name as lists, in one line."""
    self._write(step, {name: np.asarray(value).tolist() for name, value in arrays.items()})

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts by name as one line."""
    self._write(step, dict(texts))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the settings as a line of step 0."""
    self._write(0, {"hparams": json.loads(json.dumps(hparams, default=str))})

  def flush(self) -> None:
    """Does nothing: every line is flushed as it is written."""

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _step_of(line: str) -> float:
  """Returns the step of a line, infinity for one that was cut in half."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError, TypeError):
    return float("inf")


class TensorBoardWriter:
  """TensorBoard event files through tensorboardX, without TensorFlow."""

  def __init__(self, directory: str | pathlib.Path, last_step: int | None = None):
    """Opens an event file; what stands in older ones after `last_step` is hidden."""
    from tensorboardX import SummaryWriter

    purge = None if last_step is None else last_step + 1
    self._writer = SummaryWriter(str(directory), purge_step=purge)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes numbers by name."""
    for name, value in scalars.items():
      self._writer.add_scalar(name, float(value), step)

  def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes histograms of vectors by name."""
    for name, value in arrays.items():
      self._writer.add_histogram(name, np.asarray(value), step)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts by name."""
    for name, value in texts.items():
      self._writer.add_text(name, value, step)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the settings as a text."""
    self._writer.add_text("hparams", "```\n" + json.dumps(hparams, indent=2, default=str) + "\n```", 0)

  def flush(self) -> None:
    """Makes everything written so far visible on disk."""
    self._writer.flush()

  def close(self) -> None:
    """Closes the event file."""
    self._writer.close()


class MultiWriter:
  """Writes to several writers."""

  def __init__(self, writers: Sequence[Writer]):
    self._writers = tuple(writers)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes numbers by name."""
    for writer in self._writers:
      writer.write_scalars(step, scalars)

  def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes vectors by name."""
    for writer in self._writers:
      writer.write_histograms(step, arrays)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts by name."""
    for writer in self._writers:
      writer.write_texts(step, texts)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the settings of the run."""
    for writer in self._writers:
      writer.write_hparams(hparams)

  def flush(self) -> None:
    """Flushes all."""
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    """Closes all."""
    for writer in self._writers:
      writer.close()


def make_writer(workdir: str | pathlib.Path, last_step: int | None = None) -> MultiWriter:
  """Opens workdir/metrics/metrics.jsonl and, where tensorboardX is installed, event files beside it."""
  directory = pathlib.Path(workdir) / "metrics"
  made: list[Writer] = [JsonLinesWriter(directory / "metrics.jsonl", last_step)]
  try:
    made.append(TensorBoardWriter(directory / "tensorboard", last_step))
  except ImportError:
    logging.info("tensorboardX is not installed: metrics go to %s only", directory / "metrics.jsonl")
  return MultiWriter(made)


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of workdir/metrics/metrics.jsonl; a line cut in half is left out."""
  path = pathlib.Path(workdir) / "metrics" / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < float("inf")]
