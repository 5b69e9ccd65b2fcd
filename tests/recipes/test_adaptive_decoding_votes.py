"""Adaptive decoding: what could not be judged, majority votes, and when the training of a head ends."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from adaptive_decoding_files import CONFIG

from nr.data.pools import Pool, PoolSample
from nr.recipes.adaptive_decoding import evaluate, heads, pairs, pools, voting

# Pairs of responses that could not be judged.


def sample(index, score, quality=None, choices=(0,), **details):
  details = details if quality is None else {"quality": quality, **details}
  return PoolSample(
    index, text="t", tokens=(5,), score=score, details=details, extras={"choices": list(choices)}
  )


def pool(*samples):
  return Pool("a-1", "p", tuple(samples), prompt_tokens=(1, 2))


def test_responses_without_a_score_make_no_pair_and_are_counted():
  experiment = SimpleNamespace(level="sequence", pair_rule="extremes", pair_top=1)
  whole = pool(sample(0, 0.5, 0.5), sample(1, None, reason="too long"), sample(2, 0.1, 0.1), sample(3, 0.9))
  found, counts = pairs.pairs_of([whole], experiment, np.random.default_rng(0))
  # The third sample has a reward and no quality: it counts as not judged.
  assert found[0].provenance["samples"] == [0, 2] and "unjudged" not in counts
  few = pool(sample(0, 0.5, 0.5), sample(1, None))
  found, counts = pairs.pairs_of([few], experiment, np.random.default_rng(0))
  assert not found and counts == {"prompts": 1, "no_pair": 0, "same_setting": 0, "unjudged": 1}
  constraint = SimpleNamespace(level="sequence", pair_rule="constraint", pair_top=2)
  found, counts = pairs.pairs_of([whole], constraint, np.random.default_rng(0))
  assert not found and counts["unjudged"] == 1
  assert pools.unjudged([whole]) == {"too long": 1, "no reason was given": 1}
  curve = pools.reward_curve(np.asarray([[0], [1], [1]]), np.asarray([0.5, np.nan, 1.0]), 3)
  assert curve == [0.5, 1.0, None]


def test_winrates_pass_over_what_could_not_be_judged():
  nothing, better, worse = [np.nan, np.nan], [1.0, 1.0], [0.0, 1.0]
  scores = {
    0: {
      "separate": {"a": np.asarray([[better], [nothing], [better]])},
      "fixed 0": {"a": np.asarray([[worse], [worse], [nothing]])},
    }
  }
  config = SimpleNamespace(
    heads=SimpleNamespace(variants=("separate",)), seed=0, evaluate=SimpleNamespace(bootstrap_samples=10)
  )
  found = evaluate.winrates(config, scores)["separate"]["fixed 0"]
  assert found == {"estimate": 1.0, "low": 1.0, "high": 1.0}
  assert evaluate.rewards_of(scores, "separate")["a"] == {
    "reward": 1.0, "quality": 1.0, "by_seed": [1.0], "unjudged": 1,
  }  # fmt: skip
  by_quality = evaluate.winrates(config, evaluate.component_of(scores, 1))["separate"]["fixed 0"]
  assert by_quality["estimate"] == 0.5 and evaluate.has_quality(scores)


# Votes.


def test_the_most_frequent_answer_wins_and_the_first_of_equals():
  assert voting.majority(["7", None, "12", "12", "7"]) == "7"
  assert voting.majority(["7", "12", "12"]) == "12"
  assert voting.majority([None, None]) is None


def voters(*answers, right="1"):
  return pool(*(
    sample(index, float(answer == right), float(answer == right), **({} if answer is None else {"answer": answer}))
    for index, answer in enumerate(answers)
  ))  # fmt: skip


def test_votes_are_right_where_the_majority_is():
  made = [voters("1", "1", "2"), voters("2", "2", "1"), voters(None, None, "1"), voters(None, None, None)]
  found = voting.votes_of(made, 3)
  np.testing.assert_allclose(found, [[1, 2 / 3], [0, 1 / 3], [1, 1 / 3], [0, 0]])
  # Only the first so many vote, and what could not be judged is unknown.
  np.testing.assert_allclose(voting.votes_of(made[:1], 1), [[1, 1]])
  assert np.isnan(voting.votes_of([pool(sample(0, 1.0, 1.0), sample(1, None))], 2)).all()
  with pytest.raises(ValueError, match="score 0.5 is neither 0 nor 1"):
    voting.votes_of([pool(sample(0, 0.5, 0.5))], 1)


def test_votes_of_independent_samples_follow_the_binomial_law():
  """Two answers, right with probability 0.7: of 5 votes 0.83692 are right (binomial tail), of single samples 0.7."""
  random = np.random.default_rng(0)
  made = [voters(*np.where(random.random(5) < 0.7, "1", "2")) for _ in range(4000)]
  vote, one = voting.votes_of(made, 5).mean(axis=0)
  expected = sum(c * 0.7**k * 0.3 ** (5 - k) for k, c in ((3, 10), (4, 5), (5, 1)))
  assert expected == pytest.approx(0.83692) and abs(vote - expected) < 4 * np.sqrt(
    expected * (1 - expected) / 4000
  )
  assert abs(one - 0.7) < 4 * np.sqrt(0.21 / 20000)


def test_heads_are_held_against_the_settings_that_are_best_in_training():
  def points(vote, one):
    return {"a": np.tile([[vote, one]], (4, 1)).astype(float)}

  votes = {0: {"fixed 0": points(1, 0.5), "fixed 1": points(0, 0.75), "separate": points(1, 0.75)}}
  tuning = {0: {"fixed 0": points(0, 0.5), "fixed 1": points(1, 0.25)}}
  found = voting.vote_report(votes, tuning, ["separate"], 8, purpose=(0,), samples=20)
  # In training setting 1 votes best and setting 0 is best alone, whatever they do in testing.
  assert found["tuned"] == {"0": {"vote": "fixed 1", "one": "fixed 0"}} and found["count"] == 8
  assert (
    found["arms"]["fixed 1"]["vote"]["estimate"] == 0 and found["arms"]["separate"]["one"]["estimate"] == 0.75
  )
  assert found["against_tuned"]["separate"]["vote"]["estimate"] == 1  # all won
  assert found["against_tuned"]["separate"]["one"]["estimate"] == pytest.approx(0.5 + (0.75 - 0.5) / 2)


# Early stopping.


class Trainer:
  """Stands for the loop: gives the accuracies of a list, epoch by epoch, and notes what it is asked for."""

  def __init__(self, accuracies):
    self.accuracies, self.steps, self.saved = accuracies, [], []

  def go_on(self, training):
    self.steps.append(training.steps)
    epoch = training.steps // 10
    evaluations = {"held_out/accuracy": self.accuracies[epoch - 1]}
    return SimpleNamespace(epoch=epoch, summary={"loss": 1 / epoch, "evaluations": evaluations})

  def save(self, result):
    self.saved.append(result.epoch)
    return f"head {result.epoch}"


def epochs_of(trainer, directory, epochs=5, patience=2):
  training = CONFIG.get_config("tiny").heads.train.copy_and_resolve_references()
  section = SimpleNamespace(epochs=epochs, patience=patience)
  found = heads.train_epochs(training, section, 10, trainer.go_on, trainer.save, directory)
  return found, training


def test_training_ends_when_the_accuracy_on_held_out_pairs_rises_no_more(tmp_path):
  trainer = Trainer([0.5, 0.7, 0.7, 0.6, 0.9])
  found, training = epochs_of(trainer, tmp_path)
  # Two epochs without a better one than the second: the fifth never comes, and the second is kept.
  assert trainer.steps == [10, 20, 30, 40] and trainer.saved == [1, 2]
  assert found["fingerprint"] == "head 2" and found["epoch"] == 2 and found["epochs"] == [0.5, 0.7, 0.7, 0.6]
  assert found["held_out"] == {"accuracy": 0.7} and training.schedule.steps == 50
  # At most so many epochs, however they rise.
  trainer = Trainer([0.1, 0.2, 0.3, 0.4])
  assert epochs_of(trainer, tmp_path / "other", epochs=3)[0]["epoch"] == 3 and trainer.steps == [10, 20, 30]


def test_an_interrupted_training_goes_on_with_the_next_epoch(tmp_path):
  class Killed(Exception):
    pass

  class Interrupted(Trainer):
    def go_on(self, training):
      if training.steps == 30:
        raise Killed
      return super().go_on(training)

  accuracies = [0.5, 0.7, 0.6, 0.6, 0.9]
  with pytest.raises(Killed):
    epochs_of(Interrupted(accuracies), tmp_path)
  trainer = Trainer(accuracies)
  found, _ = epochs_of(trainer, tmp_path)
  assert trainer.steps == [30, 40] and trainer.saved == [] and found["fingerprint"] == "head 2"
  whole, _ = epochs_of(Trainer(accuracies), tmp_path / "whole")
  assert whole == found and json.loads((tmp_path / heads.EPOCHS).read_text())[1]["fingerprint"] == "head 2"
