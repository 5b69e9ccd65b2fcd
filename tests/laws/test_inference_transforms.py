"""Every transform on one logit vector whose laws are known to six digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.transforms import (
  AdaptiveTemperature,
  Dry,
  DynamicTemperature,
  Epsilon,
  Eta,
  FrequencyPresence,
  GreenList,
  GumbelWatermark,
  MinP,
  MirostatV1,
  MirostatV2,
  RepetitionPenalty,
  Temperature,
  TopH,
  TopK,
  TopNSigma,
  TopP,
  Tournament,
  Typical,
  Xtc,
  chain,
)
from nr.generation.transforms.watermarks import green_z_score
from tests.generation.transform_cases import (
  applied,
  by,
  committed,
  context_of,
  each_transformed,
  empty,
  keep_sets,
  transformed,
)

Z = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)
P = [0.560893, 0.206341, 0.125152, 0.075909, 0.027925, 0.003779]
H = 1.226783
ALL = [0, 1, 2, 3, 4, 5]
LAWS = {
  1: [1],
  2: [0.731059, 0.268941],
  3: [0.628532, 0.231224, 0.140244],
  4: [0.579259, 0.213097, 0.129250, 0.078394],
  5: [0.563021, 0.207124, 0.125627, 0.076197, 0.028031],
  6: P,
}
# Each a batch of rows with parameters of their own, some of them off.
KEEP_SETS = {
  "top_k": (TopK([3, 0, 1, 9, 6]), [ALL[:3], ALL, [0], ALL, ALL]),
  "top_p": (
    TopP([0.5, 0.6, 0.8, 0.9, 0.95, 1, 0]),
    [[0], ALL[:2], ALL[:3], ALL[:4], ALL[:4], ALL, [0]],
  ),
  "typical": (
    Typical([0.2, 0.5, 0.7, 0.9, 0.95, 1, 0]),
    [[1], ALL[:2], ALL[:2], ALL[:4], ALL[:4], ALL, [1]],
  ),
  "epsilon": (Epsilon([0.05, 0.1, 0, 1]), [ALL[:4], ALL[:3], ALL, [0]]),
  "eta": (Eta([0.01, 0.05, 0.1, 0.3, 0]), [ALL[:5], ALL[:4], ALL[:3], ALL[:2], ALL]),
  "min_p": (MinP([0.05, 0.1, 0.2, 0, 1]), [ALL[:4], ALL[:4], ALL[:3], ALL, [0]]),
  "top_n_sigma": (TopNSigma([1, 0]), [ALL[:3], ALL]),
  "top_h": (TopH([0.4, 0.6, 0.8, 0.5, 1, 0]), [[0], ALL[:2], ALL[:3], ALL[:2], ALL, [0]]),
  "top_h of transformers": (TopH([0.4, 0.6, 0.8, 0.5, 1], "hf"), [[0], ALL[:2], ALL[:3], [0], ALL]),
}


def rows(count):
  return np.tile(Z, (count, 1))


def law(logits_BV):
  shifted_BV = np.exp(np.asarray(logits_BV) - np.max(logits_BV, axis=-1, keepdims=True))
  return shifted_BV / shifted_BV.sum(axis=-1, keepdims=True)


# One program instead of one an operation.
call = jax.jit(lambda transform, method, *arguments: getattr(transform, method)(*arguments), static_argnums=1)


def close(found, wanted):
  np.testing.assert_allclose(found, wanted, atol=1.1e-6)


@functools.cache
def kept():
  """Returns what all truncations make of the vector, by name and implementation."""
  cases = {(name, way): by(pair[0], way) for name, pair in KEEP_SETS.items() for way in ("sort", "search")}
  sizes = [len(KEEP_SETS[name][1]) for name, _ in cases]
  logits = each_transformed(list(cases.values()), [*map(rows, sizes)], [*map(empty, sizes)])
  return dict(zip(cases, logits))


@pytest.mark.parametrize("implementation", ["sort", "search"])
@pytest.mark.parametrize("name", KEEP_SETS)
def test_keep_sets_and_their_laws(name, implementation):
  logits, wanted = kept()[name, implementation], KEEP_SETS[name][1]
  assert keep_sets(logits) == wanted
  for found, ids in zip(np.asarray(logits), wanted):
    np.testing.assert_array_equal(found[ids], Z[ids])
    if ids == ALL[: len(ids)]:
      close(law(found)[np.array(ids)], LAWS[len(ids)])


@pytest.mark.parametrize("implementation", ["sort", "search"])
def test_top_h_cuts_at_the_entropies_of_the_prefixes(implementation):
  entropies = np.array([0.582203, 0.905959, 1.109767, 1.206489])
  alphas = np.concatenate([(entropies - 2e-6) / H, (entropies + 2e-6) / H])
  logits = transformed(by(TopH(alphas), implementation), rows(8), empty(8))
  assert [len(kept) for kept in keep_sets(logits)] == [1, 2, 3, 4, 2, 3, 4, 5]


def test_cutoffs():
  close(call(Eta([0.1, 0.3]).prepared(), "cutoffs", rows(2)), [[0.092729], [0.160611]])
  close(call(TopNSigma([1]).prepared(), "cutoffs", rows(1)), [[0.407919]])


def test_temperatures():
  logits = transformed(Temperature([0.5, 2.0, 1.0, 0.0, 1e-6]).prepared(), rows(5), empty(5))
  found = law(logits)
  close(found[0], [0.829213, 0.112222, 0.041284, 0.015188, 0.002055, 0.000038])
  close(found[1], [0.363373, 0.220397, 0.171645, 0.133678, 0.081080, 0.029827])
  np.testing.assert_array_equal(logits[2], Z)
  np.testing.assert_array_equal(found[3:], np.eye(6)[[0, 0]])


def test_dynamic_temperature():
  transform = DynamicTemperature([0.5, 1.0], [1.5, 1.0]).prepared()
  close(call(transform, "taus", rows(2)), [[1.184681], [1.0]])
  close(transformed(transform, rows(2), empty(2)), [Z / 1.184681, Z])


def test_adaptive_temperature_mixes_laws_or_picks_one():
  taus, weights = [0.5, 1, 2], jnp.array([[0.2, 0.5, 0.3], [0, 1, 0]])
  context = empty(2)._replace(hidden={"adaptive": weights})
  mixed = law(transformed(AdaptiveTemperature(taus).prepared(), rows(2), context))
  close(mixed[0], [0.555301, 0.191734, 0.122327, 0.081095, 0.038698, 0.010845])
  close(mixed[1], P)
  given = AdaptiveTemperature(taus, [0.2, 0.5, 0.3]).prepared()
  close(law(transformed(given, rows(1), empty(1)))[0], mixed[0])
  picked = AdaptiveTemperature(taus, [[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], "argmax").prepared()
  np.testing.assert_array_equal(transformed(picked, rows(2), empty(2)), [Z, Z / 2])
  assert AdaptiveTemperature(taus).needs == {"hidden:adaptive"} and not picked.needs


@pytest.mark.parametrize("implementation", ["sort", "search"])
def test_order_matters(implementation):
  hot, nucleus = Temperature(2.0).prepared(), by(TopP(0.8), implementation)
  first = transformed(chain(hot, nucleus), rows(1), empty(1))
  last = transformed(chain(nucleus, hot), rows(1), empty(1))
  assert keep_sets(first) == [[0, 1, 2, 3]] and keep_sets(last) == [[0, 1, 2]]


def test_penalties_for_tokens_that_occurred():
  context = context_of([[0, 4, 0]] * 2)
  repeated = transformed(RepetitionPenalty([1.2, 1]).prepared(), rows(2), context)
  np.testing.assert_allclose(repeated, [[1.666667, 1, 0.5, 0, -1.2, -3], Z], atol=1e-6)
  counted = transformed(FrequencyPresence([0.5, 0], [0.3, 0]).prepared(), rows(2), context)
  np.testing.assert_allclose(counted, [[0.7, 1.0, 0.5, 0, -1.8, -3], Z], atol=1e-6)


def test_dry_penalises_what_would_extend_the_repetition():
  context = context_of([[1, 2, 3, 5, 1, 2, 3]] * 2)
  logits = transformed(Dry([0.8, 0.0], 1.75, 2).prepared(), rows(2), context)
  np.testing.assert_allclose(logits, [[*Z[:5], Z[5] - 1.4], Z], atol=1e-6)


def test_xtc_leaves_the_least_of_the_top():
  logits = transformed(Xtc([1, 0, 1], [0.15, 0.15, 0.6]).prepared(), rows(3), empty(3))
  assert keep_sets(logits) == [ALL[1:], ALL, ALL]


@pytest.mark.parametrize("implementation", ["sort", "search"])
def test_mirostat_v1_fits_k(implementation):
  transform = by(MirostatV1(fitted=5), implementation)
  close(call(transform, "exponents", rows(1)), [[1.624453]])
  bounds = jnp.array([1.0, 2.0, 3.0])
  np.testing.assert_allclose(
    call(transform, "sizes", rows(3), bounds)[:, 0], [1.4627, 2.2411, 3.4338], atol=5e-5
  )
  assert keep_sets(applied(transform, rows(3), bounds, empty(3))) == [[0], [0, 1], [0, 1, 2]]


def test_mirostat_v2_moves_its_bound():
  bounds, tokens = jnp.full(2, 3.0), jnp.array([0, 2])
  truncated, model = (MirostatV2(1.5, 0.1, surprise).prepared() for surprise in ("truncated", "model"))
  assert keep_sets(applied(truncated, rows(2), bounds, empty(2))) == [[0, 1, 2]] * 2
  context = context_of([[]] * 2, capacity=2)
  close(committed(truncated, bounds, tokens, context, rows(2))[0], [3.083006, 2.866601])
  close(committed(model, bounds, tokens, context, rows(2))[0][0], 3.066580)
  np.testing.assert_array_equal(truncated.init(context, 6), [3.0, 3.0])


def test_green_list_raises_the_green():
  keys = np.arange(400)
  context = context_of([[3]] * len(keys))
  transform = GreenList(2.0, 0.25, keys).prepared()
  is_green = np.asarray(jax.jit(lambda t: t.is_green(context, 6))(transform))
  row = int(np.flatnonzero((is_green == [1, 0, 1, 0, 0, 0]).all(axis=1))[0])
  logits = transformed(transform, rows(len(keys)), context)
  close(law(logits[row]), [0.769892, 0.038331, 0.171786, 0.014101, 0.005187, 0.000702])
  assert abs(is_green.mean() - 0.25) < 4 * (0.25 * 0.75 / is_green.size) ** 0.5
  close(green_z_score(60, 100, 0.25), 8.082904)


def test_watermarks_leave_the_law_alone_on_average_over_keys():
  count = 20_000
  context = context_of([[3, 1, 4, 1]] * count)
  tokens = np.asarray(call(GumbelWatermark(np.arange(count, dtype=np.uint32)), "draw", rows(count), context))
  found = np.bincount(tokens, minlength=6) / count
  # Standard errors of the two means; the tournament's law is itself random by key.
  assert (np.abs(found - P) < 4.5 * np.sqrt(np.array(P) / count)).all()
  laws = law(transformed(Tournament(np.arange(count), 4, 5).prepared(), rows(count), context))
  np.testing.assert_allclose(laws.sum(axis=-1), 1, atol=1e-5)
  assert (np.abs(laws.mean(axis=0) - P) < 4.5 * laws.std(axis=0) / count**0.5).all()
  assert laws.std(axis=0)[0] > 0.1  # and each key alone does change it
