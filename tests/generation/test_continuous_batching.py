"""Continuous batching: every request gets the text it would get alone, whatever the slots and the order."""

import itertools

import jax
import numpy as np
import pytest

from nr.generation.continuous_batching import Request, serve
from nr.generation.decoding import pad_prompts
from nr.generation.sample import sample
from nr.generation.stopping import Stop
from nr.generation.streams import Stream, WithStreams
from nr.generation.transforms import AdaptiveTemperature, LogitBias
from nr.generation.transforms.algebra import Transform, chain, column, row, transform
from nr.models.cache import CacheSpec
from tests.generation import toy


@transform("test_sharpen")
class Sharpen(Transform):
  by: object = row(1.0)

  def apply(self, logits_BV, state, context):
    return logits_BV * column(self.by)


PROMPTS = toy.random_prompts([3, 9, 5, 1, 12, 2, 7])
LIMITS = [9, 2, 5, 9, 1, 4, 0]
SIZES = dict(slots=3, max_prompt_tokens=12, max_new_tokens=9)


def _requests(**changes):
  return [Request(prompt, limit, **changes) for prompt, limit in zip(PROMPTS, LIMITS)]


@pytest.mark.parametrize("kind", ["transformer", "concepts"])
def test_every_request_gets_the_text_it_gets_alone(kind):
  network, key = toy.tiny_network(kind), jax.random.key(3)
  stop = Stop(ids_E=[5])
  alone = sample(network, *pad_prompts(PROMPTS), key, max_new_tokens=9, stop=Stop(ids_E=[5], limits_B=LIMITS))
  finished = {each.number: each for each in serve(network, _requests(), key, stop=stop, **SIZES)}
  assert sorted(finished) == list(range(len(PROMPTS)))
  for number, each in finished.items():
    length = int(alone.lengths_R[number])
    np.testing.assert_array_equal(each.tokens, alone.tokens_RN[number, :length])
    np.testing.assert_allclose(each.log_probs, alone.log_probs_RN[number, :length], atol=2e-5)
  looked = [each.number for each in serve(network, _requests(), key, stop=stop, tokens_per_call=2, **SIZES)]
  assert sorted(looked) == list(range(len(PROMPTS)))


def test_requests_bring_their_own_parameters():
  network, key = toy.tiny_network(), jax.random.key(3)
  scales = [0.5, 1.0, 2.0, 9.0, 1.5, 0.7, 1.0]
  requests = [Request(prompt, 6, chain=Sharpen(scale), tag=scale) for prompt, scale in zip(PROMPTS, scales)]
  alone = sample(
    network, *pad_prompts(PROMPTS), key, chain=chain(Sharpen(np.array(scales, np.float32))), max_new_tokens=6
  )
  served = list(serve(network, requests, key, chain=chain(Sharpen(1.0001)), **SIZES))
  assert sorted(each.number for each in served) == list(range(len(PROMPTS)))
  for each in served:
    np.testing.assert_array_equal(each.tokens, alone.tokens_RN[each.number])
    assert each.request.tag == scales[each.number]


def test_probabilities_of_temperatures_belong_to_their_request():
  network = toy.tiny_network()
  taus, choices = [0.0, 0.5], [[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]]
  laws = [AdaptiveTemperature(taus, choice) for choice in choices]
  key = jax.random.key(3)
  requests = [Request(prompt, chain=law) for prompt, law in zip(PROMPTS, laws)]
  served = list(serve(network, requests, key, chain=laws[0], **SIZES))
  together = AdaptiveTemperature(taus, [choice[0] for choice in choices])
  alone = sample(network, *pad_prompts(PROMPTS[:3]), key, chain=together, max_new_tokens=9)
  assert len(served) == 3
  for each in served:
    np.testing.assert_array_equal(each.tokens, alone.tokens_RN[each.number])


def test_short_requests_overtake_long_ones_and_an_endless_stream_is_served():
  network = toy.tiny_network()
  endless = (Request([1, 2], 9 if number == 0 else 1) for number in itertools.count())
  served = serve(network, endless, None, **SIZES)
  order = [next(served).number for _ in range(30)]
  assert order[0] != 0 and 0 in order


@pytest.mark.parametrize(
  "request_, message",
  [
    (Request([1] * 13), "request 0: its prompt has 13 tokens; give 1 to max_prompt_tokens=12"),
    (Request([]), "its prompt has 0 tokens"),
    (Request([1], 10), "max_new_tokens=10; the engine was made for 9"),
    (Request([1], chain=Sharpen(2.0)), r"its chain is \['test_sharpen'\], the engine's \[\]"),
  ],
)
def test_bad_requests_are_named(request_, message):
  with pytest.raises(ValueError, match=message):
    list(serve(toy.tiny_network(), [request_], None, **SIZES))


def test_requests_with_other_tables_are_refused():
  requests = [Request([1], chain=LogitBias([2], [50.0]))]
  with pytest.raises(ValueError, match="request 0: its chain has other tables"):
    list(serve(toy.tiny_network(), requests, None, chain=LogitBias([0], [50.0]), **SIZES))


def test_models_whose_rows_cannot_be_exchanged_are_refused():
  paged = CacheSpec(layout="paged", page_size=4, num_pages=32)
  network = toy.tiny_network()
  streams = WithStreams(network, {"other": Stream(network, np.zeros((1, 2), np.int32))})
  for model, message in (
    (toy.tiny_network(network=dict(cache=paged)), "another layout"),
    (streams, "leave prompts_BP out"),
  ):
    with pytest.raises(ValueError, match=message):
      list(serve(model, [Request([1])], None, **SIZES))
