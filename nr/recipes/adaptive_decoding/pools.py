"""Stage `pools`: N scored responses to every training prompt, their temperatures drawn at random."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nr.data.pools import Pool
from nr.generation.adaptive_decoding import DrawnSetting
from nr.recipes.adaptive_decoding import language_model, settings
from nr.recipes.adaptive_decoding.drawing import Draw, choices_of, draw_pools, scores_of
from nr.recipes.adaptive_decoding.sampling import with_head
from nr.recipes.stages import Artifact, StageContext


def run(context: StageContext) -> Artifact:
  """Samples the pools of every seed and experiment with an untrained head, which is uniform."""
  config, artifact = context.config, {}
  with language_model.open_tasks(context) as tasks:
    for seed in config.seeds:
      opened = language_model.open_model(context, seed)
      for name, experiment in settings.experiments(config).items():
        of_tasks = [tasks[family] for family in experiment.families]
        artifact[f"{name}/{seed}"] = _draw(context, opened, name, experiment, of_tasks, seed)
  return artifact


def _draw(
  context: StageContext,
  opened: language_model.Opened,
  name: str,
  experiment: Any,
  tasks: Sequence[Any],
  seed: int,
) -> Artifact:
  """Draws the pools of an experiment and seed; returns what the artifact says of them."""
  config, values = context.config, tuple(experiment["values"])
  path = context.directory / f"{name}_seed{seed}.jsonl"
  adaptive = with_head(opened.network, None, len(values))
  entry: Artifact = {"path": context.relative(path), "mean_reward_by_setting": {}}
  for task in tasks:
    purpose = (config.seed, seed, name, task.name, "train")
    count = task.num_prompts or experiment.num_prompts
    prompts, left_out = task.prompts("train", count, settings.random_of(*purpose))
    draw = Draw(
      settings.key_of(*purpose),
      experiment.num_samples,
      law=drawn(experiment, "sample"),
      model=opened.fingerprint,
      seed=config.seed + seed,
    )
    room = opened.room(task, config.devices.prompts_per_call)
    pools = draw_pools(path, adaptive, task, prompts, room, draw, opened.language.tokenizer)
    entry["mean_reward_by_setting"][task.name] = reward_curve(
      choices_of(pools, task.max_new_tokens), scores_of(pools)[..., 0].reshape(-1), len(values)
    )
    problems = {"left_out": left_out, "unjudged": unjudged(pools)}
    for field, found in problems.items():
      if found:
        entry.setdefault(field, {})[task.name] = found
  return entry


def drawn(experiment: Any, selection: str, values: tuple[float, ...] | None = None) -> DrawnSetting:
  """Returns the law by which an experiment picks its settings."""
  values = tuple(experiment["values"]) if values is None else values
  return DrawnSetting(values, experiment.action, experiment.level, selection)


def reward_curve(choices_RN: np.ndarray, rewards_R: np.ndarray, count: int) -> list[float | None]:
  """Returns the mean reward by setting, a response counted as often as it has tokens drawn with it.

  None stands for a setting that was never drawn in a response with a reward.
  """
  judged_R = np.isfinite(rewards_R)
  choices_RN, rewards_R = choices_RN[judged_R], rewards_R[judged_R]
  curve: list[float | None] = []
  for setting in range(count):
    number_R = (choices_RN == setting).sum(axis=1)
    curve.append(float((number_R * rewards_R).sum() / number_R.sum()) if number_R.any() else None)
  return curve


def unjudged(pools: Sequence[Pool]) -> dict[str, int]:
  """Returns how many responses have no reward or no quality, by reason."""
  found: dict[str, int] = {}
  for pool in pools:
    for sample in pool.samples:
      if sample.score is None or "quality" not in sample.details:
        reason = sample.details.get("reason", "no reason was given")
        found[reason] = found.get(reason, 0) + 1
  return found
