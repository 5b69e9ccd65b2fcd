"""Concept targets: numbered tests of the CoCoMix specification, section 12, in float64.

Gradients are held against brute force, one pass of the ordinary model for every position, and labels
against the definition written out over all latents with NumPy.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.labels import NO_LABEL
from nr.models import parameters
from nr.models.attention import blocked_causal_attention
from nr.models.diagonal_gradient import hidden_apart, own_row_attention
from nr.models.residual_tap import TapInputs, activations_at, hidden_from
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec
from nr.models.transformer import Transformer, TransformerSpec
from nr.objectives import attribution, label_ranking
from nr.objectives.attribution import AttributionSpec
from nr.objectives.concept_prediction import concept_prediction_loss
from nr.objectives.label_ranking import Latents, PreActivations
from nr.objectives.language_modeling import token_nll
from nr.recipes.cocomix import label_corpus
from nr.recipes.cocomix.label_corpus import Labelling, label_batch

BATCH, LENGTH, WIDTH, VOCABULARY, LATENTS, ACTIVE = 2, 6, 12, 17, 40, 8
SCOPES, POINTS = ("future", "next"), ("original", "recon", "recon_everywhere")
LAYER = 0


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def in_double(spec):
  """The settings with float64 throughout, which runs of the library do not offer."""
  for field in ("dtype", "param_dtype"):
    object.__setattr__(spec, field, "float64")
  return spec


def perturbed(model, seed):
  """The model with no parameter left at 0 or 1."""
  graphdef, params = parameters.split(model)
  rng = np.random.default_rng(seed)
  noisy = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)
  return parameters.merge(graphdef, noisy)


class Case:
  """A teacher, an autoencoder, a batch, and what follows from them by brute force."""

  def __init__(self, spec, segments):
    self.teacher = perturbed(Transformer(in_double(spec), rngs=nnx.Rngs(0)), 1)
    settings = SparseAutoencoderSpec(WIDTH, LATENTS, ACTIVE, k_aux=8, top_k="lax")
    self.autoencoder = perturbed(SparseAutoencoder(in_double(settings), rngs=nnx.Rngs(2)), 3)
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)
    weights = np.ones((BATCH, LENGTH))
    weights[:, -1] = 0
    self.batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    if segments is not None:
      segments = np.asarray(segments, np.int32)
      weights[:, :-1] *= (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
      self.batch["segment_ids"] = segments
    self.inputs = TapInputs.of({name: jnp.asarray(value) for name, value in self.batch.items()})
    self.hidden, self.reconstruction, self.code, self.pre = jax.jit(self._activations)()
    self.decoder = self.autoencoder.decoder.kernel[...]
    brute = jax.jit(self._brute_force)
    self.losses, self.gradients = {}, {}
    places = {
      "original": (self.hidden, self.hidden),
      "recon": (self.hidden, self.reconstruction),
      "recon_everywhere": (self.reconstruction, self.reconstruction),
    }
    for point, (context, rows) in places.items():
      losses, jacobian = jax.device_get(brute(context, rows))
      self.losses[point] = losses
      self.gradients["next", point] = np.einsum("bttd->btd", jacobian)
      self.gradients["future", point] = jacobian.sum(2)

  def _activations(self):
    hidden = activations_at(self.teacher, self.inputs, LAYER)
    normalised = self.autoencoder.normalise(hidden)
    code = self.autoencoder.encode(normalised.values_TD)
    reconstruction = self.autoencoder.denormalise(self.autoencoder.decode(code), normalised)
    return hidden, reconstruction, code, self.autoencoder.pre_activations(normalised.values_TD)

  def token_losses(self, hidden_BLD):
    """Weighted losses of the ordinary model above the tap."""
    final_BLD = hidden_from(self.teacher, hidden_BLD, self.inputs, LAYER)
    losses_BL = token_nll(final_BLD, self.teacher.unembedding_VD, self.batch["targets"])
    return losses_BL * self.batch["weights"]

  def _brute_force(self, context_BLD, rows_BLD):
    """For every t: the loss of t, and [B, t, s, D] = d loss_s / d row t, with row t of the context replaced."""

    def at(t):
      def losses(row_BD):
        return self.token_losses(context_BLD.at[:, t].set(row_BD))

      row_BD = rows_BLD[:, t]
      return losses(row_BD)[:, t], jnp.einsum("bsbd->bsd", jax.jacrev(losses)(row_BD))

    losses_LB, jacobian_LBLD = jax.lax.map(at, jnp.arange(LENGTH))
    return losses_LB.T, jacobian_LBLD.swapaxes(0, 1)

  @functools.cached_property
  def found_gradients(self):
    """The library's gradient for every scope and evaluation point, in one program."""
    variants = list(itertools.product(SCOPES, POINTS))
    specs = [AttributionSpec(scope=scope, eval_point=point) for scope, point in variants]
    points = self.hidden, self.reconstruction
    run = jax.jit(lambda: [attribution.tap_gradient(self.upper(), *points, spec, 4) for spec in specs])
    return dict(zip(variants, jax.device_get(run()), strict=True))

  def upper(self):
    return label_corpus.upper_half(self.teacher, self.inputs, self.batch, Labelling(LAYER, AttributionSpec()))

  def latents(self):
    u_BLD = self.autoencoder.normalise(self.hidden).values_TD
    return label_corpus.read_latents(self.autoencoder, u_BLD, self.code, "pre")


SIZES = dict(vocab_size=VOCABULARY, num_layers=3, model_dim=WIDTH, num_heads=2, max_length=LENGTH)


@pytest.fixture(scope="module")
def gpt2():
  with jax.enable_x64(True):
    return Case(TransformerSpec.gpt2(**SIZES), None)


@pytest.fixture(scope="module")
def llama():
  """Rotary positions, grouped queries, layers in a list, two documents in a row and padding."""
  sizes = SIZES | dict(num_heads=4, head_dim=4, num_kv_heads=2, mlp_dim=20, layers="unroll")
  with jax.enable_x64(True):
    return Case(TransformerSpec.llama(**sizes), [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])


@pytest.fixture
def case(request):
  return request.getfixturevalue(request.param)


BOTH = pytest.mark.parametrize("case", ["gpt2", "llama"], indirect=True)


def test_19_finite_differences_give_the_gradient_with_the_deviation_as_factor(gpt2):
  sae, normalised = gpt2.autoencoder, gpt2.autoencoder.normalise(gpt2.hidden)

  @jax.jit
  def loss_at(b, t, slot, change):
    values = gpt2.code.values_TK.at[b, t, slot].add(change)
    decoded = sae.denormalise(sae.decode(gpt2.code._replace(values_TK=values)), normalised)
    return gpt2.token_losses(gpt2.hidden.at[:, t].set(decoded[:, t])).sum()

  for b, t, slot in [(0, 0, 0), (1, 3, 1), (0, 4, 2)]:
    measured = (loss_at(b, t, slot, 1e-5) - loss_at(b, t, slot, -1e-5)) / 2e-5
    row = gpt2.decoder[gpt2.code.indices_TK[b, t, slot]]
    without_factor = row @ gpt2.gradients["future", "recon"][b, t]
    deviation = normalised.deviation_T1[b, t, 0]
    np.testing.assert_allclose(measured, deviation * without_factor, rtol=1e-5)
    np.testing.assert_allclose(without_factor / measured, 1 / deviation, rtol=1e-5)
    assert abs(deviation - 1) > 0.01  # else the two could not be told apart


def test_20_gradient_is_orthogonal_to_the_all_ones_vector(gpt2):
  # GPT-2 reads the residual stream through layer norms only.
  for gradient in gpt2.gradients.values():
    assert np.abs(gradient.sum(-1)).max() < 1e-12
    assert np.abs(gradient).max() > 1e-3


@BOTH
def test_21_nothing_depends_on_the_last_position_and_it_has_no_label(case):
  for gradient in [*case.gradients.values(), *case.found_gradients.values()]:
    np.testing.assert_array_equal(gradient[:, -1], 0.0)
  scored = case.batch["weights"] > 0
  labels = labels_of(case, AttributionSpec())
  np.testing.assert_array_equal(labels.scored_BL, scored)
  np.testing.assert_array_equal(labels.labels_BLA == NO_LABEL, np.broadcast_to(~scored[..., None], (2, 6, 4)))
  parity = labels_of(case, AttributionSpec.parity())
  assert (parity.labels_BLA[0, -1] < LATENTS).all()  # the released code labels it arbitrarily
  weighted = labels_of(case, AttributionSpec.parity(weights="score"))
  assert (weighted.labels_BLA[:, -1] == NO_LABEL).all() and (weighted.weights_BLA[:, -1] == 0).all()


@BOTH
def test_22_one_pass_gives_values_and_gradients_of_brute_force(case):
  def apart(rows_BLD, context_BLD):
    final_BLD = hidden_apart(case.teacher, rows_BLD, case.inputs, LAYER, context_BLD=context_BLD)
    losses_BL = token_nll(final_BLD, case.teacher.unembedding_VD, case.batch["targets"])
    return losses_BL * case.batch["weights"]

  @jax.jit
  def run():
    return {
      "original": apart(case.hidden, None),
      "recon": apart(case.reconstruction, case.hidden),
      "recon_everywhere": apart(case.reconstruction, None),
    }

  for point, losses in run().items():
    np.testing.assert_allclose(losses, case.losses[point], atol=1e-12, err_msg=point)
  assert np.abs(case.losses["recon"] - case.losses["original"]).max() > 1e-2
  assert len(case.found_gradients) == 6
  for variant, gradient in case.found_gradients.items():
    np.testing.assert_allclose(gradient, case.gradients[variant], atol=1e-12, err_msg=str(variant))
  # The six differ from one another: none was mistaken for its neighbour.
  for first, second in itertools.combinations(case.gradients, 2):
    assert np.abs(case.gradients[first] - case.gradients[second]).max() > 1e-3, (first, second)


def test_22_a_row_reads_its_own_key_and_value_and_those_of_the_context_before_it():
  rng = np.random.default_rng(0)
  query = rng.normal(size=(2, 7, 4, 3))
  own_key, own_value, key, value = rng.normal(size=(4, 2, 7, 2, 3))
  segments = np.asarray([[1] * 7, [1, 1, 1, 2, 2, 2, 0]])
  found = own_row_attention(query, own_key, own_value, key, value, segments, block=3)
  for b, t, h in itertools.product(range(2), range(7), range(4)):
    seen = [s for s in range(t) if segments[b, s] == segments[b, t]]
    keys = np.stack([*key[b, seen, h // 2], own_key[b, t, h // 2]])
    values = np.stack([*value[b, seen, h // 2], own_value[b, t, h // 2]])
    weights = np.exp(keys @ query[b, t, h] / 3**0.5)
    np.testing.assert_allclose(found[b, t, h], weights @ values / weights.sum(), atol=1e-12)
  plain = blocked_causal_attention(query, key, value, segments, block=4)
  np.testing.assert_allclose(own_row_attention(query, key, value, key, value, segments), plain, atol=1e-12)


def test_22_no_block_above_the_tap_leaves_the_head_alone(gpt2):
  last = SIZES["num_layers"] - 1
  found = hidden_apart(gpt2.teacher, gpt2.hidden, gpt2.inputs, last, context_BLD=gpt2.reconstruction)
  np.testing.assert_array_equal(found, hidden_from(gpt2.teacher, gpt2.hidden, gpt2.inputs, last))
  with pytest.raises(ValueError, match="layer=3 is outside the model"):
    hidden_apart(gpt2.teacher, gpt2.hidden, gpt2.inputs, 3)


def labels_of(case, spec):
  """Labels of a case for its brute-force gradient."""
  ranking = attribution.rank(case.latents(), case.gradients[spec.scope, spec.eval_point], spec, 7)
  masks = {"mask_last": spec.mask_last, "mask_first": spec.mask_first}
  scored = attribution.labelled_positions(jnp.asarray(case.batch["weights"]), **masks)
  return jax.device_get(attribution.select_labels(ranking, scored, spec))


def dense_labels(post_BLC, pre_BLC, decoder_CD, gradient_BLD, scored_BL, spec):
  """The definition over all latents: labels, their weights, and how many candidates score above 0."""
  scores = (post_BLC if spec.act == "post" else pre_BLC) * (gradient_BLD @ decoder_CD.T)
  scores = {"paper": scores, "negated": -scores, "abs": np.abs(scores)}[spec.sign]
  if spec.restrict_active:
    scores = np.where(post_BLC > 0, scores, -np.inf)
  labels = np.argsort(-scores, -1, kind="stable")[..., : spec.k_attr]
  best = np.take_along_axis(scores, labels, -1)
  is_label = scored_BL[..., None] & (best > -np.inf)
  if spec.drop_nonpositive or spec.weights == "score":
    is_label = is_label & (best > 0)
  weights = None
  if spec.weights == "score":
    kept = np.where(is_label, best, 0)
    weights = (kept / np.maximum(kept.sum(-1, keepdims=True), 1e-300)).astype(np.float16)
  return np.where(is_label, labels, NO_LABEL), weights, np.where(scored_BL, (scores > 0).sum(-1), 0)


def uneven_latents(case):
  """The case's code with some slots switched off: their indices then mean nothing and may repeat others."""
  rng = np.random.default_rng(5)
  values, indices = (np.asarray(part) for part in case.code)
  is_off = rng.random(values.shape) < 0.45
  is_off[0, 0] = True  # no latent is active at all
  values, indices = np.where(is_off, 0, values), np.where(is_off, rng.integers(0, 6, indices.shape), indices)
  post = np.zeros((BATCH, LENGTH, LATENTS))
  rows = np.indices(values.shape, sparse=True)[:-1]
  np.add.at(post, (*rows, indices), values)
  return case.latents()._replace(values_BLK=jnp.asarray(values), indices_BLK=jnp.asarray(indices)), post


def test_23_labels_of_every_variant_equal_the_dense_definition(gpt2):
  """act x restriction x sign x weights, for the gradients of every scope and evaluation point."""
  latents, post = uneven_latents(gpt2)
  scored = gpt2.batch["weights"] > 0
  active = (post > 0).sum(-1)
  assert (active[scored] < 4).any() and (active[scored] >= 4).any()
  gradients = np.stack(list(gpt2.gradients.values()))
  signs, weights = ("paper", "negated", "abs"), ("uniform", "score")
  count = 0
  for act, restrict_active in itertools.product(("post", "pre"), (True, False)):
    specs = [
      AttributionSpec(
        act=act, restrict_active=restrict_active, sign=sign, weights=weight, drop_nonpositive=drop
      )
      for sign, weight in itertools.product(signs, weights)
      for drop in ((False, True) if weight == "uniform" else (False,))
    ]

    @jax.jit
    @jax.vmap
    def run(gradient, specs=specs):
      ranked = {spec.sign: attribution.rank(latents, gradient, spec, 7) for spec in specs}
      return [attribution.select_labels(ranked[spec.sign], jnp.asarray(scored), spec) for spec in specs]

    for spec, found in zip(specs, jax.device_get(run(gradients)), strict=True):
      for which, variant in enumerate(gpt2.gradients):
        arguments = (np.asarray(gpt2.pre), np.asarray(gpt2.decoder), gpt2.gradients[variant], scored, spec)
        labels, shares, positive = dense_labels(post, *arguments)
        np.testing.assert_array_equal(found.labels_BLA[which], labels, err_msg=f"{variant} {spec}")
        np.testing.assert_array_equal(found.positive_BL[which], positive, err_msg=f"{variant} {spec}")
        if shares is not None:
          np.testing.assert_array_equal(found.weights_BLA[which], shares, err_msg=f"{variant} {spec}")
          total = found.weights_BLA[which].astype(float).sum(-1)
          np.testing.assert_allclose(total, (labels != NO_LABEL).any(-1), atol=2e-3)
        count += 1
    assert (labels != NO_LABEL).any() and len(np.unique(labels)) > 4
  assert count == 2 * 2 * 3 * 3 * 6


def test_23_scores_of_active_latents_equal_the_reference_expression(gpt2):
  """Released code: gradient times decoder, times the code, top-4 over all latents."""
  gradient = gpt2.gradients["future", "original"]
  dense = np.asarray(gpt2.autoencoder.dense(gpt2.code)) * (gradient @ np.asarray(gpt2.decoder).T)
  scores = attribution.attribution_scores(*gpt2.code, gpt2.decoder, gradient)
  expected = np.take_along_axis(dense, np.asarray(gpt2.code.indices_TK), -1)
  np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-15)
  reference = np.argsort(-dense, -1, kind="stable")[..., :4]
  enough = (dense > 0).sum(-1) >= 4
  assert enough[:, :-1].sum() >= 3 and (~enough[:, :-1]).sum() >= 1  # both cases occur
  np.testing.assert_array_equal(labels_of(gpt2, AttributionSpec()).labels_BLA[enough], reference[enough])
  np.testing.assert_array_equal(labels_of(gpt2, AttributionSpec.parity()).labels_BLA, reference)


def test_23_the_whole_path_from_tokens_to_labels_follows_the_variant(gpt2):
  specs = [
    AttributionSpec.equation_1(),
    AttributionSpec(eval_point="recon", weights="score"),
    AttributionSpec(scope="next", eval_point="recon_everywhere", sign="abs", mask_first=True),
    AttributionSpec.parity(),
  ]

  @jax.jit
  def run(batch):
    settings = {"concept_chunk": 16, "positions_at_once": 4, "loss_chunk": 8}
    return [
      label_batch(gpt2.teacher, gpt2.autoencoder, batch, Labelling(LAYER, spec, **settings)) for spec in specs
    ]

  post = np.asarray(gpt2.autoencoder.dense(gpt2.code))
  for spec, found in zip(specs, jax.device_get(run(gpt2.batch)), strict=True):
    scored = gpt2.batch["weights"] > 0
    scored[:, 0] &= not spec.mask_first
    scored[:, -1] |= not spec.mask_last
    gradient = gpt2.gradients[spec.scope, spec.eval_point]
    labels, shares, positive = dense_labels(
      post, np.asarray(gpt2.pre), np.asarray(gpt2.decoder), gradient, scored, spec
    )
    np.testing.assert_array_equal(found.scored_BL, scored)
    np.testing.assert_array_equal(found.positive_BL, positive)
    if shares is not None:
      np.testing.assert_array_equal(found.weights_BLA, shares)
    np.testing.assert_array_equal(found.labels_BLA, labels)


@pytest.mark.parametrize(
  "settings",
  [
    {"decoder_norm": "scaled"},
    {"arch": "jumprelu", "initial_threshold": 0.5},
    {"arch": "relu", "decoder_norm": "scaled"},
  ],
)
def test_23_before_and_after_agree_on_active_latents_of_every_form(gpt2, settings):
  """Above its threshold a latent passes unchanged, in whatever unit it is measured; codes vary in size."""
  spec = in_double(SparseAutoencoderSpec(WIDTH, LATENTS, ACTIVE, top_k="lax", **settings))
  sae = perturbed(SparseAutoencoder(spec, rngs=nnx.Rngs(6)), 7)
  assert np.abs(np.linalg.norm(sae.decoder.kernel[...], axis=-1) - 1).max() > 0.1
  u = sae.normalise(gpt2.hidden).values_TD
  code, gradient = sae.encode(u), gpt2.gradients["future", "original"]
  active = np.asarray((code.values_TK > 0).sum(-1))
  post, pre = (
    attribution.rank(label_corpus.read_latents(sae, u, code, act), gradient, AttributionSpec(act=act))
    for act in ("post", "pre")
  )
  np.testing.assert_allclose(pre.scores_BLA, post.scores_BLA, rtol=1e-9)
  np.testing.assert_array_equal(pre.positive_BL, post.positive_BL)
  for ranking in (pre, post):
    labels = attribution.select_labels(ranking, jnp.ones((BATCH, LENGTH), bool), AttributionSpec()).labels_BLA
    np.testing.assert_array_equal((labels != NO_LABEL).sum(-1), np.minimum(active, 4))
  # The sum of all scores is the effect of the whole code, to first order, whatever its units.
  scores = attribution.attribution_scores(*code, sae.decoder_rows(), gradient)
  along = (np.asarray(sae.decode(code) - sae.pre_bias[...]) * gradient).sum(-1)
  np.testing.assert_allclose(scores.sum(-1), along, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decoder_norm", ["unit", "scaled"])
def test_23_a_gated_latent_before_its_activation_is_what_its_gate_reads(gpt2, decoder_norm):
  """Against NumPy, over all latents and over those that are active; after it, magnitudes count."""
  spec = in_double(SparseAutoencoderSpec(WIDTH, LATENTS, ACTIVE, arch="gated", decoder_norm=decoder_norm))
  sae = perturbed(SparseAutoencoder(spec, rngs=nnx.Rngs(6)), 7)
  p = jax.tree.map(np.asarray, parameters.split(sae)[1])
  u = sae.normalise(gpt2.hidden).values_TD
  product = (np.asarray(u) - p["pre_bias"]) @ p["encoder"]["kernel"]
  gate, rows = product + p["gate_bias"], p["decoder"]["kernel"]
  norms = np.linalg.norm(rows, axis=-1) if decoder_norm == "scaled" else 1.0
  magnitude = np.exp(p["magnitude_scale"]) * product + p["magnitude_bias"]
  # Free rows: either way activation times row is what is decoded, and a gate scales with its row.
  post = np.where(gate > 0, np.maximum(magnitude, 0), 0) * norms
  code, gradient = sae.encode(u), gpt2.gradients["future", "original"]
  scored = np.ones((BATCH, LENGTH), bool)
  found = {}
  for act, restrict_active in itertools.product(("post", "pre"), (True, False)):
    variant = AttributionSpec(act=act, restrict_active=restrict_active)
    ranking = attribution.rank(label_corpus.read_latents(sae, u, code, act), gradient, variant, 7)
    labels = attribution.select_labels(ranking, jnp.asarray(scored), variant).labels_BLA
    unit = rows / norms[:, None] if decoder_norm == "scaled" else rows
    expected, _, positive = dense_labels(post, gate * norms, unit, gradient, scored, variant)
    np.testing.assert_array_equal(labels, expected, err_msg=f"{act} {restrict_active}")
    np.testing.assert_array_equal(ranking.positive_BL, positive)
    found[act, restrict_active] = np.asarray(labels)
  # Gate and magnitude of an active latent differ, so that even among active ones the order does.
  assert (found["pre", True] != found["post", True]).any()
  assert (found["pre", True] != found["pre", False]).any()


def latents_of(indices, values=None, num_latents=10):
  values = np.ones(np.shape(indices)) if values is None else np.asarray(values, float)
  return Latents(
    jnp.asarray(values)[None, None], jnp.asarray(indices)[None, None], jnp.zeros((num_latents, 2))
  )


def first_labels(latents, scores, spec):
  ranked = label_ranking.signed(jnp.asarray(scores)[None, None], spec.sign)
  rank = label_ranking.rank_active if spec.restrict_active else label_ranking.rank_active_and_zeros
  ranking = rank(latents, ranked, spec.k_attr)
  return attribution.select_labels(ranking, jnp.ones((1, 1), bool), spec).labels_BLA[0, 0].tolist()


def test_23_signs_order_the_active_latents():
  latents, scores = latents_of([9, 4, 7, 1]), [0.5, -2.0, 1.0, 0.0]

  def labels(sign, k_attr=2):
    return first_labels(latents, scores, AttributionSpec(k_attr=k_attr, sign=sign))

  assert labels("paper") == [7, 9]
  assert labels("negated") == [4, 1]
  assert labels("abs") == [4, 7]
  assert labels("paper", 4) == [7, 9, 1, 4]


def test_23_fewer_active_latents_than_labels_leave_labels_out():
  latents, scores = latents_of([9, 4, 7, 1], [1, 1, 1, 0]), [0.5, -2.0, 1.0, 0.0]
  assert first_labels(latents, scores, AttributionSpec()) == [7, 9, 4, NO_LABEL]
  assert first_labels(latents, scores, AttributionSpec(drop_nonpositive=True)) == [7, 9, NO_LABEL, NO_LABEL]
  # The released code fills up with latents that did not fire, whatever they are.
  assert first_labels(latents, scores, AttributionSpec(restrict_active=False)) == [7, 9, 0, 1]


def test_ties_go_to_the_lowest_latent():
  ones, latents = np.ones(4), latents_of([8, 3, 5, 1])
  assert first_labels(latents, ones, AttributionSpec(k_attr=3)) == [1, 3, 5]
  assert first_labels(latents, 0 * ones, AttributionSpec(k_attr=3, restrict_active=False)) == [0, 1, 2]
  # All latents, in chunks: equal scores across the border of two chunks, the last of which overlaps.
  table = np.asarray([1.0, 2, 2, 0, 2, 1, 1, 2, 0, 2])[:, None]
  pre = PreActivations(jnp.ones((1, 1, 1)), jnp.ones((1, 10)), jnp.zeros(10))
  everything = Latents(jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1), int), jnp.asarray(table), pre)
  for chunk in (1, 3, 4, 10, 99):
    ranking = label_ranking.rank_all(everything, jnp.ones((1, 1, 1)), "paper", 7, chunk)
    assert ranking.latents_BLA[0, 0].tolist() == [1, 2, 4, 7, 9, 0, 5]
    assert ranking.positive_BL.tolist() == [[8]]


def test_all_latents_are_never_written_out_for_all_positions():
  """Values of the largest arrays in the program that ranks all of many latents, by its chunk."""

  def largest(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
      sizes += [variable.aval.size for variable in equation.outvars]
      for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          sizes.append(largest(inner))
    return max(sizes)

  many, width, tokens = 4096, 4, 512
  shape = jax.ShapeDtypeStruct
  pre = PreActivations(shape((1, tokens, width), "f"), shape((width, many), "f"), shape((many,), "f"))
  latents = Latents(
    shape((1, tokens, 8), "f"), shape((1, tokens, 8), "int32"), shape((many, width), "f"), pre
  )
  gradient = shape((1, tokens, width), "f")
  for spec in (AttributionSpec.equation_1(), AttributionSpec.parity()):
    program = jax.make_jaxpr(lambda *a, spec=spec: attribution.rank(*a, spec, 128))(latents, gradient)
    assert 128 * tokens / 2 < largest(program.jaxpr) < 256 * tokens


def test_weighted_labels_weigh_their_cross_entropies():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 3, 9))
  labels = np.argsort(rng.random((2, 3, 9)), -1)[..., :4]
  labels[0, 0, 2:], labels[1, 1] = NO_LABEL, NO_LABEL
  weights = rng.random((2, 3, 4)).astype(np.float32)
  weights[1, 2] = 0  # labels that weigh nothing are no labels
  normaliser = np.log(np.exp(logits).sum(-1))
  safe = np.where(labels == NO_LABEL, 0, labels)
  picked = np.take_along_axis(logits, safe, -1)

  def loss(**given):
    return concept_prediction_loss(normaliser, picked, labels, safe, **given).loss

  share = np.where(labels == NO_LABEL, 0, weights)
  share = share / np.maximum(share.sum(-1, keepdims=True), 1e-30)
  expected = (share * (normaliser[..., None] - picked)).sum()
  np.testing.assert_allclose(loss(weights_BLA=weights).total, expected, rtol=1e-6)
  assert loss(weights_BLA=weights).weight == 4
  # What is above the entropy of the shares is the divergence of the prediction from them.
  log_share = np.log(np.where(share > 0, share, 1))
  scored = concept_prediction_loss(normaliser, picked, labels, safe, weights_BLA=weights)
  divergence = (share * (log_share - picked + normaliser[..., None])).sum()
  np.testing.assert_allclose(scored.excess.total, divergence, rtol=1e-5)
  assert scored.excess.weight == 4 and 0 < scored.excess.total < scored.loss.total
  np.testing.assert_allclose(loss(weights_BLA=7 * weights).total, expected, rtol=1e-6)
  equal = loss(weights_BLA=np.full((2, 3, 4), 0.25, np.float32))
  np.testing.assert_allclose(equal.total, loss().total, rtol=1e-6)
  assert equal.weight == loss().weight == 5


def test_unknown_variants_and_impossible_ones_are_refused(gpt2):
  with pytest.raises(ValueError, match=r"targets\.sign='up' is unknown: Valid: paper, negated, abs"):
    AttributionSpec(sign="up")
  with pytest.raises(ValueError, match=r"targets\.eval_point='everywhere' is unknown"):
    AttributionSpec(eval_point="everywhere")
  with pytest.raises(ValueError, match="k_attr=9 is above the 8 active latents"):
    AttributionSpec(k_attr=9).check(8, 40)
  AttributionSpec(k_attr=9, restrict_active=False).check(8, 40)
  with pytest.raises(ValueError, match="k_attr=41 is above the 40 latents"):
    AttributionSpec(k_attr=41, restrict_active=False).check(8, 40)
  with pytest.raises(ValueError, match="eval_point='recon' needs the reconstruction"):
    attribution.tap_gradient(gpt2.upper(), gpt2.hidden, None, AttributionSpec(eval_point="recon"))
