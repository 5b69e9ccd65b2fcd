"""Rules by which drafts are accepted, as laws of what comes out.

Each rule turns the target's laws p (after the whole chain of transforms, one at every
node of the draft), the laws q that the drafts were drawn from, and the drafts
themselves into `Outcomes`: the probability that each node is the last one accepted,
and the law of the token after it. A driver draws from these; a test sums them.

Where q is zero everywhere, nothing was drafted: such a node is never accepted, and
the next token follows p. A deterministic draft has a q that is certain of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr.generation.speculation.draft_trees import DraftTree
from nr.names import unknown


class Outcomes(NamedTuple):
  """What verification may end with; M = N + 1 nodes, the root first.

  Attributes:
    stop_BM: float32 probabilities: the node is the last one accepted (the root:
      nothing was).
    next_BMV: float32 probabilities of the token after each node, if it is the last one.
  """

  stop_BM: jax.Array
  next_BMV: jax.Array


def token_outcomes(
  tree: DraftTree, log_p_BMV: jax.Array, log_q_BNV: jax.Array, tokens_BN: jax.Array
) -> Outcomes:
  """Accepts token by token; of several candidates in turn, against a running residual.

  A draft x at a node with law p is accepted with probability min(1, p(x) / q(x)).
  After a rejection p becomes the residual max(p - q, 0), normalised, for the next
  candidate and at last for the token that is drawn instead. With one candidate a
  node this is speculative sampling, with several its multi-draft form; both leave
  the law p unchanged if each draft was drawn from its q independently of the others.

  Args:
    tree: which draft continues which.
    log_p_BMV: float32 log-probabilities at every node.
    log_q_BNV: float32, the law that each draft was drawn from; -inf everywhere where
      nothing was drafted.
    tokens_BN: int32 drafts.

  Source: arXiv:2211.17192 and arXiv:2302.01318; several candidates: arXiv:2305.09781.
  """
  residual_BMV, remaining_BM = jnp.exp(log_p_BMV), jnp.ones(log_p_BMV.shape[:2])
  entered_BM = jnp.ones(log_p_BMV.shape[:2])
  for nodes in tree.siblings:
    parents = tree.parents_of(nodes)
    q_BKV = jnp.exp(log_q_BNV[:, nodes - 1])
    p_BKV = residual_BMV[:, parents]
    accepted_BK = jnp.minimum(1.0, _ratio(p_BKV, q_BKV, tokens_BN[:, nodes - 1]))
    entered_BM = entered_BM.at[:, nodes].set(remaining_BM[:, parents] * accepted_BK)
    remaining_BM = remaining_BM.at[:, parents].multiply(1 - accepted_BK)
    residual_BMV = residual_BMV.at[:, parents].set(_normalised(jnp.maximum(p_BKV - q_BKV, 0), p_BKV))
  # The root, whose place in `entered` is 1, fills up the shorter paths.
  paths_MA = jnp.where(tree.paths == jnp.arange(tree.size + 1)[:, None], 0, tree.paths)
  reached_BM = entered_BM * entered_BM[:, paths_MA].prod(axis=-1)
  return Outcomes(reached_BM * remaining_BM, residual_BMV)


def block_outcomes(
  tree: DraftTree, log_p_BMV: jax.Array, log_q_BNV: jax.Array, tokens_BN: jax.Array
) -> Outcomes:
  """Accepts a whole run of drafts at once; never fewer in the mean than token by token.

  With w_0 = 1, w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i)) and the residual mass
  R_i = sum max(w_i p_{i+1} - q_{i+1}, 0), the longest i with u_i <= h_i =
  R_i / (R_i + 1 - w_i) is taken, and the next token drawn from that residual.
  Arguments as for `token_outcomes`; the tree must be a chain.

  Source: arXiv:2403.10444.
  """
  p_BMV = jnp.exp(log_p_BMV)
  q_BMV = jnp.pad(jnp.exp(log_q_BNV), ((0, 0), (0, 1), (0, 0)))
  ratios_BN = _ratio(p_BMV[:, :-1], q_BMV[:, :-1], tokens_BN)

  def step(weight_B, ratio_B):
    weight_B = jnp.minimum(1.0, weight_B * ratio_B)
    return weight_B, weight_B

  first_B = jnp.ones(p_BMV.shape[0])
  _, weights_NB = jax.lax.scan(step, first_B, ratios_BN.T)
  weights_BM = jnp.concatenate([first_B[None], weights_NB]).T
  residual_BMV = jnp.maximum(weights_BM[..., None] * p_BMV - q_BMV, 0)
  mass_BM = residual_BMV.sum(axis=-1)
  # 1 - w first: it is exactly 0 where w is 1, and the quotient then exactly 1.
  total_BM = mass_BM + (1 - weights_BM)
  # Both are 0 only where w = 1 and p = q: the prefix is accepted, as every longer one.
  hold_BM = jnp.where(total_BM > 0, mass_BM / jnp.where(total_BM > 0, total_BM, 1.0), 1.0)
  hold_BM = hold_BM.at[:, 0].set(1.0)
  missed_BM = jnp.cumprod((1 - hold_BM)[:, ::-1], axis=1)[:, ::-1]
  longer_BM = jnp.pad(missed_BM[:, 1:], ((0, 0), (0, 1)), constant_values=1.0)
  return Outcomes(hold_BM * longer_BM, _normalised(residual_BMV, p_BMV))


def greedy_outcomes(
  tree: DraftTree, log_p_BMV: jax.Array, log_q_BNV: jax.Array, tokens_BN: jax.Array
) -> Outcomes:
  """Accepts a draft if it is the most probable token (the lowest id among equals); else takes that one.

  Arguments as for `token_outcomes`, to which it is applied with a p that is certain.
  """
  best_BM1 = jnp.argmax(log_p_BMV, axis=-1, keepdims=True)
  certain_BMV = jnp.where(jnp.arange(log_p_BMV.shape[-1]) == best_BM1, 0.0, -jnp.inf)
  return token_outcomes(tree, certain_BMV, log_q_BNV, tokens_BN)


Rule = Callable[[DraftTree, jax.Array, jax.Array, jax.Array], Outcomes]
RULES: dict[str, Rule] = {"token": token_outcomes, "block": block_outcomes, "greedy": greedy_outcomes}


def check_rule(rule: str, tree: DraftTree) -> None:
  """Raises ValueError for an unknown rule, or one that does not know trees."""
  if rule not in RULES:
    raise ValueError(unknown("rule", rule, RULES))
  if rule == "block" and not tree.is_chain:
    raise ValueError("rule='block' verifies one run of drafts: use rule='token' with a tree of drafts")


def draw(outcomes: Outcomes, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws int32 [B] the last accepted node, and int32 [B] the token after it.

  Args:
    outcomes: of a rule.
    keys_B: random key for each row.
  """
  pairs_B2 = jax.vmap(jax.random.split)(keys_B)
  categorical = jax.vmap(jax.random.categorical)
  nodes_B = categorical(pairs_B2[:, 0], jnp.log(outcomes.stop_BM))
  next_BV = jnp.take_along_axis(outcomes.next_BMV, nodes_B[:, None, None], axis=1)[:, 0]
  return nodes_B.astype(jnp.int32), categorical(pairs_B2[:, 1], jnp.log(next_BV)).astype(jnp.int32)


def tokens_per_call(acceptance: float, draft_length: int) -> float:
  """Returns the mean number of tokens that a call of the target yields, (1 - a^(n+1)) / (1 - a).

  Args:
    acceptance: probability a that a draft is accepted, the same and independent for all.
    draft_length: drafts n a call.

  Source: arXiv:2211.17192.
  """
  return float(sum(acceptance**count for count in range(draft_length + 1)))


def expected_speed_up(acceptance: float, draft_length: int, draft_cost: float) -> float:
  """Returns tokens per call over the cost of one: the target's call and those of the drafter.

  Args:
    acceptance: as for `tokens_per_call`.
    draft_length: drafts a call.
    draft_cost: time of a drafter's call in units of a target's call.
  """
  return tokens_per_call(acceptance, draft_length) / (draft_length * draft_cost + 1)


def _ratio(p_BKV: jax.Array, q_BKV: jax.Array, tokens_BK: jax.Array) -> jax.Array:
  """Returns p(x) / q(x), 0 where q(x) is 0."""
  p_BK = jnp.take_along_axis(p_BKV, tokens_BK[..., None], axis=-1, mode="clip")[..., 0]
  q_BK = jnp.take_along_axis(q_BKV, tokens_BK[..., None], axis=-1, mode="clip")[..., 0]
  return jnp.where(q_BK > 0, p_BK / jnp.where(q_BK > 0, q_BK, 1.0), 0.0)


def _normalised(mass_BKV: jax.Array, otherwise_BKV: jax.Array) -> jax.Array:
  """Returns probabilities in proportion to `mass`, or `otherwise` where there is none (p = q)."""
  total_BK1 = mass_BKV.sum(axis=-1, keepdims=True)
  return jnp.where(total_BK1 > 0, mass_BKV / jnp.where(total_BK1 > 0, total_BK1, 1.0), otherwise_BKV)
