"""Resampling: which particles go on, so that the expected number of copies is N times the weight.

Every scheme takes log-weights [B, K] of B independent sets and one random key a set,
and returns int32 [B, N] parents. Sets never mix. `optimal` keeps N of M weighted
candidates without copies.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nr.names import unknown


def shifted_exp(log_weights_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns exp(log-weights - their maximum) and the maximum [B]; zeros where all are -inf."""
  top_B = log_weights_BK.max(axis=-1)
  # -inf - -inf would be NaN.
  shift_B = jnp.where(jnp.isfinite(top_B), top_B, 0.0)
  return jnp.exp(log_weights_BK - shift_B[..., None]), top_B


def log_mean_exp(log_weights_BK: jax.Array) -> jax.Array:
  """Returns log(mean(exp(log-weights))) along the last axis; -inf where all are -inf."""
  weights_BK, top_B = shifted_exp(log_weights_BK)
  return jnp.where(top_B == -jnp.inf, -jnp.inf, top_B + jnp.log(weights_BK.mean(axis=-1)))


def normalised(log_weights_BK: jax.Array) -> jax.Array:
  """Returns weights that sum to 1 along the last axis; zeros where all are -inf."""
  weights_BK, _ = shifted_exp(log_weights_BK)
  return weights_BK / jnp.maximum(weights_BK.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def effective_sample_size(log_weights_BK: jax.Array) -> jax.Array:
  """Returns (sum w)^2 / sum w^2, in 1..K, exactly K for equal weights; 0 where all are -inf."""
  weights_BK, _ = shifted_exp(log_weights_BK)
  squares_B = jnp.square(weights_BK).sum(axis=-1)
  return jnp.square(weights_BK.sum(axis=-1)) / jnp.maximum(squares_B, jnp.finfo(jnp.float32).tiny)


def at_points(weights_BK: jax.Array, points_BN: jax.Array) -> jax.Array:
  """Returns int32 [B, N]: the first k with cumsum(weights)_k > point * sum(weights).

  Weightless particles are never returned, unless a set has no weight at all.

  Args:
    weights_BK: float32, not negative, of any sum.
    points_BN: float32 in [0, 1).
  """
  cumulative_BK = jnp.cumsum(weights_BK, axis=-1)
  total_B1 = cumulative_BK[:, -1:]
  # Rounding may lift a point to the sum, behind which there is nobody.
  points_BN = jnp.minimum(points_BN * total_B1, jnp.nextafter(total_B1, jnp.zeros_like(total_B1)))
  found_BN = jax.vmap(lambda row_K, at_N: jnp.searchsorted(row_K, at_N, side="right"))(
    cumulative_BK, points_BN
  )
  return jnp.minimum(found_BN, weights_BK.shape[-1] - 1).astype(jnp.int32)


def systematic_at(weights_BK: jax.Array, uniforms_B: jax.Array, size: int) -> jax.Array:
  """Returns the parents at the evenly spaced points (u + i) / N, for one uniform a set."""
  return at_points(weights_BK, (uniforms_B[:, None] + jnp.arange(size)) / size)


def _uniforms(keys_B: jax.Array, *shape: int) -> jax.Array:
  return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys_B)


def systematic(log_weights_BK: jax.Array, keys_B: jax.Array) -> jax.Array:
  """One uniform a set, evenly spaced points: the floor or the ceiling of N times the weight in copies."""
  weights_BK, _ = shifted_exp(log_weights_BK)
  return systematic_at(weights_BK, _uniforms(keys_B), weights_BK.shape[-1])


def stratified(log_weights_BK: jax.Array, keys_B: jax.Array) -> jax.Array:
  """One uniform in each of N equal strata."""
  weights_BK, _ = shifted_exp(log_weights_BK)
  size = weights_BK.shape[-1]
  return at_points(weights_BK, (_uniforms(keys_B, size) + jnp.arange(size)) / size)


def multinomial(log_weights_BK: jax.Array, keys_B: jax.Array) -> jax.Array:
  """N independent draws."""
  weights_BK, _ = shifted_exp(log_weights_BK)
  return at_points(weights_BK, _uniforms(keys_B, weights_BK.shape[-1]))


def residual(log_weights_BK: jax.Array, keys_B: jax.Array) -> jax.Array:
  """floor(N times the weight) copies for certain; the rest drawn by the fractions, independently."""
  weights_BK, _ = shifted_exp(log_weights_BK)
  size = weights_BK.shape[-1]
  total_B1 = jnp.maximum(weights_BK.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  expected_BK = size * weights_BK / total_B1
  copies_BK = jnp.floor(expected_BK)
  certain_BK = jnp.cumsum(copies_BK, axis=-1)
  slots_BK = jnp.broadcast_to(jnp.arange(size, dtype=jnp.float32), expected_BK.shape)
  search = jax.vmap(lambda row_K, at_K: jnp.searchsorted(row_K, at_K, side="right"))
  drawn_BK = at_points(expected_BK - copies_BK, _uniforms(keys_B, size))
  return jnp.where(slots_BK < certain_BK[:, -1:], search(certain_BK, slots_BK), drawn_BK).astype(jnp.int32)


SCHEMES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "systematic": systematic,
  "stratified": stratified,
  "multinomial": multinomial,
  "residual": residual,
}


def check_scheme(field: str, name: Any) -> None:
  """Raises ValueError for a scheme that does not exist."""
  if name not in SCHEMES:
    raise ValueError(unknown(field, str(name), SCHEMES))


def optimal(log_weights_BM: jax.Array, size: int, uniforms_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keeps N of M weighted candidates without copies, the least variance among unbiased rules.

  With c such that sum(min(1, w / c)) = N, candidates of weight c and more stay as they
  are; of the others each stays with probability w / c, at weight c, by systematic
  points, so that none stays twice.

  Args:
    log_weights_BM: float32 nats; -inf for no candidate.
    size: N. With at most N candidates all stay as they are.
    uniforms_B: float32 in [0, 1), one for each set.

  Returns:
    int32 [B, N] candidates and float32 [B, N] their new log-weights, such that the
    expected new weight of each candidate (0 where it does not stay) is its old one.
    Slots that are left over point anywhere and have -inf.

  Source: the threshold rule of Fearnhead and Clifford (2003), which SMC steering
  (arXiv:2306.03081) uses; systematic points for the rest are our choice.
  """
  batch, num_candidates = log_weights_BM.shape
  if num_candidates < size:
    fill = ((0, 0), (0, size - num_candidates))
    log_weights_BM = jnp.pad(log_weights_BM, fill, constant_values=-jnp.inf)
  weights_BM, _ = shifted_exp(log_weights_BM)
  order_BM = jnp.argsort(-weights_BM, axis=-1, stable=True)
  sorted_BM = jnp.take_along_axis(weights_BM, order_BM, axis=-1)
  # rest_BM[:, a]: weight behind the a largest; summed from the small end, to keep it accurate.
  rest_BM = jnp.cumsum(sorted_BM[:, ::-1], axis=-1)[:, ::-1]
  # The a largest stay for certain, for the least a whose next one is below c = rest / (N - a).
  places_N = jnp.arange(size)
  is_below_BN = sorted_BM[:, :size] * (size - places_N) < rest_BM[:, :size]
  certain_B1 = jnp.where(is_below_BN.any(axis=-1), jnp.argmax(is_below_BN, axis=-1), size)[:, None]
  behind_B1 = jnp.take_along_axis(rest_BM, jnp.minimum(certain_B1, size - 1), axis=-1)
  open_B1 = jnp.maximum(size - certain_B1, 1)

  is_rest_BM = jnp.arange(sorted_BM.shape[-1]) >= certain_B1
  points_BN = (uniforms_B[:, None] + places_N - certain_B1) / open_B1
  drawn_BN = at_points(jnp.where(is_rest_BM, sorted_BM, 0.0), jnp.maximum(points_BN, 0.0))
  is_certain_BN = places_N < certain_B1
  chosen_BN = jnp.where(is_certain_BN, places_N, drawn_BN)
  kept_BN = jnp.take_along_axis(order_BM, chosen_BN, axis=-1)
  # In the scale of the caller: log c = log(rest) - log(N - a) + shift.
  shift_B1 = jnp.max(log_weights_BM, axis=-1, keepdims=True)
  log_threshold_B1 = jnp.log(behind_B1) - jnp.log(open_B1) + shift_B1
  old_BN = jnp.take_along_axis(log_weights_BM, kept_BN, axis=-1)
  new_BN = jnp.where(is_certain_BN, old_BN, log_threshold_B1)
  new_BN = jnp.where(shift_B1 == -jnp.inf, -jnp.inf, new_BN)
  return jnp.minimum(kept_BN, num_candidates - 1).astype(jnp.int32), new_BN
