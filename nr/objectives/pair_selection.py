"""Which two responses of a pool make a preference pair (arXiv 2501.18101, algorithm 1)."""

import jax
import jax.numpy as jnp

from nr.names import unknown

RULES = ("range", "count", "absolute")
TIE_POLICIES = ("diversity_only", "skip")


def good_and_bad(
  rewards_BN: jax.Array,
  valid_BN: jax.Array,
  rho: float | jax.Array,
  rule: str = "range",
  thresholds: tuple[float, float] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the responses from which the chosen and the rejected one are taken.

  Three readings of rho are in use:

  - range (the authors' code): rewards of at least max - rho (max - min), and of at most
    min + rho (max - min), extremes over the pool;
  - count (another implementation): the ceil(rho N) highest and lowest by rank, at least
    one, of equals the lower index first;
  - absolute (natural for rule-based rewards; our choice): at least the first of
    `thresholds`, at most the second.

  Args:
    rewards_BN: float32 scores, B pools of N responses.
    valid_BN: bool, False where a response could not be scored or does not exist.
    rho: 0 to 0.5; not checked where it is traced.
    rule: one of RULES.
    thresholds: (good, bad) rewards, of the rule "absolute".

  Returns:
    bool [B, N], bool [B, N].

  Raises:
    ValueError: rho out of bounds, an unknown rule, or thresholds missing.
  """
  if not isinstance(rho, jax.core.Tracer) and not 0 <= rho <= 0.5:
    raise ValueError(f"rho={rho}: give a share from 0 to 0.5")
  if rule not in RULES:
    raise ValueError(unknown("rule", rule, RULES))
  if rule == "absolute":
    if thresholds is None or thresholds[0] < thresholds[1]:
      raise ValueError(f"thresholds={thresholds}: rule 'absolute' needs (good, bad) with good >= bad")
    return valid_BN & (rewards_BN >= thresholds[0]), valid_BN & (rewards_BN <= thresholds[1])
  highest_BN = jnp.where(valid_BN, rewards_BN, -jnp.inf)
  lowest_BN = jnp.where(valid_BN, rewards_BN, jnp.inf)
  if rule == "range":
    most_B1, least_B1 = highest_BN.max(axis=1, keepdims=True), lowest_BN.min(axis=1, keepdims=True)
    margin_B1 = rho * (most_B1 - least_B1)
    return valid_BN & (rewards_BN >= most_B1 - margin_B1), valid_BN & (rewards_BN <= least_B1 + margin_B1)
  # A small allowance: 0.3 * 10 is above 3 in binary.
  taken_B1 = jnp.maximum(1, jnp.ceil(rho * valid_BN.sum(axis=1, keepdims=True) - 1e-4))
  return valid_BN & (_ranks(-highest_BN) < taken_B1), valid_BN & (_ranks(lowest_BN) < taken_B1)


def _ranks(values_BN: jax.Array) -> jax.Array:
  """Returns the rank of each value, 0 the smallest; equals in order of index."""
  return jnp.argsort(jnp.argsort(values_BN, axis=1, stable=True), axis=1, stable=True)


def select_pairs(
  rewards_BN: jax.Array,
  diversity_BN: jax.Array,
  rho: float | jax.Array,
  *,
  rule: str = "range",
  tie_policy: str = "diversity_only",
  thresholds: tuple[float, float] | None = None,
  valid_BN: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Takes the most diverse of the good responses and the least diverse of the bad ones.

  Of equals the lowest index is taken. A pool whose two picks are one response gives no
  pair, nor does one with fewer than two scored responses. Pure, and may be jitted.

  Args:
    rewards_BN: float32 scores of B pools of N responses; NaN counts as not scored.
    diversity_BN: float32, larger is more diverse.
    rho: share of the reward scale that counts as good and as bad; with 0 and untied
      rewards this is best against worst.
    rule: reading of rho, see `good_and_bad`.
    tie_policy: of pools whose rewards are all equal: "diversity_only" pairs the most and
      the least diverse (the authors' code), "skip" gives none.
    thresholds: of the rule "absolute".
    valid_BN: bool, False for responses to leave out; None: none.

  Returns:
    int32 [B] chosen, int32 [B] rejected, float32 [B] 1 where there is a pair, else 0.

  Raises:
    ValueError: a setting out of bounds.

  Source: arXiv 2501.18101, algorithm 1; the authors' selector in their fairseq2 branch.
  """
  if tie_policy not in TIE_POLICIES:
    raise ValueError(unknown("tie_policy", tie_policy, TIE_POLICIES))
  scored_BN = ~jnp.isnan(rewards_BN) & ~jnp.isnan(diversity_BN)
  valid_BN = scored_BN if valid_BN is None else valid_BN & scored_BN
  good_BN, bad_BN = good_and_bad(rewards_BN, valid_BN, rho, rule, thresholds)
  chosen_B = jnp.argmax(jnp.where(good_BN, diversity_BN, -jnp.inf), axis=1)
  rejected_B = jnp.argmin(jnp.where(bad_BN, diversity_BN, jnp.inf), axis=1)
  is_pair_B = good_BN.any(axis=1) & bad_BN.any(axis=1) & (chosen_B != rejected_B)
  if tie_policy == "skip":
    is_pair_B &= ~is_tied(rewards_BN, valid_BN)
  return chosen_B.astype(jnp.int32), rejected_B.astype(jnp.int32), is_pair_B.astype(jnp.float32)


def best_and_worst(
  rewards_BN: jax.Array, valid_BN: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Takes the first of the best and the first of the worst: the pairs of plain DPO.

  A pool whose rewards are all equal gives no pair.

  Args:
    rewards_BN: float32 scores; NaN counts as not scored.
    valid_BN: bool, False for responses to leave out; None: none.

  Returns:
    int32 [B] chosen, int32 [B] rejected, float32 [B] 1 where there is a pair, else 0.

  Source: the baseline of the authors' fairseq2 branch of arXiv 2501.18101.
  """
  scored_BN = ~jnp.isnan(rewards_BN)
  valid_BN = scored_BN if valid_BN is None else valid_BN & scored_BN
  chosen_B = jnp.argmax(jnp.where(valid_BN, rewards_BN, -jnp.inf), axis=1)
  rejected_B = jnp.argmin(jnp.where(valid_BN, rewards_BN, jnp.inf), axis=1)
  is_pair_B = ~is_tied(rewards_BN, valid_BN)
  return chosen_B.astype(jnp.int32), rejected_B.astype(jnp.int32), is_pair_B.astype(jnp.float32)


def is_tied(rewards_BN: jax.Array, valid_BN: jax.Array) -> jax.Array:
  """Returns bool [B]: whether all scored responses of a pool have the same reward (or none is scored)."""
  most_B = jnp.where(valid_BN, rewards_BN, -jnp.inf).max(axis=1)
  least_B = jnp.where(valid_BN, rewards_BN, jnp.inf).min(axis=1)
  return most_B <= least_B


def sequence_diversity(log_probs_BN: jax.Array, tokens_BN: jax.Array, norm: str = "mean") -> jax.Array:
  """Returns how improbable responses are under the policy that wrote them, float32 [B, N], nats.

  D_prob(y) = -(1/n) sum_t log pi(y_t | x, y_<t) with norm "mean" (the authors' code);
  "sum" leaves 1/n out and so prefers long responses.

  Args:
    log_probs_BN: float32 sums of log-probabilities, without temperature or truncation.
    tokens_BN: numbers of tokens.
    norm: "mean" or "sum".

  Raises:
    ValueError: another norm.
  """
  if norm not in ("mean", "sum"):
    raise ValueError(unknown("norm", norm, ("mean", "sum")))
  return -log_probs_BN / jnp.maximum(tokens_BN, 1) if norm == "mean" else -log_probs_BN
