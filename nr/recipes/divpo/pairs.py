"""From pools to pairs: best against worst, or the most diverse of the good against the least of the bad."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from nr.data.pools import Pool
from nr.data.preferences import PreferencePair
from nr.judges.diversity import frequency_diversity, frequency_of_attributes, jaccard_diversity
from nr.names import unknown
from nr.objectives import pair_selection
from nr.recipes.divpo.personas import Task
from nr.recipes.round_examples import scores_of
from nr.spec import Spec

METHODS = ("", "dpo", "divpo", "grpo")
REWARDS = ("score", "score_times_diversity")
# Criteria with values in -1..0 or 0..1, and what shifts them to 0..1.
BOUNDED = {"frequency": 1.0, "attribute_frequency": 1.0, "jaccard": 0.0}
CRITERIA = ("probability", "frequency", "attribute_frequency", "jaccard", "random")


@dataclasses.dataclass(frozen=True)
class SelectionSpec(Spec):
  """Which two responses of a pool make a pair (arXiv 2501.18101, algorithm 1).

  Attributes:
    method: "dpo" takes the first best and the first worst; "divpo" the most diverse of the
      good and the least diverse of the bad; "grpo" makes no pairs: all responses are learnt
      from, by their advantage over the pool; "" leaves the arm out.
    criterion: of diversity. "probability": improbable under the policy that wrote it;
      "frequency": words that few others use; "attribute_frequency": the same by attribute;
      "jaccard": words unlike the others'; "random": none, which shows what the criterion is worth.
    norm: of "probability": "mean" over tokens or "sum".
    rho: share of the reward scale that counts as good and as bad, 0 to 0.5.
    rule: reading of rho: "range", "count" or "absolute".
    thresholds: (good, bad) rewards of "absolute".
    tie_policy: of pools whose rewards are all equal: "diversity_only" or "skip".
    reward: of "grpo": the judge's "score", or "score_times_diversity" as in DARLING
      (arXiv 2509.02534), with the criterion as diversity in 0..1 in place of its learned partition.
  """

  method: str = "divpo"
  criterion: str = "probability"
  norm: str = "mean"
  rho: float = 0.0
  rule: str = "range"
  thresholds: tuple[float, float] | None = None
  tie_policy: str = "diversity_only"
  reward: str = "score"

  def __post_init__(self):
    checked = dict(
      method=METHODS,
      criterion=CRITERIA,
      norm=("mean", "sum"),
      rule=pair_selection.RULES,
      tie_policy=pair_selection.TIE_POLICIES,
      reward=REWARDS,
    )
    for field, allowed in checked.items():
      if getattr(self, field) not in allowed:
        raise ValueError(unknown(field, getattr(self, field), allowed))
    if not 0 <= self.rho <= 0.5:
      raise ValueError(f"rho={self.rho}: give a share from 0 to 0.5")
    if self.reward != "score" and (self.method != "grpo" or self.criterion not in BOUNDED):
      raise ValueError(
        f"reward={self.reward!r} with method={self.method!r}, criterion={self.criterion!r}: it needs method "
        f"'grpo' and one of {', '.join(BOUNDED)}, which are bounded"
      )
    if (self.rule == "absolute") != (self.thresholds is not None):
      raise ValueError(
        f"thresholds={self.thresholds} with rule={self.rule!r}: only 'absolute' takes them, and must"
      )
    if self.thresholds is not None and (len(self.thresholds) != 2 or self.thresholds[0] < self.thresholds[1]):
      raise ValueError(f"thresholds={self.thresholds}: give (good, bad) with good >= bad")


def make_pairs(pools: list[Pool], spec: SelectionSpec, task: Task, seed: int = 0) -> list[PreferencePair]:
  """Returns the pairs of pools; a pool may have none to give.

  Args:
    pools: scored, with tokens and log-probabilities.
    spec: which pairs.
    task: reads attributes.
    seed: of the criterion "random".
  """
  rewards_BN = scores_of(pools)
  if spec.method == "dpo":
    picked = pair_selection.best_and_worst(rewards_BN)
  else:
    diversity_BN = _diversities(pools, rewards_BN.shape, spec, task, seed)
    picked = pair_selection.select_pairs(
      rewards_BN,
      diversity_BN,
      spec.rho,
      rule=spec.rule,
      tie_policy=spec.tie_policy,
      thresholds=spec.thresholds,
    )
  chosen_B, rejected_B, weight_B = jax.device_get(picked)
  return [
    _pair(pool, int(chosen), int(rejected))
    for pool, chosen, rejected, weight in zip(pools, chosen_B, rejected_B, weight_B)
    if weight
  ]


def pool_rewards(pools: list[Pool], spec: SelectionSpec, task: Task) -> np.ndarray:
  """Returns the rewards [B, N] that GRPO learns from, NaN where a response has none."""
  rewards_BN = scores_of(pools)
  if spec.reward == "score":
    return rewards_BN
  diversity_BN = _diversities(pools, rewards_BN.shape, spec, task, 0) + BOUNDED[spec.criterion]
  return np.where(rewards_BN == 0, 0.0, rewards_BN * diversity_BN)


def _diversities(
  pools: list[Pool], shape: tuple[int, ...], spec: SelectionSpec, task: Task, seed: int
) -> np.ndarray:
  diversity_BN = np.full(shape, np.nan, np.float32)
  for row, pool in enumerate(pools):
    diversity_BN[row, : len(pool.samples)] = _diversity(pool, spec, task, seed)
  return diversity_BN


def _diversity(pool: Pool, spec: SelectionSpec, task: Task, seed: int) -> np.ndarray:
  """Returns the diversity of each sample; NaN for one that failed, which then is never picked."""
  found = np.full(len(pool.samples), np.nan)
  there = [place for place, sample in enumerate(pool.samples) if sample.text is not None]
  if there:
    measured = _MEASURES[spec.criterion](pool, there, spec, task, seed)
    # A text without words is like no other and like all: it counts as the least diverse.
    found[there] = np.where(np.isnan(measured), -BOUNDED.get(spec.criterion, 0.0), measured)
  return found


def _improbability(pool: Pool, there: list[int], spec: SelectionSpec, task: Task, seed: int) -> np.ndarray:
  del task, seed
  samples = [pool.samples[place] for place in there]
  sums = np.array([sum(sample.log_probs) for sample in samples])
  lengths = np.array([len(sample.log_probs) for sample in samples])
  return np.asarray(pair_selection.sequence_diversity(sums, lengths, spec.norm))


def _by_text(measure: Callable) -> Callable:
  def measured(pool: Pool, there: list[int], spec: SelectionSpec, task: Task, seed: int) -> np.ndarray:
    del spec, task, seed
    return measure([pool.samples[place].text for place in there])

  return measured


def _by_attribute(pool: Pool, there: list[int], spec: SelectionSpec, task: Task, seed: int) -> np.ndarray:
  """Attributes of what is no valid response count as a value of their own."""
  del spec, seed
  missing = {attribute: "" for attribute in task.attributes}
  objects = [task.read(pool.samples[place].text) or missing for place in there]
  return frequency_of_attributes(objects, task.attributes)


def _random(pool: Pool, there: list[int], spec: SelectionSpec, task: Task, seed: int) -> np.ndarray:
  del spec, task
  return np.random.default_rng([seed, pool.round, *pool.id.encode()]).random(len(there))


_MEASURES = {
  "probability": _improbability,
  "frequency": _by_text(frequency_diversity),
  "attribute_frequency": _by_attribute,
  "jaccard": _by_text(jaccard_diversity),
  "random": _random,
}


def _pair(pool: Pool, chosen: int, rejected: int) -> PreferencePair:
  first, second = pool.samples[chosen], pool.samples[rejected]
  return PreferencePair(
    id=pool.id,
    prompt=pool.prompt,
    chosen=first.text,
    rejected=second.text,
    prompt_tokens=pool.prompt_tokens,
    chosen_tokens=first.tokens,
    rejected_tokens=second.tokens,
    provenance={
      "round": pool.round,
      "indices": [first.index, second.index],
      "scores": [first.score, second.score],
    },
  )
