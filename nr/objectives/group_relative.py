"""Policy gradients whose baseline is the group: GRPO and its variants, as settings of one loss.

    advantages_R = group_advantages(spec, rewards_BG).reshape(-1)
    loss, metrics = group_relative_loss(spec, tokens, advantages_R, weights_RL)

    GRPO (arXiv 2402.03300)        scale="group", aggregation="sequence_mean"
    Dr. GRPO (arXiv 2503.20783)    scale="none", aggregation="constant"
    DAPO (arXiv 2503.14476)        aggregation="token_mean", clip_high > clip_low
    GSPO (arXiv 2507.18071)        ratio_level="sequence"

Arrays in this file: B prompts, G samples a prompt, R = B G rows, L positions.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr import names
from nr.objectives.weighted import Weighted
from nr.spec import Spec

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
RATIO_LEVELS = ("token", "sequence")


@dataclasses.dataclass(frozen=True)
class GroupRelativeSpec(Spec):
  """Settings of the loss.

  Attributes:
    scale: what centred rewards are divided by: the standard deviation of their "group", of the whole
      "batch", or nothing ("none").
    is_unbiased_deviation: whether the deviation divides by N - 1 (TRL, fairseq2, verl) or by N.
    epsilon: added to the deviation: 1e-6 (fairseq2) or 1e-4 (TRL); it matters when rewards nearly tie.
    clip_low: the ratio is clipped below 1 - clip_low.
    clip_high: and above 1 + clip_high; larger than `clip_low` is DAPO's "clip higher".
    ratio_level: "token", or "sequence": one ratio a response, the geometric mean of its tokens'.
    aggregation: "sequence_mean" gives every response the same weight, "token_mean" every token,
      "constant" divides the sum of a response by `max_length`.
    max_length: of "constant", tokens.
    kl_weight: beta of the penalty exp(x) - x - 1, x = log pi_ref - log pi, per token.
    entropy_weight: weight of the token entropy, which is subtracted.
    importance_cap: cap of the weight pi_old / pi_engine that corrects for a sampler with other numerics;
      None: no correction.
  """

  scale: str = "group"
  is_unbiased_deviation: bool = True
  epsilon: float = 1e-6
  clip_low: float = 0.2
  clip_high: float = 0.2
  ratio_level: str = "token"
  aggregation: str = "sequence_mean"
  max_length: int = 0
  kl_weight: float = 0.0
  entropy_weight: float = 0.0
  importance_cap: float | None = None

  def __post_init__(self):
    choices = dict(scale=SCALES, aggregation=AGGREGATIONS, ratio_level=RATIO_LEVELS)
    for field, allowed in choices.items():
      if getattr(self, field) not in allowed:
        raise ValueError(names.unknown(field, getattr(self, field), allowed))
    if not 0 < self.clip_low <= 1:
      raise ValueError(f"clip_low={self.clip_low}: give a number in (0, 1]")
    if not self.clip_high > 0:
      raise ValueError(f"clip_high={self.clip_high}: give a positive number")
    for field in ("epsilon", "kl_weight", "entropy_weight"):
      if not getattr(self, field) >= 0:
        raise ValueError(f"{field}={getattr(self, field)}: give 0 or more")
    if (self.aggregation == "constant") != (self.max_length > 0):
      raise ValueError(
        f"max_length={self.max_length} with aggregation={self.aggregation!r}: give the most tokens of a "
        "response with 'constant', and 0 otherwise"
      )
    if self.importance_cap is not None and not self.importance_cap > 0:
      raise ValueError(f"importance_cap={self.importance_cap}: give a positive number, or None")


def group_advantages(
  spec: GroupRelativeSpec, rewards_BG: jax.Array, is_valid_BG: jax.Array | None = None
) -> jax.Array:
  """Returns float32 [B, G]: how much better a response is than its group, exactly 0 where all tie.

  Args:
    spec: `scale`, `is_unbiased_deviation` and `epsilon` are read.
    rewards_BG: of the G samples of each prompt.
    is_valid_BG: bool, False at padding, whose advantage is 0; None: all are.
  """
  rewards_BG = jnp.asarray(rewards_BG, jnp.float32)
  is_valid_BG = jnp.ones(rewards_BG.shape, bool) if is_valid_BG is None else is_valid_BG
  rewards_BG = jnp.where(is_valid_BG, rewards_BG, 0.0)
  axis = None if spec.scale == "batch" else 1
  mean_B1, _ = _moments(spec, rewards_BG, is_valid_BG, 1)
  centred_BG = rewards_BG - mean_B1
  if spec.scale != "none":
    centred_BG = centred_BG / (_moments(spec, rewards_BG, is_valid_BG, axis)[1] + spec.epsilon)
  # A rounded mean of equal rewards may differ from them, and a tiny deviation would magnify that.
  largest_B1 = jnp.where(is_valid_BG, rewards_BG, -jnp.inf).max(axis=1, keepdims=True)
  least_B1 = jnp.where(is_valid_BG, rewards_BG, jnp.inf).min(axis=1, keepdims=True)
  return jnp.where(is_valid_BG & (largest_B1 > least_B1), centred_BG, 0.0)


def _moments(spec, rewards_BG, is_valid_BG, axis) -> tuple[jax.Array, jax.Array]:
  count = is_valid_BG.sum(axis=axis, keepdims=True).astype(jnp.float32)
  mean = rewards_BG.sum(axis=axis, keepdims=True) / jnp.maximum(count, 1)
  squares = jnp.where(is_valid_BG, (rewards_BG - mean) ** 2, 0.0).sum(axis=axis, keepdims=True)
  return mean, jnp.sqrt(squares / jnp.maximum(count - spec.is_unbiased_deviation, 1))


class PolicyTokens(NamedTuple):
  """What is known of the tokens of sampled responses, float32 [R, L], nats; arbitrary where the weight is 0.

  Attributes:
    log_probs: under the policy that is trained.
    old_log_probs: under the policy at the time of sampling, as the trainer computes it.
    reference_log_probs: under the reference; needed for `kl_weight`.
    engine_log_probs: as the sampling engine reported them; needed for `importance_cap`.
    entropies: of the policy's law; needed for `entropy_weight`.
  """

  log_probs: jax.Array
  old_log_probs: jax.Array
  reference_log_probs: jax.Array | None = None
  engine_log_probs: jax.Array | None = None
  entropies: jax.Array | None = None


def group_relative_loss(
  spec: GroupRelativeSpec, tokens: PolicyTokens, advantages_R: jax.Array, weights_RL: jax.Array
) -> tuple[Weighted, dict[str, Weighted]]:
  """The clipped policy-gradient loss of sampled responses.

  Args:
    spec: which variant.
    tokens: log-probabilities; gradients flow through `log_probs` and `entropies`.
    advantages_R: of `group_advantages`, one a response.
    weights_RL: float32, 1 at response tokens.

  Returns:
    The loss: its weight is the number of responses (of tokens for "token_mean"), so that sums over
    microbatches give the mean over the batch. By name, means over tokens: `clip_share` (clipping took
    the gradient away), `ratio`, `kl` and `entropy` where they are known.

  Raises:
    ValueError: a log-probability or the entropies that the spec needs are None.
  """
  is_token_RL = weights_RL != 0
  tokens = PolicyTokens(*(None if x is None else jnp.where(is_token_RL, x, 0.0) for x in tokens))
  log_ratio_RL = tokens.log_probs - jax.lax.stop_gradient(tokens.old_log_probs)
  if spec.ratio_level == "sequence":
    count_R1 = jnp.maximum(weights_RL.sum(axis=1, keepdims=True), 1.0)
    mean_R1 = (log_ratio_RL * weights_RL).sum(axis=1, keepdims=True) / count_R1
    log_ratio_RL = jnp.broadcast_to(mean_R1, log_ratio_RL.shape)
  ratio_RL = jnp.exp(log_ratio_RL)
  advantage_R1 = jax.lax.stop_gradient(advantages_R)[:, None]
  free_RL = ratio_RL * advantage_R1
  clipped_RL = jnp.clip(ratio_RL, 1 - spec.clip_low, 1 + spec.clip_high) * advantage_R1
  gain_RL = jnp.minimum(free_RL, clipped_RL)
  if spec.importance_cap is not None:
    engine_RL = _given(tokens, "engine_log_probs", f"importance_cap={spec.importance_cap}")
    weight_RL = jnp.minimum(jnp.exp(tokens.old_log_probs - engine_RL), spec.importance_cap)
    gain_RL = gain_RL * jax.lax.stop_gradient(weight_RL)
  metrics = {
    "clip_share": Weighted.of(clipped_RL < free_RL, weights_RL),
    "ratio": Weighted.of(jax.lax.stop_gradient(ratio_RL), weights_RL),
  }
  loss_RL = -gain_RL
  if spec.kl_weight or tokens.reference_log_probs is not None:
    reference_RL = _given(tokens, "reference_log_probs", f"kl_weight={spec.kl_weight}")
    behind_RL = reference_RL - tokens.log_probs
    kl_RL = jnp.exp(behind_RL) - behind_RL - 1
    loss_RL = loss_RL + spec.kl_weight * kl_RL
    metrics["kl"] = Weighted.of(jax.lax.stop_gradient(kl_RL), weights_RL)
  if spec.entropy_weight or tokens.entropies is not None:
    entropies_RL = _given(tokens, "entropies", f"entropy_weight={spec.entropy_weight}")
    loss_RL = loss_RL - spec.entropy_weight * entropies_RL
    metrics["entropy"] = Weighted.of(jax.lax.stop_gradient(entropies_RL), weights_RL)
  return _aggregate(spec, loss_RL, weights_RL), metrics


def _aggregate(spec: GroupRelativeSpec, loss_RL: jax.Array, weights_RL: jax.Array) -> Weighted:
  if spec.aggregation == "token_mean":
    return Weighted.of(loss_RL, weights_RL)
  count_R = weights_RL.sum(axis=1)
  sums_R = jnp.where(weights_RL == 0, 0.0, loss_RL * weights_RL).sum(axis=1)
  divisor_R = float(spec.max_length) if spec.aggregation == "constant" else jnp.maximum(count_R, 1.0)
  return Weighted.of(sums_R / divisor_R, (count_R > 0).astype(jnp.float32))


def _given(tokens: PolicyTokens, field: str, reason: str) -> jax.Array:
  value = getattr(tokens, field)
  if value is None:
    raise ValueError(f"PolicyTokens.{field} is missing: {reason} needs it")
  return value
