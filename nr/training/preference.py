"""Learning from preferences: the method of every loss on pairs of responses.

    method = preference_method(full_policy(spec, params), PreferenceSpec(beta=0.1))
    train(config, method, padded_batches(...), workdir=...)

Batches are those of `nr.data.example_batches` with two sequences an example. Both
responses of all pairs go through the model together.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nr import names
from nr.models import parameters
from nr.objectives.preference import PreferenceSpec, preference_loss
from nr.objectives.sequence_scores import SequenceScores, first_tokens, sum_responses, token_statistics
from nr.objectives.weighted import LossOutput, Weighted
from nr.training.method import ALL, Method
from nr.training.policy import Policy
from nr.training.reference import make_reference

PyTree = Any
REFERENCES = ("frozen", "synced", "base", "precomputed")


def preference_method(
  policy: Policy,
  spec: PreferenceSpec,
  *,
  reference: str = "frozen",
  sync_every: int = 0,
  sync_mix: float = 1.0,
  name: str = "preference",
  loss_chunk: int | None = None,
  decay: tuple[str, ...] = ALL,
) -> Method:
  """Returns the method that trains a policy on pairs.

  Args:
    policy: what is trained and where it begins.
    spec: the loss.
    reference: where the reference's log-probabilities come from, if the loss reads any:
      a kind of `nr.training.reference.make_reference`, or "precomputed":
      `reference_log_probs` of the batch (sums over whole responses).
    sync_every: updates between two copies; "synced" only.
    sync_mix: share of the policy in a synced reference; 1 is a copy (see `make_reference`).
    name: used in logs, checkpoints and errors.
    loss_chunk: tokens whose logits are held at a time; None holds all of them.
    decay: patterns of the parameters that weight decay shrinks.

  Raises:
    ValueError: an unknown reference, or one that the policy or the loss cannot have.
  """
  if reference not in REFERENCES:
    raise ValueError(names.unknown("reference", reference, REFERENCES))
  kind = reference if spec.needs_reference else "none"
  if kind == "precomputed" and spec.needs_head:
    raise ValueError(
      f"ld_alpha={spec.ld_alpha}: precomputed reference sums cover whole responses; choose reference='frozen'"
    )
  # Sums that come with the batch need no model.
  its = make_reference(policy, "none" if kind == "precomputed" else kind, sync_every, sync_mix)
  score = _scorer(policy, spec, loss_chunk)

  def loss(params: PyTree, frozen: PyTree, extra: PyTree, batch: PyTree, key: jax.Array) -> LossOutput:
    del key  # Both models are read without dropout: their difference must be 0 where they agree.
    sides = score(policy.assemble(params, frozen["policy"]), batch)
    fixed = its.params(frozen, extra)
    if fixed is not None:
      sides = [
        own._replace(reference=other.policy, reference_head=other.policy_head)
        for own, other in zip(sides, jax.lax.stop_gradient(score(fixed, batch)))
      ]
    elif kind == "precomputed":
      sides = [
        own._replace(reference=batch["reference_log_probs"][..., side]) for side, own in enumerate(sides)
      ]
    losses_BP, metrics = preference_loss(spec, *sides)
    weights_BP = batch["pair_weights"]
    watched = {metric: Weighted.of(values_BP, weights_BP) for metric, values_BP in metrics.items()}
    for side, own in zip(("chosen", "rejected"), sides):
      watched[f"{side}_tokens"] = Weighted.of(own.tokens, weights_BP)
    total = Weighted.of(losses_BP, weights_BP)
    ones_BP = jnp.ones_like(weights_BP)
    watched |= {
      "preference_loss": total,
      # How many of the slots held a pair: online, pools may have none to give.
      "pair_share": Weighted.of((weights_BP > 0).astype(jnp.float32), ones_BP),
      "tokens": _counted(batch),
    }
    return LossOutput(total, watched)

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


def _counted(batch: PyTree) -> Weighted:
  """Counts the response tokens, by which the loop measures its speed; their mean is the share of positions."""
  is_response = (batch["weights"] > 0).astype(jnp.float32)
  return Weighted.of(is_response, jnp.ones_like(is_response))


def _scorer(policy: Policy, spec: PreferenceSpec, loss_chunk: int | None) -> Any:
  """Returns (parameters, batch) -> scores of the chosen and of the rejected responses, [B, P] each."""

  def score(params: PyTree, batch: PyTree) -> list[SequenceScores]:
    return score_responses(
      parameters.merge(policy.graphdef, params),
      batch,
      loss_chunk=loss_chunk,
      with_head=spec.needs_head,
      with_aligned=spec.weighting == "wpo",
      with_entropy=spec.entropy_weight > 0,
    )

  return score


def score_responses(
  model: Any,
  batch: PyTree,
  *,
  loss_chunk: int | None = None,
  with_head: bool = False,
  with_aligned: bool = False,
  with_entropy: bool = False,
) -> list[SequenceScores]:
  """Scores the responses of a batch of pairs under a model.

  Args:
    model: a `Transformer`.
    batch: tokens, targets, weights [B, S, L], pair_weights [B, P], and when packed
      segment_ids and positions; see `nr.data.example_batches`.
    loss_chunk: tokens whose logits are held at a time; None: all.
    with_head: whether to sum the first m tokens by themselves, m the tokens of the
      pair's shorter response (LD-DPO).
    with_aligned: whether to give the mean of log p - log sum p^2 (WPO).
    with_entropy: whether to give the mean entropy of a response token's law.

  Returns:
    Scores [B, P] of the chosen and of the rejected responses.
  """
  B, P = batch["pair_weights"].shape
  rows = {
    field: batch[field].reshape(-1, batch[field].shape[-1])
    for field in ("tokens", "targets", "weights", "segment_ids", "positions")
    if field in batch
  }
  segments_RL = rows.get("segment_ids")
  slots = 1 if segments_RL is None else 2 * P
  hidden_RLD = model.hidden(rows["tokens"], segment_ids_BL=segments_RL, positions_BL=rows.get("positions"))
  found = token_statistics(
    hidden_RLD,
    model.unembedding_VD,
    rows["targets"],
    chunk_size=loss_chunk,
    with_entropy=with_entropy,
    with_sum_squares=with_aligned,
  )

  def sums(values_RL: jax.Array, weights_RL: jax.Array) -> jax.Array:
    return sum_responses(values_RL, weights_RL, segments_RL, slots).reshape(B, P, 2)

  weights_RL = rows["weights"]
  tokens_BP2 = sums(jnp.ones_like(weights_RL), weights_RL)
  scores: dict[str, jax.Array] = {"policy": sums(found.log_probs_RL, weights_RL), "tokens": tokens_BP2}
  lengths_BP2 = jnp.maximum(tokens_BP2, 1.0)
  if with_head:
    shorter_BP2 = jnp.broadcast_to(tokens_BP2.min(axis=-1, keepdims=True), tokens_BP2.shape)
    head_RL = first_tokens(weights_RL, shorter_BP2.reshape(-1, slots), segments_RL)
    scores["policy_head"] = sums(found.log_probs_RL, head_RL)
  if with_aligned:
    scores["aligned"] = sums(found.log_probs_RL - found.log_sum_squares_RL, weights_RL) / lengths_BP2
  if with_entropy:
    scores["entropy"] = sums(found.entropies_RL, weights_RL) / lengths_BP2
  return [SequenceScores(**{name: value[..., side] for name, value in scores.items()}) for side in range(2)]
