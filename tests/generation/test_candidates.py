"""Scores of candidate tokens, and contrastive search, against slow passes for each candidate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.candidate_scoring import WithCandidateScores, linear_score, log_sigmoid_score
from nr.generation.contrastive_search import contrastive_search
from nr.generation.decoding import pad_prompts
from nr.generation.markov import Markov
from nr.generation.sample import sample
from nr.generation.stopping import LENGTH, STOP_ID, Stop
from nr.generation.transforms.guidance import Rad
from nr.generation.transforms.mixtures import Mix
from tests.generation import toy
from tests.generation.uncached import log_softmax, network, reader

KINDS = ["transformer", "concepts"]
PROMPTS = toy.random_prompts([3, 7, 5])
SCORE = (jnp.asarray(np.random.default_rng(4).normal(size=16), jnp.float32), jnp.float32(0.3))


def brute_scores(kind, text, candidates, head=lambda score: score):
  """Reads the text once for each candidate."""
  last = [reader(kind, 7)([*text, token])[0][-1] for token in candidates]
  return head(np.asarray(last) @ np.asarray(SCORE[0], np.float64) + 0.3)


def log_sigmoid(score):
  return -np.log1p(np.exp(-score))


def check_scores(outputs, row, text, kind, k, head=lambda score: score):
  logits, stream = np.asarray(outputs.logits)[row], np.asarray(outputs.streams["reward"])[row]
  candidates = np.sort(np.argsort(-logits)[:k])
  np.testing.assert_array_equal(np.flatnonzero(stream > -np.inf), candidates)
  np.testing.assert_allclose(stream[candidates], brute_scores(kind, text, candidates, head), atol=1e-4)


def test_scores_of_candidates_equal_a_full_pass_for_each():
  """After prompts of several lengths, a fork, and single tokens; scores are log-probabilities."""
  kind = "concepts"
  model = WithCandidateScores(network("transformer"), network(kind, 7), log_sigmoid_score, SCORE, k=3)
  model.check()
  rows, tokens = (2, 1, 0), [[4, 9, 30], [11, 2, 2]]

  @jax.jit
  def run_all(model, prompts, valid, tokens):
    first, cache = model.prefill(prompts, valid, 12)
    cache = model.fork(cache, jnp.array(rows))

    def step(cache, tokens):
      outputs, cache = model.extend(tokens[:, None], cache, read_B=jnp.zeros(3, jnp.int32))
      return cache, outputs

    return first, jax.lax.scan(step, cache, tokens)[1]

  first, later = run_all(model, *map(jnp.asarray, pad_prompts(PROMPTS)), jnp.array(tokens))
  for row, prompt in enumerate(PROMPTS):
    check_scores(first, row, prompt, kind, 3, log_sigmoid)
  for row, source in enumerate(rows):
    for step in range(2):
      text = [*PROMPTS[source], *(tokens[earlier][row] for earlier in range(step + 1))]
      check_scores(jax.tree.map(lambda leaf, step=step: leaf[step], later), row, text, kind, 3, log_sigmoid)


def test_scores_of_candidates_at_every_node_of_drafts():
  """Drafts as a tree, one branch kept, then tokens padded on the right, then some forgotten."""
  kind = "transformer"
  model = WithCandidateScores(network(kind), network(kind, 7), linear_score, SCORE, k=2, reads=3)
  drafts = [[5, 6, 7], [8, 9, 10]]

  @jax.jit
  def run_all(model, prompts, valid):
    _, cache = model.prefill(prompts, valid, 14, uneven=True)
    # 0 -> 1 and 0 -> 2.
    visible = jnp.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], bool)
    tree, cache = model.extend(jnp.array(drafts), cache, visible_BLL=visible)
    # Row 0 keeps 0 -> 2, row 1 keeps 0.
    cache = model.keep_path(cache, 3, jnp.array([[0, 2], [0, 1]]), jnp.array([2, 1]))
    is_there = jnp.array([[True, False], [True, True]])
    padded, cache = model.extend(jnp.array([[1, 0], [2, 3]]), cache, is_there)
    # Row 1 forgets a token: both go on as if that and the padding had never been.
    cache = model.rollback(cache, jnp.array([0, 1]))
    last, _ = model.extend(jnp.array([[12], [13]]), cache, read_B=jnp.zeros(2, jnp.int32))
    return tree, padded, last

  tree, padded, last = run_all(model, *map(jnp.asarray, pad_prompts(PROMPTS[:2])))
  for row, (a, b, c) in enumerate(drafts):
    for node, path in enumerate(([a], [a, b], [a, c])):
      check_scores(tree.at(node), row, [*PROMPTS[row], *path], kind, 2)
  texts = [[*PROMPTS[0], 5, 7], [*PROMPTS[1], 8]]
  check_scores(padded.at(0), 0, [*texts[0], 1], kind, 2)
  check_scores(padded.at(1), 1, [*texts[1], 2, 3], kind, 2)
  check_scores(last, 0, [*texts[0], 1, 12], kind, 2)
  check_scores(last, 1, [*texts[1], 2, 13], kind, 2)


def test_rewards_guide_a_whole_text():
  """The sample driver with a scorer, several samples a prompt, against a greedy loop in NumPy."""
  model = WithCandidateScores(network("transformer"), network("transformer", 7), linear_score, SCORE, k=4)
  prompts, valid = pad_prompts(PROMPTS)
  law = Rad([2.0, 0.0, 5.0], candidates=4)
  out = sample(model, prompts, valid, chain=law, max_new_tokens=3, num_samples=2)
  np.testing.assert_array_equal(out.tokens_RN[::2], out.tokens_RN[1::2])
  for row, prompt in enumerate(PROMPTS):
    text = [*prompt]
    for step in range(3):
      logits = reader("transformer", 0)(text)[1][-1]
      candidates = np.argsort(-logits)[:4]
      bonus = np.clip(brute_scores("transformer", text, candidates), 0, 1)
      best = candidates[(logits[candidates] + (2.0, 0.0, 5.0)[row] * bonus).argmax()]
      assert int(out.tokens_RN[2 * row, step]) == best
      text.append(int(best))


def test_mistakes_of_candidate_scoring():
  main, scorer = network("transformer"), network("transformer", 7)
  make = functools.partial(WithCandidateScores, head=linear_score, head_params=SCORE)
  with pytest.raises(ValueError, match="offers_hidden=True"):
    make(main, dataclasses.replace(scorer, offers_hidden=False)).check()
  with pytest.raises(ValueError, match="k=33"):
    make(main, scorer, k=33).check()
  with pytest.raises(ValueError, match="reads=0"):
    make(main, scorer, reads=0).check()
  with pytest.raises(ValueError, match="tokenizer"):
    make(main, Markov(jnp.zeros((5, 5)), hidden_CD={"last": jnp.zeros((5, 16))}), k=4).check()
  model = make(main, scorer, k=2)
  cache = model.init_cache(1, 8, uneven=True)
  with pytest.raises(ValueError, match="set reads"):
    model.extend(jnp.zeros((1, 2), jnp.int32), cache)
  with pytest.raises(ValueError, match="leave read_B out"):
    tree = jnp.eye(2, dtype=bool)[None]
    model.extend(jnp.zeros((1, 2), jnp.int32), cache, visible_BLL=tree, read_B=jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_contrastive_search_equals_a_slow_search(kind):
  """Every candidate read from the start, cosines with every earlier state, an alpha for each row."""
  alphas, k, new, unused = [0.0, 0.6, 0.9], 4, 5, 8
  settings = dict(alpha=alphas, k=k, max_new_tokens=new)
  prompts, valid = pad_prompts(PROMPTS)
  out = contrastive_search(network(kind), prompts, valid, stop=Stop(ids_E=[unused]), **settings)
  read = reader(kind, 0)
  ranks = np.zeros((3, new), int)
  for row, (prompt, alpha) in enumerate(zip(PROMPTS, alphas)):
    text = [*prompt]
    for step in range(new):
      states, logits = read(text)
      law = log_softmax(logits[-1])
      candidates, scores = np.argsort(-law)[:k], []
      for token in candidates:
        state = read([*text, token])[0][-1]
        cosines = states @ state / np.linalg.norm(states, axis=1) / np.linalg.norm(state)
        scores.append((1 - alpha) * np.exp(law[token]) - alpha * cosines.max())
      ranks[row, step] = np.argmax(scores)
      best = int(candidates[ranks[row, step]])
      assert int(out.tokens_RN[row, step]) == best
      np.testing.assert_allclose(out.log_probs_RN[row, step], law[best], atol=1e-4)
      text.append(best)
  # Weight 0 is greedy, others are not.
  assert (ranks[0] == 0).all() and (ranks[1:] > 0).any()
  assert (np.asarray(out.finish_R) == LENGTH).all()
  # Stopping at the first choice of row 1 leaves what the others say before it.
  first = int(out.tokens_RN[1, 0])
  stopped = contrastive_search(network(kind), prompts, valid, stop=Stop(ids_E=[first]), **settings)
  assert int(stopped.finish_R[1]) == STOP_ID and int(stopped.lengths_R[1]) == 1
  for row in (0, 2):
    length = int(stopped.lengths_R[row])
    np.testing.assert_array_equal(stopped.tokens_RN[row, :length], out.tokens_RN[row, :length])


def test_contrastive_search_never_takes_what_the_chain_bans():
  """With a head of one token every other candidate is banned, so that repetition decides nothing."""
  model = Markov(toy.TOY.logits_CV, {"amateur": toy.TOY.logits_CV}, {"last": jnp.ones((5, 2))})
  law = Mix({"amateur": 0.0}, alpha=1.0)
  settings = dict(alpha=0.9, k=3, max_new_tokens=2, stop=Stop(ids_E=[toy.EOS]))
  out = contrastive_search(model, toy.PROMPT, chain=law, **settings)
  assert out.tokens_RN.tolist() == [[toy.A, toy.EOS]]


def test_mistakes_of_contrastive_search():
  search = functools.partial(
    contrastive_search, network("transformer"), *pad_prompts(PROMPTS), max_new_tokens=2
  )
  with pytest.raises(ValueError, match="hidden:last"):
    contrastive_search(toy.TOY, toy.PROMPT, max_new_tokens=1)
  with pytest.raises(ValueError, match="k=0"):
    search(k=0)
  with pytest.raises(ValueError, match=r"alpha=1.5"):
    search(alpha=1.5)
  with pytest.raises(ValueError, match="one for each of the 3 prompts"):
    search(alpha=[0.1, 0.2])
