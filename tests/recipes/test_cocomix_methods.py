"""The language-model methods of the CoCoMix recipe pass the suite that every method passes."""

import jax
import numpy as np
import pytest

from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.transformer import TransformerSpec
from nr.recipes.cocomix.method import cocomix_method
from nr.training.model_files import ConceptMixingModelSpec
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
    GPT2, ConceptMixingSpec(insert_at=1, num_concepts=CONCEPTS, top_k=4, chunk_length=5)
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
