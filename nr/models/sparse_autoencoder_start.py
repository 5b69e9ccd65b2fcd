"""Where the training of a sparse autoencoder starts, and the form in which it is used afterwards.

Initialisation as in the released openai/sparse_autoencoder (train.py): the pre-bias is the geometric median
of activations, encoder and decoder are tied, and reconstructions of unit vectors have unit norm.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models import parameters
from nr.models.sparse_autoencoder import SparseAutoencoder, normalise, unit_rows
from nr.models.sparse_autoencoder_spec import SparseAutoencoderSpec


def geometric_median(
  points_ND: jax.Array, *, num_iterations: int = 100, tolerance: float = 1e-5
) -> jax.Array:
  """Returns the point [D] with the least sum of Euclidean distances, by Weiszfeld's iteration.

  Args:
    points_ND: sample, one point a row.
    num_iterations: at most this many iterations from the mean.
    tolerance: stop when the estimate moves less than this (in the unit of the points).
  """
  points_ND = points_ND.astype(jnp.promote_types(points_ND.dtype, jnp.float32))

  def unfinished(state):
    step, _, moved = state
    return (step < num_iterations) & (moved > tolerance)

  def improve(state):
    step, median_D, _ = state
    distances_N = jnp.linalg.norm(points_ND - median_D, axis=-1)
    weights_N = 1 / jnp.maximum(distances_N, 1e-8)  # a point at the estimate must not divide by 0
    improved_D = (weights_N @ points_ND) / weights_N.sum()
    return step + 1, improved_D, jnp.linalg.norm(improved_D - median_D)

  start = (0, points_ND.mean(0), jnp.asarray(jnp.inf, points_ND.dtype))
  return jax.lax.while_loop(unfinished, improve, start)[1]


def initial_pre_bias(spec: SparseAutoencoderSpec, activations_ND: jax.Array) -> jax.Array:
  """Returns the geometric median [D] of a sample of raw activations, in the normalised space.

  Args:
    spec: settings.
    activations_ND: raw activations of the model, a few thousand rows (32,768 in the release).

  Raises:
    ValueError: the sample's width is not `spec.model_dim`.
  """
  if activations_ND.shape[-1] != spec.model_dim:
    raise ValueError(
      f"sample of activations has width {activations_ND.shape[-1]}, model_dim is {spec.model_dim}"
    )
  return geometric_median(normalise(activations_ND, spec.epsilon, spec.normalisation).values_TD)


def initialise(
  spec: SparseAutoencoderSpec, pre_bias_D: jax.Array, key: jax.Array, *, rescale_encoder: bool = True
) -> dict:
  """Returns initial parameters as the released trainer makes them.

  Tied encoder and decoder, unit decoder rows, latent bias 0, and optionally the encoder divided by the
  mean norm of the reconstruction of 256 random unit vectors around the pre-bias (the release reports no
  clear benefit).

  Args:
    spec: settings.
    pre_bias_D: see `initial_pre_bias`.
    key: random key; the same key gives the same parameters.
    rescale_encoder: whether to divide the encoder as described.
  """
  key_model, key_probe = jax.random.split(key)
  graphdef, params = parameters.split(SparseAutoencoder(spec, rngs=nnx.Rngs(key_model)))
  params = {**params, "pre_bias": pre_bias_D.astype(spec.param_dtype)}
  if rescale_encoder:
    probes_ND = jax.random.normal(key_probe, (256, spec.model_dim), spec.param_dtype)
    autoencoder = parameters.merge(graphdef, params)
    decoded_ND = _decode_without_bias(autoencoder, unit_rows(probes_ND) + params["pre_bias"])
    norm = jnp.linalg.norm(decoded_ND, axis=-1).mean().astype(spec.param_dtype)
    norm = jnp.where(norm == 0, 1, norm)  # thresholds that no probe reaches
    params = {**params, "encoder": {"kernel": params["encoder"]["kernel"] / norm}}
  return params


def _decode_without_bias(autoencoder: SparseAutoencoder, u_ND: jax.Array) -> jax.Array:
  if autoencoder.spec.arch == "topk":
    return autoencoder.decode_latents(autoencoder.encode(u_ND))
  if autoencoder.spec.is_selecting_in_batch:
    values_NC, _ = autoencoder.select_in_batch(autoencoder.pre_activations(u_ND))
  else:
    values_NC = autoencoder.activations(u_ND)
  return autoencoder.decode_activations(values_NC)


def inference_form(
  spec: SparseAutoencoderSpec, params: Mapping[str, Any], threshold: jax.Array | float | None = None
) -> tuple[SparseAutoencoderSpec, dict]:
  """Returns the autoencoder in the form that is used, saved and exchanged.

  batchtopk and matryoshka become jumprelu with the one threshold that training found (arXiv 2412.06410
  section 3), and norms of decoder rows move into the encoder where decoder_norm is "scaled". Others are
  returned as they are.

  Args:
    spec: settings of the training.
    params: trained parameters.
    threshold: running mean of the smallest kept activation; for batchtopk and matryoshka.

  Raises:
    ValueError: no threshold, or one that no batch has set, where there must be one.
  """
  params = dict(params)
  if spec.decoder_norm == "scaled":
    params, spec = _with_unit_rows(params), dataclasses.replace(spec, decoder_norm="unit")
  if spec.is_selecting_in_batch:
    if threshold is None or not threshold >= 0:
      raise ValueError(
        f"threshold={threshold}: arch={spec.arch!r} needs the threshold that its training kept"
      )
    params["threshold"] = jnp.full((spec.num_latents,), threshold, spec.param_dtype)
    spec = spec.in_architecture("jumprelu")
  return spec, params


def _with_unit_rows(params: Mapping[str, Any]) -> dict:
  """Moves the norms of decoder rows into the encoder; thresholds are in units of the rows already."""
  rows_CD = params["decoder"]["kernel"]
  norms_C = jnp.linalg.norm(rows_CD, axis=-1)
  moved = {
    name: params[name] * norms_C for name in ("latent_bias", "gate_bias", "magnitude_bias") if name in params
  }
  return {
    **params,
    **moved,
    "encoder": {"kernel": params["encoder"]["kernel"] * norms_C},
    "decoder": {"kernel": unit_rows(rows_CD)},
  }
