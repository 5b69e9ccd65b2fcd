"""Concept labels: which active latents of the teacher's autoencoder matter for what comes next.

CoCoMix (arXiv 2502.08524, Eq. 1 and the released concept extractor), reference variant:

    g_t     = d(sum of the teacher's token losses) / d h_t      at the tapped residual stream
    score_j = value_j * <decoder row j, g_t>                    for the k active latents j only
    labels  = the 4 active latents with the largest score

The score leaves out the factor s_t of the autoencoder's normalisation: it is positive and the same for
all latents of a token, so it does not change the order. The SUM of the losses is used because a mean
over a large batch divides gradients down to where half precision loses them.

Nothing here knows a transformer: the upper half comes in as a function of the tapped activations.
Arrays: B batch, L positions, D width, C latents, K active latents, A labels a position.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr import names
from nr.labels import NO_LABEL
from nr.spec import Spec

_CHOICES = {
  "act": ("post", "pre"),
  "scope": ("future", "next"),
  "eval_point": ("original", "recon"),
  "sign": ("paper", "negated", "abs"),
  "weights": ("uniform", "score"),
}
_NOT_YET = {("act", "pre"), ("scope", "next"), ("eval_point", "recon"), ("weights", "score")}


@dataclasses.dataclass(frozen=True)
class AttributionSpec(Spec):
  """Every axis along which the paper, its code and its critics differ; the default is recommended.

  Attributes:
    k_attr: labels a position.
    act: multiply by the activation after ("post", released code) or before ("pre", Eq. 1 of the
      first version) top-k.
    scope: differentiate the loss of all later positions ("future", code) or of the next token only.
    eval_point: gradient at the original activation (code) or at its reconstruction ("recon", Eq. 1).
    sign: largest scores of activation times gradient of the loss ("paper": latents that RAISE the
      loss), of their negative, or of their magnitude.
    restrict_active: choose among active latents only; else inactive ones (score 0, lowest index
      first) fill in where fewer than k_attr scores are positive, as the released code does.
    mask_last: no labels at the last position, on which no loss depends.
    mask_first: no labels at position 0 of a window, whose activation is abnormal in many models.
    weights: labels count equally or by score.
    drop_nonpositive: leave out labels whose (signed) score is not positive.
  """

  k_attr: int = 4
  act: str = "post"
  scope: str = "future"
  eval_point: str = "original"
  sign: str = "paper"
  restrict_active: bool = True
  mask_last: bool = True
  mask_first: bool = False
  weights: str = "uniform"
  drop_nonpositive: bool = False

  def __post_init__(self):
    for field, allowed in _CHOICES.items():
      value = getattr(self, field)
      if value not in allowed:
        raise ValueError(names.unknown(f"targets.{field}", value, allowed))
      if (field, value) in _NOT_YET:
        raise ValueError(f"targets.{field}={value!r} is not available yet; use {allowed[0]!r}")
    if self.k_attr < 1:
      raise ValueError(f"targets.k_attr={self.k_attr} must be at least 1")

  @classmethod
  def parity(cls, **changes) -> "AttributionSpec":
    """Returns the released code's behaviour, its arbitrary labels included."""
    return cls(**{"restrict_active": False, "mask_last": False, **changes})

  def check(self, active_latents: int) -> None:
    """Raises ValueError when more labels are asked for than latents are active."""
    if self.k_attr > active_latents:
      raise ValueError(
        f"targets.k_attr={self.k_attr} is above the {active_latents} active latents of the sparse"
        f" autoencoder; use at most {active_latents}"
      )


class ConceptLabels(NamedTuple):
  """Labels of a batch and what the report counts about them.

  Attributes:
    labels_BLA: int32 latents by falling score, NO_LABEL where there is none.
    positive_BL: int32, active latents with a positive (signed) score.
    scored_BL: bool, positions that may carry labels.
  """

  labels_BLA: jax.Array
  positive_BL: jax.Array
  scored_BL: jax.Array


def concept_labels(
  hidden_BLD: jax.Array,
  upper_loss: Callable[[jax.Array], jax.Array],
  values_BLK: jax.Array,
  indices_BLK: jax.Array,
  decoder_CD: jax.Array,
  weights_BL: jax.Array,
  spec: AttributionSpec,
) -> ConceptLabels:
  """Labels every position with the latents that its activation owes the teacher's loss.

  Args:
    hidden_BLD: the teacher's residual stream at the tap.
    upper_loss: from such activations to the scalar SUM of the token losses (weights applied inside).
      It closes over the parameters, so no gradient of a parameter is ever formed.
    values_BLK: the active latents' values after ReLU.
    indices_BLK: their indices.
    decoder_CD: decoder rows.
    weights_BL: weights of the token losses; positions of weight 0 get no label.
    spec: which variant.

  Raises:
    ValueError: k_attr above K.
  """
  gradient_BLD = hidden_gradient(upper_loss, hidden_BLD)
  scores_BLK = attribution_scores(values_BLK, indices_BLK, decoder_CD, gradient_BLD)
  masks = {"mask_last": spec.mask_last, "mask_first": spec.mask_first}
  scored_BL = labelled_positions(weights_BL, **masks)
  labels_BLA = select_labels(
    scores_BLK, indices_BLK, scored_BL, decoder_CD.shape[0], spec, active_BLK=values_BLK > 0
  )
  positive_BL = (signed(scores_BLK, spec.sign) > 0).sum(-1, dtype=jnp.int32)
  return ConceptLabels(labels_BLA, jnp.where(scored_BL, positive_BL, 0), scored_BL)


def hidden_gradient(upper_loss: Callable[[jax.Array], jax.Array], hidden_BLD: jax.Array) -> jax.Array:
  """Returns d upper_loss / d hidden, from the top only down to the tap."""
  loss, pull_back = jax.vjp(upper_loss, hidden_BLD)
  return pull_back(jnp.ones_like(loss))[0]


def attribution_scores(
  values_BLK: jax.Array, indices_BLK: jax.Array, decoder_CD: jax.Array, gradient_BLD: jax.Array
) -> jax.Array:
  """Returns value_j * <decoder row j, gradient> for the active latents only, at least float32."""
  wide = jnp.promote_types(gradient_BLD.dtype, jnp.float32)
  rows_BLKD = decoder_CD[indices_BLK].astype(wide)
  # A product and a sum, not a dot: one small product a token is slow on CPU, and the rows are never written out.
  along_BLK = (rows_BLKD * gradient_BLD[..., None, :].astype(wide)).sum(-1)
  return values_BLK * along_BLK


def labelled_positions(weights_BL: jax.Array, *, mask_last: bool, mask_first: bool = False) -> jax.Array:
  """Returns which positions may carry labels.

  A position counts where its token loss does. The last one has no token loss; with `mask_last` it is
  left out, else (parity with the released code) it counts where the one before it does. `mask_first`
  leaves out the first position of every window too.
  """
  scored_BL = weights_BL > 0
  last_B = jnp.zeros_like(scored_BL[:, -1]) if mask_last else scored_BL[:, -1] | scored_BL[:, -2]
  scored_BL = scored_BL.at[:, -1].set(last_B)
  return scored_BL.at[:, 0].set(False) if mask_first else scored_BL


def select_labels(
  scores_BLK: jax.Array,
  indices_BLK: jax.Array,
  scored_BL: jax.Array,
  num_latents: int,
  spec: AttributionSpec,
  *,
  active_BLK: jax.Array | None = None,
) -> jax.Array:
  """Returns the int32 labels [B, L, A] of the largest signed scores, NO_LABEL where there are none.

  Among equal scores the latent with the lowest index wins, as in a top-k over all C latents.
  With `restrict_active`, slots that the ReLU left at 0 (all active when `active_BLK` is None) are no
  labels: their score of 0 would beat the negative scores of latents that did fire.

  Raises:
    ValueError: k_attr above K.
  """
  spec.check(indices_BLK.shape[-1])
  order_BLK = jnp.argsort(indices_BLK, axis=-1)
  indices_BLK = jnp.take_along_axis(indices_BLK, order_BLK, axis=-1)
  ranked_BLK = signed(jnp.take_along_axis(scores_BLK, order_BLK, axis=-1), spec.sign)
  if spec.restrict_active:
    if active_BLK is not None:
      ranked_BLK = jnp.where(jnp.take_along_axis(active_BLK, order_BLK, axis=-1), ranked_BLK, -jnp.inf)
    best_BLA, places_BLA = jax.lax.top_k(ranked_BLK, spec.k_attr)
    labels_BLA = jnp.take_along_axis(indices_BLK, places_BLA, axis=-1)
  else:
    batch = jnp.indices(indices_BLK.shape, sparse=True)[:-1]
    dense_BLC = jnp.zeros((*indices_BLK.shape[:-1], num_latents), ranked_BLK.dtype)
    best_BLA, labels_BLA = jax.lax.top_k(dense_BLC.at[*batch, indices_BLK].set(ranked_BLK), spec.k_attr)
  kept_BLA = scored_BL[..., None] & (best_BLA > -jnp.inf)
  if spec.drop_nonpositive:
    kept_BLA = kept_BLA & (best_BLA > 0)
  return jnp.where(kept_BLA, labels_BLA, NO_LABEL).astype(jnp.int32)


def signed(scores: jax.Array, sign: str) -> jax.Array:
  """Turns scores so that the wanted ones are largest: as they are, negated, or their magnitude."""
  return {"paper": scores, "negated": -scores, "abs": jnp.abs(scores)}[sign] + 0.0  # no negative zeros
