"""Parameters as plain trees: making them, naming their axes, stacking their layers.

A model is built once as a Flax module and then split into a graph definition and
a nested dictionary of arrays. Everything after that (gradients, optimizers,
checkpoints, sharding) sees the dictionary only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BLOCKS = "blocks"
LAYERS = "layers"


def parameter(
  key: jax.Array,
  initializer: Callable[..., jax.Array],
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  dtype: Any = jnp.float32,
) -> nnx.Param:
  """Makes one parameter that knows the logical name of each of its axes.

  Args:
    key: random key for the initial value.
    initializer: `(key, shape, dtype) -> array`, as in `jax.nn.initializers`.
    shape: shape of the parameter.
    axes: one logical name an axis, such as ("embed", "mlp").
    dtype: storage type.

  Returns:
    The parameter, with its names as metadata `axes`.

  Raises:
    ValueError: if the number of names is not the number of axes.
  """
  if len(axes) != len(shape):
    raise ValueError(f"axes={axes!r}: give one name for each of the {len(shape)} axes of shape {shape}")
  return nnx.Param(initializer(key, shape, dtype), axes=tuple(axes))


def zeros_parameter(
  is_used: bool,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  dtype: Any = jnp.float32,
) -> nnx.Param | None:
  """Makes a parameter that starts at zero (a bias), or None if it is not used."""
  if not is_used:
    return None
  return parameter(jax.random.key(0), jax.nn.initializers.zeros, shape, axes, dtype)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
  """Splits a model into its definition and a plain nested dictionary of arrays."""
  graphdef, state = nnx.split(model, nnx.Param)
  return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Mapping) -> nnx.Module:
  """Puts a model together again; inverse of `split`, free under `jit` and `grad`."""
  return nnx.merge(graphdef, params)


def axes_of(model: nnx.Module) -> dict:
  """Returns the logical axis names of a built model, a tree like its parameters.

  Raises:
    ValueError: if a parameter carries no names.
  """
  state = nnx.state(model, nnx.Param)
  for path, variable in nnx.to_flat_state(state):
    if variable.get_metadata().get("axes") is None:
      name = "/".join(map(str, path))
      raise ValueError(f"parameter {name!r} has no logical axes; make it with nr.models.parameters.parameter")
  return nnx.to_pure_dict(state, extract_fn=lambda variable: variable.get_metadata()["axes"])


def logical_axes(build: Callable[[], nnx.Module]) -> dict:
  """Returns the logical axis names of the model that `build` makes, without making arrays.

  Args:
    build: makes the model; runs under `jax.eval_shape`.

  Returns:
    Nested dictionary like the parameters, with a tuple of names at each leaf.
    Walk it with `is_leaf=lambda node: isinstance(node, tuple)`.
  """
  found = {}

  def trace() -> tuple:
    found.update(axes_of(build()))
    return ()

  jax.eval_shape(trace)
  return found


def _has_blocks(node: Any) -> bool:
  return isinstance(node, dict) and BLOCKS in node


def is_unrolled(blocks: Any) -> bool:
  """Says whether a node of a tree is a dictionary of layers by number."""
  return isinstance(blocks, dict) and bool(blocks) and all(isinstance(name, int) for name in blocks)


def is_axes(node: Any) -> bool:
  """Says whether a node is a tuple of logical names, a leaf of a tree of axes."""
  return (
    isinstance(node, tuple)
    and not hasattr(node, "_fields")
    and all(isinstance(name, str | None) for name in node)
  )


def _stack_leaves(*leaves: Any) -> Any:
  first = leaves[0]
  if is_axes(first):
    return (LAYERS, *first)
  if isinstance(first, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
  if isinstance(first, np.ndarray | np.generic):
    return np.stack(leaves)
  return jnp.stack(leaves)


def _take_leaf(leaf: Any, layer: int) -> Any:
  if is_axes(leaf):
    return leaf[1:]
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
  return leaf[layer]


def stack_layers(tree: Any) -> Any:
  """Turns every `blocks: {0: .., 1: ..}` into `blocks: ..` with a leading layer axis.

  Works on any pytree (parameters, optax states, train states, axis names,
  `ShapeDtypeStruct`s); everything else, `optax.MaskedNode` and blocks that are
  stacked already included, is left as it is.
  """

  def visit(node: Any) -> Any:
    if not _has_blocks(node):
      return node
    visited = {name: stack_layers(child) for name, child in node.items() if name != BLOCKS}
    blocks = node[BLOCKS]
    if is_unrolled(blocks):
      layers = [blocks[index] for index in sorted(blocks)]
      visited[BLOCKS] = jax.tree.map(_stack_leaves, *layers, is_leaf=_is_axes_leaf)
    else:
      visited[BLOCKS] = blocks
    return {name: visited[name] for name in node}

  return jax.tree.map(visit, tree, is_leaf=_has_blocks)


def _is_axes_leaf(node: Any) -> bool:
  # The empty tuple is a leaf of no axis tree (a stacked leaf has at least "layers")
  # but it is what optax uses for "no state".
  return is_axes(node) and len(node) > 0


def _count_layers(tree: Any) -> set[int]:
  counts = set()
  for node in jax.tree.leaves(tree, is_leaf=_has_blocks):
    if not _has_blocks(node):
      continue
    for name, child in node.items():
      if name != BLOCKS:
        counts |= _count_layers(child)
      elif not is_unrolled(child):
        counts |= {leaf.shape[0] for leaf in jax.tree.leaves(child) if hasattr(leaf, "shape")}
  return counts


def unstack_layers(tree: Any, num_layers: int | None = None) -> Any:
  """Turns every stacked `blocks` into `blocks: {0: .., 1: ..}`; inverse of `stack_layers`.

  Run it once, outside `jit`: slicing a stacked array inside a loop copies it.

  Args:
    tree: any pytree that holds stacked blocks.
    num_layers: number of layers; read from the leading axes when left out.

  Raises:
    ValueError: if the leading axes disagree, or there is no array to read the
      number of layers from.
  """
  if num_layers is None:
    counts = _count_layers(tree)
    if len(counts) > 1:
      raise ValueError(f"blocks have leading axes {sorted(counts)}: one number of layers is needed")
    num_layers = counts.pop() if counts else None
  return _unstack(tree, num_layers)


def _unstack(tree: Any, num_layers: int | None) -> Any:
  def visit(node: Any) -> Any:
    if not _has_blocks(node):
      return node
    visited = {name: _unstack(child, num_layers) for name, child in node.items() if name != BLOCKS}
    blocks = node[BLOCKS]
    if not isinstance(blocks, dict) or is_unrolled(blocks):
      visited[BLOCKS] = blocks
    elif num_layers is None:
      raise ValueError("num_layers=None: the blocks hold no array to count; pass num_layers")
    else:
      visited[BLOCKS] = {
        layer: jax.tree.map(lambda leaf, layer=layer: _take_leaf(leaf, layer), blocks, is_leaf=_is_axes_leaf)
        for layer in range(num_layers)
      }
    return {name: visited[name] for name in node}

  return jax.tree.map(visit, tree, is_leaf=_has_blocks)
