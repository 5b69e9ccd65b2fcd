"""Speed and time left: tokens a second, share of the device's peak, a progress bar."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

# Dense bfloat16 peak of one device in FLOP/s, by the start of its device kind.
# Source: the makers' data sheets. Longer names come first.
PEAK_FLOPS = (
  ("TPU v5 lite", 197e12),
  ("TPU v5p", 459e12),
  ("TPU v5", 459e12),
  ("TPU v6 lite", 918e12),
  ("TPU v4", 275e12),
  ("NVIDIA H200", 989e12),
  ("NVIDIA H100", 989e12),
  ("NVIDIA A100", 312e12),
)


def device_peak(device_kind: str) -> float | None:
  """Returns the peak FLOP/s of a device kind, or None if it is not in the table."""
  return next((peak for name, peak in PEAK_FLOPS if device_kind.startswith(name)), None)


class Throughput:
  """Counts steps, tokens and seconds; evaluation and saving are not charged to training.

  The clock starts when the first step of this process has finished, so that
  compilation is not charged either.
  """

  def __init__(self, flops_per_token: float, device_kind: str, device_count: int):
    peak = device_peak(device_kind)
    self._full_speed = peak * device_count if peak else None
    self._flops_per_token = flops_per_token
    self._start: float | None = None
    self._window_start = 0.0
    self._taken = 0.0
    self._totals = self._zeros()
    self._window = self._zeros()

  @staticmethod
  def _zeros() -> dict[str, float]:
    return dict(steps=0, tokens=0.0, waited=0.0, paused=0.0)

  def _add(self, name: str, value: float) -> None:
    self._totals[name] += value
    self._window[name] += value

  def finished_step(self, tokens: float) -> None:
    """Counts one finished step of `tokens` tokens."""
    if self._start is None:
      self._start = self._window_start = time.perf_counter()
      self._totals, self._window = self._zeros(), self._zeros()
      return
    self._add("steps", 1)
    self._add("tokens", tokens)

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Charges the time inside to waiting for input."""
    begin = time.perf_counter()
    yield
    self._add("waited", time.perf_counter() - begin)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time inside out of training."""
    begin = time.perf_counter()
    yield
    self._add("paused", time.perf_counter() - begin)

  def _rates(self, counts: dict[str, float], since: float) -> dict[str, float]:
    seconds = time.perf_counter() - since - counts["paused"]
    if not counts["steps"] or seconds <= 0:
      return {}
    rates = {
      "tokens_per_second": counts["tokens"] / seconds,
      "step_seconds": seconds / counts["steps"],
      "input_wait_seconds": counts["waited"] / counts["steps"],
    }
    if self._full_speed and self._flops_per_token:
      rates["mfu"] = rates["tokens_per_second"] * self._flops_per_token / self._full_speed
    return rates

  def window(self) -> dict[str, float]:
    """Returns the rates since the last call: tokens/s, seconds a step, of them waiting for input, MFU."""
    rates = self._rates(self._window, self._window_start)
    self._window, self._window_start = self._zeros(), time.perf_counter()
    return rates

  def take_seconds(self) -> float:
    """Returns the seconds of training since the last call, pauses left out."""
    if self._start is None:
      return 0.0
    seconds = time.perf_counter() - self._start - self._totals["paused"]
    taken, self._taken = seconds - self._taken, seconds
    return taken

  def overall(self) -> dict[str, float]:
    """Returns the rates since the first step of this process finished."""
    return self._rates(self._totals, self._start) if self._start is not None else {}


class ProgressBar:
  """A tqdm bar with time left; silent if switched off or tqdm is missing."""

  def __init__(self, name: str, step: int, steps: int, is_shown: bool):
    self._bar: Any = None
    if is_shown:
      with contextlib.suppress(ImportError):
        from tqdm import tqdm

        self._bar = tqdm(total=steps, initial=step, desc=name, unit="step", mininterval=0.5)

  def advance(self) -> None:
    """Counts one step."""
    if self._bar is not None:
      self._bar.update(1)

  def show(self, values: dict[str, float]) -> None:
    """Shows loss, speed and share of the peak."""
    if self._bar is None:
      return
    parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    if "tokens_per_second" in values:
      parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
      parts.append(f"MFU {values['mfu']:.1%}")
    self._bar.set_postfix_str(", ".join(parts), refresh=False)

  def close(self) -> None:
    """Leaves the finished bar on the screen."""
    if self._bar is not None:
      self._bar.close()
