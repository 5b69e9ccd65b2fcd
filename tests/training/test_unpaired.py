"""KTO and group DPO: against sums written out, the reference point under accumulation, and the shared suite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.data.example_batches import packed_batches, padded_batches
from nr.data.examples import EncodedExample
from nr.data.labelled_responses import join_group
from nr.data.unpaired_batches import unpaired_batches
from nr.models import parameters
from nr.models.lora import LoraSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.unpaired_preference import KtoSpec
from nr.objectives.weighted import Weighted
from nr.training.method import SURVEY
from nr.training.model_files import build_model
from nr.training.policy import full_policy, lora_policy
from nr.training.step import accumulate
from nr.training.unpaired import group_preference_method, unpaired_preference_method
from tests.training import method_suite

SPEC = TransformerSpec.llama(
  vocab_size=40, num_layers=1, model_dim=16, num_heads=4, num_kv_heads=4, mlp_dim=32, max_length=64
)
KTO = KtoSpec(beta=0.5, desirable_weight=1.0, undesirable_weight=1.5)


def singles(count=16, seed=0, prompts=None):
  """Labelled responses of random tokens, of uneven lengths and weights."""
  draws, found = np.random.default_rng(seed), []
  for index in range(count):
    prompt = draws.integers(1, 40, draws.integers(2, 6)) if prompts is None else prompts[index]
    tokens = np.concatenate([prompt, draws.integers(1, 40, draws.integers(1, 8))]).astype(np.int32)
    mask = np.arange(len(tokens)) >= len(prompt)
    found.append(EncodedExample(str(index), (tokens,), (mask,), 1.0 + index % 3, (bool(index % 5 < 2),)))
  return found


def groups(count=16):
  """Groups of three responses to a prompt, in every sixth of which one is missing, in every eighth all are bad."""
  draws, found = np.random.default_rng(1), []
  for index in range(count):
    prompt = draws.integers(1, 40, draws.integers(2, 6))
    members = singles(3 - (index % 6 == 5), seed=index + 2, prompts=[prompt] * 3)
    labels = [[True, False, False], [True, True, False], [False] * 3][2 if index % 8 == 7 else index % 2]
    members = [each._replace(labels=(label,)) for each, label in zip(members, labels)]
    found.append(join_group(str(index), members, 3))
  return found


@functools.cache
def model_params():
  """Parameters under which the tokens of the tests are nearly alike."""
  return parameters.split(build_model(SPEC, jax.random.key(0)))[1]


@functools.cache
def policy():
  """Begins from a model that is sure of the wrong tokens, so that `model_params` finds all of them likelier."""
  return full_policy(SPEC, method_suite.perturbed(model_params(), scale=0.15))


def kto_batch(count=16):
  return next(iter(unpaired_batches(singles(count), 16, (16,), seed=None)))


def group_batch():
  return next(iter(padded_batches(groups(), 16, (16,), seed=None)))


@functools.cache
def method_of(kind):
  if kind == "kto":
    return unpaired_preference_method(policy(), KTO)
  return group_preference_method(policy(), beta=0.5)


def make_program(method, accumulation=1):
  """Returns (parameters, batch) -> gradients and sums."""

  def run(params, batch):
    extra = method.init_extra(params)
    return accumulate(method, params, method.frozen, extra, batch, jax.random.key(0), accumulation)

  return jax.jit(run)


@functools.cache
def program(kind, accumulation=1):
  return make_program(method_of(kind), accumulation)


@functools.cache
def _logits():
  return jax.jit(lambda params, tokens: parameters.merge(policy().graphdef, params)(tokens))


def sums_by_hand(params, batch):
  """Summed log-probabilities [B, S] of every sequence, in float64."""
  B, S, L = batch["tokens"].shape
  logits = np.asarray(_logits()(params, batch["tokens"].reshape(B * S, L)), np.float64)
  laws = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(laws, batch["targets"].reshape(B * S, L, 1), -1)[..., 0].reshape(B, S, L)
  return (picked * batch["weights"]).sum(-1)


def sigma(x):
  return 1 / (1 + np.exp(-x))


def ratios(batch):
  """d [B, S] of every sequence where the policy has become `model_params`."""
  return sums_by_hand(model_params(), batch) - sums_by_hand(policy().start, batch)


def test_kto_is_equation_8_on_sums_by_hand():
  batch = kto_batch()
  _, found = program("kto")(model_params(), batch)
  d, mismatched = ratios(batch).T
  z, weights, good = max(0, mismatched.mean()), batch["pair_weights"][:, 0], batch["is_desirable"][:, 0, 0]
  assert z > 0.1
  np.testing.assert_allclose(found.metrics["reference_point"].mean(), z, rtol=1e-4)
  losses = np.where(good, 1 - sigma(0.5 * (d - z)), 1.5 * (1 - sigma(0.5 * (z - d))))
  np.testing.assert_allclose(found.loss.total, (losses * weights).sum(), rtol=1e-4)
  np.testing.assert_allclose(found.loss.weight, weights.sum())
  for kind, is_kind in (("desirable", good), ("undesirable", ~good)):
    expected = np.average(0.5 * d[is_kind], weights=weights[is_kind])
    np.testing.assert_allclose(found.metrics[f"{kind}_reward"].mean(), expected, rtol=1e-4)
  np.testing.assert_allclose(found.metrics["desirable_share"].mean(), np.average(good, weights=weights))
  assert float(found.metrics["mismatched_share"].mean()) == 1


def test_at_the_start_kto_is_one_half_and_z_is_0():
  batch = kto_batch()
  _, found = program("kto")(policy().start, batch)
  kinds = np.where(batch["is_desirable"][:, 0, 0], 1.0, 1.5)
  assert float(found.loss.total) == 0.5 * (kinds * batch["pair_weights"][:, 0]).sum()
  assert float(found.metrics["reference_point"].total) == 0


def test_the_reference_point_is_that_of_the_whole_batch_whatever_the_microbatches():
  batch = kto_batch()
  mismatched = ratios(batch)[:, 1]
  parts = [mismatched[i::8].mean() for i in range(8)]
  assert min(parts) < -0.1 < 0.1 < mismatched.mean(), "microbatches disagree on its sign"
  assert np.mean(np.maximum(parts, 0)) > mismatched.mean() + 0.05, "a mean of clipped means is larger"
  whole, cut = (program("kto", accumulation)(model_params(), batch) for accumulation in (1, 8))
  for found in (whole, cut):
    np.testing.assert_allclose(found[1].metrics["reference_point"].mean(), mismatched.mean(), rtol=1e-4)
  np.testing.assert_allclose(cut[1].loss.total, whole[1].loss.total, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(cut[0]), jax.tree.leaves(whole[0])):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_no_gradient_comes_from_mismatched_sequences():
  method, batch = method_of("kto"), kto_batch()
  gradients, found = program("kto")(model_params(), batch)
  z = found.metrics["reference_point"].mean()

  def with_z_given(params):
    fixed = {**batch, SURVEY: Weighted(z, jnp.float32(1))}
    return method.loss(params, method.frozen, (), fixed, jax.random.key(0)).loss.total

  expected = jax.jit(jax.grad(with_z_given))(model_params())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, expected)
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.01


def test_an_example_alone_in_its_batch_is_compared_with_0():
  _, found = program("kto")(model_params(), kto_batch(count=1))
  assert float(found.metrics["reference_point"].total) == 0 == float(found.metrics["mismatched_share"].total)
  assert float(found.loss.weight) == 1 and np.isfinite(found.loss.total)


def test_group_dpo_is_the_mean_over_good_and_bad_of_each_prompt():
  batch = group_batch()
  _, found = program("group")(model_params(), batch)
  d_BG = ratios(batch)
  total = weight = pairs = 0
  for index, example in enumerate(groups()):
    there = [mask.any() for mask in example.is_response]
    good = [g for g in range(3) if there[g] and example.labels[g]]
    bad = [g for g in range(3) if there[g] and not example.labels[g]]
    if good and bad:
      terms = [np.log1p(np.exp(-0.5 * (d_BG[index, i] - d_BG[index, j]))) for i in good for j in bad]
      total, weight = total + example.weight * np.mean(terms), weight + example.weight
      pairs += 1
  np.testing.assert_allclose(found.loss.total, total, rtol=1e-4)
  np.testing.assert_allclose(found.loss.weight, weight)
  assert float(found.metrics["pair_share"].mean()) == pairs / 16 < 1
  _, start = program("group")(policy().start, batch)
  np.testing.assert_allclose(start.loss.mean(), np.log(2), rtol=1e-6)


def test_an_adapter_learns_from_labels_against_its_base():
  own = lora_policy(SPEC, model_params(), LoraSpec(rank=2), jax.random.key(1))
  method = unpaired_preference_method(own, KtoSpec(), reference="base")
  gradients, found = make_program(method)(own.start, kto_batch())
  assert float(found.loss.mean()) == 0.5
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients)) > 0


def test_mistakes_are_named():
  for make in (
    lambda **settings: unpaired_preference_method(policy(), KTO, **settings),
    lambda **settings: group_preference_method(policy(), **settings),
  ):
    with pytest.raises(ValueError, match="reference='none': this loss compares"):
      make(reference="none")
    with pytest.raises(ValueError, match="reference='precomputed' is unknown"):
      make(reference="precomputed")
    with pytest.raises(ValueError, match="sync_mix=0.5"):
      make(sync_mix=0.5)
  with pytest.raises(ValueError, match="beta=0"):
    group_preference_method(policy(), beta=0.0)
  packed = next(iter(packed_batches(groups(4), 2, 64, seed=None, slots=2)))
  with pytest.raises(ValueError, match="groups in padded batches"):
    program("group")(policy().start, packed)


MESH = (dict(data=2, fsdp=4, tensor=1, sequence=1),)


@pytest.mark.slow
def test_unpaired_method_passes_the_suite(tmp_path):
  method_suite.check_all(method_of("kto"), kto_batch(), tmp_path, golden="unpaired_preference", meshes=MESH)


def test_groups_are_the_same_on_devices_and_in_microbatches():
  method, batch = method_of("group"), group_batch()
  prepared = method_suite.prepare(method, batch)
  method_suite.check_gradients_reach_every_trainable_leaf(method, batch, prepared=prepared)
  method_suite.check_devices_agree(method, batch, meshes=MESH, prepared=prepared)
  method_suite.check_microbatches_agree(method, batch, prepared=prepared)
  method_suite.check_golden_parameters(method, "group_preference")
