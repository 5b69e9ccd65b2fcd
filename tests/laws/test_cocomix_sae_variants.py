"""Sparse autoencoders besides TopK: losses against the equations, gradients, export (tests 28, 29 and 33)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nr.models import parameters
from nr.models import sparse_autoencoder_start as start
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec, normalise
from nr.models.sparse_autoencoder_spec import ARCHITECTURES
from nr.objectives import sparse_coding
from nr.objectives.sparse_coding_variants import sparse_coding_loss

WIDTH, LATENTS, K, TOKENS = 10, 24, 4, 32
CASES = {
  "batchtopk": {"k_aux": 6},
  "matryoshka": {"k_aux": 6, "prefixes": (5, 11, 24)},
  "jumprelu": {"bandwidth": 0.6, "sparsity": 0.02},
  "jumprelu target": {"penalty": "target", "bandwidth": 0.6, "sparsity": 0.3},
  "jumprelu tanh": {"penalty": "tanh", "bandwidth": 0.6, "sparsity": 0.02},
  "gated": {"sparsity": 0.03},
  "gated trained": {"sparsity": 0.03, "is_decoder_frozen": False},
  "relu": {"sparsity": 0.03},
}


def build(case, seed=0, **changes):
  settings = {"dead_tokens": 100, "arch": case.split()[0], **CASES.get(case, {}), **changes}
  spec = SparseAutoencoderSpec(WIDTH, LATENTS, K, **settings)
  graphdef, params = parameters.split(SparseAutoencoder(spec, rngs=nnx.Rngs(1)))
  rng = np.random.default_rng(seed)
  for name, leaf in params.items():
    if not isinstance(leaf, dict):
      params[name] = jnp.asarray(rng.normal(size=leaf.shape) * 0.2, jnp.float32)
  if "threshold" in params:
    params["threshold"] = jnp.abs(params["threshold"]) + 0.05
  return spec, graphdef, params


def activations(seed=0, tokens=TOKENS):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, WIDTH)) * 3 + 1, jnp.float32)


def extra_with(spec, dead=(), scale=0.7):
  extra = sparse_coding.init_extra(spec, scale)
  counters = extra["tokens_since_fired"].at[jnp.asarray(dead, jnp.int32)].set(10_000)
  return {**extra, "tokens_since_fired": counters}


def loss_of(graphdef, params, extra, x, weights=None):
  return sparse_coding_loss(parameters.merge(graphdef, params), extra, x, weights)


def numpy_loss(spec, params, extra, x):
  """Every loss in float64, from the equations. Returns (loss, activations, what else is reported)."""
  p = {name: np.asarray(leaf["kernel"] if isinstance(leaf, dict) else leaf, np.float64)
       for name, leaf in params.items()}  # fmt: skip
  x = np.asarray(x, np.float64)
  u = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-5)
  product = (u - p["pre_bias"]) @ p["encoder"]
  scale = float(extra["mse_scale"])

  def error(code, size=LATENTS):
    return np.mean((code[:, :size] @ p["decoder"][:size] + p["pre_bias"] - u) ** 2) * scale

  if spec.arch == "gated":
    gate = product + p["gate_bias"]
    f = (gate > 0) * np.maximum(np.exp(p["magnitude_scale"]) * product + p["magnitude_bias"], 0)
    opened = np.maximum(gate, 0)
    penalty = opened.sum(-1).mean()
    return (
      error(f) + spec.sparsity * penalty + error(opened),
      f,
      {"sparsity": penalty, "auxiliary": error(opened)},
    )
  pre = product + p["latent_bias"]
  if spec.arch == "relu":
    f = np.maximum(pre, 0)
    return error(f) + spec.sparsity * f.sum(-1).mean(), f, {"sparsity": f.sum(-1).mean()}
  if spec.arch == "jumprelu":
    f = pre * (pre > p["threshold"])
    l0 = (pre > p["threshold"]).sum(-1).mean()
    penalty = {"l0": l0, "target": (l0 / K - 1) ** 2, "tanh": np.tanh(4 * f).sum(-1).mean()}[spec.penalty]
    return error(f) + spec.sparsity * penalty, f, {"sparsity": penalty}
  flat = np.maximum(pre, 0).ravel()
  f = np.where(np.argsort(np.argsort(-flat)) < K * len(x), flat, 0).reshape(pre.shape)
  counters = np.where((f > 1e-3).any(0), 0, np.asarray(extra["tokens_since_fired"]) + len(x))
  residual = u - f @ p["decoder"] - p["pre_bias"]
  auxiliary = 0.0
  if (counters > spec.dead_tokens).any():
    dead = np.where(counters > spec.dead_tokens, pre, -np.inf)
    cut = np.sort(dead, -1)[:, -spec.k_aux][:, None]
    estimate = np.where((dead >= cut) & (dead > 0), dead, 0) @ p["decoder"]
    auxiliary = np.mean((estimate - residual) ** 2) / np.mean((residual - residual.mean(0)) ** 2)
  inner = {size: error(f, size) for size in (spec.prefixes or ())[:-1]}
  said = {"auxiliary": auxiliary} | {f"fvu_first_{size}": value for size, value in inner.items()}
  return error(f) + sum(inner.values()) + spec.alpha * auxiliary, f, said


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_the_equations(case):
  spec, graphdef, params = build(case)
  extra, x = extra_with(spec, range(0, LATENTS, 2)), activations()
  output = loss_of(graphdef, params, extra, x)
  loss, f, said = numpy_loss(spec, params, extra, x)
  np.testing.assert_allclose(output.loss.mean(), loss, rtol=1e-5)
  np.testing.assert_allclose(output.metrics["l0"].mean(), (f > 0).sum(-1).mean(), rtol=1e-6)
  np.testing.assert_array_equal(output.statistics.fired_C, (f > 1e-3).sum(0))
  for name, value in said.items():
    np.testing.assert_allclose(output.metrics[name].mean(), value, rtol=1e-5, err_msg=name)
  if spec.is_selecting_in_batch:
    assert (f > 0).sum() == K * TOKENS  # 33: exactly
    assert output.metrics["auxiliary"].mean() > 0
    np.testing.assert_allclose(output.statistics.smallest, f[f > 0].min(), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_tokens_of_weight_zero_change_nothing(case):
  spec, graphdef, params = build(case)
  extra, x = extra_with(spec, (1, 5, 7)), activations()
  padded = jnp.concatenate([x, jnp.full((8, WIDTH), jnp.nan)])
  weights = jnp.concatenate([jnp.ones(TOKENS), jnp.zeros(8)])
  run = lambda p, x, w: loss_of(graphdef, p, extra, x, w)  # noqa: E731
  total = lambda p, x, w: run(p, x, w).loss.mean()  # noqa: E731
  plain, masked = run(params, x, jnp.ones(TOKENS)), run(params, padded, weights)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, masked)
  gradients = jax.grad(total)(params, padded, weights), jax.grad(total)(params, x, jnp.ones(TOKENS))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)


@pytest.mark.parametrize("case", ["jumprelu", "jumprelu tanh", "gated", "relu"])
def test_microbatches_agree_where_the_loss_is_a_sum_over_tokens(case):
  spec, graphdef, params = build(case)
  extra, x = extra_with(spec), activations()
  weights = jnp.asarray(np.random.default_rng(3).integers(0, 2, TOKENS), jnp.float32)
  run = lambda rows: loss_of(graphdef, params, extra, x[rows], weights[rows])  # noqa: E731
  parts = [run(slice(i, i + 8)) for i in range(0, TOKENS, 8)]
  summed = jax.tree.map(lambda *values: sum(values), *parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run(slice(None)), summed)


def test_33_thresholds_get_the_straight_through_gradient_of_the_whole_loss():
  spec, graphdef, params = build("jumprelu")
  extra, x = extra_with(spec), activations()
  found = jax.grad(lambda p: loss_of(graphdef, p, extra, x).loss.mean())(params)["threshold"]
  model = parameters.merge(graphdef, params)
  u = model.normalise(x).values_TD
  pre = np.asarray(model.pre_activations(u), np.float64)
  theta, rows = (np.asarray(leaf, np.float64) for leaf in (params["threshold"], params["decoder"]["kernel"]))
  f = pre * (pre > theta)
  d_f = 2 * 0.7 / (TOKENS * WIDTH) * (f @ rows + np.asarray(params["pre_bias"]) - np.asarray(u)) @ rows.T
  inside = np.abs(pre - theta) < spec.bandwidth / 2
  expected = (-theta / spec.bandwidth * inside * d_f - spec.sparsity / TOKENS / spec.bandwidth * inside).sum(
    0
  )
  assert 0.05 < inside.mean() < 0.95
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_the_decoder_of_a_gated_autoencoder_is_left_alone_by_the_gate_or_not(is_frozen):
  spec, graphdef, params = build("gated", is_decoder_frozen=is_frozen)
  # No magnitudes: nothing but the gate's own reconstruction is left.
  params["magnitude_bias"] = jnp.full(LATENTS, -1e3)
  gradients = jax.grad(lambda p: loss_of(graphdef, p, extra_with(spec), activations()).loss.mean())(params)
  assert np.abs(gradients["gate_bias"]).max() > 1e-4
  assert (np.abs(gradients["decoder"]["kernel"]).max() == 0) == is_frozen
  # Where the decoder is frozen the pre-bias is reached through the encoder, and by the plain reconstruction.
  through_gate = -np.asarray(params["encoder"]["kernel"]) @ np.asarray(gradients["gate_bias"])
  u = np.asarray(parameters.merge(graphdef, params).normalise(activations()).values_TD)
  plain = -2 * 0.7 / WIDTH * (u - np.asarray(params["pre_bias"])).mean(0)
  assert np.allclose(gradients["pre_bias"], through_gate + plain, atol=1e-5) == is_frozen


@pytest.mark.parametrize("case", CASES)
def test_free_decoder_rows_are_unit_rows_with_the_norm_in_the_encoder(case):
  spec, graphdef, params = build(case, decoder_norm="scaled")
  params["decoder"]["kernel"] *= jnp.asarray(
    np.random.default_rng(4).uniform(0.3, 3, (LATENTS, 1)), jnp.float32
  )
  folded = start._with_unit_rows(params)
  np.testing.assert_allclose(np.linalg.norm(folded["decoder"]["kernel"], axis=-1), 1, atol=1e-6)
  unit, unit_graphdef, _ = build(case)
  assert unit == dataclasses.replace(spec, decoder_norm="unit")
  x, extra = activations(), extra_with(spec, range(8))
  found, expected = loss_of(graphdef, params, extra, x), loss_of(unit_graphdef, folded, extra, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)
  # The norm takes part in what is learnt.
  gradients = jax.grad(lambda p: loss_of(graphdef, p, extra, x).loss.mean())(params)["decoder"]["kernel"]
  assert np.abs((gradients * params["decoder"]["kernel"]).sum(-1)).max() > 1e-5


@pytest.mark.parametrize("case", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("decoder_norm", ["unit", "scaled"])
def test_33_exported_as_jumprelu_it_reproduces_its_thresholded_outputs(case, decoder_norm):
  spec, graphdef, params = build(case, decoder_norm=decoder_norm)
  if decoder_norm == "scaled":
    params["decoder"]["kernel"] *= 1.7
  model, x = parameters.merge(graphdef, params), activations()
  u = model.normalise(x).values_TD
  scores = model.pre_activations(u)
  kept, smallest = model.select_in_batch(scores)
  used_spec, used = start.inference_form(spec, params, 0.9 * smallest)
  assert (used_spec.arch, used_spec.decoder_norm, used_spec.max_active) == ("jumprelu", "unit", 4 * K)
  exported = parameters.merge(parameters.split(SparseAutoencoder(used_spec, rngs=nnx.Rngs(0)))[0], used)
  thresholded = jnp.where(scores > 0.9 * smallest, scores, 0)
  np.testing.assert_allclose(exported.activations(u), thresholded, rtol=1e-5, atol=1e-6)
  assert ((exported.activations(u) > 0) >= (kept > 0)).all()  # what the batch kept is above its threshold
  np.testing.assert_allclose(
    exported.decode_activations(thresholded), model.decode_activations(thresholded), rtol=1e-4, atol=1e-5
  )
  code = exported.encode(u)
  assert code.values_TK.shape == (TOKENS, 4 * K)
  np.testing.assert_allclose(exported.dense(code), thresholded, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="needs the threshold that its training kept"):
    start.inference_form(spec, params, jnp.float32(-1))
  with pytest.raises(ValueError, match="chooses among the latents of a whole batch and only trains"):
    model.encode(u)


def test_the_threshold_is_a_running_mean_that_starts_with_the_first_batch():
  spec, graphdef, params = build("batchtopk", threshold_rate=0.25)
  extra, expected = extra_with(spec), None
  for step in range(3):
    statistics = loss_of(graphdef, params, extra, activations(step)).statistics
    smallest = float(statistics.smallest)
    expected = smallest if expected is None else expected + 0.25 * (smallest - expected)
    extra = sparse_coding.update_extra(extra, params, statistics, step, threshold_rate=0.25)
  np.testing.assert_allclose(extra["threshold"], expected, rtol=1e-6)
  # Two microbatches count as the mean of theirs; a batch without any active latent leaves it alone.
  twice = jax.tree.map(lambda a, b: a + b, statistics, statistics._replace(smallest=statistics.smallest * 3))
  moved = sparse_coding.update_extra(extra, params, twice, 3, threshold_rate=1.0)
  np.testing.assert_allclose(moved["threshold"], 2 * smallest, rtol=1e-6)
  nothing = loss_of(graphdef, {**params, "latent_bias": jnp.full(LATENTS, -99.0)}, extra, activations())
  assert nothing.metrics["l0"].mean() == 0 and np.isfinite(nothing.loss.mean())
  same = sparse_coding.update_extra(extra, params, nothing.statistics, 3, threshold_rate=1.0)
  assert same["threshold"] == extra["threshold"]


@pytest.mark.parametrize("case", ["relu", "gated", "jumprelu"])
def test_the_sparsity_weight_grows_over_its_warm_up(case):
  spec, graphdef, params = build(case, sparsity_warmup=4)
  extra, x = extra_with(spec), activations()
  free = loss_of(build(case, sparsity=0.0)[1], params, extra, x).loss.mean()
  for step in range(6):
    output = loss_of(graphdef, params, extra, x)
    weight = (output.loss.mean() - free) / output.metrics["sparsity"].mean()
    np.testing.assert_allclose(weight, spec.sparsity * min(1, step / 4), rtol=1e-3, atol=1e-6)
    extra = sparse_coding.update_extra(extra, params, output.statistics, step)
  assert set(extra) == set(sparse_coding.extra_axes(spec))


def test_28_rows_stay_unit_and_thresholds_stay_above_zero():
  spec, graphdef, params = build("jumprelu", sparsity=0.0)
  optimizer = sparse_coding.constrained(spec)(optax.adam(0.2))
  state = optimizer.init(params)
  # Every latent wants a lower threshold: what is below it would help.
  update = jax.jit(optimizer.update)
  for _ in range(3):
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    norms = np.linalg.norm(np.asarray(params["decoder"]["kernel"], np.float64), axis=-1)
    assert np.abs(norms - 1).max() < 1e-5
    assert (params["threshold"] >= 0).all()
  assert (params["threshold"] == 0).any()
  free = sparse_coding.constrained(build("relu", decoder_norm="scaled")[0])
  inner = optax.adam(0.2)
  assert free(inner) is inner


def test_a_sparse_code_has_the_largest_and_says_zero_for_the_rest():
  spec, graphdef, params = build("relu", max_active=3)
  model = parameters.merge(graphdef, {**params, "latent_bias": params["latent_bias"] - 0.8})
  u = model.normalise(activations()).values_TD
  dense, code = np.asarray(model.activations(u)), model.encode(u)
  active = (dense > 0).sum(-1)
  assert active.min() < 3 < active.max()
  np.testing.assert_array_equal(code.values_TK, -np.sort(-dense, -1)[:, :3])
  picked = np.take_along_axis(dense, np.asarray(code.indices_TK), -1)
  np.testing.assert_array_equal(picked, code.values_TK)


def test_other_normalisations_and_encoders_that_leave_the_pre_bias_in():
  x = np.asarray(activations(), np.float64)
  plain = normalise(jnp.asarray(x, jnp.float32), 1e-5, "none")
  np.testing.assert_allclose(plain.values_TD, x, rtol=1e-6)
  scaled = normalise(jnp.asarray(x, jnp.float32), 1e-5, "constant_norm")
  np.testing.assert_allclose(np.linalg.norm(scaled.values_TD, axis=-1), np.sqrt(WIDTH), rtol=1e-6)
  for found in (plain, scaled):
    np.testing.assert_allclose(found.values_TD * found.deviation_T1 + found.mean_T1, x, rtol=1e-5)
  assert not np.isnan(normalise(jnp.zeros((1, WIDTH)), 1e-5, "constant_norm").values_TD).any()
  spec, graphdef, params = build("relu", subtract_pre_bias=False, normalisation="none")
  model = parameters.merge(graphdef, params)
  encoder, bias, rows = params["encoder"]["kernel"], params["latent_bias"], params["decoder"]["kernel"]
  code = np.maximum(x @ np.asarray(encoder, np.float64) + np.asarray(bias), 0)
  np.testing.assert_allclose(model.activations(jnp.asarray(x, jnp.float32)), code, rtol=1e-4, atol=1e-5)
  everything = dataclasses.replace(spec, max_active=LATENTS)
  graphdef = parameters.split(SparseAutoencoder(everything, rngs=nnx.Rngs(0)))[0]
  reconstruction, _ = parameters.merge(graphdef, params)(jnp.asarray(x, jnp.float32))
  expected = code @ np.asarray(rows, np.float64) + np.asarray(params["pre_bias"])
  np.testing.assert_allclose(reconstruction, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_starts_with_reconstructions_of_unit_norm(arch):
  spec = SparseAutoencoderSpec(WIDTH, LATENTS, K, arch=arch)
  params = start.initialise(spec, jnp.zeros(WIDTH), jax.random.key(0))
  model = parameters.merge(parameters.split(SparseAutoencoder(spec, rngs=nnx.Rngs(0)))[0], params)
  probes = jax.random.normal(jax.random.key(9), (4000, WIDTH))
  probes /= jnp.linalg.norm(probes, axis=-1, keepdims=True)
  norm = np.linalg.norm(start._decode_without_bias(model, probes), axis=-1).mean()
  # A JumpReLU with an encoder scaled down after the probe loses what falls below its threshold.
  np.testing.assert_allclose(norm, 1, atol=0.05 if arch != "jumprelu" else 0.1)
  np.testing.assert_allclose(np.linalg.norm(params["decoder"]["kernel"], axis=-1), 1, atol=1e-5)
