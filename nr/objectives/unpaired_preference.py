"""Losses on responses that are good or bad by themselves: KTO, and DPO over all good and bad of a prompt.

Notation as in `nr.objectives.preference`: S sum of log-probabilities of a response, d = S - S_ref.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from nr.objectives.preference import given, wide
from nr.objectives.sequence_scores import SequenceScores
from nr.objectives.weighted import Weighted
from nr.spec import Spec


def _log_ratio(scores: SequenceScores, needed_by: str) -> jax.Array:
  return wide(scores.policy) - given(scores, "reference", needed_by)


def group_dpo_loss(
  beta: float, scores: SequenceScores, is_correct: jax.Array, is_valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Mean of -log sigma(beta (d(i) - d(j))) over all correct i and incorrect j of a pool.

  Args:
    beta: as in DPO.
    scores: of the responses of a pool, [..., G], with a reference.
    is_correct: bool [..., G].
    is_valid: bool [..., G], False at padding; None: all are.

  Returns:
    float32 [...] loss, 0 where there is no pair, and float32 [...] weight, 1 where there is one.

  Source: the authors' branch of fairseq2, `_group_dpo.py`.
  """
  d = _log_ratio(scores, "group_dpo_loss")
  is_valid = jnp.ones(d.shape, bool) if is_valid is None else is_valid
  good, bad = is_correct & is_valid, ~is_correct & is_valid
  is_pair = good[..., :, None] & bad[..., None, :]
  losses = -jax.nn.log_sigmoid(beta * (d[..., :, None] - d[..., None, :]))
  pairs = is_pair.sum(axis=(-2, -1))
  total = jnp.where(is_pair, losses, 0.0).sum(axis=(-2, -1))
  return total / jnp.maximum(pairs, 1), (pairs > 0).astype(d.dtype)


@dataclasses.dataclass(frozen=True)
class KtoSpec(Spec):
  """Settings of KTO (arXiv 2402.01306).

  Attributes:
    beta: weight of the implicit reward.
    desirable_weight: weight of desirable responses; times their number it should be about the
      undesirable ones' weight times theirs.
    undesirable_weight: weight of undesirable responses.
  """

  beta: float = 0.1
  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0

  def __post_init__(self):
    for field in ("beta", "desirable_weight", "undesirable_weight"):
      if not getattr(self, field) > 0:
        raise ValueError(f"{field}={getattr(self, field)}: give a positive number")

  @classmethod
  def balanced(cls, num_desirable: int, num_undesirable: int, beta: float = 0.1) -> Self:
    """Returns the settings that give both kinds the same weight in all; the rarer kind's is above 1.

    Args:
      num_desirable: responses of the data that are desirable.
      num_undesirable: those that are not.
      beta: weight of the implicit reward.

    Raises:
      ValueError: a kind that does not occur.

    Source: the lower end of arXiv 2402.01306, Eq. 8 (a ratio between 1 and 4 / 3).
    """
    for field, number in (("num_desirable", num_desirable), ("num_undesirable", num_undesirable)):
      if number < 1:
        raise ValueError(f"{field}={number}: KTO needs responses of both kinds; give at least 1")
    most = max(num_desirable, num_undesirable)
    return cls(beta, most / num_desirable, most / num_undesirable)


def mismatched_log_ratio(mismatched: SequenceScores, weights: jax.Array | None = None) -> Weighted:
  """Sums d over prompts with a response to another prompt, without gradient, nats.

  The sums of microbatches add up; `kto_reference_point` divides those of the whole batch once.

  Args:
    mismatched: scores of each prompt with another prompt's response (at least two prompts), with a
      reference.
    weights: 0 at padding; None: all count.
  """
  d = _log_ratio(mismatched, "mismatched_log_ratio")
  weights = jnp.ones_like(d) if weights is None else weights
  return jax.lax.stop_gradient(Weighted.of(d, weights))


def kto_reference_point(mismatched: Weighted) -> jax.Array:
  """Returns z = max(0, mean of d over mismatched prompts and responses), nats; 0 where there are none.

  Args:
    mismatched: from `mismatched_log_ratio`.

  Source: arXiv 2402.01306, section 4.1.
  """
  return jnp.maximum(mismatched.mean(), 0.0)


def kto_loss(
  spec: KtoSpec, scores: SequenceScores, is_desirable: jax.Array, reference_point: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """KTO's loss of each response: no pairs, only whether it is desirable.

  Args:
    spec: settings.
    scores: of responses to their own prompts, any shape, with a reference.
    is_desirable: bool, same shape.
    reference_point: z of `kto_reference_point`, scalar.

  Returns:
    float32 loss of each response (its weight included), and metrics by name: `reward` (beta d) and
    `log_prob` (S).
  """
  d = _log_ratio(scores, "kto_loss")
  sign = jnp.where(is_desirable, 1.0, -1.0)
  weight = jnp.where(is_desirable, spec.desirable_weight, spec.undesirable_weight)
  loss = weight * jax.nn.sigmoid(-sign * spec.beta * (d - reference_point))
  metrics = {"reward": spec.beta * d, "log_prob": wide(scores.policy)}
  return loss, jax.tree.map(jax.lax.stop_gradient, metrics)
