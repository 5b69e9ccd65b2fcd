"""Log-likelihoods of texts: enumerated chains, brute force for each token, and numbers of lm-evaluation-harness."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.data.word_tokenizer import WordTokenizer
from nr.evaluation import log_likelihoods
from nr.evaluation.log_likelihoods import (
  TextScorer,
  TokenScorer,
  TokenScores,
  prefix_id_of,
  rolling_pairs,
  split_pair,
)
from nr.generators.checkpoints import make_network
from nr.interchange.huggingface import load_huggingface
from nr.training import sharding
from tests.generation import toy

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
KINDS = ["transformer", "concepts"]


def random_pairs(seed=0, vocab_size=32):
  draws = np.random.default_rng(seed)
  sizes = [(1, 1), (3, 2), (9, 1), (9, 7), (20, 4), (2, 12), (30, 6)]
  return [tuple(draws.integers(0, vocab_size, size).tolist() for size in pair) for pair in sizes]


LONGEST = 40


def laws_of(network):
  """Returns a function from a text to the log-laws [tokens, V] behind each of its tokens, by one pass."""
  model = network.model()
  laws = jax.jit(lambda tokens_1L: jax.nn.log_softmax(model(tokens_1L)[0]))
  return lambda text: np.asarray(laws(jnp.asarray([[*text, *[0] * (LONGEST - len(text))]])))[: len(text)]


def brute_force(laws, context, continuation):
  """The continuation's tokens by a pass over exactly what stands before them."""
  log_laws = laws([*context, *continuation])[len(context) - 1 : -1]
  return log_laws[np.arange(len(continuation)), continuation], log_laws.argmax(axis=-1) == continuation


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_each_sequence_alone(kind):
  network, pairs = toy.tiny_network(kind), random_pairs()
  laws = laws_of(network)
  # Some continuations shall be greedy.
  greedy = [[5, 9, 3], list(range(12))]
  for context in greedy:
    text = list(context)
    for _ in range(3):
      text.append(int(laws(text)[-1].argmax()))
    pairs.append((context, text[len(context) :]))
  scores = TokenScorer(network, batch_size=4, chunk_tokens=8).score(pairs)
  for (context, continuation), found in zip(pairs, scores, strict=True):
    log_probs, is_greedy = brute_force(laws, context, continuation)
    np.testing.assert_allclose(found.log_probs_M, log_probs, atol=2e-5)
    np.testing.assert_array_equal(found.is_greedy_M, is_greedy)
    assert found.total() == pytest.approx(log_probs.sum(), abs=1e-4)
  assert [each.is_greedy() for each in scores][-2:] == [True, True]
  assert not all(each.is_greedy() for each in scores)


def test_a_length_is_one_program_and_order_does_not_matter():
  network = toy.tiny_network()
  # No other test has this number of tokens a chunk, so that no program is there already.
  scorer, pairs = TokenScorer(network, batch_size=4, chunk_tokens=4321), random_pairs() * 3
  before = log_likelihoods._statistics._cache_size()
  first = scorer.score(pairs)
  made = log_likelihoods._statistics._cache_size() - before
  assert made == len({(scorer._bucket(len(a) + len(b) - 1), scorer._bucket(len(b))) for a, b in pairs})
  back = scorer.score(pairs[::-1])[::-1]
  for one, other in zip(first, back):
    np.testing.assert_array_equal(one.log_probs_M, other.log_probs_M)
  assert log_likelihoods._statistics._cache_size() - before == made


def test_eight_devices_score_what_one_scores():
  network, pairs = toy.tiny_network("concepts"), random_pairs()[::2]
  alone = TokenScorer(network, batch_size=8).score(pairs)
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1, sequence=1))
  spread = jax.device_put(network, jax.NamedSharding(mesh, jax.P()))
  for one, other in zip(alone, TokenScorer(spread, batch_size=8, mesh=mesh).score(pairs)):
    np.testing.assert_allclose(other.log_probs_M, one.log_probs_M, atol=2e-5)
  with pytest.raises(ValueError, match="batch_size=6: give a multiple of the mesh's 8"):
    TokenScorer(spread, batch_size=6, mesh=mesh)


def test_long_contexts_keep_their_end(caplog):
  network = toy.tiny_network(max_length=12)
  tokens = np.random.default_rng(1).integers(0, 32, 30).tolist()
  (found,) = TokenScorer(network).score([(tokens[:25], tokens[25:])])
  log_probs, _ = brute_force(
    laws_of(network), tokens[17:25], tokens[25:]
  )  # 12 read, the last of 13 is only scored
  np.testing.assert_allclose(found.log_probs_M, log_probs, atol=2e-5)
  assert "1 of 1 contexts are cut to the model's 12 tokens" in caplog.text


@pytest.mark.parametrize("count", [1, 3, 8, 9, 16, 29])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
def test_windows_score_each_token_once_with_enough_before_it(count, stride):
  tokens = list(range(1, count + 1))
  pairs = rolling_pairs(0, tokens, 8, stride)
  assert [token for _, scored in pairs for token in scored] == tokens
  for number, (context, scored) in enumerate(pairs):
    assert context == list(range(scored[0] - len(context), scored[0]))  # all that stands directly before it
    assert len(context) + len(scored) - 1 == min(8, count)  # a window is as long as it may be
    assert number == 0 or len(scored) <= (stride or 8)
    if number:
      assert len(context) >= 8 - (stride or 8) + 1
  assert rolling_pairs(0, [], 8, stride) == []


def test_strides_out_of_bounds_are_named():
  for stride in (0, 9):
    with pytest.raises(ValueError, match=f"stride={stride}: give 1 to max_length=8"):
      rolling_pairs(0, [1, 2], 8, stride)


class Joining:
  """Words; a comma joins the word before it, so that a text is not encoded piece by piece."""

  end_of_text_id = 0
  pieces = ("", "a", " a", "a,", " a,", " b", "b", " ", ",")

  def encode(self, text):
    ids = []
    while text:
      piece = max((piece for piece in self.pieces if piece and text.startswith(piece)), key=len)
      ids.append(self.pieces.index(piece))
      text = text[len(piece) :]
    return ids


def text_scorer(tokenizer=None, **settings):
  return TextScorer(toy.tiny_network(), tokenizer or Joining(), prefix_id=0, **settings)


def test_pairs_are_encoded_together():
  scorer, ids = text_scorer(), Joining.pieces.index
  assert scorer.encode_pair("a a", " b") == ([ids("a"), ids(" a")], [ids(" b")])
  # A space at the end of the context belongs to the word behind it.
  assert scorer.encode_pair("a a ", "b") == ([ids("a"), ids(" a")], [ids(" b")])
  assert split_pair("a \n ", "b") == ("a", " \n b")
  # Nothing before it but the prefix.
  assert scorer.encode_pair("", "a b") == ([0], [ids("a"), ids(" b")])
  # What the model wants in front; once, also where a template has written it.
  begins = text_scorer(begin_ids=(6,))
  assert begins.encode_pair("a", " b") == ([6, ids("a")], [ids(" b")])
  assert begins.encode_pair("", " b") == ([6], [ids(" b")])
  assert begins.encode_pair("b a", " b") == ([6, ids(" a")], [ids(" b")])
  with pytest.raises(ValueError, match="',' adds no token to its context 'a'"):
    scorer.encode_pair("a", ",")


def test_prefixes():
  assert prefix_id_of(Joining()) == 0
  assert prefix_id_of(Joining(), (7, 8)) == 8


def test_texts_are_scored_from_their_first_token_on():
  network, tokenizer = toy.tiny_network(max_length=8), WordTokenizer([f"w{number}" for number in range(31)])
  scorer = TextScorer(network, tokenizer, prefix_id=0)
  texts = ["", "w4 w9", " ".join(f"w{number}" for number in range(20))]
  scores, laws = scorer.texts(texts, stride=3), laws_of(network)
  assert [len(each.log_probs_M) for each in scores] == [0, 2, 20]
  assert scores[0].total() == 0.0
  for text, found in zip(texts, scores):
    tokens = [0, *tokenizer.encode(text)]
    for place in range(1, len(tokens)):
      # The first 8 tokens in one window; later ones in windows that end at 11, 14, 17, 20.
      stop = 8 if place <= 8 else min(len(tokens) - 1, 8 + 3 * math.ceil((place - 8) / 3))
      expected, _ = brute_force(laws, tokens[max(0, stop - 8) : place], [tokens[place]])
      np.testing.assert_allclose(found.log_probs_M[place - 1], expected[0], atol=2e-5)


def test_mistakes_are_named():
  network = toy.tiny_network(positions="learned", max_length=16)
  for settings, message in [
    (dict(batch_size=0), "batch_size=0: give at least 1"),
    (dict(max_length=17), "max_length=17: the model has learned 16 positions"),
  ]:
    with pytest.raises(ValueError, match=message):
      TokenScorer(network, **settings)
  scorer = TokenScorer(network)
  for pair, message in [
    (([], [1]), r"pairs\[1\]: 0 tokens of context and 1 to be scored"),
    (([1], []), r"pairs\[1\]: 1 tokens of context and 0 to be scored"),
    (([1], [2] * 17), r"pairs\[1\]: 17 tokens are to be scored and the model reads 16"),
  ]:
    with pytest.raises(ValueError, match=message):
      scorer.score([([1], [2]), pair])


def test_numbers_of_lm_evaluation_harness():
  """Its own model of transformers on the same weights; see golden/make_lm_eval_goldens.py."""
  expected = json.loads((GOLDEN / "lm_eval_gpt2.json").read_text())
  spec, params = load_huggingface(GOLDEN / "huggingface_gpt2")
  scorer = TextScorer(
    make_network(spec, params),
    WordTokenizer([f"w{number}" for number in range(18)]),
    prefix_id=0,
    batch_size=4,
  )
  scores = scorer.continuations([tuple(pair) for pair, _ in expected["loglikelihood"]])
  assert all(isinstance(each, TokenScores) for each in scores)
  for (_, (log_prob, is_greedy)), found in zip(expected["loglikelihood"], scores, strict=True):
    assert found.total() == pytest.approx(log_prob, abs=1e-4)
    assert found.is_greedy() == is_greedy
  assert {each.is_greedy() for each in scores} == {True, False}
  texts, values = zip(*expected["loglikelihood_rolling"])
  for found, value in zip(scorer.texts(texts), values, strict=True):
    assert found.total() == pytest.approx(value, abs=1e-4)
