"""Training in closed form: schedules, a quadratic whose every step is known, weighted sums."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.objectives.weighted import LossOutput, Weighted
from nr.training import sharding
from nr.training.method import Method
from nr.training.optimizers import make_optimizer, make_schedule
from nr.training.state import create_state
from nr.training.step import make_train_step
from tests.training import toy


def test_cosine_schedule_is_that_of_the_paper():
  # 20 B tokens, 69 M parameters: 40,000 steps, 130 of warm-up, 6e-4 down to 6e-5.
  rate = make_schedule("cosine", 6e-4, steps=40_000, warmup_steps=130, final_fraction=0.1)
  for count in (0, 1, 129, 130, 131, 10_000, 39_999, 40_000):
    if count < 130:
      factor = count / 130
    else:
      factor = 0.1 + 0.9 * (1 + math.cos(math.pi * (count - 130) / (40_000 - 130))) / 2
    assert float(rate(count)) == pytest.approx(6e-4 * factor, rel=1e-5, abs=1e-12)
  assert float(rate(0)) == 0
  assert float(rate(40_000)) == pytest.approx(6e-5, rel=1e-5)
  assert float(rate(50_000)) == pytest.approx(6e-5, rel=1e-5), "the rate stays at its floor"


def test_linear_and_constant_schedules():
  linear = make_schedule("linear", 1.0, steps=10, final_fraction=0.0)
  np.testing.assert_allclose([float(linear(t)) for t in range(11)], 1 - np.arange(11) / 10, atol=1e-6)
  constant = make_schedule("constant", 0.5, steps=10, warmup_steps=2)
  assert [float(constant(t)) for t in (0, 1, 2, 9)] == [0.0, 0.25, 0.5, 0.5]


def quadratic() -> Method:
  """Mean over weighted rows of (w - target)^2 / 2: the gradient is w - weighted mean."""

  def loss(params, frozen, extra, batch, key):
    return LossOutput(Weighted.of(0.5 * jnp.square(params["w"] - batch["targets"]), batch["weights"]), {})

  return Method("quadratic", lambda key: {"w": jnp.zeros(())}, loss, {"w": ()})


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_descent_on_a_quadratic_follows_the_geometric_series(accumulation):
  config = toy.config(
    optimizer__name="sgd", optimizer__beta1=0.0, optimizer__weight_decay=0.0,
    optimizer__learning_rate=0.25, schedule__name="constant", clip=0.0,
  )  # fmt: skip
  method = quadratic()
  optimizer = make_optimizer(config, method)
  state = create_state(method, optimizer, 0)
  batch = toy.batch()
  batch = {"targets": batch["targets"][:, 0], "weights": batch["weights"]}
  mean = (batch["targets"] * batch["weights"]).sum() / batch["weights"].sum()
  step = make_train_step(method, optimizer, accumulation)
  for done in range(1, 6):
    state, metrics = step(state, {}, sharding.put_batch(batch, None))
    assert float(state.params["w"]) == pytest.approx(mean * (1 - 0.75**done), rel=1e-5)
  assert float(metrics["gradient_norm"].mean()) == pytest.approx(abs(mean) * 0.75**4, rel=1e-5)
  assert float(metrics["loss"].weight) == batch["weights"].sum()


def test_first_adam_step_has_the_size_of_the_learning_rate():
  config = toy.config(optimizer__weight_decay=0.0, schedule__name="constant", clip=0.0)
  method = toy.make()
  optimizer = make_optimizer(config, method)
  start = jax.device_get(create_state(method, optimizer, 0).params)
  state, _ = make_train_step(method, optimizer)(
    create_state(method, optimizer, 0), method.frozen, sharding.put_batch(toy.batch(), None)
  )
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start, jax.device_get(state.params))
  assert all(step == pytest.approx(1e-2, rel=1e-3) for step in jax.tree.leaves(moved))


def test_warmed_up_run_does_not_move_in_its_first_step():
  config = toy.config(schedule__warmup_steps=4)
  method = toy.make()
  optimizer = make_optimizer(config, method)
  start = jax.device_get(create_state(method, optimizer, 0).params)
  state, metrics = make_train_step(method, optimizer)(
    create_state(method, optimizer, 0), method.frozen, sharding.put_batch(toy.batch(), None)
  )
  jax.tree.map(np.testing.assert_array_equal, start, jax.device_get(state.params))
  assert float(metrics["learning_rate"].mean()) == 0
