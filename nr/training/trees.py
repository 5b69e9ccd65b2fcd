"""Paths, patterns and partitions of parameter trees."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from nr.names import nearest

PyTree = Any


def names_of(key_path: Sequence[Any]) -> tuple[str, ...]:
  """Returns the names along a JAX key path, indices of layers and tuples included."""
  return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def full_path(key_path: Sequence[Any]) -> str:
  """Returns "a/0/b" for a JAX key path."""
  return "/".join(names_of(key_path))


def pattern_path(key_path: Sequence[Any]) -> str:
  """Returns "a/b" for a JAX key path: integers (layer indices) are left out."""
  return "/".join(name for name in names_of(key_path) if not name.isdigit())


def match_mask(tree: PyTree, patterns: Sequence[str]) -> PyTree:
  """Returns a tree of bools: whether any pattern matches the leaf's whole path."""
  compiled = [re.compile(pattern) for pattern in patterns]
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(pattern.fullmatch(pattern_path(path)) for pattern in compiled), tree
  )


def check_patterns(tree: PyTree, patterns: Sequence[str], field: str) -> None:
  """Raises ValueError if a pattern matches no path of `tree`, or is not a regular expression."""
  paths = sorted({pattern_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)})
  for pattern in patterns:
    try:
      compiled = re.compile(pattern)
    except re.error as error:
      raise ValueError(f"{field}: {pattern!r} is not a regular expression ({error})") from None
    if not any(compiled.fullmatch(path) for path in paths):
      near = nearest(pattern, paths, likeness=0.0)
      hint = f"; the nearest path is {near!r}" if near else ""
      raise ValueError(f"{field}: pattern {pattern!r} matches no parameter path in full{hint}")


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
  """Splits a tree in two by a tree of bools; what is absent is `optax.MaskedNode()`."""
  chosen = jax.tree.map(lambda leaf, keep: leaf if keep else optax.MaskedNode(), tree, mask)
  rest = jax.tree.map(lambda leaf, keep: optax.MaskedNode() if keep else leaf, tree, mask)
  return chosen, rest


def _is_absent(node: Any) -> bool:
  """True where `partition` left a leaf out."""
  return isinstance(node, optax.MaskedNode)


def combine(first: PyTree, second: PyTree) -> PyTree:
  """Joins two parts made by `partition`."""
  return jax.tree.map(lambda a, b: b if _is_absent(a) else a, first, second, is_leaf=_is_absent)


def count(tree: PyTree) -> int:
  """Returns the number of scalars in a tree of arrays or abstract arrays."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
