"""What a process that measures one side says of itself: seconds of its steps, its peak memory, its packages."""

import contextlib
import importlib.metadata
import pathlib
import sys
import time
from collections.abc import Callable, Iterable


def peak_memory(device: str = "cpu") -> int:
  """The most memory this process has had, in bytes: resident on `cpu`, on the device for `gpu`."""
  if device == "gpu":
    if "torch" in sys.modules:
      return sys.modules["torch"].cuda.max_memory_allocated()
    return sys.modules["jax"].devices()[0].memory_stats()["peak_bytes_in_use"]
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM:"):
      return 1024 * int(line.split()[1])
  raise OSError("/proc/self/status has no VmHWM; the benchmark needs Linux")


def timed_steps(run: Callable[[], object], warmup: int, steps: int) -> dict[str, list]:
  """Losses of all steps, and seconds of those after the warm-up.

  Seconds of the processor are those that this process computed, whatever else the machine did meanwhile.

  Args:
    run: one step; returns its loss, or losses, when the step is done.
    warmup: steps before the clock starts.
    steps: timed steps.

  Returns:
    `losses` of warmup + steps, `seconds` and `processor_seconds` of steps.
  """
  losses, seconds, busy = [], [], []
  for _ in range(warmup + steps):
    start, start_busy = time.perf_counter(), time.process_time()
    losses.append(run())
    seconds.append(time.perf_counter() - start)
    busy.append(time.process_time() - start_busy)
  return {"seconds": seconds[warmup:], "processor_seconds": busy[warmup:], "losses": losses}


def versions(packages: Iterable[str]) -> dict[str, str]:
  """Versions of those packages that this process has imported."""
  found = {}
  for package in packages:
    if package in sys.modules:
      with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found[package] = importlib.metadata.version(package)
  return found
