"""Laws of the concept mixing model, by their numbers in the specification of CoCoMix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cocomix_models import (
  CONCEPTS,
  LENGTH,
  VOCAB,
  attention_inputs,
  concept_spec,
  gpt2_spec,
  llama_spec,
  make_model,
  make_tokens,
  stream_at_insertion,
)
from flax import nnx

from nr.models.concept_mixing import (
  ConceptMixingSpec,
  ConceptMixingTransformer,
  ConceptPath,
)
from nr.models.concept_rows import RowLayout
from nr.models.parameters import merge, split
from nr.models.transformer import Transformer, TransformerSpec

# d, layers, heads, insertion -> base, total, activated; baseline width -> its parameters.
PAPER_SIZES = {
  "69M": (512, 8, 8, 3, 51_475_968, 85_064_192, 68_269_568, 624, 69_445_584),
  "386M": (1024, 24, 16, 5, 354_823_168, 421_966_848, 388_410_368, 1072, 386_274_832),
  "1.38B": (2048, 24, 16, 5, 1_313_626_112, 1_447_880_704, 1_380_800_512, 2096, 1_373_389_328),
}


def _count(build):
  shapes = jax.eval_shape(lambda: split(build())[1])
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_01_parameter_counts(name):
  width, layers, heads, insert_at, base, total, activated, baseline_width, baseline = PAPER_SIZES[name]
  sizes = dict(num_layers=layers, num_heads=heads)
  spec = TransformerSpec.gpt2(model_dim=width, **sizes)
  concepts = ConceptMixingSpec(insert_at=insert_at, num_concepts=32_768)
  assert _count(lambda: Transformer(spec, rngs=nnx.Rngs(0))) == base
  assert _count(lambda: ConceptMixingTransformer(spec, concepts, rngs=nnx.Rngs(0))) == total
  stored, active = concepts.num_parameters(spec)
  assert (base + stored, base + active) == (total, activated)
  wide = TransformerSpec.gpt2(model_dim=baseline_width, **sizes)
  assert _count(lambda: Transformer(wide, rngs=nnx.Rngs(0))) == baseline


def test_01_the_teacher_of_the_paper_has_124_million_parameters():
  assert _count(lambda: Transformer(TransformerSpec.gpt2(), rngs=nnx.Rngs(0))) == 124_439_808


@pytest.mark.parametrize("mode", ["none", "prediction_only"])
def test_02_without_insertion_the_model_is_its_transformer(mode):
  model = make_model(concepts=concept_spec(mode=mode))
  tokens = make_tokens()
  np.testing.assert_allclose(model(tokens), model.transformer(tokens), atol=1e-6)
  assert not np.allclose(make_model()(tokens), make_model().transformer(tokens), atol=1e-3)


def test_03_zero_compression_gives_the_mean_of_the_stream():
  graphdef, params = split(make_model(concepts=concept_spec(mode="mix_only")))
  params["concepts"]["compression"] = jax.tree.map(jnp.zeros_like, params["concepts"]["compression"])
  params["concepts"]["pre_bias"] = jnp.zeros_like(params["concepts"]["pre_bias"])
  model = merge(graphdef, params)
  h = stream_at_insertion(model, make_tokens())
  c = model.concepts.mix(h, model.concepts.predict(h))
  np.testing.assert_array_equal(c, np.broadcast_to(h.mean(axis=-1, keepdims=True), h.shape))


@pytest.mark.parametrize("spec", [gpt2_spec(), llama_spec(), llama_spec(layers="unroll")])
def test_04_causality(spec):
  model = make_model(spec)
  tokens = make_tokens()

  @jax.jit
  def outputs(tokens):
    z = model.concepts.logits(stream_at_insertion(model, tokens))
    return model(tokens), z

  logits, z = outputs(tokens)
  for position in (1, 4, LENGTH - 1):
    changed = tokens.at[:, position:].set((tokens[:, position:] + 1) % VOCAB)
    new_logits, new_z = outputs(changed)
    np.testing.assert_array_equal(new_logits[:, :position], logits[:, :position])
    np.testing.assert_array_equal(new_z[:, :position], z[:, :position])
    assert (np.abs(new_logits - logits)[:, position:].max(axis=-1) > 1e-4).all()


def test_05_a_concept_depends_on_its_token_and_earlier_ones():
  model = make_model()
  tokens = make_tokens(batch=1, length=5)

  def concepts_of(x):
    h, _ = model.transformer.run_blocks(x, 0, 1, attention=attention_inputs(tokens))
    return model.concepts.mix(h, model.concepts.predict(h))[0]

  jacobian = jax.jit(jax.jacrev(concepts_of))(model.transformer.embed(tokens))[:, :, 0]  # [t, D, s, D]
  size_ts = np.abs(jacobian).max(axis=(1, 3))
  assert (size_ts[np.triu_indices(5, k=1)] == 0).all()
  assert (size_ts[np.tril_indices(5)] > 0).all()


def test_06_the_compression_moves_odd_rows_only():
  graphdef, params = split(make_model())
  tokens = make_tokens()

  def rows(params):
    model = merge(graphdef, params)
    return model.insert(stream_at_insertion(model, tokens), attention_inputs(tokens))[0]

  before = rows(params)
  params["concepts"]["compression"]["kernel"] += 0.1
  after = rows(params)
  assert before.shape == (2, 2 * LENGTH, 16)
  np.testing.assert_array_equal(after[:, 0::2], before[:, 0::2])
  assert (np.abs(after - before)[:, 1::2].max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("spec", [gpt2_spec(), llama_spec()])
def test_07_a_token_does_not_see_its_own_concept(spec):
  model = make_model(spec)
  tokens = make_tokens(batch=1, length=4)
  h = stream_at_insertion(model, tokens)
  layout = RowLayout(4)
  attention = layout.attention(attention_inputs(tokens))

  def block_output(c):
    return model.transformer.run_blocks(layout.insert(h, c), 1, 2, attention=attention)[0][0]

  c = model.concepts.mix(h, model.concepts.predict(h))
  jacobian = jax.jit(jax.jacrev(block_output))(c)[:, :, 0]  # [row, D, t, D]
  size = np.abs(jacobian).max(axis=(1, 3))
  for row in range(8):
    for t in range(4):
      # Concept t is row 2t + 1, so that rows up to 2t cannot see it.
      assert (size[row, t] > 0) == (row >= 2 * t + 1), (row, t)


@pytest.mark.parametrize("spec", [gpt2_spec(), llama_spec()])
def test_08_masking_concept_rows_gives_the_plain_transformer(spec):
  model = make_model(spec)
  tokens = make_tokens()
  rows, attention = model.insert(stream_at_insertion(model, tokens), attention_inputs(tokens))[:2]
  # Token rows in segment 1 and concept rows in segment 2 do not see each other.
  segments = jnp.broadcast_to(jnp.arange(2 * LENGTH) % 2 + 1, (2, 2 * LENGTH))
  attention = attention._replace(segment_ids_BL=segments)
  rows, _ = model.transformer.run_blocks(rows, 1, attention=attention)
  logits = model.logits(model.transformer.final_norm(rows[:, 0::2]))
  np.testing.assert_allclose(logits, model.transformer(tokens), atol=2e-6)


def test_09_the_standard_deviation_is_unbiased_and_epsilon_is_outside_the_root():
  graphdef, params = split(make_model(concepts=concept_spec(top_k=CONCEPTS)))
  params["concepts"] = jax.tree.map(jnp.zeros_like, params["concepts"])
  params["concepts"]["head"]["kernel"] = jnp.eye(16, CONCEPTS)
  params["concepts"]["compression"]["bias"] = jnp.ones(16)
  path = merge(graphdef, params).concepts
  for scale in (1.0, 1e-5):  # the second makes epsilon count
    h = np.asarray(scale * jax.random.normal(jax.random.key(0), (1, 3, 16)), np.float64)
    mean, std = h.mean(axis=-1, keepdims=True), h.std(axis=-1, keepdims=True, ddof=1)
    z = path.logits(jnp.asarray(h, jnp.float32))[..., :16]
    np.testing.assert_allclose(z, (h - mean) / (std + 1e-5), rtol=2e-5, atol=1e-6)
    # With unit bias and nothing else, c = s + mu.
    c = path.mix(jnp.asarray(h, jnp.float32), path.predict(jnp.asarray(h, jnp.float32)))
    expected = np.broadcast_to(std, h.shape) / scale
    np.testing.assert_allclose((c - mean) / scale, expected, rtol=1e-5, atol=1e-6)
    biased = h.std(axis=-1, keepdims=True, ddof=0)
    np.testing.assert_allclose(biased / std, np.sqrt(15 / 16), rtol=1e-12)


@pytest.mark.parametrize("implementation", ["chunked", "bitsearch", "lax"])
def test_10_top_k_keeps_k_raw_logits_of_either_sign(implementation):
  graphdef, params = split(make_model(concepts=concept_spec(top_k_impl=implementation)))
  params["concepts"]["head"]["bias"] -= 5.0  # most logits are negative now
  path = merge(graphdef, params).concepts
  h = jax.random.normal(jax.random.key(0), (2, LENGTH, 16))
  z, prediction = np.asarray(path.logits(h)), path.predict(h)
  sparse = np.zeros(z.shape, np.float32)
  np.put_along_axis(sparse, np.asarray(prediction.indices_BLK), np.asarray(prediction.values_BLK), axis=-1)
  assert ((sparse != 0).sum(axis=-1) == 6).all()
  np.testing.assert_allclose(sparse[sparse != 0], z[sparse != 0], rtol=1e-6)
  threshold = np.sort(z, axis=-1)[..., -6, None]
  np.testing.assert_array_equal(sparse != 0, z >= threshold)
  assert (sparse < 0).any()


@pytest.mark.parametrize(
  "spec, is_packed",
  [
    (gpt2_spec(), False),
    (gpt2_spec(layers="unroll"), True),
    (llama_spec(use_qk_norm=True, remat="full"), True),
  ],
)
def test_15_the_last_block_shortcut_is_exact(spec, is_packed):
  shortcut = make_model(spec)
  graphdef, _ = split(make_model(spec, concept_spec(last_block="all_rows")))
  tokens = make_tokens()
  segments = jnp.array([[1] * 4 + [2] * 6, [0] * 3 + [1] * 7]) if is_packed else None

  def outputs(graphdef, params):
    def loss(params):
      logits = merge(graphdef, params)(tokens, segment_ids_BL=segments)
      logits = logits if segments is None else jnp.where((segments != 0)[..., None], logits, 0)
      return (logits**2).mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  short_graphdef, params = split(shortcut)
  (_, short_logits), short_gradient = outputs(short_graphdef, params)
  (_, full_logits), full_gradient = outputs(graphdef, params)
  np.testing.assert_allclose(short_logits, full_logits, atol=2e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), short_gradient, full_gradient)


def test_15_the_last_block_shortcut_changes_the_program():
  def flops(last_block):
    # Unrolled, because the counter sees the body of a scan once.
    model = make_model(gpt2_spec(layers="unroll"), concept_spec(last_block=last_block))
    return jax.jit(model).lower(make_tokens()).compile().cost_analysis()["flops"]

  assert flops("readout_rows") < flops("all_rows")


def test_16_initial_statistics_of_the_concept_logits():
  spec = TransformerSpec.gpt2(model_dim=512, num_layers=8, num_heads=8)
  path = ConceptPath(spec, ConceptMixingSpec(insert_at=3, num_concepts=32_768), rngs=nnx.Rngs(0))
  h = 0.03 * jax.random.normal(jax.random.key(1), (1, 96, 512))
  prediction = path.predict(h)
  np.testing.assert_allclose(prediction.log_normalizer_BL.mean(), 10.50, rtol=0.01)
  np.testing.assert_allclose(path.logits(h).std(), 0.4525, rtol=0.01)
  np.testing.assert_allclose(prediction.values_BLK[..., 0].mean(), 1.876, rtol=0.03)
  np.testing.assert_allclose(prediction.values_BLK[..., -1].mean(), 1.403, rtol=0.01)
