"""Reward models from comparisons: their method, and how well they rank pairs that were held out."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from nr.models import parameters
from nr.objectives.reward_modeling import Calibration, bradley_terry_loss, calibration
from nr.objectives.sequence_scores import sum_responses
from nr.objectives.weighted import LossOutput, Weighted
from nr.training.method import ALL, Evaluator, Method
from nr.training.policy import Policy

PyTree = Any


def pair_rewards(model: Any, batch: PyTree, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Returns the rewards of the chosen and of the rejected responses, float32 [B, P] each.

  Args:
    model: a `RewardModel`.
    batch: of pairs, padded or packed; see `nr.data.example_batches`. A response is read at
      its last token.
    key: random key for dropout.
  """
  B, P = batch["pair_weights"].shape
  rows = {
    field: batch[field].reshape(-1, batch[field].shape[-1])
    for field in ("tokens", "weights", "segment_ids", "positions")
    if field in batch
  }
  segments_RL = rows.get("segment_ids")
  rewards_RL = model.token_rewards(
    rows["tokens"], segment_ids_BL=segments_RL, positions_BL=rows.get("positions"), key=key
  )
  # Weights mark what predicts a response token: the last one is where they were 1 and are no more.
  is_before_RL = rows["weights"] > 0
  is_response_RL = jnp.pad(is_before_RL, ((0, 0), (1, 0)))[:, :-1]
  is_last_RL = (is_response_RL & ~is_before_RL).astype(jnp.float32)
  slots = 1 if segments_RL is None else 2 * P
  rewards_BP2 = sum_responses(rewards_RL, is_last_RL, segments_RL, slots).reshape(B, P, 2)
  return rewards_BP2[..., 0], rewards_BP2[..., 1]


def reward_method(
  policy: Policy,
  *,
  margin: float = 0.0,
  centring: float = 0.0,
  name: str = "reward",
  decay: tuple[str, ...] = ALL,
) -> Method:
  """Returns the method that trains a reward model on pairs.

  Args:
    policy: of a reward model: `new_policy(RewardModelSpec(...))`, or `full_policy` of one
      begun with `nr.models.reward.from_language_model`.
    margin: by how much more every chosen response should be worth; a field `margins`
      [B, P] of the batch is added to it.
    centring: weight that keeps rewards around 0 (arXiv 2312.09244, about 0.01).
    name: used in logs, checkpoints and errors.
    decay: patterns of the parameters that weight decay shrinks.
  """
  dropout = policy.spec.transformer.dropout

  def loss(params: PyTree, frozen: PyTree, extra: PyTree, batch: PyTree, key: jax.Array) -> LossOutput:
    del extra
    model = parameters.merge(policy.graphdef, policy.assemble(params, frozen, policy.adapter_key(key)))
    chosen_BP, rejected_BP = pair_rewards(model, batch, key if dropout else None)
    margins = margin + batch.get("margins", 0.0)
    losses_BP, metrics = bradley_terry_loss(chosen_BP, rejected_BP, margin=margins, centring=centring)
    weights_BP = batch["pair_weights"]
    total = Weighted.of(losses_BP, weights_BP)
    watched = {field: Weighted.of(values_BP, weights_BP) for field, values_BP in metrics.items()}
    is_response = (batch["weights"] > 0).astype(jnp.float32)
    watched |= {"reward_loss": total, "tokens": Weighted.of(is_response, jnp.ones_like(is_response))}
    return LossOutput(total, watched)

  return Method(
    name=name,
    init=policy.init,
    start=policy.start,
    loss=loss,
    axes=policy.axes,
    frozen=policy.fixed,
    frozen_axes=policy.fixed_axes,
    decay=decay,
    # The un-embedding of an untied trunk is not read, so it gets no gradient.
    trainable=("(?!.*unembedding).*",),
  )


def reward_evaluator(policy: Policy, batches: Iterable[PyTree], name: str = "held_out") -> Evaluator:
  """Returns the evaluator of held-out pairs: accuracy, margin and expected calibration error.

  Args:
    policy: the one that is trained.
    batches: of pairs, a finite number; gone through at every evaluation.
    name: prefix of the numbers.
  """
  batches = list(batches)

  @jax.jit
  def measure(params: PyTree, frozen: PyTree, batch: PyTree) -> tuple[Weighted, Weighted, Calibration]:
    model = parameters.merge(policy.graphdef, policy.assemble(params, frozen))
    chosen_BP, rejected_BP = pair_rewards(model, batch)
    weights_BP = batch["pair_weights"]
    _, metrics = bradley_terry_loss(chosen_BP, rejected_BP)
    found = [Weighted.of(metrics[field], weights_BP) for field in ("accuracy", "margin")]
    return *found, calibration(chosen_BP - rejected_BP, weights_BP)

  def run(params: PyTree, frozen: PyTree, extra: PyTree) -> dict[str, float]:
    del extra
    sums = None
    for batch in batches:
      found = measure(params, frozen, batch)
      sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    accuracy, margin, bins = sums
    return {
      "accuracy": float(accuracy.mean()),
      "margin": float(margin.mean()),
      "calibration_error": float(bins.expected_error()),
      "pairs": float(accuracy.weight),
    }

  return Evaluator(name, run)
