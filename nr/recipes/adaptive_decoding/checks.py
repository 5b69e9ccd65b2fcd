"""What can be refused before any device time is spent, by field, value and remedy."""

import pathlib
from collections.abc import Iterable
from typing import Any

import jax

from nr import names
from nr.chat_templates import BUILT_IN
from nr.generation.adaptive_decoding import LEVELS, SELECTIONS, check_values
from nr.generation.transforms import parse
from nr.models.transformer_spec import DTYPES
from nr.recipes.adaptive_decoding import families, settings
from nr.recipes.adaptive_decoding.method import latent_preference_method
from nr.recipes.adaptive_decoding.pair_rules import RULES
from nr.recipes.languages import OWN_TEMPLATE
from nr.training import defaults, sharding
from nr.training.next_token import next_token_method
from nr.training.optimizers import make_optimizer
from nr.training.state import abstract_state, state_shardings

_ANY_WIDTH = 8
"""Stands for the width of a checkpoint, which is known when it is opened."""


def validate(config: Any) -> None:
  """Checks everything that can be checked without data or device.

  Raises:
    ValueError: one line with field, value and remedy.
  """
  if not config.seeds:
    raise ValueError("seeds=() is empty; name at least one seed, for example (0,)")
  repeated = sorted(seed for seed in set(config.seeds) if list(config.seeds).count(seed) > 1)
  if repeated:
    raise ValueError(
      f"seeds={tuple(config.seeds)}: {repeated[0]} is there more than once; name each seed once"
    )
  _check_heads(config)
  _check_devices(config)
  if settings.is_toy(config):
    for family in config.language_model.families:
      families.family_of(family)
    spec = settings.transformer_spec(config)
    _check_training("language_model", config.language_model.train, next_token_method(spec))
  else:
    _check_checkpoint(config)
  specs = settings.task_specs(config)
  for name, experiment in config.experiments.items():
    try:
      _check_families(config, experiment, specs)
    except ValueError as error:
      raise ValueError(f"experiments.{name}: {error}") from error
  run = settings.experiments(config)
  if not run:
    raise ValueError(_nothing_to_run(config))
  for name, experiment in run.items():
    try:
      _check_experiment(config, experiment, specs)
    except ValueError as error:
      raise ValueError(f"experiments.{name}: {error}") from error
  for family in settings.tasks_run(config):
    if family in specs:
      _check_task(config, family, specs[family])
  for selection in config.evaluate.selections:
    _known("evaluate.selections", selection, SELECTIONS)
  for name, chain in config.evaluate.baselines.items():
    try:
      parse(chain)
    except ValueError as error:
      raise ValueError(f"evaluate.baselines.{name}: {error}") from error


def _nothing_to_run(config: Any) -> str:
  if settings.is_toy(config):
    return "language_model.checkpoint='': this variant's experiments are of a checkpoint's tasks; name a checkpoint"
  missing = [field for fields in settings.left_out(config).values() for field in fields]
  if missing:
    return f"{missing[0]}='': no experiment has all that its tasks need; name the file or folder"
  return (
    f"language_model.checkpoint={config.language_model.checkpoint!r}: this variant's experiments are of toys; "
    "choose a variant with tasks, such as 'smollm', or leave the checkpoint out"
  )


def _check_heads(config: Any) -> None:
  if not config.heads.variants:
    raise ValueError("heads.variants=() is empty; name at least one, for example ('separate',)")
  if config.heads.epochs < 0:
    raise ValueError(f"heads.epochs={config.heads.epochs}: give 0 (heads.train.steps decide) or more")
  if config.heads.epochs and config.heads.patience < 1:
    raise ValueError(f"heads.patience={config.heads.patience}: give at least 1 epoch")


def _check_devices(config: Any) -> None:
  devices = config.devices
  for field in ("prompts_per_call", "pairs_per_call"):
    if devices[field] < 1:
      raise ValueError(f"devices.{field}={devices[field]}: give at least 1")
  if devices.loss_chunk < 0:
    raise ValueError(f"devices.loss_chunk={devices.loss_chunk}: give 0 (all) or more tokens")
  try:
    sizes = sharding.mesh_sizes(devices.mesh, jax.device_count())
  except ValueError as error:
    raise ValueError(str(error).replace("training.mesh", "devices.mesh")) from error
  ways = sizes["data"] * sizes["fsdp"]
  if devices.pairs_per_call % ways:
    raise ValueError(
      f"devices.pairs_per_call={devices.pairs_per_call} is not divided by the mesh's data x fsdp = {ways}; "
      f"use a multiple of {ways}"
    )


def _check_checkpoint(config: Any) -> None:
  model = config.language_model
  for field in ("checkpoint", "tokenizer"):
    if model[field] and not pathlib.Path(model[field]).expanduser().exists():
      raise ValueError(f"language_model.{field}={model[field]!r}: there is no such file or folder")
  _known("language_model.dtype", model.dtype, DTYPES)
  _known("language_model.layers", model.layers, ("auto", "scan", "unroll"))
  if model.chat_template:
    _known("language_model.chat_template", model.chat_template, (OWN_TEMPLATE, *BUILT_IN))
  if model.system and not model.chat_template:
    raise ValueError(f"language_model.system={model.system!r}: needs language_model.chat_template; name one")


def _check_families(config: Any, experiment: Any, specs: Any) -> None:
  """Refuses names that are neither toys nor tasks, and the two kinds together."""
  if not experiment.families:
    raise ValueError("families=() is empty; name at least one task")
  for family in experiment.families:
    if family not in specs:
      if any(each in specs for each in experiment.families):
        raise ValueError(names.unknown("family", family, specs))
      families.family_of(family)
      if settings.is_toy(config) and family not in config.language_model.families:
        raise ValueError(
          f"families={tuple(experiment.families)}: the language model does not learn {family!r}; add it to "
          "language_model.families"
        )


def _check_experiment(config: Any, experiment: Any, specs: Any) -> None:
  _known("level", experiment.level, LEVELS)
  _known("pair_rule", experiment.pair_rule, RULES)
  check_values(experiment.action, tuple(experiment["values"]))
  if experiment.num_samples < 2:
    raise ValueError(f"num_samples={experiment.num_samples}: a pair needs at least 2 responses")
  if experiment.pair_rule == "constraint" and not 1 <= experiment.pair_top <= experiment.num_samples // 2:
    raise ValueError(
      f"pair_top={experiment.pair_top}: give 1 to half of num_samples={experiment.num_samples}"
    )
  if not 0 < experiment.held_out < 1:
    raise ValueError(f"held_out={experiment.held_out}: give a share of the training prompts in (0, 1)")
  for field in ("num_prompts", "num_test_prompts", "num_tuning_prompts", "votes"):
    fewest = 1 if settings.is_toy(config) and field in ("num_prompts", "num_test_prompts") else 0
    if experiment[field] < fewest:
      raise ValueError(f"{field}={experiment[field]}: give {fewest} or more")
  _check_votes(config, experiment, specs)
  head = settings.head_spec(config, experiment, None if settings.is_toy(config) else _ANY_WIDTH)
  for variant in config.heads.variants:
    spec = settings.loss_spec(config, experiment, variant)
    if spec.needs_words and experiment.action != "temperature":
      raise ValueError(
        f"action={experiment.action!r}: heads.variants has {variant!r}, whose words are known for temperatures "
        "only; leave it out, or use action='temperature'"
      )
    method = latent_preference_method(head, spec, tuple(experiment["values"]))
    _check_training("heads", config.heads.train, method)


def _check_votes(config: Any, experiment: Any, specs: Any) -> None:
  if not experiment.votes:
    return
  if settings.is_toy(config) and not experiment.num_tuning_prompts:
    raise ValueError("num_tuning_prompts=0: name how many training prompts the fixed settings vote on")
  answering = {name for name, spec in specs.items() if spec.judge_spec.finds_answers} | {"sums"}
  silent = [family for family in experiment.families if family not in answering]
  if silent:
    raise ValueError(
      f"votes={experiment.votes}: the judge of {silent[0]!r} finds no answers to vote on; set votes=0, or take "
      "judge.kind 'number', 'math' or 'exact'"
    )


def _check_task(config: Any, name: str, spec: Any) -> None:
  try:
    spec.check()
    if spec.is_chat and not config.language_model.chat_template:
      raise ValueError(
        "is_chat=True: language_model.chat_template is ''; name a template, or set is_chat=False"
      )
  except ValueError as error:
    raise ValueError(f"tasks.{name}.{error}") from error


def _known(field: str, value: str, known: Iterable[str]) -> None:
  if value not in known:
    raise ValueError(names.unknown(field, value, known))


def _check_training(name: str, section: Any, method: Any) -> None:
  try:
    sizes = sharding.mesh_sizes(section.mesh, jax.device_count())
    defaults.validate(section, sizes, jax.process_count())
    state_shardings(
      method, abstract_state(method, make_optimizer(section, method)), sharding.make_mesh(section.mesh)
    )
  except ValueError as error:
    raise ValueError(f"{name}.train: {error}") from error
