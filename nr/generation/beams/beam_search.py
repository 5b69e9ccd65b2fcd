"""Beam search and its variants in one compiled loop: diverse groups, beam sampling, lexical constraints.

    beams = beam_search(model, prompts_BP, valid_BP, beam_width=4, max_new_tokens=64, stop=Stop(ids_E=[2]))
    best_N = beams.tokens_BKN[0, 0]

Rows are prompt-major, R = B * G * W: beam w of group g of prompt b is row
(b * G + g) * W + w. The chain acts on every beam; its states, the caches and the
histories follow the beams that go on. Without a length penalty and with the stop
rule "never" the search is the canonical one; the other rules and the order of steps
are those of transformers 5.23.0.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.generation import decoding
from nr.generation.beams import beam_selection
from nr.generation.beams.beam_constraints import Lexical
from nr.generation.beams.beam_selection import NORMALIZATIONS, STOP_RULES, Candidates, Ended
from nr.generation.decoding import Law
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.sample import generated_tokens
from nr.generation.stopping import LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import IDENTITY, Chain, Context, Transform
from nr.names import unknown

# Purpose of the draws of beam sampling, apart from the sampler's (0) and the transforms'.
_DRAW = 7_001


class Beams(NamedTuple):
  """The best texts of each prompt, best first; K of them.

  Attributes:
    tokens_BKN: int32 [B, K, max_new_tokens]; the first stop id (0 without one) fills
      what follows the end.
    lengths_BK: int32 tokens, the stop id included; 0 in an empty slot.
    scores_BK: float32, what the texts are ordered by: the sum of log-probabilities
      under the chain's law, less diversity penalties, normalised for length; -inf in
      an empty slot (fewer texts than K exist, or satisfy the constraints).
    log_probs_BK: float32 nats, under the model.
    transformed_log_probs_BK: float32 nats, under the chain's law.
    finish_BK: int32, why each text ended; DEAD_END in an empty slot.
    groups_BK: int32, the group that found it.
    calls: int32 scalar, calls of the model after the prompt was read.
  """

  tokens_BKN: jax.Array
  lengths_BK: jax.Array
  scores_BK: jax.Array
  log_probs_BK: jax.Array
  transformed_log_probs_BK: jax.Array
  finish_BK: jax.Array
  groups_BK: jax.Array
  calls: jax.Array


class _Settings(NamedTuple):
  """What is part of the program."""

  num_groups: int
  width: int
  num_candidates: int
  max_new_tokens: int
  normalization: str
  is_sampling: bool


class _Rules(NamedTuple):
  """What is traced: what drives the rows (R), and parameters of prompts (B)."""

  model: LanguageModel
  law: Chain
  stop: Stop
  constraints: Lexical | None
  length_penalty_B: jax.Array
  diversity_penalty_B: jax.Array
  stop_rule: jax.Array


class _Loop(NamedTuple):
  """Carry of the loop: beams, each the next token's `outputs` and what it is made of.

  Between a step and the next reading, beam r is `last_R[r]` behind beam `parents_R[r]` of the cache.
  """

  step: jax.Array
  cache: Any
  outputs: Outputs
  context: Context
  state: Any
  stop_states_R: jax.Array
  met: Any
  parents_R: jax.Array
  last_R: jax.Array
  sums_R: jax.Array
  log_probs_R: jax.Array
  transformed_R: jax.Array
  ended: Ended
  is_open_BG: jax.Array


class _Chosen(NamedTuple):
  """What one group decided at a step: the W beams that go on; `is_counted_BW`: that exist."""

  parents_BW: jax.Array
  tokens_BW: jax.Array
  sums_BW: jax.Array
  is_counted_BW: jax.Array
  stop_states_BW: jax.Array
  met: Any
  ended: Ended
  is_open_B: jax.Array


def beam_search(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None = None,
  key: jax.Array | None = None,
  *,
  chain: Transform = IDENTITY,
  beam_width: int,
  max_new_tokens: int,
  stop: Stop | None = None,
  length_penalty: jax.Array | float = 0.0,
  normalization: str = "power",
  stop_rule: str = "never",
  num_groups: int = 1,
  diversity_penalty: jax.Array | float = 0.0,
  sampling: bool = False,
  constraints: Lexical | None = None,
  num_return: int | None = None,
  row_ids_B: jax.Array | None = None,
) -> Beams:
  """Keeps the best partial texts of each prompt and returns the best that end.

  Args:
    model: any language model.
    prompts_BP: int32 token ids, padded on the left (`pad_prompts`).
    valid_BP: bool, False at padding; None when there is none.
    key: random key, for `sampling` and for transforms that draw.
    chain: transforms of the logits; per-row parameters are those of prompts. Beams
      are scored by the normalised law after it.
    beam_width: beams of each prompt, over all groups.
    max_new_tokens: most tokens to add; a text of that length has ended.
    stop: what ends a text before that; None: nothing.
    length_penalty: scalar or [B], traced; see `beam_selection.normalised`.
    normalization: "power", "gnmt" or "additive".
    stop_rule: "never", "when_full" or "heuristic"; see `beam_selection.can_improve`.
    num_groups: groups that advance in turn (diverse beam search, arXiv:1610.02424).
    diversity_penalty: scalar or [B]; taken from the score of a token as often as
      earlier groups chose it at this step, and kept in the sum (our choice).
    sampling: draw the continuations without replacement from the softmax of the
      sums, instead of taking the best (beam sampling of transformers 5.23.0).
    constraints: phrases that the text must or must not hold (`lexical`); only texts
      that satisfy them are returned.
    num_return: texts of each prompt; None: `beam_width`.
    row_ids_B: int32 identity of each prompt for its random keys.

  Raises:
    ValueError: what `decoding.check_request` and `Stop.prepared` refuse; a width
      below 1 or that the groups do not divide; an unknown normalization or stop
      rule; parameters of another number of prompts; more texts than beams; sampling
      without a key, or together with constraints.
  """
  _check(beam_width, num_groups, num_return, normalization, stop_rule, sampling, key, constraints)
  extra_tokens = 0 if constraints is None else constraints.lookahead
  law, prompts_BP, valid_BP = decoding.check_request(
    model, chain, prompts_BP, valid_BP, max_new_tokens, beam_width, extra_tokens
  )
  batch = prompts_BP.shape[0]
  stop = (stop or Stop()).prepared(batch, max_new_tokens, model.vocab_size)
  if constraints is not None:
    constraints = constraints.prepared(batch, model.vocab_size)
  penalties = [
    _of_prompts(name, value, batch)
    for name, value in (("length_penalty", length_penalty), ("diversity_penalty", diversity_penalty))
  ]
  width = beam_width // num_groups
  num_stops = 0 if stop.ids_E is None else stop.ids_E.shape[0]
  # With as many as this, W beams go on even where every beam could end with every stop id.
  count = max(2, 1 + num_stops) * width
  if constraints is not None:
    count = max(count, constraints.num_candidates)
  settings = _Settings(
    num_groups=num_groups,
    width=width,
    num_candidates=min(count, width * model.vocab_size),
    max_new_tokens=max_new_tokens,
    normalization=normalization,
    is_sampling=sampling,
  )
  rules = _Rules(model, law, stop, constraints, *penalties, jnp.int32(STOP_RULES.index(stop_rule)))
  beams = _search(settings, rules, prompts_BP, valid_BP, key, row_ids_B)
  return jax.tree.map(lambda leaf: leaf[:, :num_return] if leaf.ndim else leaf, beams)


def _check(beam_width, num_groups, num_return, normalization, stop_rule, sampling, key, constraints) -> None:
  if beam_width < 1:
    raise ValueError(f"beam_width={beam_width}: give at least 1")
  if num_groups < 1 or beam_width % num_groups:
    raise ValueError(f"num_groups={num_groups} does not divide beam_width={beam_width}; make it a divisor")
  if num_return is not None and not 1 <= num_return <= beam_width:
    raise ValueError(f"num_return={num_return}: give 1 to beam_width={beam_width}")
  if normalization not in NORMALIZATIONS:
    raise ValueError(unknown("normalization", normalization, NORMALIZATIONS))
  if stop_rule not in STOP_RULES:
    raise ValueError(unknown("stop_rule", stop_rule, STOP_RULES))
  if sampling and key is None:
    raise ValueError("key: beam sampling draws at random; give a random key, or sampling=False")
  if sampling and constraints is not None:
    raise ValueError("sampling=True with constraints is not supported; leave one of them out")


def _of_prompts(name: str, value: jax.Array | float, batch: int) -> jax.Array:
  value = jnp.asarray(value, jnp.float32)
  if value.shape not in ((), (batch,)):
    raise ValueError(f"{name} has shape {value.shape}: give a number, or one for each of the {batch} prompts")
  return jnp.broadcast_to(value, (batch,))


@functools.partial(jax.jit, static_argnums=0)
def _search(settings: _Settings, rules: _Rules, prompts_BP, valid_BP, key, row_ids_B) -> Beams:
  """The whole search."""
  batch, total = prompts_BP.shape[0], settings.num_groups * settings.width
  rows_R = jnp.repeat(jnp.arange(batch), total)
  begun = decoding.begin(
    rules.model,
    rules.law,
    prompts_BP,
    valid_BP,
    decoding.row_keys(key, row_ids_B, batch, total),
    settings.max_new_tokens,
    num_samples=total,
    extra_tokens=0 if rules.constraints is None else rules.constraints.lookahead,
  )
  is_first_R = jnp.arange(rows_R.shape[0]) % settings.width == 0
  sums_R = jnp.where(is_first_R, 0.0, -jnp.inf)  # the first choice is made from one beam a group
  loop = _Loop(
    step=jnp.int32(0),
    cache=begun.cache,
    outputs=begun.outputs,
    context=begun.context,
    state=begun.state,
    stop_states_R=rules.stop.init(rows_R.shape[0]),
    met=None if rules.constraints is None else rules.constraints.init(rows_R.shape[0]),
    parents_R=jnp.arange(rows_R.shape[0]),
    last_R=jnp.zeros(rows_R.shape, jnp.int32),
    sums_R=sums_R,
    log_probs_R=jnp.zeros(rows_R.shape),
    transformed_R=jnp.zeros(rows_R.shape),
    ended=beam_selection.nothing_ended(
      (settings.num_groups, settings.width), rules.stop.limits_B, settings.max_new_tokens, rules.stop.filler
    ),
    is_open_BG=jnp.broadcast_to(rules.stop.limits_B[:, None] > 0, (batch, settings.num_groups)),
  )
  driving = rules._replace(model=rules.model.take(rows_R), law=rules.law.take(rows_R))

  def is_open(loop: _Loop) -> jax.Array:
    return (loop.step < settings.max_new_tokens) & loop.is_open_BG.any()

  def read(loop: _Loop) -> tuple[Outputs, Any]:
    cache = driving.model.fork(loop.cache, loop.parents_R)
    return driving.model.extend(loop.last_R[:, None], cache, read_B=jnp.zeros_like(loop.last_R))

  def advance(loop: _Loop) -> _Loop:
    loop = _step(settings, driving, loop)
    # Tokens of the last step need not be read; and the step is compiled once, not before the loop too.
    outputs, cache = jax.lax.cond(is_open(loop), read, lambda loop: (loop.outputs, loop.cache), loop)
    return loop._replace(outputs=outputs, cache=cache)

  return _read(settings, jax.lax.while_loop(is_open, advance, loop))


def _step(settings: _Settings, rules: _Rules, loop: _Loop) -> _Loop:
  """Extends every beam by one token and keeps the best of each group."""
  formed = decoding.form_law(rules.law, loop.state, loop.outputs, loop.context)
  # A beam from which nothing can be drawn ends here: it does not fall back to a token.
  law_RV = jnp.where(formed.is_broken_B[:, None], -jnp.inf, formed.transformed_BV)
  batch, vocab_size = rules.length_penalty_B.shape[0], law_RV.shape[1]
  shape = (batch, settings.num_groups, settings.width)
  totals_BGWV = (loop.sums_R[:, None] + law_RV).reshape(*shape, vocab_size)
  counts_BV = jnp.zeros((batch, vocab_size))
  groups = []
  for group in range(settings.num_groups):
    totals_BWV = totals_BGWV[:, group]
    if group > 0:
      totals_BWV = totals_BWV - (rules.diversity_penalty_B[:, None] * counts_BV)[:, None]
    chosen = _choose(settings, rules, loop, formed, totals_BWV, group)
    counts_BV = counts_BV.at[jnp.arange(batch)[:, None], chosen.tokens_BW].add(chosen.is_counted_BW)
    groups.append(chosen)
  joined = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *groups)
  parents_R, tokens_R = joined.parents_BW.reshape(-1), joined.tokens_BW.reshape(-1)
  parent_law = decoding.take(formed, parents_R)
  state, context = decoding.commit(rules.law, decoding.take(loop.state, parents_R), parent_law, tokens_R)
  return loop._replace(
    step=loop.step + 1,
    parents_R=parents_R,
    # Keys stay with the slots: two continuations of one beam must not draw alike.
    context=context._replace(keys_B=loop.context.keys_B),
    state=state,
    stop_states_R=joined.stop_states_BW.reshape(-1),
    met=jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), joined.met),
    last_R=tokens_R,
    sums_R=joined.sums_BW.reshape(-1),
    log_probs_R=loop.log_probs_R[parents_R] + decoding.chosen(parent_law.log_probs_BV, tokens_R),
    transformed_R=loop.transformed_R[parents_R] + decoding.chosen(parent_law.transformed_BV, tokens_R),
    ended=joined.ended,
    is_open_BG=joined.is_open_B,
  )


def _choose(
  settings: _Settings, rules: _Rules, loop: _Loop, formed: Law, totals_BWV: jax.Array, group: int
) -> _Chosen:
  """Decides which continuations of one group go on and which have ended."""
  batch, width, _ = totals_BWV.shape
  first_B1 = (jnp.arange(batch)[:, None] * settings.num_groups + group) * width
  if settings.is_sampling:
    keys_B = formed.context.step_keys(_DRAW)[first_B1[:, 0]]
    candidates = beam_selection.drawn_candidates(totals_BWV, settings.num_candidates, keys_B)
  else:
    candidates = beam_selection.best_candidates(totals_BWV, settings.num_candidates)
  met_before = decoding.take(loop.met, (first_B1 + jnp.arange(width)).reshape(-1))
  if rules.constraints is not None:
    candidates = rules.constraints.with_wanted(candidates, totals_BWV, met_before)
  rows_BM = first_B1 + candidates.parents_BM
  finish_BM, stop_states_BM, ending = _endings(settings, rules, loop, formed, candidates, rows_BM)
  has_ended_BM, met = finish_BM != RUNNING, None
  if rules.constraints is not None:
    reading = (rules.model, loop.cache, rows_BM)
    candidates, met = rules.constraints.ordered(candidates, met_before, has_ended_BM, reading)
  is_open_B = loop.is_open_BG[:, group]
  may_end_BM = has_ended_BM & (candidates.places_BM < width) & is_open_B[:, None]
  scores_BM = beam_selection.normalised(
    candidates.sums_BM, ending.lengths_BW, rules.length_penalty_B[:, None], settings.normalization
  )
  ending = ending._replace(
    scores_BW=jnp.where(may_end_BM & (candidates.sums_BM > -jnp.inf), scores_BM, -jnp.inf)
  )
  ended = beam_selection.merged(jax.tree.map(lambda leaf: leaf[:, group], loop.ended), ending)
  # At the limit, too, tokens are chosen, which later groups avoid; but no beam goes on.
  can_go_on_BM = (finish_BM == RUNNING) | (finish_BM == LENGTH)
  picked_BW, sums_BW = beam_selection.survivors(candidates, can_go_on_BM, width)
  is_counted_BW = (sums_BW > -jnp.inf) & is_open_B[:, None]
  sums_BW = jnp.where(beam_selection.picked(has_ended_BM, picked_BW), -jnp.inf, sums_BW)
  lengths_B = jnp.broadcast_to(loop.step + 1, is_open_B.shape)
  limits = (rules.stop.limits_B, rules.length_penalty_B, settings.normalization, rules.stop_rule)
  is_open_B &= beam_selection.can_improve(sums_BW, ended, lengths_B, *limits)
  rows_BW, tokens_BW, stop_states_BW, met = jax.tree.map(
    lambda leaf: beam_selection.picked(leaf, picked_BW), (rows_BM, candidates.tokens_BM, stop_states_BM, met)
  )
  return _Chosen(rows_BW, tokens_BW, sums_BW, is_counted_BW, stop_states_BW, met, ended, is_open_B)


def _endings(
  settings: _Settings, rules: _Rules, loop: _Loop, formed: Law, candidates: Candidates, rows_BM: jax.Array
) -> tuple[jax.Array, jax.Array, Ended]:
  """Returns why candidates have ended, their stop strings' states, and all of them as if they had."""
  shape, rows, tokens = rows_BM.shape, rows_BM.reshape(-1), candidates.tokens_BM.reshape(-1)
  context = decoding.take(loop.context, rows).append(tokens)
  prompts = jnp.repeat(jnp.arange(shape[0]), shape[1])
  stop = rules.stop.take(prompts)
  finish, stop_states = stop.advance(loop.stop_states_R[rows], tokens, context, jnp.zeros(rows.shape, bool))
  ending = Ended(
    tokens_BWN=generated_tokens(context, settings.max_new_tokens, stop.filler),
    lengths_BW=context.generated_B,
    scores_BW=jnp.zeros(rows.shape),
    log_probs_BW=loop.log_probs_R[rows] + formed.log_probs_BV[rows, tokens],
    transformed_BW=loop.transformed_R[rows] + formed.transformed_BV[rows, tokens],
    finish_BW=finish,
  )
  return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), (finish, stop_states, ending))


def _read(settings: _Settings, loop: _Loop) -> Beams:
  """Returns the best texts over all groups."""
  groups_BGW = jnp.broadcast_to(jnp.arange(settings.num_groups)[:, None], loop.ended.scores_BW.shape)
  flat, groups_BK = jax.tree.map(
    lambda leaf: leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:]), (loop.ended, groups_BGW)
  )
  picked_BK = beam_selection.top_k(flat.scores_BW, flat.scores_BW.shape[1])[1]
  flat, groups_BK = jax.tree.map(lambda leaf: beam_selection.picked(leaf, picked_BK), (flat, groups_BK))
  is_real_BK = flat.scores_BW > -jnp.inf
  return Beams(
    tokens_BKN=flat.tokens_BWN,
    lengths_BK=flat.lengths_BW,
    scores_BK=flat.scores_BW,
    log_probs_BK=jnp.where(is_real_BK, flat.log_probs_BW, -jnp.inf),
    transformed_log_probs_BK=jnp.where(is_real_BK, flat.transformed_BW, -jnp.inf),
    finish_BK=flat.finish_BW,
    groups_BK=groups_BK,
    calls=jnp.maximum(loop.step - 1, 0),
  )
