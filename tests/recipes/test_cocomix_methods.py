"""The language-model methods of the CoCoMix recipe pass the suite that every method passes."""

import jax
import numpy as np
import pytest

from nr.models import parameters
from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.transformer import TransformerSpec
from nr.recipes.cocomix.method import StudentLoss, cocomix_method, student_method
from nr.training.model_files import ConceptMixingModelSpec, Model, build_model, graphdef_of
from nr.training.next_token import next_token_method
from tests.training import method_suite

ROWS, LENGTH, VOCABULARY, CONCEPTS = 16, 12, 40, 24

GPT2 = TransformerSpec.gpt2(vocab_size=VOCABULARY, num_layers=3, model_dim=16, num_heads=4, max_length=LENGTH)
LLAMA = TransformerSpec.llama(
  vocab_size=VOCABULARY,
  num_layers=2,
  model_dim=16,
  num_heads=4,
  num_kv_heads=4,
  mlp_dim=32,
  max_length=LENGTH,
)
# The softmax over keys does not change when every key is shifted by the same vector.
KEY_BIAS = ("(.*/)?blocks/attention/key/bias",)


def language_batch(seed=0):
  """Random tokens with uneven weights, so that a mean of means would be noticed."""
  generator = np.random.default_rng(seed)
  tokens = generator.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
  weights = (generator.random((ROWS, LENGTH)) < np.linspace(0.2, 1.0, ROWS)[:, None]).astype(np.float32)
  weights[:, -1] = 0
  return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def labelled_batch():
  generator = np.random.default_rng(1)
  batch = language_batch()
  labels = np.argsort(generator.random((ROWS, LENGTH, CONCEPTS)), axis=-1)[..., :4].astype(np.int32)
  labels[generator.random(labels.shape) < 0.2] = 65535
  labels[:, -1] = 65535
  return {**batch, "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "name"), [(GPT2, "next_token_gpt2"), (LLAMA, "next_token_llama")])
def test_next_token_method(spec, name, tmp_path):
  method = next_token_method(spec, name=name, loss_chunk=16)
  method_suite.check_all(method, language_batch(), tmp_path, golden=name, except_for=KEY_BIAS)


@pytest.mark.slow
def test_cocomix_method(tmp_path):
  spec = ConceptMixingModelSpec(
    GPT2, ConceptMixingSpec(insert_at=1, num_concepts=CONCEPTS, top_k=4, concept_chunk=20)
  )
  method = cocomix_method(spec, loss_weight=0.1)
  method_suite.check_all(method, labelled_batch(), tmp_path, golden="cocomix", except_for=KEY_BIAS)


def test_the_total_is_equation_4():
  """Sum over scored tokens of CE plus lambda times the concept loss, over the number of scored tokens."""
  batch = labelled_batch()
  spec = ConceptMixingModelSpec(GPT2, ConceptMixingSpec(insert_at=1, num_concepts=CONCEPTS, top_k=4))
  method = cocomix_method(spec, loss_weight=0.3)
  params = method.init(jax.random.key(0))
  output = method.loss(params, {}, (), batch, jax.random.key(1))
  concept = output.metrics["concept_loss"]
  expected = (output.metrics["next_token_loss"].total + 0.3 * concept.total) / batch["weights"].sum()
  np.testing.assert_allclose(output.loss.mean(), expected, rtol=1e-6)
  assert concept.weight == (batch["labels"] != 65535).any(-1).sum()


def test_without_the_concept_loss_only_chosen_rows_of_the_head_are_trained():
  """Numbered 36 in the specification: lambda = 0 leaves the head the mixing path alone."""
  batch = labelled_batch()
  spec = ConceptMixingModelSpec(GPT2, ConceptMixingSpec(insert_at=1, num_concepts=CONCEPTS, top_k=1))
  one_token = {name: value[:1, :2] for name, value in batch.items()}
  one_token["weights"] = np.ones((1, 2), np.float32)
  gradients = {}
  for weight in (0.0, 0.1):
    method = cocomix_method(spec, loss_weight=weight)
    params = method_suite.perturbed(method.init(jax.random.key(0)))

    def loss(params, method=method):
      return method.loss(params, {}, (), one_token, jax.random.key(1)).loss.total

    gradients[weight] = np.asarray(jax.grad(loss)(params)["concepts"]["head"]["bias"])
  assert 1 <= (gradients[0.0] != 0).sum() <= 2  # at most one concept for each of the two tokens
  assert (gradients[0.1] != 0).sum() == CONCEPTS


TEACHER = TransformerSpec.llama(
  vocab_size=VOCABULARY,
  num_layers=2,
  model_dim=20,
  num_heads=2,
  num_kv_heads=2,
  mlp_dim=24,
  max_length=LENGTH,
)


def teacher_model():
  params = parameters.split(build_model(TEACHER, jax.random.key(7)))[1]
  return Model(TEACHER, graphdef_of(TEACHER), jax.tree.map(lambda leaf: 3 * leaf, params), "", {})


def hidden_spec():
  concepts = ConceptMixingSpec(
    insert_at=1, num_concepts=CONCEPTS, top_k=4, mode="hidden", target_dim=20, mlp_dim=8
  )
  return ConceptMixingModelSpec(GPT2, concepts)


@pytest.mark.slow
def test_a_student_of_the_teacher_s_outputs_and_states(tmp_path):
  """Distillation and direct regression, both of a teacher that runs in the train step."""
  settings = StudentLoss(loss_weight=0.3, kd_weight=0.2, regression="l1")
  method = student_method(
    hidden_spec(), settings, name="hidden", loss_chunk=16, teacher=teacher_model(), tap_layer=0
  )
  method_suite.check_all(method, language_batch(), tmp_path, golden="hidden_distilled", except_for=KEY_BIAS)


@pytest.mark.parametrize("regression_target", ["normalised", "raw"])
def test_the_terms_of_distillation_and_regression_are_added_by_their_weights(regression_target):
  """Against NumPy: sum over scored tokens of CE + 0.2 KL(teacher || student) + 0.3 mean |g - state|."""
  batch, teacher = language_batch(), teacher_model()
  settings = StudentLoss(loss_weight=0.3, kd_weight=0.2, regression="l1", regression_target=regression_target)
  method = student_method(hidden_spec(), settings, teacher=teacher, tap_layer=0)
  params = method_suite.perturbed(method.init(jax.random.key(0)), scale=0.3)
  output = method.loss(params, method.frozen, (), batch, jax.random.key(1))

  student = parameters.merge(graphdef_of(hidden_spec()), params)
  module = parameters.merge(teacher.graphdef, teacher.params)
  found = student.forward(batch["tokens"])

  def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  ours, theirs = log_softmax(student.logits(found.hidden_BLD)), log_softmax(module(batch["tokens"]))
  nll = -np.take_along_axis(ours, batch["targets"][..., None], -1)[..., 0]
  divergence = (np.exp(theirs) * (theirs - ours)).sum(-1)
  x, attention = module.enter(batch["tokens"])
  state = np.asarray(module.run_blocks(x, 0, 1, attention=attention)[0], np.float64)
  if regression_target == "normalised":
    state = (state - state.mean(-1, keepdims=True)) / (state.std(-1, keepdims=True, ddof=1) + 1e-5)
  distance = np.abs(np.asarray(found.regressed_BLE) - state).mean(-1)
  expected = ((nll + 0.2 * divergence + 0.3 * distance) * batch["weights"]).sum() / batch["weights"].sum()
  np.testing.assert_allclose(output.loss.mean(), expected, rtol=1e-5)
  assert divergence.mean() > 0.01 and distance.mean() > 0.01


def test_each_variant_has_terms_of_its_own():
  batch = labelled_batch()
  for mode in ("cocomix", "prediction_only", "add", "pause", "thought"):
    concepts = ConceptMixingSpec(insert_at=1, num_concepts=CONCEPTS, top_k=4, mode=mode)
    method = student_method(ConceptMixingModelSpec(GPT2, concepts), StudentLoss())
    params = jax.eval_shape(method.init, jax.random.key(0))
    output = jax.eval_shape(lambda params, m=method: m.loss(params, {}, (), batch, jax.random.key(1)), params)
    assert ("concept_loss" in output.metrics) == concepts.is_predicting == (mode not in ("pause", "thought"))
    assert not method.frozen
  plain = student_method(GPT2, StudentLoss(kd_weight=0.1), teacher=teacher_model())
  assert set(plain.frozen) == set(plain.frozen_axes) == {"teacher"}


def test_teachers_that_do_not_fit_are_refused():
  small = TransformerSpec.gpt2(vocab_size=30, num_layers=1, model_dim=8, num_heads=2, max_length=LENGTH)
  other = Model(small, None, None, "", {})
  with pytest.raises(ValueError, match="the teacher has 30 token ids and the student 40"):
    student_method(GPT2, StudentLoss(kd_weight=0.1), teacher=other)
  with pytest.raises(ValueError, match="target_dim=20 is not the width of the teacher, 8"):
    student_method(hidden_spec(), StudentLoss(), teacher=other, tap_layer=0)
  with pytest.raises(ValueError, match="kd_weight needs the teacher in the train step"):
    student_method(GPT2, StudentLoss(kd_weight=0.1))
  with pytest.raises(ValueError, match="tap_layer: mode 'hidden' regresses the state"):
    student_method(hidden_spec(), StudentLoss(), teacher=teacher_model())
  with pytest.raises(ValueError, match="regression='l3' is unknown"):
    StudentLoss(regression="l3")
  with pytest.raises(ValueError, match="kd_weight=-1: give 0 or more"):
    StudentLoss(kd_weight=-1)
