"""What numbers were measured on, and memory bandwidth as a program sees it."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import time

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")


def hardware() -> dict:
  """Processor, cores, memory in bytes, and versions of what computes."""
  cpu = platform.processor() or platform.machine()
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        cpu = line.partition(":")[2].strip()
        break
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  versions = {"python": platform.python_version()}
  for package in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {"cpu": cpu, "cores": os.cpu_count(), "memory": memory, "versions": versions}


def read_bandwidth(size: int = 1 << 29, repeats: int = 5) -> float:
  """Bytes a second of summing a float32 array of `size` bytes with all cores, the best of some repeats."""
  import jax
  import jax.numpy as jnp

  array = jnp.ones((size // 4 // 4096, 4096), jnp.float32)
  total = jax.jit(lambda a: a.sum(axis=1))
  total(array).block_until_ready()
  best = float("inf")
  for _ in range(repeats):
    start = time.perf_counter()
    total(array).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return size / best
