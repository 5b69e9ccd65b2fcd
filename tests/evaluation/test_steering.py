"""Measurements of steering against brute force, scipy and the generator's own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from nr.evaluation import steering
from nr.generation.language_models import Network
from nr.generation.sample import sample
from nr.generation.stopping import Stop
from nr.models.concept_intervention import concept_intervention
from nr.models.parameters import split
from tests.laws.cocomix_models import CONCEPTS, VOCAB, make_model, make_tokens

MODEL = make_model()
PARTS = split(MODEL)
PROMPTS = np.asarray(make_tokens(batch=3, length=6))
STRENGTHS = [None, 0.0, 1.0, -4.0, 4.0]
DRAW = dict(temperature=1.0, max_new_tokens=5, stop_id=96)


@jax.jit
def _log_probs(edit):
  return jax.nn.log_softmax(MODEL(PROMPTS, intervention=edit))


def log_probs(edit=None):
  return np.asarray(_log_probs(edit))


def test_shifts_are_those_of_the_logits_and_none_without_an_edit():
  found, clean = steering.shift(PARTS, PROMPTS, 7, "force", STRENGTHS), log_probs()
  for row, strength in list(enumerate(STRENGTHS))[1:]:
    edited = log_probs(concept_intervention([7], "force", strength, num_concepts=CONCEPTS))
    change = edited - clean
    np.testing.assert_allclose(
      found.kl_SP[row], (np.exp(edited) * change).sum(-1).mean(-1), rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(found.log_ratio_SPV[row], change.mean(1), atol=1e-5)
    lost = -np.take_along_axis(change[:, :-1], PROMPTS[:, 1:, None], -1)[..., 0].mean(-1)
    np.testing.assert_allclose(found.loss_change_SP[row], lost, atol=1e-5)
    np.testing.assert_allclose(found.flips_SP[row], (edited.argmax(-1) != clean.argmax(-1)).mean(-1))
  np.testing.assert_allclose(found.kl_SP[0], 0.0, atol=1e-7)
  assert (found.kl_SP[1:] > 0).all() and found.flips_SP[-1].max() > 0


def test_strengths_that_change_nothing_change_nothing():
  for mode, strength in (("scale_pre", 1.0), ("scale_post", 1.0), ("add", 0.0)):
    found = steering.shift(PARTS, PROMPTS, 7, mode, [None, *[strength] * 4])  # one program for all tests
    np.testing.assert_array_equal(found.log_ratio_SPV[1], found.log_ratio_SPV[0])
    np.testing.assert_allclose(found.log_ratio_SPV, 0.0, atol=2e-6)


def test_a_sweep_in_one_batch_is_each_strength_alone():
  key = jax.random.key(5)
  swept = steering.continue_prompts(PARTS, PROMPTS, 7, "force", STRENGTHS, key=key, **DRAW)
  plain = sample(Network(*PARTS), PROMPTS, key=key, max_new_tokens=5, stop=Stop(ids_E=[96]))
  np.testing.assert_array_equal(swept.tokens_SPN[0], plain.tokens_RN)
  np.testing.assert_array_equal(swept.lengths_SP[0], plain.lengths_R)
  edit = concept_intervention([7], "force", 4.0, num_concepts=CONCEPTS)
  network = Network(*PARTS, intervention=edit, intervene_on="generation")
  alone = sample(network, PROMPTS, key=key, max_new_tokens=5, stop=Stop(ids_E=[96]))
  np.testing.assert_array_equal(swept.tokens_SPN[-1], alone.tokens_RN)
  assert (swept.tokens_SPN[-1] != swept.tokens_SPN[0]).any()
  nll = steering.continuation_nll(PARTS, PROMPTS, swept)
  np.testing.assert_allclose(nll[0], -np.asarray(plain.log_probs_RN).sum(-1), rtol=1e-4)


def test_correlations_and_overlaps():
  random = np.random.default_rng(0)
  first, second = random.normal(size=(3, VOCAB)), random.integers(0, 9, (3, VOCAB)).astype(float)
  expected = [stats.spearmanr(*rows).statistic for rows in zip(first, second)]
  np.testing.assert_allclose(steering.rank_correlation(first, second), expected)
  np.testing.assert_allclose(steering.rank_correlation(first, -first), -1.0)
  assert np.isnan(steering.rank_correlation(first, np.zeros_like(first))).all()
  row = np.arange(10.0)[None]
  np.testing.assert_allclose(steering.top_overlap(row, row, 4), 1.0)
  np.testing.assert_allclose(steering.top_overlap(row, np.roll(row, 2), 4), 0.5)


def test_edits_have_a_row_for_each_strength_and_prompt():
  edit = steering.edits(3, "add", [None, 2.0], rows=2)
  assert edit.values_S[:, 0].tolist() == [0.0, 0.0, 2.0, 2.0]
  assert edit.active_BL[:, 0].tolist() == [False, False, True, True]
  assert edit.concepts_S.dtype == jnp.int32 and set(edit.concepts_S.ravel().tolist()) == {3}
