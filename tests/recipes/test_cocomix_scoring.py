"""Losses that are reported: of the model as it is used, the same way for every arm."""

import jax
import numpy as np

from nr.models import parameters
from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.transformer import TransformerSpec
from nr.recipes.cocomix.language_model import make_token_losses
from nr.training.model_files import ConceptMixingModelSpec, build_model, graphdef_of

LENGTH, VOCABULARY = 8, 20


def losses(spec, params, tokens):
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
  return np.asarray(make_token_losses(graphdef_of(spec), 4)(params, batch))


def test_dropout_of_the_training_is_off():
  tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH + 1))
  sizes = dict(vocab_size=VOCABULARY, num_layers=2, model_dim=8, num_heads=2, max_length=LENGTH)
  concepts = ConceptMixingSpec(insert_at=1, num_concepts=12, top_k=3)
  for wrap in (lambda spec: spec, lambda spec: ConceptMixingModelSpec(spec, concepts)):
    dropping, plain = (wrap(TransformerSpec.gpt2(**sizes, dropout=rate)) for rate in (0.5, 0.0))
    params = parameters.split(build_model(plain, jax.random.key(0)))[1]
    found = losses(dropping, params, tokens)
    np.testing.assert_array_equal(found, losses(plain, params, tokens))
    assert found.shape == (2, LENGTH) and found.dtype == np.float32
