"""The programs in launch/, which is no package, as modules; each is loaded once, for it defines flags."""

import functools
import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def load(name):
  spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
