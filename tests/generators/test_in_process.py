"""The in-process generator: laws on the enumerable chain, independence of batches, shared programs, faults."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.data.examples import LeftOut, PlainText
from nr.data.word_tokenizer import WordTokenizer
from nr.generation import rows
from nr.generation.decoding import pad_prompts
from nr.generation.sample import sample
from nr.generation.stopping import Stop
from nr.generation.transforms.text import parse
from nr.generators.in_process import InProcess, row_id
from nr.generators.protocol import Request, samples_by_request, total_cost
from nr.training import sharding
from tests.generation import toy

WORDS = [f"w{number}" for number in range(31)]


class ChatWords(WordTokenizer):
  """Words with a chat template."""

  def render_chat(self, messages):
    return " ".join(f"w0 {message['content']}" for message in messages)

  def encode(self, text, use_special_tokens=False):
    return super().encode(text)


def make(batch_size=8, **settings):
  return InProcess(toy.tiny_network(), WordTokenizer(WORDS), batch_size=batch_size, model="m", **settings)


def requests(count=5, **settings):
  texts = [
    " ".join(f"w{(number + place) % 31}" for place in range(1 + 3 * number)) for number in range(count)
  ]
  return [
    Request(f"r{number}", text, **{"max_new_tokens": 6, **settings}) for number, text in enumerate(texts)
  ]


def test_each_sample_comes_once_and_is_what_the_driver_draws():
  generator, asked = make(), requests(num_samples=3, chain="temperature(0.8)")
  grouped = samples_by_request(asked, generator.generate(asked))
  for request, samples in zip(asked, grouped):
    drawn = sample(
      generator.network,
      *pad_prompts([generator.encode(request.prompt)]),
      jax.random.key(0),
      chain=parse(request.chain),
      max_new_tokens=6,
      num_samples=3,
      stop=Stop(ids_E=[0]),
      row_ids_B=np.array([row_id(request)]),
    )
    for place, found in enumerate(samples):
      size = int(drawn.lengths_R[place])
      assert found.tokens == tuple(drawn.tokens_RN[place, :size].tolist()) and found.model == "m"
      np.testing.assert_allclose(found.log_probs, drawn.log_probs_RN[place, :size], atol=1e-5)
      np.testing.assert_allclose(
        found.transformed_log_probs, drawn.transformed_log_probs_RN[place, :size], atol=1e-5
      )
      is_ended = found.tokens[-1] == 0
      assert found.finish_reason == ("stop_id" if is_ended else "length")
      assert found.text == generator.tokenizer.decode(found.tokens)
  cost = total_cost(sample for samples in grouped for sample in samples)
  assert cost.prompt_tokens == sum(len(generator.encode(request.prompt)) for request in asked)
  assert cost.generated_tokens == sum(len(sample.tokens) for samples in grouped for sample in samples)


def test_tokens_do_not_depend_on_the_batch_or_on_what_is_beside():
  asked = requests(num_samples=2)
  mixed = [dataclasses.replace(each, max_new_tokens=3 + number) for number, each in enumerate(asked)]
  alone = [list(make(batch_size=2).generate([each])) for each in mixed]
  together = samples_by_request(mixed[::-1], make(batch_size=64).generate(mixed[::-1]))[::-1]
  for few, many in zip(alone, together):
    assert [each.tokens for each in few] == [each.tokens for each in many]
    for one, other in zip(few, many):
      np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
  # The id and the seed decide, the index tells samples apart, and more samples change none.
  first = samples_by_request(asked, make().generate(asked))[0]
  again = Request(asked[0].id, asked[0].prompt, num_samples=4, max_new_tokens=6)
  assert [each.tokens for each in make().generate([again])][:2] == [each.tokens for each in first]
  others = [dataclasses.replace(asked[0], seed=1), dataclasses.replace(asked[0], id="other")]
  drawn = [[each.tokens for each in group] for group in samples_by_request(others, make().generate(others))]
  assert len({str(each) for each in [*drawn, [each.tokens for each in first]]}) == 3
  assert first[0].tokens != first[1].tokens


def test_chains_of_the_same_transforms_share_a_program():
  generator = make(batch_size=16)
  asked = requests(4, chain="temperature(0.7)|top_p(0.9)")
  list(generator.generate(asked))
  compiled = rows.advance._cache_size()
  varied = [
    dataclasses.replace(each, chain=f"temperature({0.4 + 0.1 * number})|top_p(0.{9 - number})")
    for number, each in enumerate(asked)
  ]
  found = samples_by_request(varied, generator.generate(varied))
  assert rows.advance._cache_size() == compiled
  for request, (one,) in zip(varied, found):
    (alone,) = make(batch_size=1).generate([request])
    assert one.tokens == alone.tokens
    np.testing.assert_allclose(one.transformed_log_probs, alone.transformed_log_probs, atol=1e-5)
  # Other transforms go beside them in programs of their own.
  both = [*asked, Request("greedy", "w1 w2", chain="temperature(0)", max_new_tokens=6)]
  samples = samples_by_request(both, generator.generate(both))
  assert samples[-1][0].transformed_log_probs == (0.0,) * len(samples[-1][0].tokens)


def test_new_parameters_compile_nothing():
  generator, asked = make(), requests(2)
  before = [each.tokens for each in generator.generate(asked)]
  compiled = rows.advance._cache_size()
  other = generator.with_params(jax.tree.map(lambda leaf: leaf + 0.3, generator.network.params), model="n")
  after = list(other.generate(asked))
  assert rows.advance._cache_size() == compiled
  assert [each.tokens for each in after] != before and {each.model for each in after} == {"n"}
  assert [each.tokens for each in generator.generate(asked)] == before
  back = other.with_params(jax.tree.map(lambda leaf: leaf - 0.3, other.network.params))
  assert [each.tokens for each in back.generate(asked)] == before


def test_stop_strings_are_left_out():
  generator = make()
  (free,) = generator.generate([Request("a", "w1 w2 w3", max_new_tokens=6)])
  third = free.text.split(" ")[2]
  (cut,) = generator.generate([Request("a", "w1 w2 w3", max_new_tokens=6, stop=(" " + third,))])
  assert cut.finish_reason == "stop_string" and free.text.startswith(cut.text + " " + third)
  assert cut.tokens == free.tokens[: len(cut.tokens)] and cut.is_complete


def test_chats_need_a_template():
  chat = Request("a", [{"role": "user", "content": "w1 w2"}], max_new_tokens=4)
  with pytest.raises(ValueError, match="chat template"):
    list(make().generate([chat]))
  generator = InProcess(toy.tiny_network(), ChatWords(WORDS))
  (found,) = generator.generate([chat])
  (same,) = generator.generate([Request("a", "w0 w1 w2", max_new_tokens=4)])
  assert found.tokens == same.tokens


def test_a_format_decides_how_prompts_begin():
  class Refusing(PlainText):
    def encode_prompt(self, prompt):
      if prompt == "w9":
        raise LeftOut("content spells a special token")
      return super().encode_prompt(prompt)

  words = WordTokenizer(WORDS)
  generator = InProcess(toy.tiny_network(), words, format=Refusing(words, (5,)))
  plain = InProcess(toy.tiny_network(), words, begin_ids=(5,))
  asked = requests(2)
  assert [each.tokens for each in generator.generate(asked)] == [
    each.tokens for each in plain.generate(asked)
  ]
  both = [Request("a", "w9"), asked[0]]
  refused, fine = samples_by_request(both, generator.generate(both))
  assert refused[0].error == "content spells a special token" and fine[0].error is None


def test_what_does_not_fit_fails_alone():
  network = toy.tiny_network(positions="learned", max_length=24)
  generator = InProcess(network, WordTokenizer(WORDS))
  long, exact = " ".join(["w1"] * 22), " ".join(["w1"] * 12)
  asked = [
    Request("long", long, num_samples=2, max_new_tokens=4),
    Request("fits", "w1", max_new_tokens=4),
    Request("exactly", exact, max_new_tokens=13),
  ]
  found = samples_by_request(asked, generator.generate(asked))
  assert all(each.text is None and "25 positions" in each.error for each in found[0])
  assert found[1][0].error is None and found[2][0].error is None


def test_a_broken_model_gives_no_text():
  generator = make()
  broken = generator.with_params(
    jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), generator.network.params)
  )
  (found,) = broken.generate([Request("a", "w1", max_new_tokens=4)])
  assert found.text is None and "NaN" in found.error and found.finish_reason == "error"


def test_mistakes_are_named_before_anything_is_generated():
  for wrong in (
    [Request("a", "w1"), Request("a", "w2")],
    [Request("a", "unknown")],
    [Request("a", "w1", chain="temprature(1)")],
    [Request("a", "w1", chain="temperature([1, 2])")],
  ):
    with pytest.raises(ValueError):
      next(make().generate(wrong))
  with pytest.raises(ValueError, match="batch_size=0"):
    make(batch_size=0)


def test_eight_devices_draw_what_one_draws():
  asked = requests(4, num_samples=2)
  alone = [each.tokens for each in make().generate(asked)]
  mesh = sharding.make_mesh(dict(data=4, fsdp=1, tensor=2, sequence=1))
  spread = make(mesh=mesh)
  with sharding.context(mesh):
    from nr.training.model_files import axes_of

    axes = sharding.shardings(axes_of(toy.tiny_spec()), mesh, spread.network.params)
    params = jax.device_put(spread.network.params, axes)
  found = list(spread.with_params(params).generate(asked))
  assert [each.tokens for each in found] == alone
