"""Fine-tuning all of a model or an adapter on it, by the next-token method."""

import dataclasses

import jax
import numpy as np
import pytest

from nr.data.example_batches import packed_batches, padded_batches
from nr.data.examples import LengthLimits, PlainText, Response, encode_pairs, encode_responses
from nr.data.preferences import PreferencePair
from nr.generation.language_models import Network
from nr.generation.sample import sample
from nr.models import parameters
from nr.models.lora import ATTENTION, MLP, UNEMBEDDING, LoraSpec, count_parameters, merge
from nr.models.transformer import TransformerSpec
from nr.models.weight_quantization import quantize_weights
from nr.objectives.preference import PreferenceSpec
from nr.objectives.unpaired_preference import KtoSpec
from nr.training import sharding
from nr.training.checkpoints import tree_hash
from nr.training.loop import train
from nr.training.model_files import build_model
from nr.training.next_token import next_token_method
from nr.training.policy import full_policy, lora_policy, new_policy
from nr.training.preference import preference_method
from nr.training.state import place_frozen
from nr.training.unpaired import unpaired_preference_method
from tests.data.byte_tokenizer import ByteTokenizer
from tests.training import method_suite

SPEC = TransformerSpec.llama(
  vocab_size=264, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=4, mlp_dim=32, max_length=64
)
LORA = LoraSpec(rank=4, alpha=8.0)
# With small frozen heads, logits are bounded: an adapter of the head too can learn anything.
EVERYWHERE = LoraSpec(rank=4, alpha=8.0, targets=(ATTENTION, MLP, UNEMBEDDING))


def base(seed=0, spec=SPEC):
  return parameters.split(build_model(spec, jax.random.key(seed)))[1]


def adapted(params=None, spec=SPEC, lora=LORA):
  return lora_policy(spec, base() if params is None else params, lora, jax.random.key(1))


def data(rows=8):
  """Packed responses to prompts, of which only the responses are learnt."""
  generator = np.random.default_rng(0)
  records = [
    Response(
      f"r{i}", "say " + "abcdefgh"[i % 8], "abcdefgh"[i % 8] * int(generator.integers(1, 6)), weight=1 + i % 2
    )
    for i in range(24)
  ]
  examples = encode_responses(records, PlainText(ByteTokenizer()), LengthLimits(16)).examples
  return packed_batches(examples, rows, 32, seed=0)


def test_fine_tuning_an_adapter_passes_the_suite(tmp_path):
  batch = next(iter(data()))
  assert batch["tokens"].shape == (8, 32) and 0 < (batch["weights"] > 0).mean() < 0.5
  method_suite.check_all(next_token_method(adapted()), batch, tmp_path, golden="next_token_lora")


def test_training_an_adapter_learns_and_leaves_the_base_alone(tmp_path):
  params = base()
  policy = adapted(params, lora=EVERYWHERE)
  config = method_suite.tiny_config(
    next(iter(data())), steps=30, optimizer__learning_rate=0.05, schedule__name="constant", mesh__data=1
  )
  method = next_token_method(policy)
  result = train(config, method, data(), workdir=tmp_path)
  first = method_suite.gradients_and_sums(
    method, next(iter(data())), method_suite.Prepared(policy.start, (), None)
  )
  assert result.summary["loss"] < 0.7 * float(first[1].loss.mean())
  assert result.summary["parameters"] == count_parameters(policy.start)
  jax.tree.map(np.testing.assert_array_equal, policy.fixed, params)
  # The merged model computes what the adapter on its base does.
  tokens = next(iter(data()))["tokens"]
  apply = jax.jit(lambda params: parameters.merge(policy.graphdef, params)(tokens))
  attached = apply(policy.assemble(result.state.params, policy.fixed))
  np.testing.assert_allclose(
    apply(merge(params, result.state.params, EVERYWHERE)), attached, atol=1e-4, rtol=1e-5
  )
  assert np.abs(attached - apply(params)).max() > 0.1


def test_an_adapter_saved_with_stacked_layers_goes_on_with_layers_kept_apart(tmp_path):
  apart = dataclasses.replace(SPEC, layers="unroll")
  batch = next(iter(data()))
  config = method_suite.tiny_config(batch, steps=2, schedule__steps=4)
  longer = method_suite.tiny_config(batch, steps=4, schedule__steps=4)
  first = train(config, next_token_method(adapted()), data(), workdir=tmp_path)
  on = train(longer, next_token_method(adapted(spec=apart)), data(), workdir=tmp_path)
  assert set(on.state.params["blocks"]) == {0, 1} and int(first.state.step) == 2
  restored = train(longer, next_token_method(adapted()), data(), workdir=tmp_path)
  assert tree_hash(restored.state) == tree_hash(on.state)


def test_dropout_of_an_adapter_is_drawn_anew_every_step_and_never_in_what_is_compared():
  params, batch = base(), next(iter(data()))
  dropping = dataclasses.replace(LORA, dropout=0.5)
  policy = adapted(params, lora=dropping)
  trained = method_suite.perturbed(policy.start, scale=0.3)
  method, plain = next_token_method(policy), next_token_method(adapted(params))

  def losses(method):
    """Of three steps that differ in nothing but their key."""
    one = jax.jit(lambda key: method.loss(trained, method.frozen, (), batch, key).loss.mean())
    return [float(one(jax.random.key(number))) for number in range(3)]

  dropped, exact = losses(method), losses(plain)
  assert len({*dropped, *exact}) == 4 and len(set(exact)) == 1
  apply = jax.jit(lambda tree: parameters.merge(policy.graphdef, tree)(batch["tokens"]))
  merged = apply(merge(params, trained, dropping))
  np.testing.assert_allclose(apply(policy.assemble(trained, policy.fixed)), merged, atol=1e-4)
  for make in (
    lambda: preference_method(policy, PreferenceSpec(), reference="base"),
    lambda: preference_method(policy, PreferenceSpec("simpo")),
    lambda: unpaired_preference_method(policy, KtoSpec(), reference="base"),
  ):
    with pytest.raises(ValueError, match="LoraSpec.dropout=0.5: .* without dropout; set it to 0"):
      make()


def test_a_decomposed_adapter_is_trained_whole_and_alike_on_a_mesh():
  """DoRA: the magnitudes get gradients, and are sharded as the outputs they belong to."""
  spec = dataclasses.replace(SPEC, num_layers=1)
  lora = LoraSpec(rank=2, targets=("blocks/(attention/query|mlp/up)/kernel",), is_weight_decomposed=True)
  policy, batch = adapted(base(spec=spec), spec, lora), next(iter(data()))
  method = next_token_method(policy)
  prepared = method_suite.prepare(method, batch)
  method_suite.check_gradients_reach_every_trainable_leaf(method, batch, prepared=prepared)
  meshes = (dict(data=2, fsdp=2, tensor=2, sequence=1),)
  method_suite.check_devices_agree(method, batch, meshes=meshes, prepared=prepared)


def test_full_fine_tuning_begins_where_the_model_stands():
  params, batch = base(seed=3), next(iter(data()))
  method = next_token_method(full_policy(SPEC, params))
  before, after, metrics = method_suite.first_step(method, batch)
  jax.tree.map(np.testing.assert_array_equal, before, params)
  assert np.abs(after["unembedding"] - before["unembedding"]).max() > 0
  new = next_token_method(new_policy(SPEC))
  plain = next_token_method(SPEC)
  assert new.start is None and plain.start is None
  loss = metrics["loss"].mean()
  found = method_suite.first_step(next_token_method(adapted(params)), batch)[2]["loss"].mean()
  np.testing.assert_allclose(found, loss, rtol=1e-6, err_msg="a new adapter is its base")


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_on_quantised_weights_is_the_same_on_a_mesh(bits):
  params = quantize_weights(base(), bits)
  method, batch = next_token_method(adapted(params)), next(iter(data()))
  method_suite.check_devices_agree(method, batch, meshes=(dict(data=2, fsdp=2, tensor=2, sequence=1),))
  mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=1, sequence=1))
  codes = place_frozen(method, mesh)["blocks"]["attention"]["query"]["kernel"].codes
  shard = codes.addressable_shards[0].data
  assert shard.size * (4 if bits == 8 else 1) == codes.size, (
    "codes are sharded as the weight is, where they can"
  )
  with pytest.raises(ValueError, match="quantised"):
    full_policy(SPEC, params)


def pairs(rows=8):
  """Pairs of responses to prompts, padded."""
  found = [
    PreferencePair(
      f"p{i}", "say " + "abcdefgh"[i % 8], "abcdefgh"[i % 8] * (1 + i % 5), "zyxw"[i % 4] * (1 + i % 3)
    )
    for i in range(16)
  ]
  examples = encode_pairs(found, PlainText(ByteTokenizer()), LengthLimits(16)).examples
  return padded_batches(examples, rows, (16,), seed=0), packed_batches(examples, rows, 48, seed=0, slots=3)


def test_an_adapter_learns_preferences_against_its_own_base(tmp_path):
  padded, packed = pairs()
  params = base()
  method = preference_method(adapted(params, lora=EVERYWHERE), PreferenceSpec(beta=0.5), reference="base")
  copied = preference_method(adapted(params, lora=EVERYWHERE), PreferenceSpec(beta=0.5), reference="frozen")
  for batches in (padded, packed):
    batch = next(iter(batches))
    metrics = method_suite.first_step(method, batch)[2]
    np.testing.assert_allclose(metrics["preference_loss"].mean(), np.log(2), atol=1e-6)
    prepared = method_suite.prepare(method, batch)
    moved = method_suite.gradients_and_sums(copied, batch, prepared)
    method_suite._assert_agree(moved, prepared.reference, "base and a copied adapter at zero", 1e-5, 1e-7)
  config = method_suite.tiny_config(
    next(iter(padded)), steps=20, optimizer__learning_rate=0.01, schedule__name="constant", mesh__data=1
  )
  result = train(config, method, padded, workdir=tmp_path)
  assert result.summary["loss"] < 0.5 * np.log(2)


def test_a_model_with_an_adapter_is_sampled_like_the_merged_one():
  params = base()
  spec = dataclasses.replace(SPEC, layers="unroll")
  policy = adapted(params, spec=spec)
  trained = method_suite.perturbed(policy.start, scale=0.5)
  prompts = np.array([[5, 6, 7], [9, 9, 1]], np.int32)

  def greedy(params):
    return np.asarray(sample(Network(policy.graphdef, params), prompts, max_new_tokens=12).tokens_RN)

  attached = greedy(policy.assemble(trained, policy.fixed))
  np.testing.assert_array_equal(attached, greedy(merge(policy.fixed, trained, LORA)))
  assert (attached != greedy(policy.fixed)).any()
