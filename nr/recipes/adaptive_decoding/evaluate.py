"""Stage `evaluate`: every head against fixed settings and other adaptive rules, on test prompts.

No head was trained on them; the language model was.
"""

import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nr.evaluation.winrates import winrate, wins
from nr.generation.language_models import Network
from nr.recipes.adaptive_decoding import families, language_model, pairs, pools, settings
from nr.recipes.adaptive_decoding.sampling import Written, with_head, write
from nr.recipes.stages import Artifact, StageContext, write_json
from nr.training.model_files import load_model

Scores = dict[str, dict[str, np.ndarray]]
"""Scores [P, N, 2] of an arm's responses by family, by arm."""


def run(context: StageContext) -> Artifact:
  """Samples every arm and compares the heads with all others."""
  config, artifact = context.config, {}
  for name, experiment in config.experiments.items():
    scores, picks = {}, {}
    for seed in config.seeds:
      scores[seed], picks[str(seed)] = _finished(context.directory / f"{name}_seed{seed}") or _evaluate(
        context, name, experiment, seed
      )
    artifact[name] = {
      "arms": {arm: rewards_of(scores, arm) for arm in scores[config.seeds[0]]},
      "picks": picks,
      "winrates": winrates(config, scores),
    }
  return artifact


def _evaluate(context: StageContext, name: str, experiment: Any, seed: int) -> tuple[Scores, dict]:
  """Evaluates a seed and keeps the result, so that an interrupted stage goes on behind it."""
  scores, picks = evaluate_seed(context, name, experiment, seed)
  arrays = {f"{arm}/{family}": values for arm, tasks in scores.items() for family, values in tasks.items()}
  stem = context.directory / f"{name}_seed{seed}"
  np.savez_compressed(stem.with_suffix(".npz"), **arrays)
  write_json(stem.with_suffix(".json"), picks)  # Last: it says that the other file is whole.
  return scores, picks


def _finished(stem: pathlib.Path) -> tuple[Scores, dict] | None:
  """Returns what an earlier attempt kept, if it got so far."""
  if not stem.with_suffix(".json").exists():
    return None
  scores: Scores = {}
  with np.load(stem.with_suffix(".npz"), allow_pickle=False) as arrays:
    for key in arrays.files:
      arm, _, family = key.rpartition("/")
      scores.setdefault(arm, {})[family] = arrays[key]
  return scores, json.loads(stem.with_suffix(".json").read_text())


def evaluate_seed(context: StageContext, name: str, experiment: Any, seed: int) -> tuple[Scores, dict]:
  """Returns the scores of every arm of one seed, and what the heads picked."""
  config = context.config
  network = language_model.open_network(context, seed)
  heads = context.inputs["heads"][f"{name}/{seed}"]["heads"]
  values = tuple(experiment["values"])
  scores: Scores = {}
  picks: dict[str, dict[str, Any]] = {}
  for family in experiment.families:
    purpose = (config.seed, seed, name, family, "test")
    random = settings.random_of(*purpose)
    prompts = families.make_prompts(family, experiment.num_test_prompts, random, "test")

    def record(arm: str, model: Network, family=family, prompts=prompts, purpose=purpose, **how: Any) -> None:
      written = write(
        model,
        prompts.tokens_PT,
        key=settings.key_of(*purpose, arm),
        num_samples=config.evaluate.num_samples,
        **how,
      )
      rewards_R2 = families.rewards(family, prompts, written.tokens_RN, written.lengths_R)
      scores.setdefault(arm, {})[family] = rewards_R2.reshape(len(prompts.tokens_PT), -1, 2)
      if head_of(arm) in heads:
        picks.setdefault(arm, {})[family] = pick_summary(written, values)

    for value in values:
      record(fixed(value), with_head(network, None, 1), law=pools.drawn(experiment, "greedy", (value,)))
    for variant, selection in itertools.product(heads, config.evaluate.selections):
      head = load_model(context.path(heads[variant]["model"]))
      arm = variant if selection == "greedy" else f"{variant}_{selection}"
      record(arm, with_head(network, head, len(values)), law=pools.drawn(experiment, selection))
    for baseline, chain in config.evaluate.baselines.items():
      record(baseline, network, chain=chain)
  counts = context.inputs["pairs"][f"{name}/{seed}"]["settings"]
  add_chosen_settings(scores, values, counts)
  return scores, picks


def head_of(arm: str) -> str:
  """Returns the variant whose head an arm samples with, or the arm's own name."""
  return arm.removesuffix("_sample")


def fixed(value: float) -> str:
  """Returns the name of the arm with one setting for all."""
  return f"fixed {value:g}"


def add_chosen_settings(scores: Scores, values: tuple[float, ...], counts: Mapping[str, Any]) -> None:
  """Adds arms that are one of the fixed ones, for all families or for each.

  `best_single` is what the training pairs prefer; `oracle` is, for every family, the one that wins most
  against all fixed ones on the test prompts themselves.
  """
  arms = [fixed(value) for value in values]
  best = arms[int(np.argmax(pairs.setting_scores(counts)))]
  oracle = {}
  for family in scores[best]:
    rates = [np.mean([wins(scores[arm][family], scores[other][family]) for other in arms]) for arm in arms]
    oracle[family] = scores[arms[int(np.argmax(rates))]][family]
  scores["best_single"], scores["oracle"] = dict(scores[best]), oracle


def pick_summary(written: Written, values: tuple[float, ...]) -> dict[str, Any]:
  """Returns which settings a head picked: histogram, mean, share that is not greedy, mean by position."""
  choices_RN, taus_K = written.choices_RN, np.asarray(values)
  is_token_RN = choices_RN >= 0
  counts_K = np.bincount(choices_RN[is_token_RN], minlength=len(values))
  taus_RN = np.where(is_token_RN, taus_K[choices_RN], 0.0)
  numbers_N = is_token_RN.sum(0)
  return {
    "histogram": (counts_K / counts_K.sum()).tolist(),
    "mean": float(taus_RN.sum() / is_token_RN.sum()),
    "not_lowest": float(1 - counts_K[int(np.argmin(taus_K))] / counts_K.sum()),
    "mean_by_position": (taus_RN.sum(0) / np.maximum(numbers_N, 1))[numbers_N > 0].tolist(),
  }


def rewards_of(scores: Mapping[int, Scores], arm: str) -> dict[str, Any]:
  """Returns the mean reward and quality of an arm by family, over seeds, and the rewards of each seed."""
  found = {}
  for family in next(iter(scores.values()))[arm]:
    of_seeds = np.stack([scores[seed][arm][family].mean(axis=(0, 1)) for seed in scores])
    found[family] = {
      "reward": float(of_seeds[:, 0].mean()),
      "quality": float(of_seeds[:, 1].mean()),
      "by_seed": of_seeds[:, 0].tolist(),
    }
  return found


def winrates(config: Any, scores: Mapping[int, Scores]) -> dict[str, dict[str, dict[str, float]]]:
  """Returns for each head's arm its winrate against every arm that is no head's, with its interval."""
  arms = list(next(iter(scores.values())))
  ours = [arm for arm in arms if head_of(arm) in config.heads.variants]
  found: dict[str, dict[str, dict[str, float]]] = {}
  for first in ours:
    for second in (arm for arm in arms if arm not in ours):
      points = [
        {family: wins(tasks, of_seed[second][family]) for family, tasks in of_seed[first].items()}
        for of_seed in scores.values()
      ]
      number = settings.number_of(config.seed, first, second)
      found.setdefault(first, {})[second] = winrate(
        points, seed=number, samples=config.evaluate.bootstrap_samples
      )._asdict()
  return found
