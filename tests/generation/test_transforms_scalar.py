"""Rules of llama.cpp written out one token at a time, against ours on random rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.transforms import (
  AdaptiveP,
  Dry,
  DynamicTemperature,
  FrequencyPresence,
  MirostatV1,
  MirostatV2,
  RepetitionPenalty,
  TopNSigma,
  Xtc,
  chain,
)
from tests.generation.transform_cases import applied, by, committed, context_of, empty, transformed

ROWS, V, STEPS = 24, 40, 6
LOGITS = np.random.default_rng(10).normal(0, 2.5, (ROWS, V)).astype(np.float32)
LOGITS[np.random.default_rng(9).uniform(size=LOGITS.shape) < 0.1] = -np.inf


@pytest.fixture
def random():
  return np.random.default_rng(11)


def softmax(logits):
  shifted = np.exp(np.float64(logits) - np.max(logits))
  return shifted / shifted.sum()


def agree(found, wanted, tolerance=1e-4):
  found, wanted = np.asarray(found), np.asarray(wanted)
  np.testing.assert_array_equal(found == -np.inf, wanted == -np.inf)
  np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_top_n_sigma(random):
  widths = random.uniform(0.2, 2, ROWS).astype(np.float32)

  def rule(logits, n):
    live = [x for x in logits.tolist() if x > -np.inf]
    mean = sum(live) / len(live)
    deviation = (sum((x - mean) ** 2 for x in live) / len(live)) ** 0.5
    return [x if x >= max(live) - n * deviation else -np.inf for x in logits]

  wanted = [rule(logits, n) for logits, n in zip(LOGITS, widths)]
  agree(transformed(TopNSigma(widths).prepared(), LOGITS, empty(ROWS)), wanted)


def test_xtc(random):
  thresholds = random.uniform(0.02, 0.5, ROWS).astype(np.float32)

  def rule(logits, threshold):
    probs, changed = softmax(logits), logits.copy()
    order = sorted(range(V), key=lambda i: -logits[i])
    top = [i for i in order if probs[i] >= threshold]
    changed[top[:-1]] = -np.inf
    return changed

  wanted = np.array([rule(logits, threshold) for logits, threshold in zip(LOGITS, thresholds)])
  assert 0 < (wanted != LOGITS).sum()
  agree(transformed(Xtc(1, thresholds).prepared(), LOGITS, empty(ROWS)), wanted)
  # The coin falls as often as it should: one row a key.
  rows = np.tile(np.array([[1.0, 0.5, 0.0], [0, 0, 0]], np.float32), (2000, 1))
  found = np.asarray(transformed(Xtc(0.3, 0.1).prepared(), rows, empty(4000)))
  np.testing.assert_array_equal(found[1::2], 0)  # where all tie, all are the least
  assert abs(np.mean(found[::2, 0] == -np.inf) - 0.3) < 4.5 * (0.3 * 0.7 / 2000) ** 0.5


def test_dynamic_temperature(random):
  def rule(logits, low, high, exponent):
    probs = softmax(logits)
    live = probs[logits > -np.inf]
    share = -(live * np.log(live)).sum() / np.log(len(live))
    return logits / (low + (high - low) * share**exponent)

  spans = [
    random.uniform(*bounds, ROWS).astype(np.float32) for bounds in [(0.1, 0.9), (1.0, 2.0), (0.5, 2.0)]
  ]
  wanted = [rule(*row) for row in zip(LOGITS, *spans)]
  agree(transformed(DynamicTemperature(*spans).prepared(), LOGITS, empty(ROWS)), wanted)


def dry(tokens, multiplier, base, allowed, window, breakers):
  """Returns penalties by token."""
  text = tokens[-window:] if window else list(tokens)
  limit = len(text)
  for end in range(len(text), 0, -1):
    if any(tuple(text[:end][-len(breaker) :]) == breaker for breaker in breakers):
      limit = len(text) - end
      break
  longest = {}
  for place in range(1, len(text)):
    repeat = 0
    while repeat < min(place, limit) and text[place - 1 - repeat] == text[len(text) - 1 - repeat]:
      repeat += 1
    if repeat >= allowed and (text[place],) not in breakers:
      longest[text[place]] = max(longest.get(text[place], 0), repeat)
  return {token: multiplier * base ** (repeat - allowed) for token, repeat in longest.items()}


@pytest.mark.parametrize("breakers", [[], [(3,), (0, 2)]], ids=["plain", "with breakers"])
def test_dry(breakers, random):
  rows, logits = 4 * ROWS, np.tile(LOGITS, (4, 1))
  histories = [random.integers(0, 2 + row % 3, random.integers(0, 40)).tolist() for row in range(rows)]
  for row in range(0, rows, 2):  # and some that repeat themselves
    histories[row] = np.resize(random.integers(0, 5, random.integers(3, 8)), len(histories[row])).tolist()
  settings = [
    random.choice(values, rows) for values in ([0.0, 0.5, 0.8], [1.0, 1.3, 1.75], [1, 2, 3], [0, 5, 12, 100])
  ]
  wanted = logits.copy()
  for row, values in enumerate(zip(*settings)):
    for token, penalty in dry(histories[row], *values, breakers).items():
      wanted[row, token] -= penalty
  assert (wanted != logits).any(axis=1).sum() > rows // 5
  law = Dry(*settings, breakers=breakers).prepared()
  agree(transformed(law, logits, context_of(histories, capacity=40)), wanted)


def test_penalties_in_a_window(random):
  histories = [random.integers(0, 6, random.integers(0, 30)).tolist() for _ in range(ROWS)]
  windows = random.integers(1, 20, ROWS)
  wanted = LOGITS.copy()
  for row, (history, window) in enumerate(zip(histories, windows)):
    for token in set(history[-window:]):
      logit = wanted[row, token]
      logit = logit / 1.3 if logit > 0 else logit * 1.3
      wanted[row, token] = logit - 0.2 * history[-window:].count(token) - 0.4
  law = chain(RepetitionPenalty(1.3, window=windows), FrequencyPresence(0.2, 0.4, "all", windows))
  transforms = chain(*(each.prepared() for each in law.transforms))
  agree(transformed(transforms, LOGITS, context_of(histories, capacity=30)), wanted)


def zipf_size(logits, bound, fitted):
  ranked = np.sort(logits[logits > -np.inf].astype(np.float64))[::-1]
  over = under = 0.0
  for i in range(min(fitted, len(ranked)) - 1):
    step = np.log((i + 2) / (i + 1))
    over += step * (ranked[i] - ranked[i + 1])
    under += step**2
  exponent = over / under
  excess = exponent - 1
  return (excess * 2**bound / (1 - V**-excess)) ** (1 / exponent)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_over_several_steps(version, random):
  targets, rates = random.uniform(1, 4, ROWS).astype(np.float32), random.uniform(0.05, 0.5, ROWS)
  law = by((MirostatV1, MirostatV2)[version - 1](targets, rates), "sort")
  context = context_of([[0]] * ROWS, prompts=1, capacity=STEPS + 1)
  state, bounds = law.init(context, V), 2 * np.float64(targets)
  for _ in range(STEPS):
    logits = (LOGITS[:, random.permutation(V)] + random.normal(0, 0.5, LOGITS.shape)).astype(np.float32)
    wanted, tokens = np.full(logits.shape, -np.inf), np.zeros(ROWS, np.int32)
    for row in range(ROWS):
      order = sorted((i for i in range(V) if logits[row, i] > -np.inf), key=lambda i: -logits[row, i])
      if version == 1:
        kept = order[: max(int(zipf_size(logits[row], bounds[row], 100)), 1)]
      else:
        probs = softmax(logits[row])
        kept = [i for i in order if -np.log2(probs[i]) <= bounds[row]] or order[:1]
      wanted[row, kept] = logits[row, kept]
      tokens[row] = random.choice(kept)
      bounds[row] -= rates[row] * (-np.log2(softmax(wanted[row])[tokens[row]]) - targets[row])
    agree(applied(law, logits, state, context), wanted)
    state, context = committed(law, state, jnp.asarray(tokens), context, logits)
    np.testing.assert_allclose(state, bounds, rtol=1e-4)


def test_adaptive_p_over_several_steps(random):
  targets = random.uniform(0, 1, ROWS).astype(np.float32)
  decays = random.uniform(0, 0.99, ROWS).astype(np.float32)
  law = AdaptiveP(targets, decays).prepared()
  context = context_of([[0]] * ROWS, prompts=1, capacity=STEPS + 1)
  state = law.init(context, V)
  sums, weights = np.float64(targets) / (1 - decays), 1 / (1 - np.float64(decays))
  for _ in range(STEPS):
    probs = np.array([softmax(logits) for logits in LOGITS])
    aims = np.clip(2 * targets - sums / weights, 0, 1)[:, None]
    distances = np.abs(probs - aims) / 0.3
    wanted = np.where(LOGITS > -np.inf, 5 - 10 * distances**2 / (1 + distances), -np.inf)
    agree(applied(law, LOGITS, state, context), wanted)
    tokens = np.array([random.choice(np.flatnonzero(row > -np.inf)) for row in LOGITS], np.int32)
    sums, weights = probs[np.arange(ROWS), tokens] + decays * sums, 1 + decays * weights
    state, context = committed(law, state, jnp.asarray(tokens), context, LOGITS)
