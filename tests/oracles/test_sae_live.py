"""Sparse autoencoders against SAELens and sparsify, live: trained files open there and score the same."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch (extra [oracles])")

from nr.evaluation.sae_metrics import LatentSums, ReconstructionSums, autoencoding  # noqa: E402
from nr.interchange.sae import open_autoencoder  # noqa: E402
from nr.interchange.sae_save import save_saelens, save_sparsify  # noqa: E402
from nr.models.sparse_autoencoder_spec import ARCHITECTURES  # noqa: E402
from tests.golden import make_sae_goldens  # noqa: E402
from tests.interchange.test_sae_layouts import GOLDEN, SAELENS  # noqa: E402
from tests.laws import synthetic_dictionary  # noqa: E402

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def sae_lens():
  return pytest.importorskip("sae_lens", reason="needs SAELens: pip install sae-lens")


@pytest.fixture(scope="module")
def sparsify():
  return pytest.importorskip("sparsify", reason="needs sparsify: pip install eai-sparsify")


@pytest.fixture(scope="module")
def atoms():
  return synthetic_dictionary.make_atoms()


@pytest.mark.parametrize("decoder_norm", ["unit", "scaled"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_trained_file_opens_in_saelens_and_scores_the_same(sae_lens, arch, decoder_norm, atoms, tmp_path):
  data = np.stack([synthetic_dictionary.draw(atoms, 256, seed) for seed in range(60)])
  state, spec = synthetic_dictionary.train(arch, data, decoder_norm=decoder_norm)
  spec, params, model = synthetic_dictionary.used(state, spec)
  save_saelens(tmp_path, spec, jax.device_get(params), {"hook_name": "blocks.5.hook_resid_post"})
  theirs = sae_lens.SAE.load_from_disk(tmp_path)
  # Not all of the activations have one scale and mean: normalisation takes part.
  x = 3 * synthetic_dictionary.draw(atoms, 500, 99) + 0.5
  latents, reconstruction = make_sae_goldens.run_saelens(theirs, x)
  coded = autoencoding(model)(x)
  dense = model.activations(coded.inputs)
  np.testing.assert_allclose(dense, latents, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(coded.raw_outputs, reconstruction, rtol=1e-4, atol=1e-4)
  counted = np.ones(len(x), bool)
  ours = ReconstructionSums.of(x, coded.raw_outputs, counted)
  told = 1 - ((x - reconstruction) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
  np.testing.assert_allclose(1 - ours.fvu, told, atol=1e-5)
  sums = LatentSums.of(coded.values, coded.indices, counted, spec.num_latents, spec.max_active)
  assert abs(float(sums.active) - (latents > 0).sum()) <= 2  # a score may lie within rounding of a threshold
  # And back: what SAELens saves of it is what we wrote.
  theirs.save_model(tmp_path / "again")
  again = open_autoencoder(
    tmp_path / "again", k=spec.k, dead_tokens=spec.dead_tokens, decoding="dense", top_k="lax"
  )
  assert again.spec.arch == spec.arch and again.origin["hook_name"] == "blocks.5.hook_resid_post"
  jax.tree.map(np.testing.assert_array_equal, again.read_params(), jax.device_get(params))


def test_a_trained_file_opens_in_sparsify_and_scores_the_same(sparsify, atoms, tmp_path):
  data = np.stack([synthetic_dictionary.draw(atoms, 256, seed) for seed in range(60)])
  state, spec = synthetic_dictionary.train("topk", data, normalisation="none")
  spec, params, model = synthetic_dictionary.used(state, spec)
  save_sparsify(tmp_path, spec, jax.device_get(params))
  theirs = sparsify.SparseCoder.load_from_disk(tmp_path)
  x = synthetic_dictionary.draw(atoms, 500, 99)
  latents, reconstruction = make_sae_goldens.run_sparsify(theirs, x)
  coded = autoencoding(model)(x)
  np.testing.assert_allclose(model.activations(coded.inputs), latents, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(coded.raw_outputs, reconstruction, rtol=1e-4, atol=1e-5)
  theirs.save_to_disk(tmp_path / "again")
  again = open_autoencoder(tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, again.read_params(), jax.device_get(params))


@pytest.mark.parametrize("name", SAELENS)
def test_the_committed_numbers_are_those_of_saelens(sae_lens, name):
  folder = GOLDEN / f"sae_saelens_{name}"
  expected = np.load(folder / "expected.npz")
  found = make_sae_goldens.run_saelens(sae_lens.SAE.load_from_disk(folder), expected["x"])
  np.testing.assert_allclose(found[0], expected["latents"], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found[1], expected["reconstruction"], rtol=1e-5, atol=1e-6)


def test_the_committed_numbers_are_those_of_sparsify(sparsify):
  expected = np.load(GOLDEN / "sae_sparsify" / "expected.npz")
  theirs = sparsify.SparseCoder.load_from_disk(GOLDEN / "sae_sparsify")
  found = make_sae_goldens.run_sparsify(theirs, expected["x"])
  np.testing.assert_allclose(found[0], expected["latents"], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found[1], expected["reconstruction"], rtol=1e-5, atol=1e-6)
