"""Transforms beyond their laws: state, off, degenerate rows, ties, budgets, loops, watermarks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.generation.transforms import (
  REGISTRY,
  AdaptiveTemperature,
  AllowedTokens,
  Dry,
  FrequencyPresence,
  GreenList,
  GumbelWatermark,
  LogitBias,
  RepetitionPenalty,
  SequenceBias,
  Temperature,
  ThinkingBudget,
  TopH,
  TopK,
  TopP,
  Tournament,
  Transform,
  Typical,
  chain,
  is_looping,
  parse,
)
from nr.generation.transforms.algebra import guarded
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
START, END = 1, [2, 3]


def softmax(logits):
  shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return shifted / shifted.sum(axis=-1, keepdims=True)


def test_state_of_a_history_is_that_of_its_commits():
  rows, size, prompt, steps = 8, 7, 5, 14
  random = np.random.default_rng(0)
  tokens = random.integers(0, 4, (rows, prompt + steps))
  windows = [0, 1, 3, 6, 0, 2, 4, 40]
  law = chain(
    RepetitionPenalty(1.2, "all", windows),
    RepetitionPenalty(1.2, "generated", windows),
    FrequencyPresence(0.1, 0.2, "generated", windows),
    Dry(0.8, 1.75, 2, windows, breakers=[3, [0, 2], [1, 1, 2]]),
    ThinkingBudget(START, END, 3),
  ).prepared()
  # What they remember of probabilities, no history tells.
  fresh = {"mirostat_v1", "mirostat_v2", "adaptive_p"}
  stateful = {
    name
    for name, cls in REGISTRY.items()
    if cls.init is not Transform.init and cls.__module__.startswith("nr.generation.transforms.")
  }
  missing = stateful - fresh - {each.name for each in law.transforms}
  ours = (
    "adaptive_truncation",
    "penalties",
    "token_rules",
    "watermarks",
    "biases",
    "truncation",
    "temperature",
  )
  assert not {name for name in missing if REGISTRY[name].__module__.endswith(ours)}
  prompts = [prompt - row % 3 for row in range(rows)]
  start = jax.jit(lambda context: law.init(context, size))
  logits = jnp.asarray(random.normal(size=(rows, size)), jnp.float32)
  context = context_of([row[:count] for row, count in zip(tokens, prompts)], prompts, prompt + steps)
  state = start(context)
  for step in range(steps - 2):
    said = jnp.array([row[count + step] for row, count in zip(tokens, prompts)])
    state, context = committed(law, state, said, context, logits)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(start(context)), strict=True):
      np.testing.assert_array_equal(found, wanted)
  assert (np.asarray(state[-1]) >= 0).any() and (np.asarray(state[-1]) < 0).any()


OFF = (
  "temperature([1, 0.5])|dynamic_temperature([1, 0.5], [1, 1.5])|top_k([0, 3])|top_p([1, 0.9])|typical([1, 0.9])"
  "|epsilon([0, 0.01])|eta([0, 0.01])|min_p([0, 0.01])|top_n_sigma([0, 2])|top_h([1, 0.99])"
  "|top_h([1, 0.99], 'hf')|xtc([0, 1])|xtc([1, 1], [0.6, 0.1])|adaptive_p([-1, 0.3])"
  "|mirostat_v1([1e999, 1])|mirostat_v2([1e999, 1])|repetition_penalty([1, 1.2])"
  "|frequency_presence([0, 0.2], [0, 0.1])|no_repeat_ngram([0, 2])|dry([0, 0.8])|suppress_tokens([5], [0, -1])"
  "|min_length([4], [0, 9])|max_length([4], [0, 3])|forced_tokens([4], [-1, 3])"
  "|exponential_decay([4], 0, [1, 1.5])|thinking_budget(1, [2, 3], [-1, 4])|green_list([0, 2])"
)


def test_off_is_exactly_the_identity_in_its_row():
  law = parse(OFF).prepared()
  assert len(law.transforms) == OFF.count("|") + 1
  context = context_of([[1, 2, 1, 2, 1]] * 2, prompts=2, capacity=8)
  found = transformed(law, jnp.array([Z, Z]), context)
  np.testing.assert_array_equal(found[0], Z)
  assert (np.asarray(found[1]) != Z).any()
  # And off everywhere leaves nothing in the program.
  assert law.take(jnp.array([0, 0])).prepared().transforms == ()
  assert len(law.take(jnp.array([1, 1])).prepared().transforms) == len(law.transforms)


HARD = (
  "temperature(0.7)|dynamic_temperature(0.5, 1.5)|adaptive_temperature([0, 1], [0.5, 0.5])|top_k(9, 2)|top_p(0, 2)"
  "|typical(0)|epsilon(1)|eta(1)|min_p(1)|top_n_sigma(1e-9)|top_h(0)|top_h(0, 'hf')|xtc(1, 0)|adaptive_p(0.5)"
  "|mirostat_v1(0)|mirostat_v2(0)|repetition_penalty(1.2)|frequency_presence(0.1, 0.1)|no_repeat_ngram(2)|dry(0.8)"
  "|logit_bias([0, 900], [1, 1])|sequence_bias([[0], [0, 900]], [1, 1])|exponential_decay([0], 0, 1.1)"
  "|thinking_budget(5, [0], 3)|green_list()|tournament(1)"
)


@pytest.mark.parametrize("implementation", ["sort", "search"])
def test_degenerate_rows_stay_lawful_or_are_flagged(implementation):
  law = chain(*(by(each, implementation) for each in parse(HARD).transforms))
  nan, ban = np.nan, -np.inf
  logits = jnp.array([Z, [ban] * 6, [0, nan, 1, 2, 3, 4], [ban, ban, 7, ban, ban, ban], [3] * 6, [nan] * 6])
  found, is_broken = guarded(transformed(law, logits, empty(6)), logits)
  np.testing.assert_array_equal(is_broken, [False, True, True, False, False, True])
  probabilities = softmax(np.asarray(found))
  np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
  assert keep_sets(found)[0] == [0] and keep_sets(found)[3] == [2]


def test_a_truncation_does_not_hide_a_nan():
  text = "top_k(2)|top_p(0.5)|typical(0.5)|epsilon(0.2)|eta(0.2)|min_p(0.5)|top_n_sigma(1)|top_h(0.5)|mirostat_v2(1)"
  laws = [*parse(text).prepared().transforms, Temperature(0).prepared(), ThinkingBudget(1, [2], 0).prepared()]
  logits = jnp.array([[0, jnp.nan, 1, 2, 3, 4]])
  count = len(laws)
  for law, found in zip(laws, each_transformed(laws, [logits] * count, [context_of([[1]])] * count)):
    assert guarded(found, logits)[1].all(), law.name


def test_a_vocabulary_of_one_and_histories_beyond_it():
  context = context_of([[], [0], [5, 5, 0, 5, 5], [0] * 8], capacity=9)
  logits = transformed(parse(HARD.replace("|no_repeat_ngram(2)", "")).prepared(), jnp.zeros((4, 1)), context)
  assert np.isfinite(np.asarray(logits)).all()


@pytest.mark.parametrize("implementation", ["sort", "search"])
def test_ties_are_kept_or_dropped_together(implementation):
  random = np.random.default_rng(5)
  logits = np.round(random.normal(0, 2, (48, 200)) * 2).astype(np.float32) / 2
  logits[:, :20] = -np.inf
  counts, masses = random.integers(0, 220, 48), random.uniform(0, 1, 48).astype(np.float32)
  probs = softmax(logits.astype(np.float64))
  log_probs = np.log(probs, where=probs > 0, out=np.full(probs.shape, -np.inf))
  safe = np.where(probs > 0, log_probs, 0)
  entropies = -(probs * safe).sum(axis=1, keepdims=True)
  distances = np.round(np.abs(-log_probs - entropies), 9)
  above = logits[:, None, :] > logits[:, :, None]  # [row, token, exceeded by]
  nearer = distances[:, None, :] < distances[:, :, None]
  at_least = (logits[:, None, :] >= logits[:, :, None]) * probs[:, None, :]
  mass = at_least.sum(-1)
  grown = -(at_least * safe[:, None, :]).sum(-1) / mass + np.log(mass)
  live = logits > -np.inf
  wanted = {
    TopK: (counts, (above.sum(-1) < counts[:, None]) | (counts[:, None] == 0)),
    TopP: (masses, (above * probs[:, None, :]).sum(-1) < masses[:, None]),
    Typical: (masses, (nearer * probs[:, None, :]).sum(-1) < masses[:, None]),
    TopH: (masses, (grown <= masses[:, None] * entropies) | (logits == logits.max(1, keepdims=True))),
  }
  cases = [by(cls(values), implementation) for cls, (values, _) in wanted.items()]
  for cls, found in zip(wanted, each_transformed(cases, [logits] * 4, [empty(48)] * 4)):
    np.testing.assert_array_equal(np.asarray(found) > -np.inf, wanted[cls][1] & live, err_msg=cls.name)


def test_greedy_takes_the_lowest_id_of_equals():
  logits = jnp.array([[1.0, 3.0, 3.0], [3.0, -np.inf, 3.0]])
  assert keep_sets(transformed(Temperature(0).prepared(), logits, empty(2))) == [[1], [0]]


def test_rows_of_parameters_are_taken():
  law = chain(
    TopK([1, 2, 3]), TopP(0.5), AdaptiveTemperature([1, 2], [[1, 0], [0, 1], [0.5, 0.5]])
  ).prepared()
  taken = law.take(jnp.array([2, 2, 0, 1]))
  assert taken.transforms[0].k.tolist() == [3, 3, 1, 2] and taken.transforms[1].p == 0.5
  assert taken.transforms[2].probabilities.tolist() == [[0.5, 0.5], [0.5, 0.5], [1, 0], [0, 1]]
  assert GumbelWatermark(jnp.array([7, 8, 9], jnp.uint32)).take(jnp.array([2, 2])).keys_B.tolist() == [9, 9]


def test_thinking_ends_at_its_budget():
  other = 4
  prompts = [[START], [START], [0], [START, START], [START, other, 2], [START, other, 2, 3]]
  budgets = [2, -1, 0, 3, 2, 1]
  law = ThinkingBudget(START, END, budgets).prepared()
  context = context_of(prompts, [len(prompt) for prompt in prompts], capacity=12)
  logits = jnp.tile(jnp.where(jnp.arange(6) == other, 5.0, 0.0), (6, 1))
  state, said = law.init(context, 6), []
  for _ in range(6):
    tokens = jnp.argmax(applied(law, logits, state, context), axis=1).astype(jnp.int32)
    state, context = committed(law, state, tokens, context, logits)
    said.append(tokens)
  assert np.stack(said, 1).tolist() == [
    [4, 4, 2, 3, 4, 4],
    [4] * 6,
    [4] * 6,
    [4, 4, 2, 3, 4, 4],  # the second start is a token of thinking
    [3, 4, 4, 4, 4, 4],  # the first half of the end was said already
    [4] * 6,
  ]


def test_loops_are_found():
  random = np.random.default_rng(1)
  histories = [random.integers(0, 2, random.integers(0, 12)).tolist() for _ in range(300)]
  prompts = [min(len(history), int(random.integers(0, 4))) for history in histories]
  context = context_of(histories, prompts, capacity=12)

  def loops(tokens, most, repeats):
    periods = range(1, most + 1)
    return any(
      len(tokens) >= p * repeats and tokens[-p * repeats :] == tokens[-p:] * repeats for p in periods
    )

  for most, repeats in [(2, 3), (50, 2)]:
    wanted = [loops(history[count:], most, repeats) for history, count in zip(histories, prompts)]
    assert 0 < sum(wanted) < 300
    found = jax.jit(is_looping, static_argnums=(1, 2))(context, most, repeats)
    np.testing.assert_array_equal(found, wanted)
  assert not is_looping(context, 0, 2).any()


ROWS, LENGTH, SIZE = 6, 80, 40


@jax.jit
def written(law, sampler, logits_BV):
  """Returns texts drawn from one law through a transform, by a sampler or else by plain draws."""
  context = context_of([[]] * ROWS, capacity=LENGTH)

  def add(context, _):
    changed_BV = law.apply(logits_BV, law.init(context, SIZE), context)
    if sampler is None:
      tokens_B = jax.vmap(jax.random.categorical)(context.step_keys(), changed_BV)
    else:
      tokens_B = sampler.draw(changed_BV, context)
    return context.append(tokens_B), None

  return jax.lax.scan(add, context, length=LENGTH)[0]


MARKS = {
  "green list": GreenList(3.0, 0.25, np.arange(ROWS)),
  "tournament": Tournament(np.arange(ROWS), 2, 12),
  "gumbel": GumbelWatermark(jnp.arange(ROWS, dtype=jnp.uint32), 2),
}


@pytest.mark.parametrize("name", MARKS)
def test_marks_are_found_by_their_key_alone(name):
  is_sampler = name == "gumbel"
  mark = MARKS[name] if is_sampler else MARKS[name].prepared()
  logits = jnp.asarray(np.random.default_rng(2).normal(0, 1, (ROWS, SIZE)), jnp.float32)
  texts = written(chain() if is_sampler else mark, mark if is_sampler else None, logits)
  field = "keys_B" if is_sampler else "key"
  stranger = dataclasses.replace(mark, **{field: getattr(mark, field) + jnp.uint32(1000)})
  detect = jax.jit(lambda mark: mark.detect(texts.tokens_BS, texts.lengths_B))
  found, missed = detect(mark), detect(stranger)
  if is_sampler:
    assert (found[1] < 1e-6).all() and (missed[1] > 1e-3).all()
    found, missed = found[0], missed[0]
  assert (np.asarray(found) > 4).all() and (np.abs(np.asarray(missed)) < 4).all()


def test_a_repeated_mark_counts_once():
  texts = jnp.array([[1, 2, 3, 1, 2, 3, 1, 2, 3, 1], [1, 2, 3, 1, 0, 0, 0, 0, 0, 0]])
  texts, lengths = jnp.tile(texts, (2, 1)), jnp.array([10, 4, 1, 0])
  scores = jax.jit(GreenList.detect)(GreenList().prepared(), texts, lengths)
  assert scores[0] == scores[1] != 0
  assert scores[2:].tolist() == [0, 0]  # nothing comes before the first token


def test_mistakes_are_answered_by_name():
  for wrong, words in [
    (lambda: AllowedTokens([]).prepared(), "allowed_tokens.tokens"),
    (lambda: AllowedTokens([1.5]).prepared(), "allowed_tokens.tokens"),
    (lambda: AllowedTokens([-1]).prepared(), "0 or more"),
    (lambda: LogitBias([1, 2], [1, 2, 3]).prepared(), "3 for 2 tokens"),
    (lambda: SequenceBias([[1, 2], []], [1, 2]).prepared(), "sequence_bias.sequences"),
    (lambda: SequenceBias([[1, 2]], [1, 2]).prepared(), "one for each"),
    (lambda: Dry(0.8, breakers="\n").prepared(), "dry.breakers"),
    (lambda: ThinkingBudget(1, [2, 1], 5).prepared(), "contains the start"),
    (lambda: AdaptiveTemperature([1, 2], [1, 0, 0]).prepared(), "K=2"),
    (lambda: TopP(1.5).prepared(), "top_p.p"),
    (lambda: TopH(0.5, "papr").prepared(), "did you mean 'paper'"),
    (lambda: is_looping(empty(1), 3, 1), "repeats=1"),
  ]:
    with pytest.raises(ValueError, match=words):
      wrong()
