"""Compiles train steps ahead of time for a v5e:2x4 slice and prints what the compiler says.

Run by test_tpu_compile.py in a process of its own, since libtpu must be set up
before jax is imported: python compile_for_tpu.py tiny|paper MODE...
One JSON object a compiled program on standard output; the compiler's messages
of each program follow a line "=== name" on standard error. MODE "control" compiles
a program that the partitioner is known to complain about.
"""

import json
import math
import os
import re
import sys

os.environ.update(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  TPU_ACCELERATOR_TYPE="v5litepod-8",
  TPU_WORKER_HOSTNAMES="localhost",
  # No chip is touched, so that several compilers may run beside each other.
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  # libtpu writes to files in /tmp/tpu_logs unless told otherwise; 1: warnings.
  TPU_STDERR_LOG_LEVEL="1",
  TPU_MIN_LOG_LEVEL="1",
  TPU_LOG_DIR="disabled",
)
# A program from the cache would come without the messages that the tests look for.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from nr.evaluation.collectives import count_collectives  # noqa: E402
from nr.models.concept_mixing import ConceptMixingSpec  # noqa: E402
from nr.models.transformer import TransformerSpec  # noqa: E402
from nr.recipes.cocomix.method import cocomix_method  # noqa: E402
from nr.training import sharding  # noqa: E402
from nr.training.defaults import get_training_config  # noqa: E402
from nr.training.model_files import ConceptMixingModelSpec  # noqa: E402
from nr.training.next_token import next_token_method  # noqa: E402
from nr.training.optimizers import make_optimizer  # noqa: E402
from nr.training.state import abstract_state, state_shardings  # noqa: E402
from nr.training.step import make_train_step  # noqa: E402

MODES = {"dp": (8, 1, 1, 1), "fsdp": (1, 8, 1, 1), "tp": (1, 1, 8, 1), "fsdp+tp": (1, 2, 4, 1)}
# num_layers, model_dim, vocab_size, num_concepts, insert_at, rows, length.
# The paper's 69M student (arXiv 2502.08524), vocabulary padded to a multiple of 128.
SIZES = {"tiny": (3, 128, 256, 256, 1, 16, 32), "paper": (8, 512, 50304, 32768, 3, 64, 1024)}


def largest_gather(text: str) -> int:
  """Returns the most numbers that one all-gather of compiled HLO puts together on a device."""
  shapes = re.findall(r"= \(?(?:[a-z0-9]+\[[0-9,]*\]\S* ?,? ?)*\)? ?all-gather(?:-start|-done)?\(", text)
  sizes = [
    math.prod(map(int, dims.split(","))) for line in shapes for dims in re.findall(r"\[([0-9,]+)\]", line)
  ]
  return max(sizes, default=0)


def make_method(name: str, size: str):
  layers, dim, vocab, concepts, insert_at, _, length = SIZES[size]
  spec = TransformerSpec.gpt2(
    vocab_size=vocab,
    num_layers=layers,
    model_dim=dim,
    num_heads=8,
    max_length=length,
    dtype="bfloat16",
    remat="full" if size == "paper" else "none",
    attention="dot_product",
  )
  loss_chunk = 8192 if size == "paper" else None
  if name == "next_token":
    return next_token_method(spec, loss_chunk=loss_chunk)
  concept_spec = ConceptMixingSpec(insert_at=insert_at, num_concepts=concepts)
  return cocomix_method(ConceptMixingModelSpec(spec, concept_spec), loss_weight=0.1, loss_chunk=loss_chunk)


def compile_step(method, size: str, mesh):
  *_, rows, length = SIZES[size]
  optimizer = make_optimizer(get_training_config(), method)
  state = abstract_state(method, optimizer)
  place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
  state = jax.tree.map(place, state, state_shardings(method, state, mesh))
  shapes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
  batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in shapes.items()}
  if method.name == "cocomix":
    batch["labels"] = jax.ShapeDtypeStruct((rows, length, 4), jnp.int32)
  batch = {name: place(leaf, sharding.batch_sharding(mesh)) for name, leaf in batch.items()}
  step = make_train_step(method, optimizer, mesh=mesh)
  with sharding.context(mesh):
    return step.lower(state, {}, batch).compile()


def compile_control(devices) -> None:
  """Asks for a change of layout that the partitioner can only do by gathering everything."""
  mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"))
  before, after = NamedSharding(mesh, P("a", None, None)), NamedSharding(mesh, P(None, "b", None))
  pin = jax.lax.with_sharding_constraint

  def reshard(x):
    return pin(jnp.sin(pin(x * 2, before)), after) * 3

  argument = jax.ShapeDtypeStruct((64, 64, 64), jnp.float32, sharding=before)
  jax.jit(reshard, out_shardings=after).lower(argument).compile()


def main() -> None:
  size, *modes = sys.argv[1:]
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
  for mode in modes:
    if mode == "control":
      print("=== control", file=sys.stderr, flush=True)
      compile_control(devices)
      continue
    config = dict(zip(("data", "fsdp", "tensor", "sequence"), MODES[mode]))
    mesh = sharding.make_mesh(config, devices)
    for name in ("next_token", "cocomix"):
      print(f"=== {name} {mode}", file=sys.stderr, flush=True)
      compiled = compile_step(make_method(name, size), size, mesh)
      memory = compiled.memory_analysis()
      report = {
        "program": f"{name} {mode}",
        "collectives": count_collectives(compiled.as_text()),
        "largest_gather": largest_gather(compiled.as_text()),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
      }
      print(json.dumps(report), flush=True)


if __name__ == "__main__":
  main()
