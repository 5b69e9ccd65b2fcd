"""What can be refused before any device time is spent, by field, value and remedy."""

from typing import Any

import jax

from nr import names
from nr.generation.adaptive_decoding import LEVELS, SELECTIONS, check_values
from nr.generation.transforms import parse
from nr.recipes.adaptive_decoding import families, settings
from nr.recipes.adaptive_decoding.method import latent_preference_method
from nr.recipes.adaptive_decoding.pair_rules import RULES
from nr.training import defaults, sharding
from nr.training.next_token import next_token_method
from nr.training.optimizers import make_optimizer
from nr.training.state import abstract_state, state_shardings


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
  if not config.heads.variants:
    raise ValueError("heads.variants=() is empty; name at least one, for example ('separate',)")
  for family in config.language_model.families:
    families.family_of(family)
  spec = settings.transformer_spec(config)
  _check_training("language_model", config.language_model.train, next_token_method(spec))
  for name, experiment in config.experiments.items():
    try:
      _check_experiment(config, experiment)
    except ValueError as error:
      raise ValueError(f"experiments.{name}: {error}") from error
  for selection in config.evaluate.selections:
    _known("evaluate.selections", selection, SELECTIONS)
  for name, chain in config.evaluate.baselines.items():
    try:
      parse(chain)
    except ValueError as error:
      raise ValueError(f"evaluate.baselines.{name}: {error}") from error


def _check_experiment(config: Any, experiment: Any) -> None:
  for family in experiment.families:
    families.family_of(family)
    if family not in config.language_model.families:
      raise ValueError(
        f"families={tuple(experiment.families)}: the language model does not learn {family!r}; add it to "
        "language_model.families"
      )
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
  head = settings.head_spec(config, experiment)
  for variant in config.heads.variants:
    spec = settings.loss_spec(config, experiment, variant)
    if spec.needs_words and experiment.action != "temperature":
      raise ValueError(
        f"action={experiment.action!r}: heads.variants has {variant!r}, whose words are known for temperatures "
        "only; leave it out, or use action='temperature'"
      )
    method = latent_preference_method(head, spec, tuple(experiment["values"]))
    _check_training("heads", config.heads.train, method)


def _known(field: str, value: str, known: Any) -> None:
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
