"""The TopK sparse autoencoder whose latents are the concepts of CoCoMix.

Forward pass (arXiv 2406.04093 section 2 and the released openai/sparse_autoencoder):

    normalise   mu = mean_D(x), s = std_D(x) unbiased, u = (x - mu) / (s + 1e-5)
    encode      pre = (u - pre_bias) encoder + latent_bias; keep the k largest, then ReLU
    decode      r = values decoder[indices] + pre_bias            (rows of the decoder have unit norm)
    denormalise x_hat = r * s + mu                                (only in the model's own space)

Arrays in this file: T tokens (any leading shape), D model, C latents, K active latents.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nr import names
from nr.models import parameters
from nr.models.partitioning import constrain
from nr.models.top_k import IMPLEMENTATIONS, top_k
from nr.spec import Spec

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "gated", "relu")
NORMALISATIONS = ("layer_norm_unbiased",)
DECODINGS = ("gather", "dense")
_CHOICES = {
  "arch": ARCHITECTURES,
  "normalisation": NORMALISATIONS,
  "decoding": DECODINGS,
  "top_k": IMPLEMENTATIONS,
}


@dataclasses.dataclass(frozen=True)
class SparseAutoencoderSpec(Spec):
  """Settings of a sparse autoencoder.

  Attributes:
    model_dim: width D of the activations.
    num_latents: number C of latents (concepts).
    k: active latents a token.
    k_aux: dead latents used by the auxiliary loss; all of them when fewer are dead.
    alpha: weight of the auxiliary loss.
    dead_tokens: a latent is dead when it has not fired for more than this many tokens.
    epsilon: added to the standard deviation (not inside the root) in the normalisation.
    arch: "topk"; the other names of `ARCHITECTURES` are reserved.
    normalisation: "layer_norm_unbiased", standard deviation with D - 1 in the denominator.
    decoding: "gather" reads k decoder rows a token, "dense" multiplies by the whole decoder; same
      result. Gathering moves less on accelerators, the dense product is quicker for small C on CPU.
    top_k: implementation of the exact top-k (see `nr.models.top_k`); the result does not depend on it.
    dtype: compute type of the two large products; pre-activations and top-k stay float32.
    param_dtype: type of the parameters.
  """

  model_dim: int
  num_latents: int
  k: int
  k_aux: int = 256
  alpha: float = 1 / 32
  dead_tokens: int = 10_000_000
  epsilon: float = 1e-5
  arch: str = "topk"
  normalisation: str = "layer_norm_unbiased"
  decoding: str = "gather"
  top_k: str = "chunked"
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    for field, allowed in _CHOICES.items():
      if getattr(self, field) not in allowed:
        raise ValueError(names.unknown(f"sparse autoencoder {field}", getattr(self, field), allowed))
    if self.arch != "topk":
      raise ValueError(f"sparse autoencoder arch={self.arch!r} is not available yet; use arch='topk'")
    if self.model_dim < 2:
      raise ValueError(f"model_dim={self.model_dim}: the unbiased deviation needs a width of at least 2")
    for name in ("k", "k_aux"):
      value = getattr(self, name)
      if not 1 <= value <= self.num_latents:
        raise ValueError(f"{name}={value} must lie between 1 and num_latents={self.num_latents}")
    if not 0 < self.dead_tokens < 2**30:
      raise ValueError(f"dead_tokens={self.dead_tokens} must lie between 1 and 2**30 - 1 (an int32 counter)")
    if self.alpha < 0:
      raise ValueError(f"alpha={self.alpha} must not be negative; 0 switches the auxiliary loss off")


class Normalised(NamedTuple):
  """Activations in the autoencoder's space and what brings them back.

  Attributes:
    values_TD: normalised activations, float32.
    mean_T1: mean over the width.
    deviation_T1: unbiased standard deviation plus epsilon: the factor that was divided by.
  """

  values_TD: jax.Array
  mean_T1: jax.Array
  deviation_T1: jax.Array


class SparseCode(NamedTuple):
  """The active latents of each token, largest pre-activation first.

  Attributes:
    values_TK: activations after ReLU, float32, not negative.
    indices_TK: their latents, int32.
  """

  values_TK: jax.Array
  indices_TK: jax.Array


class SparseAutoencoder(nnx.Module):
  """TopK sparse autoencoder; parameters encoder/kernel, latent_bias, decoder/kernel, pre_bias.

  The constructor ties decoder = encoder transposed with unit rows (they are free afterwards) and
  leaves both biases 0; `initialise` adds what depends on data.
  """

  def __init__(self, spec: SparseAutoencoderSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    # The default initialisation of a linear layer in the released code: uniform in +-1/sqrt(D).
    uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    shape = (spec.model_dim, spec.num_latents)
    key = rngs.params()
    dtype = jnp.dtype(spec.param_dtype)

    def tied(key, shape_CD, dtype):
      kernel_DC = uniform(key, shape_CD[::-1], dtype)
      return unit_rows(kernel_DC.T)

    zeros = jax.nn.initializers.zeros
    self.encoder = _Kernel(parameters.parameter(key, uniform, shape, ("embed", "latents"), dtype))
    self.latent_bias = parameters.parameter(key, zeros, shape[1:], ("latents",), dtype)
    self.decoder = _Kernel(parameters.parameter(key, tied, shape[::-1], ("latents", "embed"), dtype))
    self.pre_bias = parameters.parameter(key, zeros, shape[:1], ("embed",), dtype)

  def normalise(self, x_TD: jax.Array) -> Normalised:
    """Removes mean and scale over the width (ddof = 1, epsilon added to the deviation)."""
    return normalise(x_TD, self.spec.epsilon)

  def denormalise(self, values_TD: jax.Array, like: Normalised) -> jax.Array:
    """Brings values of the autoencoder's space back to the scale and mean of `like`."""
    return values_TD * like.deviation_T1 + like.mean_T1

  def pre_activations(self, u_TD: jax.Array) -> jax.Array:
    """Returns the float32 scores [T, C] of all latents for normalised activations."""
    dtype = jnp.dtype(self.spec.dtype)
    centred_TD = (u_TD - self.pre_bias[...]).astype(dtype)
    scores_TC = jnp.matmul(
      centred_TD, self.encoder.kernel[...].astype(dtype), preferred_element_type=_wide(dtype)
    )
    return constrain(scores_TC + self.latent_bias[...], *_activation_axes(scores_TC.ndim))

  def encode(self, u_TD: jax.Array) -> SparseCode:
    """Returns the k active latents of normalised activations."""
    return self.select(self.pre_activations(u_TD))

  def select(self, scores_TC: jax.Array, k: int | None = None) -> SparseCode:
    """Keeps the k (default `spec.k`) largest scores by signed value, ties to the lowest index; then ReLU."""
    k = self.spec.k if k is None else k
    values_TK, indices_TK = top_k(scores_TC, k, implementation=self.spec.top_k)
    return SparseCode(jax.nn.relu(values_TK), indices_TK)

  def decode(self, code: SparseCode) -> jax.Array:
    """Returns the reconstruction [T, D] in the normalised space, with the pre-bias."""
    return self.decode_latents(code, self.spec.decoding) + self.pre_bias[...]

  def decode_latents(self, code: SparseCode, decoding: str = "gather") -> jax.Array:
    """Returns the weighted sum [T, D] of decoder rows, without the pre-bias."""
    dtype = jnp.dtype(self.spec.dtype)
    kernel_CD = self.decoder.kernel[...].astype(dtype)
    if decoding == "gather":
      rows_TKD = kernel_CD[code.indices_TK]
      values_TK = code.values_TK.astype(dtype)
      return jnp.einsum("...k,...kd->...d", values_TK, rows_TKD, preferred_element_type=_wide(dtype))
    dense_TC = self.dense(code).astype(dtype)
    return jnp.matmul(dense_TC, kernel_CD, preferred_element_type=_wide(dtype))

  def dense(self, code: SparseCode) -> jax.Array:
    """Returns the code with all C latents written out, zeros where inactive."""
    dense_TC = densify(code, self.spec.num_latents)
    return constrain(dense_TC, *_activation_axes(dense_TC.ndim))

  def __call__(self, x_TD: jax.Array) -> tuple[jax.Array, SparseCode]:
    """Returns (reconstruction in the model's own space, active latents) of raw activations."""
    normalised = self.normalise(x_TD)
    code = self.encode(normalised.values_TD)
    return self.denormalise(self.decode(code), normalised), code


def normalise(x_TD: jax.Array, epsilon: float) -> Normalised:
  """Removes mean and scale over the width (ddof = 1, epsilon added to the deviation)."""
  x_TD = _at_least_float32(x_TD)
  mean_T1 = x_TD.mean(-1, keepdims=True)
  deviation_T1 = x_TD.std(-1, ddof=1, keepdims=True) + epsilon
  return Normalised((x_TD - mean_T1) / deviation_T1, mean_T1, deviation_T1)


class _Kernel(nnx.Module):
  """Holds one matrix, so that the tree reads encoder/kernel and decoder/kernel."""

  def __init__(self, kernel: nnx.Param):
    self.kernel = kernel


def densify(code: SparseCode, num_latents: int) -> jax.Array:
  """Writes a sparse code [T, K] out as [T, C]."""
  leading = code.values_TK.shape[:-1]
  values_NK = code.values_TK.reshape(-1, code.values_TK.shape[-1])
  indices_NK = code.indices_TK.reshape(values_NK.shape)
  rows_N1 = jnp.arange(values_NK.shape[0])[:, None]
  dense_NC = jnp.zeros((values_NK.shape[0], num_latents), values_NK.dtype)
  return dense_NC.at[rows_N1, indices_NK].add(values_NK).reshape(*leading, num_latents)


def unit_rows(kernel_CD: jax.Array) -> jax.Array:
  """Scales every row to Euclidean norm 1; a zero row stays zero."""
  norms_C1 = jnp.linalg.norm(kernel_CD, axis=-1, keepdims=True)
  return kernel_CD / jnp.where(norms_C1 == 0, 1.0, norms_C1)


def geometric_median(
  points_ND: jax.Array, *, num_iterations: int = 100, tolerance: float = 1e-5
) -> jax.Array:
  """Returns the point [D] with the least sum of Euclidean distances, by Weiszfeld's iteration.

  Args:
    points_ND: sample, one point a row.
    num_iterations: at most this many iterations from the mean.
    tolerance: stop when the estimate moves less than this (in the unit of the points).
  """
  points_ND = _at_least_float32(points_ND)

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
  return geometric_median(normalise(activations_ND, spec.epsilon).values_TD)


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
    code = autoencoder.encode(unit_rows(probes_ND) + params["pre_bias"])
    norm = jnp.linalg.norm(autoencoder.decode_latents(code), axis=-1).mean()
    params = {**params, "encoder": {"kernel": params["encoder"]["kernel"] / norm.astype(spec.param_dtype)}}
  return params


def _wide(dtype) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(_wide(x.dtype))


def _activation_axes(ndim: int) -> tuple:
  return ("batch", *[None] * (ndim - 2), "activation_latents") if ndim > 1 else ("activation_latents",)
