"""Laws of cached decoding and of steering, by their numbers in the specification of CoCoMix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cocomix_models import (
  CONCEPTS,
  concept_spec,
  gpt2_spec,
  llama_spec,
  make_model,
  make_tokens,
  stream_at_insertion,
)

from nr.generation.language_models import Network
from nr.generation.sample import sample
from nr.models.cache import CacheSpec
from nr.models.concept_intervention import concept_intervention
from nr.models.parameters import split

LENGTH = 12


def _extend(model):
  return jax.jit(lambda tokens, cache, valid: model.extend(tokens, cache, valid))


@pytest.mark.parametrize(
  "make_spec, insert_at",
  [(gpt2_spec, 0), (gpt2_spec, 1), (gpt2_spec, 2), (gpt2_spec, 3), (llama_spec, 0), (llama_spec, 2)],
)
def test_25_cached_decoding_equals_the_full_forward(make_spec, insert_at):
  model = make_model(make_spec(num_layers=4), concept_spec(insert_at=insert_at))
  tokens = make_tokens(length=LENGTH)
  expected, extend = jax.jit(model)(tokens), _extend(model)
  for prefill in (1, 2, 7, LENGTH - 1):
    logits, cache = extend(tokens[:, :prefill], model.init_cache(2, LENGTH), None)
    pieces = [logits]
    for position in range(prefill, LENGTH):
      logits, cache = extend(tokens[:, position : position + 1], cache, None)
      pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, atol=1e-5)


@pytest.mark.parametrize("mode, layers", [("cocomix", "scan"), ("cocomix", "unroll"), ("add", "scan")])
def test_25_greedy_text_is_the_same_without_a_cache(mode, layers):
  model = make_model(gpt2_spec(layers=layers), concept_spec(mode=mode))
  prompts = make_tokens(length=5)
  forward = jax.jit(model)
  tokens = jnp.pad(prompts, ((0, 0), (0, 8)))  # causal, so that what follows does not matter
  for position in range(5, 13):
    tokens = tokens.at[:, position].set(jnp.argmax(forward(tokens)[:, position - 1], axis=-1))
  with_cache = sample(Network(*split(model)), prompts, max_new_tokens=8)
  np.testing.assert_array_equal(with_cache.tokens_RN, tokens[:, 5:])


@pytest.mark.parametrize("spec", [gpt2_spec(), llama_spec(layers="unroll")])
def test_26_left_padding_changes_nothing(spec):
  model = make_model(spec)
  tokens = make_tokens(batch=3, length=LENGTH)
  starts = [0, 3, 7]  # first real token of each row
  valid = jnp.arange(LENGTH) >= jnp.array(starts)[:, None]
  extend, cache = _extend(model), model.init_cache(3, LENGTH)
  pieces = []
  for start, stop in ((0, 8), (8, LENGTH)):
    logits, cache = extend(tokens[:, start:stop], cache, valid[:, start:stop])
    pieces.append(logits)
  batched = jnp.concatenate(pieces, axis=1)
  for row, start in enumerate(starts):
    alone = model(tokens[row : row + 1, start:])
    np.testing.assert_allclose(batched[row, start:], alone[0], atol=1e-5)


def test_26_caches_hold_one_row_a_token_below_and_two_above():
  model = make_model(gpt2_spec(num_layers=4), concept_spec(insert_at=1))
  cache = model.init_cache(2, LENGTH)
  assert cache.lower.keys.shape == (1, 2, 2, LENGTH, 8)
  assert cache.upper.values.shape == (3, 2, 2, 2 * LENGTH, 8)
  _, cache = model.extend_hidden(make_tokens(length=5), cache)
  assert (int(cache.lower.length), int(cache.upper.length)) == (5, 10)


def _edit(concepts, mode, values=1.0, **settings):
  return concept_intervention(concepts, mode, values, num_concepts=CONCEPTS, **settings)


def whole_model():
  """A model that reads all concepts at once, as edited passes do: what an edit leaves alone has the same bits."""
  return make_model(concepts=concept_spec(concept_chunk=0))


def test_27_scaling_by_one_is_the_identity():
  model, tokens = whole_model(), make_tokens()
  plain, in_chunks = model(tokens), make_model()(tokens)
  np.testing.assert_allclose(in_chunks, plain, atol=2e-6)
  for mode in ("scale_pre", "scale_post"):
    np.testing.assert_array_equal(model(tokens, intervention=_edit([3, 4, 5], mode)), plain)
  assert not np.allclose(model(tokens, intervention=_edit([3], "force", 4.0)), plain, atol=1e-3)


def _concept_rows(model, tokens, edit):
  h = stream_at_insertion(model, tokens)
  prediction = model.concepts.predict(h, intervention=edit)
  return h, prediction, model.concepts.mix(h, prediction)


def _sparse(prediction):
  """The selection as [B, L, C] with zeros elsewhere."""
  array = np.zeros((*prediction.indices_BLK.shape[:2], CONCEPTS), np.float32)
  np.put_along_axis(array, np.asarray(prediction.indices_BLK), np.asarray(prediction.values_BLK), axis=-1)
  return array


@pytest.mark.parametrize("mode", ["set", "force_value"])
def test_27_an_edit_moves_the_concept_by_its_column(mode):
  model, tokens = whole_model(), make_tokens()
  kernel = np.asarray(model.concepts.compression.kernel[...])
  for concept in (0, 7, 40):
    h, before, c_before = _concept_rows(model, tokens, None)
    _, after, c_after = _concept_rows(model, tokens, _edit([concept], mode, 30.0))

    change = _sparse(after) - _sparse(before)
    # Only the concept itself and at most one evicted concept change.
    assert ((np.delete(change, concept, axis=-1) != 0).sum(axis=-1) <= 1).all()
    assert (_sparse(after)[..., concept] == 30.0).all()
    std = h.std(axis=-1, keepdims=True, ddof=1)
    np.testing.assert_allclose(c_after - c_before, std * (change @ kernel), rtol=2e-4, atol=1e-4)


def test_27_a_sweep_of_strengths_is_linear_at_the_insertion():
  model, tokens = make_model(), make_tokens()
  sweep = [_edit([7], "force_value", value) for value in (-10.0, 0.0, 10.0, 30.0)]
  rows = [_concept_rows(model, tokens, edit)[2] for edit in sweep]
  np.testing.assert_allclose(rows[2] - rows[1], rows[1] - rows[0], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(rows[3] - rows[1], 3 * (rows[2] - rows[1]), rtol=1e-3, atol=1e-4)
  assert (np.abs(rows[3] - rows[1]).max(axis=-1) > 0.1).all()


@pytest.mark.parametrize("mode", ["ablate_pre", "ablate_post"])
def test_27_an_ablated_concept_is_never_selected(mode):
  model, tokens = whole_model(), make_tokens()
  _, before, _ = _concept_rows(model, tokens, None)
  concept = int(jnp.bincount(before.indices_BLK.ravel()).argmax())
  _, after, _ = _concept_rows(model, tokens, _edit([concept], mode))
  assert (before.indices_BLK == concept).any()
  assert not (after.indices_BLK == concept).any()
  # The reported prediction stays the model's own.
  np.testing.assert_array_equal(before.log_normalizer_BL, after.log_normalizer_BL)


def test_27_steering_with_a_cache_equals_steering_without():
  model, tokens = make_model(), make_tokens(length=LENGTH)
  edit = _edit([7], "force", 3.0)
  expected = model(tokens, intervention=edit)
  logits, cache = model.extend(tokens[:, :7], model.init_cache(2, LENGTH), intervention=edit)
  np.testing.assert_allclose(logits, expected[:, :7], atol=2e-5)
  logits, cache = model.extend(tokens[:, 7:], cache, intervention=edit)
  np.testing.assert_allclose(logits, expected[:, 7:], atol=2e-5)
  # Only the tokens from which another is drawn: the last of the prompt and later ones.
  late = edit._replace(active_BL=jnp.arange(LENGTH + 3) >= LENGTH - 1)
  network = Network(*split(model), intervention=edit, intervene_on="generation")
  drawn = sample(network, tokens, max_new_tokens=3)
  text = jnp.concatenate([tokens, drawn.tokens_RN], axis=1)
  greedy = jnp.argmax(model(text, intervention=late), axis=-1)
  np.testing.assert_array_equal(drawn.tokens_RN, greedy[:, LENGTH - 1 : -1])


VARIANTS = {
  "pause": dict(mode="pause", insert_at=1),
  "hidden": dict(mode="hidden", target_dim=5, insert_at=0),
  "thought": dict(mode="thought", refinements=1, insert_at=0),
  "every_third": dict(insert_every=3, insert_at=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_25_caches_of_every_interleaving_mode_give_the_full_forward(name):
  """Prompts padded on the left; then rows reordered as beams are, and drafts in a tree that are verified."""
  model = make_model(concepts=concept_spec(**VARIANTS[name]))
  tokens, pads = make_tokens(length=LENGTH), jnp.array([0, 3])
  is_token = jnp.arange(LENGTH) >= pads[:, None]
  expected = jax.jit(lambda tokens, segments: model(tokens, segment_ids_BL=segments))(tokens, is_token + 0)
  extend = jax.jit(lambda tokens, cache, valid, tree: model.extend(tokens, cache, valid, visible_BLL=tree))

  first, cache = extend(tokens[:, :7], model.init_cache(2, LENGTH), is_token[:, :7], None)
  second, _ = extend(tokens[:, 7:], cache, is_token[:, 7:], None)
  found = jnp.where(is_token[..., None], jnp.concatenate([first, second], axis=1), 0)
  np.testing.assert_allclose(found, jnp.where(is_token[..., None], expected, 0), atol=2e-5)

  # Row 1 shall be row 0 from here on. A tree: token 7, a wrong child, and the right one in a branch of its own.
  _, cache = extend(tokens[:, :7], model.init_cache(2, LENGTH, uneven=True), None, None)
  cache = model.fork(cache, jnp.array([1, 0]))
  drafts = jnp.stack([tokens[0, 7], tokens[0, 8] + 1, tokens[0, 8]])[None].repeat(2, axis=0) % 97
  tree = jnp.array([[True, False, False], [True, True, False], [True, False, True]])[None]
  logits, cache = extend(drafts, cache, None, tree)
  np.testing.assert_allclose(logits[1, 0], expected[0, 7], atol=2e-5)
  np.testing.assert_allclose(logits[1, 2], expected[0, 8], atol=2e-5)
  start = cache.length - 3
  cache = model.rollback(model.keep_path(cache, start, jnp.array([[0, 2]] * 2)), start + 2)
  assert cache.length.tolist() == [9, 9]
  chain = jnp.tril(jnp.ones((1, 3, 3), bool))
  logits, _ = extend(tokens[:1, 9:12].repeat(2, axis=0), cache, None, chain)
  np.testing.assert_allclose(logits[1], expected[0, 9:12], atol=2e-5)


def test_26_caches_of_thoughts_are_one_for_each_pass():
  model = make_model(gpt2_spec(num_layers=4), concept_spec(mode="thought", refinements=2, insert_at=1))
  cache = model.init_cache(2, LENGTH)
  assert [part.keys.shape[0] for part in (cache.lower, *cache.thoughts, cache.upper)] == [1, 3, 3, 3, 3]
  assert [part.capacity for part in (*cache.thoughts, cache.upper)] == [
    LENGTH,
    2 * LENGTH,
    2 * LENGTH,
    2 * LENGTH,
  ]


def test_a_paged_cache_is_refused_where_rows_are_to_be_unseen():
  model = make_model(concepts=concept_spec(insert_every=2))
  with pytest.raises(
    ValueError, match="layout='paged' shows every row that was read, and with insert_every=2"
  ):
    model.init_cache(2, LENGTH, uneven=True, layout=CacheSpec(layout="paged", num_pages=4))
