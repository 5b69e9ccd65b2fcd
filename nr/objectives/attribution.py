"""Concept labels: which latents of the teacher's autoencoder matter for what comes next.

CoCoMix (arXiv 2502.08524, Eq. 1 and the released concept extractor). With h_t the tapped residual stream,
c_t the autoencoder's code of it and D(c_t) its reconstruction:

    g_t     = gradient of the teacher's token losses with respect to row t of the stream
    score_j = activation_j * <decoder row j, g_t>
    labels  = the 4 latents with the largest score

The paper, its code and its critics differ in which activation, which losses, where the gradient is
taken, which sign and which candidates: `AttributionSpec` has an axis for each. The score leaves out the
factor s_t of the autoencoder's normalisation: it is positive and the same for all latents of a token, so
that neither their order nor their shares change. The SUM of the losses is used because a mean over a
large batch divides gradients down to where half precision loses them.

Nothing here knows a transformer: the teacher comes in as functions of the tapped activations.
Arrays: B batch, L positions, D width, C latents, K active latents, A labels a position.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr import names
from nr.labels import NO_LABEL
from nr.objectives import label_ranking
from nr.objectives.label_ranking import Latents, Ranking
from nr.spec import Spec

_CHOICES = {
  "criterion": ("attribution", "activation"),
  "act": ("post", "pre"),
  "scope": ("future", "next"),
  "eval_point": ("original", "recon", "recon_everywhere"),
  "sign": ("paper", "negated", "abs"),
  "weights": ("uniform", "score"),
}

CONCEPT_CHUNK = 4096
"""Latents that are scored at a time where all of them are candidates."""

POSITIONS_AT_ONCE = 8
"""Positions replaced at a time where every one needs a pass of its own."""


@dataclasses.dataclass(frozen=True)
class AttributionSpec(Spec):
  """Every axis along which the paper, its code and its critics differ; the default is recommended.

  Attributes:
    k_attr: labels a position.
    criterion: latents with the largest attribution scores ("attribution"), or with the largest
      activations ("activation", the paper's ablation of section 3.3), for which no gradient is taken.
    act: multiply by the activation after top-k and ReLU ("post", released code) or by the one before
      ("pre", Eq. 1 of the first version, whose candidates are all latents: see `restrict_active`).
    scope: differentiate the losses of all later positions ("future", code) or of the next token only
      ("next", Eq. 1).
    eval_point: where the gradient at position t is taken: at the original activations ("original",
      code); with position t alone at its reconstruction, the others original ("recon", Eq. 1); with all
      positions at their reconstructions ("recon_everywhere", ours: not Eq. 1, but one plain pass).
      "recon" with scope "next" takes one pass too. With scope "future" it takes as many passes as the
      window has positions, because every later row differs for every position that is replaced.
    sign: largest scores of activation times gradient of the loss ("paper": latents that RAISE the
      loss), of their negative, or of their magnitude.
    restrict_active: choose among active latents only. With act "post", inactive ones (score 0, lowest
      index first) otherwise fill in where fewer than k_attr scores are positive, as in the released
      code. With act "pre" it leaves out most candidates of Eq. 1; False is Eq. 1 as written. An active
      latent of a TopK autoencoder has the same activation before and after, so that with True "pre" and
      "post" agree there.
    mask_last: no labels at the last position, on which no loss depends.
    mask_first: no labels at position 0 of a window, whose activation is abnormal in many models.
    weights: labels of a position count equally ("uniform") or by their share of the sum of the signed
      scores ("score", ours), which leaves out labels whose signed score is not positive.
    drop_nonpositive: leave out labels whose (signed) score is not positive.
  """

  k_attr: int = 4
  criterion: str = "attribution"
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
    if self.k_attr < 1:
      raise ValueError(f"targets.k_attr={self.k_attr} must be at least 1")
    if self.criterion == "activation":
      for field in ("act", "scope", "eval_point", "sign"):
        value, default = getattr(self, field), getattr(type(self), field)
        if value != default:
          raise ValueError(
            f"targets.{field}={value!r} decides nothing with targets.criterion='activation'; leave it at {default!r}"
          )

  @classmethod
  def parity(cls, **changes) -> "AttributionSpec":
    """Returns the released code's behaviour, its arbitrary labels included."""
    return cls(**{"restrict_active": False, "mask_last": False, **changes})

  @classmethod
  def equation_1(cls, **changes) -> "AttributionSpec":
    """Returns Eq. 1 of the paper's first version to the letter; masks as recommended."""
    literal = {"act": "pre", "scope": "next", "eval_point": "recon", "restrict_active": False}
    return cls(**{**literal, **changes})

  @property
  def needs_reconstruction(self) -> bool:
    """Whether the gradient is taken at reconstructions."""
    return self.eval_point != "original"

  def check(self, active_latents: int, num_latents: int | None = None) -> None:
    """Raises ValueError when more labels are asked for than there can be candidates.

    Args:
      active_latents: most latents that are active at a position.
      num_latents: all of them, where it is known.
    """
    most, what = (active_latents, "active latents") if self.restrict_active else (num_latents, "latents")
    if most is not None and self.k_attr > most:
      raise ValueError(
        f"targets.k_attr={self.k_attr} is above the {most} {what} of the sparse autoencoder; use at most {most}"
      )


class UpperHalf(NamedTuple):
  """The teacher above the tap. Both functions close over its parameters, so that no gradient of one is formed.

  Attributes:
    loss: activations [B, L, D] -> scalar SUM of the token losses, weights applied.
    loss_apart: (rows [B, L, D], context [B, L, D] or None) -> the same sum, where the loss of position t
      is the one with row t of the context replaced by row t of `rows` (None: the rows are the context),
      and its gradient reaches row t of `rows` only. See `nr.models.diagonal_gradient`.
  """

  loss: Callable[[jax.Array], jax.Array]
  loss_apart: Callable[[jax.Array, jax.Array | None], jax.Array]


class ConceptLabels(NamedTuple):
  """Labels of a batch and what the report counts about them.

  Attributes:
    labels_BLA: int32 latents by falling score, NO_LABEL where there is none.
    positive_BL: int32, candidates with a positive (signed) score.
    scored_BL: bool, positions that may carry labels.
    weights_BLA: float16 shares of the labels, 0 where there is none, else summing to 1 up to rounding;
      None where labels count equally.
  """

  labels_BLA: jax.Array
  positive_BL: jax.Array
  scored_BL: jax.Array
  weights_BLA: jax.Array | None = None


def concept_labels(
  upper: UpperHalf,
  hidden_BLD: jax.Array,
  reconstruction_BLD: jax.Array | None,
  latents: Latents,
  weights_BL: jax.Array,
  spec: AttributionSpec,
  *,
  concept_chunk: int = CONCEPT_CHUNK,
  positions_at_once: int = POSITIONS_AT_ONCE,
) -> ConceptLabels:
  """Labels every position with the latents that its activation owes the teacher's loss.

  Args:
    upper: the teacher above the tap.
    hidden_BLD: its residual stream at the tap.
    reconstruction_BLD: the autoencoder's reconstruction of it in the teacher's space; needed unless
      `eval_point` is "original".
    latents: what the autoencoder reads there.
    weights_BL: weights of the token losses; positions of weight 0 get no label.
    spec: which variant.
    concept_chunk: latents scored at a time where all are candidates.
    positions_at_once: positions replaced at a time where each needs a pass of its own.

  Raises:
    ValueError: more labels than candidates, or no reconstruction where one is needed.
  """
  spec.check(latents.indices_BLK.shape[-1], latents.decoder_CD.shape[0])
  gradient_BLD = None
  if spec.criterion == "attribution":
    gradient_BLD = tap_gradient(upper, hidden_BLD, reconstruction_BLD, spec, positions_at_once)
  scored_BL = labelled_positions(weights_BL, mask_last=spec.mask_last, mask_first=spec.mask_first)
  return select_labels(rank(latents, gradient_BLD, spec, concept_chunk), scored_BL, spec)


def tap_gradient(
  upper: UpperHalf,
  hidden_BLD: jax.Array,
  reconstruction_BLD: jax.Array | None,
  spec: AttributionSpec,
  positions_at_once: int = POSITIONS_AT_ONCE,
) -> jax.Array:
  """Returns g [B, L, D]: row t is the gradient that position t is scored with (`scope`, `eval_point`)."""
  if spec.needs_reconstruction and reconstruction_BLD is None:
    raise ValueError(f"targets.eval_point={spec.eval_point!r} needs the reconstruction of the activations")
  if spec.eval_point == "recon" and spec.scope == "future":
    return replaced_gradient(upper.loss, hidden_BLD, reconstruction_BLD, positions_at_once)
  point_BLD = reconstruction_BLD if spec.needs_reconstruction else hidden_BLD
  if spec.scope == "future":
    return hidden_gradient(upper.loss, point_BLD)
  context_BLD = hidden_BLD if spec.eval_point == "recon" else None
  return hidden_gradient(lambda rows_BLD: upper.loss_apart(rows_BLD, context_BLD), point_BLD)


def hidden_gradient(upper_loss: Callable[[jax.Array], jax.Array], hidden_BLD: jax.Array) -> jax.Array:
  """Returns d upper_loss / d hidden, from the top only down to the tap."""
  loss, pull_back = jax.vjp(upper_loss, hidden_BLD)
  return pull_back(jnp.ones_like(loss))[0]


def replaced_gradient(
  upper_loss: Callable[[jax.Array], jax.Array],
  hidden_BLD: jax.Array,
  point_BLD: jax.Array,
  positions_at_once: int = POSITIONS_AT_ONCE,
) -> jax.Array:
  """Returns row t of d upper_loss at activations of which row t alone is replaced by that of `point`.

  One forward and backward pass of the upper half for each of the L positions, `positions_at_once` of
  them together: for the exact ablation, not for large corpora.
  """
  point_BLD = point_BLD.astype(hidden_BLD.dtype)

  def at_position(position: jax.Array) -> jax.Array:
    def loss(row_BD: jax.Array) -> jax.Array:
      return upper_loss(hidden_BLD.at[:, position].set(row_BD))

    return hidden_gradient(loss, point_BLD[:, position])

  positions = jnp.arange(hidden_BLD.shape[1])
  return jax.lax.map(at_position, positions, batch_size=positions_at_once).swapaxes(0, 1)


def rank(
  latents: Latents, gradient_BLD: jax.Array | None, spec: AttributionSpec, concept_chunk: int = CONCEPT_CHUNK
) -> Ranking:
  """Returns the k_attr candidates with the largest signed scores (`act`, `restrict_active`, `sign`).

  With criterion "activation" an activation is its own score, and there is no gradient.
  """
  rank_slots = label_ranking.rank_active if spec.restrict_active else label_ranking.rank_active_and_zeros
  if spec.criterion == "activation":
    return rank_slots(latents, latents.values_BLK, spec.k_attr)
  if spec.act == "pre" and not spec.restrict_active:
    return label_ranking.rank_all(latents, gradient_BLD, spec.sign, spec.k_attr, concept_chunk)
  values_BLK = label_ranking.pre_activations(latents) if spec.act == "pre" else latents.values_BLK
  scores_BLK = attribution_scores(values_BLK, latents.indices_BLK, latents.decoder_CD, gradient_BLD)
  return rank_slots(latents, label_ranking.signed(scores_BLK, spec.sign), spec.k_attr)


def attribution_scores(
  values_BLK: jax.Array, indices_BLK: jax.Array, decoder_CD: jax.Array, gradient_BLD: jax.Array
) -> jax.Array:
  """Returns value_j * <decoder row j, gradient> for the given latents only, at least float32."""
  return values_BLK * label_ranking.along_rows(decoder_CD, indices_BLK, gradient_BLD)


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


def select_labels(ranking: Ranking, scored_BL: jax.Array, spec: AttributionSpec) -> ConceptLabels:
  """Turns ranked candidates into labels: none where there was no candidate, or none may be."""
  best_BLA = ranking.scores_BLA
  kept_BLA = scored_BL[..., None] & (best_BLA > -jnp.inf)
  if spec.drop_nonpositive or spec.weights == "score":
    kept_BLA = kept_BLA & (best_BLA > 0)
  weights_BLA = None
  if spec.weights == "score":
    # Rounded here, not where they are stored, so that labels made in a train step equal stored ones.
    weights_BLA = shares(best_BLA, kept_BLA).astype(jnp.float16)
    kept_BLA = kept_BLA & (weights_BLA > 0)
  labels_BLA = jnp.where(kept_BLA, ranking.latents_BLA, NO_LABEL).astype(jnp.int32)
  positive_BL = jnp.where(scored_BL, ranking.positive_BL, 0)
  return ConceptLabels(labels_BLA, positive_BL, scored_BL, weights_BLA)


def shares(scores_BLA: jax.Array, kept_BLA: jax.Array) -> jax.Array:
  """Returns each kept (positive) score over their sum; 0 for the others."""
  kept_scores_BLA = jnp.where(kept_BLA, scores_BLA, 0.0)
  total_BL1 = kept_scores_BLA.sum(axis=-1, keepdims=True)
  return kept_scores_BLA / jnp.where(total_BL1 > 0, total_BL1, 1.0)
