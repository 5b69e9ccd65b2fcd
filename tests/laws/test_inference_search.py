"""Searches on a chain with 40 texts: every number of the specification's second fixture."""

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.beam_constraints import Without, lexical
from nr.generation.beam_search import beam_search
from nr.generation.sample import sample
from nr.generation.stopping import Stop
from tests.generation import toy

STOP = Stop(ids_E=[toy.EOS])
SETTINGS = dict(max_new_tokens=toy.MAX_NEW, stop=STOP)


def named(beams, row=0):
  """Returns [(text, score)] of one prompt, without empty slots."""
  rows = zip(*(np.asarray(leaf[row]) for leaf in (beams.tokens_BKN, beams.lengths_BK, beams.scores_BK)))
  return [(toy.name(tokens[:length]), score) for tokens, length, score in rows if score > -np.inf]


def assert_found(beams, *expected, row=0):
  found = named(beams, row)
  assert [text for text, _ in found] == [text for text, _ in expected]
  np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], atol=1e-4)


def search(width, **settings):
  return beam_search(toy.TOY, toy.PROMPT, beam_width=width, **{**SETTINGS, **settings})


def test_greedy_is_aE_and_one_beam_finds_it():
  greedy = sample(toy.TOY, toy.PROMPT, **SETTINGS)
  assert toy.name(greedy.tokens_RN[0, : int(greedy.lengths_R[0])]) == "aE"
  assert_found(search(1), ("aE", -1.832581))


def test_canonical_beams():
  assert_found(search(2), ("bE", -1.212341), ("aE", -1.832581))
  beams = search(3)
  assert_found(beams, ("bE", -1.212341), ("aE", -1.832581), ("abE", -2.688248))
  np.testing.assert_allclose(beams.log_probs_BK, beams.scores_BK, atol=1e-6)
  np.testing.assert_allclose(beams.transformed_log_probs_BK, beams.scores_BK, atol=1e-6)


def test_beams_as_transformers_returns_them():
  beams = search(3, length_penalty=1.0, stop_rule="heuristic")
  assert_found(beams, ("bE", -0.6062), ("abE", -0.8961), ("aE", -0.9163))
  beams = search(3, length_penalty=2.0, stop_rule="never")
  assert_found(beams, ("abE", -0.2987), ("bE", -0.3031), ("acE", -0.3374))
  beams = search(2, length_penalty=1.0, stop_rule="heuristic")
  assert_found(beams, ("bE", -0.6062), ("aE", -0.9163))
  # Exhaustive to the limit, the second is another.
  assert [text for text, _ in named(search(2, length_penalty=1.0))] == ["bE", "abE"]


def test_diverse_groups_choose_different_first_tokens():
  beams = search(2, num_groups=2, diversity_penalty=0.5, max_new_tokens=1)
  firsts = {
    int(group): toy.NAMES[int(token)] for group, token in zip(beams.groups_BK[0], beams.tokens_BKN[0, :, 0])
  }
  assert firsts == {0: "a", 1: "b"}
  alike = search(2, num_groups=2, diversity_penalty=0.0, max_new_tokens=1)
  assert (alike.tokens_BKN == toy.A).all()


COUNT = 20_000
WITHIN = 5 * 0.5 / np.sqrt(COUNT)  # five standard errors of a frequency, at most


def many(driver, **settings):
  """Runs a randomised driver on COUNT copies of the prompt."""
  return driver(toy.TOY, jnp.full((COUNT, 1), toy.BOS), key=jax.random.key(0), **settings)


def inclusion(tokens_BKN, lengths_BK):
  """Returns how often each text is among those of a prompt (no prompt has one twice)."""
  tokens, lengths = np.asarray(tokens_BKN), np.asarray(lengths_BK)
  rows = np.where(np.arange(tokens.shape[2]) < lengths[..., None], tokens, -1).reshape(-1, tokens.shape[2])
  unique, counts = np.unique(rows, axis=0, return_counts=True)
  return {toy.name(row[row >= 0]): count / len(tokens) for row, count in zip(unique, counts)}


def test_beam_sampling_draws_without_replacement():
  beams = many(beam_search, beam_width=2, max_new_tokens=1, sampling=True)
  found = inclusion(beams.tokens_BKN, beams.lengths_BK)
  np.testing.assert_allclose([found["a"], found["b"]], [0.736437, 0.689254], atol=WITHIN)
  assert (beams.tokens_BKN[:, 0] != beams.tokens_BKN[:, 1]).all()


def test_lexical_constraints_hold_and_the_best_text_is_found():
  contains_c = [text for text in toy.outcomes() if "c" in text]
  best = sorted(contains_c, key=lambda text: -toy.outcomes()[text])
  kinds = dict(
    neurologic=lexical([[[[toy.C]]]]),
    grid=lexical([[[[toy.C]]]], grouping="tokens", is_forced=True),
    lookahead=lexical([[[[toy.C]]]], lookahead=2),
  )
  for kind, constraints in kinds.items():
    found = named(search(2, constraints=constraints))
    assert [text for text, _ in found] == best[:2] == ["cE", "acE"], kind
  wide = named(search(40, constraints=kinds["neurologic"]))
  assert len(wide) == len(contains_c) == 25
  np.testing.assert_allclose(np.exp([score for _, score in wide]).sum(), 0.359625, atol=1e-5)
  assert [text for text, _ in wide][:4] == best[:4]


def test_a_forbidden_phrase_leaves_the_mass_of_the_other_texts():
  wide = named(search(40, constraints=lexical([[[Without([toy.B])]]])))
  assert len(wide) == 15
  np.testing.assert_allclose(np.exp([score for _, score in wide]).sum(), 0.467, atol=1e-5)
