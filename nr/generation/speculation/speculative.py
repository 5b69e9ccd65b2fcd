"""Speculative decoding: several tokens from one call of the model, with its law unchanged.

A drafter proposes a chain or a tree of tokens, one call of the target reads them all,
and a rule accepts some and adds one token of the target's own. The target's law is
the one after the whole chain of transforms: its state is advanced along the draft,
so that penalties, masks and other histories are those of sequential decoding.

    generation = speculative(model, ModelDrafter(small), prompts_BP, valid_BP, key,
                             chain=chain(Temperature(0.7)), max_new_tokens=64, draft_length=4)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.sample import generated_tokens
from nr.generation.speculation.draft_trees import DraftLaws, DraftTree, draft_laws
from nr.generation.speculation.drafters import Drafter, Emission, Proposal, Request
from nr.generation.speculation.verification import RULES, Outcomes, Rule, check_rule, draw
from nr.generation.stopping import LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import IDENTITY, Chain, Context, Transform

# Positions are visited again after a rejection, so keys are those of a row's round, not of its
# position, and lie where no position's keys do.
ROUNDS = 2**31


class SpeculativeGeneration(NamedTuple):
  """What prompts were continued with; rows R = B * num_samples, prompt-major.

  Attributes:
    tokens_RN: int32 [R, max_new_tokens]; the first stop id (0 without one) fills
      what follows the end.
    lengths_R: int32, new tokens of each row, the stop id included.
    log_probs_RN: float32 nats, of each token under the model; 0 after the end.
    transformed_log_probs_RN: float32 nats, of each token under the law after the
      chain; 0 after the end.
    finish_R: int32, why each row ended; see `nr.generation.stopping`.
    calls: int32 scalar, calls of the target after the prompt was read.
    row_calls_R: int32, calls that a row took part in.
    drafted_R: int32, drafts within the row's limit.
    tested_R: int32, tokens of the text for which there was a draft, accepted or not.
    accepted_R: int32, drafts in the text.
  """

  tokens_RN: jax.Array
  lengths_R: jax.Array
  log_probs_RN: jax.Array
  transformed_log_probs_RN: jax.Array
  finish_R: jax.Array
  calls: jax.Array
  row_calls_R: jax.Array
  drafted_R: jax.Array
  tested_R: jax.Array
  accepted_R: jax.Array

  @property
  def acceptance(self) -> jax.Array:
    """Share of tokens with a draft that are the draft, over all rows; NaN without drafts."""
    return self.accepted_R.sum() / self.tested_R.sum()


class _Counts(NamedTuple):
  """Per row: rounds, drafts, tested ones, accepted ones."""

  row_calls_R: jax.Array
  drafted_R: jax.Array
  tested_R: jax.Array
  accepted_R: jax.Array


class _Text(NamedTuple):
  """What is known of each row; changes token by token."""

  context: Context
  state: Any
  stop_states_R: jax.Array
  finish_R: jax.Array
  log_probs_RN: jax.Array
  transformed_RN: jax.Array


class _Loop(NamedTuple):
  """Carry of the loop. The last token of each row is in no cache, but before the first round."""

  calls: jax.Array
  cache: Any
  drafter: Any
  last_R: jax.Array
  text: _Text
  counts: _Counts


def speculative(
  model: LanguageModel,
  drafter: Drafter,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None = None,
  key: jax.Array | None = None,
  *,
  chain: Transform = IDENTITY,
  max_new_tokens: int,
  draft_length: int | None = None,
  rule: str | None = None,
  num_samples: int = 1,
  stop: Stop | None = None,
  row_ids_B: jax.Array | None = None,
  fingerprints: tuple[str, str] | None = None,
) -> SpeculativeGeneration:
  """Continues prompts as `sample` does, with fewer calls of the model.

  Args:
    model: the target; any language model, streams and interventions included.
    drafter: see `nr.generation.speculation.drafters`.
    prompts_BP: int32 token ids, padded on the left (`pad_prompts`).
    valid_BP: bool, False at padding; None when there is none.
    key: random key; None only for the greedy rule.
    chain: transforms of the target's logits; per-row parameters are those of prompts.
    max_new_tokens: most tokens to add; static.
    draft_length: drafts a call, 0 for none; static. None: the drafter's choice.
    rule: "token", "block" or "greedy" (`nr.generation.speculation.verification`). None: "token"
      with a key, else "greedy".
    num_samples: samples of each prompt, from one reading of it; static.
    stop: what ends a row, exactly where sampling would; None: nothing.
    row_ids_B: int32 identity of each prompt for its random keys; 0..B-1 when None.
    fingerprints: of the target's and the drafter's tokenizers, to be compared.

  Raises:
    ValueError: what `decoding.check_request` and `Stop.prepared` refuse, an unknown
      rule, a random one without a key, a negative draft length, or a drafter with
      another vocabulary or tokenizer.
  """
  law, prompts_BP, valid_BP = decoding.check_request(
    model, chain, prompts_BP, valid_BP, max_new_tokens, num_samples
  )
  if draft_length is not None and draft_length < 0:
    raise ValueError(f"draft_length={draft_length}: give a number of tokens, 0 for no drafts")
  tree = drafter.tree(draft_length)
  rule = ("greedy" if key is None else "token") if rule is None else rule
  check_rule(rule, tree)
  model.check_drafts(len(tree.parents))
  if key is None and rule != "greedy":
    raise ValueError(f"key: rule={rule!r} draws at random; give a random key, or rule='greedy'")
  _check_tokenizers(model, drafter, fingerprints)
  drafter = drafter.prepared(model, Request(law, prompts_BP, valid_BP, max_new_tokens, rule == "greedy"))
  batch = prompts_BP.shape[0]
  stop = (stop or Stop()).prepared(batch, max_new_tokens, model.vocab_size)
  keys_R = decoding.row_keys(key, row_ids_B, batch, num_samples)
  sizes = dict(tree=tree, rule=rule, max_new_tokens=max_new_tokens, num_samples=num_samples)
  return _run(model, drafter, law, stop, prompts_BP, valid_BP, keys_R, **sizes)


def _check_tokenizers(model: LanguageModel, drafter: Drafter, fingerprints: tuple[str, str] | None) -> None:
  if drafter.vocab_size not in (None, model.vocab_size):
    raise ValueError(
      f"drafter: its vocabulary has {drafter.vocab_size} tokens, the target's {model.vocab_size}; "
      "drafts must come from a model with the target's tokenizer"
    )
  if fingerprints is not None and fingerprints[0] != fingerprints[1]:
    raise ValueError(
      f"fingerprints={tuple(fingerprints)}: target and drafter have different tokenizers; give a drafter "
      "that was trained with the target's"
    )


@functools.partial(jax.jit, static_argnames=("tree", "rule", "max_new_tokens", "num_samples"))
def _run(
  model, drafter, law, stop, prompts_BP, valid_BP, keys_R, *, tree, rule, max_new_tokens, num_samples
) -> SpeculativeGeneration:
  sizes = (prompts_BP, valid_BP, keys_R, max_new_tokens)
  settings = dict(num_samples=num_samples, uneven=True, extra_tokens=tree.room)
  begun = decoding.begin(model, law, *sizes, **settings)
  drafting = drafter.init(*sizes, num_samples, tree) if tree.size else ()
  rows_R = jnp.repeat(jnp.arange(prompts_BP.shape[0]), num_samples)
  model, drafter, law, stop = (each.take(rows_R) for each in (model, drafter, law, stop))
  zeros_R, empty_RN = jnp.zeros(rows_R.shape, jnp.int32), jnp.zeros((rows_R.shape[0], max_new_tokens))
  finish_R = jnp.where(stop.limits_B > 0, RUNNING, LENGTH).astype(jnp.int32)
  stop_states_R = stop.init(rows_R.shape[0])
  text = _Text(begun.context, begun.state, stop_states_R, finish_R, empty_RN, empty_RN)
  start = _Loop(jnp.int32(0), begun.cache, drafting, zeros_R, text, _Counts(*[zeros_R] * 4))

  def is_open(loop: _Loop) -> jax.Array:
    return (loop.text.finish_R == RUNNING).any()

  def advance(loop: _Loop) -> _Loop:
    return _round(model, drafter, law, stop, tree, rule, begun.outputs, loop)

  loop = jax.lax.while_loop(is_open, advance, start)
  text = loop.text
  return SpeculativeGeneration(
    generated_tokens(text.context, max_new_tokens, stop.filler),
    text.context.generated_B,
    text.log_probs_RN,
    text.transformed_RN,
    text.finish_R,
    loop.calls,
    *loop.counts,
  )


def _round(
  model: LanguageModel,
  drafter: Drafter,
  law: Chain,
  stop: Stop,
  tree: DraftTree,
  rule: str,
  prompt_outputs: Outputs,
  loop: _Loop,
) -> _Loop:
  """Drafts, reads, accepts, and adds to every row that has not ended."""
  text, is_first = loop.text, loop.calls == 0
  fold = jax.vmap(jax.random.fold_in, (0, None))
  round_keys_R = fold(fold(text.context.keys_B, ROUNDS), loop.calls)
  proposal, drafting = _propose(drafter, loop, tree, fold(round_keys_R, 0), model.vocab_size)
  remaining_R = jnp.where(text.finish_R == RUNNING, stop.limits_B - text.context.generated_B, 0)
  is_drafted_RN = proposal.is_drafted_BN & (tree.depths[1:] <= remaining_R[:, None])
  proposal = proposal._replace(is_drafted_BN=is_drafted_RN)
  pieces = (loop.last_R, proposal.tokens_BN, loop.cache, is_first, prompt_outputs)
  outputs, cache = read_drafts(model, tree, *pieces)
  outcomes, laws = verify(law, text.state, text.context, tree, RULES[rule], outputs, proposal)
  node_R, next_R = draw(outcomes, fold(round_keys_R, 1))
  path_RA = jnp.asarray(tree.paths)[node_R]
  accepted_R = jnp.asarray(tree.depths)[node_R]
  tokens_RA, is_chosen_RA = _run_of_tokens(proposal.tokens_BN, path_RA, accepted_R, next_R)
  seen = (outputs, laws)
  if not tree.is_chain:
    gather = jax.vmap(lambda leaf, path: leaf[path])
    seen = jax.tree.map(lambda leaf: gather(leaf, path_RA), seen)
  following, is_kept_RA = _emit(law, stop, text, tokens_RA, is_chosen_RA, *seen)
  lengths_R = is_kept_RA.sum(axis=1, dtype=jnp.int32)
  emission = Emission(
    text.context, tokens_RA, is_kept_RA, accepted_R, seen[1].log_probs_BMV, seen[1].transformed_BMV
  )
  if tree.size:
    drafting = drafter.advance(drafting, emission, tree)
  last_R = jnp.take_along_axis(tokens_RA, jnp.maximum(lengths_R - 1, 0)[:, None], axis=1)[:, 0]
  cache = _keep(model, tree, cache, path_RA, lengths_R, is_first)
  counts = _count(loop.counts, tree, is_drafted_RN, is_kept_RA, accepted_R, path_RA)
  return _Loop(loop.calls + 1, cache, drafting, last_R, following, counts)


def _propose(
  drafter: Drafter, loop: _Loop, tree: DraftTree, keys_R: jax.Array, vocab_size: int
) -> tuple[Proposal, Any]:
  rows = keys_R.shape[0]
  if not tree.size:
    nothing = Proposal(
      jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows, 0, vocab_size)), jnp.ones((rows, 0), bool)
    )
    return nothing, ()
  proposal, drafting = drafter.propose(loop.drafter, loop.text.context, keys_R, tree, vocab_size)
  # A copied prompt may hold ids that no law gives, such as a beginning of text.
  is_known_RN = (proposal.tokens_BN >= 0) & (proposal.tokens_BN < vocab_size)
  tokens_RN = jnp.where(is_known_RN, proposal.tokens_BN, 0)
  return Proposal(tokens_RN, proposal.log_q_BNV, proposal.is_drafted_BN & is_known_RN), drafting


def read_drafts(
  model: LanguageModel,
  tree: DraftTree,
  last_B: jax.Array,
  tokens_BN: jax.Array,
  cache: Any,
  is_first: jax.Array | bool,
  prompt_outputs: Outputs,
) -> tuple[Outputs, Any]:
  """Reads the last token of each row and the drafts behind it, in one call.

  Args:
    model: the target.
    tree: shape of the drafts.
    last_B: int32, the last token, which is in no cache yet.
    tokens_BN: int32 drafts.
    cache: uneven.
    is_first: whether the last token is that of the prompt, which has been read: then
      only the drafts are, and a token of no account behind them.
    prompt_outputs: [B, ...] at the last prompt token.

  Returns:
    Outputs [B, M, ...] after each node, and the cache with M more tokens.
  """
  first_BM = jnp.concatenate([tokens_BN, last_B[:, None]], axis=1)
  tokens_BM = jnp.where(is_first, first_BM, jnp.concatenate([last_B[:, None], tokens_BN], axis=1))
  visible_BMM = None
  if not tree.is_chain:
    first_MM = np.pad(tree.visible[1:, 1:], (0, 1)) | np.eye(tree.size + 1, dtype=bool)
    visible_BMM = jnp.where(is_first, first_MM, tree.visible)[None]
  outputs, cache = model.extend(tokens_BM, cache, visible_BLL=visible_BMM)

  def place(leaf: jax.Array, prompt_leaf: jax.Array) -> jax.Array:
    return jnp.where(is_first, jnp.concatenate([prompt_leaf[:, None], leaf[:, :-1]], axis=1), leaf)

  return jax.tree.map(place, outputs, prompt_outputs), cache


def verify(
  law: Chain,
  state: Any,
  context: Context,
  tree: DraftTree,
  rule: Rule,
  outputs: Outputs,
  proposal: Proposal,
) -> tuple[Outcomes, DraftLaws]:
  """Returns what may come of drafts, and the target's laws after each of them.

  Args:
    law: the target's chain.
    state: its state behind the last token.
    context: history.
    tree: shape of the drafts.
    rule: of `nr.generation.speculation.verification`.
    outputs: of the target, [B, M, ...].
    proposal: the drafts.
  """
  laws = draft_laws(law, state, context, tree, outputs, proposal.tokens_BN)
  log_q_BNV = jnp.where(proposal.is_drafted_BN[..., None], proposal.log_q_BNV, -jnp.inf)
  return rule(tree, laws.transformed_BMV, log_q_BNV, proposal.tokens_BN), laws


def _run_of_tokens(
  tokens_RN: jax.Array, path_RA: jax.Array, accepted_R: jax.Array, next_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the accepted drafts with the next token behind them, and which places of A these take."""
  drafts_RA = jnp.pad(tokens_RN, ((0, 0), (0, 1)))
  drafts_RA = jnp.take_along_axis(drafts_RA, jnp.maximum(path_RA[:, 1:] - 1, 0), axis=1)
  drafts_RA = jnp.pad(drafts_RA, ((0, 0), (0, 1)))
  places_A = jnp.arange(path_RA.shape[1])
  tokens_RA = jnp.where(places_A < accepted_R[:, None], drafts_RA, next_R[:, None])
  return tokens_RA, places_A <= accepted_R[:, None]


def _emit(
  law: Chain, stop: Stop, text: _Text, tokens_RA, is_chosen_RA, outputs: Outputs, laws: DraftLaws
) -> tuple[_Text, jax.Array]:
  """Adds tokens one by one, as sampling would, until a row ends; says which were added."""
  rows_R, most = jnp.arange(tokens_RA.shape[0]), text.log_probs_RN.shape[1]

  def step(text: _Text, seen):
    tokens_R, is_chosen_R, outputs, laws = seen
    is_kept_R = is_chosen_R & (text.finish_R == RUNNING)
    slots_R = jnp.where(is_kept_R, text.context.generated_B, most)

    def record(stored_RN: jax.Array, log_probs_RV: jax.Array) -> jax.Array:
      return stored_RN.at[rows_R, slots_R].set(decoding.chosen(log_probs_RV, tokens_R), mode="drop")

    context = decoding.observe(text.context, outputs)
    context = context._replace(log_probs_BV=laws.log_probs_BMV, transformed_BV=laws.transformed_BMV)
    formed = decoding.Law(laws.transformed_BMV, laws.log_probs_BMV, laws.is_broken_BM, context)
    state, context = decoding.commit(law, text.state, formed, tokens_R, is_kept_R)
    finish_R, stop_states_R = stop.advance(text.stop_states_R, tokens_R, context, laws.is_broken_BM)
    following = _Text(
      context,
      state,
      jnp.where(is_kept_R, stop_states_R, text.stop_states_R),
      jnp.where(is_kept_R, finish_R, text.finish_R),
      record(text.log_probs_RN, laws.log_probs_BMV),
      record(text.transformed_RN, laws.transformed_BMV),
    )
    return following, is_kept_R

  steps = (tokens_RA, is_chosen_RA, outputs, laws)
  text, is_kept_AR = jax.lax.scan(step, text, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), steps))
  return text, is_kept_AR.T


def _keep(model, tree: DraftTree, cache, path_RA, lengths_R, is_first) -> Any:
  """Keeps in the cache what was added to the text, less its last token."""
  kept_R = jnp.maximum(lengths_R - is_first, 0)
  if tree.is_chain:
    return model.rollback(cache, tree.size + 1 - kept_R)
  # In the first round the root is in the cache already, and the drafts lie one slot earlier.
  first_RA = jnp.maximum(jnp.concatenate([path_RA[:, 1:], path_RA[:, -1:]], axis=1) - 1, 0)
  return model.keep_path(cache, tree.size + 1, jnp.where(is_first, first_RA, path_RA), kept_R)


def _count(counts: _Counts, tree: DraftTree, is_drafted_RN, is_kept_RA, accepted_R, path_RA) -> _Counts:
  parents_N, nodes_M = np.array(tree.parents, int), np.arange(tree.size + 1)
  has_draft_RM = (is_drafted_RN[:, None] & (parents_N == nodes_M[:, None])).any(axis=-1)
  is_tested_RA = is_kept_RA & jnp.take_along_axis(has_draft_RM, path_RA, axis=1)
  is_accepted_RA = is_kept_RA & (jnp.arange(path_RA.shape[1]) < accepted_R[:, None])
  added = (
    is_kept_RA.any(axis=1),
    is_drafted_RN.sum(axis=1),
    is_tested_RA.sum(axis=1),
    is_accepted_RA.sum(axis=1),
  )
  return _Counts(*(count_R + more_R.astype(jnp.int32) for count_R, more_R in zip(counts, added)))
