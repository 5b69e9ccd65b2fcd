"""The suite that every Method passes, as functions a recipe's test calls.

    from tests.training import method_suite

    def test_method(tmp_path):
      method_suite.check_all(make_tiny_method(), tiny_batch(), tmp_path, golden="cocomix")

The batch is a dictionary of NumPy arrays whose rows divide by 8; give it uneven
weights, or the comparison of microbatches proves little. Tiny sizes, please: the
suite compiles about ten programs.
"""

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.training import integrity, sharding, trees
from nr.training.checkpoints import tree_hash
from nr.training.defaults import get_training_config
from nr.training.loop import train
from nr.training.optimizers import make_optimizer
from nr.training.state import abstract_state, create_state, place_frozen, state_shardings
from nr.training.step import accumulate, make_train_step

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
UPDATE = "NR_UPDATE_GOLDEN"
MESHES = (
  dict(data=1, fsdp=1, tensor=1, sequence=1),
  dict(data=2, fsdp=1, tensor=1, sequence=1),
  dict(data=2, fsdp=4, tensor=1, sequence=1),
)


def tiny_config(batch, **changes):
  """A training section for a few steps on `batch`; dots in field names are written "__"."""
  section = get_training_config()
  section.update(dict(steps=4, batch_size=len(next(iter(batch.values()))), log_every=1, progress=False))
  section.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return section


class Prepared(NamedTuple):
  """What several checks share, on the host, so that it is compiled once."""

  params: Any
  extra: Any
  reference: Any  # Gradients and sums on one device.


def perturbed(params, seed=1, scale=0.02):
  """Parameters moved off their initial values: what starts at zero hides gradients of its neighbours."""
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noisy = [leaf + scale * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys)]
  return jax.tree.unflatten(structure, noisy)


def prepare(method, batch):
  """Makes parameters, extra state and the gradients on one device that others are compared with."""

  def make():
    params = perturbed(method.init(jax.random.key(0)))
    return params, method.init_extra(params)

  params, extra = jax.device_get(jax.jit(make)())
  return Prepared(params, extra, gradients_and_sums(method, batch, Prepared(params, extra, None)))


def gradients_and_sums(method, batch, prepared, *, mesh=None, accumulation=1, seed=0):
  """Summed gradients and LossOutput on a mesh (a config dictionary, or None), on the host."""
  mesh = sharding.make_mesh(mesh) if mesh else None
  params, extra = prepared.params, prepared.extra
  if mesh is not None:
    state = abstract_state(method, make_optimizer(tiny_config(batch), method))
    placed = state_shardings(method, state, mesh)
    params, extra = jax.device_put(params, placed.params), jax.device_put(extra, placed.extra)

  def compute(params, frozen, extra, arrays):
    return accumulate(method, params, frozen, extra, arrays, jax.random.key(seed), accumulation, mesh)

  with sharding.context(mesh):
    arrays = sharding.put_batch(batch, mesh)
    return jax.device_get(jax.jit(compute)(params, place_frozen(method, mesh), extra, arrays))


def first_step(method, batch):
  """Runs one step at a constant rate from seed 0. Returns parameters before and after, and metrics."""
  optimizer = make_optimizer(tiny_config(batch, schedule__name="constant"), method)
  state = create_state(method, optimizer, 0)
  before = jax.device_get(state.params)
  arrays = sharding.put_batch(batch, None)
  state, metrics = make_train_step(method, optimizer)(state, place_frozen(method, None), arrays)
  return before, jax.device_get(state.params), jax.device_get(metrics)


def _assert_agree(found, expected, what, rtol, atol):
  """Compares gradients leaf by leaf on the scale of each leaf, and the sums."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(expected[0])):
    scale = max(np.abs(b).max(), 1e-30)
    worst = np.abs(a - b).max() / scale
    limit = rtol + atol / scale
    assert worst <= limit, f"{what}: gradient of {trees.full_path(path)} is off by {worst:.2g} of its scale"
  for name in expected[1].metrics:
    a, b = found[1].metrics[name], expected[1].metrics[name]
    np.testing.assert_allclose(a.total, b.total, rtol=rtol, atol=1e-4, err_msg=f"{what}: metric {name}")
    np.testing.assert_allclose(a.weight, b.weight, rtol=rtol, err_msg=f"{what}: weight of {name}")
  np.testing.assert_allclose(found[1].loss.total, expected[1].loss.total, rtol=rtol, err_msg=f"{what}: loss")
  np.testing.assert_allclose(found[1].loss.weight, expected[1].loss.weight, rtol=rtol, err_msg=what)


def check_gradients_reach_every_trainable_leaf(method, batch, *, except_for=(), prepared=None):
  """Every trainable leaf has a finite gradient that is not all zero; frozen ones have no optimizer state.

  `except_for`: patterns of leaves whose gradient is zero by mathematics, with the
  reason in the calling test (a key bias under softmax, for one).
  """
  gradients, _ = (prepared or prepare(method, batch)).reference
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    name = trees.pattern_path(path)
    assert np.isfinite(leaf).all(), f"gradient of {name} is not finite"
    if not any(re.fullmatch(pattern, name) for pattern in except_for):
      assert np.abs(leaf).max() > 0, f"no gradient reaches trainable parameter {trees.full_path(path)}"
  optimizer = make_optimizer(tiny_config(batch), method)
  state = abstract_state(method, optimizer)
  mask = trees.match_mask(state.params, method.trainable)
  trainable, frozen = trees.partition(state.params, mask)
  assert jax.tree.structure(gradients) == jax.tree.structure(trainable)
  moments = [trees.full_path(p) for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if x.shape]
  for path, _ in jax.tree_util.tree_leaves_with_path(frozen):
    name = trees.full_path(path)
    assert not any(moment.endswith("/" + name) for moment in moments), f"frozen {name} has optimizer state"


def check_frozen_stay(method, batch, *, stepped=None):
  """A step changes no parameter that is not trainable, bit for bit."""
  before, after, _ = stepped or first_step(method, batch)
  mask = trees.match_mask(before, method.trainable)
  fixed = [trees.partition(params, mask)[1] for params in (before, after)]
  jax.tree.map(np.testing.assert_array_equal, *fixed)


def check_devices_agree(method, batch, *, meshes=MESHES, rtol=1e-5, atol=1e-7, prepared=None):
  """Gradients, loss and metrics are the same on every mesh, up to rounding."""
  prepared = prepared or prepare(method, batch)
  for mesh in meshes:
    found = gradients_and_sums(method, batch, prepared, mesh=mesh)
    _assert_agree(found, prepared.reference, f"mesh {mesh}", rtol, atol)


def check_microbatches_agree(method, batch, *, accumulations=(4,), rtol=1e-5, atol=1e-7, prepared=None):
  """Sums over microbatches are those of the whole batch. The method must not draw random numbers."""
  prepared = prepared or prepare(method, batch)
  for accumulation in accumulations:
    found = gradients_and_sums(method, batch, prepared, accumulation=accumulation)
    _assert_agree(found, prepared.reference, f"{accumulation} microbatches", rtol, atol)


class Batches:
  """Endless batches: the rows of one batch in an order that depends on the position."""

  def __init__(self, batch, crash_at=None):
    self.batch, self.crash_at, self.position = batch, crash_at, 0

  def __iter__(self):
    return self

  def __next__(self):
    if self.position == self.crash_at:
      raise ConnectionError("the machine went away")
    rows = len(next(iter(self.batch.values())))
    order = np.random.default_rng(self.position).permutation(rows)
    self.position += 1
    return {name: np.asarray(value)[order] for name, value in self.batch.items()}

  def get_state(self):
    return {"position": self.position}

  def set_state(self, state):
    self.position = state["position"]


def check_resumed_equals_uninterrupted(method, batch, tmp_path):
  """A run that dies after step 3 and resumes from step 2 ends in the bits of one that never stopped."""
  config = tiny_config(batch, steps=5, checkpoint__every=2, mesh__data=1)
  whole = train(config, method, Batches(batch), workdir=tmp_path / "whole")
  with pytest.raises(ConnectionError):
    train(config, method, Batches(batch, crash_at=3), workdir=tmp_path / "broken")
  assert [p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()] == ["2"]
  resumed = train(config, method, Batches(batch), workdir=tmp_path / "broken")
  assert tree_hash(resumed.state) == tree_hash(whole.state)
  assert resumed.summary["tokens"] == whole.summary["tokens"]


def _compare_golden(path, found, compare, legitimate):
  """Compares with a committed file, or writes it when NR_UPDATE_GOLDEN is set."""
  if os.environ.get(UPDATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return
  assert path.exists(), f"{path} is missing; make it with {UPDATE}=1 and commit it"
  expected = json.loads(path.read_text())
  advice = f"{path.name}: {legitimate} Then make it again with {UPDATE}=1 and say why in the commit."
  assert sorted(found) == sorted(expected), advice
  for name in expected:
    assert compare(found[name], expected[name]), f"{name}: {found[name]} was {expected[name]}. {advice}"


def check_golden_parameters(method, golden, directory=GOLDEN):
  """The tree of parameters (paths, types, shapes) is the committed one."""
  params = jax.eval_shape(method.init, jax.random.key(0))
  _compare_golden(
    pathlib.Path(directory) / f"{golden}_parameters.json",
    integrity.leaf_types(params),
    lambda found, expected: found == expected,
    "A change is legitimate only when checkpoints are meant to become unreadable or a map reads old ones.",
  )


def check_golden_metrics(method, batch, golden, directory=GOLDEN, rtol=1e-4, *, ties=(), stepped=None):
  """The metrics of the first step from seed 0 are the committed ones, up to rounding.

  `ties` names metrics that are left out: at these parameters all compared values are equal, so that rounding
  alone decides, or differences of them are zero but for it.
  """
  _, _, metrics = stepped or first_step(method, batch)
  means = {
    name: np.asarray(value.mean(), np.float64).reshape(-1).tolist()
    for name, value in metrics.items()
    if name not in ties
  }
  _compare_golden(
    pathlib.Path(directory) / f"{golden}_metrics.json",
    means,
    lambda found, expected: np.allclose(found, expected, rtol=rtol, atol=1e-6),
    "A change is legitimate only when initialisation, loss or a metric was changed on purpose.",
  )


def check_master_parameters_are_float32(method):
  """Master parameters are float32, whatever the compute type."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(method.init, jax.random.key(0))):
    assert leaf.dtype == jnp.float32, f"{trees.full_path(path)} is {leaf.dtype}"


def check_all(
  method, batch, tmp_path, golden=None, *, except_for=(), ties=(), meshes=MESHES, rtol=1e-5, atol=1e-7
):
  """Runs the whole suite. `golden` names the committed files; None leaves them out."""
  check_master_parameters_are_float32(method)
  prepared, stepped = prepare(method, batch), first_step(method, batch)
  check_gradients_reach_every_trainable_leaf(method, batch, except_for=except_for, prepared=prepared)
  check_frozen_stay(method, batch, stepped=stepped)
  check_devices_agree(method, batch, meshes=meshes, rtol=rtol, atol=atol, prepared=prepared)
  check_microbatches_agree(method, batch, rtol=rtol, atol=atol, prepared=prepared)
  check_resumed_equals_uninterrupted(method, batch, tmp_path)
  if golden:
    check_golden_parameters(method, golden)
    check_golden_metrics(method, batch, golden, ties=ties, stepped=stepped)
