"""What is written: personas, in a small language whose law is known, or as JSON by a model of the world.

Every valid persona is as good as any other, so that a rule can score them and all that a
method does to diversity shows.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from nr.data.examples import Response
from nr.data.word_tokenizer import WordTokenizer
from nr.judges.protocol import Item, Judge, Rule
from nr.judges.verifiable import JsonObject
from nr.recipes.sampling_rounds import PoolPrompt
from nr.spec import Spec


class Task(Protocol):
  """What arms learn to write.

  Attributes:
    attributes: of a valid response, by name.
  """

  attributes: tuple[str, ...]

  def prompts(self) -> list[PoolPrompt]:
    """Returns the prompts that pools are drawn for."""
    ...

  def held_out(self) -> list[PoolPrompt]:
    """Returns the prompts that models are measured on."""
    ...

  def judge(self) -> Judge:
    """Returns the judge: 1 for a valid response, 0 for another."""
    ...

  def read(self, text: str) -> dict[str, str] | None:
    """Returns the attributes of a response; None of one that is not valid."""
    ...


@dataclasses.dataclass(frozen=True)
class PersonaWorld(Spec):
  """Personas "{ name_3 city_0 job_17 }" in a language of words.

  Attributes:
    num_values: values of each attribute.
    exponent: value number r (from 1) has a share proportional to r^-exponent in pre-training.
    malformed: share of pre-training texts that are not valid: two fields swapped, one
      missing, or the closing bracket missing.
  """

  num_values: int = 40
  exponent: float = 1.3
  malformed: float = 0.12

  attributes = ("name", "city", "job")
  prompt = "persona"

  def __post_init__(self):
    if self.num_values < 2:
      raise ValueError(f"task.num_values={self.num_values}: give at least 2")
    if not 0 <= self.malformed < 1:
      raise ValueError(f"task.malformed={self.malformed}: give a share from 0 to below 1")

  def tokenizer(self) -> WordTokenizer:
    """Returns the tokenizer of the language."""
    values = [value for attribute in self.attributes for value in self.values(attribute)]
    return WordTokenizer([self.prompt, "{", "}", *values])

  def values(self, attribute: str) -> list[str]:
    """Returns the values of an attribute."""
    return [f"{attribute}_{number}" for number in range(self.num_values)]

  def prompts(self) -> list[PoolPrompt]:
    """Returns the one prompt."""
    return [PoolPrompt("persona", self.prompt)]

  def held_out(self) -> list[PoolPrompt]:
    """Returns the same one: there is no other."""
    return self.prompts()

  def judge(self) -> Judge:
    """Returns the rule: 1 for a valid persona."""
    return Rule(lambda item: self.read(item.response) is not None, "a well-formed persona")

  def read(self, text: str) -> dict[str, str] | None:
    """Returns the attributes of a text; None if a field is missing, too many, or in the wrong place."""
    words = text.split(" ")
    if len(words) != len(self.attributes) + 2 or (words[0], words[-1]) != ("{", "}"):
      return None
    found = dict(zip(self.attributes, words[1:-1]))
    is_valid = all(value.startswith(f"{attribute}_") for attribute, value in found.items())
    return found if is_valid else None

  def corpus(self, count: int, seed: int) -> Iterator[Response]:
    """Yields what the model is pre-trained on."""
    draws = np.random.default_rng([seed, 0xD1F0])
    shares = np.arange(1, self.num_values + 1) ** -self.exponent
    shares /= shares.sum()
    for number in range(count):
      words = [str(draws.choice(self.values(attribute), p=shares)) for attribute in self.attributes]
      words = ["{", *words, "}"]
      if draws.random() < self.malformed:
        words = _spoiled(words, draws)
      yield Response(str(number), self.prompt, " ".join(words))


def _spoiled(words: list[str], draws: np.random.Generator) -> list[str]:
  """Returns a persona with one mistake."""
  kind = draws.integers(3)
  if kind == 0:
    first, second = draws.choice(np.arange(1, len(words) - 1), 2, replace=False)
    words[first], words[second] = words[second], words[first]
    return words
  if kind == 1:
    del words[int(draws.integers(1, len(words) - 1))]
    return words
  return words[:-1]


@dataclasses.dataclass(frozen=True)
class JsonPersonas(Spec):
  """Personas as JSON objects; the paper's task in shape, the prompt is ours.

  Attributes:
    instruction: what is asked.
    attributes: keys that must be there, each with a text that is not empty.
  """

  instruction: str = (
    "Make up a person. Answer with one JSON object and nothing else, with the keys first_name, city and "
    "occupation, each a short text."
  )
  attributes: tuple[str, ...] = ("first_name", "city", "occupation")

  def prompts(self) -> list[PoolPrompt]:
    """Returns the one prompt, a user's turn."""
    return [_asked("persona", self.instruction)]

  def held_out(self) -> list[PoolPrompt]:
    """Returns the same one: there is no other."""
    return self.prompts()

  def judge(self) -> Judge:
    """Returns the rule: 1 for a JSON object with these keys."""
    return Rule(lambda item: self.read(item.response) is not None, "a JSON object with the keys")

  def read(self, text: str) -> dict[str, str] | None:
    """Returns the attributes of a text; None if it is no such object."""
    judged = JsonObject(dict.fromkeys(self.attributes, str), is_closed=False).judge([Item("", "", text)])[0]
    if not judged.score:
      return None
    values = {attribute: judged.details["object"][attribute].strip() for attribute in self.attributes}
    return values if all(values.values()) else None


@dataclasses.dataclass(frozen=True)
class ShortAnswers(Spec):
  """Questions with many right answers of a form that a regular expression says; the task is ours.

  Attributes:
    template: of an instruction, with a slot {subject}.
    subjects: that models are trained on.
    held_out_subjects: that they are measured on.
    pattern: of a whole valid answer, spaces around it taken off.
    examples: (subject, answer) pairs, shown as earlier turns of the chat: small models see
      the form of an answer better than they read of it. Their subjects are neither trained
      nor measured on.
  """

  template: str
  subjects: tuple[str, ...]
  held_out_subjects: tuple[str, ...]
  pattern: str
  examples: tuple[tuple[str, str], ...] = ()

  attributes = ("answer",)

  def __post_init__(self):
    if "{subject}" not in self.template:
      raise ValueError(f"task.answers.template={self.template!r}: it has no slot {{subject}}")
    if not self.subjects or not self.held_out_subjects:
      raise ValueError("task.answers: give subjects and held_out_subjects")
    shown = tuple(subject for subject, _ in self.examples)
    named = {"subjects": self.subjects, "held_out_subjects": self.held_out_subjects, "examples": shown}
    for first, second in itertools.combinations(named, 2):
      both = set(named[first]) & set(named[second])
      if both:
        raise ValueError(f"task.answers: {sorted(both)[0]!r} is in {first} and in {second}")
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise ValueError(f"task.answers.pattern={self.pattern!r}: {error}") from error
    for _, answer in self.examples:
      if self.read(answer) is None:
        raise ValueError(f"task.answers.examples: {answer!r} is not of the form of task.answers.pattern")

  def prompts(self) -> list[PoolPrompt]:
    """Returns a question for each subject of training."""
    return [self._question(subject) for subject in self.subjects]

  def held_out(self) -> list[PoolPrompt]:
    """Returns a question for each subject that is kept back."""
    return [self._question(subject) for subject in self.held_out_subjects]

  def judge(self) -> Judge:
    """Returns the rule: 1 for an answer of the form."""
    return Rule(lambda item: self.read(item.response) is not None, "an answer of the form")

  def read(self, text: str) -> dict[str, str] | None:
    """Returns the answer, case and a full stop at its end left out; None if it has another form."""
    answer = text.strip()
    return {"answer": answer.rstrip(".").lower()} if re.fullmatch(self.pattern, answer) else None

  def _question(self, subject: str) -> PoolPrompt:
    turns = []
    for shown, answer in self.examples:
      turns += [_turn("user", self.template.format(subject=shown)), _turn("assistant", answer)]
    return PoolPrompt(subject, (*turns, _turn("user", self.template.format(subject=subject))))


def _turn(role: str, content: str) -> dict[str, str]:
  return {"role": role, "content": content}


def _asked(id: str, instruction: str) -> PoolPrompt:
  return PoolPrompt(id, (_turn("user", instruction),))


TASKS = {"world": PersonaWorld, "json": JsonPersonas, "answers": ShortAnswers}
