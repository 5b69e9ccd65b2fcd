"""The concept loss of CoCoMix: cross-entropy of concept logits with several labels.

Source: arXiv 2502.08524, equation 2. With labels I_t of weight 1/|I_t| each,

    mean_k CE(z_t, k) = logsumexp(z_t) - mean_{k in I_t} z_t[k]

so two numbers a position are enough and no softmax over the concepts is formed. Labels
of different weight are our addition: their weighted mean stands in the mean's place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr.labels import NO_LABEL
from nr.objectives.weighted import Weighted


class ConceptPredictionLoss(NamedTuple):
  """What a batch says about concept prediction.

  Attributes:
    loss: nats, weighted over scored positions. At least the entropy of the labels'
      weights when labels are distinct: ln(labels a position) where they are equal.
    excess: nats, how much of the loss is above that entropy.
    recall: fraction of labels among the selected concepts, over labels.
    recall_first: fraction of labels among as many of the largest concepts as
      there are label slots.
  """

  loss: Weighted
  excess: Weighted
  recall: Weighted
  recall_first: Weighted


def concept_prediction_loss(
  log_normalizer_BL: jax.Array,
  label_logits_BLA: jax.Array,
  labels_BLA: jax.Array,
  indices_BLK: jax.Array,
  weights_BL: jax.Array | None = None,
  weights_BLA: jax.Array | None = None,
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
    weights_BLA: [B, L, A] weights of the labels among those of their position, not
      negative; only their ratios matter. None counts them equally. A position whose
      labels weigh nothing counts for nothing. The recalls count labels equally.

  Returns:
    Loss and recalls, not yet divided by their weights.
  """
  is_label_BLA = labels_BLA != NO_LABEL
  if weights_BLA is None:
    weights_BLA = jnp.ones((), jnp.float32)
  share_BLA = jnp.where(is_label_BLA, weights_BLA.astype(jnp.float32), 0.0)
  total_BL = share_BLA.sum(axis=-1)
  weights_BL = jnp.ones(total_BL.shape) if weights_BL is None else weights_BL.astype(jnp.float32)
  weights_BL = jnp.where(total_BL > 0, weights_BL, 0.0)
  label_sum_BL = jnp.where(is_label_BLA, share_BLA * label_logits_BLA.astype(jnp.float32), 0.0).sum(axis=-1)
  safe_BL = jnp.where(total_BL > 0, total_BL, 1.0)
  loss_BL = log_normalizer_BL - label_sum_BL / safe_BL
  least_BL = jax.scipy.special.entr(share_BLA / safe_BL[..., None]).sum(axis=-1)

  is_hit_BLAK = labels_BLA.astype(jnp.int32)[..., None] == indices_BLK[..., None, :]
  label_weights_BLA = jnp.where(is_label_BLA, weights_BL[..., None], 0.0)
  first = min(labels_BLA.shape[-1], indices_BLK.shape[-1])
  return ConceptPredictionLoss(
    loss=Weighted.of(loss_BL, weights_BL),
    excess=Weighted.of(loss_BL - least_BL, weights_BL),
    recall=Weighted.of(is_hit_BLAK.any(axis=-1), label_weights_BLA),
    recall_first=Weighted.of(is_hit_BLAK[..., :first].any(axis=-1), label_weights_BLA),
  )
