"""Speculative decoding of networks: the text of plain decoding, its ends, its caches, its errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.constraints.stop_strings import stop_strings
from nr.generation.decoding import pad_prompts
from nr.generation.sample import sample
from nr.generation.samplers import Replay
from nr.generation.speculation.draft_trees import DraftTree
from nr.generation.speculation.drafters import ForcedDrafter, NgramDrafter
from nr.generation.speculation.model_drafters import ModelDrafter, TreeDrafter, early_exit
from nr.generation.speculation.speculative import speculative
from nr.generation.stopping import FINISH_REASONS, Stop
from nr.generation.streams import Stream, WithStreams
from nr.generation.transforms import (
  Dry,
  MirostatV2,
  NoRepeatNgram,
  RepetitionPenalty,
  Temperature,
  TopP,
  Xtc,
  chain,
)
from nr.generation.transforms.algebra import Context
from nr.generation.transforms.mixtures import ContrastiveDecoding
from nr.models.cache import CacheSpec
from nr.models.concept_intervention import concept_intervention
from tests.generation.toy import DRAFT, PROMPT, TOY, random_prompts, tiny_network

MAX_NEW = 12
PROMPTS, VALID = pad_prompts(random_prompts([3, 7, 5]))
SPELLED = [bytes([65 + token]) for token in range(32)]


def assert_same(found, wanted):
  for field in ("tokens_RN", "lengths_R", "finish_R"):
    np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field), err_msg=field)
  for field in ("log_probs_RN", "transformed_log_probs_RN"):
    np.testing.assert_allclose(getattr(found, field), getattr(wanted, field), atol=2e-5, err_msg=field)


def test_rows_end_inside_a_run_of_accepted_drafts_where_sampling_would():
  # Drafts go beyond the last position that the model has learned.
  most = PROMPTS.shape[1] + MAX_NEW - 1
  network = tiny_network(positions="learned", max_length=most)
  law = chain(RepetitionPenalty(jnp.array([1.0, 1.3, 1.1])), NoRepeatNgram(2))
  settings = dict(chain=law, max_new_tokens=MAX_NEW)
  whole = Stop(jnp.array([13]), stop_strings([SPELLED[13] * 2], SPELLED), jnp.full(3, MAX_NEW))
  text_RN = np.asarray(sample(network, PROMPTS, VALID, stop=whole, **settings).tokens_RN)
  assert 13 not in text_RN and text_RN[1, 1] != text_RN[1, 2]
  stop = Stop(
    jnp.array([text_RN[0, 5]]),
    stop_strings([SPELLED[text_RN[1, 1]] + SPELLED[text_RN[1, 2]]], SPELLED),
    jnp.array([MAX_NEW, MAX_NEW, 2]),
  )
  # Row 0: right up to a stop id. Row 1: wrong at its third token. Row 2: longer than its limit.
  drafts_RN = text_RN.copy()
  drafts_RN[1, 2] = (drafts_RN[1, 2] + 1) % 32
  plain = sample(network, PROMPTS, VALID, stop=stop, **settings)
  found = speculative(
    network, ForcedDrafter(drafts_RN), PROMPTS, VALID, stop=stop, draft_length=4, **settings
  )
  assert_same(found, plain)
  reasons = [FINISH_REASONS[code] for code in found.finish_R]
  assert reasons == ["stop_id", "stop_string", "length"]
  first = int(np.flatnonzero(text_RN[0] == text_RN[0, 5])[0]) + 1
  assert int(found.lengths_R[0]) == first
  # One call takes four drafts and adds a token of its own.
  assert found.row_calls_R.tolist() == [-(-first // 5), 1, 1]
  assert found.accepted_R.tolist() == [first - first // 5, 2, 2]
  assert found.tested_R.tolist() == [first - first // 5, 3, 2]
  assert found.drafted_R.tolist()[2] == 2


def test_a_concept_model_under_an_intervention_copies_from_the_text():
  steer = concept_intervention(
    [3], "force", 4.0, num_concepts=24, active_BL=jnp.array([[True], [False], [True]])
  )
  network = tiny_network("concepts", network=dict(intervention=steer, intervene_on="generation"))
  plain = sample(network, PROMPTS, VALID, max_new_tokens=MAX_NEW)
  found = speculative(network, NgramDrafter(3), PROMPTS, VALID, max_new_tokens=MAX_NEW, draft_length=3)
  assert_same(found, plain)
  assert int(found.drafted_R.sum()) > 0
  free = dataclasses.replace(network, intervention=steer._replace(active_BL=jnp.zeros((3, 1), bool)))
  without = sample(free, PROMPTS, VALID, max_new_tokens=MAX_NEW)
  assert (np.asarray(without.tokens_RN) != np.asarray(plain.tokens_RN)).any(axis=1).tolist()[1] is False
  assert (np.asarray(without.tokens_RN) != np.asarray(plain.tokens_RN)).any()


@pytest.mark.slow
def test_a_tree_from_the_first_block_against_a_mixture_of_streams():
  network, amateur = tiny_network(), tiny_network(seed=3, num_layers=1)
  others, valid = pad_prompts(random_prompts([4, 2, 9], seed=5))
  streams = {"amateur": Stream(amateur), "other": Stream(network, jnp.asarray(others), jnp.asarray(valid))}
  target = WithStreams(network, streams)
  law = chain(
    ContrastiveDecoding(0.05, temperature=2.0), ContrastiveDecoding(0.0, coefficient=0.5, stream="other")
  )
  plain = sample(target, PROMPTS, VALID, chain=law, max_new_tokens=MAX_NEW)
  drafter = TreeDrafter(early_exit(network, 1), shape=DraftTree((0, 0, 0, 1, 1, 2)))
  found = speculative(target, drafter, PROMPTS, VALID, chain=law, max_new_tokens=MAX_NEW)
  assert_same(found, plain)
  assert 0 < int(found.accepted_R.sum()) < int(found.tested_R.sum())


def test_draws_are_those_of_the_row_and_their_laws_those_of_plain_sampling():
  network = tiny_network()
  law = chain(
    RepetitionPenalty(1.2),
    Dry(0.5, allowed_length=1),
    Temperature(jnp.array([0.7, 1.3, 1.0])),
    MirostatV2(tau=2.0),
    Xtc(0.5, threshold=0.05),
    TopP(0.95),
  )
  settings = dict(chain=law, max_new_tokens=MAX_NEW, num_samples=2, stop=Stop(jnp.array([1, 2])))
  drafter, key = ModelDrafter(early_exit(network, 1)), jax.random.key(5)
  found = speculative(network, drafter, PROMPTS, VALID, key, row_ids_B=[8, 3, 5], draft_length=3, **settings)
  assert 0 < int(found.accepted_R.sum()) < int(found.tested_R.sum())
  assert 0 < float(found.acceptance) < 1
  # The same tokens, one by one: what is recorded is the law of sequential decoding.
  replayed = sample(
    network, PROMPTS, VALID, key, sampler=Replay(found.tokens_RN), row_ids_B=[8, 3, 5], **settings
  )
  assert_same(found, replayed)
  tokens_RN = np.asarray(found.tokens_RN)
  assert (tokens_RN[::2] != tokens_RN[1::2]).any(axis=1).all()
  # Other neighbours, another order.
  order, prompts, valid = [2, 0, 1], PROMPTS.copy(), VALID.copy()
  prompts[1], valid[1] = PROMPTS[0], VALID[0]
  law = chain(*law.transforms[:2], Temperature(jnp.array([1.0, 0.7, 0.7])), *law.transforms[3:])
  moved = speculative(
    network,
    drafter,
    prompts[order],
    valid[order],
    key,
    row_ids_B=[5, 8, 9],
    draft_length=3,
    **{**settings, "chain": law},
  )
  np.testing.assert_array_equal(moved.tokens_RN[:4], found.tokens_RN[jnp.array([4, 5, 0, 1])])


def copied(tokens, longest, shortest, count):
  """Returns what prompt lookup copies, by a plain search."""
  for length in range(longest, shortest - 1, -1):
    for start in range(len(tokens) - length):
      if tokens[start : start + length] == tokens[-length:]:
        return tokens[start + length :][:count]
  return []


def test_the_longest_earlier_match_is_copied():
  draws = np.random.default_rng(0)
  histories = [draws.integers(0, 3, draws.integers(1, 12)).tolist() for _ in range(200)]
  tokens, lengths = np.zeros((200, 16), np.int32), np.array([len(history) for history in histories])
  for row, history in zip(tokens, histories):
    row[: len(history)] = history
  context = Context(jnp.asarray(tokens), jnp.asarray(lengths), jnp.ones(200, jnp.int32), None)
  drafter = NgramDrafter(longest=3, shortest=2)
  proposal, _ = drafter.propose((), context, None, DraftTree.chain(4), 3)
  found = [
    row[mask].tolist() for row, mask in zip(*map(np.asarray, (proposal.tokens_BN, proposal.is_drafted_BN)))
  ]
  assert found == [copied(history, 3, 2, 4) for history in histories]
  assert any(found) and not all(found)


@pytest.mark.parametrize("kind, layers, blocks", [("transformer", "scan", 2), ("concepts", "unroll", 3)])
def test_an_early_exit_is_the_network_without_its_last_blocks(kind, layers, blocks):
  network, last = tiny_network(kind, layers=layers, num_layers=blocks), blocks - 1
  inner = network.params["transformer"] if kind == "concepts" else network.params
  # A block of zeros adds nothing to the stream.
  if layers == "scan":
    blocks = jax.tree.map(lambda leaf: leaf.at[last].set(0), inner["blocks"])
  else:
    blocks = {**inner["blocks"], last: jax.tree.map(jnp.zeros_like, inner["blocks"][last])}
  inner = {**inner, "blocks": blocks}
  params = {**network.params, "transformer": inner} if kind == "concepts" else inner
  idle = dataclasses.replace(network, params=params)
  logits = jax.jit(lambda each: each.prefill(PROMPTS, VALID, 8)[0].logits)
  np.testing.assert_allclose(logits(early_exit(network, last)), logits(idle), atol=1e-5)


def test_an_exit_below_the_concepts_has_none():
  network = tiny_network("concepts")
  assert "concepts" in network.params
  assert "concepts" not in early_exit(network, 1).params
  with pytest.raises(ValueError, match="num_blocks=2: give 1 to 1"):
    early_exit(network, 2)


@pytest.mark.parametrize("length", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_one_new_token(length):
  plain = sample(TOY, PROMPT, max_new_tokens=1)
  found = speculative(TOY, ModelDrafter(DRAFT), PROMPT, max_new_tokens=1, draft_length=length)
  assert_same(found, plain)
  assert int(found.calls) == 1
  assert int(found.drafted_R[0]) == min(length, 1)


def test_trees():
  tree = DraftTree.branching(2, 1, 2)
  assert tree.parents == (0, 0, 1, 2, 3, 3, 4, 4)
  assert (tree.size, tree.depth, tree.is_chain) == (8, 3, False)
  assert tree.paths[7].tolist() == [0, 2, 4, 7]
  assert tree.paths[3].tolist() == [0, 1, 3, 3]
  assert np.flatnonzero(tree.visible[6]).tolist() == [0, 1, 3, 6]
  assert [nodes.tolist() for nodes in tree.siblings] == [[1, 3, 4, 5, 7], [2, 6, 8]]
  assert DraftTree.chain(3).is_chain and DraftTree.branching(1, 1) == DraftTree.chain(2)
  assert DraftTree.chain(0).siblings == []
  for parents, message in [((1,), "must be in 0..0"), ((0, 1, 0), "level by level"), ((-1,), "must be in")]:
    with pytest.raises(ValueError, match=message):
      DraftTree(parents)
  with pytest.raises(ValueError, match="at least 1 child"):
    DraftTree.branching(2, 0)


def test_mistakes_are_answered():
  network, model = tiny_network(num_layers=1), ModelDrafter(DRAFT)
  key = jax.random.key(0)
  tree = TreeDrafter(DRAFT)
  cases = [
    (dict(rule="blok"), model, "did you mean 'block'"),
    (dict(rule="token"), model, "key: rule='token' draws at random"),
    (dict(rule="block", key=key), tree, "one run of drafts"),
    (dict(draft_length=-1), model, "draft_length=-1"),
    (dict(draft_length=5), tree, "tree has depth 2"),
    (dict(fingerprints=("a", "b")), model, "different tokenizers"),
    (dict(), ModelDrafter(network), "32 tokens, the target's 4"),
    (dict(), ModelDrafter(DRAFT, chain(ContrastiveDecoding())), "needs 'streams:amateur'"),
    (dict(), ForcedDrafter(jnp.zeros((2, 3), jnp.int32)), "a row of tokens for each of the 1 prompts"),
    (dict(), NgramDrafter(1, 2), "1 <= shortest <= longest"),
    (dict(max_new_tokens=0), model, "max_new_tokens=0"),
    (dict(chain=chain(ContrastiveDecoding())), model, "needs 'streams:amateur'"),
  ]
  for settings, drafter, message in cases:
    with pytest.raises(ValueError, match=message):
      speculative(TOY, drafter, PROMPT, **{"max_new_tokens": 3, **settings})


def test_a_ring_without_room_to_take_drafts_back_is_refused():
  ring = CacheSpec(layout="ring", window=4, slack=3)
  network = tiny_network(num_layers=1, network=dict(cache=ring))
  with pytest.raises(ValueError, match="slack=3: 4 drafts may be taken back"):
    speculative(network, NgramDrafter(), jnp.ones((1, 4), int), max_new_tokens=4, draft_length=4)


def test_padding_takes_no_position_of_the_drafter():
  learned = tiny_network(num_layers=1, positions="learned", max_length=24)
  prompts = pad_prompts([[1] * 17])  # a bucket of 32
  drawn = speculative(learned, ModelDrafter(learned), *prompts, max_new_tokens=4, draft_length=2)
  plain = sample(learned, *prompts, max_new_tokens=4)
  np.testing.assert_array_equal(drawn.tokens_RN, plain.tokens_RN)
