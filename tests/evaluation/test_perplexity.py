"""Perplexity by document: closed forms on a uniform law, windows against brute force, bits a byte."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.data.word_tokenizer import WordTokenizer
from nr.evaluation.last_words import cut_passages, score_last_words, split_last_word
from nr.evaluation.log_likelihoods import TextScorer
from nr.evaluation.perplexity import score_separately
from tests.generation import toy

WORDS = [f"w{number}" for number in range(31)]


def scorer(network, **settings):
  return TextScorer(network, WordTokenizer(WORDS), prefix_id=0, batch_size=4, **settings)


def uniform():
  """A network that finds all 32 tokens equally likely."""
  network = toy.tiny_network()
  silent = jax.tree.map(jnp.zeros_like, network.params["final_norm"])
  return dataclasses.replace(network, params={**network.params, "final_norm": silent})


def test_a_uniform_law_has_the_vocabulary_as_its_perplexity():
  documents = [[3, 4, 5], list(range(1, 31)) * 4, []]
  document_bytes = np.array([9, 300, 0])
  for stride in (None, 5):
    scores = score_separately(scorer(uniform()), documents, document_bytes, stride=stride)
    np.testing.assert_array_equal(scores.tokens, [3, 120, 0])
    np.testing.assert_allclose(scores.nll, np.array([3, 120, 0]) * math.log(32), rtol=1e-6)
    assert scores.perplexity() == pytest.approx(32, rel=1e-5)
    assert scores.bits_per_byte() == pytest.approx(123 * 5 / 309, rel=1e-5)


def test_a_smaller_stride_gives_more_context():
  """stride 1 is the brute force: every token behind as much as the model reads."""
  network = toy.tiny_network(max_length=8)
  text = np.random.default_rng(0).integers(1, 32, 20).tolist()
  read = [0, *text]
  expected = 0.0
  laws = jax.jit(lambda tokens_1L: jax.nn.log_softmax(network.model()(tokens_1L)[0]))
  for place in range(1, 21):
    seen = read[max(0, place - 8) : place]
    expected -= float(laws(jnp.asarray([[*seen, *[0] * (8 - len(seen))]]))[len(seen) - 1, read[place]])
  fine = score_separately(scorer(network), [text], np.array([60]), stride=1)
  assert fine.nll[0] == pytest.approx(expected, abs=1e-4)
  assert fine.tokens[0] == 20
  coarse = score_separately(scorer(network), [text], np.array([60]))
  assert abs(coarse.nll[0] - fine.nll[0]) > 1e-2  # the context does matter


def test_documents_do_not_see_each_other():
  network = toy.tiny_network("concepts", max_length=16)
  documents = [[5, 6, 7], [9] * 20, [3, 1]]
  together = score_separately(scorer(network), documents, np.ones(3))
  for place, document in enumerate(documents):
    alone = score_separately(scorer(network), [document], np.ones(1))
    assert together.nll[place] == pytest.approx(alone.nll[0], abs=1e-4)


def test_last_words():
  network = toy.tiny_network()
  tokenizer, context = WordTokenizer(WORDS), "w3 w9 w1"
  logits = np.asarray(network.model()(jnp.asarray([tokenizer.encode(context)]))[0, -1], np.float64)
  log_law = logits - np.log(np.exp(logits).sum())
  log_law[0] = -np.inf  # the end of text is no word
  right, wrong = (f"{context} {tokenizer.decode([token])}" for token in np.argsort(-log_law)[:2])
  assert logits.argmax() != 0
  scores = score_last_words(scorer(network), [right, wrong, right, wrong])
  np.testing.assert_array_equal(scores.is_right, [True, False, True, False])
  np.testing.assert_array_equal(scores.tokens, 1)
  best = np.sort(log_law)[::-1]
  assert scores.perplexity() == pytest.approx(math.exp(-(best[0] + best[1]) / 2), rel=1e-4)
  accuracy = scores.accuracy(seed=0)
  assert accuracy.estimate == 0.5 and accuracy.low < 0.5 < accuracy.high
  with pytest.raises(ValueError, match="passages: there are none"):
    score_last_words(scorer(network), [])


def test_passages_end_on_words():
  assert split_last_word("a b  c ") == ("a b", "  c")
  with pytest.raises(ValueError, match="it has 1 words; give at least two"):
    split_last_word("alone")
  text = "One two three. Four five six's, seven eight 9th ten eleven twelve"
  assert cut_passages([text], 9, words=3) == ["One two three", "ten eleven twelve"]
  assert cut_passages(["a b\n\nc d", "e f"], 9, words=2) == ["a b", "c d", "e f"]
  assert cut_passages([" ".join("abcdefghijkl")], 3, words=2) == ["a b", "e f", "k l"]  # spread
  for settings, message in [
    (dict(count=0, words=3), "give at least 1 passage"),
    (dict(count=1, words=1), "at least 2 words"),
    (dict(count=1, words=50), "words=50: no text has so many words"),
  ]:
    with pytest.raises(ValueError, match=message):
      cut_passages([text], **settings)
