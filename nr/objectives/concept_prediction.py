"""The concept loss of CoCoMix: cross-entropy of concept logits with several labels.

Source: arXiv 2502.08524, equation 2. With labels I_t of weight 1/|I_t| each,

    mean_k CE(z_t, k) = logsumexp(z_t) - mean_{k in I_t} z_t[k]

so two numbers a position are enough and no softmax over the concepts is formed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr.labels import NO_LABEL
from nr.objectives.weighted import Weighted


class ConceptPredictionLoss(NamedTuple):
  """What a batch says about concept prediction.

  Attributes:
    loss: nats, weighted over scored positions. At least ln(labels a position)
      when labels are distinct, because their weight is shared equally.
    recall: fraction of labels among the selected concepts, over labels.
    recall_first: fraction of labels among as many of the largest concepts as
      there are label slots.
  """

  loss: Weighted
  recall: Weighted
  recall_first: Weighted


def concept_prediction_loss(
  log_normalizer_BL: jax.Array,
  label_logits_BLA: jax.Array,
  labels_BLA: jax.Array,
  indices_BLK: jax.Array,
  weights_BL: jax.Array | None = None,
) -> ConceptPredictionLoss:
  """Scores concept predictions against labels.

  Args:
    log_normalizer_BL: float32 [B, L], logsumexp over all concept logits.
    label_logits_BLA: float32 [B, L, A], logits of the labels; any value where
      there is no label.
    labels_BLA: integer [B, L, A], `NO_LABEL` where a position has fewer labels.
    indices_BLK: int32 [B, L, K], selected concepts, largest logit first.
    weights_BL: [B, L] weights, 1 everywhere by default. A position without any
      label counts for nothing.

  Returns:
    Loss and recalls, not yet divided by their weights.
  """
  is_label_BLA = labels_BLA != NO_LABEL
  count_BL = is_label_BLA.sum(axis=-1, dtype=jnp.float32)
  weights_BL = jnp.ones(count_BL.shape) if weights_BL is None else weights_BL.astype(jnp.float32)
  weights_BL = jnp.where(count_BL > 0, weights_BL, 0.0)
  label_sum_BL = jnp.where(is_label_BLA, label_logits_BLA.astype(jnp.float32), 0.0).sum(axis=-1)
  loss_BL = log_normalizer_BL - label_sum_BL / jnp.maximum(count_BL, 1.0)

  is_hit_BLAK = labels_BLA.astype(jnp.int32)[..., None] == indices_BLK[..., None, :]
  label_weights_BLA = jnp.where(is_label_BLA, weights_BL[..., None], 0.0)
  first = min(labels_BLA.shape[-1], indices_BLK.shape[-1])
  return ConceptPredictionLoss(
    loss=Weighted.of(loss_BL, weights_BL),
    recall=Weighted.of(is_hit_BLAK.any(axis=-1), label_weights_BLA),
    recall_first=Weighted.of(is_hit_BLAK[..., :first].any(axis=-1), label_weights_BLA),
  )
