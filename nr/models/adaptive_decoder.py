"""The head of Adaptive Decoding: a small MLP from a hidden state to a law over decoding settings.

    z = MLP(h)
    pi(k | h) = softmax_k(z)                                     (arXiv 2411.09661 Eq. 1)

h is the final-normed vector that the un-embedding multiplies: our reading of the paper's last hidden state.
The language model is frozen: no gradient leaves the head through h.

Arrays in this file: D model, F hidden, K settings; any leading shape.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models.layers import Linear
from nr.spec import Spec

# A name without a mesh axis: the head is small, and every device keeps a copy.
AXES = ("adaptive_decoder", "adaptive_decoder")


@dataclasses.dataclass(frozen=True)
class AdaptiveDecoderSpec(Spec):
  """Settings of the head.

  Attributes:
    model_dim: width D of the hidden states.
    num_settings: K, how many temperatures (or values of another decoding setting) there are.
    hidden_dim: width F (the paper: 2048).
    num_hidden_layers: SiLU layers before the last affine map. The paper's "3-layer MLP" is read as three
      affine maps, two of them hidden.
    param_dtype: type of the parameters; the head computes in float32.
  """

  model_dim: int
  num_settings: int
  hidden_dim: int = 2048
  num_hidden_layers: int = 2
  param_dtype: str = "float32"

  def __post_init__(self):
    for field in ("model_dim", "hidden_dim"):
      if getattr(self, field) < 1:
        raise ValueError(f"{field}={getattr(self, field)}: give at least 1")
    if self.num_settings < 2:
      raise ValueError(f"num_settings={self.num_settings}: a head needs at least 2 to choose from")
    if self.num_hidden_layers < 0:
      raise ValueError(f"num_hidden_layers={self.num_hidden_layers}: give 0 or more")


class AdaptiveDecoder(nnx.Module):
  """The head; parameters layer_<index>/kernel and bias.

  The last map starts at zero, so that the first law is uniform, which is what LPO takes as its reference
  (arXiv 2411.09661 section 3.3). Hidden kernels start normal with variance 1 / inputs: our choice, the
  paper does not say.
  """

  def __init__(self, spec: AdaptiveDecoderSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    widths = [spec.model_dim, *[spec.hidden_dim] * spec.num_hidden_layers, spec.num_settings]
    for index, shape in enumerate(zip(widths, widths[1:])):
      std = 0.0 if index == spec.num_hidden_layers else shape[0] ** -0.5
      layer = Linear(shape, AXES, std=std, use_bias=True, dtype=spec.param_dtype, rngs=rngs)
      # Names of text and not a list: checkpoints have text keys only.
      setattr(self, f"layer_{index}", layer)

  def scores(self, hidden: jax.Array) -> jax.Array:
    """Returns what goes into the softmax, float32 [..., K], of hidden states [..., D] (no gradient)."""
    x = jax.lax.stop_gradient(hidden).astype(jnp.float32)
    for index in range(self.spec.num_hidden_layers + 1):
      x = getattr(self, f"layer_{index}")(x if index == 0 else jax.nn.silu(x))
    return x

  def __call__(self, hidden: jax.Array) -> jax.Array:
    """Returns log pi(k | h), float32 [..., K], nats."""
    return jax.nn.log_softmax(self.scores(hidden), axis=-1)


def select(log_probs: jax.Array, key: jax.Array | None = None, *, selection: str = "greedy") -> jax.Array:
  """Picks a setting: the most probable (lowest index of equals), or a draw (arXiv 2411.09661 Eqs. 4, 5).

  Args:
    log_probs: log pi [..., K].
    key: random key; needed to sample.
    selection: "greedy" or "sample".

  Returns:
    int32 [...].

  Raises:
    ValueError: another selection, or sampling without a key.
  """
  if selection == "greedy":
    return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
  if selection != "sample":
    raise ValueError(f"selection={selection!r}: give 'greedy' or 'sample'")
  if key is None:
    raise ValueError("key=None: selection='sample' draws at random; give a random key")
  return jax.random.categorical(key, log_probs, axis=-1).astype(jnp.int32)


def mixture(log_probs_BK: jax.Array, log_laws_KBV: jax.Array) -> jax.Array:
  """Returns log sum_k pi(k | h) p(v | h, k), float32 [B, V] (arXiv 2411.09661 Eq. 6)."""
  return jax.nn.logsumexp(log_probs_BK.T[..., None] + log_laws_KBV, axis=0)
