"""Reward models from comparisons: the Bradley-Terry loss, and how well its probabilities are calibrated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr.objectives.weighted import Weighted


def bradley_terry_loss(
  chosen: jax.Array,
  rejected: jax.Array,
  *,
  margin: jax.Array | float = 0.0,
  centring: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """-log sigma(r(w) - r(l) - margin) + centring (r(w) + r(l))^2, of each pair.

  Args:
    chosen: rewards r(w) of the preferred responses, any shape.
    rejected: rewards r(l) of the others, same shape.
    margin: by how much more the chosen should be worth (arXiv 2307.09288, Eq. 2); scalar or a pair's own.
    centring: weight that keeps rewards around 0 (arXiv 2312.09244, about 0.01); 0: none.

  Returns:
    float32 loss of each pair, and of each pair by name: `accuracy` (1 where the chosen is worth more, 0.5
    where they tie), `margin` (r(w) - r(l)), `chosen_reward`, `rejected_reward`.

  Raises:
    ValueError: a negative centring weight.
  """
  if centring < 0:
    raise ValueError(f"centring={centring}: give 0 or more")
  chosen, rejected = _wide(chosen), _wide(rejected)
  difference = chosen - rejected
  loss = -jax.nn.log_sigmoid(difference - margin)
  if centring:
    loss = loss + centring * (chosen + rejected) ** 2
  metrics = {
    "accuracy": 0.5 * (1 + jnp.sign(difference)),
    "margin": difference,
    "chosen_reward": chosen,
    "rejected_reward": rejected,
  }
  return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


class Calibration(NamedTuple):
  """Sums by bin of confidence; they add over batches.

  Attributes:
    confidence: total confidence of a bin's pairs, and their number (as weight).
    accuracy: how many of them were ranked right, and their number.
  """

  confidence: Weighted
  accuracy: Weighted

  def expected_error(self) -> jax.Array:
    """Returns sum over bins of (share of the pairs) |accuracy - confidence|, a probability."""
    gap_K = jnp.abs(self.accuracy.mean() - self.confidence.mean())
    return Weighted((gap_K * self.confidence.weight).sum(), self.confidence.weight.sum()).mean()


def calibration(differences: jax.Array, weights: jax.Array, *, num_bins: int = 10) -> Calibration:
  """Sorts pairs by the confidence sigma(|r(w) - r(l)|) of the model and counts which were ranked right.

  Args:
    differences: r(w) - r(l), any shape.
    weights: same shape, 0 at padding.
    num_bins: bins of equal width over [0.5, 1].

  Returns:
    Sums by bin, [num_bins].

  Raises:
    ValueError: fewer than 1 bin.

  Source: expected calibration error, arXiv 1706.04599, of the pairwise probability.
  """
  if num_bins < 1:
    raise ValueError(f"num_bins={num_bins}: give at least 1")
  differences, weights = _wide(differences).reshape(-1), jnp.asarray(weights, jnp.float32).reshape(-1)
  differences = jnp.where(weights == 0, 0.0, differences)
  confidence = jax.nn.sigmoid(jnp.abs(differences))
  is_right = 0.5 * (1 + jnp.sign(differences))
  bins = jnp.clip(((confidence - 0.5) * 2 * num_bins).astype(jnp.int32), 0, num_bins - 1)

  def total(values: jax.Array) -> jax.Array:
    return jnp.zeros(num_bins).at[bins].add(values * weights)

  count = total(jnp.ones_like(confidence))
  return Calibration(Weighted(total(confidence), count), Weighted(total(is_right), count))


def _wide(x: jax.Array) -> jax.Array:
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
