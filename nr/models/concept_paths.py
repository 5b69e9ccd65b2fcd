"""What stands in the inserted rows: predicted concepts, a learned pause, or a regressed teacher state.

Each is a module from the stream h [B, L, D] that arrives at the insertion to one vector a token. Sources:
arXiv 2502.08524 section 2.2 (concepts), with the normalisation of the released code, and section 3.3 (pause
tokens, direct prediction of the teacher's hidden state), whose details are not published; what is ours says so.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models.concept_head import ConceptPrediction, concept_logits, mix_concepts, predict_concepts
from nr.models.concept_intervention import ConceptIntervention
from nr.models.concept_mixing_spec import ConceptMixingSpec
from nr.models.layers import Linear
from nr.models.parameters import parameter
from nr.models.partitioning import constrain
from nr.models.transformer_spec import TransformerSpec

# Added to the standard deviation, not to the variance: as the released code does.
NORM_EPSILON = 1e-5


class ConceptHead(nnx.Module):
  """Parameters of the linear map from the stream to concept logits."""

  def __init__(self, model: TransformerSpec, num_concepts: int, *, rngs: nnx.Rngs):
    normal, zeros = jax.nn.initializers.normal(model.init_std), jax.nn.initializers.zeros
    shape = (model.model_dim, num_concepts)
    self.kernel = parameter(rngs.params(), normal, shape, ("embed", "concepts"), model.param_dtype)
    self.bias = parameter(rngs.params(), zeros, shape[1:], ("concepts",), model.param_dtype)


class ConceptCompression(nnx.Module):
  """Parameters of the linear map from selected concepts back to the stream."""

  def __init__(self, model: TransformerSpec, num_concepts: int, *, rngs: nnx.Rngs):
    normal, zeros = jax.nn.initializers.normal(model.init_std), jax.nn.initializers.zeros
    shape = (num_concepts, model.model_dim)
    self.kernel = parameter(rngs.params(), normal, shape, ("concepts", "embed"), model.param_dtype)
    self.bias = parameter(rngs.params(), zeros, shape[1:], ("embed",), model.param_dtype)


class ConceptPath(nnx.Module):
  """From the stream to concept logits, and from the largest of them to one vector.

  With h the stream entering block `insert_at`, mu its mean, s its standard
  deviation over D (denominator D - 1), M, a the head, W, b the compression and p
  the shared `pre_bias`:

      z = M ((h - mu) / (s + 1e-5) - p) + a
      c = (W top_k(z) + b + p) s + mu

  The selected logits themselves are the coefficients: no softmax, no ReLU.
  Gradients reach mu, s and the selected logits, and not the choice.
  """

  def __init__(self, model: TransformerSpec, spec: ConceptMixingSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    self.dtype = model.dtype
    self.head = ConceptHead(model, spec.num_concepts, rngs=rngs)
    self.compression = ConceptCompression(model, spec.num_concepts, rngs=rngs) if spec.is_mixing else None
    zeros, shape = jax.nn.initializers.zeros, (model.model_dim,)
    self.pre_bias = parameter(rngs.params(), zeros, shape, ("embed",), model.param_dtype)

  def predict(
    self,
    h_BLD: jax.Array,
    labels_BLA: jax.Array | None = None,
    intervention: ConceptIntervention | None = None,
  ) -> ConceptPrediction:
    """Predicts concepts from the stream [B, L, D]; see `predict_concepts`."""
    is_chunked = self.spec.head_impl == "fused" and self.spec.concept_chunk > 0
    return predict_concepts(
      *self._head_operands(h_BLD),
      k=self.spec.top_k,
      labels_BLA=labels_BLA,
      intervention=intervention,
      top_k_impl=self.spec.top_k_impl,
      concept_chunk=self.spec.concept_chunk if is_chunked else None,
    )

  def logits(self, h_BLD: jax.Array) -> jax.Array:
    """Returns all concept logits, float32 [B, L, C]: for probes and small models."""
    return concept_logits(*self._head_operands(h_BLD))

  def _head_operands(self, h_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the normalised stream, the kernel and the bias."""
    u_BLD = normalised(h_BLD, self.spec.norm) - self.pre_bias[...].astype(jnp.float32)
    kernel_DC, bias_C = self.head.kernel[...], self.head.bias[...]
    return u_BLD.astype(self.dtype), kernel_DC.astype(self.dtype), bias_C.astype(jnp.float32)

  def mix(self, h_BLD: jax.Array, prediction: ConceptPrediction) -> jax.Array:
    """Returns the continuous concepts [B, L, D], in the type and at the scale of the stream."""
    kernel_CD = self.compression.kernel[...].astype(self.dtype)
    settings = dict(implementation=self.spec.compression_impl)
    e_BLD = mix_concepts(prediction.values_BLK, prediction.indices_BLK, kernel_CD, **settings)
    e_BLD = e_BLD + self.compression.bias[...].astype(jnp.float32) + self.pre_bias[...].astype(jnp.float32)
    return at_scale_of(h_BLD, e_BLD, self.spec.norm)


class PausePath(nnx.Module):
  """One learned vector, the same in every row: computation without information.

  It starts like an embedding, normal with the model's standard deviation (ours), and is not brought to
  the scale of the stream: nothing is published of either.
  """

  def __init__(self, model: TransformerSpec, *, rngs: nnx.Rngs):
    normal, shape = jax.nn.initializers.normal(model.init_std), (model.model_dim,)
    self.vector = parameter(rngs.params(), normal, shape, ("embed",), model.param_dtype)

  def rows(self, h_BLD: jax.Array) -> jax.Array:
    """Returns the vector once for each row of the stream, in its type."""
    return jnp.broadcast_to(self.vector[...].astype(h_BLD.dtype), h_BLD.shape)


class HiddenPath(nnx.Module):
  """A two-layer MLP that predicts the teacher's tapped state, and the map of its prediction to one vector.

  In the notation of `ConceptPath`, with E the width of the teacher:

      g = W2 gelu(W1 (h - mu) / (s + 1e-5) + b1) + b2      E numbers, to be regressed on the teacher's state
      c = (W g + b) s + mu

  Published: two layers, the regression, that g is compressed and inserted. Ours: the width of the hidden
  layer, gelu, the normalisation (that of the concept path), the initial values (all normal with the model's
  standard deviation, biases 0).
  """

  def __init__(self, model: TransformerSpec, spec: ConceptMixingSpec, *, rngs: nnx.Rngs):
    self.norm = spec.norm
    width = spec.regression_dim(model)
    shared = dict(std=model.init_std, use_bias=True, dtype=model.param_dtype, rngs=rngs)
    self.up = Linear((model.model_dim, width), ("embed", "mlp"), **shared)
    self.down = Linear((width, spec.target_dim), ("mlp", None), **shared)
    self.compression = Linear((spec.target_dim, model.model_dim), (None, "embed"), **shared)

  def predict(self, h_BLD: jax.Array) -> jax.Array:
    """Returns g [B, L, E] in the type of the stream."""
    u_BLD = normalised(h_BLD, self.norm).astype(h_BLD.dtype)
    hidden_BLF = constrain(jax.nn.gelu(self.up(u_BLD)), "batch", "length", "activation_mlp")
    return constrain(self.down(hidden_BLF), "batch", "length", None)

  def mix(self, h_BLD: jax.Array, regressed_BLE: jax.Array) -> jax.Array:
    """Returns the inserted vectors [B, L, D], in the type and at the scale of the stream."""
    return at_scale_of(h_BLD, self.compression(regressed_BLE).astype(jnp.float32), self.norm)


def normalised(h_BLD: jax.Array, norm: str) -> jax.Array:
  """Returns (h - mu) / (s + epsilon), float32; with norm "none" h itself."""
  mean_BL1, std_BL1 = stream_statistics(h_BLD, norm)
  epsilon = NORM_EPSILON if norm == "reference" else 0.0
  return (h_BLD.astype(jnp.float32) - mean_BL1) / (std_BL1 + epsilon)


def at_scale_of(h_BLD: jax.Array, e_BLD: jax.Array, norm: str) -> jax.Array:
  """Returns e s + mu in the type of the stream; with norm "none" e itself."""
  mean_BL1, std_BL1 = stream_statistics(h_BLD, norm)
  c_BLD = (e_BLD.astype(jnp.float32) * std_BL1 + mean_BL1).astype(h_BLD.dtype)
  return constrain(c_BLD, "batch", "length", "activation_embed")


def stream_statistics(h_BLD: jax.Array, norm: str) -> tuple[jax.Array, jax.Array]:
  """Returns float32 mean and unbiased standard deviation [B, L, 1]; 0 and 1 with norm "none"."""
  if norm == "none":
    return jnp.zeros((*h_BLD.shape[:-1], 1)), jnp.ones((*h_BLD.shape[:-1], 1))
  wide_BLD = h_BLD.astype(jnp.float32)
  mean_BL1 = wide_BLD.mean(axis=-1, keepdims=True)
  centred_BLD = wide_BLD - mean_BL1
  variance_BL1 = (centred_BLD * centred_BLD).sum(axis=-1, keepdims=True) / (h_BLD.shape[-1] - 1)
  # The square root has no finite gradient at 0 (a constant row); 0 serves there.
  is_zero_BL1 = variance_BL1 == 0
  std_BL1 = jnp.sqrt(jnp.where(is_zero_BL1, 1.0, variance_BL1))
  return mean_BL1, jnp.where(is_zero_BL1, 0.0, std_BL1)
