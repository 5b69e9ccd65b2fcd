"""What watches a run: not-a-number, spikes, signals, profiles."""

import contextlib
import logging
import math
import pathlib
import signal
import statistics
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nr.objectives.weighted import Weighted
from nr.training.metrics import host_mean

ID_FIELDS = ("index", "indices", "id", "ids", "document_id", "document_ids")
CHECKED = ("loss", "gradient_norm")


class TrainingError(RuntimeError):
  """Training cannot go on; the message is one line naming step and batch."""


class Interrupted(SystemExit):
  """Raised after the save when the run was asked to stop; exits with 128 + the signal."""

  def __init__(self, number: int, step: int, saved: list[int]):
    super().__init__(128 + number)
    self.message = (
      f"signal {number}: stopped after step {step}; complete checkpoints: {saved}; "
      "run the same command again to go on"
    )
    logging.warning("%s", self.message)

  def __str__(self) -> str:
    return self.message


def describe_batch(batch: Mapping[str, np.ndarray]) -> str:
  """Names a batch by its ids where it has any, by its shapes otherwise."""
  for field in ID_FIELDS:
    if field in batch:
      values = np.asarray(batch[field]).reshape(-1).tolist()
      shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
      return f"batch with {field} [{shown}]"
  shapes = ", ".join(f"{name}{list(np.shape(value))}" for name, value in batch.items())
  return f"batch of {shapes}"


def check_finite(
  step: int, values: Mapping[str, Weighted], batch: Mapping[str, np.ndarray], workdir: pathlib.Path
) -> None:
  """Raises TrainingError if loss or gradient norm of update `step` is not finite; keeps the batch.

  The batch is written to workdir/not_finite/step_N.npz so that it can be looked at.
  """
  means = {name: host_mean(values[name]) for name in CHECKED}
  bad = [name for name, mean in means.items() if not math.isfinite(mean)]
  if not bad:
    return
  # Each of several processes keeps its own rows.
  own = f".process{jax.process_index()}" if jax.process_count() > 1 else ""
  path = workdir / "not_finite" / f"step_{step}{own}.npz"
  path.parent.mkdir(parents=True, exist_ok=True)
  plain = {name: np.asarray(value) for name, value in batch.items()}
  np.savez(path, **{name: value for name, value in plain.items() if value.dtype.kind != "O"})
  raise TrainingError(
    f"step {step}: {' and '.join(bad)} not finite (loss {means['loss']}, gradient norm "
    f"{means['gradient_norm']}) on the {describe_batch(batch)}, kept in {path}; nothing was saved after it. "
    "Lower optimizer.learning_rate, set clip, or look at the batch"
  )


class SpikeGuard:
  """Notices a loss that stays far above its running median."""

  def __init__(self, config: Any):
    """`config` has action (off, warn, error), factor, patience (steps), window (steps)."""
    self._config = config
    self._history: deque[float] = deque(maxlen=max(2, config.window))
    self._high = 0

  def observe(self, step: int, loss: float, batch: Mapping[str, np.ndarray]) -> None:
    """Takes in the loss of one step; warns or raises TrainingError when it has spiked for long."""
    if self._config.action == "off" or not math.isfinite(loss):
      return
    median = statistics.median(self._history) if len(self._history) >= self._config.patience else math.inf
    if median > 0 and loss > self._config.factor * median:
      self._high += 1  # A spike does not enter the median, or it would hide itself.
    else:
      self._high = 0
      self._history.append(loss)
    if self._high and self._high % self._config.patience == 0:
      text = (
        f"step {step}: the loss {loss:.4g} has been above {self._config.factor} x its running median "
        f"{median:.4g} for {self._high} steps; last {describe_batch(batch)}"
      )
      if self._config.action == "error":
        raise TrainingError(text + "; lower optimizer.learning_rate or set spike.action=warn")
      logging.warning("%s", text)


class StopSignal:
  """Remembers SIGTERM and SIGINT, so that the loop can save before it leaves.

  A second SIGINT interrupts at once. Outside the main thread it hears nothing.
  With several processes all stop at the same step.
  """

  def __init__(self):
    self.number = 0
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "StopSignal":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._hear)
    return self

  def _hear(self, number: int, frame: Any) -> None:
    if number == signal.SIGINT and self.number:
      raise KeyboardInterrupt
    self.number = number

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def is_set(self, step: int, every: int) -> bool:
    """True once any process has been asked to stop; several processes ask each other `every` steps only."""
    if jax.process_count() == 1:
      return bool(self.number)
    if step % every:
      return False
    from jax.experimental import multihost_utils

    self.number = int(np.max(multihost_utils.process_allgather(np.int32(self.number))))
    return bool(self.number)


class Profiler:
  """Traces `steps` steps of this process from `start` on into workdir/profile."""

  def __init__(self, config: Any, workdir: pathlib.Path, first_step: int):
    self._start = first_step + config.start if config.start >= 0 else -1
    self._stop = self._start + config.steps
    self._directory = workdir / "profile"
    self._is_on = False

  def before_step(self, step: int, state: Any) -> None:
    """Starts or stops the trace; waits for the traced steps to finish before it stops."""
    if self._start >= 0 and not self._is_on and step == self._start:
      jax.profiler.start_trace(str(self._directory))
      self._is_on = True
    elif self._is_on and step >= self._stop:
      self.close(state)

  def close(self, state: Any) -> None:
    """Stops a trace that is still running."""
    if self._is_on:
      with contextlib.suppress(RuntimeError):  # a step that failed has taken the donated state with it
        jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._is_on = False
      logging.info("profile written to %s", self._directory)
