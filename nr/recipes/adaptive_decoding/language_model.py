"""Stage `language_model`: the frozen model that writes, pre-trained on the toys, a model a seed, or a checkpoint.

A checkpoint is not copied: it is never changed, and what its files hold decides the run as their names do.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from absl import logging

from nr.data.windows import shuffled_batches
from nr.generation.language_models import Network
from nr.generators.checkpoints import open_checkpoint
from nr.models.transformer import TransformerSpec
from nr.recipes.adaptive_decoding import families, settings
from nr.recipes.adaptive_decoding.sampling import Room
from nr.recipes.adaptive_decoding.tasks.prompts import opened_tasks
from nr.recipes.adaptive_decoding.tasks.protocol import Task
from nr.recipes.adaptive_decoding.tasks.toy import ToyTask
from nr.recipes.languages import Language, checkpoint_language, plain_language
from nr.recipes.policies import model_mesh
from nr.recipes.sections import training_config
from nr.recipes.stages import Artifact, StageContext
from nr.training import sharding, trees
from nr.training.fingerprint import fingerprint
from nr.training.loop import train
from nr.training.model_files import axes_of, load_model, save_model
from nr.training.next_token import next_token_method


class Opened(NamedTuple):
  """The frozen language model of a seed.

  Attributes:
    network: on its devices.
    language: how texts become tokens.
    fingerprint: of its parameters.
    mesh: that it lies on; None: one device.
  """

  network: Network
  language: Language
  fingerprint: str
  mesh: jax.sharding.Mesh | None = None

  def room(self, task: Task, prompts_per_call: int) -> Room:
    """Returns what responses to a task may take."""
    return Room(task.max_new_tokens, self.language.end_ids, task.lengths, prompts_per_call, self.mesh)


def run(context: StageContext) -> Artifact:
  """Trains a model for every seed on texts that it sees once or more, or looks at the checkpoint."""
  config = context.config
  if settings.is_toy(config):
    return {
      "runs": {str(seed): _pre_trained(context, seed) for seed in config.seeds},
      "families": list(config.language_model.families),
    }
  for name, missing in settings.left_out(config).items():
    logging.warning("experiments.%s is left out; it needs %s", name, ", ".join(missing))
  network = opened_checkpoint(config).network
  entry = {
    "checkpoint": config.language_model.checkpoint,
    "fingerprint": fingerprint(network.params),
    "params": trees.count(network.params),
  }
  return {"runs": {str(seed): entry for seed in config.seeds}, "families": list(config.tasks)}


def _pre_trained(context: StageContext, seed: int) -> Artifact:
  config, section = context.config, context.config.language_model
  spec = settings.transformer_spec(config)
  directory = context.directory / f"seed{seed}"
  training = training_config(section.train, config.seed + seed)
  number = settings.number_of(config.seed, seed, "texts")
  texts = families.training_texts(tuple(section.families), section.num_texts, number)
  data = shuffled_batches(texts, training.batch_size, seed=training.seed)
  result = train(training, next_token_method(spec), data, workdir=directory)
  name = save_model(directory / "model", spec, result.state.params, families.TOKENIZER.fingerprint)
  return {
    "model": context.relative(directory / "model"),
    "fingerprint": name,
    "params": trees.count(result.state.params),
    "loss": result.summary["loss"],
  }


def open_model(context: StageContext, seed: int) -> Opened:
  """Returns the language model of a seed; a checkpoint is read once a process."""
  config, entry = context.config, context.inputs["language_model"]["runs"][str(seed)]
  if not settings.is_toy(config):
    return opened_checkpoint(config)._replace(fingerprint=entry["fingerprint"])
  model = load_model(context.path(entry["model"]), families.TOKENIZER.fingerprint)
  network = Network(model.graphdef, model.params)
  return Opened(network, plain_language(families.TOKENIZER), entry["fingerprint"])


def opened_checkpoint(config: Any) -> Opened:
  """Returns the checkpoint that the config names, on its devices; the last one is kept open."""
  return _opened_checkpoint(_plain(config.language_model), _plain(config.devices.mesh))


def _plain(section: Any) -> tuple[tuple[str, Any], ...]:
  """Returns a section's own fields, as what functions can be cached by."""
  fields = section.to_dict().items()
  return tuple(sorted((name, value) for name, value in fields if not isinstance(value, dict)))


@functools.lru_cache(maxsize=1)
def _opened_checkpoint(
  section: tuple[tuple[str, Any], ...], mesh_section: tuple[tuple[str, Any], ...]
) -> Opened:
  """Opens the checkpoint of a section and puts it on its devices, whole on none of them but the host."""
  fields = dict(section)
  mesh = model_mesh(dict(mesh_section))
  layers = None if fields["layers"] == "auto" else fields["layers"]
  with _host() if mesh is not None else contextlib.nullcontext():
    checkpoint = open_checkpoint(
      fields["checkpoint"], tokenizer=fields["tokenizer"] or None, dtype=fields["dtype"], layers=layers
    )
  network = checkpoint.network
  if not isinstance(checkpoint.spec, TransformerSpec):
    raise ValueError(
      f"language_model.checkpoint={fields['checkpoint']!r} holds a {type(checkpoint.spec).__name__}; heads read "
      "plain transformers"
    )
  if mesh is not None:
    placed = sharding.shardings(axes_of(checkpoint.spec), mesh, network.params)
    network = dataclasses.replace(network, params=jax.device_put(network.params, placed))
  return Opened(network, checkpoint_language(checkpoint, fields["chat_template"]), "", mesh)


def _host() -> Any:
  """Returns the context in which arrays are made in the host's memory."""
  return jax.default_device(jax.local_devices(backend="cpu")[0])


@contextlib.contextmanager
def open_tasks(context: StageContext) -> Iterator[dict[str, Task]]:
  """Gives the tasks of the experiments that are run, by name, with their judges; the same for all seeds."""
  config = context.config
  if settings.is_toy(config):
    yield {name: ToyTask(name) for name in settings.tasks_run(config)}
    return
  with tasks_of(config, opened_checkpoint(config)) as tasks:
    yield tasks


@contextlib.contextmanager
def tasks_of(config: Any, opened: Opened) -> Iterator[dict[str, Task]]:
  """Gives the tasks of a checkpoint that experiments use, with their judges.

  Args:
    config: the whole config.
    opened: the language model that writes.
  """
  specs = settings.task_specs(config)
  with opened_tasks(
    {name: specs[name] for name in settings.tasks_run(config)},
    opened.language,
    most=opened.network.max_length,
    system=config.language_model.system,
    mesh=opened.mesh,
  ) as tasks:
    yield tasks
