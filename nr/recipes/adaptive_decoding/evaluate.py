"""Stage `evaluate`: every head against fixed settings and other adaptive rules, on test prompts.

No head was trained on them; a language model that was trained here was. What is drawn is kept as pools, a
file an arm and task, so that an interrupted stage goes on behind them.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nr.data.pools import Pool
from nr.evaluation.winrates import winrate, wins
from nr.generation.constraints.vocabulary import token_bytes
from nr.generation.language_models import Network
from nr.recipes.adaptive_decoding import language_model, pairs, pools, settings
from nr.recipes.adaptive_decoding.drawing import Draw, choices_of, draw_pools, scores_of
from nr.recipes.adaptive_decoding.sampling import with_head
from nr.recipes.adaptive_decoding.tasks.protocol import Task, TaskPrompt
from nr.recipes.adaptive_decoding.voting import vote_report, votes_of
from nr.recipes.stages import Artifact, StageContext
from nr.training.model_files import load_model

Scores = dict[str, dict[str, np.ndarray]]
"""Scores [P, N, 2] of an arm's responses by family, by arm."""
COMPONENTS = ("reward", "quality")


def run(context: StageContext) -> Artifact:
  """Samples every arm and compares the heads with all others."""
  config, artifact = context.config, {}
  experiments = settings.experiments(config)
  drawn: dict[str, dict[int, _Evaluation]] = {name: {} for name in experiments}
  with language_model.open_tasks(context) as tasks:
    for name, seed in itertools.product(experiments, config.seeds):
      drawn[name][seed] = _Evaluation(context, name, experiments[name], seed)
      drawn[name][seed].run(tasks)
  for name, experiment in experiments.items():
    seeds = drawn[name]
    scores = {seed: each.scores for seed, each in seeds.items()}
    artifact[name] = {
      "arms": {arm: rewards_of(scores, arm) for arm in scores[config.seeds[0]]},
      "picks": {str(seed): each.picks for seed, each in seeds.items()},
      "winrates": winrates(config, scores),
    }
    if has_quality(scores):
      artifact[name]["winrates_by_score"] = {
        component: winrates(config, component_of(scores, place)) for place, component in enumerate(COMPONENTS)
      }
    if experiment.votes:
      artifact[name]["votes"] = vote_report(
        {seed: each.votes for seed, each in seeds.items()},
        {seed: each.tuning for seed, each in seeds.items()},
        [arm for arm in scores[config.seeds[0]] if head_of(arm) in config.heads.variants],
        experiment.votes,
        purpose=(config.seed, name, "votes"),
        samples=config.evaluate.bootstrap_samples,
      )
  return artifact


class _Evaluation:
  """All arms of one experiment and seed.

  Attributes:
    scores: by arm and task.
    picks: what heads picked, by arm and task.
    votes, tuning: by arm and task, where the experiment votes.
  """

  def __init__(self, context: StageContext, name: str, experiment: Any, seed: int):
    self.context, self.config, self.name = context, context.config, name
    self.experiment, self.seed, self.values = experiment, seed, tuple(experiment["values"])
    self.heads = context.inputs["heads"][f"{name}/{seed}"]["heads"]
    self.folder = context.directory / f"{name}_seed{seed}"
    self.scores: Scores = {}
    self.picks: dict[str, dict[str, Any]] = {}
    self.votes: dict[str, dict[str, np.ndarray]] = {}
    self.tuning: dict[str, dict[str, np.ndarray]] = {}

  def run(self, tasks: Mapping[str, Task]) -> None:
    """Draws the responses of every arm to every task."""
    self.opened = language_model.open_model(self.context, self.seed)
    for family in self.experiment.families:
      self._run_task(tasks[family])
    counts = self.context.inputs["pairs"][f"{self.name}/{self.seed}"]["settings"]
    add_chosen_settings(self.scores, self.values, counts)

  def _run_task(self, task: Task) -> None:
    config, experiment = self.config, self.experiment
    purpose = (config.seed, self.seed, self.name, task.name, "test")
    count = task.num_test_prompts or experiment.num_test_prompts
    prompts = task.prompts("test", count, settings.random_of(*purpose)).prompts
    network = self.opened.network
    for value in self.values:
      self._record(task, prompts, fixed(value), *self._fixed(value), purpose)
    for variant, selection in itertools.product(self.heads, config.evaluate.selections):
      head = load_model(self.context.path(self.heads[variant]["model"]))
      arm = variant if selection == "greedy" else f"{variant}_{selection}"
      model = with_head(network, head, len(self.values))
      self._record(task, prompts, arm, model, {"law": pools.drawn(experiment, selection)}, purpose)
    for baseline, chain in config.evaluate.baselines.items():
      self._record(task, prompts, baseline, network, {"chain": chain}, purpose)
    if experiment.votes:
      self._tune(task)

  def _fixed(self, value: float) -> tuple[Network, dict[str, Any]]:
    """Returns the network and the law of a fixed setting."""
    law = pools.drawn(self.experiment, "greedy", (value,))
    return with_head(self.opened.network, None, 1), {"law": law}

  def _record(
    self,
    task: Task,
    prompts: Sequence[TaskPrompt],
    arm: str,
    network: Network,
    how: Mapping[str, Any],
    purpose: tuple[Any, ...],
  ) -> None:
    """Draws an arm's responses and notes what they say of it."""
    num_samples = max(self.config.evaluate.num_samples, self.experiment.votes)
    found = self._draw(task, prompts, arm, network, how, purpose, num_samples, "")
    self.scores.setdefault(arm, {})[task.name] = scores_of(found)
    if head_of(arm) in self.heads:
      summary = pick_summary(choices_of(found, task.max_new_tokens), self.values)
      self.picks.setdefault(arm, {})[task.name] = summary
      if not settings.is_toy(self.config):
        summary |= self._sentence_summary(found)
    if self.experiment.votes:
      self.votes.setdefault(arm, {})[task.name] = votes_of(found, self.experiment.votes)

  def _tune(self, task: Task) -> None:
    """Lets every fixed setting vote on training prompts."""
    purpose = (self.config.seed, self.seed, self.name, task.name, "tuning")
    count = self.experiment.num_tuning_prompts
    prompts = task.prompts("train", count, settings.random_of(*purpose)).prompts
    for value in self.values:
      network, how = self._fixed(value)
      votes = self.experiment.votes
      found = self._draw(task, prompts, fixed(value), network, how, purpose, votes, "tuning_")
      self.tuning.setdefault(fixed(value), {})[task.name] = votes_of(found, votes)

  def _draw(
    self,
    task: Task,
    prompts: Sequence[TaskPrompt],
    arm: str,
    network: Network,
    how: Mapping[str, Any],
    purpose: tuple[Any, ...],
    num_samples: int,
    prefix: str,
  ) -> list[Pool]:
    key, opened = settings.key_of(*purpose, arm), self.opened
    draw = Draw(key, num_samples, model=opened.fingerprint, seed=self.config.seed + self.seed, **how)
    path = self.folder / f"{prefix}{arm.replace(' ', '_')}_{task.name}.jsonl"
    room = opened.room(task, self.config.devices.prompts_per_call)
    return draw_pools(path, network, task, prompts, room, draw, opened.language.tokenizer)

  def _sentence_summary(self, found: Sequence[Pool]) -> dict[str, float | None]:
    """Returns the mean setting at the first tokens of sentences, and elsewhere (the paper's figure 5)."""
    firsts, others = [], []
    taus_K, pieces = np.asarray(self.values), pieces_of_tokens(self.opened.language.tokenizer)
    for sample in (sample for pool in found for sample in pool.samples):
      taus_T = taus_K[list(sample.extras["choices"])]
      is_first_T = begins_sentence([pieces[token] for token in sample.tokens])
      firsts.append(taus_T[is_first_T])
      others.append(taus_T[~is_first_T])
    means = (np.concatenate(each) for each in (firsts, others))
    return {
      name: float(mean.mean()) if mean.size else None
      for name, mean in zip(("mean_at_first", "mean_elsewhere"), means)
    }


def pieces_of_tokens(tokenizer: Any) -> list[str]:
  """Returns the text that each id spells inside a text, spaces included; "" for control ids."""
  spelled = token_bytes(getattr(tokenizer, "tokenizer", tokenizer))  # a chat's tokenizer wraps another
  return [(piece or b"").decode("utf-8", "replace") for piece in spelled]


def begins_sentence(pieces: Sequence[str]) -> np.ndarray:
  """Returns bool [T], which tokens begin a sentence: the first, and those with space behind a full stop.

  A token counts as space where its text begins with it. Where a line ends, the next token with a letter or a
  digit begins a sentence too.

  Args:
    pieces: text of each token.

  >>> begins_sentence([" A", " dog", ".", " It", " ran", "!", "\\n", "Yes"]).tolist()
  [True, False, False, True, False, False, False, True]
  """
  found, is_ended, is_due = [], False, True
  for piece in pieces:
    is_due = is_due or (is_ended and piece[:1].isspace())
    has_word = any(map(str.isalnum, piece))
    found.append(is_due and has_word)
    is_due = (is_due and not has_word) or "\n" in piece
    stripped = piece.strip().rstrip("\"'”’)]*_")
    is_ended = stripped[-1:] in (".", "!", "?") if stripped else is_ended
  return np.asarray(found, bool)


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
    rates = [
      np.mean([np.nanmean(wins(scores[arm][family], scores[other][family])) for other in arms])
      for arm in arms
    ]
    oracle[family] = scores[arms[int(np.argmax(rates))]][family]
  scores["best_single"], scores["oracle"] = dict(scores[best]), oracle


def pick_summary(choices_RN: np.ndarray, values: tuple[float, ...]) -> dict[str, Any]:
  """Returns which settings a head picked: histogram, mean, share that is not greedy, mean by position."""
  taus_K = np.asarray(values)
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
  """Returns the mean reward and quality of an arm by family, over seeds, and the rewards of each seed.

  Where responses could not be judged, the mean is that of the others, and their number is `unjudged`.
  """
  found = {}
  for family in next(iter(scores.values()))[arm]:
    missing = sum(int(np.isnan(scores[seed][arm][family]).any(-1).sum()) for seed in scores)
    mean = np.nanmean if missing else np.mean
    of_seeds = np.stack([mean(scores[seed][arm][family], axis=(0, 1)) for seed in scores])
    found[family] = {
      "reward": float(of_seeds[:, 0].mean()),
      "quality": float(of_seeds[:, 1].mean()),
      "by_seed": of_seeds[:, 0].tolist(),
    }
    if missing:
      found[family]["unjudged"] = missing
  return found


def has_quality(scores: Mapping[int, Scores]) -> bool:
  """Whether quality is another number than the reward in some task."""
  every = [values for of_seed in scores.values() for tasks in of_seed.values() for values in tasks.values()]
  return any(not np.array_equal(values[..., 0], values[..., 1], equal_nan=True) for values in every)


def component_of(scores: Mapping[int, Scores], place: int) -> dict[int, Scores]:
  """Returns the rewards (0) or the qualities (1) alone."""
  return {
    seed: {
      arm: {task: values[..., place : place + 1] for task, values in tasks.items()}
      for arm, tasks in of_seed.items()
    }
    for seed, of_seed in scores.items()
  }


def winrates(config: Any, scores: Mapping[int, Scores]) -> dict[str, dict[str, dict[str, float]]]:
  """Returns for each head's arm its winrate against every arm that is no head's, with its interval.

  Prompts without a response that could be judged are left out.
  """
  arms = list(next(iter(scores.values())))
  ours = [arm for arm in arms if head_of(arm) in config.heads.variants]
  found: dict[str, dict[str, dict[str, float]]] = {}
  for first in ours:
    for second in (arm for arm in arms if arm not in ours):
      points = [
        {family: _known(wins(tasks, of_seed[second][family])) for family, tasks in of_seed[first].items()}
        for of_seed in scores.values()
      ]
      number = settings.number_of(config.seed, first, second)
      found.setdefault(first, {})[second] = winrate(
        points, seed=number, samples=config.evaluate.bootstrap_samples
      )._asdict()
  return found


def _known(points_P: np.ndarray) -> np.ndarray:
  return points_P[np.isfinite(points_P)]
