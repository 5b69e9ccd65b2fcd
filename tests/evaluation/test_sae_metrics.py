"""Metrics of the sparse autoencoder: numbers known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.evaluation import sae_metrics
from nr.evaluation.sae_metrics import Autoencoding, LatentSums, ReconstructionSums, TappedModel
from nr.models import parameters
from nr.models import sparse_autoencoder as sae
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec, SparseCode
from nr.models.transformer import Transformer, TransformerSpec

WIDTH = 6


def cloud(tokens=200, offset=1000.0):
  """Activations whose mean is far larger than their spread."""
  return jnp.asarray(np.random.default_rng(0).normal(size=(tokens, WIDTH)) + offset, jnp.float32)


def sums_in(x, x_hat, batches):
  pieces = zip(np.array_split(x, batches), np.array_split(x_hat, batches))
  sums = [ReconstructionSums.of(a, b, jnp.ones(len(a), bool)) for a, b in pieces]
  total = sums[0]
  for other in sums[1:]:
    total = total.merge(other)
  return total


def test_31_fvu_of_the_mean_is_one_and_of_the_identity_zero():
  x = cloud()
  mean = jnp.broadcast_to(jnp.asarray(np.asarray(x, np.float64).mean(0), jnp.float32), x.shape)
  np.testing.assert_allclose(sums_in(x, mean, 1).fvu, 1, rtol=1e-4)
  assert sums_in(x, x, 1).fvu == 0
  # About zero instead of the mean, predicting the mean would look nearly perfect.
  assert np.square(x - mean).sum() / np.square(x).sum() < 1e-4


@pytest.mark.parametrize("batches", [2, 10, 17])
def test_31_aggregation_does_not_depend_on_batches(batches):
  x = cloud()
  x_hat = x + 0.3 * cloud(offset=0.1)[::-1]
  one, many = sums_in(x, x_hat, 1), sums_in(x, x_hat, batches)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), one, many)
  x64, y64 = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
  expected = ((x64 - y64) ** 2).sum() / ((x64 - x64.mean(0)) ** 2).sum()
  np.testing.assert_allclose(many.fvu, expected, rtol=1e-4)


def test_other_sums_equal_their_definitions():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(2, 50, WIDTH)).astype(np.float32)
  sums = sums_in(x, y, 3)
  norm_x, norm_y = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
  np.testing.assert_allclose(sums.cosine, ((x * y).sum(-1) / norm_x / norm_y).sum(), rtol=1e-4)
  np.testing.assert_allclose(sums.norm_ratio, (norm_y / norm_x).sum(), rtol=1e-5)
  relative = ((x - y) ** 2).mean(-1) / (x**2).mean(-1)
  np.testing.assert_allclose(sums.relative_error, relative.sum(), rtol=1e-5)
  np.testing.assert_allclose(sums.squared_output / sums.inner, (y**2).sum() / (x * y).sum(), rtol=1e-4)


def test_tokens_that_do_not_count_may_hold_anything():
  x = cloud(20)
  counted = jnp.arange(20) < 12
  broken = jnp.where(counted[:, None], x, jnp.nan)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    ReconstructionSums.of(broken, broken + 1, counted),
    ReconstructionSums.of(x[:12], x[:12] + 1, jnp.ones(12, bool)),
  )


def test_latents_are_counted_above_zero_only():
  values = jnp.asarray([[2.0, 0.0], [1.0, 3.0], [5.0, 1.0]])
  indices = jnp.asarray([[0, 1], [0, 2], [3, 1]])
  sums = LatentSums.of(values, indices, jnp.asarray([True, True, False]), 5)
  assert sums.fired_C.tolist() == [2, 0, 1, 0, 0] and sums.active == 3 and sums.count == 2
  assert sums.crowded == 0
  # The same with all latents written out, and room for one of them.
  dense = sae.densify(SparseCode(values, indices), 5)
  written = LatentSums.of(dense, None, jnp.asarray([True, True, False]), 5, max_active=1)
  assert written.fired_C.tolist() == [2, 0, 1, 0, 0] and written.active == 3 and written.crowded == 1
  assert sae_metrics.dead_fraction(np.array([5, 11, 10, 12]), 10) == 0.5


LENGTH, VOCABULARY = 5, 11


def toy_model():
  """Activations are a table look-up; losses a linear head on them, far from that of zeros."""
  rng = np.random.default_rng(2)
  table_VD = jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)) + 0.5, jnp.float32)
  head_DV = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32)

  def log_probs(x_BLD):
    return jax.nn.log_softmax(x_BLD @ head_DV)

  def losses(x_BLD, batch):
    return -jnp.take_along_axis(log_probs(x_BLD), batch["targets"][..., None], -1)[..., 0]

  def divergence(clean_BLD, changed_BLD, batch):
    clean, changed = log_probs(clean_BLD), log_probs(changed_BLD)
    return (jnp.exp(clean) * (clean - changed)).sum(-1)

  return TappedModel(lambda batch: table_VD[batch["tokens"]], losses, divergence)


def toy_batches(count=3, rows=4):
  rng = np.random.default_rng(3)
  batches = []
  for _ in range(count):
    tokens = rng.integers(0, VOCABULARY, (rows, LENGTH + 1))
    weights = np.ones((rows, LENGTH), np.float32)
    weights[:, -1] = 0
    batches.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
  return batches


def evaluate(reconstruct, batches):
  model = toy_model()

  def autoencode(x_BLD):
    y_BLD = reconstruct(x_BLD)
    code = jnp.zeros((*x_BLD.shape[:2], 2))
    return Autoencoding(x_BLD, y_BLD, y_BLD, code, code.astype(jnp.int32))

  measure = jax.jit(lambda mean, batch: sae_metrics.measure_batch(model, autoencode, 7, mean, batch))
  return sae_metrics.summarise(sae_metrics.evaluate(batches, measure, model.activations))


def test_32_identity_costs_nothing_and_recovers_everything():
  metrics = evaluate(lambda x: x, toy_batches())
  assert metrics["delta_ce"] == 0 and metrics["loss_recovered"] == 1 and metrics["loss_recovered_mean"] == 1
  assert metrics["kl"] == 0 and metrics["fvu"] == 0 and metrics["fvu_raw_without_first"] == 0
  assert metrics["explained_variance"] == 1 and metrics["kl_recovered"] == 1 and metrics["kl_zero"] > 0.1
  assert metrics["evaluation_tokens"] == 3 * 4 * LENGTH and metrics["never_active_fraction"] == 1


def test_32_zeros_recover_nothing():
  metrics = evaluate(jnp.zeros_like, toy_batches())
  assert metrics["loss_recovered"] == 0
  np.testing.assert_allclose(metrics["delta_ce"], metrics["ce_zero"] - metrics["ce_clean"], rtol=1e-6)
  np.testing.assert_allclose(metrics["ce_zero"], np.log(VOCABULARY), rtol=1e-5)
  assert abs(metrics["delta_ce"]) > 0.1 and metrics["kl"] > 0.1
  assert metrics["kl_recovered"] == 0 and metrics["kl"] == metrics["kl_zero"]


def test_32_the_mean_recovers_nothing_against_mean_ablation():
  mean_D = np.mean([toy_model().activations(batch) for batch in toy_batches()], axis=(0, 1, 2))
  metrics = evaluate(lambda x: jnp.broadcast_to(mean_D, x.shape), toy_batches())
  np.testing.assert_allclose(
    [metrics["loss_recovered_mean"], metrics["kl_recovered_mean"], metrics["explained_variance"]],
    0,
    atol=1e-5,
  )
  assert metrics["kl_mean"] > 0.01 and metrics["kl_recovered"] > 0.01


@pytest.mark.parametrize("arch", ["topk", "jumprelu", "gated", "relu"])
def test_an_autoencoder_of_every_architecture_is_measured_whole(arch):
  # Room for one latent in a sparse code; the metrics are of all that are active.
  spec = SparseAutoencoderSpec(
    WIDTH, 16, 3 if arch == "topk" else 1, arch=arch, **({} if arch == "topk" else {"max_active": 1})
  )
  module = SparseAutoencoder(spec, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 7, WIDTH)), jnp.float32)
  coded = sae_metrics.autoencoding(module)(x)
  normalised = module.normalise(x)
  dense = module.activations(normalised.values_TD)
  np.testing.assert_allclose(coded.inputs, normalised.values_TD)
  np.testing.assert_allclose(coded.outputs, dense @ module.decoder.kernel[...], atol=1e-5)
  np.testing.assert_allclose(coded.raw_outputs, module.denormalise(coded.outputs, normalised), rtol=1e-6)
  sums = LatentSums.of(coded.values, coded.indices, jnp.ones((2, 7), bool), 16, spec.max_active)
  np.testing.assert_array_equal(sums.fired_C, (dense > 0).sum((0, 1)))
  assert sums.active == (dense > 0).sum() and (sums.crowded > 0) == (arch != "topk")


def test_losses_do_not_depend_on_batches():
  batches = toy_batches()
  joined = [{name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}]
  first, second = (evaluate(lambda x: x * 0.7 + 0.1, some) for some in (batches, joined))
  for name, value in first.items():
    np.testing.assert_allclose(value, second[name], rtol=1e-4, err_msg=name)


def test_32_transformer_binding_with_a_perfect_and_a_broken_autoencoder():
  spec = TransformerSpec.gpt2(vocab_size=VOCABULARY, num_layers=3, model_dim=8, num_heads=2, max_length=8)
  teacher = parameters.split(Transformer(spec, rngs=nnx.Rngs(0)))
  # 2 x 8 latents that read +u_d and -u_d: with all of them active the reconstruction is exact.
  wide = SparseAutoencoderSpec(8, 16, 16, k_aux=1)
  graphdef, params = parameters.split(SparseAutoencoder(wide, rngs=nnx.Rngs(0)))
  kernel = jnp.concatenate([jnp.eye(8), -jnp.eye(8)], 1)
  exact = {**params, "encoder": {"kernel": kernel}, "decoder": {"kernel": kernel.T}}
  metrics, fired = sae_metrics.evaluate_transformer(toy_batches(), teacher, (graphdef, exact), layer=1)
  np.testing.assert_allclose([metrics["fvu"], metrics["delta_ce"], metrics["kl"]], 0, atol=1e-5)
  np.testing.assert_allclose(metrics["l0"], 8, atol=0.01)
  assert fired.shape == (16,) and metrics["never_active_fraction"] == 0
  model = parameters.merge(*teacher)
  batch = {name: np.concatenate([b[name] for b in toy_batches()]) for name in toy_batches()[0]}
  log_probs = jax.nn.log_softmax(model(batch["tokens"]))
  losses = -np.take_along_axis(np.asarray(log_probs), batch["targets"][..., None], -1)[..., 0]
  np.testing.assert_allclose(metrics["ce_clean"], losses[:, :-1].mean(), rtol=1e-5)
  broken = {**exact, "decoder": {"kernel": jnp.zeros((16, 8))}}
  metrics, _ = sae_metrics.evaluate_transformer(toy_batches(), teacher, (graphdef, broken), layer=1)
  assert metrics["fvu"] > 0.9 and metrics["kl"] > 1e-6
  with pytest.raises(ValueError, match="layer=3 is outside the model: choose 0..2"):
    sae_metrics.evaluate_transformer(toy_batches(), teacher, (graphdef, exact), layer=3)
