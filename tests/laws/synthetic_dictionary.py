"""Data from a known sparse dictionary, and training on it: for the recovery test and for files of trained models."""

import jax
import jax.numpy as jnp
import numpy as np

from nr.models import parameters
from nr.models import sparse_autoencoder as sae
from nr.models.sparse_autoencoder_spec import SparseAutoencoderSpec
from nr.models.sparse_autoencoder_start import inference_form, initial_pre_bias
from nr.objectives import sparse_coding
from nr.recipes.cocomix.method import sparse_autoencoder_method
from nr.training.defaults import get_training_config
from nr.training.model_files import graphdef_of
from nr.training.optimizers import make_optimizer
from nr.training.state import initial_params, initial_state
from nr.training.step import make_train_step

WIDTH, ATOMS, ACTIVE, ROWS = 32, 64, 2, 256


def make_atoms(seed=0):
  """Unit atoms [A, D] without mean (the normalisation removes it), as far apart as a few steps bring them."""
  rng = np.random.default_rng(seed)
  atoms_AD = rng.normal(size=(ATOMS, WIDTH))
  for _ in range(200):
    atoms_AD -= atoms_AD.mean(1, keepdims=True)
    atoms_AD /= np.linalg.norm(atoms_AD, axis=1, keepdims=True)
    gram = atoms_AD @ atoms_AD.T - np.eye(ATOMS)
    atoms_AD -= 0.3 * gram**3 @ atoms_AD
  atoms_AD -= atoms_AD.mean(1, keepdims=True)
  return atoms_AD / np.linalg.norm(atoms_AD, axis=1, keepdims=True)


def draw(atoms_AD, count, seed):
  """Sums of a few atoms with coefficients that are not negative."""
  rng = np.random.default_rng(seed)
  chosen = rng.random((count, ATOMS)).argsort(1)[:, :ACTIVE]
  coefficients = np.zeros((count, ATOMS))
  np.put_along_axis(coefficients, chosen, rng.uniform(0.5, 1.5, (count, ACTIVE)), 1)
  return (coefficients @ atoms_AD).astype(np.float32)


def make_method(spec, sample_ND):
  normalised_ND = sae.normalise(sample_ND, spec.epsilon, spec.normalisation).values_TD
  scale = float(sparse_coding.error_scale(normalised_ND))
  return sparse_autoencoder_method(spec, initial_pre_bias(spec, sample_ND), scale)


def train(arch, data_SND, *, learning_rate=5e-3, **settings):
  """Trains on the batches in turn, in one compiled loop. Returns (training state, settings)."""
  options = {"num_latents": 2 * ATOMS, "k": ACTIVE, "dead_tokens": 5000, "decoding": "dense", "top_k": "lax"}
  spec = SparseAutoencoderSpec(**{"model_dim": WIDTH, "arch": arch, **options, **settings})
  method = make_method(spec, data_SND[:8].reshape(-1, WIDTH))
  config = get_training_config()
  config.update({"steps": len(data_SND), "clip": 0.0, "progress": False, "batch_size": ROWS})
  config.optimizer.update(
    {"name": "adam", "learning_rate": learning_rate, "beta2": 0.999, "epsilon": 6.25e-10}
  )
  config.schedule.name = "linear"
  optimizer = make_optimizer(config, method)
  step = make_train_step(method, optimizer)
  ones_N = jnp.ones(data_SND.shape[1])

  @jax.jit
  def run(state, data_SND):
    def one(state, x_ND):
      return step(state, {}, {"activations": x_ND, "weights": ones_N})[0], None

    return jax.lax.scan(one, state, data_SND)[0]

  return run(initial_state(method, optimizer, initial_params(method, 0)), jnp.asarray(data_SND)), spec


def used(state, spec):
  """The trained autoencoder as it is used: (settings, parameters, module)."""
  spec, params = inference_form(spec, state.params, state.extra.get("threshold"))
  return spec, params, parameters.merge(graphdef_of(spec), params)
