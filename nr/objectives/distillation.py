"""Learning from a teacher's outputs: its next-token distribution, or its hidden state.

The two baselines with which CoCoMix (arXiv 2502.08524, section 3.3 and appendix A) is compared. Published:
knowledge distillation adds 0.1 KL(teacher || student) to every token's loss; direct prediction regresses
the teacher's hidden state with an l1, l2 or cosine loss. Not published: the temperature (1 here), and means or
sums over the width (means here).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr import names
from nr.objectives.chunks import over_positions
from nr.objectives.weighted import Weighted

REGRESSIONS = ("l1", "l2", "cosine")


class DistilledLoss(NamedTuple):
  """What a batch says about a student beside its teacher.

  Attributes:
    next_token: nats, negative log-likelihood of the targets under the student.
    divergence: nats, KL(teacher || student) of their next-token distributions, times the temperature
      squared where that is not 1.
  """

  next_token: Weighted
  divergence: Weighted


def distilled_next_token_loss(
  hidden_BLD: jax.Array,
  unembedding_VD: jax.Array,
  teacher_hidden_BLE: jax.Array,
  teacher_unembedding_VE: jax.Array,
  targets_BL: jax.Array,
  weights_BL: jax.Array,
  *,
  temperature: float = 1.0,
  chunk_size: int | None = None,
) -> DistilledLoss:
  """Sums both losses over tokens, the student's logits computed once for the two.

  No gradient reaches the teacher. At temperature T both distributions are softmax(logits / T), and the
  divergence is multiplied by T^2, which keeps its gradient at the scale of T = 1 (arXiv 1503.02531).

  Args:
    hidden_BLD: the student's final-normed hidden states.
    unembedding_VD: its output head.
    teacher_hidden_BLE: the teacher's, of another width as it may be.
    teacher_unembedding_VE: its output head, for the same token ids.
    targets_BL: int32, the token after each position.
    weights_BL: float32, 0 where a position does not count.
    temperature: of both distributions, positive.
    chunk_size: about how many tokens to hold both models' logits for at a time; None: all.
      See `over_positions`.

  Raises:
    ValueError: another vocabulary, a temperature or chunk_size that is not positive.
  """
  if temperature <= 0:
    raise ValueError(f"temperature={temperature!r} must be positive")
  if unembedding_VD.shape[0] != teacher_unembedding_VE.shape[0]:
    raise ValueError(
      f"the student has {unembedding_VD.shape[0]} token ids and its teacher {teacher_unembedding_VE.shape[0]}; "
      "distillation needs the same ones"
    )

  def losses(heads: tuple, hidden_BWD: jax.Array, teacher_BWE: jax.Array, targets_BW: jax.Array) -> tuple:
    logits_BWV = _logits(hidden_BWD, heads[0])
    teacher_logits_BWV = jax.lax.stop_gradient(_logits(teacher_BWE, heads[1]))
    is_target_BWV = jnp.arange(logits_BWV.shape[-1]) == targets_BW[..., None]
    target_BW = jnp.where(is_target_BWV, logits_BWV, 0.0).sum(axis=-1)
    log_student_BWV = jax.nn.log_softmax(logits_BWV / temperature)
    log_teacher_BWV = jax.nn.log_softmax(teacher_logits_BWV / temperature)
    gap_BW = (jnp.exp(log_teacher_BWV) * (log_teacher_BWV - log_student_BWV)).sum(axis=-1)
    return jax.nn.logsumexp(logits_BWV, axis=-1) - target_BW, gap_BW * temperature**2

  heads = unembedding_VD, jax.lax.stop_gradient(teacher_unembedding_VE)
  arrays = hidden_BLD, jax.lax.stop_gradient(teacher_hidden_BLE), targets_BL
  nll_BL, gap_BL = over_positions(losses, heads, arrays, chunk_size)
  return DistilledLoss(Weighted.of(nll_BL, weights_BL), Weighted.of(gap_BL, weights_BL))


def _logits(hidden_BLD: jax.Array, head_VD: jax.Array) -> jax.Array:
  wide = jnp.promote_types(hidden_BLD.dtype, jnp.float32)
  return jnp.einsum("bld,vd->blv", hidden_BLD, head_VD.astype(hidden_BLD.dtype), preferred_element_type=wide)


def regression_loss(
  predicted_BLE: jax.Array, state_BLE: jax.Array, weights_BL: jax.Array, kind: str
) -> Weighted:
  """Sums the distance of predicted from true states over positions.

  Args:
    predicted_BLE: the student's prediction.
    state_BLE: the teacher's state; no gradient reaches it.
    weights_BL: float32, 0 where a position does not count.
    kind: "l1" or "l2", the mean over E of the absolute or squared difference; "cosine", one minus the
      cosine.

  Raises:
    ValueError: an unknown kind.
  """
  if kind not in REGRESSIONS:
    raise ValueError(names.unknown("regression", kind, REGRESSIONS))
  predicted_BLE, state_BLE = predicted_BLE.astype(jnp.float32), state_BLE.astype(jnp.float32)
  state_BLE = jax.lax.stop_gradient(state_BLE)
  if kind == "cosine":
    product_BL = (predicted_BLE * state_BLE).sum(axis=-1)
    return Weighted.of(1 - product_BL / (_norm(predicted_BLE) * _norm(state_BLE)), weights_BL)
  difference_BLE = predicted_BLE - state_BLE
  distance_BLE = jnp.abs(difference_BLE) if kind == "l1" else difference_BLE**2
  return Weighted.of(distance_BLE.mean(axis=-1), weights_BL)


def _norm(x_BLE: jax.Array) -> jax.Array:
  """Returns Euclidean norms [B, L], never 0, with a finite gradient."""
  return jnp.sqrt((x_BLE * x_BLE).sum(axis=-1) + 1e-12)
