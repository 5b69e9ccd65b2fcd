"""Fingerprints of array trees: one SHA-256 a leaf, and of the whole."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nr.training import trees

PyTree = Any


def to_host(leaf: Any) -> np.ndarray:
  """Returns a leaf as a NumPy array: the key data of a typed key, all shards of a sharded array."""
  if isinstance(leaf, jax.Array):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    if not leaf.is_fully_addressable:
      from jax.experimental import multihost_utils

      return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(jax.device_get(leaf))
  return np.asarray(leaf)


def describe(leaf: Any) -> str:
  """Returns the type and shape of a leaf, "float32[4,8]"; no array is read."""
  dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
  return f"{dtype}[{','.join(map(str, np.shape(leaf)))}]"


def array_hash(array: np.ndarray) -> str:
  """Returns the SHA-256 of an array's type, shape and bytes, in hexadecimal."""
  digest = hashlib.sha256(describe(array).encode())
  digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def leaf_hashes(tree: PyTree) -> dict[str, str]:
  """Returns the SHA-256 of every leaf by its path "a/b/c"."""
  named = [(trees.full_path(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  # Gathering over processes must happen in the same order everywhere; hashing need not.
  arrays = [to_host(leaf) for _, leaf in named]
  with ThreadPoolExecutor(max_workers=4) as pool:
    return dict(zip((name for name, _ in named), pool.map(array_hash, arrays)))


def leaf_types(tree: PyTree) -> dict[str, str]:
  """Returns the type and shape of every leaf by its path."""
  return {trees.full_path(path): describe(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
  """Returns for every leaf whether all of it is finite; stays on the devices."""
  return [jnp.isfinite(leaf).all() for leaf in leaves]


def first_not_finite(tree: PyTree) -> str | None:
  """Returns the path of the first floating-point leaf that holds NaN or infinity, or None."""
  named = [
    (trees.full_path(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(getattr(leaf, "dtype", np.int32), jnp.floating)
  ]
  finite = jax.device_get(_finite([leaf for _, leaf in named]))
  return next((name for (name, _), good in zip(named, finite) if not good), None)


def text_hash(value: Any) -> str:
  """Returns the SHA-256 of a JSON value, independent of the order of its fields."""
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def to_plain(tree: PyTree) -> dict:
  """Returns a pytree as nested dictionaries with string keys; empty nodes vanish."""
  plain: dict = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *parents, last = trees.names_of(path)
    node = plain
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = leaf
  return plain


def from_plain(plain: dict, like: PyTree) -> PyTree:
  """Puts the leaves of `to_plain(like)`-shaped dictionaries back into the structure of `like`."""

  def pick(path: Any, _: Any) -> Any:
    node = plain
    for name in trees.names_of(path):
      node = node[name]
    return node

  return jax.tree_util.tree_map_with_path(pick, like)
