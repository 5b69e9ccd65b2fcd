"""Any chain in any driver: every one gives the law that the unaccelerated definition gives.

The definition: for every prefix, the states of the chain are made anew from the tokens,
the chain is applied to the model's logits, and the softmax is taken. Probabilities of
all texts follow by multiplication. Each case is one prompt of a batch, told from the
others by per-row parameters alone, so that one compiled program serves them all.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.beams.beam_search import beam_search
from nr.generation.beams.stochastic_beam_search import stochastic_beam_search
from nr.generation.constraints.automaton import Constrain, anything, join
from nr.generation.constraints.choices import choices
from nr.generation.continuous_batching import Request, serve
from nr.generation.particles.particle_filter import particle_filter
from nr.generation.particles.potentials import TokenCount
from nr.generation.sample import sample
from nr.generation.samplers import Replay
from nr.generation.speculation.model_drafters import ModelDrafter
from nr.generation.speculation.speculative import speculative
from nr.generation.stopping import Stop
from nr.generation.streams import Stream, WithStreams
from nr.generation.transforms import (
  Dry,
  FrequencyPresence,
  GreenList,
  MinP,
  NoRepeatNgram,
  RepetitionPenalty,
  Temperature,
  TopP,
)
from nr.generation.transforms.algebra import Context, chain
from nr.generation.transforms.mixtures import Mix
from tests.generation.toy import BOS, DRAFT, EOS, TOY, C

LONGEST = 4
STOP = Stop(ids_E=[EOS])
MODEL = WithStreams(TOY, {"amateur": Stream(DRAFT)})
# Texts of the last case: "ab" or "ba" or "cc", spelled in tokens, then the end.
AUTOMATON = join([anything(4), choices([[0, 1], [1, 0], [2, 2]], [b"a", b"b", b"c", None])])
CASES = {
  # name: amateur's weight, repetition, frequency, bigrams, dry, green list, tau, top-p, min-p, automaton
  "plain": (0.0, 1.0, 0.0, 0, 0.0, 0.0, 1.0, 1.0, 0.0, 0),
  "mixture": (-0.5, 1.0, 0.0, 0, 0.0, 0.0, 0.8, 1.0, 0.1, 0),
  "penalties": (0.0, 1.5, 0.4, 0, 0.0, 0.0, 1.0, 1.0, 0.0, 0),
  "repeats": (0.0, 1.0, 0.0, 2, 0.9, 0.0, 1.4, 0.95, 0.0, 0),
  "watermark": (0.0, 1.0, 0.0, 0, 0.0, 2.0, 1.0, 0.9, 0.0, 0),
  "automaton": (0.0, 1.2, 0.0, 0, 0.0, 1.0, 1.0, 1.0, 0.0, 1),
  "everything": (-0.3, 1.3, 0.2, 2, 0.7, 1.5, 1.2, 0.95, 0.02, 0),
}
PROMPTS = jnp.full((len(CASES), 1), BOS, jnp.int32)


def everything():
  """One chain with a row of parameters for each case."""
  amateur, repetition, frequency, bigrams, dry, green, tau, top_p, min_p, automaton = map(
    np.array, zip(*CASES.values())
  )
  return chain(
    Mix({"amateur": amateur}),
    RepetitionPenalty(repetition),
    FrequencyPresence(frequency),
    NoRepeatNgram(bigrams),
    Dry(dry, allowed_length=1),
    GreenList(green, 0.5),
    Constrain(AUTOMATON, [EOS], start=AUTOMATON.start[automaton]),
    Temperature(tau),
    TopP(top_p),
    MinP(min_p),
  )


def texts():
  """All texts of up to LONGEST tokens."""
  found = []
  for length in range(1, LONGEST + 1):
    for body in itertools.product(range(3), repeat=length - 1):
      found += [(*body, last) for last in ((EOS,) if length < LONGEST else range(4))]
  return found


TEXTS = texts()
PADDED = np.array([(*text, *(EOS,) * (LONGEST - len(text))) for text in TEXTS], np.int32)


@pytest.fixture(scope="module")
def laws():
  """Returns [cases, texts] probabilities by the definition."""
  prefixes = [prefix for length in range(LONGEST) for prefix in itertools.product(range(3), repeat=length)]
  law, count = everything().prepared(), len(CASES)
  history = np.zeros((len(prefixes), LONGEST + 1), np.int32)
  for row, prefix in zip(history, prefixes):
    row[: len(prefix) + 1] = (BOS, *prefix)
  lengths = np.array([len(prefix) + 1 for prefix in prefixes], np.int32)

  def all_laws():
    rows = jnp.repeat(jnp.arange(count), len(prefixes))
    context = Context(
      jnp.tile(history, (count, 1)),
      jnp.tile(lengths, count),
      jnp.ones(len(rows), jnp.int32),
      jax.random.split(jax.random.key(0), len(rows)),
    )
    last = jnp.tile(history[np.arange(len(prefixes)), lengths - 1], count)
    context = context._replace(streams={"amateur": DRAFT.logits_CV[last]})
    each = law.take(rows)
    return jax.nn.softmax(each.apply(TOY.logits_CV[last], each.init(context, 4), context))

  table = np.asarray(jax.jit(all_laws)(), np.float64).reshape(count, len(prefixes), 4)
  place = {prefix: index for index, prefix in enumerate(prefixes)}
  probabilities = [
    np.prod([table[:, place[text[:step]], token] for step, token in enumerate(text)], axis=0)
    for text in TEXTS
  ]
  # Dead ends of the automaton are no numbers, and are never reached.
  return np.nan_to_num(np.stack(probabilities, axis=1))


def test_the_cases_are_laws_and_differ(laws):
  np.testing.assert_allclose(laws.sum(axis=1), 1, atol=1e-6)
  for first, second in itertools.combinations(range(len(CASES)), 2):
    assert np.abs(laws[first] - laws[second]).max() > 0.01


def test_sampling_has_the_law(laws):
  replay = Replay(jnp.tile(jnp.asarray(PADDED), (len(CASES), 1)))
  drawn = sample(
    MODEL,
    PROMPTS,
    sampler=replay,
    chain=everything(),
    max_new_tokens=LONGEST,
    num_samples=len(TEXTS),
    stop=STOP,
  )
  found = np.exp(np.asarray(drawn.transformed_log_probs_RN, np.float64).sum(axis=1)).reshape(laws.shape)
  np.testing.assert_allclose(np.nan_to_num(found), laws, atol=1e-6)


def test_a_beam_that_holds_all_texts_has_the_law(laws):
  beams = beam_search(
    MODEL, PROMPTS, chain=everything(), beam_width=len(TEXTS), max_new_tokens=LONGEST, stop=STOP
  )
  tokens, lengths = np.asarray(beams.tokens_BKN), np.asarray(beams.lengths_BK)
  scores = np.exp(np.asarray(beams.scores_BK, np.float64))
  for case, expected in enumerate(laws):
    found = {
      tuple(row[:length]): score for row, length, score in zip(tokens[case], lengths[case], scores[case])
    }
    for text, probability in zip(TEXTS, expected):
      assert found.get(text, 0.0) == pytest.approx(probability, abs=1e-6), (list(CASES)[case], text)
    assert (np.diff(scores[case]) <= 1e-9).all()


def test_all_texts_drawn_without_replacement_have_the_law(laws):
  drawn = stochastic_beam_search(
    MODEL,
    PROMPTS,
    None,
    jax.random.key(1),
    chain=everything(),
    num_samples=len(TEXTS),
    max_new_tokens=LONGEST,
    stop=STOP,
  )
  tokens, lengths = np.asarray(drawn.tokens_BKN), np.asarray(drawn.lengths_BK)
  probabilities = np.exp(np.asarray(drawn.transformed_log_probs_BK, np.float64))
  for case, expected in enumerate(laws):
    found = {
      tuple(row[:length]): p for row, length, p in zip(tokens[case], lengths[case], probabilities[case])
    }
    for text, probability in zip(TEXTS, expected):
      assert found.get(text, 0.0) == pytest.approx(probability, abs=1e-6), (list(CASES)[case], text)


def test_particles_have_the_law_and_the_weight_of_the_potential(laws):
  replay = Replay(jnp.tile(jnp.asarray(PADDED), (len(CASES), 1)))
  particles = particle_filter(
    MODEL,
    PROMPTS,
    None,
    jax.random.key(0),
    potential=TokenCount(1.0, [C]),
    proposal="model",
    chain=everything(),
    num_particles=len(TEXTS),
    max_new_tokens=LONGEST,
    stop=STOP,
    threshold=0.0,
    sampler=replay,
  )
  log_probs = np.asarray(particles.log_probs_BK, np.float64)
  counts = np.array([text.count(C) for text in TEXTS])
  is_possible = laws > 1e-9
  np.testing.assert_allclose(np.exp(log_probs)[is_possible], laws[is_possible], atol=1e-6)
  weights = np.asarray(particles.log_weights_BK)
  assert (weights[~is_possible] == -np.inf).all() and is_possible.sum() < is_possible.size
  np.testing.assert_allclose(weights[is_possible], np.tile(counts, (len(CASES), 1))[is_possible], atol=1e-5)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_speculation_draws_the_law(laws, rule):
  count = 10_000
  drawn = speculative(
    MODEL,
    ModelDrafter(DRAFT, chain=chain()),
    PROMPTS,
    None,
    jax.random.key(7),
    chain=everything(),
    max_new_tokens=LONGEST,
    draft_length=3,
    rule=rule,
    num_samples=count,
    stop=STOP,
  )
  # Texts as numbers in base 4; the end of text fills what follows it.
  powers = 4 ** np.arange(LONGEST)
  place = np.full(4**LONGEST, -1)
  place[PADDED @ powers] = np.arange(len(TEXTS))
  found = place[np.asarray(drawn.tokens_RN) @ powers].reshape(len(CASES), count)
  assert (found >= 0).all()
  for case, expected in enumerate(laws):
    observed = np.bincount(found[case], minlength=len(TEXTS))
    assert observed[expected < 1e-9].sum() == 0
    # Texts that are expected less than ten times are counted together.
    is_rare = expected * count < 10
    groups = [(observed[~is_rare], expected[~is_rare] * count)]
    if expected[is_rare].sum() * count >= 10:
      groups.append((observed[is_rare].sum(keepdims=True), expected[is_rare].sum(keepdims=True) * count))
    statistic = sum((((seen - wanted) ** 2) / wanted).sum() for seen, wanted in groups)
    degrees = sum(len(seen) for seen, _ in groups) - 1
    # Wilson and Hilferty's cube root: 4 standard deviations, probability 3e-5 for each case.
    limit = degrees * (1 - 2 / (9 * degrees) + 4 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert statistic < limit, (list(CASES)[case], statistic, degrees)


def test_a_stream_of_requests_draws_what_sampling_draws():
  key = jax.random.key(11)
  drawn = sample(
    TOY, PROMPTS, None, key, chain=chain(*everything().transforms[1:]), max_new_tokens=LONGEST, stop=STOP
  )
  law = chain(*everything().transforms[1:])
  requests = [
    Request(
      [BOS], chain=chain(law.prepared().take(jnp.array([case]))).map_rows(lambda value: value.reshape(-1)[0])
    )
    for case in range(len(CASES))
  ]
  served = serve(
    TOY,
    requests,
    key,
    chain=requests[0].chain,
    stop=STOP,
    slots=3,
    max_prompt_tokens=1,
    max_new_tokens=LONGEST,
  )
  served = list(served)
  assert sorted(each.number for each in served) == list(range(len(CASES)))
  for each in served:
    length = int(drawn.lengths_R[each.number])
    np.testing.assert_array_equal(each.tokens, drawn.tokens_RN[each.number, :length])
