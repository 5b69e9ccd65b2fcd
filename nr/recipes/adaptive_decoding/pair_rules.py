"""Which two of N scored responses make a pair (arXiv 2411.09661 section 3.3 and appendix A)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nr.names import unknown


class Scores(NamedTuple):
  """Scores of the N responses to one prompt; larger is better.

  Attributes:
    reward_N: what decides: a reward, correctness (0 or 1), the share of constraints that hold.
    quality_N: what decides next, for the rules that look at two scores.
  """

  reward_N: np.ndarray
  quality_N: np.ndarray


Pair = tuple[int, int] | None
Rule = Callable[[Scores, np.random.Generator, int], Pair]


def _one_of(is_candidate_N: np.ndarray, random: np.random.Generator) -> int:
  """Returns one of the candidates, all equally likely."""
  return int(random.choice(np.flatnonzero(is_candidate_N)))


def extremes(scores: Scores, random: np.random.Generator, top: int) -> Pair:
  """Best against worst reward (A.3, A.4). Ties broken at random, no pair where all are equal: our choice."""
  del top
  best, worst = scores.reward_N.max(), scores.reward_N.min()
  if best == worst:
    return None
  return _one_of(scores.reward_N == best, random), _one_of(scores.reward_N == worst, random)


def correctness(scores: Scores, random: np.random.Generator, top: int) -> Pair:
  """A correct response against a wrong one (A.2).

  Which ones is drawn at random, and there is no pair where all are right or all wrong: our choice, the paper
  does not say.

  Raises:
    ValueError: a reward that is neither 0 nor 1.
  """
  if not np.isin(scores.reward_N, (0, 1)).all():
    raise ValueError(
      f"pair_rule='correctness': reward {scores.reward_N[~np.isin(scores.reward_N, (0, 1))][0]} is neither 0 "
      "nor 1; use 'extremes'"
    )
  return extremes(scores, random, top)


def random_pair(scores: Scores, random: np.random.Generator, top: int) -> Pair:
  """Two responses drawn at random, the better one chosen; no pair where they tie.

  Extremes of N reward variance: at a temperature with a worse mean and a longer tail they find more
  winners. This rule does not.
  """
  del top
  first, second = random.choice(len(scores.reward_N), 2, replace=False)
  difference = scores.reward_N[first] - scores.reward_N[second]
  if difference == 0:
    return None
  return (int(first), int(second)) if difference > 0 else (int(second), int(first))


def constraint(scores: Scores, random: np.random.Generator, top: int) -> Pair:
  """Of the `top` best in quality the one with the best reward, of the `top` worst that with the worst (A.5).

  Ties are broken at random; no pair where the two have the same reward and quality: our choice.
  """
  # Shuffled before the stable sort, so that ties of quality are broken at random too.
  order_N = random.permutation(len(scores.quality_N))
  order_N = order_N[np.argsort(scores.quality_N[order_N], kind="stable")]

  def pick(members: np.ndarray, sign: int) -> int:
    reward = sign * scores.reward_N[members]
    return int(random.choice(members[reward == reward.max()]))

  chosen, rejected = pick(order_N[-top:], 1), pick(order_N[:top], -1)
  is_same = all(values[chosen] == values[rejected] for values in scores)
  return None if is_same else (chosen, rejected)


RULES: dict[str, Rule] = {
  "extremes": extremes,
  "correctness": correctness,
  "random_pair": random_pair,
  "constraint": constraint,
}
"""A rule by name. For n-gram repetition (A.1) the reward is minus `ngram_repeats`, with "extremes"."""


def make_pair(rule: str, scores: Scores, random: np.random.Generator, top: int = 4) -> Pair:
  """Returns the indices (chosen, rejected), or None where the rule finds no pair.

  Args:
    rule: a name of `RULES`.
    scores: of one prompt's responses.
    random: breaks ties.
    top: of "constraint".

  Raises:
    ValueError: an unknown rule, fewer than two responses, or `top` outside 1..N/2.
  """
  if rule not in RULES:
    raise ValueError(unknown("pair_rule", rule, RULES))
  count = len(scores.reward_N)
  if count < 2:
    raise ValueError(f"num_samples={count}: a pair needs at least 2 responses")
  if rule == "constraint" and not 1 <= top <= count // 2:
    raise ValueError(f"pair_top={top}: give 1 to half of the {count} responses")
  return RULES[rule](scores, random, top)


def ngram_repeats(tokens: Sequence[int], n: int = 3) -> float:
  """Share of n-grams that are repeats: 1 - distinct / all; 0 where there is none.

  The paper does not define it; this is our reading.

  >>> ngram_repeats([1, 2, 3, 1, 2, 3, 1])
  0.4
  """
  grams = [tuple(tokens[place : place + n]) for place in range(len(tokens) - n + 1)]
  return 1 - len(set(grams)) / len(grams) if grams else 0.0
