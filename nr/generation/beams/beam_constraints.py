"""Lexical constraints for beam search: phrases that a text must hold, or must not.

Constraints are clauses, all of which must hold; a clause is a list of literals, one
of which must hold; a literal says that a phrase of tokens occurs in the generated
text, or that it does not.

    cats = lexical([[[[5, 7], [9]], [Without([3])]]])   # one prompt: (5 7 or 9) and not 3
    beam_search(..., constraints=cats)

Three searches share the bookkeeping. NeuroLogic (arXiv:2010.12884) compares only
beams that satisfy the same clauses, and favours phrases that have begun. Grid beam
search (arXiv:1704.07138; `grouping="tokens"`, `is_forced=True`) compares beams that
cover equally many tokens of the phrases, and always tries their next tokens. With
`lookahead`, NeuroLogic A*esque (arXiv:2112.08726) adds how probable the phrases
become if the text goes on greedily. The papers' own settings were not re-read:
what is called a default here is our choice.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.beams.beam_selection import Candidates, picked
from nr.names import unknown

GROUPINGS = ("clauses", "tokens")
MOST_CLAUSES = 30  # a set of satisfied clauses is one int32


class Without(NamedTuple):
  """The literal that a phrase does not occur."""

  phrase: Sequence[int]


class Met(NamedTuple):
  """What a beam has met of its constraints.

  Attributes:
    recent_RL: int32, its last L generated tokens, -1 before the first.
    has_seen_RP: bool, which phrases have occurred.
  """

  recent_RL: jax.Array
  has_seen_RP: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Lexical:
  """Clauses of each prompt. Made by `lexical`.

  Attributes:
    phrases_BPL: int32 token ids, -1 behind the end of a phrase.
    is_wanted_BCP: bool, clause C holds when phrase P occurs.
    is_unwanted_BCP: bool, clause C holds as long as phrase P does not.
    progress_weight: nats added in comparisons for a phrase that is almost complete;
      in proportion for one that has begun. Not part of the score.
    lookahead_weight: factor of the lookahead's log-probability in comparisons.
    tiers: candidates that satisfy fewer clauses than the best `tiers` numbers among
      them are dropped; None: none is.
    grouping: "clauses" or "tokens": what beams must have in common to be compared.
    is_forced: whether the next token of every phrase is a candidate however improbable.
    lookahead: tokens that each candidate is continued greedily; 0: none.
    num_candidates: continuations considered for each prompt, at least twice the beams.
  """

  phrases_BPL: jax.Array
  is_wanted_BCP: jax.Array
  is_unwanted_BCP: jax.Array
  progress_weight: jax.Array
  lookahead_weight: jax.Array
  tiers: jax.Array | None = None
  grouping: str = dataclasses.field(default="clauses", metadata=dict(static=True))
  is_forced: bool = dataclasses.field(default=False, metadata=dict(static=True))
  lookahead: int = dataclasses.field(default=0, metadata=dict(static=True))
  num_candidates: int = dataclasses.field(default=0, metadata=dict(static=True))

  def prepared(self, batch: int, vocab_size: int) -> "Lexical":
    """Checks it against a request; constraints of one prompt serve all.

    Raises:
      ValueError: constraints for another number of prompts, or an id outside the vocabulary.
    """
    if self.phrases_BPL.shape[0] not in (1, batch):
      raise ValueError(
        f"constraints are for {self.phrases_BPL.shape[0]} prompts: give them for 1 or for all {batch}"
      )
    if int(self.phrases_BPL.max()) >= vocab_size:
      raise ValueError(
        f"constraints hold the token id {int(self.phrases_BPL.max())}; the vocabulary has {vocab_size}"
      )
    arrays = (self.phrases_BPL, self.is_wanted_BCP, self.is_unwanted_BCP)
    spread = [jnp.broadcast_to(array, (batch, *array.shape[1:])) for array in arrays]
    return self._with(*spread)

  def of_rows(self, num_rows: int) -> "Lexical":
    """Returns the constraints of `num_rows` rows, equally many for each prompt."""
    repeats = num_rows // self.phrases_BPL.shape[0]
    arrays = (self.phrases_BPL, self.is_wanted_BCP, self.is_unwanted_BCP)
    return self._with(*(jnp.repeat(array, repeats, axis=0) for array in arrays))

  def _with(self, phrases_BPL, is_wanted_BCP, is_unwanted_BCP) -> "Lexical":
    return dataclasses.replace(
      self, phrases_BPL=phrases_BPL, is_wanted_BCP=is_wanted_BCP, is_unwanted_BCP=is_unwanted_BCP
    )

  @property
  def lengths_BP(self) -> jax.Array:
    """Number of tokens of each phrase."""
    return (self.phrases_BPL >= 0).sum(axis=-1)

  def init(self, num_rows: int) -> Met:
    """Returns what rows have met before the first token."""
    _, phrases, longest = self.phrases_BPL.shape
    return Met(jnp.full((num_rows, longest), -1, jnp.int32), jnp.zeros((num_rows, phrases), bool))

  def advance(self, met: Met, tokens_B: jax.Array) -> Met:
    """Returns what rows have met after one more token; rows as those of the constraints."""
    recent_BL = jnp.concatenate([met.recent_RL[:, 1:], tokens_B[:, None].astype(jnp.int32)], axis=1)
    met = met._replace(recent_RL=recent_BL)
    is_complete_BP = (self.matched(met) == self.lengths_BP) & (self.lengths_BP > 0)
    return met._replace(has_seen_RP=met.has_seen_RP | is_complete_BP)

  def matched(self, met: Met) -> jax.Array:
    """Returns int32 [B, P]: the longest beginning of each phrase that the text ends with."""
    longest = self.phrases_BPL.shape[2]
    matched_BP = jnp.zeros(self.phrases_BPL.shape[:2], jnp.int32)
    for size in range(1, longest + 1):
      tail_B1L = met.recent_RL[:, None, longest - size :]
      is_match_BP = (self.phrases_BPL[:, :, :size] == tail_B1L).all(axis=-1) & (tail_B1L >= 0).all(axis=-1)
      matched_BP = jnp.where(is_match_BP, size, matched_BP)
    return matched_BP

  def satisfied(self, met: Met) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns three bool [B, C]: clauses that hold, that always will, that never can."""
    has_seen_B1P = met.has_seen_RP[:, None]
    is_settled_BC = (self.is_wanted_BCP & has_seen_B1P).any(axis=-1)
    is_empty_BC = ~(self.is_wanted_BCP | self.is_unwanted_BCP).any(axis=-1)
    holds_BC = is_settled_BC | is_empty_BC | (self.is_unwanted_BCP & ~has_seen_B1P).any(axis=-1)
    return holds_BC, is_settled_BC | is_empty_BC, ~holds_BC & ~self.is_wanted_BCP.any(axis=-1)

  def open_phrases(self, met: Met) -> jax.Array:
    """Returns bool [B, P]: wanted phrases of clauses that do not hold yet."""
    holds_BC, _, _ = self.satisfied(met)
    return (self.is_wanted_BCP & ~holds_BC[..., None]).any(axis=1)

  def next_tokens(self, met: Met) -> jax.Array:
    """Returns int32 [B, P]: the token that each open phrase goes on with; -1 for the others."""
    place_BP = jnp.minimum(self.matched(met), self.phrases_BPL.shape[2] - 1)
    tokens_BP = jnp.take_along_axis(self.phrases_BPL, place_BP[..., None], axis=2)[..., 0]
    return jnp.where(self.open_phrases(met), tokens_BP, -1)

  def groups(self, met: Met) -> jax.Array:
    """Returns int32 [B]; rows with the same number are compared."""
    _, is_settled_BC, _ = self.satisfied(met)
    if self.grouping == "clauses":
      return (is_settled_BC * 2 ** jnp.arange(is_settled_BC.shape[1])).sum(axis=1)
    covered_BP = jnp.where(met.has_seen_RP, self.lengths_BP, self.matched(met))
    return jnp.where(self.is_wanted_BCP, covered_BP[:, None], 0).max(axis=2).sum(axis=1)

  def progress(self, met: Met) -> jax.Array:
    """Returns float32 [B] in [0, 1): the largest part of an open phrase that the text ends with."""
    part_BP = self.matched(met) / jnp.maximum(self.lengths_BP, 1)
    return jnp.where(self.open_phrases(met), part_BP, 0.0).max(axis=1)

  def with_wanted(self, candidates: Candidates, totals_BWV: jax.Array, met: Met) -> Candidates:
    """Adds the next token of every open phrase after every beam, if forced."""
    if not self.is_forced:
      return candidates
    batch, width, _ = totals_BWV.shape
    tokens_BWP = self.of_rows(batch * width).next_tokens(met).reshape(batch, width, -1)
    is_repeated_BWP = (tokens_BWP[..., None, :] == tokens_BWP[..., None]) & jnp.tri(
      tokens_BWP.shape[2], k=-1, dtype=bool
    )
    sums_BWP = jnp.take_along_axis(totals_BWV, jnp.maximum(tokens_BWP, 0), axis=2)
    sums_BWP = jnp.where((tokens_BWP < 0) | is_repeated_BWP.any(axis=-1), -jnp.inf, sums_BWP)
    parents_BWP = jnp.broadcast_to(jnp.arange(width)[:, None], tokens_BWP.shape)
    sums_BX, parents_BX, tokens_BX = (leaf.reshape(batch, -1) for leaf in (sums_BWP, parents_BWP, tokens_BWP))
    is_same_BXM = (parents_BX[..., None] == candidates.parents_BM[:, None]) & (
      tokens_BX[..., None] == candidates.tokens_BM[:, None]
    )
    sums_BX = jnp.where(is_same_BXM.any(axis=-1), -jnp.inf, sums_BX)
    places_BX = jnp.broadcast_to(candidates.places_BM.shape[1] + jnp.arange(sums_BX.shape[1]), sums_BX.shape)
    more = Candidates(sums_BX, parents_BX, jnp.maximum(tokens_BX, 0), places_BX, sums_BX)
    return jax.tree.map(lambda one, other: jnp.concatenate([one, other], axis=1), candidates, more)

  def ordered(
    self, candidates: Candidates, met: Met, has_ended_BM: jax.Array, reading: tuple[Any, Any, jax.Array]
  ) -> tuple[Candidates, Met]:
    """Orders candidates: the best of every group, then the second of every group, and so on.

    Candidates that can no longer satisfy the constraints, or have ended without, are
    dropped. Only beams take turns.

    Args:
      candidates: of one group of beams.
      met: of the beams, W rows a prompt.
      has_ended_BM: which candidates are whole texts.
      reading: the model of all rows, its cache, and the row that each candidate
        continues, for the lookahead.

    Returns:
      The candidates, and what they have met (leaves lead with [B, M]).
    """
    batch, count = candidates.sums_BM.shape
    its = self.of_rows(batch * count)
    width = met.recent_RL.shape[0] // batch
    parents = (jnp.arange(batch)[:, None] * width + candidates.parents_BM).reshape(-1)
    met = its.advance(decoding.take(met, parents), candidates.tokens_BM.reshape(-1))
    holds, _, is_lost = (leaf.reshape(batch, count, -1) for leaf in its.satisfied(met))
    is_dropped_BM = is_lost.any(axis=-1) | (has_ended_BM & ~holds.all(axis=-1))
    sums_BM = jnp.where(is_dropped_BM, -jnp.inf, candidates.sums_BM)
    if self.tiers is not None:
      sums_BM = jnp.where(_tier(holds.sum(axis=-1), sums_BM) < self.tiers, sums_BM, -jnp.inf)
    keys_BM = sums_BM + self.progress_weight * its.progress(met).reshape(batch, count)
    if self.lookahead:
      ahead = look_ahead(reading[0], reading[1], reading[2].reshape(-1), its, met, candidates.tokens_BM)
      keys_BM = keys_BM + self.lookahead_weight * ahead.reshape(batch, count)
    order_BM = _by_turns(keys_BM, its.groups(met).reshape(batch, count))
    candidates = candidates._replace(sums_BM=sums_BM)
    met = jax.tree.map(lambda leaf: leaf.reshape(batch, count, *leaf.shape[1:]), met)
    # The candidates stay where they are, since others are aligned with them. Beams go on by turns;
    # whole texts compete with each other only, so that no group crowds them out.
    ranks_BM = -jnp.argsort(order_BM, axis=1).astype(jnp.float32)
    whole_BM = jnp.argsort(jnp.where(has_ended_BM, -sums_BM, jnp.inf), axis=1, stable=True)
    return candidates._replace(places_BM=jnp.argsort(whole_BM, axis=1), ranks_BM=ranks_BM), met


def _tier(satisfied_BM: jax.Array, sums_BM: jax.Array) -> jax.Array:
  """Returns int32 [B, M]: how many different larger numbers there are among candidates that exist."""
  numbers = jnp.arange(MOST_CLAUSES + 1)
  is_there_BN = ((satisfied_BM[..., None] == numbers) & (sums_BM > -jnp.inf)[..., None]).any(axis=1)
  return ((numbers > satisfied_BM[..., None]) & is_there_BN[:, None]).sum(axis=-1)


def _by_turns(keys_BM: jax.Array, groups_BM: jax.Array) -> jax.Array:
  """Returns int32 [B, M], the order by rank within the group, then by key; what has a key of -inf comes last."""
  order_BM = jnp.argsort(-keys_BM, axis=1, stable=True)
  keys_BM, groups_BM = picked(keys_BM, order_BM), picked(groups_BM, order_BM)
  is_ahead_BMM = (groups_BM[:, :, None] == groups_BM[:, None]) & jnp.tri(keys_BM.shape[1], k=-1, dtype=bool)
  turn_BM = jnp.where(keys_BM > -jnp.inf, is_ahead_BMM.sum(axis=-1), keys_BM.shape[1])
  return picked(order_BM, jnp.argsort(turn_BM, axis=1, stable=True))


def look_ahead(
  model: Any, cache: Any, rows_X: jax.Array, constraints: Lexical, met: Met, tokens_BM: jax.Array
) -> jax.Array:
  """Returns float32 [X] nats: the largest log-probability of an open phrase's next token on the greedy path.

  One forward a token and candidate: of a phrase that has not begun, the first token
  stands for the whole (our choice). 0 for candidates without an open phrase.

  Args:
    model: of the beams' rows.
    cache: of the beams, before the candidates' tokens.
    rows_X: int32, the beam that each candidate continues.
    constraints: of the candidates' rows.
    met: of the candidates.
    tokens_BM: int32, X tokens.
  """
  open_XP = constraints.open_phrases(met)

  def read(carry, _):
    cache, tokens_X, met, best_X = carry
    outputs, cache = its_model.extend(tokens_X[:, None], cache, read_B=jnp.zeros_like(tokens_X))
    log_probs_XV = jax.nn.log_softmax(outputs.logits.astype(jnp.float32), axis=-1)
    wanted_XP = constraints.next_tokens(met)
    values_XP = jnp.take_along_axis(log_probs_XV, jnp.maximum(wanted_XP, 0), axis=1)
    best_X = jnp.maximum(best_X, jnp.where(open_XP & (wanted_XP >= 0), values_XP, -jnp.inf).max(axis=1))
    tokens_X = jnp.argmax(log_probs_XV, axis=1).astype(jnp.int32)
    return (cache, tokens_X, constraints.advance(met, tokens_X), best_X), None

  its_model, tokens_X = model.take(rows_X), tokens_BM.reshape(-1).astype(jnp.int32)
  start = (model.fork(cache, rows_X), tokens_X, met, jnp.full(rows_X.shape, -jnp.inf))
  (_, _, _, best_X), _ = jax.lax.scan(read, start, length=constraints.lookahead)
  return jnp.where(open_XP.any(axis=1), best_X, 0.0)


def lexical(
  clauses: Sequence[Sequence[Sequence[Any]]],
  *,
  progress_weight: float = 0.1,
  lookahead: int = 0,
  lookahead_weight: float = 1.0,
  tiers: int | None = None,
  grouping: str = "clauses",
  is_forced: bool = False,
  num_candidates: int = 0,
) -> Lexical:
  """Makes constraints from token ids.

  Args:
    clauses: for each prompt (or one list that serves all), clauses that must all
      hold; each a list of literals: a phrase (token ids) or `Without(phrase)`.
    progress_weight: see `Lexical`, as for the rest.
    lookahead: tokens.
    lookahead_weight: factor.
    tiers: at least 1, or None.
    grouping: "clauses" or "tokens".
    is_forced: bool.
    num_candidates: continuations considered.

  Raises:
    ValueError: no clause, an empty clause or phrase, more than 30 clauses, an unknown
      grouping, a negative lookahead, tiers below 1, or an ambiguous literal.
  """
  if grouping not in GROUPINGS:
    raise ValueError(unknown("grouping", grouping, GROUPINGS))
  if lookahead < 0 or (tiers is not None and tiers < 1):
    raise ValueError(f"lookahead={lookahead}, tiers={tiers}: give at least 0 and at least 1 (None: off)")
  if len(clauses) == 0 or any(len(its) == 0 for its in clauses):
    raise ValueError("clauses: give each prompt at least one clause")
  most = max(len(its) for its in clauses)
  if most > MOST_CLAUSES:
    raise ValueError(f"clauses: a prompt has {most}, at most {MOST_CLAUSES} are possible; join some phrases")
  literals = [
    [(c, literal) for c, clause in enumerate(its) for literal in _checked(clause)] for its in clauses
  ]
  num_phrases = max(map(len, literals))
  longest = max(len(_phrase(literal)) for its in literals for _, literal in its)
  phrases = np.full((len(clauses), num_phrases, longest), -1, np.int32)
  wanted = np.zeros((2, len(clauses), most, num_phrases), bool)
  for b, its in enumerate(literals):
    for p, (c, literal) in enumerate(its):
      phrases[b, p, : len(_phrase(literal))] = _phrase(literal)
      wanted[int(isinstance(literal, Without)), b, c, p] = True
  return Lexical(
    jnp.asarray(phrases),
    jnp.asarray(wanted[0]),
    jnp.asarray(wanted[1]),
    progress_weight=jnp.float32(progress_weight),
    lookahead_weight=jnp.float32(lookahead_weight),
    tiers=None if tiers is None else jnp.int32(tiers),
    grouping=grouping,
    is_forced=is_forced,
    lookahead=lookahead,
    num_candidates=num_candidates,
  )


def _phrase(literal: Any) -> Sequence[int]:
  return literal.phrase if isinstance(literal, Without) else literal


def _checked(clause: Sequence[Any]) -> Sequence[Any]:
  """Returns the clause, if its literals are phrases of token ids."""
  for literal in clause:
    phrase = _phrase(literal)
    if (
      not isinstance(phrase, Sequence)
      or len(phrase) == 0
      or any(np.ndim(token) or token < 0 for token in phrase)
    ):
      raise ValueError(f"clauses: {literal!r} is no phrase; give a list of token ids, or Without of one")
  if len(clause) == 0:
    raise ValueError("clauses: a clause is empty and could never hold; give it a phrase")
  return clause
