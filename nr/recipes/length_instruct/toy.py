"""A small world in which lengths can be asked for: topics, their words, and limits that mean nothing at first.

A prompt is "topic_3 :", with a limit in front "limit_5 topic_3 :"; an answer is words. Quality is
the number of different words of the topic, so that longer answers are better: the bias towards
length is built in. The model of the world is pre-trained on answers of its own length, with
limits in a few prompts that nobody obeys.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from nr.data.examples import Response
from nr.data.word_tokenizer import WordTokenizer
from nr.judges.protocol import Item, Rule
from nr.recipes.length_instruct.augmentation import LiftSpec
from nr.spec import Spec


@dataclasses.dataclass(frozen=True)
class World(Spec):
  """Sizes of the world.

  Attributes:
    num_topics: topics.
    num_words: words of answers.
    relevant: words of each topic; neighbouring topics share some.
    mean_words: mean length of an answer in pre-training.
    std_words: its standard deviation.
    max_words: longest answer.
    max_limit: largest limit that has a token.
    relevant_share: probability that a word is one of the topic's.
    limited_share: share of pre-training prompts with a limit, drawn at random and not obeyed.
  """

  num_topics: int = 8
  num_words: int = 24
  relevant: int = 8
  mean_words: float = 8.0
  std_words: float = 3.0
  max_words: int = 14
  max_limit: int = 16
  relevant_share: float = 0.5
  limited_share: float = 0.05

  def __post_init__(self):
    for field in ("num_topics", "max_words", "max_limit", "relevant"):
      if getattr(self, field) < 1:
        raise ValueError(f"world.{field}={getattr(self, field)}: give at least 1")
    if self.relevant >= self.num_words:
      raise ValueError(f"world.relevant={self.relevant}: give fewer than world.num_words={self.num_words}")

  def tokenizer(self) -> WordTokenizer:
    """Returns the tokenizer of the world's language."""
    limits = [f"limit_{limit}" for limit in range(1, self.max_limit + 1)]
    topics = [f"topic_{topic}" for topic in range(self.num_topics)]
    return WordTokenizer([*limits, *topics, ":", *self.words])

  @property
  def words(self) -> list[str]:
    """Words of answers."""
    return [f"w{number}" for number in range(self.num_words)]

  @property
  def instructions(self) -> list[str]:
    """The prompt of each topic, without a limit."""
    return [f"topic_{topic} :" for topic in range(self.num_topics)]

  def relevant_words(self, topic: int) -> list[str]:
    """Returns the words of a topic."""
    start = topic * self.num_words // self.num_topics
    return [self.words[(start + place) % self.num_words] for place in range(self.relevant)]

  def quality(self, instruction: str, response: str) -> int:
    """Returns how many different words of its topic a response has."""
    topic = int(
      next(word for word in instruction.split(" ") if word.startswith("topic_")).removeprefix("topic_")
    )
    return len(set(response.split(" ")) & set(self.relevant_words(topic)))

  def judge(self) -> Rule:
    """Returns the judge of quality."""
    return Rule(lambda item: self.quality(item.prompt, item.response), "different words of the topic")

  def qualities(self, instructions: list[str], responses: list[str]) -> list[float]:
    """Returns the quality of each response."""
    items = [
      Item(str(number), *each) for number, each in enumerate(zip(instructions, responses, strict=True))
    ]
    return [each.score for each in self.judge().judge(items)]

  def corpus(self, count: int, seed: int, spec: LiftSpec) -> Iterator[Response]:
    """Yields what the model is pre-trained on.

    Args:
      count: answers.
      seed: of the draws.
      spec: how a limit is put into a prompt.
    """
    draws = np.random.default_rng([seed, 0x11F7])
    for number in range(count):
      topic = int(draws.integers(self.num_topics))
      own = self.relevant_words(topic)
      others = [word for word in self.words if word not in own]
      length = int(np.clip(np.rint(draws.normal(self.mean_words, self.std_words)), 1, self.max_words))
      is_own = draws.random(length) < self.relevant_share
      words = [str(draws.choice(own if relevant else others)) for relevant in is_own]
      prompt = self.instructions[topic]
      if draws.random() < self.limited_share:
        prompt = spec.render(prompt, int(draws.integers(1, self.max_limit + 1)))
      yield Response(str(number), prompt, " ".join(words))
