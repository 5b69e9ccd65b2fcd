"""Eight simulated CPU devices for every test, and the fixtures that find real data."""

import gc
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time of tiny programs: unoptimized code halves that of the whole suite.
FLAGS = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
  "--xla_llvm_disable_expensive_passes=true"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

# Tests compile the same small programs again and again; the next run finds them here.
cache = pathlib.Path(__file__).parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest  # noqa: E402
from absl import flags  # noqa: E402

# Grain reads absl flags when it starts worker processes.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
  """Lets go of a file's compiled programs: each holds memory maps, of which a process may have 65,530."""
  yield
  import jax

  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def nr_data() -> pathlib.Path:
  """The folder of real data and small real models that NR_DATA names."""
  root = os.environ.get("NR_DATA")
  if not root or not pathlib.Path(root).is_dir():
    pytest.skip("needs real data: set NR_DATA to the folder that holds it")
  return pathlib.Path(root)
