"""Losses of all sparse autoencoders, chosen by their architecture.

With u the normalised activations, r the reconstruction, L_mse and L_aux as in `sparse_coding`
(mean over tokens and width of (r - u)^2, times the fixed mse_scale), lambda the sparsity weight:

    topk         L_mse + alpha L_aux                                        arXiv 2406.04093
    batchtopk    the same, latents chosen over the batch                    arXiv 2412.06410
    matryoshka   sum over prefixes m of L_mse(first m latents) + alpha L_aux  arXiv 2503.17547
    jumprelu     L_mse + lambda penalty                                     arXiv 2407.14435
                 penalty = mean L0, (mean L0 / k - 1)^2, or mean sum_C tanh(tanh_scale f)
    gated        L_mse + lambda mean sum_C ReLU(gate) + L_mse(decoded from ReLU(gate))   arXiv 2404.16014
    relu         L_mse + lambda mean sum_C f

L_mse is a fraction of variance here and a sum over the width in the libraries, so lambda is D / variance
times smaller than theirs. A penalty counts activations in units of unit decoder rows, which is the factor
that libraries write as the norm of a row.

With gradient accumulation the choice of batchtopk and matryoshka, the penalty "target" and L_aux are those
of the microbatch; everything else is a sum over tokens. The autoencoder is handed in as an object, as in
`sparse_coding`. Arrays: N tokens, D width, C latents.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.objectives.sparse_coding import (
  FIRED_ABOVE,
  FiredCounts,
  auxiliary_loss,
  dead_latents,
  prepare,
  topk_loss,
)
from nr.objectives.weighted import LossOutput, Weighted


class BatchCounts(NamedTuple):
  """Statistics of one batch of an autoencoder that chooses over the batch, summed over microbatches.

  Attributes:
    fired_C: int32, tokens on which each latent was active (value > 1e-3).
    tokens: int32 scalar, tokens seen.
    smallest: sum over microbatches of the smallest activation kept.
    batches: int32, microbatches that kept any.
  """

  fired_C: jax.Array
  tokens: jax.Array
  smallest: jax.Array
  batches: jax.Array


def sparse_coding_loss(
  autoencoder: Any, extra: dict, activations_ND: jax.Array, weights_N: jax.Array | None = None
) -> LossOutput:
  """Returns the loss of a batch of raw activations.

  Args:
    autoencoder: a sparse autoencoder with its parameters.
    extra: see `sparse_coding.init_extra`.
    activations_ND: raw activations of the model, any float type.
    weights_N: weight of each token, 0 leaves it out; ones when None.

  Returns:
    LossOutput: loss; metrics `fvu` (see `sparse_coding.topk_loss`), `l0`, `dead_fraction`, and by
    architecture `auxiliary`, `sparsity` (the penalty before its weight), `fvu_first_M` for every inner
    prefix; statistics for `sparse_coding.update_extra`.
  """
  loss = _LOSSES[autoencoder.spec.arch]
  return loss(autoencoder, extra, activations_ND, weights_N)


def batch_top_k_loss(
  autoencoder: Any, extra: dict, activations_ND: jax.Array, weights_N: jax.Array | None = None
) -> LossOutput:
  """Returns the loss of BatchTopK, or of its nested form where the settings name prefixes."""
  spec = autoencoder.spec
  u_ND, weights_N, counted_N = prepare(autoencoder, activations_ND, weights_N)
  scores_NC = autoencoder.pre_activations(u_ND)
  values_NC, smallest = autoencoder.select_in_batch(scores_NC, counted_N)
  is_any = jnp.isfinite(smallest)
  counts = _count(values_NC, counted_N)
  statistics = BatchCounts(*counts, jnp.where(is_any, smallest, 0), is_any.astype(jnp.int32))
  dead_C = dead_latents(spec, extra, counts)

  r_ND, first, errors = autoencoder.pre_bias[...], 0, {}
  for stop in spec.prefixes or (spec.num_latents,):
    r_ND = r_ND + autoencoder.decode_activations(values_NC, first, stop)
    errors[stop] = _error(r_ND, u_ND, extra, weights_N)
    first = stop
  mse = errors.pop(spec.num_latents)
  residual_ND = jax.lax.stop_gradient(u_ND - r_ND)
  auxiliary = auxiliary_loss(autoencoder, scores_NC, residual_ND, dead_C, weights_N)
  total = mse.total + sum(error.total for error in errors.values()) + spec.alpha * auxiliary * mse.weight
  metrics = _metrics(
    mse, values_NC, weights_N, dead_C, auxiliary=Weighted(auxiliary * mse.weight, mse.weight)
  )
  metrics.update({f"fvu_first_{size}": error for size, error in errors.items()})
  return LossOutput(Weighted(total, mse.weight), metrics, statistics)


def jump_relu_loss(
  autoencoder: Any, extra: dict, activations_ND: jax.Array, weights_N: jax.Array | None = None
) -> LossOutput:
  """Returns the loss of JumpReLU; only the penalty and the reconstruction reach the thresholds."""
  spec = autoencoder.spec
  u_ND, weights_N, counted_N = prepare(autoencoder, activations_ND, weights_N)
  scores_NC = autoencoder.pre_activations(u_ND)
  values_NC = autoencoder.jump(scores_NC)
  if spec.penalty == "tanh":
    counted = Weighted.of(jnp.tanh(spec.tanh_scale * values_NC).sum(-1), weights_N)
  else:
    counted = Weighted.of(autoencoder.steps(scores_NC).sum(-1), weights_N)
  if spec.penalty == "target":
    counted = Weighted(jnp.square(counted.mean() / spec.k - 1) * counted.weight, counted.weight)
  return _penalised(autoencoder, extra, u_ND, values_NC, counted, weights_N, counted_N)


def gated_loss(
  autoencoder: Any, extra: dict, activations_ND: jax.Array, weights_N: jax.Array | None = None
) -> LossOutput:
  """Returns the loss of a gated autoencoder; its gate is trained by the second reconstruction and the penalty."""
  u_ND, weights_N, counted_N = prepare(autoencoder, activations_ND, weights_N)
  gates_NC, magnitudes_NC = autoencoder.gates_and_magnitudes(u_ND)
  values_NC = jnp.where(gates_NC > 0, jax.nn.relu(magnitudes_NC), 0)
  open_NC = jax.nn.relu(gates_NC)
  frozen = autoencoder.spec.is_decoder_frozen
  rows_CD, bias_D = autoencoder.decoder_rows(), autoencoder.pre_bias[...]
  if frozen:
    rows_CD, bias_D = jax.lax.stop_gradient((rows_CD, bias_D))
  auxiliary = _error(autoencoder.weigh(open_NC, rows_CD) + bias_D, u_ND, extra, weights_N)
  penalty = Weighted.of(open_NC.sum(-1), weights_N)
  return _penalised(autoencoder, extra, u_ND, values_NC, penalty, weights_N, counted_N, auxiliary)


def relu_loss(
  autoencoder: Any, extra: dict, activations_ND: jax.Array, weights_N: jax.Array | None = None
) -> LossOutput:
  """Returns the loss of a ReLU autoencoder with an L1 penalty."""
  u_ND, weights_N, counted_N = prepare(autoencoder, activations_ND, weights_N)
  values_NC = jax.nn.relu(autoencoder.pre_activations(u_ND))
  penalty = Weighted.of(values_NC.sum(-1), weights_N)
  return _penalised(autoencoder, extra, u_ND, values_NC, penalty, weights_N, counted_N)


_LOSSES = {
  "topk": topk_loss,
  "batchtopk": batch_top_k_loss,
  "matryoshka": batch_top_k_loss,
  "jumprelu": jump_relu_loss,
  "gated": gated_loss,
  "relu": relu_loss,
}


def sparsity_weight(spec: Any, extra: dict) -> jax.Array | float:
  """Returns lambda at this update: it grows linearly from 0 over `sparsity_warmup` updates."""
  if not spec.sparsity_warmup:
    return spec.sparsity
  return spec.sparsity * jnp.minimum(1.0, extra["step"] / spec.sparsity_warmup)


def _penalised(
  autoencoder: Any,
  extra: dict,
  u_ND: jax.Array,
  values_NC: jax.Array,
  penalty: Weighted,
  weights_N: jax.Array,
  counted_N: jax.Array,
  auxiliary: Weighted | None = None,
) -> LossOutput:
  """Returns the error of decoded activations plus the weighted penalty, and an auxiliary error where there is one."""
  spec = autoencoder.spec
  mse = _error(autoencoder.decode_activations(values_NC) + autoencoder.pre_bias[...], u_ND, extra, weights_N)
  statistics = _count(values_NC, counted_N)
  total = mse.total + sparsity_weight(spec, extra) * penalty.total
  named = {"sparsity": penalty}
  if auxiliary is not None:
    total, named = total + auxiliary.total, {**named, "auxiliary": auxiliary}
  metrics = _metrics(mse, values_NC, weights_N, dead_latents(spec, extra, statistics), **named)
  return LossOutput(Weighted(total, mse.weight), metrics, statistics)


def _error(r_ND: jax.Array, u_ND: jax.Array, extra: dict, weights_N: jax.Array) -> Weighted:
  return Weighted.of(jnp.square(r_ND - u_ND).mean(-1) * extra["mse_scale"], weights_N)


def _metrics(
  mse: Weighted, values_NC: jax.Array, weights_N: jax.Array, dead_C: jax.Array, **others: Weighted
) -> dict[str, Weighted]:
  return {
    "fvu": mse,
    "l0": Weighted.of((values_NC > 0).sum(-1), weights_N),
    "dead_fraction": Weighted(dead_C.mean() * mse.weight, mse.weight),
    **others,
  }


def _count(values_NC: jax.Array, counted_N: jax.Array) -> FiredCounts:
  """Counts on how many tokens each latent was active."""
  active_NC = (values_NC > FIRED_ABOVE) & counted_N[:, None]
  return FiredCounts(active_NC.sum(0, dtype=jnp.int32), counted_N.sum(dtype=jnp.int32))
