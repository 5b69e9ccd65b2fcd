"""However keys and values are kept, a model says the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.generation.language_models import Network
from nr.models import cache as caches
from nr.models import parameters
from nr.models.cache import CacheSizes, CacheSpec, storage
from nr.models.concept_mixing import ConceptMixingSpec, ConceptMixingTransformer
from nr.models.transformer import AttentionInputs, Transformer, TransformerSpec

SIZES = dict(vocab_size=31, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, init_std=0.3)
LENGTH, BATCH, CAPACITY = 14, 3, 20
LAYOUTS = {
  "static": CacheSpec(),
  "ring": CacheSpec("ring", window=CAPACITY, slack=4),
  "paged": CacheSpec("paged", page_size=3, num_pages=30),
  "static_int8": CacheSpec(quantization="int8"),
  "paged_int8": CacheSpec("paged", page_size=3, num_pages=30, quantization="int8"),
}
KINDS = ["transformer/unroll", "concepts/scan"]
CASES = [(kind, layout) for kind in KINDS for layout in ("static", "ring", "paged")]
# Below every difference that a wrong slot makes; above rounding in another order.
CLOSE = 1e-5


class Case:
  """A model, its compiled calls and tokens."""

  def __init__(self, kind):
    name, layers = kind.split("/")
    spec, rngs = TransformerSpec.llama(**SIZES, layers=layers), nnx.Rngs(0)
    if name == "concepts":
      concepts = ConceptMixingSpec(num_concepts=24, top_k=4, insert_at=1)
      model = ConceptMixingTransformer(spec.replace(num_layers=3), concepts, rngs=rngs)
    else:
      model = Transformer(spec, rngs=rngs)
    graphdef, params = parameters.split(model)
    self.model = model
    self.network = Network(graphdef, params)
    self.tokens = jnp.asarray(np.random.default_rng(2).integers(0, 31, (BATCH, LENGTH)), jnp.int32)
    self.whole = np.asarray(jax.jit(model)(self.tokens))
    self.extend_valid = jax.jit(lambda tokens, cache, valid: model.extend(tokens, cache, valid))
    self.extend_tree = jax.jit(
      lambda tokens, cache, visible: model.extend(tokens, cache, visible_BLL=visible)
    )

  def extend(self, tokens, cache, valid=None):
    return self.extend_valid(tokens, cache, jnp.ones(tokens.shape, bool) if valid is None else valid)

  def cache(self, layout, uneven=True):
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    return self.model.init_cache(BATCH, CAPACITY, uneven=uneven, layout=layout)

  def read(self, cache, start, stop, rows=slice(None)):
    """Reads tokens in pieces of 5 and 1, so that few programs are compiled."""
    pieces = []
    while start < stop:
      chunk = 5 if stop - start >= 5 else 1
      logits, cache = self.extend(self.tokens[rows, start : start + chunk], cache)
      pieces.append(np.asarray(logits))
      start += chunk
    return np.concatenate(pieces, axis=1), cache


make_case = functools.cache(Case)


@pytest.fixture(scope="module")
def plain():
  return make_case("transformer/unroll")


def tolerance(layout):
  return 0.3 if layout.endswith("int8") else CLOSE


@pytest.mark.parametrize("kind, layout", [*CASES, (KINDS[0], "static_int8"), (KINDS[0], "paged_int8")])
def test_any_chunking_equals_one_pass(kind, layout):
  case = make_case(kind)
  logits, _ = case.read(case.cache(layout), 0, LENGTH)
  np.testing.assert_allclose(logits, case.whole, atol=tolerance(layout))
  # Cut elsewhere: ones first, then fives.
  first, cache = case.read(case.cache(layout), 0, 2)
  rest, _ = case.read(cache, 2, LENGTH)
  # Quantised rows are attended as they are stored, also in the call that stores them.
  np.testing.assert_allclose(np.concatenate([first, rest], axis=1), logits, atol=CLOSE)


@pytest.mark.parametrize("layout", ["ring", "paged", "static_int8", "paged_int8"])
def test_rows_that_are_forked_continue_their_rows(plain, layout):
  rows = jnp.array([2, 0, 2])
  _, cache = plain.read(plain.cache(layout), 0, 6)
  logits, _ = plain.read(jax.jit(plain.model.fork)(cache, rows), 6, LENGTH, rows)
  np.testing.assert_allclose(logits, plain.whole[np.asarray(rows), 6:], atol=tolerance(layout))


@pytest.mark.parametrize("kind, layout", CASES)
def test_tokens_that_are_taken_back_leave_no_trace(kind, layout):
  case = make_case(kind)
  _, cache = case.read(case.cache(layout), 0, 5)
  wrong, valid = (case.tokens[:, 5:10] + 1) % 31, jnp.arange(5) < jnp.array([[3], [1], [4]])
  _, cache = case.extend(wrong, cache, valid)
  np.testing.assert_array_equal(cache.length, [8, 6, 9])
  cache = jax.jit(case.model.rollback)(cache, jnp.full(BATCH, 5))
  logits, _ = case.read(cache, 5, LENGTH)
  np.testing.assert_allclose(logits, case.whole[:, 5:], atol=CLOSE)


@pytest.mark.parametrize("kind, layout", [CASES[0], CASES[1], CASES[3], CASES[5]])
def test_one_path_of_a_tree_is_kept(kind, layout):
  case = make_case(kind)
  # Nodes 0 - 2 - 4 hold the text; 1 and 3 are other drafts.
  _, cache = case.read(case.cache(layout), 0, 5)
  right, other = case.tokens[:, 5:8], (case.tokens[:, 5:7] + 1) % 31
  tree = jnp.stack([right[:, 0], other[:, 0], right[:, 1], other[:, 1], right[:, 2]], axis=1)
  visible = np.eye(5, dtype=bool)
  for node, parent in ((2, 0), (3, 1), (4, 2)):
    visible[node] |= visible[parent]
  logits, cache = case.extend_tree(tree, cache, jnp.asarray(visible)[None])
  np.testing.assert_allclose(logits[:, [0, 2, 4]], case.whole[:, 5:8], atol=CLOSE)
  offsets = jnp.broadcast_to(jnp.array([0, 2, 4]), (BATCH, 3))
  cache = jax.jit(case.network.keep_path, static_argnums=1)(cache, 5, offsets, jnp.full(BATCH, 3))
  np.testing.assert_array_equal(cache.length, [8] * BATCH)
  logits, _ = case.read(cache, 8, LENGTH)
  np.testing.assert_allclose(logits, case.whole[:, 8:], atol=CLOSE)


def windowed(model, tokens, window):
  """Logits of a full cache whose slots outside the window are hidden before each step."""
  cache, pieces = model.init_cache(tokens.shape[0], tokens.shape[1]), []

  @jax.jit
  def step(token, cache, position):
    is_near = jnp.arange(tokens.shape[1]) > position - window
    near = dataclasses.replace(cache, segment_ids_BS=cache.segment_ids_BS * is_near)
    positions = jnp.full(token.shape, position)
    x, near = model.run_blocks(
      model.embed(token, positions), attention=AttentionInputs(positions), cache=near
    )
    return model.logits(model.final_norm(x)), near

  for position in range(tokens.shape[1]):
    logits, cache = step(tokens[:, position : position + 1], cache, jnp.int32(position))
    pieces.append(logits)
  return np.concatenate(pieces, axis=1)


@pytest.fixture(scope="module")
def near(plain):
  """What a window of 4 says of the tokens."""
  return windowed(plain.model, plain.tokens, 4)


@pytest.mark.parametrize("slack, uneven", [(0, False), (4, True)])
def test_a_ring_equals_a_full_cache_with_a_window_mask(plain, near, slack, uneven):
  # Without slack, five rows at once are more than the ring holds.
  assert np.abs(near - plain.whole)[:, 4:].max() > 0.05
  layout = CacheSpec("ring", window=4, slack=slack)
  logits, cache = plain.read(plain.cache(layout, uneven), 0, LENGTH)
  np.testing.assert_allclose(logits, near, atol=CLOSE)
  assert cache.keys[0].shape == (BATCH, 2, 4 + slack, 4)
  np.testing.assert_array_equal(caches.count_tokens(cache), [LENGTH] * BATCH)


def test_a_ring_takes_back_what_its_slack_holds(plain, near):
  _, cache = plain.read(plain.cache(CacheSpec("ring", window=4, slack=4)), 0, 7)
  wrong = (plain.tokens[:, 7:12] + 1) % 31
  _, cache = plain.extend(wrong, cache, jnp.arange(5) < jnp.array([[4], [0], [3]]))
  cache = jax.jit(plain.model.rollback)(cache, jnp.full(BATCH, 7))
  logits, _ = plain.read(cache, 7, LENGTH)
  np.testing.assert_allclose(logits, near[:, 7:], atol=CLOSE)


def test_padding_passes_a_ring_by(plain, near):
  padding = np.array([0, 4, 9])
  # Behind its padding, each row holds the first tokens of the text.
  padded = jnp.stack([jnp.roll(row, start) for row, start in zip(plain.tokens, padding)])
  valid = jnp.arange(LENGTH) >= padding[:, None]
  cache, pieces = plain.cache(CacheSpec("ring", window=4), uneven=False), []
  for start in (0, 5, 10, 11, 12, 13):
    part = slice(start, start + (5 if start < 10 else 1))
    logits, cache = plain.extend(padded[:, part], cache, valid[:, part])
    pieces.append(logits)
  logits = np.concatenate(pieces, axis=1)
  assert np.isfinite(logits).all()
  for row, start in enumerate(padding):
    np.testing.assert_allclose(logits[row, start:], near[row, : LENGTH - start], atol=CLOSE)


def test_a_concept_model_sees_both_rows_of_each_token_in_its_window():
  concepts = make_case("concepts/scan")
  cache = concepts.cache(CacheSpec("ring", window=4))
  assert (cache.lower.capacity, cache.upper.capacity) == (4, 8)
  # Ten rows at once pass by a ring of eight.
  fives, _ = concepts.read(cache, 0, 10)
  pieces = []
  for position in range(10):
    logits, cache = concepts.extend(concepts.tokens[:, position : position + 1], cache)
    pieces.append(logits)
  np.testing.assert_allclose(fives, np.concatenate(pieces, axis=1), atol=CLOSE)
  np.testing.assert_allclose(fives[:, :4], concepts.whole[:, :4], atol=CLOSE)
  assert np.abs(fives - concepts.whole[:, :10])[:, 4:].max() > 0.01


@pytest.mark.parametrize("kind, uneven", [("transformer/unroll", False), ("concepts/scan", True)])
def test_samples_that_share_a_prompt_equal_copies_of_it(kind, uneven):
  case = make_case(kind)
  network = dataclasses.replace(case.network, cache=CacheSpec("shared_prefix"))
  lengths = jnp.array([[5], [3], [2]])
  valid = jnp.arange(5) < lengths if uneven else jnp.arange(5) >= 5 - lengths
  _, prompt = case.extend(case.tokens[:, :5], case.cache("static", uneven), valid)
  shared, copies = network.fork_prompts(prompt, BATCH, 2, 5), [prompt, prompt]
  tails = (case.tokens[:, None, 5:] + jnp.arange(2)[:, None]) % 31
  for step, part in enumerate((slice(0, 5), slice(5, 6), slice(6, 7))):
    if step == 1:
      # Each row takes the place of its neighbour of the same prompt.
      shared, copies = network.fork(shared, jnp.array([1, 0, 3, 2, 5, 4])), copies[::-1]
    if step == 2 and uneven:
      forgotten = jnp.array([2, 1, 0, 3, 1, 1])
      shared = network.rollback(shared, forgotten)
      copies = [network.rollback(copy, forgotten[sample::2]) for sample, copy in enumerate(copies)]
    found, shared = case.extend(tails[:, :, part].reshape(2 * BATCH, -1), shared)
    for sample in range(2):
      expected, copies[sample] = case.extend(tails[:, sample, part], copies[sample])
      np.testing.assert_allclose(found[sample::2], expected, atol=CLOSE)
  np.testing.assert_array_equal(shared.length[::2] if uneven else shared.length, copies[0].length)


def test_a_shared_prompt_is_stored_once(plain):
  network = dataclasses.replace(plain.network, cache=CacheSpec("shared_prefix"))
  _, cache = plain.read(plain.cache(CacheSpec("shared_prefix")), 0, 6)
  shared = network.fork_prompts(cache, BATCH, 4, 6)
  assert shared.prefix_keys[0].shape == (BATCH, 2, 6, 4)
  assert shared.keys[0].shape == (4 * BATCH, 2, CAPACITY - 6, 4)
  with pytest.raises(ValueError, match="stay with their prompt"):
    network.fork(shared, jnp.array([4, 0, 8]))
  with pytest.raises(ValueError, match="only a static one"):
    plain.model.share_prefix(shared, 2, 3)
  # No room for a suffix, or nothing shared: rows are copied.
  full = network.fork_prompts(cache, BATCH, 2, CAPACITY)
  assert full.keys[0].shape == (2 * BATCH, 2, CAPACITY, 4)


def test_attention_in_two_parts_joins_to_the_whole():
  rng = np.random.default_rng(0)
  query = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)
  keys, values = (jnp.asarray(rng.normal(size=(2, 2, 10, 8)), jnp.float32) for _ in range(2))
  mask = jnp.asarray(rng.random((2, 3, 10)) < 0.6).at[:, :, 0].set(True)
  mask = mask.at[0, 0, 4:].set(False).at[0, 1, :4].set(False).at[0, 1, 5].set(True)
  whole, log_total = storage.attend(query, keys, values, mask)
  parts = [
    storage.attend(query, keys[:, :, part], values[:, :, part], mask[:, :, part])
    for part in (slice(0, 4), slice(4, 10))
  ]
  np.testing.assert_allclose(storage.merge_attention(*parts), whole, atol=1e-6)
  np.testing.assert_allclose(jnp.logaddexp(parts[0][1], parts[1][1]), log_total, atol=1e-5)
  expected = jax.nn.dot_product_attention(
    query, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3), mask=mask[:, None]
  )
  np.testing.assert_allclose(whole, expected, atol=1e-6)


def references(cache):
  return np.bincount(np.asarray(cache.table_BP).ravel(), minlength=cache.num_pages + 1)[: cache.num_pages]


def used(cache):
  return int((cache.references > 0).sum())


def test_pages_are_shared_copied_on_write_and_given_back(plain):
  fork, rollback = jax.jit(plain.model.fork), jax.jit(plain.model.rollback)
  _, cache = plain.read(plain.cache("paged"), 0, 7)
  assert used(cache) == 9 and int(cache.references.sum()) == 9
  rows = jnp.array([0, 0, 1])
  forked = fork(cache, rows)
  # Two rows see the pages of row 0, nobody those of row 2, and nothing was copied.
  assert used(forked) == 6 and int(forked.references.sum()) == 9
  np.testing.assert_array_equal(forked.keys[0], cache.keys[0])
  np.testing.assert_array_equal(forked.table_BP[0], forked.table_BP[1])
  _, written = plain.extend(plain.tokens[rows, 7:8], forked)
  # The full pages stay shared; of the last one, both rows have their own copy.
  assert used(written) == 2 + 1 + 1 + 3
  np.testing.assert_array_equal(written.table_BP[0, :2], written.table_BP[1, :2])
  assert int(written.table_BP[0, 2]) != int(written.table_BP[1, 2])
  np.testing.assert_array_equal(written.references, references(written))
  # Row 1 goes back to within a page that row 0 sees, and must not write there.
  back = rollback(written, jnp.array([8, 2, 0]))
  np.testing.assert_array_equal(back.references, references(back))
  assert used(back) == 3
  logits, back = plain.extend(plain.tokens[rows, 2:3] * 0 + 5, back)
  np.testing.assert_array_equal(back.references, references(back))
  back = rollback(back, jnp.array([8, 3, 1]))
  logits, back = plain.extend(plain.tokens[rows, 8:9], back)
  np.testing.assert_allclose(logits[0, 0], plain.whole[0, 8], atol=CLOSE)
  assert not bool(back.has_failed_B.any())
  empty = jax.jit(lambda cache: cache.release(jnp.ones(3, bool)))(back)
  np.testing.assert_array_equal(empty.references, 0)
  np.testing.assert_array_equal(empty.length, 0)


def test_rows_advance_by_themselves_in_pages(plain):
  cache = plain.cache("paged")
  read, taken = np.zeros(BATCH, int), np.array([[3, 0, 1], [1, 5, 2], [0, 2, 4], [4, 1, 0]])
  for counts in taken:
    tokens = np.stack([np.asarray(plain.tokens[row, start : start + 5]) for row, start in enumerate(read)])
    valid = np.arange(5) < counts[:, None]
    logits, cache = plain.extend(jnp.asarray(tokens), cache, jnp.asarray(valid))
    for row, count in enumerate(counts):
      expected = plain.whole[row, read[row] : read[row] + count]
      np.testing.assert_allclose(logits[row, :count], expected, atol=CLOSE)
    read += counts
    np.testing.assert_array_equal(cache.length, read)
    np.testing.assert_array_equal(cache.references, references(cache))
    np.testing.assert_array_equal((np.asarray(cache.references) > 0).sum(), (-(-read // 3)).sum())


def test_rows_without_a_page_come_out_as_nan_and_harm_nobody(plain):
  cache = plain.cache(CacheSpec("paged", page_size=3, num_pages=5))
  everyone = jnp.ones((BATCH, 5), bool)
  logits, cache = plain.extend(plain.tokens[:, :5], cache, everyone)
  np.testing.assert_array_equal(cache.has_failed_B, [False, False, True])
  assert np.isnan(logits[2]).all()
  np.testing.assert_allclose(logits[:2], plain.whole[:2, :5], atol=CLOSE)
  freed = cache.release(jnp.array([True, False, True]))
  logits, freed = plain.extend(plain.tokens[:, 5:10], freed, everyone & jnp.array([[False], [True], [False]]))
  np.testing.assert_allclose(logits[1], plain.whole[1, 5:10], atol=CLOSE)
  assert not bool(freed.has_failed_B.any())


def test_int8_rows_are_within_half_a_scale():
  rows = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3, 7, 16)), jnp.float32).at[0, 0, 0].set(0)
  stored = storage.quantize_rows(rows)
  error = np.abs(stored.codes * stored.scales[..., None] - rows)
  assert (error <= np.asarray(stored.scales)[..., None] / 2 * (1 + 1e-5)).all()
  np.testing.assert_allclose(stored.scales, jnp.abs(rows).max(axis=-1) / 127, rtol=1e-6)
  assert stored.codes.dtype == jnp.int8 and int(jnp.abs(stored.codes).max()) == 127


def test_the_error_of_int8_attention_has_the_bound_that_its_scales_give():
  """|o' - o| <= max s_v / 2 + 2 max |v| (e^d - 1), where d = max |q|_1 s_k / (2 sqrt K) bounds scores."""
  rng = np.random.default_rng(3)
  query = jnp.asarray(rng.normal(size=(2, 4, 4, 16)), jnp.float32)
  keys, values = (jnp.asarray(rng.normal(size=(2, 2, 40, 16)), jnp.float32) for _ in range(2))
  mask = jnp.ones((2, 4, 40), bool)
  exact, _ = storage.attend(query, keys, values, mask)
  coarse = [storage.quantize_rows(rows) for rows in (keys, values)]
  found, _ = storage.attend(query, *coarse, mask)
  d = float(jnp.abs(query).sum(-1).max() * coarse[0].scales.max() / 2 / 4)
  bound = float(coarse[1].scales.max()) / 2 + 2 * float(jnp.abs(values).max()) * np.expm1(2 * d)
  error = float(jnp.abs(found - exact).max())
  assert 0 < error <= bound
  assert error / float(jnp.abs(exact).max()) < 0.02


def test_an_int8_cache_takes_about_a_quarter_of_float32():
  sizes = CacheSizes(num_layers=2, batch=2, capacity=8, num_kv_heads=2, head_dim=64)

  def count(layout):
    cache = caches.make_cache(sizes, jnp.float32, True, layout=layout)
    return sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))

  assert count(CacheSpec(quantization="int8")) / count(CacheSpec()) == (64 + 4) / (4 * 64)
  assert count(CacheSpec(dtype="bfloat16")) / count(CacheSpec()) == 0.5


@pytest.mark.parametrize("layout, uneven", [("static", False), ("static", True), ("paged", True)])
def test_a_step_of_decoding_copies_no_cache(layout, uneven):
  """In the compiled loop, writing one token must not copy a buffer of the cache's size."""
  spec = TransformerSpec.llama(**{**SIZES, "num_layers": 1}, layers="unroll")
  model = Transformer(spec, rngs=nnx.Rngs(0))
  settings = CacheSpec("paged", page_size=37, num_pages=13) if layout == "paged" else CacheSpec()
  cache = model.init_cache(2, 111, uneven=uneven, layout=settings)

  def decode(token, cache):
    def step(state):
      index, token, cache = state
      logits, cache = model.extend(token, cache)
      return index + 1, logits.argmax(axis=-1).astype(jnp.int32), cache

    return jax.lax.while_loop(lambda state: state[0] < 9, step, (0, token, cache))

  token = jnp.zeros((2, 1), jnp.int32)
  text = jax.jit(decode, donate_argnums=1).lower(token, cache).compile().as_text()
  shape = "f32[" + ",".join(map(str, cache.keys[0].shape)) + "]"
  assert shape in text
  assert [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line] == []


@pytest.mark.parametrize(
  "settings, said",
  [
    (dict(layout="rnig"), "ring"),
    (dict(layout="ring"), "window=None"),
    (dict(window=3), "no use for it"),
    (dict(layout="paged"), "num_pages=None"),
    (dict(layout="ring", window=0), "at least 1"),
    (dict(slack=2), "slack=2"),
    (dict(layout="paged", num_pages=3, page_size=0), "page_size=0"),
    (dict(quantization="int4"), "int8"),
  ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    CacheSpec(**settings)


def test_what_a_layout_cannot_do_is_refused_while_tracing(plain):
  with pytest.raises(ValueError, match="uneven=True"):
    plain.model.init_cache(1, 4, layout=LAYOUTS["paged"])
  ring = plain.cache(CacheSpec("ring", window=4))
  with pytest.raises(ValueError, match="slack=0: a ring without slack cannot roll back"):
    jax.eval_shape(plain.model.rollback, ring, jnp.zeros(BATCH, jnp.int32))
  with pytest.raises(ValueError, match="slack of 2"):
    jax.eval_shape(plain.extend_tree, plain.tokens[:, :3], ring, jnp.ones((1, 3, 3), bool))
  with pytest.raises(ValueError, match="has 21 slots: 22 rows"):
    plain.model.extend(jnp.zeros((BATCH, 22), jnp.int32), plain.cache("paged"))
  assert CacheSpec.from_dict(LAYOUTS["paged"].to_dict()) == LAYOUTS["paged"]
