"""The shared suite on the toy method, and that each of its checks can fail."""

import jax
import jax.numpy as jnp
import pytest

from nr.objectives.weighted import LossOutput, Weighted
from tests.training import method_suite, toy


def test_toy_method_passes_the_whole_suite(tmp_path):
  meshes = (*method_suite.MESHES, dict(data=2, fsdp=2, tensor=2, sequence=1))
  method_suite.check_all(toy.make(), toy.batch(), tmp_path, golden="toy", meshes=meshes)


def test_partly_trained_toy_passes(tmp_path):
  method = toy.make(trainable=("outer/.*",))
  method_suite.check_gradients_reach_every_trainable_leaf(method, toy.batch())
  method_suite.check_frozen_stay(method, toy.batch())


def test_suite_notices_a_leaf_without_gradient():
  def loss(params, frozen, extra, batch, key):
    cut = params | {"inner": jax.lax.stop_gradient(params["inner"])}
    return toy.loss(cut, frozen, extra, batch, key)

  with pytest.raises(AssertionError, match="no gradient reaches trainable parameter inner/"):
    method_suite.check_gradients_reach_every_trainable_leaf(toy.make(loss=loss), toy.batch())


def test_suite_notices_a_mean_of_means():
  def loss(params, frozen, extra, batch, key):
    output = toy.loss(params, frozen, extra, batch, key)
    return LossOutput(Weighted(output.loss.mean(), jnp.float32(1)), {}, output.statistics)

  with pytest.raises(AssertionError, match="4 microbatches"):
    method_suite.check_microbatches_agree(toy.make(loss=loss), toy.batch())


def test_suite_notices_changed_goldens(tmp_path, monkeypatch):
  monkeypatch.setenv(method_suite.UPDATE, "1")
  method_suite.check_golden_metrics(toy.make(), toy.batch(), "changed", tmp_path)
  method_suite.check_golden_parameters(toy.make(), "changed", tmp_path)
  monkeypatch.delenv(method_suite.UPDATE)
  doubled = toy.make(frozen={"scale": jnp.full((toy.DIM,), 1.0)})
  with pytest.raises(AssertionError, match="A change is legitimate only when initialisation"):
    method_suite.check_golden_metrics(doubled, toy.batch(), "changed", tmp_path)
  renamed = toy.make(init=lambda key: {"other": toy.init(key)})
  with pytest.raises(AssertionError, match="checkpoints are meant to become unreadable"):
    method_suite.check_golden_parameters(renamed, "changed", tmp_path)
