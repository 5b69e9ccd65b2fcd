"""Beam search on tiny networks: states, batches, padding, ends, groups, constraints, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.beams import beam_search as driver
from nr.generation.beams.beam_constraints import Without, lexical, look_ahead
from nr.generation.beams.beam_search import beam_search
from nr.generation.beams.best_first import best_first_search
from nr.generation.decoding import pad_prompts
from nr.generation.markov import Markov
from nr.generation.sample import sample
from nr.generation.stopping import DEAD_END, LENGTH, STOP_STRING, Stop
from nr.generation.streams import Stream, WithStreams
from nr.generation.transforms.algebra import Transform, chain, row, transform
from tests.generation import toy
from tests.generation.searching import END, MAX_NEW, PROMPTS, STRENGTH, WIDTH, Tally, assert_told_alike


@transform("test_ban_all")
class BanAll(Transform):
  """Bans everything after `after` tokens."""

  after: object = row(0, dtype=jnp.int32)

  def apply(self, logits_BV, state, context):
    return jnp.where((context.generated_B >= self.after)[:, None], -jnp.inf, logits_BV)


def tokens_of(beams, row=0):
  """Returns the texts of a prompt as lists, empty slots left out."""
  rows = zip(np.asarray(beams.tokens_BKN[row]), np.asarray(beams.lengths_BK[row]))
  return [tokens[:length].tolist() for tokens, length in rows if length]


PENALTY = jnp.array([0.0, 1.0, 2.0])


def run(network, prompts=PROMPTS, strength=STRENGTH, length=None, **settings):
  law = chain(Tally(strength))
  settings = {
    **dict(
      beam_width=WIDTH, max_new_tokens=MAX_NEW, stop=Stop(ids_E=[END]), chain=law, length_penalty=PENALTY
    ),
    **settings,
  }
  return beam_search(network, *pad_prompts(prompts, length), **settings)


KINDS = ["transformer", pytest.param("concepts", marks=pytest.mark.slow)]


def settings_of(kind):
  """The concept model searches under constraints, whose lookahead must leave its caches as they are."""
  return {} if kind == "transformer" else dict(constraints=ONE_OF_THREE)


ONE_OF_THREE = lexical([[[[1], [2], [3]]]], lookahead=2, num_candidates=16)


@pytest.mark.parametrize("kind", KINDS)
def test_states_caches_and_sums_are_those_recomputed_from_the_tokens(kind):
  network = toy.tiny_network(kind)
  beams = run(network, **settings_of(kind))
  sums = (beams.log_probs_BK, beams.transformed_log_probs_BK)
  assert_told_alike(network, beams.tokens_BKN, beams.lengths_BK, beams.finish_BK, *sums)
  scores_BK = beams.transformed_log_probs_BK / beams.lengths_BK ** PENALTY[:, None]
  np.testing.assert_allclose(beams.scores_BK, scores_BK, atol=1e-5)
  gap = np.abs(beams.log_probs_BK - beams.transformed_log_probs_BK)
  assert gap[0].max() < 1e-4 and gap[2].max() > 0.1  # the chain did act, on its row
  assert (np.diff(beams.scores_BK, axis=1) <= 0).all()
  texts = [tuple(text) for prompt in range(3) for text in tokens_of(beams, prompt)]
  assert len(set(texts)) == 3 * WIDTH
  assert kind == "transformer" or all({1, 2, 3} & set(text) for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_searched_alike_in_any_order_of_the_batch(kind):
  network, order = toy.tiny_network(kind), np.array([2, 0, 1])
  together = run(network, **settings_of(kind))
  settings = dict(strength=STRENGTH[order], length_penalty=PENALTY[order], **settings_of(kind))
  permuted = run(network, [PROMPTS[i] for i in order], **settings)
  np.testing.assert_array_equal(permuted.tokens_BKN, together.tokens_BKN[order])
  np.testing.assert_allclose(permuted.scores_BK, together.scores_BK[order], atol=2e-5)


def test_limits_of_rows_end_texts_and_a_limit_of_none_leaves_them_empty():
  beams = run(toy.tiny_network(), stop=Stop(ids_E=[END], limits_B=[MAX_NEW, 2, 0]))
  assert all(len(text) == 2 or text[-1] == END for text in tokens_of(beams, 1))
  assert max(map(len, tokens_of(beams, 0))) > 2 and tokens_of(beams, 2) == []
  np.testing.assert_array_equal(beams.finish_BK[2], [LENGTH, DEAD_END, DEAD_END])
  np.testing.assert_array_equal(beams.scores_BK[2], [0.0, -np.inf, -np.inf])


def test_best_first_search_rereads_texts_as_beams_read_them():
  network = toy.tiny_network()
  settings = dict(length_penalty=0.0, stop=Stop(ids_E=[END], limits_B=[3] * 3))
  beams = run(network, **settings)
  settings = dict(chain=chain(Tally(STRENGTH[2])), max_new_tokens=3, stop=Stop(ids_E=[END]), batch=32)
  best = best_first_search(network, PROMPTS[2], **settings).texts[0]
  assert best.log_prob > float(beams.scores_BK[2, 0]) - 1e-5
  wanted = tuple(tokens_of(beams, 2)[1])
  found = best_first_search(network, PROMPTS[2], is_goal=wanted.__eq__, **settings).texts[0]
  assert found.tokens == wanted
  np.testing.assert_allclose(found.log_prob, beams.scores_BK[2, 1], atol=2e-5)


# A random chain of 12 tokens stands for networks where caches do not matter. It is read from a
# stream, so that whatever is tested on it is tested with streams.
MARKOV = Markov(2 * jax.random.normal(jax.random.key(8), (12, 12)))
STREAMED = WithStreams(Markov(jnp.zeros((12, 12))), {"law": Stream(MARKOV)})
STARTS = [[1], [2], [3]]


@transform("test_stream_only")
class StreamOnly(Transform):
  @property
  def needs(self):
    return frozenset({"streams:law"})

  def apply(self, logits_BV, state, context):
    return context.streams["law"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
  """Accepts after two tokens: state 1 after the first, 2 after both."""

  tokens_2: jax.Array
  start: int = dataclasses.field(default=0, metadata=dict(static=True))

  def step(self, states, tokens):
    begins = tokens == self.tokens_2[0]
    return jnp.where((states == 1) & (tokens == self.tokens_2[1]), 2, begins).astype(jnp.int32)

  def is_accepting(self, states):
    return states == 2


def search(prompts=STARTS, strength=0.0, ban_after=99, pair=(-1, -1), **settings):
  """Most tests differ in traced values only and share a program."""
  law = chain(StreamOnly(), Tally(jnp.full(3, strength)), BanAll(jnp.broadcast_to(ban_after, 3)))
  stop = Stop(ids_E=[END], strings=Pair(jnp.array(pair)))
  return run(STREAMED, prompts, **{**dict(length_penalty=0.0, stop=stop, chain=law), **settings})


def test_one_beam_is_greedy_decoding_and_more_find_better_texts():
  greedy = sample(MARKOV, *pad_prompts(STARTS), max_new_tokens=MAX_NEW, stop=Stop(ids_E=[END]))
  narrow, wide = search(beam_width=1), search()
  np.testing.assert_array_equal(narrow.tokens_BKN[:, 0], greedy.tokens_RN)
  np.testing.assert_array_equal(narrow.finish_BK[:, 0], greedy.finish_R)
  np.testing.assert_allclose(narrow.scores_BK[:, 0], greedy.log_probs_RN.sum(axis=1), atol=1e-5)
  assert (wide.scores_BK[:, 0] > narrow.scores_BK[:, 0] - 1e-5).all()
  assert float((wide.scores_BK[:, 0] - narrow.scores_BK[:, 0]).max()) > 1e-3


def test_only_as_many_texts_as_asked_for_are_returned():
  few, all_of_them = search(num_return=2), search()
  np.testing.assert_array_equal(few.tokens_BKN, all_of_them.tokens_BKN[:, :2])


def test_beams_from_which_nothing_can_follow_are_no_texts():
  beams = search(ban_after=jnp.array([0, 2, 99]))
  assert (beams.finish_BK[0] == DEAD_END).all() and (beams.log_probs_BK[0] == -np.inf).all()
  assert all(len(text) <= 2 and text[-1] == END for text in tokens_of(beams, 1))
  assert len(tokens_of(beams, 2)) == WIDTH


def test_stop_strings_end_texts():
  pair = next(text[1:3] for text in tokens_of(search()) if len(text) > 3)
  stopped = search(pair=pair)
  texts = tokens_of(stopped)
  assert [text[-2:] == pair for text in texts] == (np.asarray(stopped.finish_BK[0]) == STOP_STRING).tolist()
  assert any(text[-2:] == pair and len(text) < MAX_NEW for text in texts)
  assert all(pair not in (text[i : i + 2] for i in range(len(text) - 2)) for text in texts)


def test_groups_differ_by_the_penalty_of_their_prompt():
  settings = dict(beam_width=2, num_groups=2)
  apart = search(diversity_penalty=jnp.array([100.0, 0.0, 100.0]), **settings)
  for prompt in range(3):
    by_group = {int(group): text for text, group in zip(tokens_of(apart, prompt), apart.groups_BK[prompt])}
    if prompt == 1:
      assert by_group[0] == by_group[1]
    else:
      assert not any(one == other for one, other in zip(by_group[0], by_group[1]))
    # The first group is an ordinary search of its width.
    assert by_group[0] == tokens_of(search(beam_width=1), prompt)[0]
  # Penalties are part of the score, and not of the log-probabilities.
  slightly = search(diversity_penalty=0.25, **settings)
  counts = np.asarray(slightly.transformed_log_probs_BK - slightly.scores_BK) / 0.25
  np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
  assert (counts[np.asarray(slightly.groups_BK) == 0] < 1e-4).all() and counts.max() > 0.5


def holds(text, phrase):
  return any(text[i : i + len(phrase)] == list(phrase) for i in range(len(text)))


CLAUSES = [[[[1, 2]], [[3], [4, 5]]], [[[7, 7]]], [[Without([0])]]]


def constrained(tiers=99, **settings):
  settings = dict(grouping="tokens", is_forced=True, num_candidates=72, tiers=tiers) | settings
  return search(constraints=lexical(CLAUSES, **settings), beam_width=6)


def assert_held(beams):
  for text in tokens_of(beams, 0):
    assert holds(text, [1, 2]) and (holds(text, [3]) or holds(text, [4, 5]))
  assert all(holds(text, [7, 7]) for text in tokens_of(beams, 1))
  assert all(0 not in text for text in tokens_of(beams, 2))
  return [len(tokens_of(beams, prompt)) for prompt in range(3)]


def test_constraints_of_each_prompt_hold_in_all_that_is_returned():
  assert min(assert_held(constrained())) > 0
  assert min(assert_held(constrained(tiers=1))) >= 0


def test_a_lookahead_acts_by_its_weight():
  plain, still = constrained(), constrained(lookahead=2, lookahead_weight=0.0)
  np.testing.assert_array_equal(still.tokens_BKN, plain.tokens_BKN)
  ahead = constrained(lookahead=2, lookahead_weight=3.0)
  assert_held(ahead)
  assert (ahead.tokens_BKN != plain.tokens_BKN).any()


def test_what_a_beam_has_met_is_told_apart():
  constraints = lexical([[[[1, 2, 3]], [[4], Without([5])]]])

  @jax.jit
  def read(constraints, token, met):
    met = constraints.advance(met, token[None])
    return met, constraints.progress(met)[0], constraints.groups(met)[0], *constraints.satisfied(met)

  met, progress, groups, holding = constraints.init(1), [], [], []
  for token in (1, 2, 1, 2, 3, 5, 4):
    met, part, group, holds_BC, _, _ = read(constraints, jnp.int32(token), met)
    groups.append(int(group))
    progress.append(round(float(part), 3))
    holding.append(holds_BC[0].tolist())
  assert progress == [0.333, 0.667, 0.333, 0.667, 0.0, 0.0, 0.0]
  assert groups == [0, 0, 0, 0, 1, 1, 3]  # what will always hold, as bits
  assert holding == [[False, True]] * 4 + [[True, True], [True, False], [True, True]]
  never = lexical([[[Without([5])]]])
  assert bool(read(never, jnp.int32(5), never.init(1))[-1][0, 0])


def test_the_lookahead_is_the_largest_log_probability_on_the_greedy_path():
  constraints = lexical([[[[4, 5]]]], lookahead=3).of_rows(3)
  tokens = jnp.array([6, 4, 5])
  met = constraints.advance(constraints.init(3), tokens)
  cache = MARKOV.init_cache(3, 9)
  found = jax.jit(look_ahead)(MARKOV, cache, jnp.arange(3), constraints, met, tokens[None])
  law = np.asarray(jax.nn.log_softmax(MARKOV.logits_CV))
  for place, token in enumerate(tokens.tolist()):
    values, last = [], token
    for _ in range(3):
      values.append(law[last, 5 if last == 4 else 4])
      last = int(law[last].argmax())
    np.testing.assert_allclose(found[place], max(values), atol=1e-5)


def test_sweeping_penalties_rules_and_parameters_compiles_once():
  search()
  before = driver._search._cache_size()
  for penalty, rule in ((0.5, "never"), (1.0, "when_full"), (2.0, "heuristic")):
    search(length_penalty=penalty, stop_rule=rule, strength=penalty)
  assert driver._search._cache_size() == before


def test_normalizations():
  sums, length = -6.0, jnp.array(4)
  by_name = {
    name: float(driver.beam_selection.normalised(sums, length, 2.0, name))
    for name in driver.beam_selection.NORMALIZATIONS
  }
  assert by_name == pytest.approx({"power": -6 / 16, "gnmt": -6 / 2.25, "additive": 2.0})


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(beam_width=0), "beam_width=0: give at least 1"),
    (dict(beam_width=3, num_groups=2), "num_groups=2 does not divide beam_width=3"),
    (dict(num_return=4), "num_return=4: give 1 to beam_width=3"),
    (dict(normalization="gnmtt"), "did you mean 'gnmt'"),
    (dict(stop_rule="newer"), "did you mean 'never'"),
    (dict(sampling=True), "key: beam sampling draws at random"),
    (dict(length_penalty=[1.0, 2.0]), r"length_penalty has shape \(2,\)"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(constraints=lexical([[[[40]]]])), "token id 40; the vocabulary has 12"),
    (dict(constraints=lexical([[[[4]]]] * 2)), "constraints are for 2 prompts"),
    (dict(chain=chain(Tally(jnp.zeros(2)))), "2 values for 3 prompts"),
  ],
)
def test_mistakes_are_answered_before_anything_runs(settings, message):
  with pytest.raises(ValueError, match=message):
    search(**settings)


@pytest.mark.parametrize(
  "clauses, settings, message",
  [
    ([], {}, "at least one clause"),
    ([[[]]], {}, "a clause is empty"),
    ([[[[]]]], {}, "is no phrase"),
    ([[[3]]], {}, "3 is no phrase"),
    ([[[[3]]]], dict(grouping="token"), "did you mean 'tokens'"),
    ([[[[3]]]], dict(lookahead=-1), "lookahead=-1"),
    ([[[[3]]] * 31], {}, "has 31, at most 30"),
  ],
)
def test_mistakes_in_constraints_are_answered(clauses, settings, message):
  with pytest.raises(ValueError, match=message):
    lexical(clauses, **settings)
