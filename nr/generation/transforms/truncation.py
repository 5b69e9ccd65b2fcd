"""Truncations: laws cut to the tokens that are probable enough, and renormalised.

Each bans the tokens outside its keep-set, and keeps at least the first token of its
own order. `min_tokens_to_keep` raises that number, as in transformers. All rules
ignore tokens that are banned already.
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
from nr.generation.transforms.thresholds import (
  bisect,
  entropy,
  implementation,
  is_search,
  keep_first,
  keep_most,
  ordered_bits,
  truncated,
)


@transform("top_k")
class TopK(Transform):
  """Keeps the k most probable tokens, and what ties with the last of them.

  Source: arXiv:1805.04833.

  Attributes:
    k: how many; 0, or the size of the vocabulary and more, is off.
    min_tokens_to_keep: at least so many, where k is on.
    implementation: "auto", "sort" or "search" (see `thresholds`).
  """

  is_argmax_invariant = True
  k: Parameter = row(dtype=jnp.int32, least=0)
  min_tokens_to_keep: int = static(1)
  implementation: str = implementation()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans all but the top k."""
    counts_B1 = jnp.maximum(column(self.k), self.min_tokens_to_keep)
    is_kept_BV = keep_most(logits_BV, counts_B1, self.implementation)
    return truncated(logits_BV, is_kept_BV | (column(self.k) == 0))

  def is_off(self) -> bool:
    """Whether k is 0 everywhere."""
    return all_equal(self.k, 0)


@transform("top_p")
class TopP(Transform):
  """Nucleus: keeps a token if all more probable ones together have less than p.

  Source: arXiv:1904.09751.

  Attributes:
    p: probability; 1 is off.
    min_tokens_to_keep: at least so many.
    implementation: "auto", "sort" or "search" (see `thresholds`).
  """

  is_argmax_invariant = True
  p: Parameter = row(least=0, most=1)
  min_tokens_to_keep: int = static(1)
  implementation: str = implementation()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans all outside the nucleus."""
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    is_kept_BV = keep_first(logits_BV, probs_BV, column(self.p), self.implementation, self.min_tokens_to_keep)
    return truncated(logits_BV, is_kept_BV | (column(self.p) >= 1))

  def is_off(self) -> bool:
    """Whether p is 1 everywhere."""
    return all_equal(self.p, 1)


@transform("typical")
class Typical(Transform):
  """Keeps the tokens whose surprise is nearest to the entropy, up to a mass.

  In order of |-ln p - H|: the shortest prefix with at least `mass`, and what ties with
  its last. The most probable token need not be among them. Source: arXiv:2202.00666;
  with "at least" as in transformers, where llama.cpp has "more than".

  Attributes:
    mass: probability; 1 is off.
    min_tokens_to_keep: at least so many, the most typical.
    implementation: "auto", "sort" or "search" (see `thresholds`).
  """

  mass: Parameter = row(least=0, most=1)
  min_tokens_to_keep: int = static(1)
  implementation: str = implementation()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans what is not typical."""
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    typicality_BV = -jnp.abs(-log_probs_BV - entropy(log_probs_BV))
    is_kept_BV = keep_first(
      typicality_BV, jnp.exp(log_probs_BV), column(self.mass), self.implementation, self.min_tokens_to_keep
    )
    return truncated(logits_BV, is_kept_BV | (column(self.mass) >= 1))

  def is_off(self) -> bool:
    """Whether the mass is 1 everywhere."""
    return all_equal(self.mass, 1)


@transform("epsilon")
class Epsilon(Transform):
  """Keeps tokens of at least a probability.

  Source: arXiv:2210.15191.

  Attributes:
    epsilon: probability; 0 is off.
    min_tokens_to_keep: at least so many.
    implementation: how these are found: "auto", "sort" or "search".
  """

  is_argmax_invariant = True
  epsilon: Parameter = row(least=0, most=1)
  min_tokens_to_keep: int = static(1)
  implementation: str = implementation()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans what is less probable."""
    is_kept_BV = jax.nn.softmax(logits_BV, axis=-1) >= column(self.epsilon)
    return _truncated(self, logits_BV, is_kept_BV)

  def is_off(self) -> bool:
    """Whether epsilon is 0 everywhere."""
    return all_equal(self.epsilon, 0)


@transform("eta")
class Eta(Transform):
  """Keeps tokens of at least min(epsilon, sqrt(epsilon) exp(-H)).

  Source: arXiv:2210.15191.

  Attributes:
    epsilon: probability; 0 is off.
    min_tokens_to_keep: at least so many.
    implementation: how these are found: "auto", "sort" or "search".
  """

  is_argmax_invariant = True
  epsilon: Parameter = row(least=0, most=1)
  min_tokens_to_keep: int = static(1)
  implementation: str = implementation()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans what is less probable."""
    is_kept_BV = jax.nn.softmax(logits_BV, axis=-1) >= self.cutoffs(logits_BV)
    return _truncated(self, logits_BV, is_kept_BV)

  def cutoffs(self, logits_BV: jax.Array) -> jax.Array:
    """Returns the least probability [B, 1] that is kept."""
    entropy_B1 = entropy(jax.nn.log_softmax(logits_BV, axis=-1))
    epsilon_B1 = column(self.epsilon)
    return jnp.minimum(epsilon_B1, jnp.sqrt(epsilon_B1) * jnp.exp(-entropy_B1))

  def is_off(self) -> bool:
    """Whether epsilon is 0 everywhere."""
    return all_equal(self.epsilon, 0)


@transform("min_p")
class MinP(Transform):
  """Keeps tokens of at least a share of the largest probability: z >= max z + ln p.

  Source: arXiv:2407.01082.

  Attributes:
    p: share of the largest probability; 0 is off.
    min_tokens_to_keep: at least so many.
    implementation: how these are found: "auto", "sort" or "search".
  """

  is_argmax_invariant = True
  p: Parameter = row(least=0, most=1)
  min_tokens_to_keep: int = static(1)
  implementation: str = implementation()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans what is less probable."""
    top_B1 = logits_BV.max(axis=-1, keepdims=True)
    return _truncated(self, logits_BV, logits_BV >= top_B1 + jnp.log(column(self.p)))

  def is_off(self) -> bool:
    """Whether p is 0 everywhere."""
    return all_equal(self.p, 0)


@transform("top_n_sigma")
class TopNSigma(Transform):
  """Keeps logits within n standard deviations of the largest: z >= max z - n std(z).

  The deviation is that of all allowed logits (their population). The keep-set is
  the same at every temperature. Source: arXiv:2411.07641, rule as in llama.cpp.

  Attributes:
    n: standard deviations; 0 is off.
  """

  is_argmax_invariant = True
  n: Parameter = row(least=0)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans what lies lower."""
    is_kept_BV = logits_BV >= self.cutoffs(logits_BV)
    return truncated(logits_BV, is_kept_BV | (column(self.n) == 0))

  def cutoffs(self, logits_BV: jax.Array) -> jax.Array:
    """Returns the least logit [B, 1] that is kept where n is on."""
    is_live_BV = logits_BV > -jnp.inf
    std_B1 = jnp.std(logits_BV, axis=-1, keepdims=True, where=is_live_BV)
    return logits_BV.max(axis=-1, keepdims=True) - column(self.n) * std_B1

  def is_off(self) -> bool:
    """Whether n is 0 everywhere."""
    return all_equal(self.n, 0)


@transform("top_h")
class TopH(Transform):
  """Keeps the longest prefix of the sorted tokens whose entropy is at most alpha H.

  `paper` takes the entropy of the renormalised prefix, -sum(p ln p) / M + ln M with M its
  mass; it never falls when a token joins that is no more probable than all before it,
  so the prefix is a threshold. `hf` is the rule of transformers 5.23: the plain sum
  of -p ln p, over the 100 most probable tokens alone. Tokens that tie are kept if the
  prefix with all of them is within the bound. Source: arXiv:2509.02510.

  Attributes:
    alpha: share of the law's entropy; 1 is off.
    variant: "paper" or "hf".
    implementation: "auto", "sort" or "search" (see `thresholds`).
  """

  is_argmax_invariant = True
  alpha: Parameter = row(least=0, most=1)
  variant: str = static("paper", ("paper", "hf"))
  implementation: str = implementation()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Bans what is outside the prefix."""
    live_BV = logits_BV
    if self.variant == "hf":
      live_BV = truncated(logits_BV, keep_most(logits_BV, 100, self.implementation))
    log_probs_BV = jax.nn.log_softmax(live_BV, axis=-1)
    bounds_B1 = column(self.alpha) * entropy(log_probs_BV)
    if is_search(self.implementation, logits_BV.shape[1]):
      bits_BV = ordered_bits(log_probs_BV)

      def is_beyond(thresholds_B1: jax.Array) -> jax.Array:
        terms_BV = jnp.where(bits_BV >= thresholds_B1, log_probs_BV, -jnp.inf)
        mass_B1 = jnp.exp(terms_BV).sum(axis=-1, keepdims=True)
        return self._entropy(mass_B1, entropy(terms_BV)) > bounds_B1

      is_kept_BV = bits_BV > bisect(is_beyond, logits_BV.shape[0])
    else:
      sorted_BV = jnp.sort(log_probs_BV, axis=-1, descending=True)
      probs_BV = jnp.exp(sorted_BV)
      terms_BV = jnp.where(sorted_BV > -jnp.inf, -probs_BV * sorted_BV, 0.0)
      grown_BV = self._entropy(jnp.cumsum(probs_BV, axis=-1), jnp.cumsum(terms_BV, axis=-1))
      is_beyond_BV = grown_BV > bounds_B1
      beyond_B1 = jnp.where(is_beyond_BV, sorted_BV, -jnp.inf).max(axis=-1, keepdims=True)
      is_kept_BV = log_probs_BV > jnp.where(is_beyond_BV.any(axis=-1, keepdims=True), beyond_B1, -jnp.inf)
    is_kept_BV |= logits_BV >= logits_BV.max(axis=-1, keepdims=True)
    return truncated(logits_BV, is_kept_BV | (column(self.alpha) >= 1))

  def _entropy(self, mass: jax.Array, terms: jax.Array) -> jax.Array:
    if self.variant == "hf":
      return terms
    # An empty prefix has no entropy.
    return jnp.where(mass > 0, terms / mass + jnp.log(mass), 0.0)

  def is_off(self) -> bool:
    """Whether alpha is 1 everywhere."""
    return all_equal(self.alpha, 1)


def _truncated(self: Epsilon | Eta | MinP, logits_BV: jax.Array, is_kept_BV: jax.Array) -> jax.Array:
  return truncated(logits_BV, is_kept_BV | keep_most(logits_BV, self.min_tokens_to_keep, self.implementation))
