"""What makes each baseline and variant of CoCoMix differ (sections 2.6, 13.3 and 13.4 of the specification)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cocomix_models import (
  LENGTH,
  VOCAB,
  attention_inputs,
  concept_spec,
  gpt2_spec,
  make_labels,
  make_model,
  make_tokens,
  stream_at_insertion,
)
from flax import nnx

from nr.models.attention import AttentionInputs
from nr.models.concept_mixing import ConceptMixingTransformer
from nr.models.concept_mixing_spec import MODES
from nr.models.concept_rows import RowLayout
from nr.models.parameters import merge, split
from nr.models.transformer import Transformer
from nr.objectives.attribution import AttributionSpec, UpperHalf, concept_labels
from nr.objectives.distillation import distilled_next_token_loss, regression_loss
from nr.objectives.label_ranking import Latents

TARGET_DIM = 12


def variant(mode, **settings):
  extra = {"hidden": dict(target_dim=TARGET_DIM)}.get(mode, {})
  return concept_spec(mode=mode, **{**extra, **settings})


def inserted(model, tokens):
  """The inserted rows [B, L, D] of a model with a row behind every token, and the stream they follow."""
  h = stream_at_insertion(model, tokens)
  found = model.insert(h, attention_inputs(tokens))
  return np.asarray(found.rows_BRD[:, 1::2]), np.asarray(h), found


@pytest.mark.parametrize("mode", MODES[0])
def test_01_every_mode_has_the_parameters_that_its_spec_counts(mode):
  concepts = variant(mode)
  build = lambda: ConceptMixingTransformer(gpt2_spec(), concepts, rngs=nnx.Rngs(0))  # noqa: E731
  shapes = jax.eval_shape(lambda: split(build())[1])
  own = sum(leaf.size for leaf in jax.tree.leaves(shapes.get("concepts", {})))
  stored, active = concepts.num_parameters(gpt2_spec())
  assert own == stored >= active
  expected = {"pause": 16, "thought": 0, "none": 0}
  assert stored == expected.get(mode, stored)


@pytest.mark.parametrize(
  "mode, settings",
  [
    ("hidden", {}),
    ("thought", dict(refinements=1)),
    ("cocomix", dict(insert_every=3)),
  ],
)
def test_04_every_variant_is_causal(mode, settings):
  model, tokens = make_model(concepts=variant(mode, **settings)), make_tokens()
  forward = jax.jit(model)
  changed = tokens.at[:, 4:].set((tokens[:, 4:] + 1) % VOCAB)
  before, after = forward(tokens), forward(changed)
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert (np.abs(before - after)[:, 4:].max(axis=-1) > 1e-4).all()


def test_a_pause_is_one_vector_behind_every_token():
  model, tokens = make_model(concepts=variant("pause")), make_tokens()
  rows, h, found = inserted(model, tokens)
  np.testing.assert_array_equal(rows, np.broadcast_to(model.concepts.vector[...], h.shape))
  np.testing.assert_array_equal(found.rows_BRD[:, 0::2], h)
  # The next token is read at the pause: with its vector changed, every position answers otherwise.
  graphdef, params = split(model)
  params["concepts"]["vector"] *= -1.0
  change = np.abs(merge(graphdef, params)(tokens) - model(tokens)).max(axis=-1)
  assert (change > 1e-4).all()


def test_a_regressed_state_is_compressed_and_inserted():
  """c = (W g(u) + b) s + mu with g a two-layer MLP; gelu, as the docstring says, by its tanh form."""
  model, tokens = make_model(concepts=variant("hidden", mlp_dim=5)), make_tokens()
  rows, h, found = inserted(model, tokens)
  weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), split(model)[1]["concepts"])
  mean, std = h.mean(-1, keepdims=True), h.std(-1, keepdims=True, ddof=1)
  x = ((h - mean) / (std + 1e-5)) @ weights["up"]["kernel"] + weights["up"]["bias"]
  x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  g = x @ weights["down"]["kernel"] + weights["down"]["bias"]
  assert g.shape == (2, LENGTH, TARGET_DIM) and weights["up"]["kernel"].shape == (16, 5)
  np.testing.assert_allclose(found.regressed_BLE, g, rtol=2e-4, atol=2e-5)
  c = (g @ weights["compression"]["kernel"] + weights["compression"]["bias"]) * std + mean
  np.testing.assert_allclose(rows, c, rtol=2e-4, atol=2e-5)


def test_a_thought_is_the_last_hidden_state_of_a_first_pass():
  model, tokens = make_model(concepts=variant("thought", insert_at=0)), make_tokens()
  rows, h, _ = inserted(model, tokens)
  last = np.asarray(model.transformer.hidden(tokens))
  np.testing.assert_allclose(
    rows, last * h.std(-1, keepdims=True, ddof=1) + h.mean(-1, keepdims=True), rtol=1e-5, atol=1e-6
  )
  literal = make_model(concepts=variant("thought", insert_at=0, norm="none"))
  np.testing.assert_allclose(inserted(literal, tokens)[0], last, rtol=1e-6)


def test_refined_thoughts_have_seen_earlier_thoughts():
  """One refinement reads thoughts at the token rows of a pass that holds the first thoughts; at token 0 nothing is
  earlier, and after as many refinements as positions nothing changes any more."""
  tokens = make_tokens(batch=1, length=4)
  rows = [
    inserted(make_model(concepts=variant("thought", refinements=count)), tokens)[0] for count in (0, 1, 4, 5)
  ]
  np.testing.assert_allclose(rows[1][:, 0], rows[0][:, 0], rtol=1e-5, atol=1e-6)
  assert (np.abs(rows[1] - rows[0])[:, 1:].max(axis=-1) > 1e-4).all()
  np.testing.assert_allclose(rows[3], rows[2], rtol=1e-5, atol=1e-6)


def test_rows_stand_behind_every_third_token():
  layout = RowLayout(7, 3)
  tokens, positions = jnp.arange(7.0).reshape(1, 7, 1), jnp.arange(7).reshape(1, 7)
  rows = layout.insert(tokens, 100 + layout.parents(tokens))
  assert rows[0, :, 0].tolist() == [0, 1, 2, 102, 3, 4, 5, 105, 6]
  assert layout.readout(rows)[0, :, 0].tolist() == [0, 1, 102, 3, 4, 105, 6]
  assert layout.tokens(rows)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
  assert layout.attention(AttentionInputs(positions)).positions_BL.tolist() == [[0, 1, 2, 2, 3, 4, 5, 5, 6]]
  short = RowLayout(2, 3)
  np.testing.assert_array_equal(short.insert(tokens[:, :2], tokens[:, :0]), tokens[:, :2])


@pytest.mark.parametrize("mode", ["cocomix", "pause"])
def test_fewer_rows_are_the_same_model_with_the_others_unseen(mode):
  """Counted from 0 there are L + L // n rows; with positions given, 2 L of which some are unseen."""
  model, tokens = make_model(concepts=variant(mode, insert_every=3)), make_tokens()
  forward = jax.jit(lambda tokens, segments: model(tokens, segment_ids_BL=segments))
  whole = forward(tokens, None)
  np.testing.assert_allclose(forward(tokens, jnp.ones_like(tokens)), whole, atol=1e-5)
  # Packed documents count their own tokens, and padding counts none.
  segments = jnp.array([[1] * 4 + [2] * 5 + [0]])
  packed = forward(tokens[:1], segments)
  np.testing.assert_allclose(packed[:, :4], model(tokens[:1, :4]), atol=1e-5)
  np.testing.assert_allclose(packed[:, 4:9], model(tokens[:1, 4:9]), atol=1e-5)


def test_rows_behind_more_tokens_than_there_are_leave_the_plain_transformer():
  model, tokens = make_model(concepts=variant("cocomix", insert_every=LENGTH + 1)), make_tokens()
  np.testing.assert_allclose(model(tokens), model.transformer(tokens), atol=1e-6)


def test_the_cost_of_the_blocks_above_falls_with_the_rows():
  def flops(every):
    model = make_model(
      gpt2_spec(layers="unroll"), variant("pause", insert_every=every, last_block="all_rows")
    )
    return jax.jit(model).lower(make_tokens()).compile().cost_analysis()["flops"]

  assert flops(1) > flops(2) > flops(5)


@pytest.mark.parametrize("mode", ["pause", "hidden", "thought", "none"])
def test_labels_and_edits_are_refused_where_no_concepts_are_predicted(mode):
  with pytest.raises(ValueError, match=f"labels_BLA: mode '{mode}' predicts no concepts"):
    make_model(concepts=variant(mode))(make_tokens(), labels_BLA=make_labels())


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(mode="hidden"), "target_dim=0: mode 'hidden' needs the width of the teacher"),
    (dict(target_dim=8), "target_dim=8: mode 'cocomix' does not read it, only 'hidden' does"),
    (dict(mode="pause", refinements=1), "refinements=1: mode 'pause' does not read it, only 'thought' does"),
    (dict(mode="add", insert_every=2), "insert_every=2: mode 'add' inserts no rows"),
    (dict(insert_every=0), "insert_every=0: give a positive integer"),
    (dict(mode="thought", refinements=-1), "refinements=-1: give a number of passes"),
  ],
)
def test_settings_that_a_mode_does_not_read_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    concept_spec(**settings)


def _distilling(seed=0):
  keys = jax.random.split(jax.random.key(seed), 5)
  student, head = jax.random.normal(keys[0], (2, 6, 8)), jax.random.normal(keys[1], (40, 8))
  teacher, teacher_head = jax.random.normal(keys[2], (2, 6, 5)), jax.random.normal(keys[3], (40, 5))
  targets = jax.random.randint(keys[4], (2, 6), 0, 40)
  weights = jnp.ones((2, 6)).at[0, 2].set(0.0).at[1, 1].set(2.0)
  return student, head, teacher, teacher_head, targets, weights


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_distillation_is_the_divergence_from_the_teacher(temperature, chunk_size):
  student, head, teacher, teacher_head, targets, weights = _distilling()
  settings = dict(temperature=temperature, chunk_size=chunk_size)

  def total(student, head, teacher):
    found = distilled_next_token_loss(student, head, teacher, teacher_head, targets, weights, **settings)
    return found.divergence.total, found

  gradients, found = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(student, head, teacher)
  z, zt = (
    np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    for a, b in ((student, head), (teacher, teacher_head))
  )
  log_q, log_p = (x / temperature - np.log(np.exp(x / temperature).sum(-1, keepdims=True)) for x in (z, zt))
  p, q = np.exp(log_p), np.exp(log_q)
  gap = temperature**2 * (p * (log_p - log_q)).sum(-1)
  np.testing.assert_allclose(found.divergence.total, (gap * weights).sum(), rtol=1e-5)
  assert found.divergence.weight == weights.sum() == 12
  nll = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, np.asarray(targets)[..., None], -1)[..., 0]
  np.testing.assert_allclose(found.next_token.total, (nll * weights).sum(), rtol=1e-5)
  # d KL / d z = T (q - p): of the scale of T = 1, and none of it reaches the teacher.
  dz = temperature * (q - p) * np.asarray(weights)[..., None]
  np.testing.assert_allclose(gradients[0], dz @ np.asarray(head), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(gradients[1], np.einsum("blv,bld->vd", dz, student), rtol=1e-4, atol=1e-5)
  assert not np.any(gradients[2])


def test_a_student_that_equals_its_teacher_has_no_divergence():
  student, head, _, _, targets, weights = _distilling()
  found = distilled_next_token_loss(student, head, student, head, targets, weights)
  np.testing.assert_allclose(found.divergence.total, 0, atol=1e-5)


def test_distillation_never_holds_the_logits_of_all_tokens():
  student, head, teacher, teacher_head, targets, weights = _distilling()

  def holds_all(chunk_size):
    def total(student):
      found = distilled_next_token_loss(
        student, head, teacher, teacher_head, targets, weights, chunk_size=chunk_size
      )
      return found.divergence.total + found.next_token.total

    text = jax.jit(jax.grad(total)).lower(student).as_text()
    return any(f"tensor<{shape}xf32>" in text for shape in ("2x6x40", "6x2x40", "12x40"))

  assert holds_all(None) and not holds_all(4)


def test_distillation_refuses_another_vocabulary():
  student, head, teacher, teacher_head, targets, weights = _distilling()
  with pytest.raises(ValueError, match="student has 40 token ids and its teacher 39"):
    distilled_next_token_loss(student, head, teacher, teacher_head[1:], targets, weights)


def test_regression_losses_are_means_over_the_width():
  predicted, state = jnp.array([[[1.0, 2.0], [3.0, 4.0]]]), jnp.array([[[0.0, 4.0], [-3.0, -4.0]]])
  first = jnp.array([[1.0, 0.0]])
  assert regression_loss(predicted, state, first, "l1").mean() == 1.5
  assert regression_loss(predicted, state, first, "l2").mean() == 2.5
  np.testing.assert_allclose(
    regression_loss(predicted, state, first, "cosine").mean(), 1 - 2 / 5**0.5, rtol=1e-6
  )
  np.testing.assert_allclose(regression_loss(predicted, state, 1 - first, "cosine").mean(), 2, rtol=1e-6)
  for kind in ("l1", "l2", "cosine"):
    gradient = jax.grad(lambda state, kind=kind: regression_loss(predicted, state, first, kind).total)(state)
    assert not np.any(gradient)
  with pytest.raises(ValueError, match="regression='l3' is unknown"):
    regression_loss(predicted, state, first, "l3")


def test_activation_labels_are_the_most_active_latents_and_take_no_gradient():
  values = jnp.array([[[0.5, 3.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0]]])
  latents = Latents(values, jnp.array([[[7, 1, 4, 9], [3, 5, 6, 8]]]), jnp.ones((10, 2)))

  def never(*arguments):
    raise AssertionError("a gradient was asked for")

  spec = AttributionSpec(k_attr=3, criterion="activation", mask_last=False)
  found = concept_labels(UpperHalf(never, never), jnp.zeros((1, 2, 2)), None, latents, jnp.ones((1, 2)), spec)
  assert found.labels_BLA.tolist() == [[[1, 9, 7], [3, 65535, 65535]]]
  assert found.positive_BL.tolist() == [[3, 1]]
  with pytest.raises(
    ValueError, match="targets.sign='negated' decides nothing with targets.criterion='activation'"
  ):
    AttributionSpec(criterion="activation", sign="negated")


def test_the_baseline_of_the_same_width_is_the_transformer_inside():
  concept, plain = make_model(), Transformer(gpt2_spec(), rngs=nnx.Rngs(0))
  inside = split(concept)[1]["transformer"]
  assert jax.tree.map(jnp.shape, inside) == jax.tree.map(jnp.shape, split(plain)[1])
