"""Reference log-probabilities computed before training: what a frozen copy gives, pair by pair."""

import jax
import numpy as np
import pytest

from nr.data.bad_records import DataError
from nr.data.example_batches import packed_batches, padded_batches
from nr.data.examples import EncodedExample
from nr.data.preferences import read_reference_scores, write_reference_scores
from nr.models import parameters
from nr.models.lora import LoraSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.preference import PreferenceSpec
from nr.recipes.reference_scores import reference_scores
from nr.training.model_files import build_model
from nr.training.policy import full_policy, lora_policy, new_policy
from nr.training.preference import preference_method
from nr.training.step import accumulate

SPEC = TransformerSpec.llama(vocab_size=24, num_layers=2, model_dim=16, num_heads=2, mlp_dim=20, init_std=0.2)


def examples(count=11):
  random, found = np.random.default_rng(0), []
  for number in range(count):
    prompt = random.integers(1, 24, random.integers(1, 5))
    sides = [
      np.append(prompt, random.integers(1, 24, random.integers(1, 9))).astype(np.int32) for _ in range(2)
    ]
    masks = tuple(np.arange(len(ids)) >= len(prompt) for ids in sides)
    found.append(EncodedExample(f"p{number}", tuple(sides), masks, 1.0 + number % 2))
  return found


def base(seed=0):
  return parameters.split(build_model(SPEC, jax.random.key(seed)))[1]


def outputs(method, batch, params):
  return accumulate(method, params, method.frozen, (), batch, jax.random.key(0))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_precomputed_scores_give_the_loss_and_gradient_of_a_frozen_copy(kind, tmp_path):
  policy = full_policy(SPEC, base())
  if kind == "lora":
    policy = lora_policy(SPEC, base(), LoraSpec(rank=2), jax.random.key(1))
  pairs = examples()
  write_reference_scores(tmp_path / "r.jsonl", reference_scores(policy, pairs, batch_size=4, lengths=(8, 16)))
  scores = read_reference_scores(tmp_path / "r.jsonl")
  assert list(scores) != [] and set(scores) == {pair.id for pair in pairs}
  leaves, structure = jax.tree.flatten(policy.start)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
  moved = jax.tree.unflatten(structure, moved)
  for batches in (
    padded_batches(pairs, 6, (16,), 0, 1, reference=scores),
    packed_batches(pairs, 3, 64, 0, 1, slots=4, reference=scores),
  ):
    for batch in batches:
      found = [
        outputs(preference_method(policy, PreferenceSpec(beta=0.3), reference=reference), batch, moved)
        for reference in ("frozen", "precomputed")
      ]
      for name in found[0][1].metrics:
        a, b = (output.metrics[name].mean() for _, output in found)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[0][0], found[1][0]
      )
      assert abs(float(found[0][1].loss.mean()) - np.log(2)) > 1e-3, "the policy has moved"


def test_scores_of_other_tokens_are_refused():
  policy, pairs = full_policy(SPEC, base()), examples()
  scores = reference_scores(policy, pairs, batch_size=4, lengths=(16,), loss_chunk=5)
  again = reference_scores(policy, pairs, batch_size=11, lengths=(12, 16))
  for id, score in scores.items():
    np.testing.assert_allclose(score.log_probs, again[id].log_probs, rtol=1e-5)
  other = reference_scores(policy, pairs, batch_size=4, lengths=(16,), params=base(1))
  assert abs(other["p0"].log_probs[0] - scores["p0"].log_probs[0]) > 0.1
  cut = [pair._replace(tokens=tuple(ids[1:] for ids in pair.tokens)) for pair in pairs]
  with pytest.raises(DataError, match="'p0' was scored for other tokens"):
    padded_batches(cut, 4, (16,), 0, reference=scores)
  with pytest.raises(ValueError, match="policy.start is None"):
    reference_scores(new_policy(SPEC), pairs, batch_size=4, lengths=(16,))
