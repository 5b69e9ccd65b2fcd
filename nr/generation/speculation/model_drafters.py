"""Drafters with a model: a smaller one, several of its continuations at once, the target's own first blocks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Network, Outputs
from nr.generation.speculation.draft_trees import DraftTree, DraftWalk, flat
from nr.generation.speculation.drafters import Drafter, Emission, Proposal, Request, certain
from nr.generation.transforms.algebra import Chain, Transform, chain
from nr.models import parameters
from nr.models.concept_mixing import ConceptMixingTransformer
from nr.models.transformer import Transformer


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
    is_greedy: whether it drafts the most probable token instead of drawing; None: if
      the rule is greedy.
  """

  model: LanguageModel
  chain: Transform | None = None
  is_greedy: bool | None = dataclasses.field(default=None, metadata=dict(static=True))

  @property
  def vocab_size(self) -> int | None:
    """That of its model."""
    return self.model.vocab_size

  def prepared(self, model: LanguageModel, request: Request) -> Self:
    """Settles its chain."""
    if self.chain is None:
      # What remembers streams of the past cannot follow the target's tokens, of which only laws are told.
      own = chain(
        *(
          each
          for each in request.law.transforms
          if each.needs <= self.model.offers and (each.is_rebuilt_by_init or not each.needs)
        )
      )
    else:
      own = self.chain
    own, *_ = decoding.check_request(
      self.model, own, request.prompts_BP, request.valid_BP, request.max_new_tokens
    )
    is_greedy = request.is_greedy if self.is_greedy is None else self.is_greedy
    return dataclasses.replace(self, chain=own, is_greedy=is_greedy)

  def init(self, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples, tree):
    """Reads the prompts."""
    settings = dict(num_samples=num_samples, uneven=True, extra_tokens=tree.room)
    sizes = (prompts_BP, valid_BP, keys_R, max_new_tokens)
    begun = decoding.begin(self.model, self.chain, *sizes, **settings)
    rows = keys_R.shape[0]
    pending_BA = jnp.zeros((rows, self._most_pending(tree)), jnp.int32)
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
      tokens_B, log_q_BV = self._draw(formed.transformed_BV, keys_B, index)
      chain_state, context = decoding.commit(self.chain, chain_state, formed, tokens_B)
      is_last = index == tree.size - 1
      outputs, cache = jax.lax.cond(is_last, lambda *_: (outputs, cache), extend, tokens_B, cache)
      return (outputs, cache, chain_state, context), (tokens_B, log_q_BV)

    start = (outputs, cache, state.chain, context)
    (_, cache, *_), (tokens_NB, log_q_NBV) = jax.lax.scan(step, start, jnp.arange(tree.size))
    is_drafted_BN = jnp.ones(tokens_NB.T.shape, bool)
    return Proposal(tokens_NB.T, log_q_NBV.swapaxes(0, 1), is_drafted_BN), state._replace(cache=cache)

  def _draw(
    self,
    law_BV: jax.Array,
    keys_B: jax.Array,
    index: jax.Array | int,
    rank: jax.Array | int = 0,
    candidates: int = 1,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns int32 [B] drafts, and the laws that they were drawn from.

    Args:
      law_BV: log-probabilities.
      keys_B: random keys of the round.
      index: what keeps the drafts of a round independent.
      rank: which candidate it is; a greedy drafter's are the most probable tokens.
      candidates: how many there are.
    """
    if self.is_greedy:
      _, best_BK = jax.lax.top_k(law_BV, min(candidates, law_BV.shape[-1]))
      tokens_B = jnp.take(best_BK, rank, axis=1, mode="clip").astype(jnp.int32)
      return tokens_B, certain(tokens_B, law_BV.shape[-1])
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
    return jax.vmap(jax.random.categorical)(keys_B, law_BV).astype(jnp.int32), law_BV

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
      laws_BWV = walk.of_children(formed.transformed_BV)
      draw = jax.vmap(functools.partial(self._draw, candidates=len(tree.siblings)), (1, None, 0, 0), 1)
      tokens_BW, log_q_BWV = draw(laws_BWV, keys_B, nodes, tree.ranks[nodes - 1])
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


def early_exit(network: Network, num_blocks: int) -> Network:
  """Returns the network of the first blocks, the final norm and the output head: a drafter for free.

  Parameters of the unrolled layout are shared, stacked ones sliced (a copy). A
  concept model keeps its concepts, and its intervention, if the exit lies above them.

  Args:
    network: the target.
    num_blocks: how many blocks are kept.

  Raises:
    ValueError: when that is not 1 to N - 1.

  Source: our choice; self-speculation without any training.
  """
  model, params = network.model(), network.params
  spec = model.spec
  if not 0 < num_blocks < spec.num_layers:
    raise ValueError(f"num_blocks={num_blocks}: give 1 to {spec.num_layers - 1}, of {spec.num_layers} blocks")
  spec = dataclasses.replace(spec, num_layers=num_blocks)
  has_concepts = isinstance(model, ConceptMixingTransformer)
  if has_concepts and num_blocks > model.concept_spec.insert_at:
    concept_spec = model.concept_spec
    cut = {**params, "transformer": _first_blocks(params["transformer"], num_blocks)}
    graphdef = _definition(lambda: ConceptMixingTransformer(spec, concept_spec, rngs=nnx.Rngs(0)))
    intervention = network.intervention
  else:
    cut = _first_blocks(params["transformer"] if has_concepts else params, num_blocks)
    graphdef, intervention = _definition(lambda: Transformer(spec, rngs=nnx.Rngs(0))), None
  return Network(graphdef, cut, intervention, network.intervene_on)


def _first_blocks(params: Any, num_blocks: int) -> dict:
  blocks = params["blocks"]
  if parameters.is_unrolled(blocks):
    blocks = {index: blocks[index] for index in range(num_blocks)}
  else:
    blocks = jax.tree.map(lambda leaf: leaf[:num_blocks], blocks)
  return {**params, "blocks": blocks}


def _definition(build: Callable[[], nnx.Module]) -> Any:
  return nnx.split(jax.eval_shape(build))[0]
