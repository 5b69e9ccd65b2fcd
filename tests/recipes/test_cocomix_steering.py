"""Naming, controls and summaries of steering on inputs one can check by eye; the whole stage runs in the main job."""

import math

import numpy as np
import pytest

from nr.recipes.cocomix import contexts, steer
from nr.recipes.cocomix.contexts import Firings
from nr.recipes.cocomix.steering import naming, page, protocol
from nr.recipes.cocomix.steering.open_run import open_run
from nr.recipes.stages import StageError


class Letters:
  """A tokenizer and a split: token i is the i-th letter; "b" always follows "a", and "z" is a space."""

  vocab_size = 26
  tokens = np.array([0, 1, 2, 3] * 50 + [25, 4] * 20)
  num_tokens = len(tokens)

  def decode(self, ids):
    return "".join("abcdefghijklmnopqrstuvwxy "[each] for each in ids)


class Spelled(Letters):
  """Letters spelled out."""

  def decode(self, ids):
    return " bee" if list(ids) == [1] else "x"


def make_firings(tokens=240, **latents):
  """Firings of latents 0, 1, ... from {latent: places}, values falling from 1."""
  found = [(number, place) for number, places in enumerate(latents.values()) for place in places]
  numbers, places = (np.array(each) for each in zip(*found))
  values = np.concatenate([np.linspace(1, 0.5, len(places)) for places in latents.values()])
  starts = np.searchsorted(numbers, np.arange(len(latents) + 1))
  return Firings(numbers, values, places, starts, tokens)


ON_A = make_firings(on_a=range(0, 200, 4), on_e=[201], never_near=[203])


def test_a_concept_is_named_by_what_it_fires_on_and_what_follows():
  split = Letters()
  assert naming.fires_on(ON_A, 0, split, split) == [{"token": "a", "score": pytest.approx(1.0)}]
  followers = naming.followed_by(ON_A, 0, split, split)
  assert [row["token"] for row in followers] == ["b"] and followers[0]["score"] > 5
  assert naming.keywords_of(ON_A, 0, split, split, 4) == []  # a letter that many words hold
  assert naming.keywords_of(ON_A, 0, split, Spelled(), 4) == [" bee"]
  before_spaces = make_firings(latent=range(201, 239, 2))
  assert naming.followed_by(before_spaces, 0, split, split)[0]["token"] == " "
  assert naming.keywords_of(before_spaces, 0, split, split, 4) == []  # a space is no keyword
  assert ON_A.largest(0) == 1.0 and ON_A.of(1)[0].tolist() == [201]


def test_pieces_hold_the_concept_or_never_do():
  related, neutral = ON_A.pieces(1, 10)
  assert related.tolist() == [200] and len(neutral) == 23 and 200 not in neutral
  related_PL, neutral_PL = steer.pieces(Letters(), ON_A, 1, 4, 10)
  assert related_PL is None  # one piece gives no interval
  assert neutral_PL.shape == (4, 10) and neutral_PL.dtype == np.int32
  np.testing.assert_array_equal(neutral_PL[0], Letters.tokens[:10])
  np.testing.assert_array_equal(neutral_PL[-1], Letters.tokens[230:240])


def test_a_control_fires_about_as_often():
  frequency = np.array([0.0, 0.001, 0.01, 0.011, 0.012, 0.2] + [0.0] * 20 + [0.009] * 6)
  drawn = {protocol.draw_control(2, frequency, [4], np.random.default_rng(seed)) for seed in range(60)}
  assert (
    drawn <= {1, 3, *range(26, 32)} and len(drawn) >= 6
  )  # neither itself, nor a swept one, nor a silent one
  with pytest.raises(ValueError, match="no concept is left as a control of concept 2"):
    protocol.draw_control(2, frequency, [1, 3, 4, 5, *range(26, 32)], np.random.default_rng(0))


def test_strengths_in_units_of_a_reference():
  assert protocol.resolved("force_reference", [None, -1.0, 2.0], 3.0) == ("force_value", [None, -3.0, 6.0])
  assert protocol.resolved("force", [None, 2.0], 3.0) == ("force", [None, 2.0])


def exactly(value):
  return {"estimate": value, "low": value, "high": value}


def record(gain, control, has_teacher=True):
  """A swept concept whose scores are known, at no edit and at strength 4."""

  def points(score):
    return [
      {
        "strength": strength,
        **dict.fromkeys(("kl", "keywords", "latent"), exactly(value)),
        "unsteered_ppl": exactly(10.0 * math.exp(value)),
      }
      for strength, value in ((None, 0.1), (4.0, 0.1 + score))
    ]

  agreement = dict.fromkeys(
    ("rank_correlation", "control_rank_correlation", "top_overlap", "control_top_overlap"), exactly(gain)
  )
  return {
    "points": points(gain),
    "control_points": points(control),
    "teacher_points": points(0.5) if has_teacher else None,
    "agreement": [{"strength": 4.0, **agreement}] if has_teacher else None,
    "neutral": [{"loss_change": exactly(0.0)}, {"loss_change": exactly(gain)}],
    "related": None,
  }


def test_means_over_concepts_are_paired_and_carry_their_spread():
  (row,) = protocol.overall([record(0.2, 0.1), record(0.4, -0.1), record(0.3, 0.0, has_teacher=False)])
  assert row["strength"] == 4.0 and row["concepts"] == 3
  assert row["latent_gain"]["estimate"] == pytest.approx(0.3)
  assert row["control_latent_gain"]["estimate"] == pytest.approx(0.0)
  over = row[
    "latent_over_control"
  ]  # 0.1, 0.5, 0.3: mean 0.3, standard error 0.2 / sqrt(3), t of 2 degrees 4.3027
  assert over["estimate"] == pytest.approx(0.3)
  assert over["high"] - over["low"] == pytest.approx(2 * 4.3027 * 0.2 / math.sqrt(3), rel=1e-4)
  assert row["teacher_latent_gain"]["estimate"] == pytest.approx(0.5)
  assert row["rank_correlation"]["estimate"] == pytest.approx(0.3)  # of the two that have a teacher
  assert row["ppl_ratio"]["estimate"] == pytest.approx(math.exp(0.3))
  assert row["related_loss_change"] is None and row["neutral_loss_change"]["estimate"] == pytest.approx(0.3)
  text = page.verdict([row])
  assert "**+30.0 percentage points**" in text and "includes 0" in text
  (sure,) = protocol.overall([record(0.5, 0.1), record(0.51, 0.1), record(0.5, 0.1)])
  assert "excludes 0" in page.verdict([sure])
  assert "One concept alone" in page.verdict(protocol.overall([record(0.5, 0.1)]))


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
  with pytest.raises(
    StageError, match="holds no run with a finished stage 'steer'; make one with python -m nr"
  ):
    open_run(tmp_path)


def test_windows_can_be_limited():
  class Source:
    length = 8

    def __len__(self):
      return 5

    def __getitem__(self, index):
      return index

  assert len(contexts.first_windows(Source(), 0)) == 5 and len(contexts.first_windows(Source(), 9)) == 5
  assert [each for each in map(contexts.first_windows(Source(), 2).__getitem__, range(2))] == [0, 1]
