"""Mixtures, guidance by scores and neighbours, on small models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.decoding import begin, form_law, pad_prompts, row_keys
from nr.generation.markov import Markov
from nr.generation.sample import sample
from nr.generation.samplers import Replay
from nr.generation.stopping import Stop
from nr.generation.streams import Stream, WithStreams
from nr.generation.transforms.algebra import Context, chain
from nr.generation.transforms.guidance import Args, Fudge, Gedi, Rad, ValueGuidance
from nr.generation.transforms.layer_contrast import LayerContrast, early_exit_layers
from nr.generation.transforms.mixtures import (
  AutoregressiveReward,
  ContextAware,
  ContrastiveDecoding,
  ContrastiveReasoning,
  DExperts,
  Guidance,
  Mix,
  ProductOfExperts,
  ProxyTuning,
)
from nr.generation.transforms.retrieval import Datastore, KnnMix, build_datastore, nearest
from nr.generation.transforms.text import describe, parse
from tests.generation import toy
from tests.generation.uncached import log_softmax, network, reader

KINDS = ["transformer", "concepts"]
PROMPTS = toy.random_prompts([3, 7, 5])
STREAMS = ("amateur", "unconditional", "expert", "anti_expert", "tuned", "untuned", "without_context")
STREAMS = (*STREAMS, "attribute", "reward", "value", "desired", "undesired")
V, D = 12, 4
draws = np.random.default_rng(0)
STORE = Datastore(jnp.asarray(draws.normal(size=(9, D)), jnp.float32), jnp.arange(9) % V)
HEAD = (jnp.asarray(draws.normal(size=(D, V)), jnp.float32), jnp.zeros(V))


def context(batch: int) -> Context:
  draws = np.random.default_rng(1)
  streams = {name: jnp.asarray(draws.normal(size=(batch, V)), jnp.float32) for name in STREAMS}
  hidden = {"last": jnp.asarray(draws.normal(size=(batch, D)), jnp.float32)}
  zeros = jnp.zeros(batch, jnp.int32)
  keys = jax.random.split(jax.random.key(0), batch)
  return Context(jnp.zeros((batch, 4), jnp.int32), zeros, zeros, keys, streams, hidden)


def run(law, logits_BV, seen):
  return np.asarray(law.apply(logits_BV, law.init(seen, V), seen))


# A transform by its parameters, the values that turn it off, and others.
SWITCHES = [
  (Guidance, dict(scale=1.0), dict(scale=2.0)),
  (ContrastiveDecoding, dict(coefficient=0.0, alpha=0.0), dict(coefficient=1.0, alpha=0.1)),
  (ContrastiveReasoning, dict(beta=0.0, alpha=0.0), dict(beta=0.5, alpha=0.1)),
  (DExperts, dict(strength=0.0, alpha=0.0), dict(strength=2.0, alpha=0.0)),
  (ProxyTuning, dict(strength=0.0), dict(strength=1.0)),
  (ContextAware, dict(strength=0.0, alpha=0.0), dict(strength=0.5, alpha=0.0)),
  (functools.partial(KnnMix, STORE, neighbours=4), dict(weight=0.0), dict(weight=0.3)),
  (functools.partial(Fudge, candidates=4, kept=2), dict(strength=0.0), dict(strength=1.0)),
  (functools.partial(Rad, candidates=4), dict(strength=0.0), dict(strength=3.0)),
  (functools.partial(Rad, candidates=4, is_inverse=True), dict(strength=0.0), dict(strength=3.0)),
  (Args, dict(strength=0.0), dict(strength=3.0)),
  (ValueGuidance, dict(strength=0.0), dict(strength=3.0)),
  (functools.partial(ValueGuidance, head=HEAD), dict(strength=0.0), dict(strength=3.0)),
  (Gedi, dict(strength=0.0, mass=0.5, target=0.9), dict(strength=3.0, mass=0.5, target=0.9)),
  (lambda w, **rest: Mix({"expert": w}, **rest), dict(w=0.0, main=1.0), dict(w=0.5, main=0.7)),
]


@pytest.mark.parametrize("make, off, on", SWITCHES)
def test_off_is_the_identity_row_by_row(make, off, on):
  seen, logits = context(3), jnp.asarray(np.random.default_rng(2).normal(size=(3, V)), jnp.float32)
  assert chain(make(**off)).prepared().transforms == ()
  mixed = make(**{name: [off[name], on[name], on[name]] for name in off})
  law = chain(mixed).prepared()
  out = run(law, logits, seen)
  np.testing.assert_array_equal(out[0], logits[0])
  assert (out[1:] != np.asarray(logits[1:])).any(axis=1).all()
  # Gathered rows take their parameters along: what was row 1 is not off where row 0 was.
  taken = run(law.take(jnp.array([1, 0, 2])), logits, seen)
  assert (taken[0] != np.asarray(logits[0])).any()
  np.testing.assert_array_equal(taken[1], logits[1])
  np.testing.assert_allclose(taken[2], out[2], atol=1e-6)
  # One value for all rows is the same as that value in each.
  alike = run(chain(make(**on)).prepared(), logits, seen)
  np.testing.assert_allclose(alike[1:], out[1:], atol=1e-6)


def test_what_is_banned_stays_banned():
  seen = context(1)
  seen.streams["expert"] = seen.streams["expert"].at[0, 3].set(-jnp.inf)
  logits = jnp.zeros((1, V)).at[0, 5].set(-jnp.inf)
  mixtures = [
    ProductOfExperts(),
    Mix({"expert": 1.0}, main=0.0),
    Mix({"expert": -1.0}),
    Mix({"expert": -1.0}, 2.0),
  ]
  for law in [*mixtures, AutoregressiveReward(), KnnMix(STORE, 0.5), Guidance(0.0), Args(2.0)]:
    out = run(chain(law).prepared(), logits, seen)
    assert out[0, 5] == -np.inf and not np.isnan(out).any() and out.max() < np.inf, law.name
  # A positive weight hands a ban on; a negative one counts it as the least probable token.
  assert run(ProductOfExperts(), logits, seen)[0, 3] == -np.inf
  subtracted = run(Mix({"expert": -1.0}), logits, seen)[0]
  assert subtracted[3] == subtracted[subtracted > -np.inf].max()


def test_a_broken_stream_breaks_the_rows_that_read_it():
  """Neither a stream without any token nor one that is no number may pass for an opinion."""
  seen = context(4)
  broken = jnp.stack([jnp.full(V, -jnp.inf), jnp.full(V, -jnp.inf), *jnp.full((2, V), jnp.nan)])
  seen.streams["expert"] = broken
  out = run(
    chain(Mix({"expert": [0.0, 1.0, 0.0, -1.0]}, main=[1.0, 1.0, 2.0, 1.0])).prepared(),
    jnp.zeros((4, V)),
    seen,
  )
  np.testing.assert_array_equal(out[0], 0.0)
  np.testing.assert_allclose(out[2], -2 * np.log(V), atol=1e-6)
  assert not np.isfinite(out[[1, 3]]).any()


def test_mixtures_as_text():
  texts = ["contrastive_decoding(0.2, stream='small')|guidance([1, 2])", "mix({'small': -0.5}, alpha=0.1)"]
  texts += [
    "layer_contrast([1, 2], variant='hf')",
    "product_of_experts(streams=['a', 'b'])",
    "rad(10)|fudge(2)",
  ]
  for text in texts:
    law = parse(text).prepared()
    assert describe(law) == text
  assert parse("layer_contrast([1, 2])").prepared().needs == {"streams:layer_1", "streams:layer_2"}


def test_rows_of_weights_are_changed_together():
  wide = chain(Mix({"expert": 0.5}, main=2.0)).prepared().spread(3)
  assert {name: value.tolist() for name, value in wide.row_parameters().items()} == {
    "0.mix.main": [2.0] * 3,
    "0.mix.alpha": [0.0] * 3,
    "0.mix.weights.expert": [0.5] * 3,
  }
  other = chain(Mix({"expert": 1.0}, main=1.0)).prepared().spread(3)
  is_first = jnp.array([True, False, True])
  chosen = wide.map_rows(lambda one, two: jnp.where(is_first, one, two), other)
  assert chosen.transforms[0].weights["expert"].tolist() == [0.5, 1.0, 0.5]


def test_layers_of_the_buckets():
  assert early_exit_layers(32, "low") == tuple(range(2, 16, 2))
  assert early_exit_layers(32, "high") == tuple(range(16, 32, 2))
  assert early_exit_layers(48, "low") == tuple(range(2, 20, 2))
  assert early_exit_layers(48, "high") == tuple(range(28, 48, 2))
  assert early_exit_layers(4, "low") == (2,) and early_exit_layers(2, "low") == (1,)
  assert early_exit_layers(8, "low", is_tied=False) == (2,)


MISTAKES = [
  (lambda: chain(Mix(["expert"])).prepared(), "weights by stream"),
  (lambda: chain(Mix({"expert": "much"})).prepared(), "mix.weights.expert"),
  (lambda: chain(Mix({"expert": np.ones((2, 2))})).prepared(), "scalar or one value a row"),
  (lambda: chain(ContrastiveDecoding(alpha=2.0)).prepared(), "at most 1"),
  (lambda: chain(ContrastiveDecoding(temperature=0.0)).prepared(), "above 0"),
  (lambda: chain(Guidance(of="log_prob")).prepared(), "did you mean 'log_probs'"),
  (lambda: chain(LayerContrast(())).prepared(), "give a list of layers"),
  (lambda: chain(ProductOfExperts(streams="expert")).prepared(), "list of names"),
  (lambda: chain(LayerContrast((1,), variant="papr")).prepared(), "did you mean 'paper'"),
  (lambda: early_exit_layers(12, "hihg"), "did you mean 'high'"),
  (lambda: early_exit_layers(1), "holds no layer"),
  (lambda: chain(KnnMix(None)).prepared(), "build_datastore"),
  (lambda: chain(KnnMix(Datastore(jnp.zeros((3, 2)), jnp.zeros(2)))).prepared(), "keys_MD"),
  (lambda: chain(KnnMix(STORE, neighbours=0)).prepared(), "neighbours=0"),
  (lambda: chain(ValueGuidance(head=(jnp.zeros((2, 3)), jnp.zeros(2)))).prepared(), "kernel"),
  (lambda: build_datastore(toy.TOY, np.zeros((2, 4))), "offers_hidden=True"),
]


@pytest.mark.parametrize("mistake, words", MISTAKES)
def test_mistakes(mistake, words):
  with pytest.raises(ValueError, match=words):
    mistake()


@pytest.mark.parametrize(
  "law, need",
  [
    (Guidance(), "streams:unconditional"),
    (DExperts(), "streams:anti_expert"),
    (LayerContrast((1,)), "streams:layer_1"),
    (KnnMix(STORE), "hidden:last"),
    (Rad(), "streams:reward"),
    (Gedi(), "streams:desired"),
    (ValueGuidance(head=HEAD), "hidden:last"),
  ],
)
def test_a_model_that_does_not_offer_the_stream_is_refused(law, need):
  with pytest.raises(ValueError, match=need):
    sample(toy.TOY, toy.PROMPT, chain=law, max_new_tokens=1)


def test_law_of_whole_texts_on_the_enumerable_chain():
  """Contrastive decoding, text by text, against the closed form."""
  model = Markov(toy.TOY.logits_CV, {"amateur": toy.DRAFT.logits_CV})
  drawn = sample(
    model,
    jnp.full((40, 1), toy.BOS),
    sampler=Replay(jnp.asarray(toy.padded())),
    max_new_tokens=3,
    chain=ContrastiveDecoding(alpha=0.3, coefficient=0.5),
    stop=Stop(ids_E=[toy.EOS]),
  )
  table = toy.TARGET_CV / np.sqrt(toy.DRAFT_CV)
  table = np.where(toy.TARGET_CV >= 0.3 * toy.TARGET_CV.max(axis=1, keepdims=True), table, 0)
  expected = [toy.probability(text, table / table.sum(axis=1, keepdims=True)) for text in toy.texts()]
  np.testing.assert_allclose(np.exp(drawn.transformed_log_probs_RN.sum(axis=1)), expected, atol=1e-6)


def test_streams_with_prompts_and_models_of_their_own_equal_separate_passes():
  """Guidance by another prompt and another model, greedily, with a scale for each row."""
  kind = "transformer"
  prompts, valid = pad_prompts(PROMPTS)
  others = toy.random_prompts([9, 2, 4], seed=5)
  other_prompts, other_valid = map(jnp.asarray, pad_prompts(others))
  streams = {
    "unconditional": Stream(network(kind), other_prompts, other_valid),
    "expert": Stream(network(kind, 7)),
  }
  scales = [1.5, 0.0, 3.0]
  law = chain(Guidance(scales), Mix({"expert": [0.5, 0.0, 1.0]}))
  out = sample(WithStreams(network(kind), streams), prompts, valid, chain=law, max_new_tokens=4)
  reads, expert = reader(kind, 0), reader(kind, 7)
  for row, (prompt, other) in enumerate(zip(PROMPTS, others)):
    new = []
    for step in range(4):
      conditional, unconditional, given = (
        log_softmax(read([*start, *new])[1][-1])
        for read, start in ((reads, prompt), (reads, other), (expert, prompt))
      )
      guided = log_softmax(unconditional + scales[row] * (conditional - unconditional))
      mixed = log_softmax(guided + (0.5, 0.0, 1.0)[row] * given)
      token = int(out.tokens_RN[row, step])
      assert token == mixed.argmax()
      np.testing.assert_allclose(out.transformed_log_probs_RN[row, step], mixed[token], atol=1e-4)
      np.testing.assert_allclose(out.log_probs_RN[row, step], conditional[token], atol=1e-4)
      new.append(token)


def test_layers_of_a_network_are_contrasted():
  model = toy.tiny_network(num_layers=3, network=dict(taps=(1, 2)))
  law = chain(LayerContrast((1, 2), [0.1, 0.0, 0.3])).prepared()

  @jax.jit
  def first_law(model, law, prompts, valid):
    begun = begin(model, law, prompts, valid, row_keys(None, None, 3), 1)
    return form_law(law, begun.state, begun.outputs, begun.context), begun.outputs

  formed, outputs = first_law(model, law, *map(jnp.asarray, pad_prompts(PROMPTS)))
  mature, *early = (
    np.asarray(jax.nn.softmax(each), np.float64)
    for each in (outputs.logits, outputs.streams["layer_1"], outputs.streams["layer_2"])
  )

  def distance(p, q):
    m = (p + q) / 2
    return (p * np.log(p / m) + q * np.log(q / m)).sum()

  for row, (p, top) in enumerate(zip(mature, (0.1, 0.0, 0.3))):
    q = max((each[row] for each in early), key=lambda q, p=p: distance(p, q))
    law = np.where(p >= top * p.max(), p / q, 0)
    np.testing.assert_allclose(np.exp(formed.transformed_BV[row]), law / law.sum(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_datastore_holds_each_state_with_the_token_behind_it(kind):
  windows = np.array(toy.random_prompts([10, 10, 10], seed=8))
  valid = np.ones(windows.shape, bool)
  valid[2, 6:] = False
  store = build_datastore(network(kind), windows, valid, context=1, batch=2)
  states = [reader(kind, 0)(window)[0] for window in windows]
  expected = np.concatenate([states[0][1:9], states[1][1:9], states[2][1:5]])
  np.testing.assert_allclose(store.keys_MD, expected, atol=1e-5)
  assert store.values_M.dtype == jnp.int32
  np.testing.assert_array_equal(store.values_M, [*windows[0, 2:], *windows[1, 2:], *windows[2, 2:6]])
  if kind == "transformer":
    # With almost all weight on the nearest state, the model recites what it finds.
    prompts, ok = pad_prompts([window[:4].tolist() for window in windows[:2]])
    law = KnnMix(store, 0.99, neighbours=1, chunk=7)
    out = sample(network(kind), prompts, ok, chain=law, max_new_tokens=6)
    np.testing.assert_array_equal(out.tokens_RN, windows[:2, 4:])


def test_nearest_keys_are_those_of_a_full_search():
  draws = np.random.default_rng(3)
  queries, keys = draws.normal(size=(4, 6)), draws.normal(size=(23, 6))
  full = ((queries[:, None] - keys) ** 2).sum(axis=-1)
  for chunk in (1, 5, 23, 100):
    distances, rows = nearest(jnp.asarray(queries, jnp.float32), jnp.asarray(keys, jnp.float32), 7, chunk)
    np.testing.assert_array_equal(rows, np.argsort(full, axis=1)[:, :7])
    np.testing.assert_allclose(distances, np.sort(full, axis=1)[:, :7], atol=1e-5)
