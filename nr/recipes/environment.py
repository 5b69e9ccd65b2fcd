"""What a report says of where its numbers were made."""

import pathlib
import platform
import shutil
import subprocess
from typing import Any

import jax

from nr.recipes.stages import versions


def environment() -> dict[str, Any]:
  """Returns versions, device and, in a checkout, the commit."""
  return {
    "versions": versions(),
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "commit": commit(),
  }


def commit() -> str | None:
  """Returns the commit of the checkout that this package is run from, None outside of one."""
  here = pathlib.Path(__file__).parent
  if shutil.which("git") is None:
    return None
  found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
  return found.stdout.strip() or None
