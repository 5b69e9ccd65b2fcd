"""Points as processes of nr.main: each in a run directory of its own, a failure stops no other."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nr.sweeps import reuse
from nr.sweeps.reuse import Work

OUTPUT = "output.txt"
"""File in a point's run directory: what its processes have printed."""
_POLL_SECONDS = 0.3
_TELL = 3
"""Names of running points that the progress bar shows."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a point ended.

  Attributes:
    status: "finished", "failed" or "stopped".
    seconds: that its process took; 0 where it was finished before.
    message: of a failure, its last line.
  """

  status: str
  seconds: float = 0.0
  message: str = ""


@dataclasses.dataclass
class _Running:
  work: Work
  process: subprocess.Popen
  slot: str
  began: float


class Runner:
  """Runs points, at most as many at a time as there are slots.

  Args:
    command: from a point's work to the arguments of its process.
    slots: one a process that may run at a time: "" or the devices that CUDA_VISIBLE_DEVICES shows it.
    everything: all points of the sweep, whose finished stages may be copied; None: none are.
    on_end: called with the work and outcome of each point as it ends.
    description: of the progress bar.
  """

  def __init__(
    self,
    command: Callable[[Work], Sequence[str]],
    slots: Sequence[str],
    everything: Sequence[Work] | None,
    on_end: Callable[[Work, Outcome], None] = lambda work, outcome: None,
    description: str = "sweep",
  ):
    self._command, self._free, self._on_end = command, list(slots), on_end
    self._everything, self._description = everything, description
    self._running: list[_Running] = []
    self._signal = 0

  def run(self, todo: Sequence[Work]) -> dict[str, Outcome]:
    """Runs points and returns how each of them ended, by name.

    SIGINT and SIGTERM are passed on, so that training saves its state, and no other point is begun;
    a second one kills.
    """
    waiting, outcomes = [], {}
    for work in todo:
      if reuse.is_finished(work):
        outcomes[work.point.name] = Outcome("finished")
      else:
        waiting.append(work)
    before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=len(todo), initial=len(outcomes), unit="point", desc=self._description, smoothing=0)
    try:
      with logging_redirect_tqdm():
        while self._running or (waiting and not self._signal):
          self._collect(outcomes, bar)
          while self._free and not self._signal and (work := self._next(waiting)) is not None:
            waiting.remove(work)
            try:
              self._start(work)
            except OSError as error:  # such as a full disk
              self._end(work, Outcome("failed", message=str(error)), outcomes, bar)
          bar.set_postfix_str(self._state(outcomes))
          time.sleep(_POLL_SECONDS)
    finally:
      self._tell(signal.SIGTERM)  # none is left but after an error of our own
      bar.close()
      for number, handler in before.items():
        signal.signal(number, handler)
    return outcomes

  @property
  def signal(self) -> int:
    """The signal that stopped the sweep, 0 for none."""
    return self._signal

  def _hear(self, number: int, frame: object) -> None:
    del frame
    kind = signal.SIGKILL if self._signal else signal.SIGTERM
    self._signal = number
    self._tell(kind)

  def _tell(self, kind: int) -> None:
    """Sends a signal to the processes that run."""
    for running in self._running:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, kind)

  def _next(self, waiting: Sequence[Work]) -> Work | None:
    """Returns the first point that need not wait for what a running one is making."""
    if self._everything is None:
      return waiting[0] if waiting else None
    return reuse.next_ready(waiting, [each.work for each in self._running], self._everything)

  def _start(self, work: Work) -> None:
    work.directory.mkdir(parents=True, exist_ok=True)
    if self._everything is not None:
      reuse.adopt(work, [other for other in self._everything if other is not work])
    slot = self._free[0]
    # The bars of several processes on one terminal would be unreadable, and in a file a line a step.
    # Unbuffered, what is printed and what fails are in the file in the order in which they happened.
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    if slot:
      environment["CUDA_VISIBLE_DEVICES"] = slot
    with open(work.directory / OUTPUT, "ab") as output:
      process = subprocess.Popen(
        list(self._command(work)),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # a SIGINT of the terminal comes to us alone
      )
    self._running.append(_Running(work, process, self._free.pop(0), time.monotonic()))

  def _collect(self, outcomes: dict[str, Outcome], bar: tqdm) -> None:
    """Takes in the processes that have ended."""
    for running in [each for each in self._running if each.process.poll() is not None]:
      self._running.remove(running)
      self._free.append(running.slot)
      self._end(running.work, self._outcome(running), outcomes, bar)

  def _end(self, work: Work, outcome: Outcome, outcomes: dict[str, Outcome], bar: tqdm) -> None:
    outcomes[work.point.name] = outcome
    bar.update()
    told = f": {outcome.message}" if outcome.message else f" in {outcome.seconds / 60:.1f} min"
    logging.info("%s: %s%s", work.point.name, outcome.status, told)
    self._on_end(work, outcome)

  def _outcome(self, running: _Running) -> Outcome:
    seconds, code = time.monotonic() - running.began, running.process.returncode
    if code == 0:
      return Outcome("finished", seconds)
    if self._signal:
      return Outcome("stopped", seconds)
    output = running.work.directory / OUTPUT
    ended = f"ended by signal {-code}" if code < 0 else last_line(output) or f"exit status {code}"
    return Outcome("failed", seconds, f"{ended} [{output}]")

  def _state(self, outcomes: dict[str, Outcome]) -> str:
    names = [running.work.point.name for running in self._running]
    shown = ", ".join(names[:_TELL]) + (f" and {len(names) - _TELL} more" if len(names) > _TELL else "")
    failed = sum(outcome.status == "failed" for outcome in outcomes.values())
    return f"{failed} failed; running {shown}" if failed else f"running {shown}"


def last_line(path: pathlib.Path) -> str:
  """Returns the end of the last line of a file that is not empty, "" where there is none."""
  with open(path, "rb") as stream:
    stream.seek(max(0, path.stat().st_size - 8192))
    lines = stream.read().decode("utf-8", "replace").splitlines()
  return next((line.strip()[-600:] for line in reversed(lines) if line.strip()), "")
