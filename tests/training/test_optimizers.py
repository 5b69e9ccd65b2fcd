"""Optimizers: against torch's formulas in NumPy, masks by path, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.training import trees
from nr.training.optimizers import make_optimizer
from tests.training import toy


def adamw(params, gradients, moments, count, *, rate, decay, beta1=0.9, beta2=0.95, epsilon=1e-8):
  """AdamW as in arXiv 1711.05101, algorithm 2, written per array in NumPy."""
  first, second = moments
  first = beta1 * first + (1 - beta1) * gradients
  second = beta2 * second + (1 - beta2) * gradients**2
  corrected = (first / (1 - beta1**count)) / (np.sqrt(second / (1 - beta2**count)) + epsilon)
  return params - rate * (corrected + decay * params), (first, second)


def test_adamw_follows_the_paper_and_decays_only_what_matches():
  config = toy.config(schedule__name="constant", clip=0.0)
  method = toy.make(decay=("kernel",))
  optimizer = make_optimizer(config, method)
  rng = np.random.default_rng(0)
  params = {name: rng.normal(size=(3, 2)) for name in ("kernel", "bias")}
  tree = jax.tree.map(jnp.float32, params)
  state = optimizer.init(tree)
  moments = {name: (np.zeros((3, 2)), np.zeros((3, 2))) for name in params}
  for count in range(1, 5):
    gradients = {name: rng.normal(size=(3, 2)) for name in params}
    updates, state = optimizer.update(jax.tree.map(jnp.float32, gradients), state, tree)
    tree = jax.tree.map(jnp.add, tree, updates)
    for name in params:
      decay = 0.1 if name == "kernel" else 0.0
      params[name], moments[name] = adamw(
        params[name], gradients[name], moments[name], count, rate=1e-2, decay=decay
      )
      np.testing.assert_allclose(tree[name], params[name], rtol=2e-5, atol=1e-6)


def test_clip_scales_to_the_global_norm():
  config = toy.config(
    optimizer__name="sgd", optimizer__beta1=0.0, optimizer__weight_decay=0.0,
    optimizer__learning_rate=1.0, schedule__name="constant", clip=0.5,
  )  # fmt: skip
  optimizer = make_optimizer(config, toy.make())
  tree = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
  np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.3, -0.4], rtol=1e-6)
  small = {"a": jnp.array([0.03]), "b": jnp.array([0.04])}
  updates, _ = optimizer.update(small, optimizer.init(small), small)
  np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.03, -0.04], rtol=1e-6)


def test_patterns_do_not_see_layer_numbers():
  stacked = {"blocks": {"mlp": {"kernel": 0, "bias": 0}}}
  apart = {"blocks": {0: {"mlp": {"kernel": 0, "bias": 0}}, 1: {"mlp": {"kernel": 0, "bias": 0}}}}
  for tree in (stacked, apart):
    found = jax.tree.leaves(trees.match_mask(tree, ("blocks/mlp/kernel",)))
    assert sum(found) == len(found) / 2
  assert not any(jax.tree.leaves(trees.match_mask(stacked, ("mlp/kernel",)))), "patterns match whole paths"


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(optimizer__name="adamm"), "optimizer.name: 'adamm' is unknown; choose one of adamw, adam, sgd"),
    (dict(schedule__name="cosin"), "schedule.name: 'cosin' is unknown"),
    (dict(schedule__warmup_steps=9), "schedule.warmup_steps: 9 must lie between 0 and the 8 steps"),
    (dict(schedule__final_fraction=2.0), "schedule.final_fraction: 2.0"),
    (dict(optimizer__name="adam"), "optimizer.weight_decay: 0.1 has no meaning for 'adam'"),
    (dict(optimizer__beta2=1.0), "optimizer.beta2: 1.0 must lie in"),
    (dict(optimizer__learning_rate=float("nan")), "optimizer.learning_rate: nan"),
    (dict(clip=-1.0), "clip: -1.0"),
  ],
)
def test_bad_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    make_optimizer(toy.config(**changes), toy.make())
