"""Parts of a block that are not attention: norms, linear maps, MLPs, dropout."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models.parameters import parameter, zeros_parameter
from nr.models.partitioning import constrain
from nr.models.transformer_spec import TransformerSpec
from nr.models.weights import contract


def wide_type(x: jax.Array) -> Any:
  """Returns the type in which sums over `x` are formed: float32, or that of `x` where it is wider."""
  return jnp.promote_types(x.dtype, jnp.float32)


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Sets entries to 0 with probability `rate` and scales the rest; identity without a key."""
  if key is None or rate == 0:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis (arXiv:1910.07467), at least float32 inside."""

  def __init__(self, size: int, axis: str, spec: TransformerSpec, *, rngs: nnx.Rngs):
    start = jax.nn.initializers.zeros if spec.norm_offset else jax.nn.initializers.ones
    self.scale = parameter(rngs.params(), start, (size,), (axis,), spec.param_dtype)
    self.epsilon = spec.norm_epsilon
    self.offset = 1.0 if spec.norm_offset else 0.0

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns `x` scaled to unit mean square, times the learned scale, in the type of `x`."""
    wide = x.astype(wide_type(x))
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
    return (wide * (self.scale[...].astype(wide.dtype) + self.offset)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer norm over the last axis (arXiv:1607.06450), at least float32 inside."""

  def __init__(self, size: int, axis: str, spec: TransformerSpec, *, rngs: nnx.Rngs):
    start = jax.nn.initializers.zeros if spec.norm_offset else jax.nn.initializers.ones
    self.scale = parameter(rngs.params(), start, (size,), (axis,), spec.param_dtype)
    self.bias = zeros_parameter(spec.use_bias, (size,), (axis,), spec.param_dtype)
    self.epsilon = spec.norm_epsilon
    self.offset = 1.0 if spec.norm_offset else 0.0

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns `x` with zero mean and unit variance, scaled and shifted, in the type of `x`."""
    wide = x.astype(wide_type(x))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
    wide = wide * (self.scale[...].astype(wide.dtype) + self.offset)
    if self.bias is not None:
      wide = wide + self.bias[...].astype(wide.dtype)
    return wide.astype(x.dtype)


def make_norm(spec: TransformerSpec, *, rngs: nnx.Rngs) -> nnx.Module:
  """Makes the norm of the residual stream that the spec asks for."""
  norm = LayerNorm if spec.norm == "layer_norm" else RMSNorm
  return norm(spec.model_dim, "norm", spec, rngs=rngs)


class Linear(nnx.Module):
  """`x @ kernel + bias` over the last axis, in the type of `x`."""

  def __init__(
    self,
    shape: tuple[int, int],
    axes: tuple[str, str],
    *,
    std: float,
    use_bias: bool,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    self.kernel = parameter(rngs.params(), jax.nn.initializers.normal(std), shape, axes, dtype)
    self.bias = zeros_parameter(use_bias, shape[1:], axes[1:], dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [..., outputs]."""
    y = contract("...i,io->...o", x, self.kernel[...])
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Mlp(nnx.Module):
  """Two-layer MLP, gated (arXiv:2002.05202) or not."""

  def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
    wide, narrow = (spec.model_dim, spec.mlp_dim), (spec.mlp_dim, spec.model_dim)
    shared = dict(use_bias=spec.use_bias, dtype=spec.param_dtype, rngs=rngs)
    self.up = Linear(wide, ("embed", "mlp"), std=spec.init_std, **shared)
    self.gate = Linear(wide, ("embed", "mlp"), std=spec.init_std, **shared) if spec.is_gated else None
    self.down = Linear(narrow, ("mlp", "embed"), std=spec.init_std / (2 * spec.num_layers) ** 0.5, **shared)
    self.kind = spec.mlp

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    """Returns [B, L, D]."""
    hidden_BLF = self.up(x_BLD)
    activated_BLF = hidden_BLF if self.gate is None else self.gate(x_BLD)
    if self.kind == "swiglu":
      activated_BLF = jax.nn.silu(activated_BLF)
    else:
      activated_BLF = jax.nn.gelu(activated_BLF, approximate=self.kind != "gelu_exact")
    hidden_BLF = activated_BLF if self.gate is None else activated_BLF * hidden_BLF
    hidden_BLF = constrain(hidden_BLF, "batch", "length", "activation_mlp")
    return constrain(self.down(hidden_BLF), "batch", "length", "activation_embed")
