"""Truncations with a memory or a coin: Mirostat, adaptive-p, exclude-top-choices.

What Mirostat and adaptive-p remember are probabilities of chosen tokens, which no
history of tokens tells: their `init` always starts afresh, and drivers start them at
the prompt.
"""

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import (
  Context,
  Parameter,
  State,
  Transform,
  all_equal,
  column,
  row,
  static,
  transform,
)
from nr.generation.transforms.thresholds import implementation, keep_most, top_values, truncated

# Keeps its coin apart from the sampler's draw and from those of other transforms.
XTC_PURPOSE = 101

# Of llama.cpp's adaptive-p: height, width and steepness of the peak around the target.
PEAK, WIDTH, SHARPNESS = 5.0, 0.3, 10.0


@transform("xtc")
class Xtc(Transform):
  """Exclude top choices: now and then bans all tokens above a threshold but the least probable.

  Where two or more tokens have at least `threshold`, only the least probable of them
  stays, with everything below. Source: llama.cpp, `llama_sample_xtc_apply`.

  Attributes:
    probability: how often, drawn for each row and step; 0 is off.
    threshold: probability; above 0.5 no two tokens reach it, which is off.
  """

  probability: Parameter = row(least=0, most=1)
  threshold: Parameter = row(0.1, least=0, most=1)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans top choices where the coin says so."""
    coin_B1 = jax.vmap(jax.random.uniform)(context.step_keys(XTC_PURPOSE))[:, None]
    is_on_B1 = (coin_B1 < column(self.probability)) & (column(self.threshold) <= 0.5)
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    is_top_BV = (probs_BV >= column(self.threshold)) & (logits_BV > -jnp.inf)
    least_B1 = jnp.where(is_top_BV, logits_BV, jnp.inf).min(axis=-1, keepdims=True)
    return truncated(logits_BV, ~(is_on_B1 & is_top_BV & (logits_BV > least_B1)))

  def is_off(self) -> bool:
    """Whether the probability is 0 everywhere, or the threshold above 0.5."""
    return all_equal(self.probability, 0) or all_equal(jnp.asarray(self.threshold) > 0.5, True)


@transform("adaptive_p")
class AdaptiveP(Transform):
  """Re-maps logits to peak at tokens near a probability, steered so that the mean meets a target.

  The probability aimed at is 2 target - (moving mean of the chosen tokens' probabilities).
  With d its distance from p in units of 0.3, a logit becomes 5 - 10 d^2 / (1 + d).
  Source: llama.cpp, `llama_sampler_adaptive_p_apply`. There the mean is of the law that
  enters the transform; here of the model's, renormalised over the tokens that are
  left, which is the same behind truncations, as it is meant to be used.

  Attributes:
    target: mean probability of chosen tokens; negative is off.
    decay: weight of the past, so that about 1 / (1 - decay) tokens count.
  """

  is_rebuilt_by_init = False

  target: Parameter = row(most=1)
  decay: Parameter = row(0.9, least=0, most=0.99)

  def init(self, context: Context, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Starts with a mean that is on target: weighted sum and sum of weights, float32 [B]."""
    weights_B = jnp.broadcast_to(1 / (1 - jnp.asarray(self.decay)), context.lengths_B.shape)
    return weights_B * self.target, weights_B

  def apply(self, logits_BV: jax.Array, state: tuple[jax.Array, jax.Array], context: Context) -> jax.Array:
    """Returns logits that peak near the target."""
    sums_B, weights_B = state
    aim_B1 = jnp.clip(2 * column(self.target) - (sums_B / weights_B)[:, None], 0, 1)
    distance_BV = jnp.abs(jax.nn.softmax(logits_BV, axis=-1) - aim_B1) / WIDTH
    peaked_BV = PEAK - SHARPNESS * distance_BV**2 / (1 + distance_BV)
    is_on_BV = (column(self.target) >= 0) & (logits_BV > -jnp.inf)
    # A NaN compares false and passes as it is.
    return jnp.where(is_on_BV, peaked_BV, logits_BV)

  def commit(
    self, state: tuple[jax.Array, jax.Array], tokens_B: jax.Array, context: Context
  ) -> tuple[jax.Array, jax.Array]:
    """Adds the token's probability to the mean."""
    sums_B, weights_B = state
    left_BV = jnp.where(context.transformed_BV > -jnp.inf, context.log_probs_BV, -jnp.inf)
    chosen_B = jnp.exp(_chosen(left_BV, tokens_B) - jax.nn.logsumexp(left_BV, axis=-1))
    chosen_B = jnp.where(jnp.isfinite(chosen_B), chosen_B, 0.0)
    return chosen_B + self.decay * sums_B, 1 + self.decay * weights_B

  def is_off(self) -> bool:
    """Whether the target is -1 everywhere."""
    return all_equal(self.target, -1)


class _Mirostat(Transform):
  """The bound mu on surprise, and its feedback mu -= eta (surprise - tau), in bits."""

  is_rebuilt_by_init = False

  tau: Parameter
  eta: Parameter
  surprise: str

  def init(self, context: Context, vocab_size: int) -> jax.Array:
    """Starts with mu = 2 tau, float32 [B]."""
    return jnp.broadcast_to(2.0 * jnp.asarray(self.tau, jnp.float32), context.lengths_B.shape)

  def commit(self, state: jax.Array, tokens_B: jax.Array, context: Context) -> jax.Array:
    """Moves mu by the token's surprise."""
    law_BV = context.log_probs_BV if self.surprise == "model" else context.transformed_BV
    surprise_B = -_chosen(law_BV, tokens_B) / jnp.log(2.0)
    # A token outside the law (forced from elsewhere) tells nothing of the law.
    return jnp.where(jnp.isfinite(surprise_B), state - self.eta * (surprise_B - self.tau), state)

  def is_off(self) -> bool:
    """Whether tau is infinite everywhere."""
    return all_equal(self.tau, jnp.inf)


@transform("mirostat_v1")
class MirostatV1(_Mirostat):
  """Top-k with the k that a Zipf law fitted to the top tokens asks for a surprise of mu.

  With s the fitted exponent and e = s - 1: k = (e 2^mu / (1 - V^-e))^(1/s), rounded down.
  Source: arXiv:2007.14966, rules and defaults as in llama.cpp.

  Attributes:
    tau: target surprise, bits; infinity is off.
    eta: learning rate of the bound.
    surprise: which law tells the surprise of the chosen token: "truncated" (after the
      chain, as in llama.cpp) or "model" (before it).
    fitted: how many top tokens the exponent is fitted to.
    implementation: "auto", "sort" or "search" (see `thresholds`).
  """

  is_argmax_invariant = True
  tau: Parameter = row(5.0, least=0)
  eta: Parameter = row(0.1, least=0)
  surprise: str = static("truncated", ("truncated", "model"))
  fitted: int = static(100)
  implementation: str = implementation()

  def apply(self, logits_BV: jax.Array, state: jax.Array, context: Context) -> jax.Array:
    """Bans all but the top k."""
    counts_B1 = jnp.floor(self.sizes(logits_BV, state)).astype(jnp.int32)
    is_off_B1 = jnp.isposinf(column(self.tau))
    return truncated(logits_BV, keep_most(logits_BV, counts_B1, self.implementation) | is_off_B1)

  def sizes(self, logits_BV: jax.Array, state: jax.Array) -> jax.Array:
    """Returns k [B, 1] before rounding, within 1 and V."""
    exponent_B1, size = self.exponents(logits_BV), logits_BV.shape[1]
    excess_B1 = exponent_B1 - 1
    log_size = jnp.log(float(size))
    # e / (1 - V^-e) has the limit 1 / ln V at e = 0.
    is_small_B1 = jnp.abs(excess_B1) < 1e-5
    safe_B1 = jnp.where(is_small_B1, 1.0, excess_B1)
    factor_B1 = jnp.where(is_small_B1, 1 / log_size, safe_B1 / -jnp.expm1(-safe_B1 * log_size))
    log_k_B1 = (jnp.log(factor_B1) + state[:, None] * jnp.log(2.0)) / jnp.maximum(exponent_B1, 1e-6)
    sizes_B1 = jnp.exp(jnp.minimum(log_k_B1, log_size))
    return jnp.clip(jnp.nan_to_num(sizes_B1, nan=1.0), 1, size)

  def exponents(self, logits_BV: jax.Array) -> jax.Array:
    """Returns the fitted Zipf exponents s [B, 1]; 0 where fewer than two tokens are allowed."""
    top_BM = top_values(logits_BV, self.fitted)
    gaps_BM = top_BM[:, :-1] - top_BM[:, 1:]  # ln p_i - ln p_{i+1}
    ranks_M = jnp.arange(gaps_BM.shape[1], dtype=jnp.float32)
    steps_M = jnp.log((ranks_M + 2) / (ranks_M + 1))
    is_live_BM = top_BM[:, 1:] > -jnp.inf
    fit_B1 = jnp.where(is_live_BM, steps_M * gaps_BM, 0).sum(axis=-1, keepdims=True)
    norm_B1 = jnp.where(is_live_BM, steps_M**2, 0).sum(axis=-1, keepdims=True)
    return fit_B1 / jnp.where(norm_B1 > 0, norm_B1, 1)


@transform("mirostat_v2")
class MirostatV2(_Mirostat):
  """Keeps the tokens with a surprise of at most mu bits, one at least.

  Source: llama.cpp, `llama_sampler_mirostat_v2_apply`.

  Attributes:
    tau: target surprise, bits; infinity is off.
    eta: learning rate of the bound.
    surprise: which law tells the surprise of the chosen token: "truncated" (after the
      chain, as in llama.cpp) or "model" (before it).
  """

  is_argmax_invariant = True
  tau: Parameter = row(5.0, least=0)
  eta: Parameter = row(0.1, least=0)
  surprise: str = static("truncated", ("truncated", "model"))

  def apply(self, logits_BV: jax.Array, state: jax.Array, context: Context) -> jax.Array:
    """Bans what surprises more."""
    surprise_BV = -jax.nn.log_softmax(logits_BV, axis=-1) / jnp.log(2.0)
    is_kept_BV = (surprise_BV <= state[:, None]) | keep_most(logits_BV, 1)
    return truncated(logits_BV, is_kept_BV)


def _chosen(log_probs_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
  return jnp.take_along_axis(log_probs_BV, tokens_B[:, None], axis=-1, mode="clip")[:, 0]
