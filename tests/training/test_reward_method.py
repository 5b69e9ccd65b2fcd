"""Training reward models: which token is read, what is learnt, and the shared suite."""

import jax
import numpy as np
import pytest

from nr.data.example_batches import packed_batches, padded_batches
from nr.data.examples import EncodedExample
from nr.models import parameters
from nr.models.reward import RewardModelSpec
from nr.models.transformer import TransformerSpec
from nr.training.loop import train
from nr.training.policy import full_policy, new_policy
from nr.training.reward import pair_rewards, reward_evaluator, reward_method
from nr.training.step import accumulate
from tests.training import method_suite

SPEC = RewardModelSpec(
  TransformerSpec.llama(
    vocab_size=40, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=4, mlp_dim=32, max_length=64
  )
)


def examples(count=16, seed=0):
  """Pairs of random tokens in which the chosen response has more of the even ones."""
  draws, found = np.random.default_rng(seed), []
  for index in range(count):
    prompt = draws.integers(1, 40, draws.integers(2, 6))
    sides = [draws.integers(1, 40, draws.integers(2, 8)) for _ in range(2)]
    sides.sort(key=lambda side: -(side % 2 == 0).mean())
    if (sides[0] % 2 == 0).mean() == (sides[1] % 2 == 0).mean():
      sides[0] = np.array([2, 4, 6])
      sides[1] = np.array([1, 3])
    tokens = tuple(np.concatenate([prompt, side]).astype(np.int32) for side in sides)
    masks = tuple(np.arange(len(ids)) >= len(prompt) for ids in tokens)
    found.append(EncodedExample(str(index), tokens, masks, 1.0 + index % 3))
  return found


def padded(count=16, seed=0):
  return next(iter(padded_batches(examples(count, seed), count, (16,), seed=None)))


def test_responses_are_read_at_their_last_token():
  policy = new_policy(SPEC)
  model = parameters.merge(policy.graphdef, method_suite.perturbed(policy.init(jax.random.key(0)), scale=0.3))
  found = pair_rewards(model, padded())
  for index, example in enumerate(examples()):
    for side, ids in enumerate(example.tokens):
      np.testing.assert_allclose(found[side][index, 0], model(ids[None])[0], rtol=1e-4, atol=1e-5)


def test_packed_rows_give_the_loss_of_padded_ones():
  policy = new_policy(SPEC)
  method = reward_method(policy, margin=0.3, centring=0.01)
  params = method_suite.perturbed(policy.init(jax.random.key(0)), scale=0.3)
  packed = next(iter(packed_batches(examples(), 8, 64, seed=None, slots=4)))
  sums = [
    accumulate(method, params, {}, (), batch, jax.random.key(0))[1].loss for batch in (padded(), packed)
  ]
  np.testing.assert_allclose(sums[1], sums[0], rtol=1e-4)
  batch = {**padded(), "margins": np.full((16, 1), 0.3, np.float32)}
  from_batch = accumulate(reward_method(policy, centring=0.01), params, {}, (), batch, jax.random.key(0))[1]
  np.testing.assert_allclose(from_batch.loss.total, sums[0].total, rtol=1e-5)


def test_a_new_model_knows_nothing_and_a_trained_one_ranks(tmp_path):
  policy = new_policy(SPEC)
  held_out = reward_evaluator(policy, padded_batches(examples(64, seed=1), 32, (16,), seed=None, epochs=1))
  data = padded_batches(examples(512, seed=2), 32, (16,), seed=0)
  config = method_suite.tiny_config(
    padded(32), steps=120, eval_every=120, optimizer__learning_rate=3e-3, mesh__data=1
  )
  result = train(config, reward_method(policy, centring=0.01), data, [held_out], workdir=tmp_path)
  found = {name.split("/")[1]: value for name, value in result.summary["evaluations"].items()}
  assert found["pairs"] == sum(1.0 + index % 3 for index in range(64))
  assert found["accuracy"] > 0.8 and found["margin"] > 0.5
  assert 0 <= found["calibration_error"] < 0.5


def test_no_margin_and_no_difference_is_ln_2():
  policy = new_policy(SPEC)
  start = jax.tree.map(np.zeros_like, policy.init(jax.random.key(0)))
  method = reward_method(full_policy(SPEC, start))
  output = accumulate(method, method.start, {}, (), padded(), jax.random.key(0))[1]
  np.testing.assert_allclose(output.loss.mean(), np.log(2), rtol=1e-6)
  assert float(output.metrics["accuracy"].mean()) == 0.5


@pytest.mark.slow
def test_method(tmp_path):
  method = reward_method(new_policy(SPEC), margin=0.1, centring=0.01)
  method_suite.check_all(method, padded(), tmp_path, golden="reward")
