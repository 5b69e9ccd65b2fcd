"""Several processes of one run: which of them does what, and how they wait for each other.

They share one run directory. The first process alone writes manifest, config and reports, and runs the
stages that are not for all; the others learn from the manifest when a stage is finished. They ask the file
system and not each other's devices, since a collective that waits an hour for its last member is ended by
the runtime.
"""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nr.files import replace_text

ATTEMPT = "attempt.json"
"""File that the first process leaves in the run directory when a distributed run begins."""
_POLL_SECONDS = 0.5
_SHARED_SECONDS = 60.0
"""Time in which a shared file system shows what another host wrote."""


class ProcessError(RuntimeError):
  """Processes that cannot work together; the message is one line with a remedy."""


class Processes:
  """The processes of a run, seen from one of them. With one process nothing is ever waited for."""

  def __init__(self) -> None:
    self.index, self.count = jax.process_index(), jax.process_count()
    self.attempt = 0

  @property
  def is_first(self) -> bool:
    """Whether this is the process that writes."""
    return self.index == 0

  def meet(self, workdir: pathlib.Path) -> None:
    """Waits until every process is here, and checks that all see the same run directory.

    Raises:
      ProcessError: a process looks into another folder than the first one.
    """
    if self.count == 1:
      return
    if self.is_first:
      self.attempt = int(time.time())
      replace_text(workdir / ATTEMPT, json.dumps({"attempt": self.attempt, "processes": self.count}) + "\n")
    from jax.experimental import multihost_utils

    self.attempt = int(multihost_utils.broadcast_one_to_all(np.int32(self.attempt)))
    is_seen = _wait(lambda: _read(workdir / ATTEMPT).get("attempt") == self.attempt, _SHARED_SECONDS)
    if not multihost_utils.process_allgather(np.int32(is_seen)).all():
      raise ProcessError(
        f"--workdir={workdir}: not all of the {self.count} processes see what the first one wrote there; name a "
        "folder of a file system that all hosts share"
      )

  def mark(self) -> dict[str, int]:
    """Returns what tells an entry of the manifest from one that an earlier attempt left."""
    return {"attempt": self.attempt} if self.count > 1 else {}

  def wait_for(self, manifest: pathlib.Path, stage: str) -> dict[str, Any]:
    """Waits for the first process to finish a stage and returns its entry of the manifest.

    Raises:
      ProcessError: the stage failed there.
    """
    found: dict[str, Any] = {}

    def has_ended() -> bool:
      found.update(_read(manifest).get(stage, {}))
      return found.get("attempt") == self.attempt and found.get("status") in ("finished", "failed")

    _wait(has_ended, None)
    if found["status"] == "failed":
      raise ProcessError(f"stage {stage!r} failed on the first process; its error is in log.txt")
    return found


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):  # not there yet, or seen in the middle of being replaced
    return {}


def _wait(is_done: Callable[[], bool], seconds: float | None) -> bool:
  """Returns whether something came true within some seconds; None: waits for ever."""
  end = None if seconds is None else time.monotonic() + seconds
  while not is_done():
    if end is not None and time.monotonic() > end:
      return False
    time.sleep(_POLL_SECONDS)
  return True
