"""Contrast between the last layer and an earlier one of the same model (DoLa)."""

import dataclasses

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import (
  STREAM,
  Context,
  Parameter,
  State,
  Transform,
  column,
  row,
  static,
  transform,
)
from nr.generation.transforms.mixtures import mix
from nr.names import unknown

VARIANTS = ("paper", "hf")
BUCKETS = ("low", "high")


def early_exit_layers(num_layers: int, bucket: str = "high", *, is_tied: bool = True) -> tuple[int, ...]:
  """Returns the layers that are compared: every other one of the first or the second half.

  Models of more than 40 layers compare the first or the last 20 only. Layer j is the
  stream that enters block j, so that `Network(taps=early_exit_layers(...))` offers
  them. The embedding itself, layer 0, is left out: with a tied head it would only
  repeat the token, and `Network` has no tap there.

  Source: the buckets of transformers 4.46.3.

  Args:
    num_layers: blocks of the model.
    bucket: "low" or "high".
    is_tied: whether the head is the embedding; the low bucket then starts at layer 2
      (1 in a model of two).

  Raises:
    ValueError: an unknown bucket, or too few layers for one.

  >>> early_exit_layers(12, "low"), early_exit_layers(12, "high")
  ((2, 4), (6, 8, 10))
  """
  if bucket not in BUCKETS:
    raise ValueError(unknown("bucket", bucket, BUCKETS))
  half = num_layers // 2
  if bucket == "high":
    layers = range(half if num_layers <= 40 else num_layers - 20, num_layers, 2)
  else:
    start = min(2, num_layers - 1) if is_tied else 0
    layers = range(start, half if num_layers <= 40 else 20, 2) or range(start, start + 1)
  layers = tuple(layer for layer in layers if 0 < layer < num_layers)
  if not layers:
    raise ValueError(f"num_layers={num_layers}: bucket {bucket!r} holds no layer; name layers yourself")
  return layers


def divergence(log_p_BV: jax.Array, log_q_BV: jax.Array, variant: str = "paper") -> jax.Array:
  """Returns how far two laws are apart, float32 [B], nats.

  Args:
    log_p_BV: float32 log-probabilities.
    log_q_BV: likewise.
    variant: "paper" is the Jensen-Shannon divergence (KL(p|m) + KL(q|m)) / 2 with
      m = (p + q) / 2. "hf" is what transformers 4.46.3 computes: (KL(m|p) +
      KL(m|q)) / 2, averaged over the vocabulary instead of summed; tokens that p or
      q rules out, of which it would be infinite, are skipped.
  """
  log_m_BV = jnp.logaddexp(log_p_BV, log_q_BV) - jnp.log(2.0)

  def weighted(weights_BV: jax.Array, log_over_BV: jax.Array, log_under_BV: jax.Array) -> jax.Array:
    is_finite_BV = (log_over_BV > -jnp.inf) & (log_under_BV > -jnp.inf)
    return jnp.where(is_finite_BV, weights_BV * (log_over_BV - log_under_BV), 0.0)

  if variant == "paper":
    terms = [weighted(jnp.exp(each_BV), each_BV, log_m_BV) for each_BV in (log_p_BV, log_q_BV)]
    return 0.5 * sum(terms).sum(axis=-1)
  terms = [weighted(jnp.exp(log_m_BV), log_m_BV, each_BV) for each_BV in (log_p_BV, log_q_BV)]
  return 0.5 * sum(terms).mean(axis=-1)


@transform("layer_contrast")
class LayerContrast(Transform):
  """log p_N - log p_j on the tokens with p_N >= relative_top max p_N (DoLa).

  Layer j is, row by row, the candidate whose law is farthest from that of the last
  layer. Earlier layers are read through the final norm and the output head.
  transformers 4.46.3 reads them without the norm, and chooses one layer for the whole
  batch; here no row depends on the others in either variant.

  Source: arXiv:2309.03883. A repetition penalty usually follows it in the chain.

  Attributes:
    layers: candidates, streams "layer_<j>"; see `early_exit_layers`.
    relative_top: how likely a token must be, relative to the likeliest.
    variant: how layers are compared, "paper" or "hf"; see `divergence`.
  """

  layers: tuple[int, ...] = static()
  relative_top: Parameter = row(0.1, least=0.0, most=1.0)
  variant: str = static("paper", choices=VARIANTS)

  @property
  def needs(self) -> frozenset[str]:
    """A stream for each candidate."""
    return frozenset(f"{STREAM}layer_{layer}" for layer in self.layers)

  def prepared(self) -> "LayerContrast":
    """Checks the candidates too.

    Raises:
      ValueError: there is none, or a parameter is out of bounds.
    """
    if not isinstance(self.layers, list | tuple) or not self.layers:
      raise ValueError(
        f"layer_contrast.layers={self.layers!r}: give a list of layers, such as early_exit_layers(num_layers)"
      )
    return Transform.prepared(dataclasses.replace(self, layers=tuple(self.layers)))

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Contrasts with the farthest candidate."""
    farthest_BV, _ = self.farthest(logits_BV, context)
    return mix(logits_BV, 1.0, {"layer": -1.0}, {"layer": farthest_BV}, self.relative_top)

  def farthest(self, logits_BV: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probabilities [B, V] of the chosen layer and int32 [B], which of `layers` it is."""
    mature_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    best_BV, best_B, index_B = None, None, None
    for index, layer in enumerate(self.layers):
      candidate_BV = jax.nn.log_softmax(context.streams[f"layer_{layer}"].astype(jnp.float32), axis=-1)
      its_B = divergence(mature_BV, candidate_BV, self.variant)
      if best_BV is None:
        best_BV, best_B, index_B = candidate_BV, its_B, jnp.zeros(its_B.shape, jnp.int32)
        continue
      is_farther_B = its_B > best_B
      best_BV = jnp.where(column(is_farther_B), candidate_BV, best_BV)
      best_B = jnp.where(is_farther_B, its_B, best_B)
      index_B = jnp.where(is_farther_B, index, index_B)
    return best_BV, index_B
