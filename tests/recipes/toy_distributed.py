"""A recipe for several processes: a stage for one of them, a training by all, a report."""

import jax
import numpy as np
from ml_collections import ConfigDict

from nr.recipes.stages import Stage, write_json
from nr.training import integrity
from nr.training.loop import train
from tests.training import toy

STEPS = 4


def get_config(variant="all"):
  return ConfigDict({"recipe": "tests.recipes.toy_distributed", "variant": variant})


def validate(config):
  del config


def stages(config):
  is_all = config.variant == "all"
  return [
    Stage("alone", alone, sections=("variant",)),
    Stage("together", together, inputs=("alone",), every_process=is_all),
    Stage("report", report, sections=("recipe",), inputs=("together",)),
  ]


def note(context):
  with open(context.workdir / f"{context.directory.name}.processes", "a") as stream:
    stream.write(f"{jax.process_index()}\n")


def alone(context):
  note(context)
  return {"process": jax.process_index()}


class Share:
  """The rows of each batch that belong to this process."""

  def __init__(self):
    self.position = 0

  def __iter__(self):
    return self

  def __next__(self):
    batch, self.position = toy.batch(16, seed=self.position), self.position + 1
    rows = 16 // jax.process_count()
    first = rows * jax.process_index()
    return {name: values[first : first + rows] for name, values in batch.items()}

  def get_state(self):
    return {"position": self.position}

  def set_state(self, state):
    self.position = state["position"]


def trained(directory):
  """Trains the toy on all devices of all processes; returns its parameters by name, and its loss."""
  result = train(toy.config(steps=STEPS), toy.make(), Share(), workdir=directory)
  leaves = jax.tree_util.tree_leaves_with_path(result.state.params)
  arrays = {jax.tree_util.keystr(path): integrity.to_host(leaf) for path, leaf in leaves}
  return arrays, result.summary["loss"]


def together(context):
  note(context)
  arrays, loss = trained(context.directory)
  if jax.process_index() == 0:
    np.savez(context.directory / "params.npz", **arrays)
  return {
    "loss": loss,
    "processes": jax.process_count(),
    "devices": jax.device_count(),
    "made_by": jax.process_index(),
  }


def report(context):
  note(context)
  write_json(context.workdir / "report.json", context.inputs["together"])
  (context.workdir / "report.md").write_text("toy\n")
  return {"report": "report.json"}
