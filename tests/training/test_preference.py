"""The method of losses on pairs: against sums written out, its references, packing, and the shared suite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.data.example_batches import packed_batches, padded_batches
from nr.data.examples import EncodedExample
from nr.models import parameters
from nr.models.lora import LoraSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.preference import PreferenceSpec
from nr.training.model_files import build_model, graphdef_of
from nr.training.policy import full_policy, lora_policy
from nr.training.preference import preference_method, score_responses
from nr.training.step import accumulate
from tests.training import method_suite

SPEC = TransformerSpec.llama(
  vocab_size=40, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=4, mlp_dim=32, max_length=64
)


def examples(count=8, seed=0):
  """Pairs of random tokens; prompts and responses of uneven lengths."""
  draws, found = np.random.default_rng(seed), []
  for index in range(count):
    prompt = draws.integers(1, 40, draws.integers(2, 6))
    sides = [draws.integers(1, 40, draws.integers(1, 8)) for _ in range(2)]
    tokens = tuple(np.concatenate([prompt, side]).astype(np.int32) for side in sides)
    masks = tuple(np.arange(len(ids)) >= len(prompt) for ids in tokens)
    found.append(EncodedExample(str(index), tokens, masks, 1.0 + index % 3))
  return found


def model_params(seed=0, spec=SPEC):
  return parameters.split(build_model(spec, jax.random.key(seed)))[1]


def batch_of(count=8):
  return next(iter(padded_batches(examples(count), count, (16,), seed=None)))


def outputs(method, batch, params=None, extra=None):
  params = method.start if params is None else params
  extra = method.init_extra(params) if extra is None else extra
  return accumulate(method, params, method.frozen, extra, batch, jax.random.key(0))[1]


def test_sums_are_those_of_each_response_alone():
  model = parameters.merge(graphdef_of(SPEC), model_params())
  batch = batch_of(4)
  sides = score_responses(model, batch, loss_chunk=5, with_head=True, with_aligned=True, with_entropy=True)
  for index, example in enumerate(examples(4)):
    lengths = [mask.sum() for mask in example.is_response]
    for side, (ids, mask) in enumerate(zip(example.tokens, example.is_response)):
      law = np.asarray(jax.nn.log_softmax(model(ids[None])[0]), np.float64)[:-1]
      picked = law[np.arange(len(ids) - 1), ids[1:]][mask[1:]]
      scores = [float(getattr(sides[side], field)[index, 0]) for field in sides[side]._fields[:2]]
      np.testing.assert_allclose(scores, [picked.sum(), lengths[side]], rtol=1e-5)
      np.testing.assert_allclose(sides[side].policy_head[index, 0], picked[: min(lengths)].sum(), rtol=1e-5)
      squares = np.log(np.exp(2 * law).sum(-1))[mask[1:]]
      np.testing.assert_allclose(sides[side].aligned[index, 0], (picked - squares).mean(), atol=1e-6)
      entropy = -(np.exp(law) * law).sum(-1)[mask[1:]].mean()
      np.testing.assert_allclose(sides[side].entropy[index, 0], entropy, rtol=1e-5)


def test_packed_rows_give_the_losses_of_padded_ones():
  policy = full_policy(SPEC, model_params())
  method = preference_method(policy, PreferenceSpec(ld_alpha=0.5, weighting="wpo", nll_weight=0.3))
  moved = method_suite.perturbed(policy.start)
  padded = outputs(method, batch_of(), moved)
  packed = outputs(method, next(iter(packed_batches(examples(), 4, 64, seed=None, slots=4))), moved)
  assert float(padded.loss.weight) == sum(example.weight for example in examples())
  for name in set(padded.metrics) - {"pair_share"}:
    np.testing.assert_allclose(
      packed.metrics[name].total, padded.metrics[name].total, rtol=1e-4, err_msg=name
    )


@pytest.mark.parametrize("reference", ["frozen", "synced"])
@pytest.mark.parametrize(
  "spec, expected",
  [
    (PreferenceSpec(), np.log(2)),
    (PreferenceSpec(is_length_normalised=True), np.log(2)),
    (PreferenceSpec(loss="ipo", beta=0.2), 1 / (4 * 0.2**2)),
    (PreferenceSpec(loss="hinge"), 1.0),
  ],
)
def test_at_the_start_policy_and_reference_are_one(spec, expected, reference):
  policy = full_policy(SPEC, model_params())
  settings = dict(sync_every=3) if reference == "synced" else {}
  found = outputs(preference_method(policy, spec, reference=reference, **settings), batch_of())
  np.testing.assert_allclose(found.loss.mean(), expected, rtol=1e-6)
  assert float(found.metrics["reward_margin"].total) == 0


def test_precomputed_sums_serve_like_the_frozen_model():
  policy = full_policy(SPEC, model_params())
  batch = batch_of()
  sides = score_responses(parameters.merge(policy.graphdef, policy.start), batch)
  batch["reference_log_probs"] = np.stack([side.policy for side in sides], axis=-1)
  moved = method_suite.perturbed(policy.start)
  live = outputs(preference_method(policy, PreferenceSpec()), batch, moved)
  stored = outputs(preference_method(policy, PreferenceSpec(), reference="precomputed"), batch, moved)
  np.testing.assert_allclose(stored.loss.total, live.loss.total, rtol=1e-5)
  assert not np.isclose(live.loss.mean(), np.log(2), atol=1e-4)


def test_a_synced_reference_is_replaced_when_due():
  policy = full_policy(SPEC, model_params())
  method = preference_method(policy, PreferenceSpec(), reference="synced", sync_every=2)
  moved = method_suite.perturbed(policy.start)
  for step, expected in ((0, policy.start), (1, moved), (2, policy.start), (3, moved)):
    found = method.update_extra(policy.start, moved, (), jnp.int32(step))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_mixed_reference_moves_towards_the_policy():
  """TR-DPO, arXiv 2404.09656, Eq. 4: after n syncs with a policy that stands, 1 - (1 - a)^n of the way."""
  policy = full_policy(SPEC, model_params())
  method = preference_method(policy, PreferenceSpec(), reference="synced", sync_every=2, sync_mix=0.6)
  moved = method_suite.perturbed(policy.start)
  found = policy.start
  for step in range(4):
    found = method.update_extra(found, moved, (), jnp.int32(step))
    share = 1 - 0.4 ** ((step + 1) // 2)
    expected = jax.tree.map(lambda old, new, share=share: old + share * (new - old), policy.start, moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
  for settings, message in (
    (dict(reference="frozen", sync_mix=0.6), "needs reference='synced'"),
    (dict(reference="synced", sync_every=2, sync_mix=0.0), "sync_mix=0.0"),
  ):
    with pytest.raises(ValueError, match=message):
      preference_method(policy, PreferenceSpec(), **settings)
  adapted = lora_policy(SPEC, model_params(), LoraSpec(rank=2), jax.random.key(0))
  with pytest.raises(ValueError, match="a policy without an adapter"):
    preference_method(adapted, PreferenceSpec(), reference="synced", sync_every=2, sync_mix=0.6)


def test_no_slot_with_a_pair_gives_a_loss_of_nothing():
  batch = batch_of()
  batch["pair_weights"] = np.zeros_like(batch["pair_weights"])
  policy = full_policy(SPEC, model_params())
  method = preference_method(policy, PreferenceSpec())
  gradients, found = accumulate(
    method, method_suite.perturbed(policy.start), method.frozen, (), batch, jax.random.key(0)
  )
  assert float(found.loss.total) == float(found.loss.weight) == 0
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))


def test_bad_references_are_named():
  policy = full_policy(SPEC, model_params())
  for settings, message in (
    (dict(reference="frozn"), "did you mean 'frozen'"),
    (dict(reference="base"), "train an adapter"),
    (dict(reference="synced"), "sync_every=0"),
    (dict(sync_every=3), "never replaced"),
  ):
    with pytest.raises(ValueError, match=message):
      preference_method(policy, PreferenceSpec(), **settings)
  with pytest.raises(ValueError, match="whole responses"):
    preference_method(policy, PreferenceSpec(ld_alpha=0.5), reference="precomputed")


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_method(layers, tmp_path):
  spec = dataclasses.replace(SPEC, layers=layers)
  policy = full_policy(spec, model_params(spec=spec))
  method = preference_method(policy, PreferenceSpec(nll_weight=0.5))
  method_suite.check_all(method, batch_of(16), tmp_path, golden=f"preference_{layers}")
