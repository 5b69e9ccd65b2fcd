"""Random laws and histories against the processors of `transformers`, live."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra [oracles])")
pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
from transformers.generation import logits_process as hf  # noqa: E402

from nr.generation.transforms import (  # noqa: E402
  BadWords,
  Epsilon,
  Eta,
  ExponentialDecay,
  ForcedTokens,
  MaxLength,
  MinLength,
  MinP,
  NoRepeatNgram,
  RepetitionPenalty,
  SequenceBias,
  SuppressTokens,
  Temperature,
  TopH,
  TopK,
  TopP,
  Typical,
  chain,
  from_settings,
)
from tests.generation.transform_cases import by, context_of, each_transformed, transformed  # noqa: E402

pytestmark = pytest.mark.oracle

ROWS, V, LENGTH, PROMPT = 256, 50, 24, 10
_random = np.random.default_rng(3)
Z = _random.normal(0, 2.5, (ROWS, V)).astype(np.float32)
HISTORY = _random.integers(0, 8, (ROWS, LENGTH)).astype(np.int32)
CONTEXT = context_of(HISTORY.tolist(), prompts=PROMPT)
BIASES = {(3,): 1.5, (9,): -2.0, (2, 5): 4.0, (1, 7): -1.0, (4, 1, 6): 3.0}
WORDS = [[3], [2, 5], [1, 4, 6], [40]]

TRUNCATIONS = {
  "top_k": (TopK(7), lambda: hf.TopKLogitsWarper(7)),
  "top_k, at least 9": (TopK(7, 9), lambda: hf.TopKLogitsWarper(7, min_tokens_to_keep=9)),
  "top_p": (TopP(0.8), lambda: hf.TopPLogitsWarper(0.8)),
  "top_p, at least 4": (TopP(0.3, 4), lambda: hf.TopPLogitsWarper(0.3, min_tokens_to_keep=4)),
  "min_p": (MinP(0.1), lambda: hf.MinPLogitsWarper(0.1)),
  "min_p, at least 4": (MinP(0.5, 4), lambda: hf.MinPLogitsWarper(0.5, min_tokens_to_keep=4)),
  "typical": (Typical(0.7), lambda: hf.TypicalLogitsWarper(0.7)),
  "typical, at least 4": (Typical(0.2, 4), lambda: hf.TypicalLogitsWarper(0.2, min_tokens_to_keep=4)),
  "epsilon": (Epsilon(0.03), lambda: hf.EpsilonLogitsWarper(0.03)),
  "epsilon, at least 4": (Epsilon(0.3, 4), lambda: hf.EpsilonLogitsWarper(0.3, min_tokens_to_keep=4)),
  "eta": (Eta(0.05), lambda: hf.EtaLogitsWarper(0.05)),
  "top_h": (TopH(0.4, "hf"), lambda: hf.TopHLogitsWarper(0.4)),
}
OTHERS = {
  "temperature": (Temperature(0.7), lambda: hf.TemperatureLogitsWarper(0.7)),
  "repetition": (RepetitionPenalty(1.3), lambda: hf.RepetitionPenaltyLogitsProcessor(1.3)),
  "repetition of what was generated": (
    RepetitionPenalty(1.3, "generated"),
    lambda: hf.RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=PROMPT),
  ),
  "bigrams": (NoRepeatNgram(2), lambda: hf.NoRepeatNGramLogitsProcessor(2)),
  "trigrams": (NoRepeatNgram(3), lambda: hf.NoRepeatNGramLogitsProcessor(3)),
  "unigrams": (NoRepeatNgram(1), lambda: hf.NoRepeatNGramLogitsProcessor(1)),
  "sequence bias": (
    SequenceBias(list(BIASES), list(BIASES.values())),
    lambda: hf.SequenceBiasLogitsProcessor(BIASES),
  ),
  "bad words": (BadWords(WORDS), lambda: hf.NoBadWordsLogitsProcessor(WORDS)),
  "minimum of new tokens": (
    MinLength([7, 8], 15),
    lambda: hf.MinNewTokensLengthLogitsProcessor(PROMPT, 15, [7, 8]),
  ),
  "minimum of new tokens, reached": (
    MinLength([7, 8], 14),
    lambda: hf.MinNewTokensLengthLogitsProcessor(PROMPT, 14, [7, 8]),
  ),
  "minimum of tokens": (MinLength([7, 8], 25, "all"), lambda: hf.MinLengthLogitsProcessor(25, [7, 8])),
  "forced end": (MaxLength([7, 8], 25, "all"), lambda: hf.ForcedEOSTokenLogitsProcessor(25, [7, 8])),
  "forced beginning": (ForcedTokens([7], 1, "all"), lambda: hf.ForcedBOSTokenLogitsProcessor(7)),
  "suppressed": (SuppressTokens([7, 8]), lambda: hf.SuppressTokensLogitsProcessor([7, 8])),
  "exponential decay": (
    ExponentialDecay([7, 8], 3, 1.1),
    lambda: hf.ExponentialDecayLengthPenalty((3, 1.1), [7, 8], PROMPT),
  ),
}


def theirs(processors, logits=Z, history=HISTORY):
  scores = torch.tensor(logits)
  for processor in processors:
    scores = processor(torch.tensor(history, dtype=torch.int64), scores)
  return scores.numpy()


def agree(found, wanted):
  found = np.asarray(found)
  np.testing.assert_array_equal(found == -np.inf, wanted == -np.inf)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@functools.cache
def ours():
  """Returns what all transforms make of the same logits, by name and implementation."""
  cases = {(name, way): by(pair[0], way) for name, pair in TRUNCATIONS.items() for way in ("sort", "search")}
  cases |= {name: pair[0].prepared() for name, pair in OTHERS.items()}
  count = len(cases)
  return dict(zip(cases, each_transformed(list(cases.values()), [Z] * count, [CONTEXT] * count)))


@pytest.mark.parametrize("implementation", ["sort", "search"])
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncations(name, implementation):
  wanted = theirs([TRUNCATIONS[name][1]()])
  assert (wanted == -np.inf).any() and (wanted > -np.inf).any(axis=1).all()
  agree(ours()[name, implementation], wanted)


@pytest.mark.parametrize("name", OTHERS)
def test_other_processors(name):
  agree(ours()[name], theirs([OTHERS[name][1]()]))


def test_top_h_looks_at_a_hundred_tokens():
  logits = _random.normal(0, 1, (32, 150)).astype(np.float32)
  wanted = theirs([hf.TopHLogitsWarper(0.95)], logits, HISTORY[:32])
  context = context_of(HISTORY[:32].tolist())
  laws = [by(TopH(0.95, "hf"), way) for way in ("sort", "search")]
  for found in each_transformed(laws, [logits] * 2, [context] * 2):
    agree(found, wanted)


def test_forced_beginning_and_suppression_at_the_beginning():
  history = HISTORY[:, :1]
  context = context_of(history.tolist(), prompts=1)
  forced, suppressed = ForcedTokens([7], 1, "all").prepared(), SuppressTokens([7, 8], 1).prepared()
  agree(transformed(forced, Z, context), theirs([hf.ForcedBOSTokenLogitsProcessor(7)], history=history))
  wanted = theirs([hf.SuppressTokensAtBeginLogitsProcessor([7, 8], 1)], history=history)
  agree(transformed(suppressed, Z, context), wanted)
  np.testing.assert_array_equal(transformed(suppressed, Z, CONTEXT), Z)


def test_settings_make_the_same_chain():
  made = from_settings(
    dict(
      top_p=0.9,
      temperature=0.8,
      repetition_penalty=1.2,
      top_k=20,
      no_repeat_ngram_size=3,
      min_p=0.02,
      typical_p=0.95,
      top_h=0.9,
      bad_words_ids=WORDS,
      min_new_tokens=20,
      eos_token_id=[7, 8],
      do_sample=True,
      max_new_tokens=30,
    )
  )
  processors = [
    hf.RepetitionPenaltyLogitsProcessor(1.2),
    hf.NoRepeatNGramLogitsProcessor(3),
    hf.NoBadWordsLogitsProcessor(WORDS, [7, 8]),
    hf.MinNewTokensLengthLogitsProcessor(PROMPT, 20, [7, 8]),
    hf.TemperatureLogitsWarper(0.8),
    hf.TopHLogitsWarper(0.9),
    hf.TopKLogitsWarper(20),
    hf.TopPLogitsWarper(0.9),
    hf.MinPLogitsWarper(0.02),
    hf.TypicalLogitsWarper(0.95),
  ]
  assert len(made.transforms) == len(processors)
  agree(transformed(chain(*(each.prepared() for each in made.transforms)), Z, CONTEXT), theirs(processors))
