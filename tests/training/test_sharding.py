"""The rule table: every logical name has a rule, every mistake names the parameter."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from nr.training import sharding

MIXED = dict(data=2, fsdp=2, tensor=2, sequence=1)


def test_mesh_has_automatic_axes_and_completes_the_open_one():
  mesh = sharding.make_mesh(dict(data=-1, fsdp=2, tensor=1, sequence=1))
  assert dict(mesh.shape) == dict(data=4, fsdp=2, tensor=1, sequence=1)
  assert all(kind == AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(fsdp=3), "training.mesh.data: -1 cannot be completed.*3.*8 devices"),
    (dict(data=16), "needs 16 devices and there are 8"),
    (dict(fsdp=-1), "data and fsdp are both -1"),
    (dict(tensor=0), "training.mesh.tensor: 0 must be 1 or more"),
  ],
)
def test_impossible_meshes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1, sequence=1) | changes)


def test_a_name_without_a_rule_is_an_error():
  mesh = sharding.make_mesh(MIXED)
  with pytest.raises(ValueError, match="parameter 'a/kernel': logical axis 'embd' has no rule.*'embed'"):
    sharding.shardings({"a": {"kernel": ("embd", "mlp")}}, mesh)


def test_a_mesh_axis_used_twice_is_an_error():
  mesh = sharding.make_mesh(MIXED)
  with pytest.raises(
    ValueError, match="parameter 'w': mesh axis 'tensor' is used twice, by.*'heads' and 'mlp'"
  ):
    sharding.shardings({"w": ("heads", "mlp")}, mesh)


def test_a_dimension_that_does_not_divide_is_an_error():
  mesh = sharding.make_mesh(MIXED)
  arrays = {"w": jax.ShapeDtypeStruct((4, 7), jnp.float32)}
  with pytest.raises(ValueError, match="parameter 'w': dimension 1 of size 7.*'tensor' of size 2"):
    sharding.shardings({"w": ("embed", "mlp")}, mesh, arrays)


def test_axes_must_fit_the_arrays():
  mesh = sharding.make_mesh(MIXED)
  arrays = {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
  with pytest.raises(ValueError, match="parameter 'w': 1 logical axes"):
    sharding.shardings({"w": ("embed",)}, mesh, arrays)
  with pytest.raises(ValueError, match="parameter 'w': the tree of logical axes and the arrays differ"):
    sharding.shardings({"v": ("embed", "mlp")}, mesh, arrays)


def test_rules_name_only_mesh_axes_and_cover_layers_kept_apart():
  mesh = sharding.make_mesh(MIXED)
  for name, rule in sharding.RULES.items():
    for axis in (rule,) if isinstance(rule, str) else rule or ():
      assert axis in sharding.MESH_AXES, name
  axes = {"blocks": {0: {"w": ("embed", "mlp")}, 1: {"w": ("embed", "mlp")}}}
  found = sharding.shardings(axes, mesh)
  assert found["blocks"][1]["w"].spec == PartitionSpec("fsdp", "tensor")


def test_batch_rows_are_spread_over_data_and_fsdp_and_text_stays_behind():
  mesh = sharding.make_mesh(MIXED)
  batch = {"tokens": np.arange(32, dtype=np.int32).reshape(8, 4), "names": np.array(["a"] * 8)}
  placed = sharding.put_batch(batch, mesh)
  assert set(placed) == {"tokens"}
  assert placed["tokens"].addressable_shards[0].data.shape == (2, 4)
  np.testing.assert_array_equal(placed["tokens"], batch["tokens"])


def test_context_lets_models_constrain_by_logical_name():
  from nr.models.partitioning import constrain

  mesh = sharding.make_mesh(MIXED)
  with sharding.context(mesh):
    placed = jax.jit(lambda x: constrain(x, "batch", "activation_mlp"))(jnp.ones((8, 4)))
  assert placed.addressable_shards[0].data.shape == (2, 2)


class Device(NamedTuple):
  id: int
  process_index: int


@pytest.mark.parametrize(
  "axes, owners, words",
  [
    (dict(data=2, fsdp=2, tensor=2), (0, 0, 0, 0, 1, 1, 1, 1), None),
    (dict(data=4, fsdp=1, tensor=2), (0, 0, 0, 0, 1, 1, 1, 1), None),
    (
      dict(data=1, tensor=8),
      (0, 0, 0, 0, 1, 1, 1, 1),
      "gives the same rows of a batch to several of the 2 processes",
    ),
    (
      dict(data=2, tensor=4),
      (0, 0, 1, 1, 0, 0, 1, 1),
      "keep tensor x sequence within the devices of a process",
    ),
    (dict(data=4, tensor=1), (0, 0, 0, 0), "has 4 of the 8 devices"),
  ],
)
def test_processes_that_would_share_rows_are_refused(monkeypatch, axes, owners, words):
  """As if every two or four of the devices here belonged to another process."""
  mesh = sharding.make_mesh({**dict.fromkeys(sharding.MESH_AXES, 1), **axes})
  owner = dict(zip(mesh.devices.flat, owners, strict=True))
  placed = sharding.batch_sharding(mesh)

  class Placed:
    def devices_indices_map(self, shape):
      found = placed.devices_indices_map(shape)
      return {Device(device.id, owner[device]): index for device, index in found.items()}

  monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: Placed())
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  if words is None:
    sharding.check_processes(mesh)
    return
  with pytest.raises(ValueError, match=words):
    sharding.check_processes(mesh)
