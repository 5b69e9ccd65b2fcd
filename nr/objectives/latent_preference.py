"""Latent preference optimisation: DPO on the decoding setting that was drawn (arXiv 2411.09661).

A response y was written with latent choices k (one a response, or one a token) of temperatures T_k from a
head pi(k | h). Of a pair, c chosen and r rejected:

    separate  -log sigma(beta [log P(k_c) - log P(k_r)])                               Eq. 10, the default
    joint     the same plus beta times DPO's words inside sigma                        Eq. 9
    latent    -log sigma(beta [log m(y_c) - log m_ref(y_c) - (same of y_r)])           Eq. 11
    nll       -log P(k_c)                                                              section 4.6

The reference is uniform over the choices and, the language model being frozen, equal in its words.

Arrays in this file: R rows (responses), L positions, D model, V vocabulary, K temperatures.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr import names
from nr.spec import Spec

VARIANTS = ("separate", "joint", "latent", "nll")
LEVELS = ("sequence", "token")
MARGINALS = ("exact", "per_token")
GREEDY = 1e-5
"""A temperature below it is the argmax, as in `nr.generation`."""


@dataclasses.dataclass(frozen=True)
class LatentPreferenceSpec(Spec):
  """Settings of the loss.

  Attributes:
    variant: a name of `VARIANTS`.
    level: "sequence", one choice a response, or "token".
    beta: DPO's coefficient. The paper does not give its value; 0.1 is ours.
    sequence_marginal: of "latent" with one choice a response: "exact" is log sum_k pi(k) prod_t p(y_t | k),
      the probability of what is generated; "per_token" takes the sum inside every token, which is Eq. 11 to
      the letter (and the only form where every token has a choice of its own).
    is_length_normalised: whether sums over tokens are divided by their number. Off in the paper: longer
      responses then weigh more.
  """

  variant: str = "separate"
  level: str = "sequence"
  beta: float = 0.1
  sequence_marginal: str = "exact"
  is_length_normalised: bool = False

  def __post_init__(self):
    for field, allowed in dict(variant=VARIANTS, level=LEVELS, sequence_marginal=MARGINALS).items():
      if getattr(self, field) not in allowed:
        raise ValueError(names.unknown(f"lpo.{field}", getattr(self, field), allowed))
    if not self.beta > 0:
      raise ValueError(f"lpo.beta={self.beta}: give a positive number")

  @property
  def needs_words(self) -> bool:
    """Whether the loss reads log p(y_t | T_k) of every temperature."""
    return self.variant in ("latent", "joint")

  def check_temperatures(self, temperatures: Sequence[float]) -> None:
    """Refuses a set of temperatures that the loss cannot be trained with.

    Raises:
      ValueError: empty, negative, or (for "latent") greedy only: the marginal is then 0 for most texts.
    """
    if not len(temperatures) or min(temperatures) < 0:
      raise ValueError(f"temperatures={tuple(temperatures)}: give temperatures of 0 or more, at least one")
    if self.variant == "latent" and max(temperatures) < GREEDY:
      raise ValueError(
        f"temperatures={tuple(temperatures)} with lpo.variant='latent': a greedy law gives most texts "
        "probability 0; add a positive temperature"
      )


def tempered_log_probs(
  hidden_RLD: jax.Array,
  unembedding_VD: jax.Array,
  targets_RL: jax.Array,
  temperatures_K: jax.Array,
  *,
  chunk_size: int | None = None,
) -> jax.Array:
  """log p(target | h, T_k) of every token and temperature, without ever holding [R, L, K, V].

  Args:
    hidden_RLD: final-normed hidden states.
    unembedding_VD: output head.
    targets_RL: int32 target ids.
    temperatures_K: 0 is greedy: 0 for the argmax (lowest id of equals) and -inf for every other token.
    chunk_size: about how many tokens to hold logits for at a time; None: all.

  Returns:
    float32 [R, L, K], nats.

  Raises:
    ValueError: if chunk_size is not positive.
  """
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size!r}: give a positive number of tokens, or None for no chunks")
  temperatures_K = jnp.asarray(temperatures_K, jnp.float32)
  R, L = targets_RL.shape
  width = L if chunk_size is None else min(L, max(1, chunk_size // R))
  num_chunks = -(-L // width)
  padding = num_chunks * width - L

  def cut(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(R, num_chunks, width, *x.shape[2:]).swapaxes(0, 1)

  @jax.checkpoint
  def step(head_VD: jax.Array, hidden_RWD: jax.Array, targets_RW: jax.Array) -> jax.Array:
    logits_RWV = jnp.einsum(
      "rwd,vd->rwv", hidden_RWD, head_VD.astype(hidden_RWD.dtype), preferred_element_type=jnp.float32
    )
    return tempered_from_logits(logits_RWV, targets_RW, temperatures_K)

  def scan_step(_, chunk):
    return None, step(unembedding_VD, *chunk)

  _, log_probs_CRWK = jax.lax.scan(scan_step, None, (cut(hidden_RLD), cut(targets_RL)))
  joined = log_probs_CRWK.swapaxes(0, 1)
  return joined.reshape(R, num_chunks * width, -1)[:, :L]


def tempered_from_logits(logits: jax.Array, targets: jax.Array, temperatures_K: jax.Array) -> jax.Array:
  """As `tempered_log_probs` of given logits [..., V]; float32 [..., K], one temperature at a time."""
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  target = jnp.where(is_target, logits, 0.0).sum(axis=-1)
  is_top = jnp.argmax(logits, axis=-1) == targets

  @jax.checkpoint
  def of_temperature(logits: jax.Array, target: jax.Array, tau: jax.Array) -> jax.Array:
    safe = jnp.where(tau < GREEDY, 1.0, tau)
    warm = target / safe - jax.nn.logsumexp(logits / safe, axis=-1)
    return jnp.where(tau < GREEDY, jnp.where(is_top, 0.0, -jnp.inf), warm)

  def scan_step(_, tau):
    return None, of_temperature(logits, target, tau)

  _, values_K = jax.lax.scan(scan_step, None, temperatures_K.astype(logits.dtype))
  return jnp.moveaxis(values_K, 0, -1)


class LatentScores(NamedTuple):
  """What the loss sees of responses; any shape, float32.

  Attributes:
    choices: log P(k), sum over the latent choices of log pi(k | h), nats.
    count: number of latent choices.
    marginal: log m(y), nats; for "latent".
    reference_marginal: the same under uniform choices (and the frozen model).
    policy: sum of log p(y_t | T_k) under the trained words; for "joint".
    reference: the same under the reference model.
    tokens: number of response tokens.
  """

  choices: jax.Array
  count: jax.Array
  marginal: jax.Array | None = None
  reference_marginal: jax.Array | None = None
  policy: jax.Array | None = None
  reference: jax.Array | None = None
  tokens: jax.Array | None = None


def sequence_scores(
  spec: LatentPreferenceSpec,
  log_pi_RK: jax.Array,
  choices_R: jax.Array,
  weights_RL: jax.Array | None = None,
  word_log_probs_RLK: jax.Array | None = None,
  reference_log_probs_RLK: jax.Array | None = None,
) -> LatentScores:
  """Scores of responses with one choice each.

  Args:
    spec: which loss.
    log_pi_RK: of the head at the last token of the prompt.
    choices_R: int32, the index that was drawn.
    weights_RL: float32, 1 at response tokens; for "joint" and "latent".
    word_log_probs_RLK: of `tempered_log_probs`; -inf is allowed.
    reference_log_probs_RLK: of the reference model's words; None: the model is frozen, they are the same.
  """
  chosen_R = _pick(log_pi_RK, choices_R)
  scores = LatentScores(chosen_R, jnp.ones_like(chosen_R))
  if word_log_probs_RLK is None:
    return scores
  sums_RK, reference_RK = (
    _sum_tokens(words, weights_RL)
    for words in (word_log_probs_RLK, _or_frozen(reference_log_probs_RLK, word_log_probs_RLK))
  )
  if spec.sequence_marginal == "exact":
    marginal_R = _logsumexp(log_pi_RK + sums_RK)
    reference_R = _logsumexp(reference_RK) - jnp.log(log_pi_RK.shape[-1])
  else:
    pi_RLK = jnp.broadcast_to(log_pi_RK[:, None], word_log_probs_RLK.shape)
    marginal_R, reference_R = _per_token(pi_RLK, word_log_probs_RLK, reference_log_probs_RLK, weights_RL)
  return scores._replace(
    marginal=marginal_R,
    reference_marginal=reference_R,
    policy=_finite(_pick(sums_RK, choices_R)),
    reference=_finite(_pick(reference_RK, choices_R)),
    tokens=weights_RL.sum(axis=-1),
  )


def token_scores(
  spec: LatentPreferenceSpec,
  log_pi_RLK: jax.Array,
  choices_RL: jax.Array,
  weights_RL: jax.Array,
  word_log_probs_RLK: jax.Array | None = None,
  reference_log_probs_RLK: jax.Array | None = None,
) -> LatentScores:
  """Scores of responses with a choice at every token.

  Position t predicts the target y_{t+1} and owns the temperature that it was drawn with: all arrays are
  aligned with the targets, and `weights_RL` is 1 where the target belongs to the response.

  Args:
    spec: which loss.
    log_pi_RLK: of the head.
    choices_RL: int32, the drawn indices; arbitrary where the weight is 0.
    weights_RL: float32.
    word_log_probs_RLK: of `tempered_log_probs`; for "joint" and "latent".
    reference_log_probs_RLK: of the reference model's words; None: the model is frozen.
  """
  del spec
  choices_RL = jnp.where(weights_RL == 0, 0, choices_RL)
  count_R = weights_RL.sum(axis=-1)
  scores = LatentScores(_sum_tokens(_pick(log_pi_RLK, choices_RL), weights_RL), count_R)
  if word_log_probs_RLK is None:
    return scores
  reference_RLK = _or_frozen(reference_log_probs_RLK, word_log_probs_RLK)
  marginal_R, uniform_R = _per_token(log_pi_RLK, word_log_probs_RLK, reference_log_probs_RLK, weights_RL)
  return scores._replace(
    marginal=marginal_R,
    reference_marginal=uniform_R,
    policy=_sum_tokens(_finite(_pick(word_log_probs_RLK, choices_RL)), weights_RL),
    reference=_sum_tokens(_finite(_pick(reference_RLK, choices_RL)), weights_RL),
    tokens=count_R,
  )


def _pick(values: jax.Array, choices: jax.Array) -> jax.Array:
  # A comparison and not a product with a one-hot: values may be -inf.
  is_choice = jnp.arange(values.shape[-1]) == choices[..., None]
  return jnp.where(is_choice, values, 0.0).sum(axis=-1)


def _sum_tokens(values: jax.Array, weights_RL: jax.Array) -> jax.Array:
  weights = weights_RL.reshape(*weights_RL.shape, *(1,) * (values.ndim - weights_RL.ndim))
  return (jnp.where(weights == 0, 0.0, values) * jnp.where(weights == 0, 1.0, weights)).sum(axis=1)


def _finite(values: jax.Array) -> jax.Array:
  # A word drawn greedily has probability 1, and no gradient. Where rounding made another word the argmax
  # since, -inf on both sides would be NaN; it counts as the argmax.
  return jnp.where(values == -jnp.inf, 0.0, values)


def _or_frozen(reference: jax.Array | None, words: jax.Array) -> jax.Array:
  return jax.lax.stop_gradient(words if reference is None else reference)


def _logsumexp(values: jax.Array) -> jax.Array:
  return jax.nn.logsumexp(values, axis=-1)


def _per_token(log_pi_RLK, words_RLK, reference_RLK, weights_RL) -> tuple[jax.Array, jax.Array]:
  reference_RLK = _or_frozen(reference_RLK, words_RLK)
  uniform_RL = _logsumexp(reference_RLK) - jnp.log(words_RLK.shape[-1])
  return (
    _sum_tokens(_logsumexp(log_pi_RLK + words_RLK), weights_RL),
    _sum_tokens(uniform_RL, weights_RL),
  )


def lpo_loss(
  spec: LatentPreferenceSpec, chosen: LatentScores, rejected: LatentScores
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of each pair, and what is worth watching.

  Args:
    spec: which loss.
    chosen: scores of the preferred responses, any shape.
    rejected: scores of the others, same shape.

  Returns:
    float32 loss of each pair, and of each pair by name: `margin` (what the logistic function sees, without
    beta; for "nll" what it would see in "separate"), `accuracy` (1 where it is positive, 0.5 where it is
    0), `chosen_log_prob` and `rejected_log_prob` of the latent choices, nats.

  Raises:
    ValueError: a score that the variant needs is None.
  """

  def total(side: LatentScores) -> jax.Array:
    choices = side.choices
    if spec.is_length_normalised and spec.level == "token":
      choices = choices / jnp.maximum(side.count, 1.0)
    if spec.variant in ("separate", "nll"):
      return choices
    needed = ("policy", "reference") if spec.variant == "joint" else ("marginal", "reference_marginal")
    for field in (*needed, "tokens"):
      if getattr(side, field) is None:
        raise ValueError(f"LatentScores.{field} is missing: lpo.variant={spec.variant!r} needs the words")
    words = getattr(side, needed[0]) - getattr(side, needed[1])
    if spec.is_length_normalised:
      words = words / jnp.maximum(side.tokens, 1.0)
    return choices + words if spec.variant == "joint" else words

  margin = total(chosen) - total(rejected)
  loss = -total(chosen) if spec.variant == "nll" else -jax.nn.log_sigmoid(spec.beta * margin)
  metrics = {
    "margin": margin,
    "accuracy": 0.5 * (1 + jnp.sign(margin)),
    "chosen_log_prob": chosen.choices,
    "rejected_log_prob": rejected.choices,
  }
  return loss, jax.tree.map(jax.lax.stop_gradient, metrics)
