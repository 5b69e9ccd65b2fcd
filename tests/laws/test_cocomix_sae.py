"""The TopK sparse autoencoder: numbered tests of the CoCoMix specification, section 12."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nr.models import parameters
from nr.models import sparse_autoencoder as sae
from nr.models import sparse_autoencoder_start as start
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec, SparseCode
from nr.objectives import sparse_coding

WIDTH, LATENTS, ACTIVE, TOKENS = 10, 24, 4, 32


def build(**changes):
  settings = {"k_aux": 6, "alpha": 1 / 32, "dead_tokens": 100, **changes}
  spec = SparseAutoencoderSpec(WIDTH, LATENTS, ACTIVE, **settings)
  graphdef, params = parameters.split(SparseAutoencoder(spec, rngs=nnx.Rngs(1)))
  rng = np.random.default_rng(0)
  params["pre_bias"] = jnp.asarray(rng.normal(size=WIDTH) * 0.2, jnp.float32)
  params["latent_bias"] = jnp.asarray(rng.normal(size=LATENTS) * 0.2, jnp.float32)
  return graphdef, params


def activations(seed=0, tokens=TOKENS):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, WIDTH)) * 3 + 1, jnp.float32)


def extra_with(dead=(), scale=1.0):
  extra = sparse_coding.init_extra(SparseAutoencoderSpec(WIDTH, LATENTS, ACTIVE), scale)
  counters = extra["tokens_since_fired"].at[jnp.asarray(dead, jnp.int32)].set(10_000)
  return {**extra, "tokens_since_fired": counters}


def loss_of(graphdef, params, extra, x, weights=None):
  return sparse_coding.topk_loss(parameters.merge(graphdef, params), extra, x, weights)


def numpy_loss(params, extra, x, k_aux=6, alpha=1 / 32, dead_tokens=100):
  """Section 5.3 in float64, written from the equations."""
  x = np.asarray(x, np.float64)
  u = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-5)
  encoder, decoder = (np.asarray(params[name]["kernel"], np.float64) for name in ("encoder", "decoder"))
  pre_bias = np.asarray(params["pre_bias"], np.float64)
  pre = (u - pre_bias) @ encoder + np.asarray(params["latent_bias"], np.float64)

  def keep(scores, k):
    kept = np.zeros_like(scores)
    top = np.argsort(-scores, -1, kind="stable")[:, :k]
    np.put_along_axis(kept, top, np.take_along_axis(scores, top, -1), -1)
    return np.maximum(kept, 0)

  code = keep(pre, ACTIVE)
  r = code @ decoder + pre_bias
  mse = np.mean((r - u) ** 2) * float(extra["mse_scale"])
  fired = (code > 1e-3).sum(0)
  counters = np.where(fired > 0, 0, np.asarray(extra["tokens_since_fired"]) + len(x))
  dead = counters > dead_tokens
  auxiliary = 0.0
  if dead.any():
    residual = u - r
    estimate = keep(np.where(dead, pre, -1e9), k_aux) @ decoder
    auxiliary = np.mean((estimate - residual) ** 2) / np.mean((residual - residual.mean(0)) ** 2)
  return mse + alpha * auxiliary, auxiliary, fired, counters


def test_normalisation_uses_the_unbiased_deviation_and_adds_epsilon_to_it():
  graphdef, params = build(epsilon=0.5)
  x = activations()
  normalised = parameters.merge(graphdef, params).normalise(x)
  x64 = np.asarray(x, np.float64)
  centred = x64 - x64.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).sum(-1, keepdims=True) / (WIDTH - 1))
  np.testing.assert_allclose(normalised.values_TD, centred / (deviation + 0.5), rtol=1e-5, atol=1e-6)
  # Brought back without the epsilon, as the released code does.
  back = parameters.merge(graphdef, params).denormalise(normalised.values_TD, normalised)
  expected = centred * deviation / (deviation + 0.5) + x64.mean(-1, keepdims=True)
  np.testing.assert_allclose(back, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dead", [(), (3,), tuple(range(0, LATENTS, 2)), tuple(range(LATENTS))])
def test_loss_equals_the_equations(dead):
  graphdef, params = build()
  extra = extra_with(dead, scale=0.7)
  output = loss_of(graphdef, params, extra, activations())
  loss, auxiliary, fired, counters = numpy_loss(params, extra, activations())
  np.testing.assert_allclose(output.loss.mean(), loss, rtol=1e-5)
  np.testing.assert_allclose(output.metrics["auxiliary"].mean(), auxiliary, rtol=1e-5)
  np.testing.assert_array_equal(output.statistics.fired_C, fired)
  updated = sparse_coding.update_extra(extra, params, output.statistics, 0)
  np.testing.assert_array_equal(updated["tokens_since_fired"], counters)
  assert updated["mse_scale"] == extra["mse_scale"]


def test_dense_and_gathered_decoding_agree():
  x = activations()
  losses = []
  for decoding in sae.DECODINGS:
    graphdef, params = build(decoding=decoding)
    loss = lambda p, g=graphdef: loss_of(g, p, extra_with(), x).loss.mean()  # noqa: E731
    losses.append(jax.value_and_grad(loss)(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *losses)


def test_tokens_of_weight_zero_change_nothing():
  graphdef, params = build()
  extra = extra_with((1, 5, 7))
  x = activations()
  padded = jnp.concatenate([x, jnp.full((8, WIDTH), jnp.nan)])
  weights = jnp.concatenate([jnp.ones(TOKENS), jnp.zeros(8)])
  plain, masked = loss_of(graphdef, params, extra, x), loss_of(graphdef, params, extra, padded, weights)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, masked)
  gradients = jax.grad(lambda p: loss_of(graphdef, p, extra, padded, weights).loss.mean())(params)
  expected = jax.grad(lambda p: loss_of(graphdef, p, extra, x).loss.mean())(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, expected)


def test_dead_counters_are_advanced_before_the_mask():
  graphdef, params = build(dead_tokens=TOKENS - 1)
  # Counters at 0: after this batch every latent that did not fire in it has TOKENS tokens of silence.
  output = loss_of(graphdef, params, extra_with(), activations()[:2].repeat(TOKENS // 2, 0))
  silent = (np.asarray(output.statistics.fired_C) == 0).mean()
  assert 0 < silent < 1
  np.testing.assert_allclose(output.metrics["dead_fraction"].mean(), silent, rtol=1e-6)
  # A latent that was dead and fires now is alive now.
  fired = np.flatnonzero(output.statistics.fired_C)
  revived = loss_of(graphdef, params, extra_with(fired), activations()[:2].repeat(TOKENS // 2, 0))
  np.testing.assert_allclose(revived.metrics["dead_fraction"].mean(), silent, rtol=1e-6)


def test_microbatches_agree_without_dead_latents():
  graphdef, params = build()
  x = activations()
  weights = jnp.asarray(np.random.default_rng(3).integers(0, 2, TOKENS), jnp.float32)
  whole = loss_of(graphdef, params, extra_with(), x, weights)
  parts = [
    loss_of(graphdef, params, extra_with(), x[i : i + 8], weights[i : i + 8]) for i in range(0, TOKENS, 8)
  ]
  summed = jax.tree.map(lambda *values: sum(values), *parts)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    whole,
    summed,
  )


def test_28_decoder_rows_keep_unit_norm_and_gradients_are_orthogonal():
  graphdef, params = build()
  optimizer = sparse_coding.unit_norm_decoder(optax.adam(0.05, eps=6.25e-10))
  state = optimizer.init(params)
  gradient = jax.jit(jax.grad(lambda p, x: loss_of(graphdef, p, extra_with((2, 3)), x).loss.mean()))
  update = jax.jit(optimizer.update)
  before = params["decoder"]["kernel"]
  for step in range(20):
    gradients = gradient(params, activations(step))
    rows = params["decoder"]["kernel"]
    projected = sparse_coding.remove_parallel(gradients["decoder"]["kernel"], rows)
    assert np.abs((projected * rows).sum(-1)).max() < 1e-6
    assert np.abs((gradients["decoder"]["kernel"] * rows).sum(-1)).max() > 1e-4
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    norms = np.linalg.norm(np.asarray(params["decoder"]["kernel"], np.float64), axis=-1)
    assert np.abs(norms - 1).max() < 1e-5
  assert np.abs(params["decoder"]["kernel"] - before).max() > 0.1


def test_28_other_leaves_step_as_the_inner_optimizer_alone():
  graphdef, params = build()
  gradients = jax.grad(lambda p: loss_of(graphdef, p, extra_with(), activations()).loss.mean())(params)
  inner = optax.sgd(0.1)
  wrapped = sparse_coding.unit_norm_decoder(inner)
  updates, _ = wrapped.update(gradients, wrapped.init(params), params)
  plain, _ = inner.update(gradients, inner.init(params), params)
  for name in ("encoder", "latent_bias", "pre_bias"):
    jax.tree.map(np.testing.assert_array_equal, updates[name], plain[name])


def test_29_auxiliary_loss_without_dead_latents_is_zero():
  graphdef, params = build()
  output = loss_of(graphdef, params, extra_with(), activations())
  assert output.metrics["auxiliary"].mean() == 0
  np.testing.assert_array_equal(output.loss.total, output.metrics["fvu"].total)


def test_29_all_latents_dead_gives_the_normalised_residual_reconstruction():
  graphdef, params = build(k_aux=LATENTS)
  model = parameters.merge(graphdef, params)
  u = model.normalise(activations()).values_TD
  scores = model.pre_activations(u)
  residual = u - model.decode(model.encode(u))
  everything = jnp.ones(LATENTS, bool)
  auxiliary = sparse_coding.auxiliary_loss(model, scores, residual, everything, jnp.ones(TOKENS))
  kernel = np.asarray(params["decoder"]["kernel"], np.float64)
  estimate = np.maximum(np.asarray(scores, np.float64), 0) @ kernel  # no bias
  residual = np.asarray(residual, np.float64)
  expected = ((estimate - residual) ** 2).mean() / ((residual - residual.mean(0)) ** 2).mean()
  np.testing.assert_allclose(auxiliary, expected, rtol=1e-5)


def test_29_live_latents_and_the_pre_bias_of_the_decoder_get_no_auxiliary_gradient():
  graphdef, params = build()
  x = activations()
  dead = jnp.zeros(LATENTS, bool).at[jnp.asarray([0, 4, 9])].set(True)
  residual = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))

  def auxiliary(params):
    model = parameters.merge(graphdef, params)
    scores = model.pre_activations(model.normalise(x).values_TD)
    return sparse_coding.auxiliary_loss(model, scores, residual, dead, jnp.ones(TOKENS))

  gradients = jax.grad(auxiliary)(params)
  alive = ~np.asarray(dead)
  np.testing.assert_array_equal(gradients["decoder"]["kernel"][alive], 0)
  np.testing.assert_array_equal(gradients["encoder"]["kernel"][:, alive], 0)
  np.testing.assert_array_equal(gradients["latent_bias"][alive], 0)
  assert (np.abs(gradients["decoder"]["kernel"][~alive]).max(-1) > 0).all()
  # The bias is reached through the encoder only: d u - pre_bias = -encoder.
  through_encoder = -np.asarray(params["encoder"]["kernel"]) @ np.asarray(gradients["latent_bias"])
  np.testing.assert_allclose(gradients["pre_bias"], through_encoder, atol=1e-6)


def test_29_a_ratio_that_is_not_a_number_counts_as_zero():
  graphdef, params = build()
  model = parameters.merge(graphdef, params)
  scores = jnp.ones((TOKENS, LATENTS))
  dead = jnp.ones(LATENTS, bool)
  same = jnp.ones((TOKENS, WIDTH))  # no spread over the batch: 0 in the denominator
  assert sparse_coding.auxiliary_loss(model, scores, same, dead, jnp.ones(TOKENS)) == 0
  broken = same.at[0].set(jnp.nan)
  assert sparse_coding.auxiliary_loss(model, scores, broken, dead, jnp.ones(TOKENS)) == 0


def test_35_geometric_median_of_a_symmetric_cloud_is_its_centre():
  rng = np.random.default_rng(0)
  half = rng.normal(size=(200, WIDTH)) * rng.uniform(0.1, 3, (200, 1))
  centre = rng.normal(size=WIDTH)
  cloud = jnp.asarray(np.concatenate([centre + half, centre - half]), jnp.float32)
  np.testing.assert_allclose(start.geometric_median(cloud), centre, atol=1e-4)


def test_35_geometric_median_is_not_the_mean():
  # More than half of the points in one place pull the median there, whatever the others do.
  points = np.zeros((10, 3), np.float32)
  points[:4] = 100.0
  median = start.geometric_median(jnp.asarray(points), num_iterations=1000, tolerance=1e-7)
  np.testing.assert_allclose(median, 0, atol=1e-3)
  # Fermat point of an equilateral triangle with a far fourth point inside the convex hull: the crossing
  # of the diagonals is the median of the corners of any convex quadrilateral.
  corners = jnp.asarray([[0.0, 0.0], [4.0, 0.0], [5.0, 5.0], [0.0, 2.0]])
  median = start.geometric_median(corners, num_iterations=1000, tolerance=1e-9)
  np.testing.assert_allclose(median, [4 / 3, 4 / 3], atol=1e-3)


def test_initialisation_from_activations():
  spec = SparseAutoencoderSpec(WIDTH, LATENTS, ACTIVE, k_aux=4)
  x = activations(tokens=512)
  pre_bias_D = start.initial_pre_bias(spec, x)
  params = start.initialise(spec, pre_bias_D, jax.random.key(0), rescale_encoder=False)
  encoder, decoder = params["encoder"]["kernel"], params["decoder"]["kernel"]
  np.testing.assert_allclose(decoder, sae.unit_rows(encoder.T), atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(decoder, axis=-1), 1, atol=1e-5)
  np.testing.assert_array_equal(params["latent_bias"], 0)
  bound = 1 / np.sqrt(WIDTH)
  assert np.abs(encoder).max() <= bound and np.abs(encoder).max() > 0.9 * bound
  rescaled = start.initialise(spec, pre_bias_D, jax.random.key(0))
  ratio = np.asarray(encoder / rescaled["encoder"]["kernel"])
  np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
  graphdef, _ = parameters.split(SparseAutoencoder(spec, rngs=nnx.Rngs(0)))
  model = parameters.merge(graphdef, rescaled)
  probes = sae.unit_rows(jax.random.normal(jax.random.key(9), (4000, WIDTH)))
  norm = np.linalg.norm(model.decode_latents(model.encode(probes + rescaled["pre_bias"])), axis=-1).mean()
  np.testing.assert_allclose(norm, 1, atol=0.05)
  with pytest.raises(ValueError, match="width 3, model_dim is 10"):
    start.initial_pre_bias(spec, x[:, :3])


def test_top_k_keeps_the_largest_by_signed_value_and_then_cuts_negatives():
  graphdef, params = build()
  model = parameters.merge(graphdef, params)
  scores = -jnp.arange(1.0, LATENTS + 1)[None]
  code = model.select(scores.at[0, 5].set(2.0))
  assert code.indices_TK.tolist() == [[5, 0, 1, 2]] and code.values_TK.tolist() == [[2.0, 0, 0, 0]]
  dense = sae.densify(SparseCode(jnp.asarray([[2.0, 1.0]]), jnp.asarray([[3, 0]])), 5)
  assert dense.tolist() == [[1.0, 0, 0, 2.0, 0]]
