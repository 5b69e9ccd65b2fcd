"""Length-instruction fine-tuning: the counted words, the numbers and the invariants of its specification."""

import math
import random

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.data.preferences import PreferencePair
from nr.generators.protocol import Sample
from nr.judges.length import count_words, words_of
from nr.judges.protocol import Verdict
from nr.objectives.preference import PreferenceSpec, preference_loss
from nr.objectives.sequence_scores import SequenceScores
from nr.recipes.length_instruct.augmentation import (
  TEMPLATE,
  LiftSpec,
  augment,
  drawn_integer,
  lengths_of,
  lift_of,
  limited_samples,
  mixture,
  statistics,
)
from nr.recipes.length_instruct.benchmarks import LengthCase, judge_cases, scaled_limit, summarize

TABLE = [
  ("Don't stop, please!", 4, 3),
  ('He said "yes" twice.', 6, 4),
  ("Wait... what?", 3, 2),
  ("A well-known -- indeed famous -- case.", 7, 7),
  ("Costs $5 (about 4,50 EUR).", 5, 5),
  ("* item one\n* item two", 4, 6),
  ("1. First\n2. Second", 4, 4),
]

# The example of the authors' README, whose limit is this answer's number of words.
SUPERMAN = (
  "Superman, the iconic comic book superhero, was created by writer Jerry Siegel and artist Joe Shuster. Superman "
  "first appeared in Action Comics #1, which was published by Detective Comics, Inc. (later DC Comics) in June 1938. "
  "The character's immense popularity established him as one of the most enduring and recognizable figures in the "
  "superhero genre."
)


def text(words: int, seed: int = 0) -> str:
  draws = random.Random(f"{words} {seed}")
  return " ".join(draws.choice(["oak", "elm", "ash", "yew"]) for _ in range(words))


def pair(id: str, chosen: int, rejected: int) -> PreferencePair:
  return PreferencePair(id, f"Tell of {{trees}} {id}.", text(chosen, 1), text(rejected, 2))


def random_pairs(count: int, seed: int = 0) -> list[PreferencePair]:
  draws = random.Random(seed)
  return [pair(f"p{number}", draws.randint(0, 60), draws.randint(0, 60)) for number in range(count)]


@pytest.mark.parametrize("written, expected, spaces", TABLE)
def test_l1_words_are_counted_as_in_the_paper(written, expected, spaces):
  assert count_words(written) == expected and count_words(written, "spaces") == spaces


def test_l1_the_published_example():
  assert count_words(SUPERMAN) == 56
  assert LiftSpec().render("Who created the Superman cartoon character?", 56) == (
    "Answer the following instruction using 56 words or less.\n\nWho created the Superman cartoon character?"
  )


def test_l1_converted_quotes_count():
  assert words_of('"a"') == ["``", "a", "''"]
  assert count_words('"a"') == 3 and count_words("«a»") == 3 and count_words("") == 0


def test_l2_two_samples_a_pair_and_as_many_swaps_as_longer_winners():
  pairs = [pair(f"s{n}", 20, 45) for n in range(1083)] + [pair(f"l{n}", 45, 20) for n in range(1894)]
  found, spec = statistics(pairs, LiftSpec()), LiftSpec()
  limited = augment(pairs, spec)
  assert len(limited) == found["limited"] == 5954 and found["kept"] == 2977
  assert sum(lift_of(each)["is_swapped"] for each in limited) == found["swaps"] == 1894
  assert len({each.id for each in limited}) == 5954
  # On any input.
  pairs = random_pairs(500)
  kept = [
    each for each in pairs if abs(lengths_of(each, spec).chosen - lengths_of(each, spec).rejected) >= 10
  ]
  limited = augment(pairs, spec)
  assert 0 < len(kept) < 500 and len(limited) == 2 * len(kept)
  longer = [each for each in kept if lengths_of(each, spec).is_longer_chosen]
  assert sum(lift_of(each)["is_swapped"] for each in limited) == len(longer)
  assert 0 < len(longer) < len(kept)


@pytest.mark.parametrize("difference, margin", [(10, 10), (1, 0), (2, 2)])
def test_l3_the_winner_always_obeys(difference, margin):
  spec = LiftSpec(min_difference=difference, margin=margin)
  seen = set()
  for each in random_pairs(400):
    for sample in limited_samples(each, spec):
      told = lift_of(sample)
      winner, loser = (count_words(side) for side in (sample.chosen, sample.rejected))
      limit = told["limit"]
      assert winner <= limit and limit >= 1
      assert (loser <= limit) == (told["kind"] == "loose")
      assert {sample.chosen, sample.rejected} == {each.chosen, each.rejected}
      assert (sample.chosen == each.rejected) == told["is_swapped"]
      if told["kind"] == "loose":
        assert limit == max(winner, loser) + margin
      assert sample.prompt == TEMPLATE.replace("{limit}", str(limit)).replace("{instruction}", each.prompt)
      assert sample.prompt_tokens is None and each.prompt in sample.prompt
      seen.add((told["kind"], told["is_swapped"]))
  assert seen == {("loose", False), ("tight", False), ("tight", True)}


def test_l3_the_whole_open_interval_is_drawn():
  spec = LiftSpec(min_difference=1)
  limits = [lift_of(limited_samples(pair(f"p{n}", 5, 9), spec)[1])["limit"] for n in range(400)]
  counts = [limits.count(limit) for limit in range(5, 9)]
  # 100 of each are expected; 3 degrees of freedom: 21.1 has probability 1e-4.
  assert sum(counts) == 400 and sum((count - 100) ** 2 / 100 for count in counts) < 21.1


def test_l4_how_often_the_shorter_wins():
  pairs = [pair(f"s{n}", 1, 30) for n in range(1083)] + [pair(f"l{n}", 30, 1) for n in range(1894)]
  spec = LiftSpec()
  limited = augment(pairs, spec)
  shares = statistics(pairs, spec)["shorter_wins"]
  for mix, expected in (("plain", 0.364), ("augmented_only", 0.682), ("union", 0.576)):
    trained = mixture(pairs, limited, mix)
    shorter = sum(count_words(each.chosen) < count_words(each.rejected) for each in trained)
    assert shorter / len(trained) == pytest.approx(expected, abs=5e-4)
    assert shares[mix] == pytest.approx(shorter / len(trained), abs=1e-12)
  with pytest.raises(ValueError, match="mix='both'"):
    mixture(pairs, limited, "both")


def test_l5_only_seed_and_id_decide_a_limit():
  spec, pairs = LiftSpec(), random_pairs(200)
  limits = {each.id: lift_of(each)["limit"] for each in augment(pairs, spec)}
  shuffled = random.Random(3).sample(pairs, len(pairs))
  assert {each.id: lift_of(each)["limit"] for each in augment(shuffled, spec)} == limits
  # Sharded Grain pipelines map the pure function.
  found = {}
  for share in range(3):
    source = grain.MapDataset.source(pairs)[share::3].map(lambda each: limited_samples(each, spec))
    found |= {sample.id: lift_of(sample)["limit"] for samples in source for sample in samples}
  assert found == limits
  other = {each.id: lift_of(each)["limit"] for each in augment(pairs, LiftSpec(seed=1))}
  assert any(limits[id] != other[id] for id in limits)
  assert {id: limit for id, limit in limits.items() if id.endswith("loose")} == {
    id: limit for id, limit in other.items() if id.endswith("loose")
  }
  assert drawn_integer(0, "a", 3, 3) == 3


def test_l6_r_dpo_penalises_length():
  def sides(chosen_tokens, rejected_tokens):
    chosen = SequenceScores(jnp.array(-10.0), jnp.array(chosen_tokens), jnp.array(-11.0))
    return chosen, SequenceScores(jnp.array(-12.0), jnp.array(rejected_tokens), jnp.array(-11.5))

  loss, _ = preference_loss(PreferenceSpec(length_penalty=0.05), *sides(5.0, 8.0))
  np.testing.assert_allclose(loss, math.log(2), atol=1e-6)
  loss, _ = preference_loss(PreferenceSpec(), *sides(5.0, 8.0))
  np.testing.assert_allclose(loss, 0.620957, atol=1e-6)

  def weight(alpha, chosen_tokens, rejected_tokens):
    """How strongly the pair pulls: the gradient by the chosen log-probability, over -beta."""
    spec, (chosen, rejected) = PreferenceSpec(length_penalty=alpha), sides(chosen_tokens, rejected_tokens)
    slope = jax.grad(lambda policy: preference_loss(spec, chosen._replace(policy=policy), rejected)[0])(
      chosen.policy
    )
    return -float(slope) / spec.beta

  alphas = (0.0, 0.01, 0.05, 0.1)
  longer_wins = [weight(alpha, 8.0, 5.0) for alpha in alphas]
  shorter_wins = [weight(alpha, 5.0, 8.0) for alpha in alphas]
  assert longer_wins == sorted(longer_wins, reverse=True) and longer_wins[-1] < longer_wins[0]
  assert shorter_wins == sorted(shorter_wins) and shorter_wins[-1] > shorter_wins[0]
  assert longer_wins[0] == shorter_wins[0]


class Spy:
  """A judge who always prefers the first response and remembers what it saw."""

  name = "spy"

  def __init__(self):
    self.seen = []

  def compare(self, comparisons):
    self.seen += comparisons
    return [Verdict(1.0) for _ in comparisons]


def sample(text, finish_reason="stop_id", error=None):
  return Sample("a", 0, text, finish_reason=finish_reason, error=error)


def test_l7_the_limit_is_inclusive_and_a_violation_loses():
  case = LengthCase("a", "Name a tree.", 5, LiftSpec().render("Name a tree.", 5), "oak oak")
  answers = {
    "at the limit": (sample(text(5)), False, 1.0),
    "one too many": (sample(text(6)), True, 0.0),
    "cut off": (sample(text(3), "length"), True, 0.0),
    "failed": (sample(None, "error", "timeout"), None, None),
    "empty": (sample(""), False, 1.0),
  }
  judge = Spy()
  outcomes = judge_cases([case] * 5, [each for each, *_ in answers.values()], judge, "words")
  for (name, (_, is_violation, win)), outcome in zip(answers.items(), outcomes):
    assert (outcome.is_violation, outcome.win) == (is_violation, win), name
  # The judge sees the original instruction and no violation.
  assert [each.first for each in judge.seen] == [text(5), ""]
  assert all(each.prompt == "Name a tree." and "5" not in each.prompt for each in judge.seen)
  assert all(each.second == "oak oak" for each in judge.seen)
  found = summarize(outcomes)
  assert (found["count"], found["answered"], found["obeying"], found["judged"]) == (5, 4, 2, 2)
  assert found["violation"] == 0.5 and found["win"] == 0.5 and found["words"] == (5 + 6 + 3 + 0) / 4
  assert summarize([])["violation"] is None


def test_l8_scaled_limits():
  assert [scaled_limit(56, scale) for scale in (0.9, 0.5, 0.1)] == [50, 28, 6]
  assert scaled_limit(3, 0.1) == 1 and scaled_limit(1, 0.9) == 1 and scaled_limit(7, 1.0) == 7
  # Halves go to the even number.
  assert scaled_limit(5, 0.5) == 2 and scaled_limit(7, 0.5) == 4
