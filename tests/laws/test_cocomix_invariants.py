"""Invariants of the concept mixing model beyond the numbered laws, and its answers to bad settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cocomix_models import (
  concept_spec,
  gpt2_spec,
  llama_spec,
  make_labels,
  make_model,
  make_tokens,
)
from flax import nnx

from nr.models.attention import AttentionInputs
from nr.models.concept_mixing import ConceptMixingSpec, ConceptMixingTransformer
from nr.models.concept_rows import RowLayout
from nr.models.parameters import logical_axes, merge, split, unstack_layers


def test_stacked_and_unrolled_layers_agree():
  graphdef, params = split(make_model())
  unrolled, _ = split(ConceptMixingTransformer(gpt2_spec(layers="unroll"), concept_spec(), rngs=nnx.Rngs(0)))
  tokens = make_tokens()
  stacked = jax.jit(lambda params: merge(graphdef, params)(tokens))(params)
  listed = jax.jit(lambda params: merge(unrolled, params)(tokens))(unstack_layers(params))
  np.testing.assert_allclose(stacked, listed, atol=2e-6)


@pytest.mark.parametrize("spec", [gpt2_spec(), llama_spec()])
def test_packed_documents_and_padding_equal_separate_ones(spec):
  model = make_model(spec)
  forward = jax.jit(lambda tokens, segments: model(tokens, segment_ids_BL=segments))
  tokens = make_tokens(batch=1)
  segments = jnp.array([[1] * 4 + [2] * 5 + [0]])
  packed = forward(tokens, segments)
  np.testing.assert_allclose(packed[:, :4], forward(tokens[:, :4], None), atol=1e-5)
  np.testing.assert_allclose(packed[:, 4:9], forward(tokens[:, 4:9], None), atol=1e-5)
  assert np.isfinite(packed).all()


def test_a_concept_row_has_the_rotary_position_and_segment_of_its_token():
  doubled = RowLayout(3).attention(AttentionInputs(jnp.array([[0, 1, 2]]), jnp.array([[1, 1, 2]])))
  assert doubled.positions_BL.tolist() == [[0, 0, 1, 1, 2, 2]]
  assert doubled.segment_ids_BL.tolist() == [[1, 1, 1, 1, 2, 2]]
  assert RowLayout(1).attention(AttentionInputs(jnp.array([[0]]))).segment_ids_BL is None
  rows = RowLayout(2).insert(jnp.array([[[1.0], [2.0]]]), jnp.array([[[3.0], [4.0]]]))
  assert rows[0, :, 0].tolist() == [1, 3, 2, 4]


def test_rotary_model_depends_on_distances_only():
  model = make_model(llama_spec())
  forward = jax.jit(lambda positions: model(make_tokens(), positions_BL=positions))
  positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
  np.testing.assert_allclose(forward(positions), forward(positions + 9), atol=1e-4)
  assert not np.allclose(forward(positions), forward(2 * positions), atol=1e-3)


def test_adding_keeps_the_rows_and_mix_only_is_the_same_model():
  tokens = make_tokens()
  added = make_model(concepts=concept_spec(mode="add"))
  x, attention = added.insert(jnp.ones((2, 10, 16)).at[..., 0].set(0), AttentionInputs(tokens))[:2]
  assert x.shape == (2, 10, 16) and attention.positions_BL.shape == (2, 10)
  only = make_model(concepts=concept_spec(mode="mix_only"))
  np.testing.assert_array_equal(make_model()(tokens), only(tokens))


def test_dropout_follows_its_key():
  model = make_model(gpt2_spec(dropout=0.2))
  tokens = make_tokens()
  forward = jax.jit(lambda key: model(tokens, key=key))
  first = forward(jax.random.key(0))
  np.testing.assert_array_equal(first, forward(jax.random.key(0)))
  assert not np.allclose(first, forward(jax.random.key(1)), atol=1e-2)
  np.testing.assert_array_equal(model(tokens), make_model()(tokens))


def test_half_precision_keeps_predictions_and_logits_in_float32():
  model = make_model(gpt2_spec(dtype="bfloat16"))

  def run(tokens):
    output = model.forward(tokens, labels_BLA=make_labels())
    return output, model.logits(output.hidden_BLD)

  output, logits = jax.jit(run)(make_tokens())
  assert output.hidden_BLD.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  assert {array.dtype for array in output.concepts} == {jnp.dtype("float32"), jnp.dtype("int32")}
  np.testing.assert_allclose(logits, make_model()(make_tokens()), atol=0.5)


def test_constant_streams_have_finite_gradients():
  path = make_model().concepts
  gradient = jax.grad(lambda h: path.mix(h, path.predict(h)).sum())(jnp.ones((1, 2, 16)))
  assert np.isfinite(gradient).all()


def test_every_parameter_has_logical_axes():
  axes = logical_axes(lambda: ConceptMixingTransformer(gpt2_spec(), concept_spec(), rngs=nnx.Rngs(0)))
  assert axes["concepts"] == {
    "head": {"kernel": ("embed", "concepts"), "bias": ("concepts",)},
    "compression": {"kernel": ("concepts", "embed"), "bias": ("embed",)},
    "pre_bias": ("embed",),
  }


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(mode="mixed"), r"mode='mixed': choose one of cocomix"),
    (dict(top_k_impl="approximate"), "top_k_impl='approximate': not available yet; available are chunked"),
    (dict(norm="ref"), "norm='ref': choose one of reference, none"),
    (dict(top_k=49), "top_k=49: must be at most num_concepts=48"),
    (dict(num_concepts=65536), "num_concepts=65536: labels are uint16 .* at most 65535"),
    (dict(insert_at=-1), "insert_at=-1: give the index of a block"),
    (dict(concept_chunk=-1), "concept_chunk=-1: give a number of concepts"),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    concept_spec(**settings)


def test_misuse_is_named():
  with pytest.raises(ValueError, match="insert_at=3: the model has 3 blocks; choose 0 to 2"):
    make_model(concepts=concept_spec(insert_at=3))
  with pytest.raises(ValueError, match="did you mean 'top_k'"):
    ConceptMixingSpec.from_dict(dict(insert_at=1, num_concepts=8, topk=2))
  assert ConceptMixingSpec.from_dict(concept_spec().to_dict()) == concept_spec()
  with pytest.raises(ValueError, match="mode 'none' predicts no concepts"):
    make_model(concepts=concept_spec(mode="none"))(make_tokens(), labels_BLA=make_labels())
