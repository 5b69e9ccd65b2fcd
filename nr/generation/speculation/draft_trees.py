"""Shapes of drafts: which drafted token continues which, and the laws at every one of them."""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import Outputs
from nr.generation.transforms.algebra import Chain, Context


@dataclasses.dataclass(frozen=True)
class DraftTree:
  """A static tree of drafted tokens, in order of their depth.

  Node 0 is the last token of the text; nodes 1..N are drafts. Arrays are NumPy, so
  that everything made of them is static.

  Attributes:
    parents: of nodes 1..N, not decreasing. A chain is (0, 1, 2, ...).

  Raises:
    ValueError: parents that are not earlier nodes in order of depth.
  """

  parents: tuple[int, ...]

  def __post_init__(self):
    parents = tuple(int(parent) for parent in self.parents)
    object.__setattr__(self, "parents", parents)
    for node, parent in enumerate(parents, 1):
      if not 0 <= parent < node:
        raise ValueError(f"parents[{node - 1}]={parent}: the parent of node {node} must be in 0..{node - 1}")
    if list(parents) != sorted(parents):
      raise ValueError(f"parents={parents}: number the nodes level by level, children in order of parents")

  @classmethod
  def chain(cls, length: int) -> Self:
    """Returns one draft of `length` tokens; 0 drafts nothing."""
    return cls(tuple(range(length)))

  @classmethod
  def branching(cls, *widths: int) -> Self:
    """Returns the tree in which every node of level i has `widths[i]` children."""
    parents, level = [], [0]
    for width in widths:
      if width < 1:
        raise ValueError(f"widths={widths}: give at least 1 child on every level")
      first = len(parents) + 1
      parents += [parent for parent in level for _ in range(width)]
      level = list(range(first, len(parents) + 1))
    return cls(tuple(parents))

  @property
  def size(self) -> int:
    """Number of drafts N."""
    return len(self.parents)

  @property
  def is_chain(self) -> bool:
    """Whether no token has two continuations."""
    return self.parents == tuple(range(self.size))

  @functools.cached_property
  def depths(self) -> np.ndarray:
    """Number [N + 1] of drafts from the root to each node, itself included."""
    depths = [0]
    for parent in self.parents:
      depths.append(depths[parent] + 1)
    return np.array(depths)

  @property
  def depth(self) -> int:
    """Length of the longest draft."""
    return int(self.depths.max())

  @property
  def room(self) -> int:
    """Slots that a round may take beyond the text, in any cache or history."""
    return self.size + self.depth + 2

  @functools.cached_property
  def paths(self) -> np.ndarray:
    """Nodes [N + 1, depth + 1] from the root to each node, which then repeats."""
    paths = np.zeros((self.size + 1, self.depth + 1), np.int32)
    for node, parent in enumerate(self.parents, 1):
      paths[node] = paths[parent]
      paths[node, self.depths[node] :] = node
    return paths

  @functools.cached_property
  def visible(self) -> np.ndarray:
    """Whether [N + 1, N + 1] a node (first axis) continues another, or is it."""
    return (self.paths[:, :, None] == np.arange(self.size + 1)).any(axis=1)

  @functools.cached_property
  def ranks(self) -> np.ndarray:
    """Place [N] of each of nodes 1..N among the children of its parent, from 0."""
    parents = np.array(self.parents, int)
    return np.arange(self.size) - np.searchsorted(parents, parents)

  @functools.cached_property
  def siblings(self) -> list[np.ndarray]:
    """Nodes by their rank: all first children, all second ones, ..."""
    return [np.flatnonzero(self.ranks == rank) + 1 for rank in range(self.ranks.max(initial=-1) + 1)]

  @functools.cached_property
  def levels(self) -> list[np.ndarray]:
    """Nodes by depth, the root first."""
    return [np.flatnonzero(self.depths == depth) for depth in range(self.depth + 1)]

  def parents_of(self, nodes: np.ndarray) -> np.ndarray:
    """Returns the parents of drafts."""
    return np.array(self.parents, int)[np.asarray(nodes) - 1]


class DraftWalk(NamedTuple):
  """A chain of transforms on its way down a tree, one level at a time; rows are (b, node of the level).

  Attributes:
    law: the chain, for B rows.
    tree: the tree.
    depth: of the level.
    state: of the chain, [B * W, ...].
    context: history up to each node of the level.
  """

  law: Chain
  tree: DraftTree
  depth: int
  state: Any
  context: Context

  @classmethod
  def start(cls, law: Chain, state: Any, context: Context, tree: DraftTree) -> Self:
    """Stands at the root."""
    return cls(law, tree, 0, state, context)

  @property
  def batch(self) -> int:
    """Number of rows B."""
    return self.context.lengths_B.shape[0] // len(self.tree.levels[self.depth])

  def of_rows(self) -> Chain:
    """Returns the chain with the parameters of each of the level's rows."""
    return self.law.take(jnp.repeat(jnp.arange(self.batch), len(self.tree.levels[self.depth])))

  def form(self, outputs: Outputs) -> decoding.Law:
    """Returns the laws at the level's nodes, from outputs [B * W, ...]."""
    return decoding.form_law(self.of_rows(), self.state, outputs, self.context)

  def parents(self) -> np.ndarray:
    """Returns, for each node of the next level, the place of its parent in this one."""
    following = self.tree.parents_of(self.tree.levels[self.depth + 1])
    return np.searchsorted(self.tree.levels[self.depth], following)

  def of_children(self, values_RV: jax.Array) -> jax.Array:
    """Returns [B, W', V]: for each node of the next level what belongs to its parent."""
    return values_RV.reshape(self.batch, -1, *values_RV.shape[1:])[:, self.parents()]

  def descend(self, formed: decoding.Law, tokens_BW: jax.Array) -> Self:
    """Commits the tokens of the next level."""
    parents = self.parents()
    width = len(self.tree.levels[self.depth])
    rows_R = (jnp.arange(self.batch)[:, None] * width + parents).reshape(-1)
    state, formed = decoding.take((self.state, formed), rows_R)
    law = self.law.take(jnp.repeat(jnp.arange(self.batch), len(parents)))
    state, context = decoding.commit(law, state, formed, tokens_BW.reshape(-1))
    return self._replace(depth=self.depth + 1, state=state, context=context)


def flat(leaf: jax.Array) -> jax.Array:
  """Returns [B * W, ...] of [B, W, ...]."""
  return leaf.reshape(-1, *leaf.shape[2:])


class DraftLaws(NamedTuple):
  """Laws after every node; M = N + 1, the root first.

  Attributes:
    transformed_BMV: float32 log-probabilities after the chain.
    log_probs_BMV: float32 log-probabilities of the model.
    is_broken_BM: where nothing could be drawn.
  """

  transformed_BMV: jax.Array
  log_probs_BMV: jax.Array
  is_broken_BM: jax.Array


def draft_laws(
  law: Chain, state: Any, context: Context, tree: DraftTree, outputs: Outputs, tokens_BN: jax.Array
) -> DraftLaws:
  """Returns the law of the next token after each node, with the chain's state advanced along the draft.

  Args:
    law: the chain.
    state: its state at the root.
    context: history up to the root.
    tree: shape of the draft.
    outputs: of the model, [B, M, ...].
    tokens_BN: int32 drafts.
  """
  if tree.is_chain:
    return _chain_laws(law, state, context, outputs, tokens_BN)
  walk, levels = DraftWalk.start(law, state, context, tree), []
  for depth, nodes in enumerate(tree.levels):
    formed = walk.form(jax.tree.map(lambda leaf, nodes=nodes: flat(leaf[:, nodes]), outputs))
    laws = DraftLaws(formed.transformed_BV, formed.log_probs_BV, formed.is_broken_B)
    levels.append(jax.tree.map(lambda leaf, w=walk: leaf.reshape(w.batch, -1, *leaf.shape[1:]), laws))
    if depth < tree.depth:
      walk = walk.descend(formed, tokens_BN[:, tree.levels[depth + 1] - 1])
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *levels)


def _chain_laws(
  law: Chain, state: Any, context: Context, outputs: Outputs, tokens_BN: jax.Array
) -> DraftLaws:
  def step(carry, seen):
    outputs, tokens_B = seen
    formed = decoding.form_law(law, carry[0], outputs, carry[1])
    carry = decoding.commit(law, carry[0], formed, tokens_B)
    return carry, DraftLaws(formed.transformed_BV, formed.log_probs_BV, formed.is_broken_B)

  # Nothing follows the last node: its commit is of no account.
  tokens_BM = jnp.pad(tokens_BN, ((0, 0), (0, 1)))
  steps = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (outputs, tokens_BM))
  _, laws = jax.lax.scan(step, (state, context), steps)
  return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), laws)
