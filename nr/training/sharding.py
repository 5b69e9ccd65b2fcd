"""The one table from logical axis names to mesh axes, and all that follows from it."""

import contextlib
import math
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.core import spmd
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nr.models.parameters import is_axes
from nr.names import nearest
from nr.training import trees

PyTree = Any
MESH_AXES = ("data", "fsdp", "tensor", "sequence")
DATA_PARALLEL = types.MappingProxyType({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})
"""Mesh in which every device has a copy of the model and its share of the batch."""

# Logical name -> mesh axis, several mesh axes, or None for a copy on every device.
RULES: dict[str, str | tuple[str, ...] | None] = {
  # Parameters.
  "layers": None,
  "vocab": "tensor",
  "positions": None,
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "concepts": "tensor",
  "latents": "tensor",
  "norm": None,
  "adaptive_decoder": None,
  # Activations.
  "batch": ("data", "fsdp"),
  "length": "sequence",
  "activation_embed": None,
  "activation_heads": "tensor",
  "activation_kv_heads": "tensor",
  "activation_mlp": "tensor",
  "activation_vocab": "tensor",
  "activation_concepts": "tensor",
  "activation_latents": "tensor",
}


def mesh_sizes(config: Any, device_count: int) -> dict[str, int]:
  """Returns the size of every mesh axis; the axis given as -1 takes the devices that remain.

  Args:
    config: mapping with data, fsdp, tensor and sequence.
    device_count: number of devices there are.

  Raises:
    ValueError: the sizes do not multiply to at most the number of devices, or
      cannot be completed.
  """
  sizes = {axis: int(config[axis]) for axis in MESH_AXES}
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise ValueError(f"training.mesh.{axis}: {size} must be 1 or more, or -1 for the devices that remain")
  if len(open_axes) > 1:
    raise ValueError(f"training.mesh: {' and '.join(open_axes)} are both -1; give all but one a size")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if open_axes:
    if device_count % fixed:
      raise ValueError(
        f"training.mesh.{open_axes[0]}: -1 cannot be completed, since the other axes multiply to {fixed}, "
        f"which does not divide {device_count} devices"
      )
    sizes[open_axes[0]] = device_count // fixed
  elif fixed > device_count:
    raise ValueError(f"training.mesh: {sizes} needs {fixed} devices and there are {device_count}")
  return sizes


def make_mesh(config: Any, devices: list[jax.Device] | None = None) -> Mesh:
  """Builds the mesh of a config section, with automatic axes.

  Args:
    config: mapping with data, fsdp, tensor and sequence; one may be -1.
    devices: the devices to use; all of them by default. A fixed mesh that needs
      fewer takes the first ones.

  Raises:
    ValueError: as `mesh_sizes`.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = mesh_sizes(config, len(devices))
  shape = tuple(sizes[axis] for axis in MESH_AXES)
  axis_types = (AxisType.Auto,) * len(MESH_AXES)
  if math.prod(shape) == len(devices) and devices[0].platform == "tpu":
    # Lays the axes along the physical torus.
    return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices)
  array = np.array(devices[: math.prod(shape)]).reshape(shape)
  return Mesh(array, MESH_AXES, axis_types=axis_types)


def check_processes(mesh: Mesh) -> None:
  """Refuses a mesh over several processes that do not each hold their own share of a batch's rows.

  Raises:
    ValueError: processes without a device of the mesh, or that hold the same rows.
  """
  if jax.process_count() == 1:
    return
  if mesh.size != jax.device_count():
    raise ValueError(
      f"training.mesh: {dict(mesh.shape)} has {mesh.size} of the {jax.device_count()} devices; of several processes "
      "all devices train, so give one axis -1"
    )
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  rows: dict[int, set[int]] = {}
  for device, (index, *_) in batch_sharding(mesh).devices_indices_map((ways,)).items():
    rows.setdefault(device.process_index, set()).update(range(ways)[index])
  if len(set().union(*rows.values())) != sum(map(len, rows.values())):
    raise ValueError(
      f"training.mesh: {dict(mesh.shape)} gives the same rows of a batch to several of the {jax.process_count()} "
      "processes, which read different ones; keep tensor x sequence within the devices of a process"
    )


def partition_spec(names: tuple[str | None, ...], parameter: str = "") -> PartitionSpec:
  """Returns the PartitionSpec of a tuple of logical names.

  Raises:
    ValueError: a name without a rule, or a mesh axis used twice.
  """
  where = f"parameter {parameter!r}: " if parameter else ""
  entries, used = [], {}
  for name in names:
    if name is not None and name not in RULES:
      near = nearest(name, RULES)
      hint = f" (did you mean {near!r}?)" if near else ""
      raise ValueError(
        f"{where}logical axis {name!r} has no rule{hint}; add it to RULES in nr/training/sharding.py, "
        "with None for a copy on every device"
      )
    entry = None if name is None else RULES[name]
    for axis in (entry,) if isinstance(entry, str) else entry or ():
      if axis in used:
        raise ValueError(
          f"{where}mesh axis {axis!r} is used twice, by logical axes {used[axis]!r} and {name!r}; "
          "name one of the two None or give it another rule"
        )
      used[axis] = name
    entries.append(entry)
  return PartitionSpec(*entries)


def _check_division(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh, parameter: str) -> None:
  """Raises ValueError if a mesh axis does not divide the dimension it splits."""
  for dimension, entry in enumerate(spec):
    axes = (entry,) if isinstance(entry, str) else entry or ()
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if shape[dimension] % ways:
      raise ValueError(
        f"parameter {parameter!r}: dimension {dimension} of size {shape[dimension]} is not divided by "
        f"mesh axis {'x'.join(axes)!r} of size {ways}; change that size or training.mesh"
      )


def shardings(axes: PyTree, mesh: Mesh, arrays: PyTree | None = None) -> PyTree:
  """Returns a NamedSharding for every tuple of logical names in `axes`.

  Args:
    axes: tree whose leaves are tuples of logical names, one name a dimension.
    mesh: the mesh.
    arrays: (abstract) arrays of the same structure; their sizes are checked.

  Raises:
    ValueError: a name without a rule, a mesh axis used twice in a spec, a name
      count that is not the rank, trees that differ, or a dimension that its mesh
      axes do not divide; names the parameter.
  """
  named = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)
  names_by_path = {trees.full_path(path): names for path, names in named}
  if arrays is not None:
    paths = [trees.full_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(arrays)]
    missing = sorted(set(paths) - set(names_by_path)) or sorted(set(names_by_path) - set(paths))
    if missing:
      raise ValueError(f"parameter {missing[0]!r}: the tree of logical axes and the arrays differ there")
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
      name, names = trees.full_path(path), names_by_path[trees.full_path(path)]
      if len(names) != len(leaf.shape):
        raise ValueError(f"parameter {name!r}: {len(names)} logical axes {names} for shape {leaf.shape}")
      _check_division(partition_spec(names, name), leaf.shape, mesh, name)
  return jax.tree_util.tree_map_with_path(
    lambda path, names: NamedSharding(mesh, partition_spec(names, trees.full_path(path))),
    axes,
    is_leaf=is_axes,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: rows over data and fsdp."""
  return NamedSharding(mesh, partition_spec(("batch",)))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, jax.Array]:
  """Puts this process's rows of a batch on its devices; text fields stay behind."""
  numeric = {name: np.asarray(value) for name, value in batch.items()}
  numeric = {name: value for name, value in numeric.items() if value.dtype.kind in "biufV"}
  if mesh is None:
    return jax.device_put(numeric)
  placed = batch_sharding(mesh)
  parts = 1 if placed.is_fully_addressable else jax.process_count()
  return {
    name: jax.make_array_from_process_local_data(placed, value, (parts * len(value), *value.shape[1:]))
    for name, value in numeric.items()
  }


def put_tree(tree: PyTree, placed: PyTree) -> PyTree:
  """Puts arrays where a tree of shardings says; of several processes, each holds all of them and puts its part."""
  if jax.process_count() == 1:
    return jax.device_put(tree, placed)

  def put(leaf: Any, where: NamedSharding) -> jax.Array:
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)

  return jax.tree.map(put, tree, placed)


@contextlib.contextmanager
def context(mesh: Mesh | None) -> Iterator[None]:
  """Enters the mesh and the rules, so that models can constrain activations by logical name."""
  if mesh is None:
    yield
    return
  with jax.set_mesh(mesh), spmd.logical_axis_rules(tuple(RULES.items())):
    yield
