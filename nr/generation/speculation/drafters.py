"""Where drafts come from: the protocol, and drafters that need no model.

A drafter is a pytree. Its proposals are a tree of tokens (mostly a chain) and the
laws that they were drawn from; whatever it proposes, the law of the text is the
target's, and only the number of the target's calls depends on the drafter. Drafters
with a model are in `nr.generation.speculation.model_drafters`.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from nr.generation.language_models import LanguageModel
from nr.generation.speculation.draft_trees import DraftTree
from nr.generation.transforms.algebra import Chain, Context

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


class Request(NamedTuple):
  """What a drafter is asked for.

  Attributes:
    law: the target's chain, prepared.
    prompts_BP: int32.
    valid_BP: bool, False at padding.
    max_new_tokens: most tokens to add.
    is_greedy: whether the rule accepts only the most probable token.
  """

  law: Chain
  prompts_BP: jax.Array
  valid_BP: jax.Array
  max_new_tokens: int
  is_greedy: bool


class Drafter:
  """Base of what `speculative` accepts. Subclasses are pytrees."""

  @property
  def vocab_size(self) -> int | None:
    """Number of token ids, or None where any vocabulary will do."""
    return None

  def tree(self, draft_length: int | None) -> DraftTree:
    """Returns the shape of its proposals; by default a chain."""
    return DraftTree.chain(DEFAULT_LENGTH if draft_length is None else draft_length)

  def prepared(self, model: LanguageModel, request: Request) -> Self:
    """Returns it ready for a target and a request. Run outside `jit`.

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


def certain(tokens: jax.Array, vocab_size: int) -> jax.Array:
  """Returns float32 log-probabilities [..., V] of laws that are certain of tokens [...]."""
  return jnp.where(jnp.arange(vocab_size) == tokens[..., None], 0.0, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ForcedDrafter(Drafter):
  """Given tokens: a known continuation, spans that a grammar forces, tests.

  Attributes:
    tokens_BT: int32, by generated position, for each prompt; negative: no draft.
  """

  tokens_BT: jax.Array

  def prepared(self, model: LanguageModel, request: Request) -> Self:
    """Refuses tokens of another number of rows."""
    tokens_BT = jnp.asarray(self.tokens_BT, jnp.int32)
    if tokens_BT.ndim != 2 or tokens_BT.shape[0] != request.prompts_BP.shape[0]:
      raise ValueError(
        f"tokens_BT has shape {tokens_BT.shape}: give a row of tokens for each of the "
        f"{request.prompts_BP.shape[0]} prompts"
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

  def prepared(self, model: LanguageModel, request: Request) -> Self:
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
