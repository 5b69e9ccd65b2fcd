"""Low-rank adapters: the base when b is zero, the merged weights otherwise; DoRA's magnitudes; dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.models import parameters
from nr.models.layers import drop
from nr.models.lora import (
  ATTENTION,
  MLP,
  UNEMBEDDING,
  LoraSpec,
  LowRank,
  adapter_axes,
  attach,
  count_parameters,
  find_targets,
  init_adapter,
  merge,
)
from nr.models.transformer import Transformer, TransformerSpec
from nr.models.weight_quantization import quantize, quantize_weights
from nr.models.weights import contract, look_up

SIZES = dict(vocab_size=16, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 7)), jnp.int32)
ALL = LoraSpec(rank=3, alpha=4.0, targets=(ATTENTION, MLP, UNEMBEDDING))
DORA = dataclasses.replace(ALL, is_weight_decomposed=True)


def make(layers="scan", family="llama", **settings):
  spec = getattr(TransformerSpec, family)(**SIZES, layers=layers, **settings)
  return parameters.split(Transformer(spec, rngs=nnx.Rngs(0)))


def adapter_of(params, spec=ALL, seed=1, b_std=0.3):
  """An adapter whose b is not zero, and whose magnitudes are not the norms."""
  adapter = init_adapter(spec, params, jax.random.key(seed))
  generator = np.random.default_rng(seed)

  def fill(path, leaf):
    if path[-1].key == "magnitude":
      return leaf * jnp.asarray(generator.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    is_b = path[-1].key == "b"
    return jnp.asarray(generator.normal(size=leaf.shape) * b_std, jnp.float32) if is_b else leaf

  return jax.tree_util.tree_map_with_path(fill, adapter)


def logits(graphdef, params):
  return jax.jit(lambda params: parameters.merge(graphdef, params)(TOKENS))(params)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


CASES = [
  ("...i,io->...o", (2, 3, 12), (12, 5), (-2,), (12, 3), (3, 5)),
  ("bld,dhk->blhk", (2, 3, 12), (12, 2, 4), (-3,), (12, 3), (3, 2, 4)),
  ("blhk,hkd->bld", (2, 3, 2, 4), (2, 4, 6), (-3, -2), (2, 4, 3), (3, 6)),
  ("...d,vd->...v", (2, 3, 9), (9, 9), (-1,), (9, 3), (3, 9)),
]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("equation, x, weight, summed, a, b", CASES)
def test_products_are_those_of_the_whole_weight(equation, x, weight, summed, a, b, bits):
  x, weight, a, b = normal(*x), normal(*weight, seed=1), normal(*a, seed=2), normal(*b, seed=3)
  base = weight if bits is None else quantize(weight, bits, summed)
  dense = weight if bits is None else base.dequantized()
  low = LowRank(base, a, b, 0.5, summed)
  summed_names = [
    name for name in equation.split(",")[1].split("->")[0] if name not in equation.split("->")[1]
  ]
  kept_names = [n for n in equation.split("->")[0].split(",")[1] if n not in summed_names]
  factors = f"{''.join(summed_names)}z,z{''.join(kept_names)}->{equation.split('->')[0].split(',')[1]}"
  whole = dense + 0.5 * jnp.einsum(factors, a, b)
  assert low.shape == weight.shape and low.ndim == weight.ndim
  np.testing.assert_allclose(low.dequantized(), whole, atol=1e-5)
  np.testing.assert_allclose(contract(equation, x, low), jnp.einsum(equation, x, whole), atol=1e-4, rtol=1e-5)
  half = contract(equation, x.astype(jnp.bfloat16), low, preferred=jnp.float32)
  assert half.dtype == jnp.float32
  assert contract(equation, x.astype(jnp.bfloat16), low).dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="no table"):
    look_up(low, jnp.zeros((1,), jnp.int32))
  with pytest.raises(IndexError):
    low[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_a_new_adapter_is_exactly_the_base(layers, family):
  graphdef, params = make(layers, family)
  spec = LoraSpec(rank=2)
  adapter = init_adapter(spec, params, jax.random.key(0))
  attached = attach(params, adapter, spec)
  assert isinstance(parameters.stack_layers(attached)["blocks"]["attention"]["query"]["kernel"], LowRank)
  np.testing.assert_array_equal(logits(graphdef, attached), logits(graphdef, params))
  jax.tree.map(np.testing.assert_array_equal, merge(params, adapter, spec), params)


@pytest.mark.parametrize(
  "layers, base, spec",
  [
    *[(layers, base, ALL) for layers in ("scan", "unroll") for base in ("float32", "int8", "int4")],
    ("scan", "int8", DORA),
  ],
)
def test_merged_equals_attached(layers, base, spec):
  graphdef, params = make(layers)
  if base != "float32":
    params = quantize_weights(params, 8 if base == "int8" else 4, group_size=None if base == "int8" else 4)
  adapter = adapter_of(params, spec)
  attached = logits(graphdef, attach(params, adapter, spec))
  merged = merge(params, adapter, spec)
  np.testing.assert_allclose(attached, logits(graphdef, merged), atol=1e-5)
  assert np.abs(attached - logits(graphdef, params)).max() > 0.1, "the adapter changes something"
  assert merged["unembedding"].dtype == jnp.float32
  assert type(merged["token_embedding"]) is type(params["token_embedding"])


def test_scan_equals_unroll_from_the_start():
  scanned, stacked = make("scan")
  unrolled, apart = make("unroll")
  jax.tree.map(np.testing.assert_array_equal, parameters.stack_layers(apart), stacked)
  for init in ("kaiming", "normal"):
    spec = LoraSpec(rank=3, targets=ALL.targets, init=init)
    first = init_adapter(spec, stacked, jax.random.key(5))
    second = init_adapter(spec, apart, jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, parameters.stack_layers(second), first)
    layers = np.asarray(first["blocks"]["mlp"]["up"]["kernel"]["a"])
    assert np.abs(layers[0] - layers[1]).max() > 0.01, "layers differ"
    gate = first["blocks"]["mlp"]["gate"]["kernel"]["a"]
    assert np.abs(layers - gate).max() > 0.01, "weights of one shape differ"
  adapter = adapter_of(stacked)
  one = logits(scanned, attach(stacked, adapter, ALL))
  two = logits(unrolled, attach(apart, parameters.unstack_layers(adapter), ALL))
  np.testing.assert_allclose(one, two, atol=1e-5)


def test_an_attached_tree_changes_layout_as_any_other():
  _, params = make("scan")
  unrolled, _ = make("unroll")
  attached = attach(params, adapter_of(params), ALL)
  apart = parameters.unstack_layers(attached)
  assert isinstance(apart["blocks"][1]["mlp"]["up"]["kernel"], LowRank)
  expected = logits(make("scan")[0], attached)
  np.testing.assert_allclose(logits(unrolled, apart), expected, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, parameters.stack_layers(apart), attached)
  with pytest.raises(ValueError, match="carries an adapter"):
    quantize_weights(attached)


def test_the_spread_of_a_is_that_of_peft():
  _, params = make(family="llama")
  for init, std in (("kaiming", lambda n: (3 * n) ** -0.5), ("normal", lambda n: 1 / 64)):
    adapter = init_adapter(LoraSpec(rank=64, init=init), params, jax.random.key(0))
    for name, inputs in (("up", 16), ("down", 20)):
      a = adapter["blocks"]["mlp"][name]["kernel"]["a"]
      np.testing.assert_allclose(a.std(), std(inputs), rtol=0.05)
    a = adapter["blocks"]["attention"]["output"]["kernel"]["a"]
    assert a.shape == (2, 4, 6, 64)
    np.testing.assert_allclose(a.std(), std(24), rtol=0.05)


def test_gradients_reach_the_factors_and_leave_the_base_alone():
  graphdef, params = make()
  adapter = adapter_of(params)

  def loss(adapter, params):
    return (parameters.merge(graphdef, attach(params, adapter, ALL))(TOKENS) ** 2).mean()

  gradients = jax.jit(jax.grad(loss))(adapter, params)
  assert jax.tree.structure(gradients) == jax.tree.structure(adapter)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    for layer in leaf if path[0].key == "blocks" else [leaf]:
      assert np.abs(layer).max() > 0, path
  # By the chain rule: the gradient of a is scale * G b^T, with G that of the merged weight.
  dense = jax.grad(lambda p: (parameters.merge(graphdef, p)(TOKENS) ** 2).mean())(merge(params, adapter, ALL))
  up, factors = dense["blocks"]["mlp"]["up"]["kernel"], adapter["blocks"]["mlp"]["up"]["kernel"]
  expected = ALL.scale * jnp.einsum("nio,nro->nir", up, factors["b"])
  np.testing.assert_allclose(gradients["blocks"]["mlp"]["up"]["kernel"]["a"], expected, atol=1e-6, rtol=1e-4)


def test_the_sum_is_never_made():
  """No float array of a kernel's shape appears beyond the kernels themselves."""
  graphdef, params = make()
  spec = LoraSpec(rank=2)
  attached = attach(params, adapter_of(params, spec), spec)

  def count(tree):
    text = str(jax.make_jaxpr(lambda p: parameters.merge(graphdef, p)(TOKENS))(tree))
    return text.count("f32[16,20]")

  plain, low, whole = count(params), count(attached), count(merge(params, adapter_of(params, spec), spec))
  assert plain == whole > 0 and low == plain


def test_dora_begins_as_the_base_and_scan_equals_unroll():
  scanned, stacked = make("scan")
  unrolled, apart = make("unroll")
  first = init_adapter(DORA, stacked, jax.random.key(5))
  second = parameters.stack_layers(init_adapter(DORA, apart, jax.random.key(5)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), first, second)
  base = logits(scanned, stacked)
  np.testing.assert_allclose(logits(scanned, attach(stacked, first, DORA)), base, atol=1e-5)
  adapter = adapter_of(stacked, DORA)
  one = logits(scanned, attach(stacked, adapter, DORA))
  two = logits(unrolled, attach(apart, parameters.unstack_layers(adapter), DORA))
  np.testing.assert_allclose(one, two, atol=1e-5)
  assert np.abs(one - base).max() > 0.1


def test_a_decomposed_weight_has_the_magnitudes_as_its_norms():
  """DoRA, Eq. 5: every output's weights have the norm m, in the direction of W + scale * a b."""
  _, params = make()
  adapter = adapter_of(params, DORA)
  merged, plain = merge(params, adapter, DORA), merge(params, drop_magnitudes(adapter), ALL)
  for path, axes in (
    (("blocks", "attention", "query", "kernel"), 1),
    (("blocks", "attention", "output", "kernel"), (1, 2)),
    (("blocks", "mlp", "down", "kernel"), 1),
    (("unembedding",), 1),
  ):
    whole, direction, factors = merged, plain, adapter
    for name in path:
      whole, direction, factors = whole[name], direction[name], factors[name]
    whole, direction = np.asarray(whole, np.float64), np.asarray(direction, np.float64)
    norms = np.sqrt((whole**2).sum(axes))
    np.testing.assert_allclose(norms, factors["magnitude"], rtol=1e-5)
    unit = direction / np.sqrt((direction**2).sum(axes, keepdims=True))
    np.testing.assert_allclose(whole, unit * np.expand_dims(norms, axes), atol=1e-5)


def drop_magnitudes(node):
  if not isinstance(node, dict):
    return node
  return {name: drop_magnitudes(child) for name, child in node.items() if name != "magnitude"}


def small_tree(layers=2):
  """Parameters of one kernel, stacked, and an adapter of it with dropout."""
  params = {"blocks": {"mlp": {"up": {"kernel": normal(layers, 6, 5)}}}}
  spec = LoraSpec(rank=2, targets=(".*/up/kernel",), dropout=0.4, is_weight_decomposed=True)
  return params, spec, adapter_of(params, spec)


def up_of(tree, layer=None):
  return (tree["blocks"] if layer is None else tree["blocks"][layer])["mlp"]["up"]["kernel"]


def test_the_norm_of_a_decomposed_weight_has_no_gradient():
  """DoRA, section 4.3: gradients are those of m / | | * (W + scale * a b) with | | held fixed."""
  params, spec, adapter = small_tree()
  target = normal(2, 6, 5, seed=9)
  found = jax.grad(lambda adapter: (up_of(merge(params, adapter, spec)) * target).sum())(adapter)
  factors = up_of(adapter)
  direction = up_of(params) + spec.scale * jnp.einsum("nir,nro->nio", factors["a"], factors["b"])
  norms = jnp.sqrt((direction**2).sum(1))
  fixed = spec.scale * target * (factors["magnitude"] / norms)[:, None]
  expected = {
    "a": jnp.einsum("nio,nro->nir", fixed, factors["b"]),
    "b": jnp.einsum("nio,nir->nro", fixed, factors["a"]),
    "magnitude": (target * direction).sum(1) / norms,
  }
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), up_of(found), expected)


@pytest.mark.parametrize("is_decomposed", [False, True])
def test_dropout_falls_on_the_adapter_s_input_alone(is_decomposed):
  x, weight = normal(3, 12), normal(12, 5, seed=1)
  a, b, gain = normal(12, 3, seed=2), normal(3, 5, seed=3), 1 + 0.1 * normal(5, seed=4) ** 2
  key = jax.random.key(7)
  low = LowRank(weight, a, b, 0.5, (-2,), gain if is_decomposed else None, 0.3, key)
  found = contract("...i,io->...o", x, low)
  dropped = drop(x, 0.3, key)
  assert 0.1 < float((dropped == 0).mean()) < 0.5
  # PEFT 0.21: W x + lora(dropped), with DoRA W x + (gain - 1) W dropped + gain lora(dropped).
  if is_decomposed:
    expected = x @ weight + (gain - 1) * (dropped @ weight) + gain * 0.5 * (dropped @ a @ b)
  else:
    expected = x @ weight + 0.5 * (dropped @ a @ b)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  without = contract("...i,io->...o", x, dataclasses.replace(low, key=None))
  whole = (weight + 0.5 * a @ b) * (gain if is_decomposed else 1)
  np.testing.assert_allclose(without, x @ whole, atol=1e-5)


def test_dropout_needs_a_key_and_is_the_same_in_both_layouts():
  params, spec, adapter = small_tree()
  x, key = normal(8, 6, seed=5), jax.random.key(3)

  def outputs(spec, key=None):
    """Of both layers: of the stacked weight as a scan reads it, and of weights kept apart."""
    stacked = attach(params, adapter, spec, key)
    apart = attach(*map(parameters.unstack_layers, (params, adapter)), spec, key)
    _, found = jax.lax.scan(lambda _, low: (None, contract("...i,io->...o", x, low)), None, up_of(stacked))
    return found, jnp.stack([contract("...i,io->...o", x, up_of(apart, layer)) for layer in (0, 1)])

  whole = [x @ kernel for kernel in up_of(merge(params, adapter, spec))]
  plain = dataclasses.replace(spec, dropout=0.0)
  for found in (*outputs(spec), *outputs(plain, key)):
    np.testing.assert_allclose(found, whole, atol=1e-5)
  scanned, apart = outputs(spec, key)
  np.testing.assert_allclose(scanned, apart, atol=1e-5)
  other = outputs(spec, jax.random.key(4))[0]
  assert np.abs(scanned - np.array(whole)).max() > 0.05 and np.abs(scanned - other).max() > 0.05


def test_a_model_drops_in_every_layer_and_weight_apart():
  graphdef, params = make()
  spec = dataclasses.replace(DORA, targets=(ATTENTION, MLP), dropout=0.4)
  adapter = adapter_of(params, spec)
  apply = jax.jit(lambda key: parameters.merge(graphdef, attach(params, adapter, spec, key))(TOKENS))
  first, second = (apply(jax.random.key(number)) for number in (3, 4))
  assert np.isfinite(first).all() and np.abs(first - second).max() > 0.05
  keys = attach(params, adapter, spec, jax.random.key(3))["blocks"]["mlp"]
  drawn = [jax.random.bits(key, (2,)) for name in ("up", "gate") for key in keys[name]["kernel"].key]
  assert len({tuple(map(int, bits)) for bits in drawn}) == 4


def test_counts_and_axes():
  graphdef, params = make()
  axes = parameters.logical_axes(lambda: parameters.merge(graphdef, make()[1]))
  adapter = init_adapter(ALL, params, jax.random.key(0))
  per_layer = 3 * ((16 + 24) + 2 * (16 + 12) + (24 + 16) + 3 * (16 + 20))
  assert count_parameters(adapter) == 2 * per_layer + 3 * (16 + 16)
  names = adapter_axes(ALL, params, axes)
  assert names["blocks"]["attention"]["query"]["kernel"] == {
    "a": ("layers", "embed", None),
    "b": ("layers", None, "heads", "head_dim"),
  }
  assert names["blocks"]["attention"]["output"]["kernel"]["a"] == ("layers", "heads", "head_dim", None)
  assert names["unembedding"] == {"a": ("embed", None), "b": (None, "vocab")}
  is_names = lambda node: isinstance(node, tuple)  # noqa: E731
  jax.tree.map(lambda n, leaf: np.testing.assert_equal(len(n), leaf.ndim), names, adapter, is_leaf=is_names)
  shapes = jax.eval_shape(lambda: params)
  abstract = jax.eval_shape(lambda key: init_adapter(ALL, shapes, key), jax.random.key(0))
  assert jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(lambda leaf: leaf.shape, adapter)
  assert (
    LoraSpec(rank=4, alpha=8).scale == 2 and LoraSpec(rank=4, alpha=8, is_rank_stabilised=True).scale == 4
  )
  assert LoraSpec.from_dict(DORA.to_dict()) == DORA
  decomposed = adapter_axes(DORA, params, axes)
  assert decomposed["blocks"]["attention"]["query"]["kernel"]["magnitude"] == ("layers", "heads", "head_dim")
  assert decomposed["unembedding"]["magnitude"] == ("vocab",)
  outputs = 2 * (24 + 12 + 12 + 16 + 20 + 20 + 16) + 16
  assert (
    count_parameters(init_adapter(DORA, params, jax.random.key(0))) == count_parameters(adapter) + outputs
  )


def test_mistakes_are_named():
  _, params = make()
  _, apart = make("unroll")
  adapter = init_adapter(ALL, params, jax.random.key(0))
  tied = make(tied_head=True)[1]
  for call, match in (
    (lambda: LoraSpec(rank=0), "rank=0"),
    (lambda: LoraSpec(alpha=-1.0), "alpha=-1.0"),
    (lambda: LoraSpec(dropout=1.0), "dropout=1.0"),
    (lambda: find_targets(dataclasses.replace(ALL, dropout=0.1), params), "leave 'unembedding' out"),
    (lambda: attach(params, adapter, DORA), "give a, b, magnitude"),
    (lambda: LoraSpec(init="kaimin"), "did you mean 'kaiming'"),
    (lambda: LoraSpec(targets=()), "targets"),
    (
      lambda: find_targets(LoraSpec(targets=("blocks/mlp/upp/kernel",)), params),
      "nearest is 'blocks/mlp/up/kernel'",
    ),
    (lambda: find_targets(LoraSpec(targets=("(",)), params), "regular expression"),
    (
      lambda: find_targets(LoraSpec(targets=(".*",)), params),
      "'blocks/attention_norm/scale', which cannot be adapted",
    ),
    (lambda: find_targets(ALL, tied), "matches no weight"),
    (lambda: attach(apart, adapter, ALL), "same layout"),
    (lambda: attach(params, adapter, LoraSpec(rank=2, targets=ALL.targets)), "rank 2 need"),
    (lambda: attach(params, {"final_norm": {"scale": {"a": 1, "b": 2}}}, ALL), "final_norm/scale"),
  ):
    with pytest.raises(ValueError, match=match):
      call()
