"""Training the sparse autoencoder by the common step and loop (tests 28 and 30, and exact resumption)."""

import jax
import numpy as np
import pytest

from nr.models.sparse_autoencoder import SparseAutoencoderSpec
from nr.recipes.activations import ActivationBatches
from nr.training.defaults import get_training_config
from nr.training.loop import train
from tests.laws import synthetic_dictionary
from tests.laws.synthetic_dictionary import make_method
from tests.training import method_suite


def make_config(steps, **changes):
  config = get_training_config()
  config.update({"steps": steps, "clip": 0.0, "progress": False, "batch_size": 256, **changes})
  config.optimizer.update({"name": "adam", "learning_rate": 5e-3, "beta2": 0.999, "epsilon": 6.25e-10})
  config.schedule.name = "constant"
  return config


def unexplained(model, x_ND):
  u_ND = model.normalise(x_ND).values_TD
  error_ND = u_ND - model.decode_activations(model.activations(u_ND)) - model.pre_bias[...]
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


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka", "jumprelu", "gated", "relu"])
def test_every_architecture_has_its_golden_tree_of_parameters(arch):
  method = make_method(SparseAutoencoderSpec(12, 32, 6, arch=arch), np.eye(12, dtype=np.float32))
  method_suite.check_golden_parameters(method, f"sparse_autoencoder_{arch}")
  method_suite.check_master_parameters_are_float32(method)


# Where no number of active latents is set, the weight that gives about the true one.
RECOVERY = {
  "topk": {},
  "batchtopk": {},
  "matryoshka": {},
  "jumprelu": {"sparsity": 0.1, "bandwidth": 0.5},
  "gated": {"sparsity": 0.2},
  "relu": {"sparsity": 0.02},
}


@pytest.fixture(scope="module")
def dictionary():
  atoms_AD = synthetic_dictionary.make_atoms()
  data_SND = [
    synthetic_dictionary.draw(atoms_AD, synthetic_dictionary.ROWS, 100 + step) for step in range(600)
  ]
  return atoms_AD, np.stack(data_SND), synthetic_dictionary.draw(atoms_AD, 4000, 7)


@pytest.mark.parametrize("arch", RECOVERY)
def test_30_a_known_sparse_dictionary_is_recovered(arch, dictionary):
  # 2 active non-negative atoms out of 64 in 32 dimensions. What a linear encoder cannot tell apart (the
  # other atom, with a squared cosine of 1/57 on average) leaves some 2 % of the variance unexplained.
  atoms_AD, data_SND, test_ND = dictionary
  state, spec = synthetic_dictionary.train(arch, data_SND, **RECOVERY[arch])
  rows_CD = np.asarray(state.params["decoder"]["kernel"])
  assert np.abs(np.linalg.norm(rows_CD, axis=1) - 1).max() < 1e-5  # test 28, through the common step
  assert (atoms_AD @ rows_CD.T).max(1).mean() > 0.9
  used_spec, params, model = synthetic_dictionary.used(state, spec)
  assert unexplained(model, test_ND) < 0.05
  if arch in ("batchtopk", "matryoshka"):
    # One threshold, found on training batches, keeps about as many as the selection over a batch.
    assert used_spec.arch == "jumprelu" and len(np.unique(params["threshold"])) == 1
    active = (model.activations(model.normalise(test_ND).values_TD) > 0).sum(-1).mean()
    assert 0.9 * spec.k < active < 1.1 * spec.k


class Windows:
  """Windows of random tokens."""

  def __len__(self):
    return 30

  def __getitem__(self, index):
    tokens = np.random.default_rng(index).integers(0, 50, 8)
    return {"tokens": tokens, "weights": np.append(np.ones(7, np.float32), np.float32(0))}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["topk", "matryoshka"])
def test_resumed_training_on_streamed_activations_is_bit_exact(tmp_path, arch):
  table_VD = np.random.default_rng(1).normal(size=(50, 12)).astype(np.float32)

  def make_data():
    def tap(batch):
      return table_VD[batch["tokens"]] + batch["tokens"][..., :1] / 50

    return ActivationBatches(Windows(), tap, batch_size=16, seed=0, chunk_batches=3)

  spec = SparseAutoencoderSpec(12, 32, 4, k_aux=8, dead_tokens=40, arch=arch)
  method = make_method(spec, make_data().sample(64))
  whole = train(make_config(9, batch_size=16), method, make_data(), (), tmp_path / "whole")
  train(make_config(4, batch_size=16), method, make_data(), (), tmp_path / "parts")
  parts = train(make_config(9, batch_size=16), method, make_data(), (), tmp_path / "parts")
  assert int(parts.state.step) == 9
  jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)
  # Some latents are dead by now: the counters took part in what was resumed.
  assert (np.asarray(whole.state.extra["tokens_since_fired"]) > spec.dead_tokens).any()
  assert arch == "topk" or whole.state.extra["threshold"] > 0
