"""A function of positions, computed for some of them at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def over_positions(
  function: Callable[..., Any], shared: Any, arrays: tuple[jax.Array, ...], chunk_size: int | None
) -> Any:
  """Returns `function(shared, *arrays)`, what it holds inside limited to a chunk of positions.

  Chunks are cut along L, so that a sharded batch axis stays whole, and are computed again for the
  gradient, which is exact: neither pass ever holds what the function makes of all positions.

  Args:
    function: from (shared, [B, W, ...] arrays) to a tree of arrays [B, W]; what it makes of a position
      depends on that position alone.
    shared: tree of arrays that all chunks read, such as an output head.
    arrays: each [B, L, ...].
    chunk_size: about how many of the B L positions to hold at a time, at least one of every row;
      None: all.

  Raises:
    ValueError: if chunk_size is not positive.
  """
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size!r}: give a positive number of tokens, or None for no chunks")
  B, L = arrays[0].shape[:2]
  if chunk_size is None or chunk_size >= B * L:
    return function(shared, *arrays)
  num_chunks = -(-L // max(1, chunk_size // B))
  width = -(-L // num_chunks)
  padding = num_chunks * width - L

  def cut(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(B, num_chunks, width, *x.shape[2:]).swapaxes(0, 1)

  step = jax.checkpoint(function)

  def scan_step(_: None, chunk: tuple) -> tuple[None, Any]:
    return None, step(shared, *chunk)

  _, chunked_CBW = jax.lax.scan(scan_step, None, tuple(map(cut, arrays)))
  return jax.tree.map(
    lambda x_CBW: x_CBW.transpose(1, 0, 2).reshape(B, num_chunks * width)[:, :L], chunked_CBW
  )
