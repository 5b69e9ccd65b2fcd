"""Training the sparse autoencoder by the common step and loop (tests 28 and 30, and exact resumption)."""

import jax
import numpy as np
import pytest

from nr.models import parameters
from nr.models import sparse_autoencoder as sae
from nr.models.sparse_autoencoder import SparseAutoencoderSpec
from nr.objectives import sparse_coding
from nr.recipes.activations import ActivationBatches
from nr.recipes.cocomix.method import sparse_autoencoder_method
from nr.training.defaults import get_training_config
from nr.training.loop import train
from nr.training.model_files import graphdef_of
from nr.training.optimizers import make_optimizer
from nr.training.state import initial_params, initial_state
from nr.training.step import make_train_step
from tests.training import method_suite


def make_method(spec, sample_ND):
  normalised_ND = sae.normalise(sample_ND, spec.epsilon).values_TD
  scale = float(sparse_coding.error_scale(normalised_ND))
  return sparse_autoencoder_method(spec, sae.initial_pre_bias(spec, sample_ND), scale)


def make_config(steps, **changes):
  config = get_training_config()
  config.update({"steps": steps, "clip": 0.0, "progress": False, "batch_size": 256, **changes})
  config.optimizer.update({"name": "adam", "learning_rate": 5e-3, "beta2": 0.999, "epsilon": 6.25e-10})
  config.schedule.name = "constant"
  return config


def unexplained(spec, params, x_ND):
  model = parameters.merge(graphdef_of(spec), params)
  u_ND = model.normalise(x_ND).values_TD
  error_ND = u_ND - model.decode(model.encode(u_ND))
  return float((error_ND**2).sum() / ((u_ND - u_ND.mean(0)) ** 2).sum())


@pytest.mark.slow
def test_sparse_autoencoder_method_passes_the_suite(tmp_path):
  rng = np.random.default_rng(0)
  x_ND = (rng.normal(size=(16, 12)) * 2 + 1).astype(np.float32)
  weights = np.ones(16, np.float32)
  weights[[1, 2, 3, 9]] = 0
  # No latent dies: with dead ones the auxiliary term is a ratio of means over the microbatch.
  method = make_method(SparseAutoencoderSpec(12, 32, 6, k_aux=8), x_ND)
  meshes = ({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1},)  # more in test_cocomix_sae_sharding
  batch = {"activations": x_ND, "weights": weights}
  method_suite.check_all(method, batch, tmp_path, golden="sparse_autoencoder", meshes=meshes)


@pytest.mark.slow
def test_30_a_known_sparse_dictionary_is_recovered():
  # 4 active non-negative atoms out of 96 in 64 dimensions. What a linear encoder cannot tell apart
  # (about 3 other atoms with squared cosine 1/64 each) leaves some 4 % of the variance unexplained.
  width, num_atoms, active, steps, batch = 64, 96, 4, 600, 256
  rng = np.random.default_rng(0)
  atoms_AD = rng.normal(size=(num_atoms, width))
  atoms_AD -= atoms_AD.mean(1, keepdims=True)  # the normalisation removes the mean
  atoms_AD /= np.linalg.norm(atoms_AD, axis=1, keepdims=True)

  def draw(count):
    chosen = rng.random((count, num_atoms)).argsort(1)[:, :active]
    coefficients = np.zeros((count, num_atoms))
    np.put_along_axis(coefficients, chosen, rng.uniform(0.5, 1.5, (count, active)), 1)
    return (coefficients @ atoms_AD).astype(np.float32)

  spec = SparseAutoencoderSpec(
    width, 2 * num_atoms, active, k_aux=32, dead_tokens=5000, decoding="dense", top_k="lax"
  )
  method = make_method(spec, draw(2048))
  config = make_config(steps)
  config.schedule.name = "linear"
  optimizer = make_optimizer(config, method)
  state = initial_state(method, optimizer, initial_params(method, 0))
  step = make_train_step(method, optimizer)
  test_ND = draw(4000)
  assert unexplained(spec, state.params, test_ND) > 0.5
  for _ in range(steps):
    state, _ = step(state, {}, {"activations": draw(batch), "weights": np.ones(batch, np.float32)})
  rows_CD = np.asarray(state.params["decoder"]["kernel"])
  assert (atoms_AD @ rows_CD.T).max(1).mean() > 0.9
  assert unexplained(spec, state.params, test_ND) < 0.05
  assert np.abs(np.linalg.norm(rows_CD, axis=1) - 1).max() < 1e-5  # test 28, through the common step


class Windows:
  """Windows of random tokens."""

  def __len__(self):
    return 30

  def __getitem__(self, index):
    tokens = np.random.default_rng(index).integers(0, 50, 8)
    return {"tokens": tokens, "weights": np.append(np.ones(7, np.float32), np.float32(0))}


@pytest.mark.slow
def test_resumed_training_on_streamed_activations_is_bit_exact(tmp_path):
  table_VD = np.random.default_rng(1).normal(size=(50, 12)).astype(np.float32)

  def make_data():
    def tap(batch):
      return table_VD[batch["tokens"]] + batch["tokens"][..., :1] / 50

    return ActivationBatches(Windows(), tap, batch_size=16, seed=0, chunk_batches=3)

  spec = SparseAutoencoderSpec(12, 32, 4, k_aux=8, dead_tokens=40)
  method = make_method(spec, make_data().sample(64))
  whole = train(make_config(9, batch_size=16), method, make_data(), (), tmp_path / "whole")
  train(make_config(4, batch_size=16), method, make_data(), (), tmp_path / "parts")
  parts = train(make_config(9, batch_size=16), method, make_data(), (), tmp_path / "parts")
  assert int(parts.state.step) == 9
  jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)
  # Some latents are dead by now: the counters took part in what was resumed.
  assert (np.asarray(whole.state.extra["tokens_since_fired"]) > spec.dead_tokens).any()
