"""Where activations live on the device mesh, by logical axis name.

Models name the axes of their activations; the one table from names to mesh axes
is `nr.training.sharding.RULES`, entered with `flax.core.spmd.logical_axis_rules`.
Without rules every function here does nothing, so one device is the same code.
"""

import math

import jax
from flax.core import spmd
from jax.sharding import PartitionSpec


def constrain(x: jax.Array, *logical_names: str | None) -> jax.Array:
  """Asks the partitioner to lay `x` out by the logical names of its axes.

  A mesh axis that the current mesh lacks counts as having size one, and an axis
  whose size the mesh does not divide (a batch of one while decoding) stays whole:
  this is a layout, never a change of values.

  Args:
    x: any array with as many axes as names.
    *logical_names: one name an axis; None keeps that axis whole.

  Returns:
    The same values.

  Raises:
    ValueError: if the number of names is wrong, a name has no rule, or a mesh
      axis would be used twice.
  """
  if len(logical_names) != x.ndim:
    raise ValueError(f"logical_names={logical_names!r}: give a name for each axis of {x.shape}")
  rules = dict(spmd.get_logical_axis_rules())
  mesh = jax.sharding.get_abstract_mesh()
  if not rules or mesh.empty:
    return x
  entries, used = [], set()
  for size, name in zip(x.shape, logical_names):
    mesh_axes = _mesh_axes(name, rules, mesh)
    if mesh_axes and size % math.prod(mesh.shape[axis] for axis in mesh_axes):
      mesh_axes = ()
    if used.intersection(mesh_axes):
      raise ValueError(f"logical_names={logical_names!r}: mesh axes {mesh_axes} would be used twice")
    used.update(mesh_axes)
    entries.append(mesh_axes or None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def shard_count(logical_name: str) -> int:
  """Returns into how many pieces the current rules and mesh cut an axis of this name (1 without them).

  Under `jit` this is known while tracing, so that a program can avoid what would gather a sharded axis.
  """
  rules = dict(spmd.get_logical_axis_rules())
  mesh = jax.sharding.get_abstract_mesh()
  if not rules or mesh.empty:
    return 1
  return math.prod(mesh.shape[axis] for axis in _mesh_axes(logical_name, rules, mesh))


def _mesh_axes(name: str | None, rules: dict, mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
  if name is None:
    return ()
  if name not in rules:
    raise ValueError(f"logical name {name!r} has no sharding rule; add it to the rule table")
  target = rules[name]
  target = (target,) if isinstance(target, str) else tuple(target or ())
  return tuple(axis for axis in target if mesh.shape.get(axis, 1) > 1)


def target_platform() -> str:
  """Returns the platform that the program being traced will run on ("cpu", "gpu", "tpu").

  Under a mesh this is the platform of its devices, which is not the default one
  when a program is compiled ahead of time for hardware that is not here.
  """
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  return getattr(device, "platform", None) or jax.default_backend()
