"""The train step: exact accumulation, any mesh, frozen leaves, donation, memory a device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nr.objectives.weighted import LossOutput, Weighted
from nr.training import sharding
from nr.training.optimizers import make_optimizer
from nr.training.state import abstract_state, create_state, place_frozen, state_shardings
from nr.training.step import accumulate, make_train_step
from tests.training import toy

MESHES = {
  "data": dict(data=8, fsdp=1, tensor=1, sequence=1),
  "fsdp": dict(data=1, fsdp=8, tensor=1, sequence=1),
  "mixed": dict(data=2, fsdp=2, tensor=2, sequence=1),
}


def run(method, steps=3, accumulation=1, mesh=None, config=None, batch=None):
  optimizer = make_optimizer(config or toy.config(), method)
  mesh = sharding.make_mesh(mesh) if mesh else None
  with sharding.context(mesh):
    state, frozen = create_state(method, optimizer, 0, mesh), place_frozen(method, mesh)
    step = make_train_step(method, optimizer, accumulation, 0, mesh=mesh)
    for number in range(steps):
      arrays = sharding.put_batch(toy.batch(seed=number) if batch is None else batch, mesh)
      state, metrics = step(state, frozen, arrays)
  return jax.device_get(state), jax.device_get(metrics)


def assert_close(first, second, tolerance=2e-6):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance), first, second)


@pytest.fixture(scope="module")
def reference():
  return run(toy.make())


@pytest.mark.parametrize("accumulation", [2, 4])
def test_microbatches_of_uneven_weight_give_the_step_of_one_batch(reference, accumulation):
  assert_close(run(toy.make(), accumulation=accumulation), reference)


def test_mean_of_microbatch_means_would_differ():
  # The test above can fail: averaging the microbatches' means gives another loss.
  method, batch = toy.make(), toy.batch()
  params = method.init(jax.random.key(0))
  whole = method.loss(params, method.frozen, (), batch, None).loss.mean()
  parts = [{k: v[i::4] for k, v in batch.items()} for i in range(4)]
  means = [method.loss(params, method.frozen, (), part, None).loss.mean() for part in parts]
  assert abs(whole - np.mean(means)) > 1e-2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_step_of_one_device(reference, mesh, accumulation):
  assert_close(run(toy.make(), mesh=MESHES[mesh], accumulation=accumulation), reference)


def test_bytes_of_arguments_a_device_fall_as_one_eighth():
  method = toy.make(init_extra=lambda params: (), update_extra=lambda extra, *_: extra)
  wide = 1024

  def init(key):
    return {"kernel": jax.random.normal(key, (wide, wide))}

  def loss(params, frozen, extra, batch, key):
    error = jnp.square(batch["inputs"] @ params["kernel"]).sum(-1)
    return LossOutput(Weighted.of(error, batch["weights"]), {})

  method = method._replace(init=init, loss=loss, axes={"kernel": ("embed", "mlp")}, decay=(".*",))
  optimizer = make_optimizer(toy.config(), method)

  def argument_bytes(mesh_config):
    mesh = sharding.make_mesh(mesh_config)
    like = abstract_state(method, optimizer)
    placed = state_shardings(method, like, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, placed)
    rows = sharding.batch_sharding(mesh)
    batch = {
      "inputs": jax.ShapeDtypeStruct((16, wide), jnp.float32, sharding=rows),
      "weights": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=rows),
    }
    with sharding.context(mesh):
      compiled = make_train_step(method, optimizer, mesh=mesh).lower(state, {}, batch).compile()
    memory = compiled.memory_analysis()
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    return memory.argument_size_in_bytes, memory.alias_size_in_bytes, state_bytes, compiled.as_text()

  whole, alias, state_bytes, text = argument_bytes(dict(data=1, fsdp=1, tensor=1, sequence=1))
  assert alias >= 0.99 * state_bytes, "the state is not donated"
  assert "all-gather" not in text
  for mesh in (dict(data=1, fsdp=8, tensor=1, sequence=1), dict(data=1, fsdp=2, tensor=4, sequence=1)):
    part, alias, _, text = argument_bytes(mesh)
    assert part / whole == pytest.approx(1 / 8, rel=0.05)
    assert alias == pytest.approx(state_bytes / 8, rel=0.01)
    assert "all-gather" in text or "all-reduce" in text


def test_frozen_parameters_keep_their_values_and_get_no_optimizer_state():
  method = toy.make(trainable=("outer/.*",), decay=(".*",))
  state, metrics = run(method)
  start = method.init(jax.random.key(0))
  optimizer = make_optimizer(toy.config(), method)
  first = create_state(method, optimizer, 0)
  assert_close(state.params["inner"], jax.device_get(first.params["inner"]), 0)
  assert np.abs(state.params["outer"]["kernel"] - first.params["outer"]["kernel"]).max() > 1e-4
  outer = sum(x.size for x in jax.tree.leaves(start["outer"]))
  moments = [x for x in jax.tree.leaves(first.opt_state) if x.ndim]
  assert sum(x.size for x in moments) == 2 * outer
  assert metrics["gradient_norm"].total > 0


def test_donated_state_is_gone_after_the_step():
  method = toy.make()
  optimizer = make_optimizer(toy.config(), method)
  state = create_state(method, optimizer, 0)
  make_train_step(method, optimizer)(state, method.frozen, sharding.put_batch(toy.batch(), None))
  assert state.params["inner"]["kernel"].is_deleted()


def test_key_of_the_step_is_folded_from_seed_and_step():
  def loss(params, frozen, extra, batch, key):
    output = toy.loss(params, frozen, extra, batch, key)
    draw = jax.random.uniform(key)
    return output._replace(metrics={"draw": Weighted(draw, jnp.float32(1))})

  method = toy.make(loss=loss)
  for steps in (1, 2):
    _, metrics = run(method, steps=steps)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), steps - 1), 0)
    assert metrics["draw"].total == jax.random.uniform(key)


def test_a_batch_without_weight_changes_nothing_but_the_optimizer():
  batch = toy.batch() | {"weights": np.zeros(16, np.float32)}
  config = toy.config(optimizer__weight_decay=0.0)
  state, metrics = run(toy.make(), steps=1, config=config, batch=batch)
  optimizer = make_optimizer(config, toy.make())
  assert_close(state.params, jax.device_get(create_state(toy.make(), optimizer, 0).params), 0)
  assert metrics["loss"].weight == 0 and metrics["gradient_norm"].total == 0


def test_statistics_are_summed_over_microbatches_and_reach_update_extra():
  method, batch = toy.make(), toy.batch()
  state, _ = run(method, steps=1, accumulation=4, batch=batch)
  params = create_state(method, make_optimizer(toy.config(), method), 0).params
  expected = toy.loss(params, method.frozen, (), batch, None).statistics["active"]
  np.testing.assert_allclose(state.extra["active"], expected)


def test_extra_that_is_the_parameters_themselves_survives_donation():
  method = toy.make(
    init_extra=lambda params: params, update_extra=lambda extra, params, statistics, step: params
  )
  state, _ = run(method, steps=3)
  assert_close(state.extra, state.params, 0)


def test_constrain_wraps_the_whole_optimizer():
  def unit(optimizer):
    def update(gradients, opt_state, params):
      updates, opt_state = optimizer.update(gradients, opt_state, params)
      moved = params["outer"]["kernel"] + updates["outer"]["kernel"]
      unit_columns = moved / jnp.linalg.norm(moved, axis=0, keepdims=True)
      updates["outer"]["kernel"] = unit_columns - params["outer"]["kernel"]
      return updates, opt_state

    return optax.GradientTransformation(optimizer.init, update)

  state, _ = run(toy.make(constrain=unit))
  np.testing.assert_allclose(np.linalg.norm(state.params["outer"]["kernel"], axis=0), 1, atol=1e-6)


def test_mistakes_are_named():
  method = toy.make()
  params = method.init(jax.random.key(0))
  with pytest.raises(ValueError, match="accumulation: 3 does not divide the 16 rows"):
    accumulate(method, params, method.frozen, (), toy.batch(), jax.random.key(0), 3)
  optimizer = make_optimizer(toy.config(), method)
  with pytest.raises(
    ValueError, match="'ouuter/kernel' matches no parameter.*nearest path is 'outer/kernel'"
  ):
    abstract_state(toy.make(trainable=("ouuter/kernel",)), optimizer)
  with pytest.raises(ValueError, match="loss must be scalar"):
    vector = LossOutput(Weighted(jnp.ones(3), jnp.ones(3)), {})
    accumulate(toy.make(loss=lambda *_: vector), params, {}, (), toy.batch(), jax.random.key(0))


def test_low_precision_compute_keeps_float32_masters():
  def loss(params, frozen, extra, batch, key):
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    return toy.loss(low, frozen, extra, batch, key)

  state, _ = run(toy.make(loss=loss))
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
  gradients, _ = accumulate(
    toy.make(loss=loss), state.params, toy.make().frozen, (), toy.batch(), jax.random.key(0)
  )
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
