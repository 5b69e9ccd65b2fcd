"""Runs of two processes on this machine, as two hosts would run them."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def run_two(config, workdir, *flags, seconds=240):
  """Runs nr.main in two processes of two devices each; returns their exit statuses and what they wrote to stderr."""
  port, started = free_port(), []
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  for index in range(2):
    own = [
      f"--config={config}",
      f"--workdir={workdir}",
      f"--distributed=127.0.0.1:{port},2,{index}",
    ]
    started.append(
      subprocess.Popen(
        [sys.executable, "-m", "nr.main", *own, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  try:
    ended = [process.communicate(timeout=seconds) for process in started]
  finally:
    for process in started:
      process.kill()
  return [process.returncode for process in started], [stderr for _, stderr in ended]
