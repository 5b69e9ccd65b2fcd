"""Name maps: how another project's tensors become our parameter tree, and back.

A map is a table of rows (theirs, ours, transform) that a reader can check line
by line against the other project's checkpoint. One table serves both
directions. `{layer}` in a foreign name stands for 0 .. num_layers - 1; those
tensors are stacked on a leading layer axis on our side, as on disk.

A new format is one more table. A module that wraps a known model (a language
model with a concept head, say) reuses its table through `prefixed` and adds
rows of its own.

Shapes in the comments: D model, H heads, K head size, F hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nr.models.transformer_spec import TransformerSpec

Arrays = tuple[np.ndarray, ...]


class Transform(NamedTuple):
  """A change of layout with its inverse.

  Attributes:
    name: what it does, for error messages.
    to_ours: (their array, spec) -> one array for each path of the row.
    to_theirs: (our arrays in the order of the row's paths, spec) -> their array.
  """

  name: str
  to_ours: Callable[[np.ndarray, TransformerSpec], Arrays]
  to_theirs: Callable[[Arrays, TransformerSpec], np.ndarray]


def _one(name: str, ours: Callable, theirs: Callable) -> Transform:
  """A transform of one array into one array."""
  return Transform(name, lambda a, spec: (ours(a, spec),), lambda a, spec: theirs(a[0], spec))


SAME = _one("same", lambda a, s: a, lambda a, s: a)
# torch.nn.Linear stores [out, in]; we store [in, out].
TRANSPOSE = _one("transpose", lambda a, s: a.T, lambda a, s: a.T)
# Linear [H*K, D] -> [D, H, K], and its bias [H*K] -> [H, K].
HEADS = _one(
  "split heads of the output of a Linear",
  lambda a, s: a.T.reshape(s.model_dim, -1, s.head_dim),
  lambda a, s: a.reshape(s.model_dim, -1).T,
)
HEADS_BIAS = _one("split heads of a bias", lambda a, s: a.reshape(-1, s.head_dim), lambda a, s: a.reshape(-1))
# Linear [D, H*K] -> [H, K, D].
FROM_HEADS = _one(
  "split heads of the input of a Linear",
  lambda a, s: a.T.reshape(-1, s.head_dim, s.model_dim),
  lambda a, s: a.reshape(-1, s.model_dim).T,
)
# GPT-2's Conv1D stores [in, out]: [H*K, D] -> [H, K, D].
CONV_FROM_HEADS = _one(
  "split heads of the input of a Conv1D",
  lambda a, s: a.reshape(-1, s.head_dim, s.model_dim),
  lambda a, s: a.reshape(-1, s.model_dim),
)
# GPT-2's fused projection [D, 3*H*K] -> three of [D, H, K]; bias [3*H*K] -> three of [H, K].
CONV_QKV = Transform(
  "split a fused Conv1D into query, key, value",
  lambda a, s: tuple(np.moveaxis(a.reshape(s.model_dim, 3, -1, s.head_dim), 1, 0)),
  lambda a, s: np.stack(a, axis=1).reshape(s.model_dim, -1),
)
CONV_QKV_BIAS = Transform(
  "split a fused bias into query, key, value",
  lambda a, s: tuple(a.reshape(3, -1, s.head_dim)),
  lambda a, s: np.stack(a).reshape(-1),
)


def _adjacent_to_half(rows: np.ndarray, spec: TransformerSpec) -> np.ndarray:
  """Rows (2j, 2j+1) of a head, one rotary pair there, become rows (j, j + K/2)."""
  paired = rows.reshape(-1, spec.head_dim // 2, 2, spec.model_dim)
  return paired.swapaxes(1, 2).reshape(rows.shape)


def _half_to_adjacent(rows: np.ndarray, spec: TransformerSpec) -> np.ndarray:
  """The inverse of `_adjacent_to_half`."""
  halves = rows.reshape(-1, 2, spec.head_dim // 2, spec.model_dim)
  return halves.swapaxes(1, 2).reshape(rows.shape)


# llama2.c and GGUF rotate adjacent pairs of a head's rows, we rotate (j, j + K/2).
ADJACENT_HEADS = Transform(
  "reorder rotary pairs and split heads",
  lambda a, s: HEADS.to_ours(_adjacent_to_half(a, s), s),
  lambda a, s: _half_to_adjacent(HEADS.to_theirs(a, s), s),
)


class Row(NamedTuple):
  """One line of a name map.

  Attributes:
    theirs: the foreign tensor's name; `{layer}` stands for the layer index.
    ours: path(s) in our tree, parts joined by "/"; several when their tensor
      holds several of ours.
    transform: the change of layout of one layer's tensor.
  """

  theirs: str
  ours: str | tuple[str, ...]
  transform: Transform = SAME

  @property
  def paths(self) -> tuple[str, ...]:
    """Our paths, always as a tuple."""
    return (self.ours,) if isinstance(self.ours, str) else self.ours

  def names(self, num_layers: int) -> list[str]:
    """Their names: one, or one a layer."""
    if "{layer}" not in self.theirs:
      return [self.theirs]
    return [self.theirs.replace("{layer}", str(layer)) for layer in range(num_layers)]


Table = Sequence[Row]


def prefixed(table: Table, theirs: str = "", ours: str = "") -> tuple[Row, ...]:
  """Returns the table with prefixes put before every foreign name and every path of ours."""
  return tuple(
    Row(theirs + row.theirs, tuple(ours + path for path in row.paths), row.transform) for row in table
  )


def to_ours(table: Table, tensors: Mapping[str, np.ndarray], spec: TransformerSpec, dtype: Any) -> dict:
  """Builds our stacked parameter tree from their tensors.

  Args:
    table: the name map.
    tensors: their tensors by name; may read lazily, each is asked for once.
    spec: the model's settings (layer count and head size guide the transforms).
    dtype: type of every parameter returned.

  Returns:
    Nested dictionary of NumPy arrays on the host, layers stacked.

  Raises:
    ValueError: tensors are missing or unknown, or one does not fit its row;
      the message names them.
  """
  expected = [name for row in table for name in row.names(spec.num_layers)]
  _refuse("missing from the checkpoint", [name for name in expected if name not in tensors])
  known = set(expected)
  _refuse("in the checkpoint, but not in the name map", [name for name in tensors if name not in known])
  tree: dict = {}
  for row in table:
    names = row.names(spec.num_layers)
    for layer, name in enumerate(names):
      pieces = _apply(row, name, tensors[name], spec)
      for path, piece in zip(row.paths, pieces, strict=True):
        if "{layer}" not in row.theirs:
          put(tree, path, np.ascontiguousarray(piece, dtype))
          continue
        if layer == 0:
          put(tree, path, np.empty((len(names), *piece.shape), dtype))
        stacked = _get(tree, path)
        if piece.shape != stacked.shape[1:]:
          raise ValueError(f"{name}: shape {piece.shape} differs from {names[0]}: {stacked.shape[1:]}")
        stacked[layer] = piece
  return tree


def to_theirs(table: Table, params: Mapping[str, Any], spec: TransformerSpec) -> dict[str, np.ndarray]:
  """Builds their tensors from our stacked parameter tree; the inverse of `to_ours`.

  Raises:
    ValueError: the tree lacks a path of the table or has one that is not in it.
  """
  flat = flatten(params)
  expected = [path for row in table for path in row.paths]
  _refuse("missing from the parameters", [path for path in expected if path not in flat])
  known = set(expected)
  _refuse("among the parameters, but not in the name map", [path for path in flat if path not in known])
  tensors = {}
  for row in table:
    arrays = [np.asarray(flat[path]) for path in row.paths]
    for layer, name in enumerate(row.names(spec.num_layers)):
      pieces = tuple(a[layer] for a in arrays) if "{layer}" in row.theirs else tuple(arrays)
      tensors[name] = np.ascontiguousarray(row.transform.to_theirs(pieces, spec))
  return tensors


def check_shapes(params: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
  """Compares a parameter tree with a tree of shapes, such as `jax.eval_shape` gives.

  Raises:
    ValueError: naming the paths that are missing, unknown or of another shape.
  """
  have, want = flatten(params), flatten(expected)
  _refuse(f"missing from {source}", [path for path in want if path not in have])
  _refuse(f"in {source}, but not in the model", [path for path in have if path not in want])
  wrong = [f"{p} {have[p].shape} instead of {want[p].shape}" for p in want if have[p].shape != want[p].shape]
  _refuse(f"of another shape in {source} than its settings say", wrong)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves of a nested dictionary by path, parts joined by "/"."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def _apply(row: Row, name: str, array: np.ndarray, spec: TransformerSpec) -> Arrays:
  try:
    return row.transform.to_ours(np.asarray(array), spec)
  except ValueError as error:
    raise ValueError(
      f"{name}: shape {array.shape} does not fit '{row.transform.name}' with model_dim {spec.model_dim} "
      f"and head_dim {spec.head_dim}; the settings belong to another checkpoint"
    ) from error


def _refuse(what: str, names: Iterable[str]) -> None:
  names = list(names)
  if names:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise ValueError(f"{len(names)} {what}: {shown}")


def put(tree: dict, path: str, value: np.ndarray) -> None:
  """Sets the leaf of a nested dictionary at a path, parts joined by "/"."""
  *parents, last = path.split("/")
  for part in parents:
    tree = tree.setdefault(part, {})
  tree[last] = value


def _get(tree: dict, path: str) -> np.ndarray:
  for part in path.split("/"):
    tree = tree[part]
  return tree
