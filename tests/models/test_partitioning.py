"""Layout hints: nothing without rules, the named layout with them, errors for unknown names."""

import jax
import jax.numpy as jnp
import pytest
from flax.core import spmd
from jax.sharding import AxisType

from nr.models.partitioning import constrain, target_platform

RULES = (("batch", ("data", "fsdp")), ("activation_mlp", "tensor"), ("heads", "tensor"), ("length", "absent"))


@pytest.fixture
def mesh():
  return jax.make_mesh((2, 1, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def test_without_rules_or_mesh_nothing_happens(mesh):
  x = jnp.ones((4, 8))
  assert constrain(x, "batch", "anything") is x
  with spmd.logical_axis_rules(RULES):
    assert constrain(x, "batch", "anything") is x
  with jax.set_mesh(mesh):
    assert constrain(x, "batch", "anything") is x


def test_names_decide_the_layout_and_sizes_that_do_not_divide_stay_whole(mesh):
  with jax.set_mesh(mesh), spmd.logical_axis_rules(RULES):
    laid = jax.jit(lambda x: constrain(x, "batch", "length", "activation_mlp"))(jnp.ones((4, 3, 8)))
    assert laid.addressable_shards[0].data.shape == (2, 3, 2)
    whole = jax.jit(lambda x: constrain(x, "batch", None, "activation_mlp"))(jnp.ones((1, 3, 8)))
    assert whole.addressable_shards[0].data.shape == (1, 3, 2)


def test_mistakes_are_named(mesh):
  with jax.set_mesh(mesh), spmd.logical_axis_rules(RULES):
    with pytest.raises(ValueError, match="logical name 'activation_mpl' has no sharding rule"):
      constrain(jnp.ones((4, 4)), "batch", "activation_mpl")
    with pytest.raises(ValueError, match="would be used twice"):
      constrain(jnp.ones((4, 4)), "heads", "activation_mlp")
  with pytest.raises(ValueError, match="give a name for each axis of"):
    constrain(jnp.ones((4, 4)), "batch")


def test_target_platform_is_that_of_the_mesh(mesh):
  assert target_platform() == "cpu"
  with jax.set_mesh(mesh):
    assert jax.jit(lambda: 0 if target_platform() == "cpu" else 1)() == 0
