"""Sparse autoencoders of a residual stream; their latents are the concepts of CoCoMix.

Forward pass (arXiv 2406.04093 section 2 and the released openai/sparse_autoencoder):

    normalise   mu = mean_D(x), s = std_D(x) unbiased, u = (x - mu) / (s + 1e-5)
    encode      pre = (u - pre_bias) encoder + latent_bias, then by architecture
    decode      r = values decoder[indices] + pre_bias            (rows of the decoder have unit norm)
    denormalise x_hat = r * s + mu                                (only in the model's own space)

What each architecture makes of pre, z = ReLU(pre):

    topk                   the k largest pre of a token, then ReLU
    batchtopk, matryoshka  in training the N k largest z of a batch of N tokens; afterwards they are jumprelu
    jumprelu               pre [pre > threshold], a threshold a latent (arXiv 2407.14435)
    gated                  [pre > 0] ReLU(exp(magnitude_scale) (u - pre_bias) encoder + magnitude_bias), where the
                           bias of pre is `gate_bias` (arXiv 2404.16014)
    relu                   z

Arrays in this file: T tokens (any leading shape), D model, C latents, K room of a sparse code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models import parameters
from nr.models.batch_top_k import keep_largest
from nr.models.jump_relu import heaviside, jump_relu
from nr.models.partitioning import constrain
from nr.models.sparse_autoencoder_spec import ARCHITECTURES, DECODINGS, NORMALISATIONS, SparseAutoencoderSpec
from nr.models.top_k import top_k

__all__ = [
  "ARCHITECTURES",
  "DECODINGS",
  "NORMALISATIONS",
  "Normalised",
  "SparseAutoencoder",
  "SparseAutoencoderSpec",
  "SparseCode",
  "densify",
  "normalise",
  "unit_rows",
]


class Normalised(NamedTuple):
  """Activations in the autoencoder's space and what brings them back.

  Attributes:
    values_TD: normalised activations, float32.
    mean_T1: what was subtracted: the mean over the width, or 0.
    deviation_T1: scale of the activation: its unbiased standard deviation, norm over sqrt(D), or 1. A
      standard deviation was divided by with epsilon added, and brings values back without it, as in the
      released code.
  """

  values_TD: jax.Array
  mean_T1: jax.Array
  deviation_T1: jax.Array


class SparseCode(NamedTuple):
  """The active latents of each token, largest first.

  Attributes:
    values_TK: activations after ReLU, float32, not negative; 0 where a token has fewer active latents.
    indices_TK: their latents, int32; where the value is 0 one that is not active.
  """

  values_TK: jax.Array
  indices_TK: jax.Array


class SparseAutoencoder(nnx.Module):
  """Sparse autoencoder; parameters encoder/kernel, latent_bias, decoder/kernel, pre_bias.

  A jumprelu one has a `threshold` besides; a gated one has gate_bias, magnitude_bias and magnitude_scale in
  place of latent_bias. The constructor ties decoder = encoder transposed with unit rows (they are free
  afterwards) and leaves the biases 0; `sparse_autoencoder_start.initialise` adds what depends on data.
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

    def a_latent(initializer=jax.nn.initializers.zeros):
      return parameters.parameter(key, initializer, shape[1:], ("latents",), dtype)

    self.encoder = _Kernel(parameters.parameter(key, uniform, shape, ("embed", "latents"), dtype))
    if spec.arch == "gated":
      self.gate_bias, self.magnitude_bias, self.magnitude_scale = a_latent(), a_latent(), a_latent()
    else:
      self.latent_bias = a_latent()
    if spec.arch == "jumprelu":
      self.threshold = a_latent(jax.nn.initializers.constant(spec.initial_threshold))
    self.decoder = _Kernel(parameters.parameter(key, tied, shape[::-1], ("latents", "embed"), dtype))
    zeros = jax.nn.initializers.zeros
    self.pre_bias = parameters.parameter(key, zeros, shape[:1], ("embed",), dtype)

  def normalise(self, x_TD: jax.Array) -> Normalised:
    """Brings raw activations into the autoencoder's space."""
    return normalise(x_TD, self.spec.epsilon, self.spec.normalisation)

  def denormalise(self, values_TD: jax.Array, like: Normalised) -> jax.Array:
    """Brings values of the autoencoder's space back to the scale and mean of `like`."""
    return values_TD * like.deviation_T1 + like.mean_T1

  def pre_activations(self, u_TD: jax.Array) -> jax.Array:
    """Returns the float32 scores [T, C] of all latents for normalised activations; a gated one's of its gate."""
    bias_C = self.gate_bias if self.spec.arch == "gated" else self.latent_bias
    return self._laid_out(self._product(u_TD) + bias_C[...])

  def gates_and_magnitudes(self, u_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the pre-activations [T, C] of a gated autoencoder's gate and of its magnitudes."""
    product_TC = self._product(u_TD)
    magnitudes_TC = product_TC * jnp.exp(self.magnitude_scale[...]) + self.magnitude_bias[...]
    return self._laid_out(product_TC + self.gate_bias[...]), self._laid_out(magnitudes_TC)

  def activations(self, u_TD: jax.Array) -> jax.Array:
    """Returns the activations [T, C] of all latents for normalised activations, zeros where inactive.

    Raises:
      ValueError: the autoencoder still chooses among a whole batch (batchtopk, matryoshka).
    """
    if self.spec.arch == "gated":
      gates_TC, magnitudes_TC = self.gates_and_magnitudes(u_TD)
      return jnp.where(gates_TC > 0, jax.nn.relu(magnitudes_TC), 0)
    self._check_form()
    scores_TC = self.pre_activations(u_TD)
    if self.spec.arch == "topk":
      return self.dense(self.select(scores_TC))
    return self.jump(scores_TC) if self.spec.arch == "jumprelu" else jax.nn.relu(scores_TC)

  def jump(self, scores_TC: jax.Array) -> jax.Array:
    """Returns scores above the thresholds of a jumprelu autoencoder, with its straight-through gradient."""
    return jump_relu(scores_TC, self.threshold[...], self.spec.bandwidth)

  def steps(self, scores_TC: jax.Array) -> jax.Array:
    """Returns 1 for scores above the thresholds, with the straight-through gradient of a step."""
    return heaviside(scores_TC, self.threshold[...], self.spec.bandwidth)

  def select_in_batch(
    self, scores_NC: jax.Array, counted_N: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Keeps the k largest activations a token over the whole batch, as batchtopk and matryoshka train.

    The batch is the global one on every mesh; with gradient accumulation it is the microbatch.

    Args:
      scores_NC: pre-activations.
      counted_N: bool, tokens that take part and count; None: all.

    Returns:
      activations [N, C], at most k times the counted tokens of them positive; the smallest one kept
      (infinite where none is).
    """
    values_NC = jax.nn.relu(scores_NC)
    tokens = jnp.int32(scores_NC.shape[0])
    if counted_N is not None:
      values_NC = jnp.where(counted_N[:, None], values_NC, 0)
      tokens = counted_N.sum(dtype=jnp.int32)
    kept_NC, smallest = keep_largest(values_NC, tokens * self.spec.k)
    return constrain(kept_NC, *_activation_axes(kept_NC.ndim)), smallest

  def encode(self, u_TD: jax.Array) -> SparseCode:
    """Returns the active latents of normalised activations, the `spec.max_active` largest where there are more.

    Raises:
      ValueError: as `activations`.
    """
    self._check_form()
    if self.spec.arch == "topk":
      return self.select(self.pre_activations(u_TD))
    return SparseCode(*top_k(self.activations(u_TD), self.spec.max_active, implementation=self.spec.top_k))

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
    if decoding == "dense":
      return self.decode_activations(self.dense(code))
    dtype = jnp.dtype(self.spec.dtype)
    rows_TKD = self.decoder_rows().astype(dtype)[code.indices_TK]
    values_TK = code.values_TK.astype(dtype)
    return jnp.einsum("...k,...kd->...d", values_TK, rows_TKD, preferred_element_type=_wide(dtype))

  def decode_activations(self, values_TC: jax.Array, first: int = 0, stop: int | None = None) -> jax.Array:
    """Returns the sum [T, D] of the rows of latents first .. stop - 1, weighted by values, without the pre-bias."""
    rows_CD = self.decoder_rows()
    if first or stop not in (None, self.spec.num_latents):
      rows_CD, values_TC = rows_CD[first:stop], values_TC[..., first:stop]
    return self.weigh(values_TC, rows_CD)

  def weigh(self, values_TC: jax.Array, rows_CD: jax.Array) -> jax.Array:
    """Returns the sum [T, D] of rows weighted by values, computed in the compute type."""
    dtype = jnp.dtype(self.spec.dtype)
    return jnp.matmul(values_TC.astype(dtype), rows_CD.astype(dtype), preferred_element_type=_wide(dtype))

  def decoder_rows(self) -> jax.Array:
    """Returns the decoder [C, D] by which activations are decoded: of unit rows for decoder_norm "scaled"."""
    rows_CD = self.decoder.kernel[...]
    return unit_rows(rows_CD) if self.spec.decoder_norm == "scaled" else rows_CD

  def dense(self, code: SparseCode) -> jax.Array:
    """Returns the code with all C latents written out, zeros where inactive."""
    dense_TC = densify(code, self.spec.num_latents)
    return constrain(dense_TC, *_activation_axes(dense_TC.ndim))

  def __call__(self, x_TD: jax.Array) -> tuple[jax.Array, SparseCode]:
    """Returns (reconstruction in the model's own space, active latents) of raw activations."""
    normalised = self.normalise(x_TD)
    code = self.encode(normalised.values_TD)
    return self.denormalise(self.decode(code), normalised), code

  def score_map(self, u_TD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (inputs [T, D], kernel [D, C], bias [C]) whose affine map is `pre_activations`, in the compute type.

    For decoder rows of unit norm; it lets a caller take the scores of some latents at a time.
    """
    dtype = jnp.dtype(self.spec.dtype)
    inputs_TD = u_TD - self.pre_bias[...] if self.spec.subtract_pre_bias else u_TD
    bias_C = self.gate_bias if self.spec.arch == "gated" else self.latent_bias
    return inputs_TD.astype(dtype), self.encoder.kernel[...].astype(dtype), bias_C[...]

  def _product(self, u_TD: jax.Array) -> jax.Array:
    """Returns (u - pre_bias) encoder, float32."""
    inputs_TD, kernel_DC, _ = self.score_map(u_TD)
    return jnp.matmul(inputs_TD, kernel_DC, preferred_element_type=_wide(inputs_TD.dtype))

  def _laid_out(self, scores_TC: jax.Array) -> jax.Array:
    """Measures scores in units of the decoder rows where these are free, and splits them over the mesh."""
    if self.spec.decoder_norm == "scaled":
      scores_TC = scores_TC * jnp.linalg.norm(self.decoder.kernel[...], axis=-1)
    return constrain(scores_TC, *_activation_axes(scores_TC.ndim))

  def _check_form(self) -> None:
    if self.spec.is_selecting_in_batch:
      raise ValueError(
        f"arch={self.spec.arch!r} chooses among the latents of a whole batch and only trains; bring it into the form "
        "that is used with nr.models.sparse_autoencoder_start.inference_form"
      )


def normalise(x_TD: jax.Array, epsilon: float, normalisation: str = "layer_norm_unbiased") -> Normalised:
  """Brings activations into an autoencoder's space.

  Args:
    x_TD: raw activations.
    epsilon: added to the deviation of "layer_norm_unbiased" (which has ddof = 1).
    normalisation: one of `NORMALISATIONS`.
  """
  x_TD = _at_least_float32(x_TD)
  if normalisation == "layer_norm_unbiased":
    mean_T1 = x_TD.mean(-1, keepdims=True)
    deviation_T1 = x_TD.std(-1, ddof=1, keepdims=True)
    return Normalised((x_TD - mean_T1) / (deviation_T1 + epsilon), mean_T1, deviation_T1)
  zeros_T1 = jnp.zeros_like(x_TD[..., :1])
  if normalisation == "none":
    return Normalised(x_TD, zeros_T1, zeros_T1 + 1)
  norm_T1 = jnp.linalg.norm(x_TD, axis=-1, keepdims=True) / jnp.sqrt(jnp.asarray(x_TD.shape[-1], x_TD.dtype))
  return Normalised(x_TD / jnp.where(norm_T1 == 0, 1, norm_T1), zeros_T1, norm_T1)


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


def _wide(dtype) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(_wide(x.dtype))


def _activation_axes(ndim: int) -> tuple:
  return ("batch", *[None] * (ndim - 2), "activation_latents") if ndim > 1 else ("activation_latents",)
