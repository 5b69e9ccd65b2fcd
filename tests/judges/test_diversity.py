import math
import random

import numpy as np
import pytest

from nr.judges import diversity
from nr.judges.diversity import METRICS

SAME = ["The cat sat on the mat."] * 4
VARIED = [
  "The cat sat on the mat.",
  "Dogs bark at passing trains!",
  "Rain fell all night",
  "Why not try chess?",
]


def test_each_metric_points_where_it_says():
  for name, metric in METRICS.items():
    same, varied = metric.function(SAME), metric.function(VARIED)
    assert (varied > same) == (metric.more_diverse == "higher") and varied != same, name
  assert diversity.frequency_diversity(VARIED).mean() > diversity.frequency_diversity(SAME).mean()
  assert diversity.jaccard_diversity(VARIED).mean() > diversity.jaccard_diversity(SAME).mean() == 0


def test_numbers_counted_by_hand():
  texts = ["A cat, a dog", "a cat", "bird"]
  assert diversity.unique_words(texts) == 4 and diversity.unique_words_share(texts) == 4 / 7
  # a: 2 texts, cat: 2, dog: 1, bird: 1; of three texts.
  np.testing.assert_allclose(diversity.frequency_diversity(texts), [-5 / 9, -2 / 3, -1 / 3])
  np.testing.assert_allclose(diversity.jaccard_diversity(texts), [(1 / 3 + 1) / 2, (1 / 3 + 1) / 2, 1])
  assert (
    diversity.sequence_entropy([[-1, -2], [-3]]) == 3 and diversity.token_entropy([[-1, -2], [-3]]) == 2.25
  )
  assert diversity.compression_ratio(["ab" * 500]) > 10
  assert math.isnan(diversity.frequency_diversity(["", "a"])[0]) and math.isnan(
    diversity.jaccard_diversity(["a"])[0]
  )
  for name in ("unique_words_share", "compression_ratio", "self_bleu"):
    assert METRICS[name].function([]) is None


def test_bleu_is_that_of_nltk():
  bleu = pytest.importorskip("nltk.translate.bleu_score", reason="needs nltk (extra [synthesis])")
  smoothing, draws = bleu.SmoothingFunction().method4, random.Random(0)
  for _ in range(300):
    one, other = ([draws.choice("abcd") for _ in range(draws.randint(1, 9))] for _ in range(2))
    theirs = bleu.sentence_bleu([other], one, smoothing_function=smoothing)
    assert diversity.sentence_bleu(one, other) == pytest.approx(theirs, abs=1e-9), (one, other)
  assert diversity.sentence_bleu([], ["a"]) == 0


def test_attributes():
  objects = [{"name": name, "city": "Oslo"} for name in ("Ann", "Ann", "Bo", "Cy")]
  found = diversity.attribute_statistics(objects, ["name", "city"])
  assert found["name"][:4] == (4, 0.75, 0.5, "Ann") and found["city"][:3] == (4, 0.25, 1.0)
  assert found["city"].entropy == 0 and found["name"].entropy == pytest.approx(1.5 * math.log(2))
  np.testing.assert_allclose(
    diversity.frequency_of_attributes(objects, ["name", "city"]), [-0.75, -0.75, -0.625, -0.625]
  )
  with pytest.raises(ValueError, match="'age'"):
    diversity.attribute_statistics(objects, ["age"])
  with pytest.raises(ValueError):
    diversity.attribute_statistics([], ["age"])
