"""Policy gradients with the group as baseline: the method of GRPO and its variants.

Batches hold single sampled responses: tokens, targets, weights [R, L], `advantages` [R]
and `sampled_log_probs` [R, L], aligned with the targets (`nr.recipes.sampling_rounds`
makes them).
"""

from typing import Any

import jax

from nr.models import parameters
from nr.objectives.group_relative import GroupRelativeSpec, PolicyTokens, group_relative_loss
from nr.objectives.sequence_scores import TokenStatistics, token_statistics
from nr.objectives.weighted import LossOutput, Weighted
from nr.training.method import ALL, Method
from nr.training.policy import Policy
from nr.training.reference import make_reference

PyTree = Any


def group_relative_method(
  policy: Policy,
  spec: GroupRelativeSpec,
  *,
  reference: str = "none",
  sync_every: int = 0,
  name: str = "group_relative",
  loss_chunk: int | None = None,
  decay: tuple[str, ...] = ALL,
) -> Method:
  """Returns the method that trains a policy on its own responses and their advantages.

  The policy at the time of sampling is what the sampler reported: our engine computes
  log-probabilities of the model itself, in float32. Where another engine sampled, give
  `importance_cap`: then the current policy stands for the old one (right for one step a
  round), and the engine's numbers weigh it, capped.

  Args:
    policy: what is trained and where it begins.
    spec: which variant.
    reference: a kind of `nr.training.reference.make_reference`; "none" without a KL penalty.
    sync_every: updates between two copies of a "synced" reference.
    name: used in logs, checkpoints and errors.
    loss_chunk: tokens whose logits are held at a time; None holds all of them.
    decay: patterns of the parameters that weight decay shrinks.

  Raises:
    ValueError: a reference that the policy cannot have, or a KL penalty without one.
  """
  if spec.kl_weight and reference == "none":
    raise ValueError(f"kl_weight={spec.kl_weight} needs a reference; choose 'frozen', 'synced' or 'base'")
  its = make_reference(policy, reference, sync_every)

  def read(params: PyTree, batch: PyTree, with_entropy: bool) -> TokenStatistics:
    model = parameters.merge(policy.graphdef, params)
    return token_statistics(
      model.hidden(batch["tokens"]),
      model.unembedding_VD,
      batch["targets"],
      chunk_size=loss_chunk,
      with_entropy=with_entropy,
    )

  def loss(params: PyTree, frozen: PyTree, extra: PyTree, batch: PyTree, key: jax.Array) -> LossOutput:
    del key  # No dropout: the ratio must be 1 where the policy has not moved.
    own = read(policy.assemble(params, frozen["policy"]), batch, spec.entropy_weight > 0)
    fixed = its.params(frozen, extra)
    is_corrected = spec.importance_cap is not None
    sampled_RL = batch["sampled_log_probs"]
    tokens = PolicyTokens(
      log_probs=own.log_probs_RL,
      old_log_probs=jax.lax.stop_gradient(own.log_probs_RL) if is_corrected else sampled_RL,
      reference_log_probs=None
      if fixed is None
      else jax.lax.stop_gradient(read(fixed, batch, False).log_probs_RL),
      engine_log_probs=sampled_RL if is_corrected else None,
      entropies=own.entropies_RL,
    )
    total, metrics = group_relative_loss(spec, tokens, batch["advantages"], batch["weights"])
    is_response = (batch["weights"] > 0).astype("float32")
    metrics = {"policy_loss": total, "tokens": Weighted.of(is_response, is_response * 0 + 1), **metrics}
    return LossOutput(total, metrics)

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
