"""Guidance by scores of candidate tokens: classifiers, class-conditional models, rewards and values.

All but `Gedi` read one stream [B, V] that holds the score of the text so far with each
candidate token behind it. -inf (or NaN) says that a token was not scored; such tokens
are banned. `nr.generation.candidate_scoring.WithCandidateScores` offers such a stream for
the k most probable tokens, a model with a value for every token offers it for all.

Each takes the most probable tokens before it adds scores. Strength 0 is the identity,
also where the method would still have kept only the most probable tokens (our choice).
"""

from typing import Any

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import (
  HIDDEN,
  STREAM,
  Context,
  Parameter,
  State,
  Transform,
  all_equal,
  column,
  keep,
  row,
  static,
  table,
  transform,
)
from nr.generation.transforms.thresholds import top_values

LARGEST_RATIO = 1e4


def is_among_top(logits_BV: jax.Array, count: int) -> jax.Array:
  """Returns bool [B, V]: the `count` largest logits, ties all kept; all that are not banned when it is 0."""
  is_open_BV = logits_BV > -jnp.inf
  return is_open_BV & (logits_BV >= top_values(logits_BV, count)[:, -1:]) if count > 0 else is_open_BV


def guide(
  logits_BV: jax.Array, scores_BV: jax.Array, strength: Parameter, candidates: int, kept: int = 0
) -> jax.Array:
  """Adds strength * score to the most probable tokens and bans the rest.

  Args:
    logits_BV: float32.
    scores_BV: float32, -inf where not scored.
    strength: a scalar or [B]; rows with 0 come out as they went in.
    candidates: how many tokens may be chosen from; 0: all.
    kept: how many of them remain after the scores; 0: all.
  """
  is_open_BV = is_among_top(logits_BV, candidates) & (scores_BV > -jnp.inf)
  guided_BV = keep(logits_BV + column(strength) * jnp.where(is_open_BV, scores_BV, 0.0), is_open_BV)
  guided_BV = keep(guided_BV, is_among_top(guided_BV, kept))
  return jnp.where(column(strength) == 0, logits_BV, guided_BV)


class _Guided(Transform):
  """Base of those that add a scored stream; subclasses declare `strength` and `stream`."""

  @property
  def needs(self) -> frozenset[str]:
    """The stream of scores."""
    return frozenset({STREAM + self.stream})

  def is_off(self) -> bool:
    """Whether the strength is 0."""
    return all_equal(self.strength, 0)


@transform("fudge")
class Fudge(_Guided):
  """log p(v) + strength log P(attribute | text, v) on the most probable tokens.

  Source: arXiv:2104.05218; the numbers of tokens are those of its authors' code.

  Attributes:
    strength: weight of the classifier; 1 is Bayes' rule, 0 off.
    candidates: tokens that are considered; 0: all that are scored.
    kept: tokens that remain; 0: all.
    stream: log-probabilities of the attribute.
  """

  strength: Parameter = row(1.0)
  candidates: int = static(200)
  kept: int = static(10)
  stream: str = static("attribute")

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Adds the classifier's verdict."""
    scores_BV = context.streams[self.stream]
    return guide(logits_BV, scores_BV, self.strength, self.candidates, self.kept)


@transform("rad")
class Rad(_Guided):
  """z + strength clip(reward, 0, 1) on the most probable tokens (reward-augmented decoding).

  Source: arXiv:2310.09520; 20 tokens and strength 30 are the defaults of its authors' code.

  Attributes:
    strength: beta; 0 is off.
    candidates: tokens that are considered; 0: all that are scored.
    stream: rewards.
    is_inverse: whether 1 - reward is added instead, as that code can.
  """

  strength: Parameter = row(30.0)
  candidates: int = static(20)
  stream: str = static("reward")
  is_inverse: bool = static(False, choices=(False, True))

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Adds the reward."""
    rewards_BV = context.streams[self.stream]
    clipped_BV = jnp.clip(rewards_BV, 0.0, 1.0)
    clipped_BV = 1.0 - clipped_BV if self.is_inverse else clipped_BV
    return guide(logits_BV, keep(clipped_BV, rewards_BV > -jnp.inf), self.strength, self.candidates)


@transform("args")
class Args(_Guided):
  """log p + strength reward on the most probable tokens (alignment as reward-guided search).

  Source: arXiv:2402.01694. Defaults recalled, not re-read.

  Attributes:
    strength: w; 0 is off.
    candidates: tokens that are considered; 0: all that are scored.
    stream: rewards, of any scale.
  """

  strength: Parameter = row(1.5)
  candidates: int = static(10)
  stream: str = static("reward")

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Adds the reward."""
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    guided_BV = guide(log_probs_BV, context.streams[self.stream], self.strength, self.candidates)
    return jnp.where(column(self.strength) == 0, logits_BV, guided_BV)


@transform("value_guidance")
class ValueGuidance(_Guided):
  """z_v + strength V(text, v): controlled decoding with a value function.

  The values come from a stream, or from a head that reads a value for every next
  token out of the hidden state: V = h K + b.

  Source: arXiv:2310.17022, token by token; recalled, not re-read.

  Attributes:
    strength: 0 is off.
    head: None, or the kernel [D, V] and the bias [V].
    candidates: tokens that are considered; 0: all that have a value.
    stream: values; not read when there is a head.
    hidden: name of the state that the head reads.
  """

  strength: Parameter = row(1.0)
  head: Any = table(None)
  candidates: int = static(0)
  stream: str = static("value")
  hidden: str = static("last")

  @property
  def needs(self) -> frozenset[str]:
    """The stream, or the state that the head reads."""
    return frozenset({STREAM + self.stream if self.head is None else HIDDEN + self.hidden})

  def prepared(self) -> "ValueGuidance":
    """Checks the head too.

    Raises:
      ValueError: the head is no pair of [D, V] and [V], or a parameter out of bounds.
    """
    if self.head is not None:
      shapes = [jnp.shape(each) for each in self.head]
      if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[1] != shapes[0][1:]:
        raise ValueError(f"value_guidance.head has shapes {shapes}: give a kernel [D, V] and a bias [V]")
    return super().prepared()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Adds the values."""
    if self.head is None:
      values_BV = context.streams[self.stream]
    else:
      kernel_DV, bias_V = self.head
      state_BD = context.hidden[self.hidden]
      values_BV = jnp.einsum("bd,dv->bv", state_BD, kernel_DV, preferred_element_type=jnp.float32) + bias_V
    return guide(logits_BV, values_BV, self.strength, self.candidates)


@transform("gedi")
class Gedi(Transform):
  """log p(v) + strength log P(desired | text, v) by Bayes' rule from two class-conditional models.

  With l_t the difference of the two models' log-probabilities of token t and t tokens
  so far,

      P(desired | text, v) = sigmoid(scale (l_1 + ... + l_{t-1} + l_t(v)) / t + bias)

  Only tokens that are generated under it count, since what the models said of those
  before is not kept (our choice; the authors' code counts the prompt). The filter then drops the tokens with the
  smallest P(desired), as long as their share of the guided law stays below `mass` and
  P(desired) below `target`.

  Source: arXiv:2009.06367 and its authors' code. The default strength is recalled.

  Attributes:
    strength: omega; 0 is off.
    scale: of the normalised log-likelihood ratio.
    bias: log prior odds of the desired class.
    mass: share that the filter may drop; 0: no filter.
    target: P(desired) from which on nothing is dropped.
    desired: the stream of the model of the desired class.
    undesired: that of the other class.
  """

  is_rebuilt_by_init = False

  strength: Parameter = row(30.0)
  scale: Parameter = row(1.0, above=0.0)
  bias: Parameter = row(0.0)
  mass: Parameter = row(0.0, least=0.0, most=1.0)
  target: Parameter = row(1.0, least=0.0, most=1.0)
  desired: str = static("desired")
  undesired: str = static("undesired")

  @property
  def needs(self) -> frozenset[str]:
    """Both class-conditional models."""
    return frozenset({STREAM + self.desired, STREAM + self.undesired})

  def is_off(self) -> bool:
    """Whether the strength is 0."""
    return all_equal(self.strength, 0)

  def init(self, context: Context, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the summed log-likelihood ratio and the number of tokens in it, both 0."""
    batch = context.tokens_BS.shape[0]
    return jnp.zeros(batch), jnp.zeros(batch, jnp.int32)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Adds the posterior of the desired class, then filters."""
    log_posterior_BV = self.log_posterior(state, context)
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    guided_BV = log_probs_BV + column(self.strength) * log_posterior_BV
    is_dropped_BV = self._is_dropped(guided_BV, log_posterior_BV)
    return jnp.where(column(self.strength) == 0, logits_BV, keep(guided_BV, ~is_dropped_BV))

  def commit(self, state: State, tokens_B: jax.Array, context: Context) -> State:
    """Adds the chosen token's ratio."""
    total_B, count_B = state
    chosen_B = jnp.take_along_axis(self._ratios(context), tokens_B[:, None], axis=1, mode="clip")[:, 0]
    return total_B + chosen_B, count_B + 1

  def log_posterior(self, state: State, context: Context) -> jax.Array:
    """Returns log P(desired | text, v), float32 [B, V]."""
    total_B, count_B = state
    ratios_BV = (total_B[:, None] + self._ratios(context)) / (count_B[:, None] + 1)
    return jax.nn.log_sigmoid(column(self.scale) * ratios_BV + column(self.bias))

  def _ratios(self, context: Context) -> jax.Array:
    desired_BV, undesired_BV = (
      jax.nn.log_softmax(context.streams[name].astype(jnp.float32), axis=-1)
      for name in (self.desired, self.undesired)
    )
    # Where both rule a token out, it says nothing of the class; sums of the others stay finite.
    is_silent_BV = (desired_BV == -jnp.inf) & (undesired_BV == -jnp.inf)
    return jnp.clip(jnp.where(is_silent_BV, 0.0, desired_BV - undesired_BV), -LARGEST_RATIO, LARGEST_RATIO)

  def _is_dropped(self, guided_BV: jax.Array, log_posterior_BV: jax.Array) -> jax.Array:
    order_BV = jnp.argsort(log_posterior_BV, axis=-1)
    law_BV = jnp.take_along_axis(jax.nn.softmax(guided_BV, axis=-1), order_BV, axis=-1)
    is_within_BV = jnp.cumsum(law_BV, axis=-1) < column(self.mass)
    is_below_BV = jnp.take_along_axis(log_posterior_BV, order_BV, axis=-1) < jnp.log(column(self.target))
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.take_along_axis(is_within_BV & is_below_BV, rank_BV, axis=-1)
