"""Learning from responses that are good or bad by themselves: the methods of KTO and of group DPO.

    method = unpaired_preference_method(full_policy(spec, params), KtoSpec(beta=0.1))
    train(config, method, unpaired_batches(...), workdir=...)

KTO's reference point z is a mean over the whole global batch: over all devices, and over all
microbatches of a step. It is found in a pass of its own before the first gradient
(`Method.survey`), so that accumulation does not change it. TRL takes the mean over the devices of
one microbatch; so would anyone who computes z inside the loss, and with small microbatches the
clip at 0 then acts on a noisier number, which raises its mean.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nr.models import parameters
from nr.objectives.sequence_scores import SequenceScores, sum_responses, token_statistics
from nr.objectives.unpaired_preference import (
  KtoSpec,
  group_dpo_loss,
  kto_loss,
  kto_reference_point,
  mismatched_log_ratio,
)
from nr.objectives.weighted import LossOutput, Weighted
from nr.training.method import ALL, SURVEY, Method
from nr.training.policy import Policy
from nr.training.reference import Reference, make_reference

PyTree = Any


def unpaired_preference_method(
  policy: Policy,
  spec: KtoSpec,
  *,
  reference: str = "frozen",
  sync_every: int = 0,
  sync_mix: float = 1.0,
  name: str = "unpaired_preference",
  loss_chunk: int | None = None,
  decay: tuple[str, ...] = ALL,
) -> Method:
  """Returns the method of KTO (arXiv 2402.01306).

  Batches are those of `nr.data.unpaired_batches`. Sums of a reference cannot be computed
  beforehand: every epoch matches prompts and responses anew.

  Args:
    policy: what is trained and where it begins.
    spec: the loss.
    reference: "frozen", "synced" or "base"; see `nr.training.reference.make_reference`.
    sync_every: updates between two copies; "synced" only.
    sync_mix: share of the policy in a synced reference; 1 is a copy.
    name: used in logs, checkpoints and errors.
    loss_chunk: tokens whose logits are held at a time; None holds all of them.
    decay: patterns of the parameters that weight decay shrinks.

  Raises:
    ValueError: a reference that the policy cannot have, or none.
  """
  its = _reference(policy, reference, sync_every, sync_mix)
  score = _scorer(policy, its, loss_chunk)

  def survey(params: PyTree, frozen: PyTree, extra: PyTree, batch: PyTree, key: jax.Array) -> Weighted:
    del key
    scores_B = score(params, frozen, extra, _sequence(batch, 1))
    return mismatched_log_ratio(scores_B, (scores_B.tokens > 0).astype(jnp.float32))

  def loss(params: PyTree, frozen: PyTree, extra: PyTree, batch: PyTree, key: jax.Array) -> LossOutput:
    del key  # Both models are read without dropout: their difference must be 0 where they agree.
    own = _sequence(batch, 0)
    scores_B = score(params, frozen, extra, own)
    is_desirable_B, weights_B = batch["is_desirable"][:, 0, 0], batch["pair_weights"][:, 0]
    mismatched, ones_B = batch[SURVEY], jnp.ones_like(weights_B)
    z = kto_reference_point(mismatched)
    losses_B, metrics = kto_loss(spec, scores_B, is_desirable_B, z)
    total = Weighted.of(losses_B, weights_B)
    has_partner_B = (batch["weights"][:, 1] > 0).any(axis=-1)
    watched = {
      "kto_loss": total,
      "reference_point": Weighted.of(z * ones_B, ones_B),
      # Before it is clipped: below 0 the policy calls mismatched responses less probable than the reference.
      "mismatched_log_ratio": Weighted.of(mismatched.mean() * ones_B, ones_B),
      "mismatched_share": Weighted.of(has_partner_B.astype(jnp.float32), (weights_B > 0).astype(jnp.float32)),
      **_by_kind({**metrics, "tokens": scores_B.tokens}, is_desirable_B, weights_B),
      "desirable_share": Weighted.of(is_desirable_B.astype(jnp.float32), weights_B),
      "tokens": _counted(own["weights"]),
    }
    return LossOutput(total, watched)

  return _method(name, policy, its, loss, decay)._replace(survey=survey)


def group_preference_method(
  policy: Policy,
  *,
  beta: float = 0.1,
  reference: str = "frozen",
  sync_every: int = 0,
  sync_mix: float = 1.0,
  name: str = "group_preference",
  loss_chunk: int | None = None,
  decay: tuple[str, ...] = ALL,
) -> Method:
  """Returns the method of DPO over all pairs of a good and a bad response to a prompt.

  Batches are padded ones of `nr.data.labelled_responses.encode_groups` (or of
  `nr.recipes.round_examples.contrasts_of`): all responses to a prompt are one row's sequences
  and go through the model once, however many pairs they form. The mean is over the pairs of
  a prompt, then over prompts.

  Args:
    policy: what is trained and where it begins.
    beta: as in DPO.
    reference: "frozen", "synced" or "base"; see `nr.training.reference.make_reference`.
    sync_every: updates between two copies; "synced" only.
    sync_mix: share of the policy in a synced reference; 1 is a copy.
    name: used in logs, checkpoints and errors.
    loss_chunk: tokens whose logits are held at a time; None holds all of them.
    decay: patterns of the parameters that weight decay shrinks.

  Raises:
    ValueError: a reference that the policy cannot have, or none; a beta that is not positive.
  """
  if not beta > 0:
    raise ValueError(f"beta={beta}: give a positive number")
  its = _reference(policy, reference, sync_every, sync_mix)
  score = _scorer(policy, its, loss_chunk)

  def loss(params: PyTree, frozen: PyTree, extra: PyTree, batch: PyTree, key: jax.Array) -> LossOutput:
    del key
    B, G = batch["tokens"].shape[:2]
    is_good_BG, weights_B = batch["is_desirable"][:, 0], batch["pair_weights"][:, 0]
    if is_good_BG.shape != (B, G):
      raise ValueError(
        f"batch: {G} sequences a row and {is_good_BG.shape[-1]} labels; give groups in padded batches"
      )
    rows = {field: batch[field].reshape(B * G, -1) for field in _FIELDS}
    scores_BG = jax.tree.map(lambda x: x.reshape(B, G), score(params, frozen, extra, rows))
    is_there_BG = scores_BG.tokens > 0
    losses_B, has_pair_B = group_dpo_loss(beta, scores_BG, is_good_BG, is_there_BG)
    weights_B = weights_B * has_pair_B
    total = Weighted.of(losses_B, weights_B)
    found = {"reward": beta * (scores_BG.policy - scores_BG.reference), "log_prob": scores_BG.policy}
    found = jax.lax.stop_gradient({**found, "tokens": scores_BG.tokens})
    watched = {
      "group_loss": total,
      **_by_kind(found, is_good_BG, weights_B[:, None] * is_there_BG),
      # How many of the rows held a good and a bad response: online, pools may be all of a kind.
      "pair_share": Weighted.of((weights_B > 0).astype(jnp.float32), jnp.ones_like(weights_B)),
      "tokens": _counted(rows["weights"]),
    }
    return LossOutput(total, watched)

  return _method(name, policy, its, loss, decay)


_FIELDS = ("tokens", "targets", "weights")


def _sequence(batch: PyTree, number: int) -> PyTree:
  """Returns one sequence of every row, arrays [B, L]."""
  return {field: batch[field][:, number] for field in _FIELDS}


def _reference(policy: Policy, kind: str, sync_every: int, sync_mix: float) -> Reference:
  if kind == "none":
    raise ValueError("reference='none': this loss compares with one; choose 'frozen', 'synced' or 'base'")
  return make_reference(policy, kind, sync_every, sync_mix)


def _scorer(policy: Policy, its: Reference, loss_chunk: int | None) -> Any:
  """Returns (params, frozen, extra, rows) -> scores [R] of sequences under the policy and the reference."""

  def sums(params: PyTree, rows: PyTree) -> tuple[jax.Array, jax.Array]:
    model = parameters.merge(policy.graphdef, params)
    hidden_RLD = model.hidden(rows["tokens"])
    found = token_statistics(hidden_RLD, model.unembedding_VD, rows["targets"], chunk_size=loss_chunk)
    counted = jnp.ones_like(rows["weights"])
    return tuple(
      sum_responses(values_RL, rows["weights"])[:, 0] for values_RL in (found.log_probs_RL, counted)
    )

  def score(params: PyTree, frozen: PyTree, extra: PyTree, rows: PyTree) -> SequenceScores:
    policy_R, tokens_R = sums(policy.assemble(params, frozen["policy"]), rows)
    reference_R = jax.lax.stop_gradient(sums(its.params(frozen, extra), rows)[0])
    return SequenceScores(policy_R, tokens_R, reference_R)

  return score


def _by_kind(metrics: PyTree, is_desirable: jax.Array, weights: jax.Array) -> dict[str, Weighted]:
  """Returns the means of desirable and of undesirable responses apart."""
  kinds = {"desirable": is_desirable, "undesirable": ~is_desirable}
  return {
    f"{kind}_{metric}": Weighted.of(values, weights * is_kind)
    for metric, values in metrics.items()
    for kind, is_kind in kinds.items()
  }


def _counted(weights: jax.Array) -> Weighted:
  """Counts the response tokens, by which the loop measures its speed; their mean is the share of positions."""
  is_response = (weights > 0).astype(jnp.float32)
  return Weighted.of(is_response, jnp.ones_like(is_response))


def _method(name: str, policy: Policy, its: Reference, loss: Any, decay: tuple[str, ...]) -> Method:
  return Method(
    name=name,
    init=policy.init,
    start=policy.start,
    loss=loss,
    axes=policy.axes,
    frozen=its.frozen,
    frozen_axes=its.frozen_axes,
    decay=decay,
    **its.method_settings,
  )
