"""Compiles the paper's train steps for the TPU slice that their config names, on a machine without one.

    python benchmarks/compile_report.py                                    # three sizes, three arms each
    python benchmarks/compile_report.py --variants=paper_69m --arms=cocomix

Of each program the compiler says what a chip needs and whether it fits, and what travels
between chips. Nothing runs: there are no times here, and whether it learns is not asked.
The slice is `config.tpu.topology`; mesh, batch, microbatches and recomputation are those of
`config.students.train` and of the arm, so that what fits here is what `nr.main` runs there.

A line is written as soon as its program is done; with --keep, programs that the result
file has already are not compiled again. Needs libtpu (extra [tpu]).
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
# libtpu is set up when jax is imported.
os.environ.update(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  TPU_ACCELERATOR_TYPE="v5litepod-8",
  TPU_WORKER_HOSTNAMES="localhost",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  TPU_STDERR_LOG_LEVEL="3",
  TPU_MIN_LOG_LEVEL="3",
  TPU_LOG_DIR="disabled",
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from machine import hardware  # noqa: E402

from configs import cocomix as configs  # noqa: E402
from nr.evaluation.collectives import count_collectives  # noqa: E402
from nr.evaluation.flops import count_flops  # noqa: E402
from nr.models import parameters  # noqa: E402
from nr.recipes.cocomix import settings  # noqa: E402
from nr.recipes.cocomix.students import arm_method, arm_training  # noqa: E402
from nr.recipes.sections import transformer_spec  # noqa: E402
from nr.training import sharding, trees  # noqa: E402
from nr.training.method import Method  # noqa: E402
from nr.training.model_files import Model, build_model, graphdef_of  # noqa: E402
from nr.training.optimizers import make_optimizer  # noqa: E402
from nr.training.state import abstract_state, state_shardings  # noqa: E402
from nr.training.step import make_train_step  # noqa: E402

VOCABULARY = 50_257  # of GPT-2, the teacher
HBM_GIB = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
"""Memory of a chip that the compiler allows, as its errors say."""


def abstract(spec) -> Model:
  """A model whose parameters have shapes and no values."""
  params = jax.eval_shape(lambda: parameters.split(build_model(spec, jax.random.key(0)))[1])
  return Model(spec, graphdef_of(spec), params, "", {})


def make_program(config, arm: str) -> tuple[Method, object]:
  """The method of an arm and its training section."""
  for model in (config.teacher.model, config.students.arms[arm].model):
    model.layers = "scan"  # what "auto" is on an accelerator
  spec = settings.student_spec(config, arm, VOCABULARY)
  teacher = transformer_spec(config.teacher.model, VOCABULARY, config.window.length)
  autoencoder = settings.autoencoder_spec(config)
  return arm_method(config, arm, spec, abstract(teacher), abstract(autoencoder)), arm_training(config, arm, 0)


def make_batch(config, method_reads_labels: bool, training) -> dict:
  """Shapes of a batch."""
  shape = (training.batch_size, config.window.length)
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets")}
  batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
  if method_reads_labels:
    batch["labels"] = jax.ShapeDtypeStruct((*shape, config.targets.k_attr), jnp.int32)
  return batch


def placed(tree, shardings):
  """Gives every abstract array its sharding."""
  place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
  return jax.tree.map(place, tree, shardings)


def compile_step(config, arm: str) -> dict:
  """Compiles the train step of an arm and returns what is known of it."""
  topology = config.tpu.topology
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  method, training = make_program(config, arm)
  mesh = sharding.make_mesh(training.mesh, devices)
  optimizer = make_optimizer(training, method)
  state = abstract_state(method, optimizer)
  batch = make_batch(config, settings.predicts_concepts(config, arm), training)
  one_chip = make_train_step(method, optimizer, training.accumulation, training.seed)
  report = {
    "topology": topology,
    "chips": len(devices),
    "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
    "parameters": trees.count(state.params),
    "batch": [training.batch_size, config.window.length],
    "microbatches": training.accumulation,
    "step_flops_per_chip": count_flops(one_chip, state, method.frozen, batch) / len(devices),
  }
  frozen = {}
  if method.frozen:
    frozen = placed(method.frozen, sharding.shardings(method.frozen_axes, mesh, method.frozen))
  state = placed(state, state_shardings(method, state, mesh))
  batch = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.batch_sharding(mesh))
    for name, leaf in batch.items()
  }
  step = make_train_step(method, optimizer, training.accumulation, training.seed, mesh=mesh)
  start = time.perf_counter()
  try:
    with sharding.context(mesh):
      compiled = step.lower(state, frozen, batch).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return report | {"fits": False, "said": str(error).splitlines()[0][:300]}
  memory = compiled.memory_analysis()
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return report | {
    "fits": True,
    "compile_seconds": time.perf_counter() - start,
    "argument_bytes": arguments,
    "temporary_bytes": temporary,
    "bytes_per_chip": arguments + temporary + outputs + memory.generated_code_size_in_bytes,
    "hbm_bytes": int(HBM_GIB[topology.partition(":")[0]] * 2**30),
    "collectives": count_collectives(compiled.as_text()),
  }


def table(report: dict) -> str:
  """The report as Markdown."""
  versions = ", ".join(f"{name} {version}" for name, version in report["machine"]["versions"].items())
  lines = [
    "# Train steps of the paper's sizes, compiled for TPU",
    "",
    f"{report['date']}; compiled ahead of time without a TPU, {versions}. Nothing was run: no times, no losses.",
    "Per chip: weights, moments, batch and frozen models (arguments), and the most that the step needs besides "
    "(temporary). Collectives are instructions of the program; those in loops run more than once.",
    f"Written by `{report['command']}`. {report.get('note', '')}".rstrip(),
    "",
    "| config | arm | slice | microbatches | parameters | arguments, GiB | temporary, GiB | of HBM | fits "
    "| TFLOP a step | gathers | reduces | reduce-scatters | permutes | all-to-alls |",
    "| " + " | ".join(["---"] * 15) + " |",
  ]
  for program in report["programs"]:
    lead = (
      f"| {program['variant']} | {program['arm']} | {program['topology']} | {program['microbatches']} "
      f"| {program['parameters']:,} "
    )
    flops = f"{program['step_flops_per_chip'] / 1e12:.1f}"
    if not program["fits"]:
      lines.append(lead + f"| | | | no | {flops} | | | | | |")
      continue
    used = program["bytes_per_chip"] / program["hbm_bytes"]
    counts = program["collectives"]
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
    lines.append(
      lead + f"| {program['argument_bytes'] / 2**30:.2f} | {program['temporary_bytes'] / 2**30:.2f} "
      f"| {100 * used:.0f} % | yes | {flops} | " + " | ".join(str(counts[kind]) for kind in kinds) + " |"
    )
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--variants", default=",".join(configs.PAPERS), help="comma-separated")
  parser.add_argument("--arms", default="ntp,kd,cocomix", help="comma-separated")
  parser.add_argument("--keep", action="store_true", help="compile only what the result file lacks")
  parser.add_argument("--topology", default="", help="another slice than the config's, such as v5e:4x4")
  parser.add_argument("--microbatches", type=int, default=0, help="another number than the config's")
  parser.add_argument("--output", default=str(HERE / "results"), help="folder")
  arguments = parser.parse_args()
  output = pathlib.Path(arguments.output)
  output.mkdir(parents=True, exist_ok=True)
  path = output / "compile_paper.json"
  programs = json.loads(path.read_text())["programs"] if arguments.keep and path.exists() else []
  for variant in arguments.variants.split(","):
    for arm in arguments.arms.split(","):
      if any((program["variant"], program["arm"]) == (variant, arm) for program in programs):
        continue
      config = configs.get_config(variant)
      config.tpu.topology = arguments.topology or config.tpu.topology
      config.students.train.accumulation = arguments.microbatches or config.students.train.accumulation
      programs.append({"variant": variant, "arm": arm, **compile_step(config, arm)})
      print(json.dumps(programs[-1]), flush=True)
      report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/compile_report.py", *sys.argv[1:]]),
        "machine": hardware(),
        "programs": programs,
      }
      path.write_text(json.dumps(report, indent=2) + "\n")
      (output / "compile_paper.md").write_text(table(report))
  print(table(json.loads(path.read_text())))
  print(f"written: {path} and .md")


if __name__ == "__main__":
  main()
