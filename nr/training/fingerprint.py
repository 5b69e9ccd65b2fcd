"""A name for parameters that is computed where they lie."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nr.training import trees

PyTree = Any
_LANES = (0x9E3779B9, 0x7F4A7C15)


def _mixed(x: jax.Array) -> jax.Array:
  """The finaliser of MurmurHash3 on uint32: every bit of the result depends on every bit of x."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _bits(leaf: jax.Array) -> jax.Array:
  """Returns uint32 of the leaf's shape (64-bit types are not used on accelerators)."""
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  width = leaf.dtype.itemsize * 8
  return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)


@jax.jit
def _digests(leaves: list[jax.Array]) -> jax.Array:
  rows = []
  for leaf in leaves:
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
      iota = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      place, stride = place + iota * jnp.uint32(stride & 0xFFFFFFFF), stride * leaf.shape[axis]
    bits = _bits(leaf)
    # Sums of integers: the same on any mesh, in any order.
    rows.append(jnp.stack([_mixed(bits ^ _mixed(place + jnp.uint32(lane))).sum() for lane in _LANES]))
  return jnp.stack(rows)


def fingerprint(tree: PyTree) -> str:
  """Returns 16 hexadecimal digits that name the values of a tree of arrays.

  Hashed on the devices, however the arrays are sharded; 8 bytes a leaf come to the host.
  Guards against mistakes, not against malice. The layout of the layers is part of it.

  Args:
    tree: nested dictionaries of arrays of at most 32 bits an entry.
  """
  named = jax.tree_util.tree_leaves_with_path(tree)
  digests = np.asarray(_digests([jnp.asarray(leaf) for _, leaf in named]))
  digest = hashlib.sha256()
  for (path, leaf), row in zip(named, digests):
    digest.update(f"{trees.full_path(path)}\0{leaf.dtype}{leaf.shape}\0".encode() + row.astype("<u4").tobytes())
  return digest.hexdigest()[:16]
