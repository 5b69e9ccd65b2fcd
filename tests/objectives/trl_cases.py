"""Our losses on the inputs of tests/golden/trl_losses.json, by the names of its cases."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from nr.objectives.group_relative import GroupRelativeSpec, PolicyTokens, group_relative_loss
from nr.objectives.preference import PreferenceSpec, preference_loss
from nr.objectives.reward_modeling import bradley_terry_loss
from nr.objectives.sequence_scores import SequenceScores, first_tokens, sum_responses
from nr.objectives.unpaired_preference import KtoSpec, kto_loss, kto_reference_point, mismatched_log_ratio

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / "golden" / "trl_losses.json").read_text())
INPUTS = {name: jnp.asarray(value) for name, value in GOLDEN["inputs"].items()}
MASK = INPUTS["mask"].astype(jnp.float32)
COUNTS = MASK.sum(axis=1)

PAIRS = {
  "sigmoid": PreferenceSpec(),
  "sigmoid_beta": PreferenceSpec(beta=0.7),
  "sigmoid_norm": PreferenceSpec(beta=2.0, is_length_normalised=True),
  "robust": PreferenceSpec("robust", beta=0.3, label_smoothing=0.1),
  "hinge": PreferenceSpec("hinge", beta=0.5),
  "ipo": PreferenceSpec("ipo", beta=0.2, is_length_normalised=True),
  "sppo_hard": PreferenceSpec("sppo_hard"),
  "apo_zero": PreferenceSpec("apo_zero", beta=0.4),
  "apo_down": PreferenceSpec("apo_down", beta=0.4),
  "ld_dpo": PreferenceSpec(beta=0.3, ld_alpha=0.4),
  "wpo": PreferenceSpec(beta=0.3, weighting="wpo"),
  "cpo": PreferenceSpec("cpo", beta=0.3, nll_weight=0.0),
  "cpo_smoothed": PreferenceSpec("cpo", beta=0.3, label_smoothing=0.1, nll_weight=0.0),
  "simpo": PreferenceSpec("simpo", beta=2.0, gamma=0.5),
  "orpo": PreferenceSpec("orpo", odds_weight=0.1, nll_weight=0.0),
  "orpo_beta": PreferenceSpec("orpo", odds_weight=1.0, nll_weight=0.0),
}
# With whether the two sums of mismatched responses change places: their mean is negative then and TRL clips it.
SINGLES = {
  "kto": (KtoSpec(beta=0.3), False),
  "kto_weights": (KtoSpec(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5), False),
  "kto_below": (KtoSpec(beta=0.3), True),
}
REWARDS = {"reward": {}, "reward_margin": dict(margin=True), "reward_centred": dict(centring=0.01)}
LENGTH = MASK.shape[1]
GROUPS = {
  "grpo": GroupRelativeSpec(kl_weight=0.04),
  "dr_grpo": GroupRelativeSpec(aggregation="constant", max_length=LENGTH),
  "token_mean": GroupRelativeSpec(aggregation="token_mean", clip_high=0.28),
  "dapo": GroupRelativeSpec(aggregation="token_mean", clip_high=0.28),
  "gspo": GroupRelativeSpec(ratio_level="sequence", clip_low=0.03, clip_high=0.04),
  "entropy": GroupRelativeSpec(aggregation="token_mean", entropy_weight=0.05),
}
NAMES = (*PAIRS, *SINGLES, *REWARDS, *GROUPS)


def summed(values) -> jax.Array:
  """Sums over the response tokens of each row."""
  return sum_responses(values, MASK)[:, 0]


def of_pairs(policy, spec):
  half = len(MASK) // 2
  least = jnp.tile(jnp.minimum(COUNTS[:half], COUNTS[half:]), 2)[:, None]
  is_head = first_tokens(MASK, least) != 0
  scores = SequenceScores(
    summed(policy),
    COUNTS,
    summed(INPUTS["reference"]),
    summed(jnp.where(is_head, policy, 0.0)),
    summed(jnp.where(is_head, INPUTS["reference"], 0.0)),
    summed(policy - INPUTS["log_sum_squares"]) / COUNTS,
  )
  sides = (jax.tree.map(lambda x, rows=rows: x[rows], scores) for rows in (slice(half), slice(half, None)))
  return preference_loss(spec, *sides)[0].mean()


def of_singles(policy, case):
  spec, is_below = case
  scores = SequenceScores(summed(policy), COUNTS, summed(INPUTS["reference"]))
  sums = summed(INPUTS["mismatched"]), summed(INPUTS["mismatched_reference"])
  ratio = mismatched_log_ratio(SequenceScores(sums[is_below], COUNTS, sums[not is_below]))
  assert (float(ratio.mean()) < 0) == is_below
  return kto_loss(spec, scores, INPUTS["labels"], kto_reference_point(ratio))[0].mean()


def of_rewards(rewards, settings):
  half = len(rewards) // 2
  settings = dict(settings)
  if settings.pop("margin", False):
    settings["margin"] = INPUTS["margins"]
  return bradley_terry_loss(rewards[:half], rewards[half:], **settings)[0].mean()


def of_groups(policy, spec):
  tokens = PolicyTokens(
    policy,
    INPUTS["reference"],
    INPUTS["mismatched_reference"] if spec.kl_weight else None,
    None,
    INPUTS["entropies"] if spec.entropy_weight else None,
  )
  return group_relative_loss(spec, tokens, INPUTS["advantages"], MASK)[0].mean()


def check(name: str, expected: dict) -> None:
  """Compares loss and gradient of a case with TRL's."""
  for cases, function in (
    (PAIRS, of_pairs),
    (SINGLES, of_singles),
    (GROUPS, of_groups),
    (REWARDS, of_rewards),
  ):
    if name in cases:
      variable = INPUTS["rewards" if cases is REWARDS else "policy"]
      loss, gradient = jax.value_and_grad(function)(variable, cases[name])
  np.testing.assert_allclose(loss, expected["loss"], rtol=2e-6, atol=1e-6)
  scale = np.abs(expected["gradient"]).max()
  assert scale > 1e-3
  np.testing.assert_allclose(gradient, expected["gradient"], atol=2e-6 * max(scale, 1.0))
