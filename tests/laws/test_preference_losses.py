"""Preference losses: every number of the toolbox's fixture, and what must hold of all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.objectives.preference import LOSSES, PreferenceSpec, log_one_minus_exp, preference_loss
from nr.objectives.sequence_scores import SequenceScores, first_tokens, sum_responses, token_statistics
from nr.objectives.unpaired_preference import (
  KtoSpec,
  group_dpo_loss,
  kto_loss,
  kto_reference_point,
  mismatched_log_ratio,
)

LN_2 = float(np.log(2))


def scores(policy, tokens, reference=None, **more):
  return SequenceScores(*(None if x is None else jnp.asarray(x) for x in (policy, tokens, reference)), **more)


CHOSEN, REJECTED = scores(-10.0, 5, -11.0), scores(-12.0, 8, -11.5)
FIXTURE = {
  "dpo": (PreferenceSpec(), 0.620957),
  "conservative": (PreferenceSpec(label_smoothing=0.1), 0.635957),
  "robust": (PreferenceSpec("robust", label_smoothing=0.1), 0.602207),
  "hinge": (PreferenceSpec("hinge"), 0.85),
  "ipo_sums": (PreferenceSpec("ipo"), 12.25),
  "ipo_means": (PreferenceSpec("ipo", is_length_normalised=True), 22.443906),
  "length_normalised": (PreferenceSpec(is_length_normalised=True), 0.680108),
  "r_dpo": (PreferenceSpec(length_penalty=0.05), 0.693147),
  "dpo_nll": (PreferenceSpec(nll_weight=1.0), 2.620957),
  "simpo": (PreferenceSpec("simpo", beta=2.0, gamma=1.0), 2.126928),
  "cpo_nll_summed": (PreferenceSpec("cpo", nll_norm="sum"), 10.598139),
  "cpo_nll_mean": (PreferenceSpec("cpo"), 2.598139),
  "orpo": (PreferenceSpec("orpo"), 2.104206),
  "sppo_hard": (PreferenceSpec("sppo_hard"), 36.25),
  "apo_zero": (PreferenceSpec("apo_zero"), 0.962523),
  "apo_down": (PreferenceSpec("apo_down"), 0.987549),
}


@pytest.mark.parametrize("name", FIXTURE)
def test_fixture(name):
  spec, expected = FIXTURE[name]
  assert float(preference_loss(spec, CHOSEN, REJECTED)[0]) == pytest.approx(expected, rel=2e-7, abs=1e-6)


def test_every_loss_is_in_the_fixture_or_has_a_closed_form_here():
  # DPO-positive: d(w) = 1 > 0 leaves DPO; with d(w) = -1 the penalty is c.
  assert set(LOSSES) - {spec.loss for spec, _ in FIXTURE.values()} == {"dpo_positive"}
  spec = PreferenceSpec("dpo_positive", positive_weight=3.0)
  assert float(preference_loss(spec, CHOSEN, REJECTED)[0]) == pytest.approx(0.620957, abs=1e-6)
  fallen = scores(-12.0, 5, -11.0)
  expected = np.log1p(np.exp(-0.1 * (-1 + 0.5 - 3)))
  assert float(preference_loss(spec, fallen, REJECTED)[0]) == pytest.approx(expected, abs=1e-6)


def test_kto_of_the_fixture():
  desirable, metrics = kto_loss(KtoSpec(), CHOSEN, jnp.asarray(True), jnp.asarray(0.2))
  undesirable, _ = kto_loss(KtoSpec(), REJECTED, jnp.asarray(False), jnp.asarray(0.2))
  assert float(desirable) == pytest.approx(0.480011, abs=1e-6)
  assert float(undesirable) == pytest.approx(0.482507, abs=1e-6)
  assert float(metrics["reward"]) == pytest.approx(0.1)
  weighted, _ = kto_loss(KtoSpec(undesirable_weight=2.0), REJECTED, jnp.asarray(False), jnp.asarray(0.2))
  assert float(weighted) == pytest.approx(2 * float(undesirable))


def test_kto_reference_point_is_a_clipped_mean_without_gradient():
  policy, weights = jnp.asarray([-1.0, -2.0, jnp.nan]), jnp.asarray([1.0, 1.0, 0.0])

  def point(policy):
    mismatched = scores(policy, jnp.ones(3), jnp.asarray([-3.0, -2.5, 0.0]))
    return kto_reference_point(mismatched_log_ratio(mismatched, weights))

  assert float(point(policy)) == pytest.approx(1.25)
  np.testing.assert_array_equal(jax.grad(point)(policy.at[2].set(0.0)), 0.0)
  below = mismatched_log_ratio(scores(jnp.asarray([-5.0]), jnp.ones(1), jnp.asarray([-3.0])))
  assert float(kto_reference_point(below)) == 0.0 and float(below.mean()) == -2.0
  nobody = mismatched_log_ratio(scores(policy, jnp.ones(3), jnp.ones(3)), jnp.zeros(3))
  assert float(kto_reference_point(nobody)) == 0.0


def test_balanced_kto_gives_both_kinds_one_weight():
  spec = KtoSpec.balanced(30, 10, beta=0.2)
  assert (spec.beta, spec.desirable_weight, spec.undesirable_weight) == (0.2, 1.0, 3.0)
  assert KtoSpec.balanced(5, 20).desirable_weight == 4.0 and KtoSpec.balanced(7, 7) == KtoSpec()
  with pytest.raises(ValueError, match="num_undesirable=0"):
    KtoSpec.balanced(3, 0)


def test_before_the_first_step_the_losses_are_known():
  # Item 7 of the reference-code differences: policy = reference.
  start = scores(-10.0, 5, -10.0), scores(-12.0, 8, -12.0)
  logistic = [
    PreferenceSpec(),
    PreferenceSpec(label_smoothing=0.1),
    PreferenceSpec("robust", label_smoothing=0.1),
    PreferenceSpec(is_length_normalised=True),
    PreferenceSpec("dpo_positive"),
  ]
  for spec in logistic:
    assert float(preference_loss(spec, *start)[0]) == pytest.approx(LN_2, abs=1e-6)
  assert float(preference_loss(PreferenceSpec("hinge"), *start)[0]) == 1.0
  for beta in (0.1, 0.5):
    value = float(preference_loss(PreferenceSpec("ipo", beta=beta), *start)[0])
    assert value == pytest.approx(1 / (4 * beta**2), rel=1e-6)
  for side, is_desirable in itertools.product(start, (True, False)):
    assert float(kto_loss(KtoSpec(), side, jnp.asarray(is_desirable), jnp.asarray(0.0))[0]) == 0.5
  metrics = preference_loss(PreferenceSpec(), *start)[1]
  assert float(metrics["reward_margin"]) == 0.0 and float(metrics["reward_accuracy"]) == 0.5


def random_scores(seed, dtype=jnp.float32):
  key_p, key_r, key_h, key_n = jax.random.split(jax.random.key(seed), 4)
  tokens = jax.random.randint(key_n, (6,), 3, 9).astype(dtype)
  policy = -tokens * jax.random.uniform(key_p, (6,), dtype, 0.3, 2.0)
  reference = policy + jax.random.normal(key_r, (6,), dtype)
  share = jax.random.uniform(key_h, (6,), dtype, 0.2, 0.9)
  return SequenceScores(
    policy, tokens, reference, share * policy, share * reference, policy / tokens, -policy
  )


ALL = {
  **{name: spec for name, (spec, _) in FIXTURE.items()},
  "dpo_positive": PreferenceSpec("dpo_positive"),
  "ld_dpo": PreferenceSpec(ld_alpha=0.4),
  "cpo_ld": PreferenceSpec("cpo", ld_alpha=0.4),
  "entropy": PreferenceSpec(entropy_weight=0.3),
}


@pytest.mark.parametrize("name", ALL)
def test_gradient_is_that_of_a_finite_difference(name):
  with jax.enable_x64(True):
    chosen, rejected = random_scores(0, jnp.float64), random_scores(1, jnp.float64)
    fields = ("policy", "policy_head", "entropy")

    def total(values):
      sides = [side._replace(**part) for side, part in zip((chosen, rejected), values)]
      return preference_loss(ALL[name], *sides)[0].sum()

    start = [{field: getattr(side, field) for field in fields} for side in (chosen, rejected)]
    gradients = jax.grad(total)(start)
    largest = 0.0
    for side, field, index in itertools.product((0, 1), fields, range(6)):

      def moved(step, side=side, field=field, index=index):
        values = [dict(part) for part in start]
        values[side][field] = values[side][field].at[index].add(step)
        return float(total(values))

      numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
      assert float(gradients[side][field][index]) == pytest.approx(numeric, rel=1e-5, abs=1e-7)
      largest = max(largest, abs(numeric))
    assert largest > 1e-3


def test_gradient_of_kto_is_that_of_a_finite_difference():
  with jax.enable_x64(True):
    side, is_desirable = random_scores(0, jnp.float64), jnp.arange(6) % 2 == 0

    def total(policy):
      return kto_loss(KtoSpec(), side._replace(policy=policy), is_desirable, jnp.asarray(0.3))[0].sum()

    numeric = [
      float(total(side.policy.at[i].add(1e-6)) - total(side.policy.at[i].add(-1e-6))) / 2e-6 for i in range(6)
    ]
    np.testing.assert_allclose(jax.grad(total)(side.policy), numeric, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_losses_do_not_depend_on_the_order_of_the_batch(name):
  chosen, rejected, order = random_scores(0), random_scores(1), jnp.asarray([3, 0, 5, 1, 4, 2])
  plain, metrics = preference_loss(ALL[name], chosen, rejected)
  moved, moved_metrics = preference_loss(ALL[name], *jax.tree.map(lambda x: x[order], (chosen, rejected)))
  np.testing.assert_array_equal(plain[order], moved)
  for key in metrics:
    np.testing.assert_array_equal(metrics[key][order], moved_metrics[key])


def test_ld_dpo_weighs_what_lies_behind_the_shorter_length():
  chosen, rejected = random_scores(0), random_scores(1)
  whole = preference_loss(PreferenceSpec(), chosen, rejected)[0]
  # a = 0 forgets the rest: the sums of the heads alone.
  heads = [
    side._replace(policy=side.policy_head, reference=side.reference_head) for side in (chosen, rejected)
  ]
  forgot = preference_loss(PreferenceSpec(ld_alpha=0.0), chosen, rejected)[0]
  np.testing.assert_allclose(forgot, preference_loss(PreferenceSpec(), *heads)[0], rtol=1e-6)
  nearly = preference_loss(PreferenceSpec(ld_alpha=1 - 1e-7), chosen, rejected)[0]
  np.testing.assert_allclose(nearly, whole, rtol=1e-5)
  assert float(jnp.abs(forgot - whole).max()) > 1e-3


def test_l6_r_dpo_gives_less_gradient_to_pairs_whose_winner_is_longer():
  def weight(alpha, winner_tokens, loser_tokens):
    def loss(policy):
      pair = scores(policy, winner_tokens, -11.0), scores(-12.0, loser_tokens, -11.5)
      return preference_loss(PreferenceSpec(length_penalty=alpha), *pair)[0]

    return -float(jax.grad(loss)(jnp.asarray(-10.0)))

  alphas = (0.0, 0.01, 0.1, 1.0)
  longer = [weight(alpha, 12, 4) for alpha in alphas]
  shorter = [weight(alpha, 4, 12) for alpha in alphas]
  assert longer == sorted(longer, reverse=True) and len(set(longer)) == 4
  assert shorter == sorted(shorter) and len(set(shorter)) == 4


def test_wpo_multiplies_by_how_probable_both_are_and_has_no_gradient():
  chosen, rejected = random_scores(0), random_scores(1)
  plain = preference_loss(PreferenceSpec(), chosen, rejected)[0]
  weighted = preference_loss(PreferenceSpec(weighting="wpo"), chosen, rejected)[0]
  np.testing.assert_allclose(weighted, plain * np.exp(chosen.aligned + rejected.aligned), rtol=1e-6)

  def total(aligned):
    spec = PreferenceSpec(weighting="wpo")
    return preference_loss(spec, chosen._replace(aligned=aligned), rejected)[0].sum()

  np.testing.assert_array_equal(jax.grad(total)(chosen.aligned), 0.0)


def test_group_dpo_is_the_mean_over_all_pairs():
  side = jax.tree.map(lambda x: x.reshape(2, 3), random_scores(3))
  d = np.asarray(side.policy - side.reference)
  is_correct = jnp.asarray([[True, False, False], [True, True, False]])
  loss, weight = group_dpo_loss(0.1, side, is_correct)
  expected = [
    np.mean([np.log1p(np.exp(-0.1 * (d[0, 0] - d[0, j]))) for j in (1, 2)]),
    np.mean([np.log1p(np.exp(-0.1 * (d[1, i] - d[1, 2]))) for i in (0, 1)]),
  ]
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_array_equal(weight, 1.0)
  masked, weight = group_dpo_loss(
    0.1, side, is_correct, jnp.asarray([[True, True, False], [True, True, False]])
  )
  assert float(masked[0]) == pytest.approx(np.log1p(np.exp(-0.1 * (d[0, 0] - d[0, 1]))), rel=1e-5)
  assert float(masked[1]) == 0.0 and weight.tolist() == [1.0, 0.0]


def test_a_group_of_two_is_a_pair():
  chosen, rejected = random_scores(0), random_scores(1)
  group = jax.tree.map(lambda *sides: jnp.stack(sides, axis=-1), chosen, rejected)
  loss, _ = group_dpo_loss(0.3, group, jnp.asarray([[True, False]] * 6))
  np.testing.assert_allclose(loss, preference_loss(PreferenceSpec(beta=0.3), chosen, rejected)[0], rtol=1e-6)


def test_log_one_minus_exp_keeps_its_digits():
  a = np.asarray([-1e-6, -1e-3, -0.69, -0.7, -5.0, -30.0, -80.0])
  expected = [float(np.log(-np.expm1(x))) if x > -0.7 else float(np.log1p(-np.exp(x))) for x in a]
  np.testing.assert_allclose(log_one_minus_exp(jnp.asarray(a, jnp.float32)), expected, rtol=1e-5)
  slopes = jax.vmap(jax.grad(log_one_minus_exp))(jnp.asarray([0.0, *a], jnp.float32))
  assert bool(jnp.isfinite(slopes).all())


def test_orpo_is_finite_at_the_ends():
  sure, hopeless = scores(0.0, 4), scores(-4000.0, 4)
  for pair in ((sure, hopeless), (hopeless, sure)):

    def loss(policy, pair=pair):
      return preference_loss(PreferenceSpec("orpo"), pair[0]._replace(policy=policy), pair[1])[0]

    value, slope = jax.value_and_grad(loss)(pair[0].policy)
    assert np.isfinite(value) and np.isfinite(slope)


REFUSED = [
  (dict(loss="dop"), "did you mean 'dpo'"),
  (dict(beta=0.0), "beta=0.0"),
  (dict(label_smoothing=0.5), "label_smoothing=0.5"),
  (dict(loss="ipo", label_smoothing=0.1), "only dpo, robust, simpo, cpo do"),
  (dict(loss="simpo", length_penalty=0.1), "only dpo, robust, hinge do"),
  (dict(gamma=1.0), "only simpo do"),
  (dict(ld_alpha=1.5), "ld_alpha=1.5"),
  (dict(nll_norm="median"), "nll_norm"),
  (dict(nll_weight=-1.0), "nll_weight=-1.0"),
  (dict(weighting="po"), "weighting"),
  (dict(nll_norm="sum"), "nll_norm='sum': there is no NLL term"),
  (dict(loss="cpo", nll_weight=0.0, nll_norm="sum"), "there is no NLL term"),
  (dict(loss="orpo", beta=0.3), "beta=0.3: loss 'orpo' does not use it; set odds_weight"),
  (dict(positive_weight=1.0), "only dpo_positive do"),
  (dict(odds_weight=1.0), "only orpo do"),
  (dict(loss="cpo", is_length_normalised=True), "is_length_normalised=True"),
]


@pytest.mark.parametrize("settings, message", REFUSED)
def test_invalid_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    PreferenceSpec(**settings)


def test_options_that_something_reads_are_taken():
  for settings in (
    dict(nll_weight=0.5, nll_norm="sum"),
    dict(loss="orpo", nll_norm="sum", odds_weight=1.0),
    dict(loss="orpo", beta=0.1),  # its default, which configs give everywhere
    dict(loss="simpo", beta=2.0, gamma=1.0),
  ):
    PreferenceSpec(**settings)


def test_orpo_reports_rewards_by_its_own_weight():
  _, metrics = preference_loss(PreferenceSpec("orpo", odds_weight=0.5), CHOSEN, REJECTED)
  assert float(metrics["chosen_reward"]) == pytest.approx(0.5 * -10 / 5)
  assert float(metrics["rejected_reward"]) == pytest.approx(0.5 * -12 / 8)


def test_missing_scores_are_named():
  with pytest.raises(ValueError, match="SequenceScores.reference is missing"):
    preference_loss(PreferenceSpec(), scores(-1.0, 1), scores(-1.0, 1))
  with pytest.raises(ValueError, match="policy_head is missing: ld_alpha=0.5"):
    preference_loss(PreferenceSpec(ld_alpha=0.5), CHOSEN, REJECTED)
  assert not PreferenceSpec("simpo").needs_reference and PreferenceSpec("hinge").needs_reference


# Token statistics and sums.


def toy(rows=3, length=7, width=5, vocabulary=11, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return (
    jax.random.normal(keys[0], (rows, length, width)),
    jax.random.normal(keys[1], (vocabulary, width)),
    jax.random.randint(keys[2], (rows, length), 0, vocabulary),
  )


def test_token_statistics_are_those_of_the_softmax():
  hidden_RLD, head_VD, targets_RL = toy()
  found = token_statistics(hidden_RLD, head_VD, targets_RL, with_entropy=True, with_sum_squares=True)
  z = np.asarray(hidden_RLD, np.float64) @ np.asarray(head_VD, np.float64).T
  p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  expected = np.log(np.take_along_axis(p, np.asarray(targets_RL)[..., None], -1))[..., 0]
  np.testing.assert_allclose(found.log_probs_RL, expected, atol=1e-5)
  np.testing.assert_allclose(found.entropies_RL, -(p * np.log(p)).sum(-1), atol=1e-5)
  np.testing.assert_allclose(found.log_sum_squares_RL, np.log((p**2).sum(-1)), atol=1e-5)


@pytest.mark.parametrize("chunk_size", (1, 6, 9, 20))
def test_chunked_equals_unchunked_with_its_gradient(chunk_size):
  hidden_RLD, head_VD, targets_RL = toy()

  def total(inputs, chunk_size):
    found = token_statistics(
      *inputs, targets_RL, chunk_size=chunk_size, with_entropy=True, with_sum_squares=True
    )
    parts = (found.log_probs_RL, found.entropies_RL, found.log_sum_squares_RL)
    return sum((k + 1) * (jnp.arange(7) * part).sum() for k, part in enumerate(parts)), found

  (whole, statistics), gradients = jax.value_and_grad(total, has_aux=True)((hidden_RLD, head_VD), None)
  (cut, cut_statistics), cut_gradients = jax.value_and_grad(total, has_aux=True)(
    (hidden_RLD, head_VD), chunk_size
  )
  np.testing.assert_allclose(cut, whole, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    (cut_statistics, cut_gradients),
    (statistics, gradients),
  )
  text = str(jax.make_jaxpr(total, static_argnums=1)((hidden_RLD, head_VD), chunk_size))
  assert "f32[3,7,11]" not in text  # The whole logits never exist.


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "ipo_means", "ld_dpo", "entropy"])
def test_padding_changes_nothing(name):
  hidden_RLD, head_VD, targets_RL = toy(rows=4)
  weights_RL = jnp.asarray([[0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0]] * 2, jnp.float32)

  def losses(hidden_RLD, targets_RL):
    found = token_statistics(hidden_RLD, head_VD, targets_RL, with_entropy=True)
    tokens_R1 = sum_responses(jnp.ones_like(weights_RL), weights_RL)
    least = jnp.tile(jnp.minimum(tokens_R1[0::2], tokens_R1[1::2]), (1, 2)).reshape(-1, 1)
    head_RL = first_tokens(weights_RL, least)
    sums = sum_responses(found.log_probs_RL, weights_RL)
    heads = sum_responses(found.log_probs_RL, head_RL)
    entropy = sum_responses(found.entropies_RL, weights_RL) / tokens_R1
    sides = [
      SequenceScores(
        sums[k::2],
        tokens_R1[k::2],
        -9.0 - tokens_R1[k::2],
        heads[k::2],
        -4.0 + 0 * heads[k::2],
        None,
        entropy[k::2],
      )
      for k in (0, 1)
    ]
    return preference_loss(ALL[name], *sides)[0]

  plain = losses(hidden_RLD, targets_RL)
  is_padding_RL1 = (weights_RL == 0)[..., None]
  other = losses(jnp.where(is_padding_RL1, jnp.nan, hidden_RLD), jnp.where(weights_RL == 0, 3, targets_RL))
  np.testing.assert_array_equal(plain, other)
  gradient_RLD = jax.grad(lambda x: losses(x, targets_RL).sum())(hidden_RLD)
  np.testing.assert_array_equal(np.where(is_padding_RL1, gradient_RLD, 0.0), 0.0)
  assert float(jnp.abs(gradient_RLD).max()) > 0


def test_packed_sums_are_those_of_the_sequences_apart():
  values = jnp.arange(1.0, 11.0)[None]
  segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0]])
  weights = jnp.asarray([[0, 1, 1, 0, 1, 1, 1, 1, 0, 0]], jnp.float32)
  np.testing.assert_array_equal(sum_responses(values, weights, segments, 4), [[5.0, 18.0, 8.0, 0.0]])
  kept = first_tokens(weights, jnp.asarray([[1, 2, 5, 0]]), segments)
  np.testing.assert_array_equal(kept, [[0, 1, 0, 0, 1, 1, 0, 1, 0, 0]])
  alone = first_tokens(weights[:, 3:7], jnp.asarray([[2]]))
  np.testing.assert_array_equal(alone, kept[:, 3:7])
  with pytest.raises(ValueError, match="slots=2"):
    sum_responses(values, weights, None, 2)


@pytest.mark.parametrize("name", ["dpo", "orpo", "ipo_means", "ld_dpo", "simpo"])
def test_eight_devices_give_the_same_loss_and_gradient(name):
  hidden_RLD, head_VD, targets_RL = toy(rows=16, length=6)
  weights_RL = (jnp.arange(6) < jnp.tile(jnp.asarray([3, 6, 5, 4]), 4)[:, None]).astype(jnp.float32)

  def total(hidden_RLD, head_VD, targets_RL, weights_RL):
    log_probs_RL = token_statistics(hidden_RLD, head_VD, targets_RL, chunk_size=32).log_probs_RL
    tokens_R1 = sum_responses(jnp.ones_like(weights_RL), weights_RL)
    head_RL = first_tokens(weights_RL, jnp.full((16, 1), 3))
    sums, heads = sum_responses(log_probs_RL, weights_RL), sum_responses(log_probs_RL, head_RL)
    sides = [
      SequenceScores(sums[k::2], tokens_R1[k::2], -9.0 - tokens_R1[k::2], heads[k::2], -4.0 + 0 * heads[k::2])
      for k in (0, 1)
    ]
    return preference_loss(ALL[name], *sides)[0].mean()

  inputs = (hidden_RLD, head_VD, targets_RL, weights_RL)
  expected = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*inputs)
  assert jax.device_count() == 8
  mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
  by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = [jax.device_put(x, whole if x is head_VD else by_row) for x in inputs]
  found = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*placed)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
