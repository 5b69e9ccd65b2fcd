"""Samplers: how a token is drawn from transformed logits.

A sampler is a pytree like a transform. `Gumbel` is the default; `InverseCdf` takes
its randomness from outside, which makes laws checkable without Monte Carlo; `Replay`
emits given tokens, so that a driver tells their probability under any chain.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import Context


class Sampler(Protocol):
  """What a driver asks of a sampler."""

  def draw(self, logits_BV: jax.Array, context: Context) -> jax.Array:
    """Returns int32 [B] tokens, one for each row of float32 logits (-inf: banned)."""
    ...

  def take(self, rows_B: jax.Array) -> "Sampler":
    """Returns the sampler for a selection of rows."""
    ...


def sampler(cls: type) -> type:
  """Makes a class a frozen dataclass and a pytree whose fields are all leaves that lead with B."""
  cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
  jax.tree_util.register_dataclass(cls, [field.name for field in dataclasses.fields(cls)], [])
  return cls


def _take_all(self: Any, rows_B: jax.Array) -> Any:
  return jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=0), self)


@sampler
class Greedy:
  """The largest logit; the lowest id among equals."""

  def draw(self, logits_BV: jax.Array, context: Context) -> jax.Array:
    """Returns the argmax."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

  take = _take_all


@sampler
class Gumbel:
  """The softmax law by argmax(logits + Gumbel noise): no softmax, and sharded vocabularies stay so.

  The key is that of the row and its position, so a row draws the same in any batch.
  """

  def draw(self, logits_BV: jax.Array, context: Context) -> jax.Array:
    """Returns a draw for each row."""
    return jax.vmap(jax.random.categorical)(context.step_keys(), logits_BV).astype(jnp.int32)

  take = _take_all


@sampler
class InverseCdf:
  """The first token whose cumulative probability exceeds a given uniform.

  Attributes:
    uniforms_BT: float32 in [0, 1), one for each row and generated position.
  """

  uniforms_BT: jax.Array

  def draw(self, logits_BV: jax.Array, context: Context) -> jax.Array:
    """Returns the token at each row's uniform."""
    step_B1 = context.generated_B[:, None]
    return inverse_cdf(logits_BV, jnp.take_along_axis(self.uniforms_BT, step_B1, axis=1)[:, 0])

  def check(self, rows: int, max_new_tokens: int) -> None:
    """Raises ValueError for too few uniforms, or some outside [0, 1)."""
    _check_values("uniforms_BT", self.uniforms_BT, rows, max_new_tokens)
    if bool((self.uniforms_BT < 0).any() | (self.uniforms_BT >= 1).any()):
      raise ValueError("uniforms_BT: give values in [0, 1) as float32; 1.0 lies outside")

  take = _take_all


@sampler
class Replay:
  """Given tokens, whatever the logits: tells the probability of texts under a chain.

  Attributes:
    tokens_BT: int32, by generated position.
  """

  tokens_BT: jax.Array

  def draw(self, logits_BV: jax.Array, context: Context) -> jax.Array:
    """Returns the token at each row's position."""
    return jnp.take_along_axis(self.tokens_BT, context.generated_B[:, None], axis=1)[:, 0].astype(jnp.int32)

  def check(self, rows: int, max_new_tokens: int) -> None:
    """Raises ValueError for too few tokens."""
    _check_values("tokens_BT", self.tokens_BT, rows, max_new_tokens)

  take = _take_all


def _check_values(name: str, values_BT: jax.Array, rows: int, max_new_tokens: int) -> None:
  if values_BT.ndim != 2 or values_BT.shape[0] != rows or values_BT.shape[1] < max_new_tokens:
    raise ValueError(
      f"{name} has shape {values_BT.shape}: give {rows} rows of at least max_new_tokens={max_new_tokens} values"
    )


def inverse_cdf(logits_BV: jax.Array, uniforms_B: jax.Array) -> jax.Array:
  """Returns int32 [B]: the first i with cumsum(softmax(logits))_i > u.

  Banned tokens are never returned, also when rounding leaves the sum below u.
  """
  cumulative_BV = jnp.cumsum(jax.nn.softmax(logits_BV, axis=-1), axis=-1)
  # Scaled instead of compared with 1, which the rounded sum may miss.
  is_beyond_BV = (cumulative_BV > uniforms_B[:, None] * cumulative_BV[:, -1:]) & (logits_BV > -jnp.inf)
  return jnp.argmax(is_beyond_BV, axis=-1).astype(jnp.int32)


def gumbel_top_k(logits_BV: jax.Array, keys_B: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Draws k tokens a row without replacement, by the k largest of logits + Gumbel noise.

  Args:
    logits_BV: float32.
    keys_B: random key for each row.
    k: how many; at most V.

  Returns:
    int32 [B, k] tokens in the order drawn, and their perturbed log-probabilities.

  Source: arXiv:1903.06059.
  """
  if not 0 < k <= logits_BV.shape[-1]:
    raise ValueError(f"k={k}: give 1 to {logits_BV.shape[-1]}, the size of the vocabulary")
  noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
  perturbed_BK, tokens_BK = jax.lax.top_k(jax.nn.log_softmax(logits_BV, axis=-1) + noise_BV, k)
  return tokens_BK.astype(jnp.int32), perturbed_BK


def log_prob(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
  """Returns float32 [B], the log-probability of tokens under softmax(logits), nats."""
  chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1, mode="clip")[:, 0]
  return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
