"""On a mesh with a sharded vocabulary no transform gathers logits, and none changes its law."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nr.generation.transforms import chain, parse
from nr.generation.transforms.thresholds import is_search
from nr.models.partitioning import shard_count
from nr.training import sharding
from tests.generation.transform_cases import by, context_of

B, V = 4, 512
LOGITS = np.random.default_rng(0).normal(0, 2.5, (B, V)).astype(np.float32)
HISTORY = np.random.default_rng(1).integers(0, 7, (B, 12)).tolist()
CHAINS = [
  "repetition_penalty(1.2, window=8)|frequency_presence(0.3, 0.2)|no_repeat_ngram(2)|dry(0.8, breakers=[3])",
  "logit_bias([1, 5], [2, -3])|bad_words([[1, 2], [3]])|suppress_tokens([7])|min_length([3], 20)"
  "|exponential_decay([4], 2, 1.1)|thinking_budget(1, [2, 3], 9)|green_list()|tournament(3, depth=4)",
  "temperature([0.7, 1, 2, 0])|top_k([7, 0, 90, 300])|top_p(0.9)|typical(0.8)|min_p(0.01, 2)|epsilon(0.002)",
  "dynamic_temperature(0.5, 1.5)|eta(0.002)|top_n_sigma(2)|top_h(0.8)|xtc(1, 0.05)|adaptive_p(0.3)",
  "top_h(0.9, 'hf')|mirostat_v1()|mirostat_v2()",
]


def step(law, logits_BV, context):
  """Starts a chain, applies it, draws, commits; nothing may need a whole vocabulary in one place."""
  state = law.init(context, V)
  changed_BV = law.apply(logits_BV, state, context)
  tokens_B = jax.vmap(jax.random.categorical)(context.step_keys(), changed_BV).astype(jnp.int32)
  log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  transformed_BV = jax.nn.log_softmax(changed_BV, axis=-1)
  seen = context._replace(log_probs_BV=log_probs_BV, transformed_BV=transformed_BV)
  return changed_BV, tokens_B, law.commit(state, tokens_B, seen)


@pytest.mark.parametrize("text, data", [(text, 2) for text in CHAINS] + [(CHAINS[2], 1)])
def test_chains_on_a_sharded_vocabulary(text, data):
  law = parse(text).prepared()
  context = context_of(HISTORY, prompts=5, capacity=16)
  plain = jax.jit(step)(chain(*(by(each, "sort") for each in law.transforms)), LOGITS, context)
  mesh = sharding.make_mesh(dict(data=data, fsdp=1, tensor=4, sequence=1), jax.devices()[: 4 * data])
  with sharding.context(mesh):
    assert shard_count("activation_vocab") == 4
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    context = jax.tree.map(lambda leaf: jax.device_put(leaf, by_row), context)
    logits = jax.device_put(LOGITS, NamedSharding(mesh, PartitionSpec("data", "tensor")))
    compiled = jax.jit(step).lower(law, logits, context).compile()
    cut = compiled(law, logits, context)
  assert gathered(compiled.as_text()) == []
  assert cut[0].sharding.spec[1] == "tensor"
  for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(cut), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def gathered(program):
  """Returns the instructions that move a whole shard of the vocabulary or more."""
  moved = r"= [^=]*\[[\d,]*\b(?:512|256|128)\b[\d,]*\][^=]* (?:all-gather|all-to-all|collective-permute)"
  return re.findall(moved + r"[^\n]{0,60}", program)


def test_the_check_sees_a_gather():
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=4, sequence=1), jax.devices()[:4])
  law = parse("top_k(7, implementation='sort')").prepared()
  with sharding.context(mesh):
    logits = jax.device_put(LOGITS, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    program = jax.jit(step).lower(law, logits, context_of(HISTORY)).compile().as_text()
  assert gathered(program)


def test_the_way_is_chosen_by_size_and_sharding():
  assert shard_count("activation_vocab") == 1
  assert [is_search(way, size) for way in ("auto", "sort", "search") for size in (50, 50_000)] == [
    *(False, True),
    *(False, False),
    *(True, True),
  ]
  with sharding.context(sharding.make_mesh(dict(data=2, fsdp=1, tensor=4, sequence=1))):
    assert is_search("auto", 50) and not is_search("sort", 50)
