"""Laws of the transformer: causality, padding, packing, layouts, splits, dropout, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.models import parameters
from nr.models.transformer import AttentionInputs, RotaryScaling, Transformer, TransformerSpec

SIZES = dict(vocab_size=37, num_layers=3, model_dim=16, num_heads=4, mlp_dim=24, init_std=0.2)
FAMILIES = {
  "gpt2": TransformerSpec.gpt2(**SIZES, max_length=32),
  "llama": TransformerSpec.llama(
    **SIZES, num_kv_heads=2, rotary_scaling=RotaryScaling(original_max_length=8)
  ),
  "qwen2": TransformerSpec.qwen2(**SIZES, num_kv_heads=2),
  "qwen3": TransformerSpec.qwen3(**SIZES, num_kv_heads=1, tied_head=True),
  "gemma": TransformerSpec.gemma(**SIZES, num_kv_heads=1),
}
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])
ALL = pytest.mark.parametrize("family", list(FAMILIES))


def build(spec, seed=0):
  """A model whose biases and norms are not at their initial values."""
  model = Transformer(spec, rngs=nnx.Rngs(seed))
  graphdef, params = parameters.split(model)
  stacked = parameters.stack_layers(params)
  leaves, structure = jax.tree.flatten(stacked)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
  stacked = jax.tree.unflatten(structure, leaves)
  params = parameters.unstack_layers(stacked) if spec.layers == "unroll" else stacked
  return graphdef, params


def tokens_of(shape, seed=5):
  return jnp.asarray(np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape), jnp.int32)


def run(graphdef, params, tokens, **settings):
  @jax.jit
  def forward(params, tokens, settings):
    return parameters.merge(graphdef, params)(tokens, **settings)

  return np.asarray(forward(params, tokens, settings))


@BOTH
@pytest.mark.parametrize("attention", ["dot_product", "blocked"])
def test_changing_later_tokens_leaves_earlier_logits_bitwise_equal(family, attention):
  graphdef, params = build(FAMILIES[family].replace(attention=attention))
  tokens = tokens_of((2, 12))
  changed = tokens.at[:, 7:].set((tokens[:, 7:] + 3) % 37)
  before, after = run(graphdef, params, tokens), run(graphdef, params, changed)
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


@BOTH
@pytest.mark.parametrize("attention", ["dot_product", "blocked"])
def test_packed_documents_equal_separate_documents(family, attention):
  graphdef, params = build(FAMILIES[family].replace(attention=attention))
  tokens = tokens_of((1, 12))
  segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3])
  packed = run(graphdef, params, tokens, segment_ids_BL=segments)
  np.testing.assert_allclose(packed[:, :5], run(graphdef, params, tokens[:, :5]), atol=1e-5)
  np.testing.assert_allclose(packed[:, 5:9], run(graphdef, params, tokens[:, 5:9]), atol=1e-5)
  assert np.isfinite(packed).all()


@BOTH
def test_left_padding_and_its_contents_do_not_matter(family):
  graphdef, params = build(FAMILIES[family])
  tokens = tokens_of((2, 9))
  segments = jnp.asarray([[0] * 3 + [1] * 6, [1] * 9])
  padded = run(graphdef, params, tokens, segment_ids_BL=segments)
  np.testing.assert_allclose(padded[:1, 3:], run(graphdef, params, tokens[:1, 3:]), atol=1e-5)
  np.testing.assert_allclose(padded[1:], run(graphdef, params, tokens[1:]), atol=1e-5)
  other = run(graphdef, params, tokens.at[0, :3].set(0), segment_ids_BL=segments)
  np.testing.assert_array_equal(padded[0, 3:], other[0, 3:])


@BOTH
def test_gradients_stay_finite_and_ignore_padding(family):
  graphdef, params = build(FAMILIES[family])
  segments = jnp.asarray([[0] * 3 + [1] * 4])

  @jax.jit
  def gradient(tokens):
    def loss(params):
      logits = parameters.merge(graphdef, params)(tokens, segment_ids_BL=segments)
      return (logits * (segments != 0)[..., None]).sum() ** 2

    return jax.grad(loss)(params)

  tokens = tokens_of((1, 7))
  first, second = gradient(tokens), gradient(tokens.at[:, :3].set(1))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(a).max()))


@BOTH
def test_permuting_rows_permutes_logits(family):
  graphdef, params = build(FAMILIES[family])
  tokens, order = tokens_of((4, 6)), np.array([2, 0, 3, 1])
  logits = run(graphdef, params, tokens)
  np.testing.assert_allclose(run(graphdef, params, tokens[order]), logits[order], atol=1e-6)


@ALL
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scan_unroll_and_remat_agree_in_loss_and_gradient(family, remat):
  tokens = tokens_of((2, 7))
  results = []
  for layers, policy in (("scan", "none"), ("unroll", remat), ("scan", remat)):
    graphdef, params = build(FAMILIES[family].replace(layers=layers, remat=policy))

    def loss(params, graphdef=graphdef):
      return jnp.sin(parameters.merge(graphdef, params)(tokens)).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    results.append((value, parameters.stack_layers(gradient)))
  for result in results[1:]:
    assert jax.tree.structure(result) == jax.tree.structure(results[0])
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(results[0])):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_remat_changes_the_program(layers):
  programs = {}
  for remat in ("none", "dots", "full"):
    spec = FAMILIES["llama"].replace(layers=layers, remat=remat)
    graphdef, params = build(spec)

    def loss(params, graphdef=graphdef):
      return parameters.merge(graphdef, params)(tokens_of((1, 4))).sum()

    programs[remat] = str(jax.make_jaxpr(jax.grad(loss))(params))
  assert "remat" not in programs["none"] and "checkpoint" not in programs["none"]
  products = {remat: text.count("dot_general[") for remat, text in programs.items()}
  assert products["none"] < products["full"], products
  assert products["dots"] < products["full"], products


@BOTH
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_blocks_run_in_pieces_equal_one_run_dropout_included(family, layers):
  graphdef, params = build(FAMILIES[family].replace(layers=layers, dropout=0.3))
  x = jax.random.normal(jax.random.key(0), (2, 5, 16))
  attention = AttentionInputs(jnp.broadcast_to(jnp.arange(5), (2, 5)))

  @jax.jit
  def run_with_every_cut(params, x, key):
    model = parameters.merge(graphdef, params)
    whole, cache = model.run_blocks(x, attention=attention, key=key)
    assert cache is None
    parts = []
    for cut in range(4):
      part, _ = model.run_blocks(x, 0, cut, attention=attention, key=key)
      parts.append(model.run_blocks(part, cut, attention=attention, key=key)[0])
    return whole, parts

  whole, parts = run_with_every_cut(params, x, jax.random.key(1))
  for part in parts:
    np.testing.assert_allclose(part, whole, atol=1e-5)


def test_dropout_is_decided_by_its_key_and_keeps_the_mean():
  graphdef, params = build(FAMILIES["gpt2"].replace(dropout=0.25))
  model = parameters.merge(graphdef, params)
  tokens = tokens_of((2, 6))
  one, same, other = (run(graphdef, params, tokens, key=jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 1e-3
  plain = run(graphdef, params, tokens)
  np.testing.assert_array_equal(plain, run(graphdef, params, tokens))
  kept = jax.vmap(lambda key: model.embed(tokens, key=key))(jax.random.split(jax.random.key(3), 2000))
  np.testing.assert_allclose(kept.mean(axis=0), model.embed(tokens), atol=0.06)
  assert abs(float((kept == 0).mean()) - 0.25) < 0.01


@BOTH
def test_bfloat16_compute_keeps_float32_logits_and_stays_near(family):
  spec = FAMILIES[family]
  graphdef, params = build(spec)
  exact = run(graphdef, params, tokens_of((2, 6)))
  graphdef, _ = parameters.split(Transformer(spec.replace(dtype="bfloat16"), rngs=nnx.Rngs(0)))
  near = run(graphdef, params, tokens_of((2, 6)))
  assert near.dtype == np.float32
  assert 0 < np.abs(near - exact).max() < 0.1 * np.abs(exact).max()


@ALL
def test_layouts_have_equal_initial_values_and_matching_axes(family):
  trees = {}
  for layers in ("scan", "unroll"):
    spec = FAMILIES[family].replace(layers=layers)

    def build_model(spec=spec):
      return Transformer(spec, rngs=nnx.Rngs(3))

    _, params = parameters.split(build_model())
    axes = parameters.logical_axes(build_model)

    def is_names(node):
      return isinstance(node, tuple)

    assert jax.tree.structure(axes, is_leaf=is_names) == jax.tree.structure(params)
    jax.tree.map(
      lambda names, leaf: len(names) == leaf.ndim or pytest.fail(str(names)), axes, params, is_leaf=is_names
    )
    trees[layers] = parameters.stack_layers(params), parameters.stack_layers(axes)
  jax.tree.map(np.testing.assert_array_equal, trees["scan"][0], trees["unroll"][0])
  assert trees["scan"][1] == trees["unroll"][1]


@pytest.mark.parametrize(
  "width, layers, heads, count",
  [
    (512, 8, 8, 51_475_968),
    (1024, 24, 16, 354_823_168),
    (2048, 24, 16, 1_313_626_112),
    (624, 8, 8, 69_445_584),
    (1072, 24, 16, 386_274_832),
    (2096, 24, 16, 1_373_389_328),
    (768, 12, 12, 124_439_808),
  ],
)
def test_parameter_counts_of_published_gpt2_shapes(width, layers, heads, count):
  spec = TransformerSpec.gpt2(num_layers=layers, model_dim=width, num_heads=heads)
  shapes = jax.eval_shape(lambda: parameters.split(Transformer(spec, rngs=nnx.Rngs(0)))[1])
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
  formula = 50257 * width + 1024 * width + layers * (12 * width**2 + 13 * width) + 2 * width
  assert formula == count


def test_initial_scales_follow_gpt2():
  spec = TransformerSpec.gpt2(vocab_size=500, num_layers=8, model_dim=64, num_heads=4, max_length=64)
  _, params = parameters.split(Transformer(spec, rngs=nnx.Rngs(0)))
  block = params["blocks"]
  kernels = (block["attention"]["query"]["kernel"], block["mlp"]["up"]["kernel"])
  for wide in (params["token_embedding"], *kernels):
    assert abs(float(wide.std()) / 0.02 - 1) < 0.02
  for narrow in (block["attention"]["output"]["kernel"], block["mlp"]["down"]["kernel"]):
    assert abs(float(narrow.std()) * 4 / 0.02 - 1) < 0.02
  assert float(jnp.abs(block["mlp"]["up"]["bias"]).max()) == 0
  assert float(block["mlp_norm"]["scale"].min()) == float(block["mlp_norm"]["scale"].max()) == 1


def test_scan_body_returns_no_parameters():
  graphdef, params = build(FAMILIES["llama"])
  jaxpr = jax.make_jaxpr(lambda params: parameters.merge(graphdef, params)(tokens_of((1, 4))))(params)
  scans = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "scan"]
  assert len(scans) == 1
  assert len(scans[0].outvars) == scans[0].params["num_carry"]


def test_wrong_ranges_and_lengths_are_refused():
  graphdef, params = build(FAMILIES["gpt2"])
  model = parameters.merge(graphdef, params)
  x, attention = jnp.zeros((1, 4, 16)), AttentionInputs(jnp.zeros((1, 4), jnp.int32))
  with pytest.raises(ValueError, match="stop=4: need 0 <= start <= stop <= num_layers=3"):
    model.run_blocks(x, 0, 4, attention=attention)
  with pytest.raises(ValueError, match="cache covers 2 blocks"):
    model.run_blocks(x, attention=attention, cache=model.init_cache(1, 8, stop=2))
  with pytest.raises(ValueError, match="cache has 3 slots"):
    model.run_blocks(x, attention=attention, cache=model.init_cache(1, 3))
  with pytest.raises(ValueError, match="length 33: max_length=32"):
    model(jnp.zeros((1, 33), jnp.int32))
