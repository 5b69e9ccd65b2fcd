"""How much texts differ: of a whole pool, of each text from the others, and of attributes.

`METRICS` says which way each number points. Compare pools of equal size, and texts of
equal length or the normalised numbers: all of them depend on both.
"""

import gzip
import itertools
import math
import statistics
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain_words(text: str) -> list[str]:
  """Returns the words of a text: lower-cased, ASCII punctuation taken off, split at spaces.

  Source: _diversity_metrics.py of fairseq2's branch online_training (arXiv 2501.18101).
  """
  return text.lower().translate(_NO_PUNCTUATION).split()


def unique_words(texts: Sequence[str]) -> int:
  """Returns how many different words the texts have together ("unique 1-grams")."""
  return len(set().union(*map(plain_words, texts)))


def unique_words_share(texts: Sequence[str]) -> float | None:
  """Returns the number of different words over the number of words, in 0..1; None without a word."""
  words = [word for text in texts for word in plain_words(text)]
  return len(set(words)) / len(words) if words else None


def compression_ratio(texts: Sequence[str]) -> float | None:
  """Returns bytes before over bytes after gzip of the texts, one a line; None without text.

  LOWER is more diverse. Source: arXiv 2403.00553. The authors' code of DivPO has the
  inverse (after over before), where higher is more diverse.
  """
  raw = "\n".join(texts).encode("utf-8", "surrogatepass")
  return len(raw) / len(gzip.compress(raw, mtime=0)) if raw else None


def self_bleu(texts: Sequence[str]) -> float | None:
  """Returns the mean sentence-BLEU over all unordered pairs, in 0..1; None for fewer than two texts.

  The earlier text of a pair is the hypothesis. LOWER is more diverse. BLEU up to 4-grams over
  words at spaces, smoothed by method 4 of Chen and Cherry (2014), as in the authors' code.
  Ours, since sacrebleu lacks method 4; held to NLTK's where that is installed.
  """
  pairs = list(itertools.combinations([text.split() for text in texts], 2))
  return statistics.fmean(sentence_bleu(*pair) for pair in pairs) if pairs else None


def sentence_bleu(hypothesis: Sequence[str], reference: Sequence[str], order: int = 4) -> float:
  """Returns the BLEU of one text against another, in 0..1, with smoothing method 4.

  A precision without a match counts 1 / (2^k * 5 / ln(length)) matches, k the number of such so
  far; of a hypothesis of one word such precisions are left out. Source: NLTK's SmoothingFunction.method4.
  """
  if not hypothesis:
    return 0.0
  grams = [
    [Counter(zip(*(words[i:] for i in range(n)))) for words in (hypothesis, reference)]
    for n in range(1, order + 1)
  ]
  matches = [sum((mine & its).values()) for mine, its in grams]
  totals = [max(1, len(hypothesis) - n) for n in range(order)]
  if matches[0] == 0:
    return 0.0
  missing, logs = 0, []
  for match, total in zip(matches, totals):
    precision = match / total
    if match == 0:
      if len(hypothesis) == 1:
        continue
      missing += 1
      precision = 1 / (2**missing * 5 / math.log(len(hypothesis))) / total
    logs.append(math.log(precision))
  brevity = min(1.0, math.exp(1 - len(reference) / len(hypothesis)))
  return brevity * math.exp(sum(logs) / order)


def sequence_entropy(log_probs: Sequence[Sequence[float]]) -> float | None:
  """Returns the mean negative log-probability of a text in nats, a Monte-Carlo estimate of the entropy.

  Args:
    log_probs: nats of each token of each text under the law that it was drawn from.
  """
  return -statistics.fmean(math.fsum(each) for each in log_probs) if log_probs else None


def token_entropy(log_probs: Sequence[Sequence[float]]) -> float | None:
  """Returns the mean over texts of the mean negative log-probability of a token, in nats."""
  means = [math.fsum(each) / len(each) for each in log_probs if len(each)]
  return -statistics.fmean(means) if means else None


class Metric(NamedTuple):
  """A number of a pool.

  Attributes:
    function: of the texts.
    more_diverse: "higher" or "lower".
  """

  function: Callable[[Sequence[str]], float | None]
  more_diverse: str


METRICS = {
  "unique_words": Metric(unique_words, "higher"),
  "unique_words_share": Metric(unique_words_share, "higher"),
  "compression_ratio": Metric(compression_ratio, "lower"),
  "self_bleu": Metric(self_bleu, "lower"),
}


def pool_metrics(texts: Sequence[str]) -> dict[str, float | None]:
  """Returns every metric of a pool of texts by name."""
  return {name: metric.function(texts) for name, metric in METRICS.items()}


def frequency_diversity(texts: Sequence[str]) -> np.ndarray:
  """Returns float64 [N], of each text minus the mean over its different words of the share of texts with it.

  Higher is rarer; -1 where every text has every word. A text without words gets NaN: it cannot
  be compared. Source: divpo D_freq; the paper's formula is not public, this one is our choice:
  documents, not occurrences, are counted so that repeating a word does not pay.
  """
  sets = [set(plain_words(text)) for text in texts]
  counts = Counter(word for words in sets for word in words)
  shares = [
    statistics.fmean(counts[word] for word in words) / len(sets) if words else math.nan for words in sets
  ]
  return -np.array(shares, np.float64)


def jaccard_diversity(texts: Sequence[str]) -> np.ndarray:
  """Returns float64 [N], the mean Jaccard distance of each text's words to those of the others, in 0..1.

  Higher is more diverse. Two texts without words are at distance 0; a text alone gets NaN.
  """
  sets = [set(plain_words(text)) for text in texts]

  def distance(one: set, other: set) -> float:
    return 1 - len(one & other) / len(one | other) if one | other else 0.0

  found = [
    [distance(one, other) for place, other in enumerate(sets) if place != number]
    for number, one in enumerate(sets)
  ]
  return np.array([statistics.fmean(each) if each else math.nan for each in found], np.float64)


class AttributeStatistics(NamedTuple):
  """How the values of one attribute are spread over generations.

  Attributes:
    count: generations.
    uniqueness: different values over generations, in 0..1.
    top_share: share of the most frequent value, in 0..1.
    top_value: that value.
    entropy: of the values, in nats.
  """

  count: int
  uniqueness: float
  top_share: float
  top_value: Any
  entropy: float


def attribute_statistics(
  objects: Sequence[Mapping[str, Any]], attributes: Sequence[str]
) -> dict[str, AttributeStatistics]:
  """Returns the statistics of each attribute; give valid generations only.

  Args:
    objects: what was generated, such as {"name": "Ann", "city": "Oslo"}.
    attributes: which keys.

  Raises:
    ValueError: nothing was generated, or an attribute is missing in some.
  """
  if not objects:
    raise ValueError("attribute_statistics: there are no objects; give the valid generations")
  found = {}
  for name in attributes:
    if any(name not in each for each in objects):
      raise ValueError(f"attribute {name!r} is missing in some objects; give the valid generations only")
    counts = Counter(str(each[name]) for each in objects)
    (top, number), total = counts.most_common(1)[0], len(objects)
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    found[name] = AttributeStatistics(total, len(counts) / total, number / total, top, entropy)
  return found


def frequency_of_attributes(objects: Sequence[Mapping[str, Any]], attributes: Sequence[str]) -> np.ndarray:
  """Returns float64 [N], of each object minus the mean over attributes of the share of objects with its value.

  `frequency_diversity` for structured texts: values are counted within their attribute.
  """
  counts = {name: Counter(str(each[name]) for each in objects) for name in attributes}
  return -np.array(
    [
      statistics.fmean(counts[name][str(each[name])] for name in attributes) / len(objects)
      for each in objects
    ],
    np.float64,
  )
