"""The sample driver: laws on the enumerable chain, invariance, ends, streaming, errors, compilations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation import rows
from nr.generation import sample as driver
from nr.generation.decoding import pad_prompts
from nr.generation.language_models import Network
from nr.generation.sample import sample, texts
from nr.generation.samplers import Greedy, Gumbel, InverseCdf, Replay, gumbel_top_k
from nr.generation.stopping import BROKEN, LENGTH, LOOP, STOP_ID, Stop
from nr.generation.streams import Stream, WithStreams
from nr.generation.transforms import AdaptiveTemperature, TopK
from nr.generation.transforms.algebra import Transform, chain, column, row, transform
from nr.models.concept_intervention import concept_intervention
from nr.training import sharding
from tests.generation import toy

STOP = Stop(ids_E=[toy.EOS])
PROMPTS = toy.random_prompts([3, 7, 5])
KINDS = ["transformer", "concepts"]


@transform("test_scale")
class Scale(Transform):
  by: object = row(1.0)

  def apply(self, logits_BV, state, context):
    return logits_BV * column(self.by)


def test_ancestral_law_is_the_enumerated_one():
  replayed = sample(
    toy.TOY,
    jnp.full((40, 1), toy.BOS),
    sampler=Replay(jnp.asarray(toy.padded())),
    max_new_tokens=3,
    stop=STOP,
  )
  probabilities = np.exp(np.asarray(replayed.transformed_log_probs_RN, np.float64).sum(axis=1))
  expected = toy.outcomes()
  np.testing.assert_allclose(probabilities, list(expected.values()), atol=1e-6)
  assert [toy.name(row[:length]) for row, length in zip(replayed.tokens_RN, replayed.lengths_R)] == list(
    expected
  )
  entropy = -(probabilities * np.log(probabilities)).sum()
  np.testing.assert_allclose(entropy, 2.608583, atol=1e-5)
  np.testing.assert_allclose((probabilities * np.asarray(replayed.lengths_R)).sum(), 2.3625, atol=1e-5)


def test_a_grid_of_uniforms_reproduces_the_law():
  count = 1000
  grid = (np.arange(count) + 0.5) / count
  uniforms = jnp.asarray(np.tile(grid[:, None], 3), jnp.float32)
  drawn = sample(toy.TOY, jnp.full((count, 1), toy.BOS), sampler=InverseCdf(uniforms), max_new_tokens=1)
  frequencies = np.bincount(np.asarray(drawn.tokens_RN[:, 0]), minlength=4) / count
  np.testing.assert_allclose(frequencies, toy.TARGET_CV[toy.BOS], atol=1 / count)


def test_samples_follow_the_law_by_a_chi_square_test():
  count = 40_000
  drawn = sample(toy.TOY, toy.PROMPT, key=jax.random.key(0), max_new_tokens=3, num_samples=count, stop=STOP)
  names = [
    toy.name(row[:length]) for row, length in zip(np.asarray(drawn.tokens_RN), np.asarray(drawn.lengths_R))
  ]
  expected = toy.outcomes()
  observed = np.array([names.count(name) for name in expected])
  statistic = (
    (observed - count * np.array(list(expected.values()))) ** 2 / (count * np.array(list(expected.values())))
  ).sum()
  # 39 degrees of freedom: 84.5 has probability 3e-5.
  assert statistic < 84.5 and observed.sum() == count


def test_gumbel_top_k_includes_each_token_as_often_as_it_should():
  keys = jax.random.split(jax.random.key(1), 40_000)
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(toy.TARGET_CV[toy.BOS])), (len(keys), 4))
  tokens, perturbed = gumbel_top_k(logits, keys, 2)
  inclusion = np.bincount(np.asarray(tokens).ravel(), minlength=4) / len(keys)
  # 0.736437 and 0.689254 by the specification; five standard errors are 0.0116.
  np.testing.assert_allclose(inclusion[:2], [0.736437, 0.689254], atol=0.0116)
  assert (tokens[:, 0] != tokens[:, 1]).all() and (perturbed[:, 0] >= perturbed[:, 1]).all()
  with pytest.raises(ValueError, match="k=5: give 1 to 4"):
    gumbel_top_k(logits, keys, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_draws_the_same_in_any_batch_order_padding_and_company(kind):
  network, key = toy.tiny_network(kind), jax.random.key(5)
  together = sample(network, *pad_prompts(PROMPTS), key, max_new_tokens=6, num_samples=2)
  order = jnp.array([2, 0, 1])
  permuted = sample(
    network, *pad_prompts([PROMPTS[i] for i in order]), key, max_new_tokens=6, num_samples=2, row_ids_B=order
  )
  wider = sample(network, *pad_prompts(PROMPTS, 16), key, max_new_tokens=6, num_samples=2)
  fewer = sample(network, *pad_prompts(PROMPTS), key, max_new_tokens=6)
  alone = sample(network, *pad_prompts(PROMPTS[1:2]), key, max_new_tokens=6, row_ids_B=jnp.array([1]))
  tokens = np.asarray(together.tokens_RN).reshape(3, 2, 6)
  np.testing.assert_array_equal(np.asarray(permuted.tokens_RN).reshape(3, 2, 6), tokens[np.asarray(order)])
  np.testing.assert_array_equal(np.asarray(wider.tokens_RN).reshape(3, 2, 6), tokens)
  np.testing.assert_array_equal(fewer.tokens_RN, tokens[:, 0])
  np.testing.assert_array_equal(alone.tokens_RN, tokens[1, :1])
  np.testing.assert_allclose(wider.log_probs_RN, together.log_probs_RN, atol=2e-5)
  assert len({tuple(row) for row in tokens.reshape(6, 6)}) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_one_device_and_eight_draw_the_same(kind):
  network, key = toy.tiny_network(kind, num_heads=2), jax.random.key(3)
  prompts = pad_prompts(toy.random_prompts([4, 6, 8, 3]))
  alone = sample(network, *prompts, key, chain=chain(Scale(1.3)), max_new_tokens=5, num_samples=2)
  mesh = sharding.make_mesh(dict(data=4, fsdp=1, tensor=2, sequence=1))
  axes = sharding_axes(network)
  with sharding.context(mesh):
    params = jax.device_put(network.params, sharding.shardings(axes, mesh, network.params))
    spread = sample(
      dataclasses.replace(network, params=params),
      *prompts,
      key,
      chain=chain(Scale(1.3)),
      max_new_tokens=5,
      num_samples=2,
    )
  assert len(spread.tokens_RN.sharding.device_set) == 8
  np.testing.assert_array_equal(spread.tokens_RN, alone.tokens_RN)
  np.testing.assert_allclose(spread.log_probs_RN, alone.log_probs_RN, atol=3e-5)


def sharding_axes(network):
  from nr.models.parameters import axes_of

  return axes_of(network.model())


def test_rows_end_with_stop_ids_limits_and_loops():
  network = toy.tiny_network()
  prompts = pad_prompts(PROMPTS)
  free = sample(network, *prompts, max_new_tokens=12)
  end = int(free.tokens_RN[0, 2])
  stopped = sample(network, *prompts, max_new_tokens=12, stop=Stop(ids_E=[end], limits_B=[12, 4, 0]))
  for tokens, length, finish, whole, limit in zip(
    stopped.tokens_RN, stopped.lengths_R, stopped.finish_R, np.asarray(free.tokens_RN), (12, 4, 0)
  ):
    first = int(np.argmax(whole == end)) + 1 if (whole == end).any() else 99
    assert int(length) == min(first, limit)
    assert int(finish) == (STOP_ID if first <= limit else LENGTH)
    np.testing.assert_array_equal(tokens[: int(length)], whole[: int(length)])
    assert (tokens[int(length) :] == end).all()
  assert float(jnp.abs(stopped.log_probs_RN[2]).sum()) == 0
  # A chain that repeats "ab" for ever is stopped after its third repetition.
  table = np.full((3, 2), -9.0)
  table[0, 1], table[1, 0], table[2, 0] = 9, 9, 9
  looping = sample(
    dataclasses.replace(toy.TOY, logits_CV=jnp.asarray(table)),
    jnp.array([[2]]),
    max_new_tokens=20,
    stop=Stop(loop_period=4, loop_repeats=3),
  )
  assert (int(looping.lengths_R[0]), int(looping.finish_R[0])) == (6, LOOP)


def test_the_loop_leaves_when_every_row_has_ended():
  drawn = sample(toy.TOY, toy.PROMPT, max_new_tokens=50, stop=STOP)
  assert texts(drawn, toy.name, (toy.EOS,)) == ["a"] and int(drawn.calls) == 1


def test_streaming_gives_the_same_text_in_growing_pieces():
  network, key, pieces = toy.tiny_network(), jax.random.key(2), []
  settings = dict(max_new_tokens=7, num_samples=2)
  whole = sample(network, *pad_prompts(PROMPTS), key, **settings)
  streamed = sample(network, *pad_prompts(PROMPTS), key, on_tokens=pieces.append, stream_every=3, **settings)
  np.testing.assert_array_equal(streamed.tokens_RN, whole.tokens_RN)
  assert [int(piece.lengths_R.max()) for piece in pieces] == [1, 4, 7]
  for piece in pieces:
    length = int(piece.lengths_R[0])
    np.testing.assert_array_equal(piece.tokens_RN[:, :length], whole.tokens_RN[:, :length])


def test_sweeping_parameters_and_row_values_compiles_once():
  network, prompts = toy.tiny_network(), pad_prompts(PROMPTS)
  for index, scale in enumerate((0.5, 0.7, 1.1, 2.0)):
    sample(
      network,
      *prompts,
      jax.random.key(index),
      chain=chain(Scale(scale)),
      max_new_tokens=4,
      stop=Stop(ids_E=[index]),
    )
    if index == 0:
      start, advance = driver._start._cache_size(), rows.advance._cache_size()
  assert (driver._start._cache_size(), rows.advance._cache_size()) == (start, advance)


def test_per_row_parameters_act_on_their_rows():
  network, prompts, key = toy.tiny_network(), pad_prompts(PROMPTS), jax.random.key(4)
  mixed = sample(
    network, *prompts, key, chain=chain(Scale(jnp.array([1.0, 50.0, 1.0]))), max_new_tokens=5, num_samples=2
  )
  plain = sample(network, *prompts, key, max_new_tokens=5, num_samples=2)
  sharp = sample(network, *prompts, key, chain=chain(Scale(50.0)), max_new_tokens=5, num_samples=2)
  expected = jnp.where((jnp.arange(6) // 2 == 1)[:, None], sharp.tokens_RN, plain.tokens_RN)
  np.testing.assert_array_equal(mixed.tokens_RN, expected)
  assert (plain.tokens_RN != sharp.tokens_RN).any()


@pytest.mark.parametrize("kind", KINDS)
def test_streams_with_other_prompts_say_what_they_say_alone(kind):
  network, other = toy.tiny_network(kind), toy.tiny_network(kind, seed=7)
  prompts, theirs = pad_prompts(PROMPTS), pad_prompts(toy.random_prompts([11, 2, 9], seed=9))
  model = WithStreams(network, {"other": Stream(other, *theirs)})
  outputs, cache = model.prefill(*map(jnp.asarray, prompts), 12)
  alone, _ = other.prefill(*map(jnp.asarray, theirs), 20)
  np.testing.assert_allclose(outputs.streams["other"], alone.logits, atol=1e-5)
  token = jnp.array([3, 4, 5])
  after, _ = model.extend(token[:, None], cache, read_B=jnp.zeros(3, int))
  longer = pad_prompts(
    [[*prompt, int(t)] for prompt, t in zip(toy.random_prompts([11, 2, 9], seed=9), token)]
  )
  expected, _ = other.prefill(*map(jnp.asarray, longer), 20)
  np.testing.assert_allclose(after.streams["other"], expected.logits, atol=2e-5)


def test_nothing_left_to_draw_is_flagged_and_never_silent():
  @transform("test_ban_all")
  class BanAll(Transform):
    def apply(self, logits_BV, state, context):
      return jnp.full_like(logits_BV, -jnp.inf)

  drawn = sample(toy.TOY, toy.PROMPT, key=jax.random.key(0), chain=chain(BanAll()), max_new_tokens=3)
  assert (int(drawn.finish_R[0]), int(drawn.tokens_RN[0, 0]), int(drawn.lengths_R[0])) == (BROKEN, toy.A, 1)
  broken = dataclasses.replace(toy.TOY, logits_CV=toy.TOY.logits_CV.at[toy.BOS, 1].set(jnp.nan))
  assert int(sample(broken, toy.PROMPT, key=jax.random.key(0), max_new_tokens=3).finish_R[0]) == BROKEN
  single = dataclasses.replace(toy.TOY, logits_CV=jnp.zeros((2, 1)))
  assert sample(single, jnp.array([[1]]), key=jax.random.key(0), max_new_tokens=3).tokens_RN.tolist() == [
    [0, 0, 0]
  ]


def test_the_end_of_text_inside_a_prompt_ends_nothing():
  drawn = sample(toy.TOY, jnp.array([[toy.EOS, toy.BOS]]), max_new_tokens=3, stop=STOP)
  assert texts(drawn, toy.name) == ["aE"]


NETWORK_24 = toy.tiny_spec(max_length=24, positions="learned")


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(sampler=Gumbel(), key=None), "needs a random key|random key"),
    (dict(prompts_BP=jnp.zeros((1, 0), int)), "at least one of each"),
    (dict(max_new_tokens=0), "max_new_tokens=0: give at least 1"),
    (dict(num_samples=0), "num_samples=0: give at least 1"),
    (dict(valid_BP=jnp.zeros((1, 1), bool)), "padded on the left"),
    (dict(stop=Stop(ids_E=[9])), r"stop ids \[9\]: give ids in 0..3"),
    (dict(stop=Stop(limits_B=[7])), "give limits in 0..max_new_tokens=3"),
    (dict(stop=Stop(loop_period=2, loop_repeats=1)), "at least 2 repeats"),
    (dict(chain=chain(Scale(jnp.ones(4)))), "has 4 values for 1 prompts"),
    (dict(chain=AdaptiveTemperature([1, 2], [[0, 1], [1, 0]])), "has 2 values for 1 prompts"),
    (dict(row_ids_B=jnp.arange(3)), "one id for each of the 1 prompts"),
    (dict(on_tokens=print, stream_every=0), "stream_every=0"),
    (dict(sampler=InverseCdf(jnp.zeros((1, 2)))), "give 1 rows of at least max_new_tokens=3 values"),
    (dict(sampler=InverseCdf(jnp.ones((1, 3)))), r"give values in \[0, 1\)"),
    (dict(sampler=Replay(jnp.zeros((2, 3), int))), "give 1 rows"),
    (dict(prompts_BP=jnp.array([[5]])), r"ids outside 0..4"),
    (dict(chain=chain(TopK(2.5))), "give a whole number"),
    (dict(chain=chain(TopK(2**40))), "give a number that fits"),
    (
      dict(model=WithStreams(toy.TOY, {"x": Stream(toy.tiny_network())})),
      "must share the main model's tokenizer",
    ),
  ],
)
def test_bad_requests_are_answered(changes, message):
  settings = dict(model=toy.TOY, prompts_BP=toy.PROMPT, key=jax.random.key(0), max_new_tokens=3)
  with pytest.raises(ValueError, match=message):
    sample(**{**settings, **changes})


def test_bad_networks_are_answered():
  edit = concept_intervention([1], "scale_pre", 2.0, num_concepts=24)
  for network, message in (
    (toy.tiny_network(network=dict(intervene_on="late")), "Valid: all, generation"),
    (toy.tiny_network(network=dict(intervention=edit)), "has no concepts to edit"),
    (toy.tiny_network("concepts", network=dict(taps=(1,))), "offers no early exits"),
    (toy.tiny_network(network=dict(taps=(2,))), "increasing blocks in 1..1"),
  ):
    with pytest.raises(ValueError, match=message):
      sample(network, jnp.zeros((1, 4), int), max_new_tokens=2)
  with pytest.raises(ValueError, match="length=4: a prompt has 5 tokens"):
    pad_prompts([[1, 2, 3, 4, 5]], 4)
  with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
    pad_prompts([[1], []])
  learned = toy.tiny_network(positions="learned", max_length=24)
  # Padding takes no position: 17 tokens in a bucket of 32 fit.
  assert sample(learned, *pad_prompts([[1] * 17]), max_new_tokens=8).tokens_RN.shape == (1, 8)
  with pytest.raises(ValueError, match="need 25 positions; the model has max_length=24"):
    sample(learned, jnp.zeros((1, 6), int), max_new_tokens=20)
  assert isinstance(Greedy(), Greedy) and isinstance(toy.tiny_network(), Network)
