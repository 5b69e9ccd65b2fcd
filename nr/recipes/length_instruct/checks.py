"""What can be refused before any device time is spent, by field, value and remedy."""

import os
import pathlib
from typing import Any

import jax

from nr.generation.transforms.text import parse
from nr.names import unknown
from nr.recipes.length_instruct import settings
from nr.recipes.length_instruct.augmentation import MIXES
from nr.recipes.policies import adapter_spec, check_base
from nr.recipes.sections import transformer_spec
from nr.training import defaults, sharding

BENCHMARKS = ("alpaca_eval_li", "mt_bench_li", "answered")


def validate(config: Any) -> None:
  """Checks everything that can be checked without data or device.

  Raises:
    ValueError: one line with field, value and remedy.
  """
  if not config.seeds or len(set(config.seeds)) != len(config.seeds):
    raise ValueError(f"seeds={config.seeds}: name at least one seed, each once, for example (0,)")
  settings.lift_spec(config)
  check_base(config.base)
  adapter_spec(config)
  _check_arms(config)
  _check_training(config)
  try:
    parse(config.evaluate.chain)
  except ValueError as error:
    raise ValueError(f"evaluate.chain: {error}") from error
  if settings.is_toy(config):
    _check_toy(config)
  else:
    _check_files(config)


def _check_training(config: Any) -> None:
  named = {"base.train": lambda: config.base.train, "train": lambda: config.train}
  for arm in settings.arm_names(config):
    named[f"arms.{arm}.train"] = lambda arm=arm: settings.train_section(config, arm)
  for name, section_of in named.items():
    try:
      section = section_of()
      defaults.validate(section, sharding.mesh_sizes(section.mesh, jax.device_count()), jax.process_count())
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from error


def _check_arms(config: Any) -> None:
  for name in config.arms:
    mix = config.arms[name].mix
    if mix and mix not in MIXES:
      raise ValueError(unknown(f"arms.{name}.mix", mix, MIXES) + ", or '' to leave the arm out")
    try:
      settings.preference_spec(config, name)
    except ValueError as error:
      raise ValueError(f"arms.{name}.loss: {error}") from error
  if settings.REFERENCE_ARM in config.arms:
    raise ValueError(
      f"arms.{settings.REFERENCE_ARM}: this name is the model that arms begin from; choose another"
    )
  if settings.is_toy(config) and not settings.arm_names(config):
    raise ValueError("arms: every mix is empty; give at least one arm a mix, such as 'union'")


def _check_toy(config: Any) -> None:
  world, spec = settings.world_of(config), settings.lift_spec(config)
  if config.data.pairs:
    raise ValueError(
      f"data.pairs={config.data.pairs!r}: needs base.checkpoint; without one pairs are sampled in the toy world"
    )
  tokenizer = world.tokenizer()
  tokenizer.encode(spec.render(world.instructions[0], world.max_limit))
  if world.max_words + spec.margin > world.max_limit:
    raise ValueError(
      f"world.max_limit={world.max_limit}: the loosest limit is world.max_words + lift.margin = "
      f"{world.max_words + spec.margin}; raise max_limit to that"
    )
  needed = len(tokenizer.encode(spec.render(world.instructions[0], 1))) + world.max_words + 1
  if config.data.max_length < needed:
    raise ValueError(
      f"data.max_length={config.data.max_length}: the longest text of the world has {needed} tokens"
    )
  for limit in config.evaluate.limits:
    if not 1 <= limit <= world.max_limit:
      raise ValueError(f"evaluate.limits holds {limit}: give limits in 1..world.max_limit={world.max_limit}")
  transformer_spec(config.base.model, tokenizer.vocab_size, config.data.max_length)


def _check_files(config: Any) -> None:
  if settings.arm_names(config) and not config.data.pairs and not config.pools.instructions:
    raise ValueError(
      "data.pairs='': a checkpoint needs preference pairs; name a JSON lines file of them, or of instructions in "
      "pools.instructions for pairs of its own responses, or leave all arms out"
    )
  if config.data.pairs and config.pools.instructions:
    raise ValueError(
      f"data.pairs={config.data.pairs!r} and pools.instructions={config.pools.instructions!r}: pairs are given or "
      "made; leave one of the two empty"
    )
  named = {
    "base.checkpoint": config.base.checkpoint,
    "base.responses": config.base.responses,
    "data.pairs": config.data.pairs,
    "pools.instructions": config.pools.instructions,
    "pools.judge.path": config.pools.judge.path,
    **{
      f"evaluate.{name}": config.evaluate[name]
      for name in ("alpaca_eval_li", "mt_bench_li", "mt_bench_li_baselines", "answered")
    },
  }
  for field, path in named.items():
    if path and not pathlib.Path(path).exists():
      raise ValueError(f"{field}={path!r}: no such file or folder; '~' stands for nothing here, write it out")
  if not any(config.evaluate[name] for name in BENCHMARKS):
    raise ValueError(
      "evaluate.alpaca_eval_li='': name at least one benchmark file, there is nothing to measure on"
    )
  _check_server("evaluate.judge", config.evaluate.judge)
  asked = config.evaluate
  if asked.judge.url and asked.mt_bench_li and not asked.mt_bench_li_baselines:
    raise ValueError(
      "evaluate.mt_bench_li_baselines='': a judge compares with baselines; name their file, or no evaluate.judge.url"
    )
  if settings.is_sampling(config):
    _check_pools(config)


def _check_server(field: str, judge: Any) -> None:
  if judge.url and judge.api_key_variable and not os.environ.get(judge.api_key_variable):
    raise ValueError(
      f"{field}.api_key_variable={judge.api_key_variable!r}: no such environment variable is set; set it, or ''"
    )


def _check_pools(config: Any) -> None:
  pools = config.pools
  if pools.judge.kind not in settings.JUDGES:
    raise ValueError(unknown("pools.judge.kind", pools.judge.kind, settings.JUDGES))
  fields = settings.instruction_fields(config)
  needed = {
    "reference": ("pools.fields.reference", fields.reference, "name the field that holds an answer"),
    "reward_model": ("pools.judge.path", pools.judge.path, "name the folder of a reward model"),
    "language_model": (
      "pools.judge.url",
      pools.judge.url,
      "give the address of a server with OpenAI's interface",
    ),
  }
  field, value, remedy = needed.get(pools.judge.kind, ("", "none", ""))
  if not value:
    raise ValueError(f"{field}='': pools.judge.kind={pools.judge.kind!r} needs it; {remedy}")
  _check_server("pools.judge", pools.judge)
  least = 1 if pools.judge.kind == "reference" else 2
  if pools.num_samples < least:
    raise ValueError(f"pools.num_samples={pools.num_samples}: give at least {least} responses an instruction")
  for field in ("max_new_tokens", "pairs_per_prompt"):
    if pools[field] < 1:
      raise ValueError(f"pools.{field}={pools[field]}: give at least 1")
  if pools.max_new_tokens >= config.data.max_length:
    raise ValueError(
      f"pools.max_new_tokens={pools.max_new_tokens}: data.max_length={config.data.max_length} leaves no room for an "
      "instruction; lower the one or raise the other"
    )
  try:
    parse(pools.chain)
  except ValueError as error:
    raise ValueError(f"pools.chain: {error}") from error
