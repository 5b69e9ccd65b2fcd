"""Temperatures: fixed, by entropy, and as a learned mixture."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import (
  HIDDEN,
  Context,
  Parameter,
  State,
  Transform,
  all_equal,
  column,
  row,
  static,
  table,
  transform,
)
from nr.generation.transforms.thresholds import entropy

# Below it a row is greedy. vLLM and tpu-inference draw the line at the same place.
GREEDY = 1e-5


def tempered(logits_BV: jax.Array, taus_B1: jax.Array) -> jax.Array:
  """Divides logits by temperatures; below 1e-5 only the most probable token stays (lowest id of equals).

  Args:
    logits_BV: float32.
    taus_B1: float32 [B, 1] or [1, 1]; 1 is exactly the identity.

  Returns:
    float32 [B, V].
  """
  is_greedy_B1 = taus_B1 < GREEDY
  is_top_BV = jnp.arange(logits_BV.shape[-1]) == jnp.argmax(logits_BV, axis=-1, keepdims=True)
  scaled_BV = logits_BV / jnp.where(is_greedy_B1, 1.0, taus_B1)
  return jnp.where(is_greedy_B1 & ~is_top_BV, -jnp.inf, scaled_BV)


@transform("temperature")
class Temperature(Transform):
  """The law softmax(z / tau).

  Attributes:
    tau: 1 is off; a row below 1e-5 is greedy, exactly.
  """

  is_argmax_invariant = True
  tau: Parameter = row(least=0, below=float("inf"))

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns z / tau."""
    return tempered(logits_BV, column(self.tau))

  def is_off(self) -> bool:
    """Whether tau is 1 everywhere."""
    return all_equal(self.tau, 1)


@transform("dynamic_temperature")
class DynamicTemperature(Transform):
  """A temperature that rises with the entropy: low + (high - low) * (H / ln n)^exponent.

  n is the number of tokens that are still allowed, so H / ln n lies in [0, 1].
  Source: llama.cpp, `llama_sampler_temp_ext_apply`, whose range is low = temperature
  - delta, high = temperature + delta.

  Attributes:
    low: temperature of a law that is certain; off together with `high` at 1.
    high: temperature of the uniform law.
    exponent: bends the curve between them.
  """

  is_argmax_invariant = True
  low: Parameter = row(least=0)
  high: Parameter = row(least=0)
  exponent: Parameter = row(1.0, least=0)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns z over the row's temperature."""
    return tempered(logits_BV, self.taus(logits_BV))

  def taus(self, logits_BV: jax.Array) -> jax.Array:
    """Returns the temperatures [B, 1] that these logits get."""
    live_B1 = (logits_BV > -jnp.inf).sum(axis=-1, keepdims=True)
    entropy_B1 = entropy(jax.nn.log_softmax(logits_BV, axis=-1))
    share_B1 = jnp.where(live_B1 > 1, entropy_B1 / jnp.log(jnp.maximum(live_B1, 2)), 0.0)
    span_B1 = column(self.high) - column(self.low)
    return column(self.low) + span_B1 * jnp.clip(share_B1, 0, 1) ** column(self.exponent)

  def is_off(self) -> bool:
    """Whether both ends are 1 everywhere."""
    return all_equal(self.low, 1) and all_equal(self.high, 1)


@transform("adaptive_temperature")
class AdaptiveTemperature(Transform):
  """Temperatures from a finite set, with probabilities that a head predicts for each row.

  `mixture` gives the law of a token whose temperature is drawn anew: sum_i P(tau_i)
  softmax(z / tau_i). `argmax` takes the most probable temperature (the first of equals).
  Source: arXiv:2411.09661.

  Attributes:
    taus: the temperatures [K]; below 1e-5 is greedy.
    probabilities: P(tau) [K] or [B, K] for all steps; None reads the context's hidden
      "adaptive", [B, K], which the model must offer.
    law: "mixture" or "argmax".
  """

  is_argmax_invariant = True
  taus: Any = table()
  probabilities: Any = table(None)
  law: str = static("mixture", ("mixture", "argmax"))

  @property
  def needs(self) -> frozenset[str]:
    """The head's probabilities, unless they are given."""
    return frozenset([HIDDEN + "adaptive"]) if self.probabilities is None else frozenset()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns log-probabilities of the mixture, or z over the picked temperature."""
    given = context.hidden["adaptive"] if self.probabilities is None else self.probabilities
    weights_BK = jnp.atleast_2d(jnp.asarray(given, jnp.float32))
    taus_K = jnp.asarray(self.taus, jnp.float32)
    if self.law == "argmax":
      return tempered(logits_BV, taus_K[jnp.argmax(weights_BK, axis=-1)][:, None])
    # One temperature at a time: K copies of [B, V] at once would be the largest array of the step.
    parts = (
      jnp.log(weights_BK[:, k, None])
      + jax.nn.log_softmax(tempered(logits_BV, taus_K[k, None, None]), axis=-1)
      for k in range(taus_K.shape[0])
    )
    return functools.reduce(jnp.logaddexp, parts)

  def row_parameters(self) -> dict[str, Parameter]:
    """Returns the probabilities, if they are given for each row, [B, K]."""
    is_by_row = self.probabilities is not None and jnp.ndim(self.probabilities) == 2
    return {"probabilities": self.probabilities} if is_by_row else {}

  def tables(self) -> dict[str, Any]:
    """Returns what all rows share."""
    return {name: value for name, value in super().tables().items() if name not in self.row_parameters()}

  def spread(self, batch: int) -> "AdaptiveTemperature":
    """Returns it with probabilities for each row, if it holds any."""
    if self.probabilities is None:
      return self
    by_row_BK = jnp.broadcast_to(self.probabilities, (batch, jnp.shape(self.probabilities)[-1]))
    return dataclasses.replace(self, probabilities=by_row_BK)

  def prepared(self) -> "AdaptiveTemperature":
    """Returns it with arrays.

    Raises:
      ValueError: a negative temperature, or a number of probabilities that is not theirs.
    """
    checked = Transform.prepared(dataclasses.replace(self, probabilities=None))
    taus_K = jnp.atleast_1d(jnp.asarray(self.taus, jnp.float32))
    if not isinstance(taus_K, jax.core.Tracer) and (taus_K < 0).any():
      raise ValueError(f"adaptive_temperature.taus={taus_K.tolist()}: give temperatures of 0 or more")
    if self.probabilities is None:
      return AdaptiveTemperature(taus_K, None, checked.law)
    probabilities = jnp.asarray(self.probabilities, jnp.float32)
    if probabilities.ndim not in (1, 2) or probabilities.shape[-1] != taus_K.shape[0]:
      raise ValueError(
        f"adaptive_temperature.probabilities has shape {probabilities.shape}: give [K] or [B, K] "
        f"for the K={taus_K.shape[0]} temperatures"
      )
    return AdaptiveTemperature(taus_K, probabilities, checked.law)
