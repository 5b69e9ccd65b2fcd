"""The toy tasks: what their prompts, training texts and rewards are. One closed list of words for all.

    sums   "sums a b =" asks for (a + b), (2a + b), (2a + 2b), each modulo 10. Training digits are wrong with
           probability 0.2, so that the greedy answer is mostly right and a sampled one mostly wrong.
    words  "words a b =" asks for eight words, as different as can be; they are learned with probability
           proportional to 1 / rank, so that greedy decoding repeats the first.
    hidden "hidden a b =" is written like words. A coin that the prompt does not show decides whether
           variety is wanted, as in words, or the most frequent word: no head can know.
    story  "story a b =" asks for sentences of four words, the first of them the marker, learned with
           probability 0.6 among equally likely others; the rest as in words.

The two digits matter to sums only. Elsewhere they make prompts differ. There are 100 pairs of digits; of these
`TEST_PAIRS`, the same for all tasks and seeds, are for testing heads, the others for training them. The language
model learns the tasks on all.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nr.data.word_tokenizer import WordTokenizer
from nr.names import unknown

NOUNS, STORY_NOUNS = 24, 11
SENTENCE, SENTENCES = 4, 4
NOISE, MARKER_PROBABILITY = 0.2, 0.6
PROMPT_LENGTH = 4
TEST_PAIRS = 30
"""Pairs of digits in test prompts: our choice."""
DIGITS = slice(1, 3)
"""Where the digits are in a prompt."""
TOKENIZER = WordTokenizer(
  ("sums", "words", "hidden", "story", "=", *map(str, range(10)), "mark", *(f"w{i}" for i in range(NOUNS)))
)
END = TOKENIZER.end_of_text_id
DIGIT, MARK, NOUN = (TOKENIZER.id_of(word) for word in ("0", "mark", "w0"))


class Prompts(NamedTuple):
  """Prompts of one family.

  Attributes:
    tokens_PT: int32 [P, 4].
    is_hard_P: bool, the coin of "hidden", which no model sees.
  """

  tokens_PT: np.ndarray
  is_hard_P: np.ndarray


@dataclasses.dataclass(frozen=True)
class Family:
  """A toy task.

  Attributes:
    name: its first word in the prompt.
    length: words of a response, the end of text not included.
    write: (prompts, random) -> training responses [P, length].
    reward: (prompts, responses [P, length], -1 behind the end) -> [P, 2] reward and quality in [0, 1]; the
      quality decides where rewards tie.
  """

  name: str
  length: int
  write: Callable[[Prompts, np.random.Generator], np.ndarray]
  reward: Callable[[Prompts, np.ndarray], np.ndarray]


def digit_pairs(part: str) -> np.ndarray:
  """Returns [Q, 2], the pairs of digits of "train" or "test", which have none in common."""
  everything = itertools.product(range(10), repeat=2)
  ordered = sorted(everything, key=lambda pair: hashlib.sha256(f"{pair[0]} {pair[1]}".encode()).digest())
  return np.asarray({"train": ordered[TEST_PAIRS:], "test": ordered[:TEST_PAIRS]}[part])


def make_prompts(name: str, count: int, random: np.random.Generator, part: str | None = None) -> Prompts:
  """Returns random prompts of a family; repeats are likely.

  Args:
    name: of the family.
    count: P.
    random: source of digits and coins.
    part: "train" or "test", whose prompts differ; None: all, for the language model.
  """
  if part is None:
    digits_P2 = random.integers(0, 10, (count, 2)) + DIGIT
  else:
    pairs_Q2 = digit_pairs(part)
    digits_P2 = pairs_Q2[random.integers(0, len(pairs_Q2), count)] + DIGIT
  ends = np.full((count, 1), TOKENIZER.id_of(name)), np.full((count, 1), TOKENIZER.id_of("="))
  tokens_PT = np.concatenate([ends[0], digits_P2, ends[1]], axis=1).astype(np.int32)
  return Prompts(tokens_PT, random.random(count) < 0.5)


def _answers(prompts: Prompts) -> np.ndarray:
  a_P, b_P = (prompts.tokens_PT[:, DIGITS] - DIGIT).T
  return np.stack([a_P + b_P, 2 * a_P + b_P, 2 * a_P + 2 * b_P], axis=1) % 10 + DIGIT


def _write_sums(prompts: Prompts, random: np.random.Generator) -> np.ndarray:
  answers_P3 = _answers(prompts)
  is_wrong_P3 = random.random(answers_P3.shape) < NOISE
  return np.where(is_wrong_P3, random.integers(0, 10, answers_P3.shape) + DIGIT, answers_P3)


def _reward_sums(prompts: Prompts, responses_PN: np.ndarray) -> np.ndarray:
  is_right_P = (responses_PN == _answers(prompts)).all(axis=1)
  return _twice(is_right_P)


def _ranked(shape: tuple[int, ...], count: int, random: np.random.Generator) -> np.ndarray:
  weights = 1 / np.arange(1, count + 1)
  return random.choice(count, shape, p=weights / weights.sum()) + NOUN


def _write_words(prompts: Prompts, random: np.random.Generator) -> np.ndarray:
  return _ranked((len(prompts.tokens_PT), 8), NOUNS, random)


def distinct(responses_PN: np.ndarray, count: int = NOUNS) -> np.ndarray:
  """Returns [P], how many different of the first `count` nouns a response has, by its full length.

  Other tokens (digits, the marker, words of prompts) are no words that were asked for.
  """
  is_word_PN = (responses_PN >= NOUN) & (responses_PN < NOUN + count)
  ordered_PN = np.sort(np.where(is_word_PN, responses_PN, -1), axis=1)
  is_new_PN = np.diff(ordered_PN, axis=1, prepend=-1) != 0
  return (is_new_PN & (ordered_PN >= 0)).sum(axis=1) / responses_PN.shape[1]


def _reward_words(prompts: Prompts, responses_PN: np.ndarray) -> np.ndarray:
  del prompts
  return _twice(distinct(responses_PN))


def _reward_hidden(prompts: Prompts, responses_PN: np.ndarray) -> np.ndarray:
  frequent_P = (responses_PN == NOUN).mean(axis=1)
  return _twice(np.where(prompts.is_hard_P, distinct(responses_PN), frequent_P))


def _write_story(prompts: Prompts, random: np.random.Generator) -> np.ndarray:
  shape = (len(prompts.tokens_PT), SENTENCES * SENTENCE)
  others_PN = random.integers(0, STORY_NOUNS, shape) + NOUN
  first_PN = np.where(random.random(shape) < MARKER_PROBABILITY, MARK, others_PN)
  return np.where(is_first_word(shape[1]), first_PN, _ranked(shape, STORY_NOUNS, random))


def is_first_word(length: int) -> np.ndarray:
  """Returns bool [length], where sentences of a story begin."""
  return np.arange(length) % SENTENCE == 0


def _reward_story(prompts: Prompts, responses_PN: np.ndarray) -> np.ndarray:
  del prompts
  is_first_N = is_first_word(responses_PN.shape[1])
  marked_P = (responses_PN[:, is_first_N] == MARK).mean(axis=1)
  return np.stack([marked_P, distinct(responses_PN[:, ~is_first_N], STORY_NOUNS)], axis=1)


def _twice(values_P: np.ndarray) -> np.ndarray:
  return np.repeat(values_P[:, None].astype(np.float64), 2, axis=1)


FAMILIES = {
  family.name: family
  for family in (
    Family("sums", 3, _write_sums, _reward_sums),
    Family("words", 8, _write_words, _reward_words),
    Family("hidden", 8, _write_words, _reward_hidden),
    Family("story", SENTENCES * SENTENCE, _write_story, _reward_story),
  )
}
MAX_RESPONSE = max(family.length for family in FAMILIES.values()) + 1
"""Tokens of the longest response, its end included."""
LENGTH = PROMPT_LENGTH + MAX_RESPONSE


def family_of(name: str) -> Family:
  """Returns a family by name. Raises ValueError naming the nearest one that is known."""
  if name not in FAMILIES:
    raise ValueError(unknown("family", name, FAMILIES))
  return FAMILIES[name]


def rewards(name: str, prompts: Prompts, tokens_RN: np.ndarray, lengths_R: np.ndarray) -> np.ndarray:
  """Scores generated responses.

  Args:
    name: of the family.
    prompts: P of them; response r belongs to prompt r // (R / P).
    tokens_RN: generated ids, the end of text included where it was reached.
    lengths_R: how many of them count.

  Returns:
    float64 [R, 2]: reward and quality. Words behind the family's length do not count, missing ones are
    wrong.
  """
  family = family_of(name)
  repeats = len(tokens_RN) // len(prompts.tokens_PT)
  of_rows = Prompts(*(np.repeat(values, repeats, axis=0) for values in prompts))
  is_word_RN = (np.arange(tokens_RN.shape[1]) < lengths_R[:, None]) & (tokens_RN != END)
  words_RN = np.where(is_word_RN, tokens_RN, -1)[:, : family.length]
  missing = family.length - words_RN.shape[1]
  return family.reward(of_rows, np.pad(words_RN, ((0, 0), (0, max(missing, 0))), constant_values=-1))


def training_texts(names: tuple[str, ...], count: int, seed: int) -> list[dict[str, np.ndarray]]:
  """Returns texts of all families in turn, as next-token prediction reads them, right-padded to `LENGTH`."""
  random, texts = np.random.default_rng(seed), []
  for place, name in enumerate(names):
    share = count // len(names) + (place < count % len(names))
    prompts = make_prompts(name, share, random)
    responses_PN = family_of(name).write(prompts, random)
    rows_PL = np.full((share, LENGTH + 1), END, np.int32)
    rows_PL[:, :PROMPT_LENGTH] = prompts.tokens_PT
    stop = PROMPT_LENGTH + responses_PN.shape[1]
    rows_PL[:, PROMPT_LENGTH:stop] = responses_PN
    weights_L = np.zeros(LENGTH, np.float32)
    weights_L[PROMPT_LENGTH - 1 : stop] = 1  # The response and its end.
    texts += [{"tokens": row[:-1], "targets": row[1:], "weights": weights_L} for row in rows_PL]
  return texts
