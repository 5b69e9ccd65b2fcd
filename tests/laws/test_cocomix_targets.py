"""Concept targets: numbered tests of the CoCoMix specification, section 12, against written-out algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.labels import NO_LABEL
from nr.models import parameters
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec
from nr.objectives import attribution
from nr.objectives.attribution import AttributionSpec

WIDTH, LATENTS, ACTIVE, VOCABULARY, LENGTH = 12, 40, 8, 17, 6


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def teacher(seed=0):
  """A causal upper half written out by hand: layer norm, mixing of earlier rows, head."""
  rng = np.random.default_rng(seed)
  mix_DD = rng.normal(size=(WIDTH, WIDTH)) / 3
  query_DD = rng.normal(size=(WIDTH, WIDTH)) / 3
  head_DV = rng.normal(size=(WIDTH, VOCABULARY))
  targets_BL = rng.integers(0, VOCABULARY, (2, LENGTH))
  weights_BL = np.ones((2, LENGTH))
  weights_BL[:, -1] = 0

  def norm(x_BLD):
    return (x_BLD - x_BLD.mean(-1, keepdims=True)) / jnp.sqrt(x_BLD.var(-1, keepdims=True) + 1e-5)

  def token_losses(hidden_BLD):
    u_BLD = norm(hidden_BLD)
    scores_BLM = jnp.einsum("bld,bmd->blm", u_BLD @ query_DD, u_BLD)
    scores_BLM = jnp.where(np.tril(np.ones((LENGTH, LENGTH), bool)), scores_BLM, -jnp.inf)
    hidden_BLD = hidden_BLD + jax.nn.softmax(scores_BLM) @ (u_BLD @ mix_DD)
    log_probs_BLV = jax.nn.log_softmax(norm(hidden_BLD) @ head_DV)
    return -jnp.take_along_axis(log_probs_BLV, targets_BL[..., None], -1)[..., 0]

  def upper_loss(hidden_BLD):
    return (token_losses(hidden_BLD) * weights_BL).sum()

  return upper_loss, jnp.asarray(weights_BL), jnp.asarray(rng.normal(size=(2, LENGTH, WIDTH)) + 0.3)


def autoencoder(seed=0):
  spec = SparseAutoencoderSpec(
    WIDTH, LATENTS, ACTIVE, k_aux=8, dtype="float64", param_dtype="float64", top_k="lax"
  )
  graphdef, params = parameters.split(SparseAutoencoder(spec, rngs=nnx.Rngs(seed)))
  rng = np.random.default_rng(seed)
  params["pre_bias"] = jnp.asarray(rng.normal(size=WIDTH) * 0.1)
  params["latent_bias"] = jnp.asarray(rng.normal(size=LATENTS) * 0.1)
  return parameters.merge(graphdef, params)


def test_19_finite_differences_give_the_gradient_with_the_deviation_as_factor():
  upper_loss, _, hidden_BLD = teacher()
  sae = autoencoder()
  normalised = sae.normalise(hidden_BLD)
  code = sae.encode(normalised.values_TD)
  at_BLD = sae.denormalise(sae.decode(code), normalised)
  gradient_BLD = attribution.hidden_gradient(upper_loss, at_BLD)
  for b, t, slot in [(0, 0, 0), (1, 3, 1), (0, 4, 2)]:

    def loss_at(change, b=b, t=t, slot=slot):
      values = code.values_TK.at[b, t, slot].add(change)
      return upper_loss(sae.denormalise(sae.decode(code._replace(values_TK=values)), normalised))

    measured = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    row_D = sae.decoder.kernel[...][code.indices_TK[b, t, slot]]
    without_factor = row_D @ gradient_BLD[b, t]
    deviation = normalised.deviation_T1[b, t, 0]
    np.testing.assert_allclose(measured, deviation * without_factor, rtol=1e-5)
    np.testing.assert_allclose(without_factor / measured, 1 / deviation, rtol=1e-5)
    assert abs(deviation - 1) > 0.01  # else the two could not be told apart


def test_20_gradient_is_orthogonal_to_the_all_ones_vector():
  # Every read of the residual stream goes through a layer norm, as in any pre-norm transformer.
  upper_loss, _, hidden_BLD = teacher()
  gradient_BLD = attribution.hidden_gradient(upper_loss, hidden_BLD)
  assert np.abs(gradient_BLD.sum(-1)).max() < 1e-12
  assert np.abs(gradient_BLD).max() > 1e-3


def label(spec, hidden_BLD=None, weights_BL=None):
  upper_loss, default_weights_BL, default_hidden_BLD = teacher()
  hidden_BLD = default_hidden_BLD if hidden_BLD is None else hidden_BLD
  weights_BL = default_weights_BL if weights_BL is None else weights_BL
  sae = autoencoder()
  code = sae.encode(sae.normalise(hidden_BLD).values_TD)
  return attribution.concept_labels(
    hidden_BLD, upper_loss, code.values_TK, code.indices_TK, sae.decoder.kernel[...], weights_BL, spec
  )


def test_21_last_position_has_no_gradient_and_no_label():
  upper_loss, _, hidden_BLD = teacher()
  gradient_BLD = attribution.hidden_gradient(upper_loss, hidden_BLD)
  np.testing.assert_array_equal(gradient_BLD[:, -1], 0.0)
  labels = label(AttributionSpec())
  np.testing.assert_array_equal(labels.labels_BLA[:, -1], NO_LABEL)
  assert (labels.labels_BLA[:, :-1] < LATENTS).all()
  assert not labels.scored_BL[:, -1].any() and labels.scored_BL[:, :-1].all()
  parity = label(AttributionSpec.parity())
  assert (parity.labels_BLA[:, -1] < LATENTS).all()  # the released code labels it arbitrarily


def test_21_positions_of_weight_zero_have_no_label():
  _, weights_BL, _ = teacher()
  labels = label(AttributionSpec(), weights_BL=weights_BL.at[0, 2].set(0))
  np.testing.assert_array_equal(labels.labels_BLA[0, 2], NO_LABEL)
  assert (labels.labels_BLA[0, 3] < LATENTS).all()


def test_first_position_is_masked_where_asked():
  masked, plain = label(AttributionSpec(mask_first=True)), label(AttributionSpec())
  np.testing.assert_array_equal(masked.labels_BLA[:, 0], NO_LABEL)
  np.testing.assert_array_equal(masked.labels_BLA[:, 1:], plain.labels_BLA[:, 1:])


def test_23_scores_of_active_latents_equal_the_dense_expression():
  upper_loss, weights_BL, hidden_BLD = teacher()
  sae = autoencoder()
  code = sae.encode(sae.normalise(hidden_BLD).values_TD)
  gradient_BLD = attribution.hidden_gradient(upper_loss, hidden_BLD)
  scores_BLK = attribution.attribution_scores(*code, sae.decoder.kernel[...], gradient_BLD)
  # The dense reference, with NumPy from the equations.
  x = np.asarray(hidden_BLD)
  u = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-5)
  pre = (u - sae.pre_bias[...]) @ np.asarray(sae.encoder.kernel[...]) + np.asarray(sae.latent_bias[...])
  threshold = np.sort(pre, -1)[..., -ACTIVE][..., None]
  active = np.where(pre >= threshold, np.maximum(pre, 0), 0)
  dense = active * (np.asarray(gradient_BLD) @ np.asarray(sae.decoder.kernel[...]).T)
  np.testing.assert_allclose(
    scores_BLK, np.take_along_axis(dense, np.asarray(code.indices_TK), -1), rtol=1e-9, atol=1e-15
  )
  reference = np.argsort(-dense, -1, kind="stable")[..., :4]
  enough = (dense > 0).sum(-1) >= 4
  assert enough[:, :-1].sum() >= 3 and (~enough[:, :-1]).sum() >= 1  # both cases occur
  restricted, parity = label(AttributionSpec()), label(AttributionSpec.parity())
  np.testing.assert_array_equal(restricted.labels_BLA[enough], reference[enough])
  np.testing.assert_array_equal(parity.labels_BLA, reference)
  np.testing.assert_array_equal(restricted.positive_BL[:, :-1], (dense > 0).sum(-1)[:, :-1])
  # Restricted to the active ones, an inactive latent never becomes a label.
  labels = np.asarray(restricted.labels_BLA[:, :-1])
  in_code = (labels[..., None] == np.asarray(code.indices_TK)[:, :-1, None]).any(-1)
  assert in_code.all()


def test_23_drop_nonpositive_writes_no_label():
  kept = label(AttributionSpec(drop_nonpositive=True))
  full = label(AttributionSpec())
  expected = np.minimum(np.asarray(full.positive_BL), 4)
  np.testing.assert_array_equal((kept.labels_BLA != NO_LABEL).sum(-1), expected)
  assert (expected[:, :-1] < 4).any()


def test_23_signs_order_the_active_latents():
  scores_BLK = jnp.asarray([[[0.5, -2.0, 1.0, 0.0]]])
  indices_BLK = jnp.asarray([[[9, 4, 7, 1]]])
  scored_BL = jnp.ones((1, 1), bool)

  def first(sign, k_attr=2):
    spec = AttributionSpec(k_attr=k_attr, sign=sign)
    return attribution.select_labels(scores_BLK, indices_BLK, scored_BL, 10, spec)[0, 0].tolist()

  assert first("paper") == [7, 9]
  assert first("negated") == [4, 1]
  assert first("abs") == [4, 7]
  assert first("paper", 4) == [7, 9, 1, 4]


def test_23_a_slot_that_the_relu_switched_off_is_no_label():
  scores_BLK = jnp.asarray([[[0.5, -2.0, 1.0, 0.0]]])
  indices_BLK = jnp.asarray([[[9, 4, 7, 1]]])
  active_BLK = jnp.asarray([[[True, True, True, False]]])
  labels = attribution.select_labels(
    scores_BLK, indices_BLK, jnp.ones((1, 1), bool), 10, AttributionSpec(k_attr=4), active_BLK=active_BLK
  )
  assert labels[0, 0].tolist() == [7, 9, 4, NO_LABEL]


def test_ties_go_to_the_lowest_latent():
  labels = attribution.select_labels(
    jnp.ones((1, 1, 4)), jnp.asarray([[[8, 3, 5, 1]]]), jnp.ones((1, 1), bool), 10, AttributionSpec(k_attr=3)
  )
  assert labels[0, 0].tolist() == [1, 3, 5]


@pytest.mark.parametrize(
  "field, value", [("act", "pre"), ("scope", "next"), ("eval_point", "recon"), ("weights", "score")]
)
def test_variants_that_are_not_built_say_so(field, value):
  with pytest.raises(ValueError, match=rf"targets\.{field}='{value}' is not available yet"):
    AttributionSpec(**{field: value})


def test_unknown_variants_and_too_many_labels_are_refused():
  with pytest.raises(ValueError, match=r"targets\.sign='up' is unknown: Valid: paper, negated, abs"):
    AttributionSpec(sign="up")
  with pytest.raises(ValueError, match="k_attr=9 is above the 8 active latents"):
    label(AttributionSpec(k_attr=9))
