"""Names of parameters: every entry, its place, its path and its type count; the mesh does not."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nr.training.fingerprint import fingerprint


def tree(dtype=jnp.float32):
  return {"a": jnp.arange(12, dtype=dtype).reshape(3, 4), "b": {"c": jnp.ones(5, dtype)}}


def test_any_change_changes_it():
  found = [
    tree(),
    {**tree(), "a": tree()["a"].at[1, 2].add(2**-20)},
    {**tree(), "a": tree()["a"].T.reshape(3, 4)},
    {"d": tree()["a"], "b": tree()["b"]},
    {**tree(), "a": tree()["a"].reshape(4, 3)},
    {**tree(), "b": {"c": -jnp.ones(5)}},
    tree(jnp.bfloat16),
    tree(jnp.int8),
    {"a": tree()["a"] > 2, "b": tree()["b"]},
  ]
  names = [fingerprint(each) for each in found]
  assert len(set(names)) == len(names) and all(len(name) == 16 for name in names)
  assert fingerprint(tree()) == names[0]


def test_the_mesh_does_not_matter():
  mesh = jax.make_mesh((2, 4), ("x", "y"))
  values = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)}
  placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec("x", "y")))
  assert fingerprint(placed) == fingerprint(values)
