"""Where drafts come from: a smaller model, the text itself, the first blocks of the model, given tokens.

A drafter is a pytree. Its proposals are a tree of tokens (mostly a chain) and the
laws that they were drawn from; whatever it proposes, the law of the text is the
target's, and only the number of the target's calls depends on the drafter.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from nr.generation import decoding
from nr.generation.draft_trees import DraftTree, DraftWalk, flat
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.transforms.algebra import Chain, Context, Transform, chain

DEFAULT_LENGTH = 4


class Proposal(NamedTuple):
  """Drafts behind the last token of each row; nodes 1..N of a tree.

  Attributes:
    tokens_BN: int32 drafts.
    log_q_BNV: float32, the law that each was drawn from, independently of the others;
      for a deterministic draft 0 at the token and -inf elsewhere.
    is_drafted_BN: False where there is no draft; nothing below such a node counts.
  """

  tokens_BN: jax.Array
  log_q_BNV: jax.Array
  is_drafted_BN: jax.Array


class Emission(NamedTuple):
  """What a round added to each row: accepted drafts, then one token of the target's.

  Attributes:
    context: history before the round.
    tokens_BA: int32.
    is_kept_BA: bool, which of them; False behind the end of a row.
    accepted_B: int32, how many are drafts.
    log_probs_BAV: float32, the target's log-probabilities before each token.
    transformed_BAV: float32, those after the target's chain.
  """

  context: Context
  tokens_BA: jax.Array
  is_kept_BA: jax.Array
  accepted_B: jax.Array
  log_probs_BAV: jax.Array
  transformed_BAV: jax.Array


class Drafter:
  """Base of what `speculative` accepts. Subclasses are pytrees."""

  @property
  def vocab_size(self) -> int | None:
    """Number of token ids, or None where any vocabulary will do."""
    return None

  def tree(self, draft_length: int | None) -> DraftTree:
    """Returns the shape of its proposals; by default a chain."""
    return DraftTree.chain(DEFAULT_LENGTH if draft_length is None else draft_length)

  def prepared(self, model: LanguageModel, law: Chain, prompts_BP: jax.Array, max_new_tokens: int) -> Self:
    """Returns it ready for a target with a chain. Run outside `jit`.

    Raises:
      ValueError: for a target or a request that it does not fit.
    """
    return self

  def init(
    self,
    prompts_BP: jax.Array,
    valid_BP: jax.Array,
    keys_R: jax.Array,
    max_new_tokens: int,
    num_samples: int,
    tree: DraftTree,
  ) -> Any:
    """Returns its state after the prompts, for B * num_samples rows; arguments as for `decoding.begin`."""
    return ()

  def propose(
    self, state: Any, context: Context, keys_B: jax.Array, tree: DraftTree, vocab_size: int
  ) -> tuple[Proposal, Any]:
    """Drafts behind the history in `context`, with a random key for each row."""
    raise NotImplementedError

  def advance(self, state: Any, emission: Emission, tree: DraftTree) -> Any:
    """Returns the state after the tokens of a round; `state` is that after `propose`."""
    return state

  def take(self, rows_B: jax.Array) -> Self:
    """Gathers what belongs to rows."""
    return self


def certain(tokens_BN: jax.Array, vocab_size: int) -> jax.Array:
  """Returns float32 [B, N, V] log-probabilities of laws that are certain of the tokens."""
  return jnp.where(jnp.arange(vocab_size) == tokens_BN[..., None], 0.0, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ForcedDrafter(Drafter):
  """Given tokens: a known continuation, spans that a grammar forces, tests.

  Attributes:
    tokens_BT: int32, by generated position, for each prompt; negative: no draft.
  """

  tokens_BT: jax.Array

  def prepared(self, model: LanguageModel, law: Chain, prompts_BP: jax.Array, max_new_tokens: int) -> Self:
    """Refuses tokens of another number of rows."""
    tokens_BT = jnp.asarray(self.tokens_BT, jnp.int32)
    if tokens_BT.ndim != 2 or tokens_BT.shape[0] != prompts_BP.shape[0]:
      raise ValueError(
        f"tokens_BT has shape {tokens_BT.shape}: give a row of tokens for each of the "
        f"{prompts_BP.shape[0]} prompts"
      )
    return ForcedDrafter(tokens_BT)

  def propose(self, state, context, keys_B, tree, vocab_size):
    """Reads the tokens at each row's position."""
    slots_BN = context.generated_B[:, None] + jnp.arange(tree.size)
    tokens_BN = jnp.take_along_axis(self.tokens_BT, slots_BN, axis=1, mode="clip")
    is_drafted_BN = (slots_BN < self.tokens_BT.shape[1]) & (tokens_BN >= 0)
    return Proposal(tokens_BN, certain(tokens_BN, vocab_size), is_drafted_BN), state

  def take(self, rows_B: jax.Array) -> Self:
    """Gathers rows."""
    return ForcedDrafter(self.tokens_BT[rows_B])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NgramDrafter(Drafter):
  """Copies what followed the last tokens where they occurred earlier (prompt lookup).

  The longest match is taken, of equally long ones the first in the text, as in
  `transformers`.

  Attributes:
    longest: most tokens to match.
    shortest: fewest tokens to match.
  """

  longest: int = dataclasses.field(default=2, metadata=dict(static=True))
  shortest: int = dataclasses.field(default=1, metadata=dict(static=True))

  def prepared(self, model: LanguageModel, law: Chain, prompts_BP: jax.Array, max_new_tokens: int) -> Self:
    """Refuses lengths that match nothing."""
    if not 1 <= self.shortest <= self.longest:
      raise ValueError(f"shortest={self.shortest}, longest={self.longest}: give 1 <= shortest <= longest")
    return self

  def propose(self, state, context, keys_B, tree, vocab_size):
    """Looks for the last tokens in the history."""
    tokens_BS, lengths_B = context.tokens_BS, context.lengths_B
    start_B, is_found_B = jnp.zeros_like(lengths_B), jnp.zeros(lengths_B.shape, bool)
    for length in range(self.shortest, self.longest + 1):
      # Behind a match that starts at s, the copy starts at s + length, before the end of the text.
      matches_BS = jnp.arange(tokens_BS.shape[1]) + length < lengths_B[:, None]
      for offset in range(length):
        last_B1 = jnp.maximum(lengths_B[:, None] - length + offset, 0)
        wanted_B1 = jnp.take_along_axis(tokens_BS, last_B1, axis=1)
        matches_BS = matches_BS & (jnp.roll(tokens_BS, -offset, axis=1) == wanted_B1)
      is_match_B = matches_BS.any(axis=1)
      start_B = jnp.where(is_match_B, jnp.argmax(matches_BS, axis=1) + length, start_B)
      is_found_B = is_found_B | is_match_B
    slots_BN = start_B[:, None] + jnp.arange(tree.size)
    tokens_BN = jnp.take_along_axis(tokens_BS, slots_BN, axis=1, mode="clip")
    is_drafted_BN = is_found_B[:, None] & (slots_BN < lengths_B[:, None])
    return Proposal(tokens_BN, certain(tokens_BN, vocab_size), is_drafted_BN), state


class _ModelState(NamedTuple):
  """State of a drafter with a model of its own.

  Attributes:
    cache: of its model; does not hold the pending tokens.
    outputs: [B, ...] at the last prompt token.
    chain: state of its chain.
    pending_BA: int32 tokens of the text that were not read yet, on the left.
    pending_B: int32, how many; 0 before the first round.
  """

  cache: Any
  outputs: Outputs
  chain: Any
  pending_BA: jax.Array
  pending_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ModelDrafter(Drafter):
  """A smaller model with the target's vocabulary, its own cache and its own chain.

  Attributes:
    model: the model.
    chain: transforms of its logits; None: those of the target's chain that need no
      streams or hidden states that this model does not offer.
  """

  model: LanguageModel
  chain: Transform | None = None

  @property
  def vocab_size(self) -> int | None:
    """That of its model."""
    return self.model.vocab_size

  def prepared(self, model: LanguageModel, law: Chain, prompts_BP: jax.Array, max_new_tokens: int) -> Self:
    """Settles its chain."""
    if self.chain is None:
      own = chain(*(each for each in law.transforms if each.needs <= self.model.offers))
    else:
      own = self.chain
    own, *_ = decoding.check_request(self.model, own, prompts_BP, None, max_new_tokens)
    return dataclasses.replace(self, chain=own)

  def init(self, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples, tree):
    """Reads the prompts."""
    most_pending = self._most_pending(tree)
    settings = dict(num_samples=num_samples, uneven=True, extra_tokens=tree.size + most_pending)
    sizes = (prompts_BP, valid_BP, keys_R, max_new_tokens)
    begun = decoding.begin(self.model, self.chain, *sizes, **settings)
    rows = keys_R.shape[0]
    pending_BA = jnp.zeros((rows, most_pending), jnp.int32)
    return _ModelState(begun.cache, begun.outputs, begun.state, pending_BA, jnp.zeros(rows, jnp.int32))

  def _most_pending(self, tree: DraftTree) -> int:
    return 2

  def propose(self, state, context, keys_B, tree, vocab_size):
    """Draws a chain of tokens, one call of the model each."""
    outputs, cache = self._read_pending(state)

    def extend(tokens_B: jax.Array, cache: Any) -> tuple[Outputs, Any]:
      return self.model.extend(tokens_B[:, None], cache, read_B=jnp.zeros_like(tokens_B))

    def step(carry, index):
      outputs, cache, chain_state, context = carry
      formed = decoding.form_law(self.chain, chain_state, outputs, context)
      tokens_B = draw_tokens(formed.transformed_BV, keys_B, index)
      chain_state, context = decoding.commit(self.chain, chain_state, formed, tokens_B)
      is_last = index == tree.size - 1
      outputs, cache = jax.lax.cond(is_last, lambda *_: (outputs, cache), extend, tokens_B, cache)
      return (outputs, cache, chain_state, context), (tokens_B, formed.transformed_BV)

    start = (outputs, cache, state.chain, context)
    (_, cache, *_), (tokens_NB, log_q_NBV) = jax.lax.scan(step, start, jnp.arange(tree.size))
    is_drafted_BN = jnp.ones(tokens_NB.T.shape, bool)
    return Proposal(tokens_NB.T, log_q_NBV.swapaxes(0, 1), is_drafted_BN), state._replace(cache=cache)

  def _read_pending(self, state: _ModelState) -> tuple[Outputs, Any]:
    """Returns the outputs at the last token of the text, and the cache that holds it."""
    valid_BA = jnp.arange(state.pending_BA.shape[1]) < state.pending_B[:, None]
    read_B = jnp.maximum(state.pending_B - 1, 0)
    outputs, cache = self.model.extend(state.pending_BA, state.cache, valid_BA, read_B=read_B)
    return decoding.select(state.pending_B > 0, outputs, state.outputs), cache

  def advance(self, state, emission, tree):
    """Forgets rejected drafts; a last one that was accepted has not been read, as the token behind it."""
    is_moving_B = emission.is_kept_BA[:, 0]
    read = tree.size - 1
    kept_B = jnp.where(is_moving_B, jnp.minimum(emission.accepted_B, read), 0)
    cache = self.model.rollback(state.cache, read - kept_B)
    pending_B = jnp.where(is_moving_B, 1 + emission.accepted_B - kept_B, 0)
    slots_BA = kept_B[:, None] + jnp.arange(2)
    pending_BA = jnp.take_along_axis(emission.tokens_BA, slots_BA, axis=1, mode="clip")
    return state._replace(
      cache=cache,
      chain=follow(self.chain, state.chain, emission),
      pending_BA=pending_BA,
      pending_B=pending_B,
    )

  def take(self, rows_B: jax.Array) -> Self:
    """Gathers the rows of the model and of the chain."""
    return dataclasses.replace(self, model=self.model.take(rows_B), chain=self.chain.take(rows_B))


def draw_tokens(log_q_BV: jax.Array, keys_B: jax.Array, index: jax.Array | int) -> jax.Array:
  """Returns int32 [B] draws, independent for every index."""
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
  return jax.vmap(jax.random.categorical)(keys_B, log_q_BV).astype(jnp.int32)


def follow(law: Chain, state: Any, emission: Emission) -> Any:
  """Returns the state of a drafter's chain after the tokens of a round, with the target's laws."""
  if not law.transforms:
    return state

  def step(carry, taken):
    state, context = carry
    tokens_B, is_kept_B, log_probs_BV, transformed_BV = taken
    seen = context._replace(log_probs_BV=log_probs_BV, transformed_BV=transformed_BV)
    formed = decoding.Law(transformed_BV, log_probs_BV, jnp.zeros_like(is_kept_B), seen)
    return decoding.commit(law, state, formed, tokens_B, is_kept_B), None

  parts = (emission.tokens_BA, emission.is_kept_BA, emission.log_probs_BAV, emission.transformed_BAV)
  steps = tuple(part.swapaxes(0, 1) for part in parts)
  (state, _), _ = jax.lax.scan(step, (state, emission.context), steps)
  return state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TreeDrafter(ModelDrafter):
  """Several continuations at once: the children of a node are independent draws from its law.

  Every level is one call of the model, which reads the tree so far again.

  Attributes:
    shape: the tree.
  """

  shape: DraftTree = dataclasses.field(default=DraftTree.branching(2, 1), metadata=dict(static=True))

  def tree(self, draft_length: int | None) -> DraftTree:
    """Returns its own tree; `draft_length` must be its depth, if given."""
    if draft_length not in (None, self.shape.depth):
      raise ValueError(
        f"draft_length={draft_length}: the drafter's tree has depth {self.shape.depth}; omit it"
      )
    return self.shape

  def _most_pending(self, tree: DraftTree) -> int:
    return tree.depth + 1

  def propose(self, state, context, keys_B, tree, vocab_size):
    """Draws the tree level by level."""
    root, cache = self._read_pending(state)
    tokens_BN = jnp.zeros((keys_B.shape[0], 0), jnp.int32)
    laws = []
    walk = DraftWalk.start(self.chain, state.chain, context, tree)
    for nodes in tree.levels[1:]:
      outputs = root if not laws else self._read_level(tree, walk.depth, tokens_BN, cache)
      formed = walk.form(outputs)
      log_q_BWV = walk.of_children(formed.transformed_BV)
      tokens_BW = jax.vmap(lambda node, q_BV: draw_tokens(q_BV, keys_B, node), (0, 1), 1)(nodes, log_q_BWV)
      walk = walk.descend(formed, tokens_BW)
      tokens_BN = jnp.concatenate([tokens_BN, tokens_BW], axis=1)
      laws.append(log_q_BWV)
    is_drafted_BN = jnp.ones(tokens_BN.shape, bool)
    return Proposal(tokens_BN, jnp.concatenate(laws, axis=1), is_drafted_BN), state._replace(cache=cache)

  def _read_level(self, tree: DraftTree, depth: int, tokens_BN: jax.Array, cache: Any) -> Outputs:
    """Returns the outputs [B * W, ...] of the nodes of one level."""
    count = tokens_BN.shape[1]
    visible_BLL = jnp.asarray(tree.visible[None, 1 : count + 1, 1 : count + 1])
    outputs, _ = self.model.extend(tokens_BN, cache, visible_BLL=visible_BLL)
    level = tree.levels[depth] - 1
    return jax.tree.map(lambda leaf: flat(leaf[:, level]), outputs)

  def advance(self, state, emission, tree):
    """Leaves the tokens of the round to be read; the drafts were never kept."""
    return state._replace(
      chain=follow(self.chain, state.chain, emission),
      pending_BA=emission.tokens_BA,
      pending_B=emission.is_kept_BA.sum(axis=1, dtype=jnp.int32),
    )
