"""Searches on a chain with 40 texts: every number of the specification's second fixture."""

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.arithmetic_sampling import arithmetic_sample
from nr.generation.beams.beam_constraints import Without, lexical
from nr.generation.beams.beam_search import beam_search
from nr.generation.beams.best_first import best_first_search
from nr.generation.beams.stochastic_beam_search import stochastic_beam_search
from nr.generation.markov import Markov
from nr.generation.sample import sample
from nr.generation.stopping import DEAD_END, Stop
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


def many(driver, model=toy.TOY, **settings):
  """Runs a randomised driver on COUNT copies of the prompt."""
  settings = dict(key=jax.random.key(0), row_ids_B=jnp.arange(COUNT)) | settings
  return driver(model, jnp.full((COUNT, 1), toy.BOS), **settings)


def inclusion(tokens_BKN, lengths_BK):
  """Returns how often each text is among those of a prompt (no prompt has one twice)."""
  tokens, lengths = np.asarray(tokens_BKN), np.asarray(lengths_BK)
  rows = np.where(np.arange(tokens.shape[2]) < lengths[..., None], tokens, -1).reshape(-1, tokens.shape[2])
  unique, counts = np.unique(rows, axis=0, return_counts=True)
  return {toy.name(row[row >= 0]): count / len(tokens) for row, count in zip(unique, counts)}


def test_beam_sampling_draws_without_replacement():
  settings = dict(beam_width=2, max_new_tokens=1, sampling=True)
  beams = many(beam_search, **settings)
  found = inclusion(beams.tokens_BKN, beams.lengths_BK)
  np.testing.assert_allclose([found["a"], found["b"]], [0.736437, 0.689254], atol=WITHIN)
  assert (beams.tokens_BKN[:, 0] != beams.tokens_BKN[:, 1]).all()
  # Draws belong to the row and the key.
  reversed_ids = many(beam_search, row_ids_B=jnp.arange(COUNT)[::-1], **settings)
  np.testing.assert_array_equal(reversed_ids.tokens_BKN, beams.tokens_BKN[::-1])
  assert (many(beam_search, key=jax.random.key(1), **settings).tokens_BKN != beams.tokens_BKN).any()


def test_lexical_constraints_hold_and_the_best_text_is_found():
  contains_c = [text for text in toy.outcomes() if "c" in text]
  best = sorted(contains_c, key=lambda text: -toy.outcomes()[text])
  grid = search(2, constraints=lexical([[[[toy.C]]]], grouping="tokens", is_forced=True))
  assert [text for text, _ in named(grid)] == best[:2] == ["cE", "acE"]
  wide = search(40, constraints=lexical([[[[toy.C]]]]))
  found = named(wide)
  assert len(found) == len(contains_c) == 25 and all("c" in text for text, _ in found)
  np.testing.assert_allclose(np.exp([score for _, score in found]).sum(), 0.359625, atol=1e-5)
  assert [text for text, _ in found][:4] == best[:4]
  # The other slots are empty.
  assert (wide.finish_BK[0, 25:] == DEAD_END).all() and (wide.lengths_BK[0, 25:] == 0).all()
  assert (wide.log_probs_BK[0, 25:] == -np.inf).all() and (wide.tokens_BKN[0, 25:] == toy.EOS).all()


def test_a_forbidden_phrase_leaves_the_mass_of_the_other_texts():
  wide = named(search(40, constraints=lexical([[[Without([toy.B])]]])))
  assert len(wide) == 15
  np.testing.assert_allclose(np.exp([score for _, score in wide]).sum(), 0.467, atol=1e-5)


def pops(**settings):
  return best_first_search(toy.TOY, [toy.BOS], **{**SETTINGS, **settings})


def test_best_first_search_returns_the_mode_at_the_fourth_pop():
  for batch in (1, 8):
    found = pops(batch=batch)
    text = found.texts[0]
    assert (toy.name(text.tokens), text.pop, found.pops, text.finish) == ("bE", 4, 4, "stop_id")
    np.testing.assert_allclose(np.exp(text.log_prob), 0.2975, atol=1e-6)
  assert found.calls < 3  # scored ahead


def test_best_first_search_lists_all_texts_by_probability():
  found = pops(num_return=99)
  expected = toy.outcomes()
  assert len(found.texts) == 40 and found.is_exhausted
  np.testing.assert_allclose(
    np.exp([text.log_prob for text in found.texts]), sorted(expected.values(), reverse=True), rtol=1e-5
  )
  assert {toy.name(text.tokens) for text in found.texts} == set(expected)


def test_levin_search_reaches_abE_at_its_thirteenth_pop():
  found = pops(cost="levin", is_goal=lambda tokens: toy.name(tokens) == "abE")
  assert found.texts[0].pop == 13
  np.testing.assert_allclose(1 + found.texts[0].cost, 45.1, atol=0.05)


def test_an_admissible_heuristic_saves_pops_and_keeps_the_mode():
  best_rest = {}  # of each beginning: the largest probability of what completes it
  for text in toy.texts():
    for cut in range(len(text) + 1):
      rest = toy.probability(text) / toy.probability(text[:cut])
      best_rest[text[:cut]] = max(best_rest.get(text[:cut], 0.0), rest)
  found = pops(heuristic=lambda tokens: -np.log(best_rest[tokens]))
  assert (toy.name(found.texts[0].tokens), found.pops) == ("bE", 3)


def test_pruned_best_first_search_finds_what_the_beam_finds():
  for width, expected in ((1, "aE"), (2, "bE"), (3, "bE")):
    found = pops(beam_width=width)
    assert toy.name(found.texts[0].tokens) == expected == named(search(width))[0][0]
  assert pops(beam_width=1, num_return=99).is_exhausted is False


def test_stochastic_beams_are_samples_without_replacement():
  beams = many(stochastic_beam_search, num_samples=2, **SETTINGS)
  found = inclusion(beams.tokens_BKN, beams.lengths_BK)
  expected = {"bE": 0.522314, "aE": 0.318190, "cE": 0.167377}
  for text, probability in expected.items():
    np.testing.assert_allclose(found[text], probability, atol=WITHIN)
  tokens = np.asarray(beams.tokens_BKN)
  is_b, is_a = (
    (tokens == np.array([token, toy.EOS, toy.EOS])).all(axis=2).any(axis=1) for token in (toy.B, toy.A)
  )
  np.testing.assert_allclose((is_a & is_b).mean(), 0.124425, atol=5 * np.sqrt(0.1244 * 0.8756 / COUNT))
  assert (tokens[:, 0] != tokens[:, 1]).any(axis=1).all()
  # Log-probabilities are those of the texts.
  probabilities = {text: toy.probability(text) for text in toy.texts()}
  for row in range(50):
    for place in range(2):
      text = tuple(tokens[row, place, : int(beams.lengths_BK[row, place])].tolist())
      np.testing.assert_allclose(
        np.exp(beams.transformed_log_probs_BK[row, place]), probabilities[text], rtol=1e-5
      )
  # Horvitz-Thompson estimates are unbiased: of 1, and of the mean length, 2.3625.
  weights = np.exp(np.asarray(beams.log_weights_BK, np.float64))
  for values, mean in ((1.0, 1.0), (np.asarray(beams.lengths_BK), 2.3625)):
    estimates = (weights * values).sum(axis=1)
    assert abs(estimates.mean() - mean) < 5 * estimates.std() / np.sqrt(COUNT)


def test_where_there_are_no_more_texts_than_samples_all_are_drawn():
  table = np.full((5, 4), -np.inf)
  table[toy.BOS, [toy.A, toy.EOS]], table[toy.A, toy.EOS] = np.log([0.7, 0.3]), 0.0
  beams = many(stochastic_beam_search, Markov(jnp.asarray(table, jnp.float32)), num_samples=2, **SETTINGS)
  assert inclusion(beams.tokens_BKN, beams.lengths_BK) == {"aE": 1.0, "E": 1.0}
  assert (beams.threshold_B == -np.inf).all() and (beams.inclusion_BK == 1.0).all()
  np.testing.assert_allclose(np.exp(beams.log_weights_BK).sum(axis=1), 1.0, atol=1e-5)
  table[toy.BOS, toy.EOS] = -np.inf
  beams = many(stochastic_beam_search, Markov(jnp.asarray(table, jnp.float32)), num_samples=2, **SETTINGS)
  assert (beams.finish_BK[:, 1] == DEAD_END).all() and (beams.lengths_BK == jnp.array([2, 0])).all()
  assert (beams.log_weights_BK[:, 1] == -np.inf).all() and (beams.perturbed_BK[:, 1] == -np.inf).all()


def test_one_step_inclusion_is_that_of_gumbel_top_k():
  one = Stop(ids_E=[toy.EOS], limits_B=np.ones(COUNT, int))
  beams = many(stochastic_beam_search, num_samples=2, **{**SETTINGS, "stop": one})
  found = inclusion(beams.tokens_BKN, beams.lengths_BK)
  np.testing.assert_allclose([found["a"], found["b"]], [0.736437, 0.689254], atol=WITHIN)


def test_arithmetic_codes_name_their_texts():
  drawn = many(arithmetic_sample, num_samples=4, offsets_B=0.1, **SETTINGS)
  drawn = jax.tree.map(lambda leaf: leaf[:4] if leaf.ndim else leaf, drawn)
  rows = zip(np.asarray(drawn.tokens_RN), drawn.lengths_R)
  assert [toy.name(tokens[:length]) for tokens, length in rows] == ["aE", "bE", "bE", "cE"]
  np.testing.assert_allclose(
    np.exp(drawn.transformed_log_probs_RN.sum(axis=1)), [0.16, 0.2975, 0.2975, 0.08], atol=1e-6
  )


def test_arithmetic_sampling_is_unbiased_and_spreads_better():
  offsets = (np.arange(COUNT) + 0.5) / COUNT
  drawn = many(arithmetic_sample, num_samples=4, offsets_B=offsets, **SETTINGS)
  lengths = np.asarray(drawn.lengths_R).reshape(COUNT, 4)
  found = inclusion(drawn.tokens_RN[:, None], drawn.lengths_R[:, None])
  for text, probability in toy.outcomes().items():
    # Every text is one interval of codes: the grid meets it exactly but for its ends.
    np.testing.assert_allclose(found.get(text, 0.0), probability, atol=2 / COUNT)
  np.testing.assert_allclose(lengths.mean(axis=0), 2.3625, atol=1e-3)  # each sample by itself
  # Of four independent samples, the part that begins with a has the variance .24 / 4.
  assert (np.asarray(drawn.tokens_RN)[:, 0].reshape(COUNT, 4) == toy.A).mean(axis=1).var() < 0.3 * 0.24 / 4
