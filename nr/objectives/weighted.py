"""Sums with their weights: what every loss and metric returns instead of a mean.

A mean of means is wrong as soon as masks, packing or gradient accumulation
appear. Totals and weights add exactly over microbatches, devices and hosts, and
are divided once, at the end, by the training loop.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Weighted(NamedTuple):
  """A weighted sum that has not been divided yet.

  Attributes:
    total: sum of weight times value, float32, scalar (any shape is allowed).
    weight: sum of the weights, float32, same shape as `total` or scalar.
  """

  total: jax.Array
  weight: jax.Array

  def mean(self) -> jax.Array:
    """Returns total / weight, and 0 where the weight is 0 (nothing was scored)."""
    safe = jnp.where(self.weight == 0, 1.0, self.weight)
    return jnp.where(self.weight == 0, 0.0, self.total / safe)

  @classmethod
  def of(cls, values: jax.Array, weights: jax.Array) -> "Weighted":
    """Sums `values * weights` in float32; a value of weight 0 never counts, even NaN."""
    weights = weights.astype(jnp.float32)
    values = jnp.where(weights == 0, 0.0, values.astype(jnp.float32))
    return cls((values * weights).sum(), weights.sum())


def add(first: Weighted, second: Weighted) -> Weighted:
  """Adds two weighted sums of the same quantity over disjoint data."""
  return Weighted(first.total + second.total, first.weight + second.weight)


class LossOutput(NamedTuple):
  """What a method's loss function returns for one microbatch.

  Attributes:
    loss: the quantity whose mean is minimised.
    metrics: further quantities to report, by name.
    statistics: pytree of arrays that is summed over microbatches and handed to
      the method's `update_extra` (for example how often each latent fired).
  """

  loss: Weighted
  metrics: dict[str, Weighted]
  statistics: Any = ()
