"""Log-linear mixtures of several next-token distributions.

Contrastive decoding, classifier-free guidance, experts and anti-experts, products of
experts, context-aware decoding and coherence boosting are one law with different
weights: softmax(w_0 log p + sum_i w_i log p_i), where p is the law that enters and the
p_i are streams that the model offers (`nr.generation.streams.WithStreams`),
sometimes inside a head of tokens that p itself finds likely. `Mix` is that law; the
other classes here only say what the weights are.

Put them first in a chain: what earlier transforms banned stays banned, and what they
changed is mixed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.transforms.algebra import (
  STREAM,
  Context,
  Parameter,
  State,
  Transform,
  all_equal,
  checked_value,
  column,
  keep,
  row,
  static,
  table,
  transform,
)

SCALES = ("log_probs", "logits")


def head(logits_BV: jax.Array, alpha: Parameter) -> jax.Array:
  """Returns bool [B, V]: the tokens v with p(v) >= alpha max p, p = softmax(logits).

  Compared as z >= max z + ln alpha, which is the same set without a softmax. 0 keeps
  everything that is not banned.

  Source: the plausibility constraint of arXiv:2210.15097.
  """
  top_B1 = logits_BV.max(axis=-1, keepdims=True)
  return (logits_BV >= top_B1 + jnp.log(column(alpha))) & (logits_BV > -jnp.inf)


def mix(
  logits_BV: jax.Array,
  main: Parameter,
  terms: Mapping[str, Parameter],
  streams: Mapping[str, jax.Array],
  alpha: Parameter = 0.0,
  of: str = "log_probs",
) -> jax.Array:
  """Returns w_0 log p + sum_i w_i log p_i inside the head of p, -inf outside.

  Tokens that p or a stream with a positive weight rules out are ruled out. One that a
  stream with a negative weight rules out counts as that stream's least probable one:
  the limit would give it all of the mass (our choice). Rows with w_0 = 1, all other
  weights 0 and alpha 0 come out as they went in.

  Args:
    logits_BV: float32 logits of p.
    main: w_0, a scalar or [B].
    terms: w_i by stream.
    streams: float32 logits [B, V] by name.
    alpha: of `head`; 0 for no restriction.
    of: "log_probs" normalises all of them first, "logits" does not. The law is the
      same; the results differ by a constant of the row.
  """
  normalise = jax.nn.log_softmax if of == "log_probs" else (lambda z_BV, axis: z_BV)
  is_kept_BV = head(logits_BV, alpha)
  is_off_B1 = (column(main) == 1) & (column(alpha) == 0)
  mixed_BV = column(main) * jnp.where(is_kept_BV, normalise(logits_BV, axis=-1), 0.0)
  for name, weight in terms.items():
    weight_B1 = column(weight)
    its_BV = normalise(streams[name].astype(jnp.float32), axis=-1)
    # Not "> -inf": a NaN must come through, so that its row is seen to be broken.
    is_possible_BV = its_BV != -jnp.inf
    least_B1 = jnp.where(is_possible_BV, its_BV, jnp.inf).min(axis=-1, keepdims=True)
    least_B1 = jnp.where(least_B1 < jnp.inf, least_B1, 0.0)
    term_BV = weight_B1 * jnp.where(is_possible_BV, its_BV, least_B1)
    mixed_BV = mixed_BV + jnp.where(weight_B1 == 0, 0.0, term_BV)
    is_kept_BV = is_kept_BV & (is_possible_BV | (weight_B1 <= 0))
    is_off_B1 = is_off_B1 & (weight_B1 == 0)
  return jnp.where(is_off_B1, logits_BV, keep(mixed_BV, is_kept_BV))


def _array(parameter: Parameter) -> jax.Array | np.ndarray:
  """Returns a parameter as an array, on the host where it is a plain value."""
  return parameter if isinstance(parameter, jax.Array) else np.asarray(parameter, np.float32)


class Mixture(Transform):
  """Base of the mixtures: a subclass says its weights.

  Attributes:
    of: what is mixed, "log_probs" or "logits"; see `mix`.
    alpha: of `head`.
    off: the parameters' values that make it the identity.
  """

  of = "log_probs"
  alpha = 0.0
  off: ClassVar[Mapping[str, float]] = {}

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns the weight of the law that enters, and those of the streams by name."""
    raise NotImplementedError

  @property
  def needs(self) -> frozenset[str]:
    """Its streams."""
    return frozenset(STREAM + name for name in self.weights_of()[1])

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Mixes."""
    main, terms = self.weights_of()
    return mix(logits_BV, main, terms, context.streams, self.alpha, self.of)

  def is_off(self) -> bool:
    """Whether only the law that enters has a weight, which is 1, and no head is cut."""
    return bool(self.off) and all(all_equal(getattr(self, name), value) for name, value in self.off.items())


@transform("mix")
class Mix(Mixture):
  """softmax(w_0 log p + sum_i w_i log p_i), optionally inside the head of p.

  Ensembles, and any mixture without a name of its own:

      Mix({"small": -0.5, "other_prompt": 0.25}, main=1.25)

  Attributes:
    weights: w_i by stream; scalars or [B].
    main: w_0.
    alpha: keeps tokens with p >= alpha max p; 0 keeps all.
    of: "log_probs" or "logits"; see `mix`.
  """

  weights: Mapping[str, Parameter] = table()
  main: Parameter = row(1.0)
  alpha: Parameter = row(0.0, least=0.0, most=1.0)
  of: str = static("log_probs", choices=SCALES)

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns what it was given."""
    return self.main, dict(self.weights)

  def is_off(self) -> bool:
    """Whether the main weight is 1 and all others, and alpha, are 0."""
    zeros = [*self.weights.values(), self.alpha] if isinstance(self.weights, Mapping) else [1.0]
    return all_equal(self.main, 1) and all(all_equal(weight, 0) for weight in zeros)

  def row_parameters(self) -> dict[str, Parameter]:
    """Returns the weights too, as "weights.stream"."""
    weights = {f"weights.{name}": weight for name, weight in self.weights.items()}
    return {**super().row_parameters(), **weights}

  def map_rows(self, change: Callable[..., jax.Array], *others: Self) -> Self:
    """Applies `change` to the weights too."""
    changed = {
      name: change(weight, *(other.weights[name] for other in others))
      for name, weight in self.weights.items()
    }
    own = Transform.map_rows(dataclasses.replace(self, weights={}), change, *others)
    return dataclasses.replace(own, weights=changed)

  def prepared(self) -> Self:
    """Checks the weights too.

    Raises:
      ValueError: `weights` is no mapping, or a value is no number or out of bounds.
    """
    if not isinstance(self.weights, Mapping):
      raise ValueError(f"mix.weights={self.weights!r}: give weights by stream, as {{'amateur': -1.0}}")
    settings = dict(dtype=jnp.float32, bounds={})
    checked = {
      name: checked_value(f"mix.weights.{name}", weight, settings) for name, weight in self.weights.items()
    }
    own = Transform.prepared(dataclasses.replace(self, weights={}))
    return dataclasses.replace(own, weights=checked)


@transform("contrastive_decoding")
class ContrastiveDecoding(Mixture):
  """log p - coefficient log p_amateur on the tokens with p >= alpha max p.

  Source: arXiv:2210.15097. The README of its authors' code runs the amateur at
  temperature 0.5 with coefficient 1.

  Attributes:
    alpha: how likely a token must be, relative to the likeliest.
    coefficient: weight of what the amateur says.
    temperature: of the amateur. Dividing its logits changes the law as dividing
      the coefficient does, and is done so.
    stream: the amateur.
  """

  off = {"coefficient": 0.0, "alpha": 0.0}
  alpha: Parameter = row(0.1, least=0.0, most=1.0)
  coefficient: Parameter = row(1.0, least=0.0)
  temperature: Parameter = row(1.0, above=0.0)
  stream: str = static("amateur")

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns 1 and -coefficient / temperature."""
    return 1.0, {self.stream: -_array(self.coefficient) / _array(self.temperature)}


@transform("contrastive_reasoning")
class ContrastiveReasoning(Mixture):
  """(1 + beta) z - beta z_amateur on the tokens with z >= max z + ln alpha.

  Source: arXiv:2309.09117; its values 0.5 and 0.1 are recalled, not re-read.

  Attributes:
    beta: strength of the contrast; 0 leaves the head of p.
    alpha: how likely a token must be, relative to the likeliest.
    stream: the amateur.
    of: "logits" as there; see `mix`.
  """

  off = {"beta": 0.0, "alpha": 0.0}
  beta: Parameter = row(0.5, least=0.0)
  alpha: Parameter = row(0.1, least=0.0, most=1.0)
  stream: str = static("amateur")
  of: str = static("logits", choices=SCALES)

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns 1 + beta and -beta."""
    beta = _array(self.beta)
    return 1 + beta, {self.stream: -beta}


@transform("guidance")
class Guidance(Mixture):
  """Classifier-free guidance: log p_u + scale (log p - log p_u), p_u without the condition.

  Source: arXiv:2306.17806, on log-probabilities as the processor of transformers.

  Attributes:
    scale: 1 is off, 0 the law without the condition, above 1 exaggerates it.
    stream: the law without the condition, usually the same model with another prompt.
    of: "log_probs" or "logits"; see `mix`.
  """

  off = {"scale": 1.0}
  scale: Parameter = row(1.5)
  stream: str = static("unconditional")
  of: str = static("log_probs", choices=SCALES)

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns scale and 1 - scale."""
    scale = _array(self.scale)
    return scale, {self.stream: 1 - scale}


@transform("dexperts")
class DExperts(Mixture):
  """z + strength (z_expert - z_anti_expert).

  Source: arXiv:2105.03023; on raw logits, as the authors' code of proxy tuning does.
  The default strength is recalled, not re-read.

  Attributes:
    strength: 0 is off.
    expert: the stream that is added.
    anti_expert: the stream that is subtracted.
    alpha: keeps tokens with p >= alpha max p; 0 keeps all.
    of: "logits" or "log_probs"; see `mix`.
  """

  off = {"strength": 0.0, "alpha": 0.0}
  strength: Parameter = row(2.0)
  expert: str = static("expert")
  anti_expert: str = static("anti_expert")
  alpha: Parameter = row(0.0, least=0.0, most=1.0)
  of: str = static("logits", choices=SCALES)

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns 1, strength and -strength."""
    if self.expert == self.anti_expert:
      raise ValueError(f"dexperts.expert={self.expert!r} is the anti_expert too; name two streams")
    strength = _array(self.strength)
    return 1.0, {self.expert: strength, self.anti_expert: -strength}


@transform("proxy_tuning")
class ProxyTuning(Mixture):
  """z + strength (z_tuned - z_untuned): a small model's tuning, lent to a large one.

  Source: arXiv:2401.08565, raw logits as in its code.

  Attributes:
    strength: 1 as in the paper; 0 is off.
    tuned: the small tuned model.
    untuned: the small model before tuning.
    of: "logits" or "log_probs"; see `mix`.
  """

  off = {"strength": 0.0}
  strength: Parameter = row(1.0)
  tuned: str = static("tuned")
  untuned: str = static("untuned")
  of: str = static("logits", choices=SCALES)

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns 1, strength and -strength."""
    strength = _array(self.strength)
    return 1.0, {self.tuned: strength, self.untuned: -strength}


@transform("product_of_experts")
class ProductOfExperts(Mixture):
  """(p p_1 ... p_n)^exponent, renormalised.

  Source: the inference-time policy adapters of arXiv:2305.15065, where the one
  expert is the adapter.

  Attributes:
    exponent: power of the product.
    streams: the experts besides the model itself.
  """

  exponent: Parameter = row(1.0)
  streams: tuple[str, ...] = static(("expert",))

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns the exponent for all."""
    return self.exponent, dict.fromkeys(self.streams, self.exponent)

  def prepared(self) -> Self:
    """Checks the streams too.

    Raises:
      ValueError: `streams` is no list of names.
    """
    if not isinstance(self.streams, list | tuple) or not self.streams:
      raise ValueError(f"product_of_experts.streams={self.streams!r}: give a list of names, ['expert']")
    return Transform.prepared(dataclasses.replace(self, streams=tuple(self.streams)))


@transform("context_aware")
class ContextAware(Mixture):
  """(1 + strength) log p - strength log p_without, p_without not seeing the context.

  With a shortened context instead of none it is coherence boosting. The default is
  recalled, not re-read.

  Source: context-aware decoding, arXiv:2305.14739; coherence boosting, arXiv:2110.08294.

  Attributes:
    strength: 0 is off.
    stream: the law without the context (the same model with another prompt).
    alpha: keeps tokens with p >= alpha max p; 0 keeps all.
  """

  off = {"strength": 0.0, "alpha": 0.0}
  strength: Parameter = row(0.5)
  stream: str = static("without_context")
  alpha: Parameter = row(0.0, least=0.0, most=1.0)

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns 1 + strength and -strength."""
    strength = _array(self.strength)
    return 1 + strength, {self.stream: -strength}


@transform("autoregressive_reward")
class AutoregressiveReward(Mixture):
  """log p + log p_reward / beta: a reward model that is itself a language model.

  Source: arXiv:2410.08193.

  Attributes:
    beta: the larger, the nearer to p.
    stream: the reward model.
  """

  beta: Parameter = row(1.0, above=0.0)
  stream: str = static("reward")

  def weights_of(self) -> tuple[Parameter, dict[str, Parameter]]:
    """Returns 1 and 1 / beta."""
    return 1.0, {self.stream: 1 / _array(self.beta)}
