"""Concept rows in every driver, wherever they are inserted: what section 8 of CoCoMix's specification asks for.

Prompts of several lengths, padded on the left, against full passes over each text alone. The caches themselves,
and every mode of insertion, are held to the full pass in tests/laws/test_cocomix_generation.py. The other tests of
drivers use toys with the insertion before the last block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.generation.beams.beam_search import beam_search
from nr.generation.continuous_batching import Request, serve
from nr.generation.decoding import pad_prompts
from nr.generation.language_models import Network
from nr.generation.sample import sample
from nr.generation.speculation.drafters import ForcedDrafter
from nr.generation.speculation.speculative import speculative
from nr.models.concept_mixing import ConceptMixingSpec, ConceptMixingTransformer
from nr.models.parameters import split
from tests.generation.toy import random_prompts, tiny_spec

PROMPTS = random_prompts([7, 1, 4])
NEW = 6
LONGEST = 16
PLACES = {"first": (2, 0), "middle": (3, 1), "last": (2, 1)}
"""Blocks of the model, and how many of them stand before the insertion."""
NOT_LAST = ["first", "middle"]


@functools.cache
def network(place: str) -> Network:
  layers, insert_at = PLACES[place]
  # GPT-2's learned positions count tokens, never rows.
  spec = tiny_spec(num_layers=layers, positions="learned", max_length=LONGEST)
  concepts = ConceptMixingSpec(num_concepts=24, top_k=4, insert_at=insert_at)
  return Network(*split(ConceptMixingTransformer(spec, concepts, rngs=nnx.Rngs(0))))


@functools.cache
def full_pass(place: str):
  """Returns a function from a text to the log-laws [tokens, V] behind each of its tokens, by one pass."""
  model = network(place).model()
  laws = jax.jit(lambda tokens_1L: jax.nn.log_softmax(model(tokens_1L)[0]))

  def of(text):
    return np.asarray(laws(jnp.asarray([[*text, *[0] * (LONGEST - len(text))]])))[: len(text)]

  return of


@functools.cache
def greedy(place: str):
  """Returns the greedy texts, without a cache and one by one, and each token's log-probability."""
  texts, log_probs = [], []
  for prompt in PROMPTS:
    text, its = list(prompt), []
    for _ in range(NEW):
      law = full_pass(place)(text)[-1]
      text.append(int(law.argmax()))
      its.append(law.max())
    texts.append(text[len(prompt) :])
    log_probs.append(its)
  return np.array(texts), np.array(log_probs)


@pytest.mark.parametrize("place", PLACES)
def test_prompts_padded_on_the_left_are_continued_as_alone(place):
  texts, log_probs = greedy(place)
  found = sample(network(place), *pad_prompts(PROMPTS), max_new_tokens=NEW)
  np.testing.assert_array_equal(found.tokens_RN, texts)
  np.testing.assert_allclose(found.log_probs_RN, log_probs, atol=2e-5)


@pytest.mark.parametrize("place", NOT_LAST)
def test_drafts_are_verified_in_pairs_of_rows(place):
  texts, log_probs = greedy(place)
  drafts = texts.copy()
  drafts[1, 2] = (drafts[1, 2] + 1) % 32  # refused: two rows of it and of what follows must go again
  found = speculative(
    network(place), ForcedDrafter(drafts), *pad_prompts(PROMPTS), max_new_tokens=NEW, draft_length=4
  )
  np.testing.assert_array_equal(found.tokens_RN, texts)
  np.testing.assert_allclose(found.log_probs_RN, log_probs, atol=2e-5)
  assert (found.tested_R - found.accepted_R).tolist() == [0, 1, 0]


def slow_beams(place: str, prompt, width: int):
  """Beam search over texts, each read from the start."""
  beams = [((), 0.0)]
  for _ in range(NEW):
    grown = []
    for text, total in beams:
      law = full_pass(place)([*prompt, *text])[-1]
      grown += [((*text, token), total + float(law[token])) for token in range(law.size)]
    beams = sorted(grown, key=lambda beam: -beam[1])[:width]
  return beams


@pytest.mark.parametrize("place", NOT_LAST)
def test_beams_take_their_rows_along(place):
  found = beam_search(
    network(place), *pad_prompts(PROMPTS), beam_width=3, max_new_tokens=NEW, length_penalty=0.0
  )
  moved = False
  for row, prompt in enumerate(PROMPTS):
    expected = slow_beams(place, prompt, 3)
    np.testing.assert_array_equal(found.tokens_BKN[row], [text for text, _ in expected])
    np.testing.assert_allclose(found.log_probs_BK[row], [total for _, total in expected], atol=5e-5)
    moved |= expected[0][0] != tuple(greedy(place)[0][row])
  assert moved  # some best text was not the greedy one: caches did change places


def test_slots_are_refilled_while_others_go_on():
  texts, _ = greedy("first")
  limits = [3, 6, 5]
  requests = [Request(prompt, limit) for prompt, limit in zip(PROMPTS, limits)]
  served = serve(network("first"), requests, slots=2, max_prompt_tokens=7, max_new_tokens=NEW)
  finished = {each.number: each.tokens for each in served}
  for number, limit in enumerate(limits):
    np.testing.assert_array_equal(finished[number], texts[number, :limit])
