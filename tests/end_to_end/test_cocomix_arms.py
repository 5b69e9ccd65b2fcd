"""Arms beyond the two default ones, and a given teacher: through the recipe's stages."""

import numpy as np
import pytest

from nr.data.tokenizers import SentencePieceTokenizer, load_tokenizer
from nr.recipes import cocomix
from nr.recipes.cocomix import settings
from nr.training.writers import read_metrics
from tests.end_to_end.cocomix_runs import make_config, run


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A run directory with tokenizer and teacher, and their artifacts."""
  workdir = tmp_path_factory.mktemp("arms") / "run"
  return workdir, run(make_config(), workdir, "teacher")


@pytest.mark.slow
def test_labels_of_two_kinds_lie_side_by_side_and_an_arm_learns_from_teacher_and_online_labels(
  begun, tmp_path
):
  """From tokens to the report: distillation, and labels that the train step makes of the kind that is also cached."""
  workdir = tmp_path / "run"
  kinds = {"negated": {"sign": "negated"}, "made_again": {"sign": "negated", "source": "online"}}
  arm = "students.arms.cocomix"
  config = make_config(kinds, **{f"{arm}.labels": "made_again", f"{arm}.kd_weight": 0.1})
  artifacts = run(config, workdir, "evaluate", begun[0])

  labels, negated = artifacts["labels"], settings.attribution_id(settings.attribution_spec(config, "negated"))
  assert list(labels["variants"]) == [negated]
  found = [labels, labels["variants"][negated]]
  assert [kind["splits"]["train"]["header"]["attribution"]["sign"] for kind in found] == ["paper", "negated"]
  cached = [np.load(workdir / kind["splits"]["train"]["directory"] / "labels.npy") for kind in found]
  assert (cached[0] != cached[1]).any(axis=1).mean() > 0.9

  students = artifacts["students"]
  assert students["arms"] == ["ntp", "cocomix"] and students["predicting"] == ["cocomix"]
  assert students["runs"]["cocomix_seed0"]["labels"] == "made_again"
  rows = read_metrics(workdir / students["runs"]["cocomix_seed0"]["directory"])
  assert {"distillation_loss", "concept_loss", "label_recall"} <= set().union(*rows)
  # The teacher, its partial backward and the autoencoder run in the step, and are counted.
  flops = [students["runs"][f"{arm}_seed0"]["train_flops_per_token"] for arm in students["arms"]]
  assert flops[1] > 2 * flops[0]
  assert set(artifacts["evaluate"]["comparisons"]) == {"cocomix"}
  assert 0 <= artifacts["evaluate"]["runs"]["cocomix_seed0"]["label_recall"] <= 1


@pytest.mark.slow
def test_a_given_teacher_brings_its_tokenizer_and_is_scored_like_the_trained_one(begun, tmp_path):
  workdir, trained = begun
  teacher = str(workdir / "teacher" / "model")
  artifacts = run(make_config(**{"teacher.checkpoint": teacher}), tmp_path / "run", "teacher")
  assert artifacts["tokenizer"]["fingerprint"] == trained["tokenizer"]["fingerprint"]
  for name in ("fingerprint", "params", "val_loss"):
    assert artifacts["teacher"][name] == trained["teacher"][name], name
  assert artifacts["teacher"]["checkpoint"] == teacher

  folder = tmp_path / "other"  # the same pieces, another end of text
  tokenizer = workdir / "tokenizer" / "tokenizer"
  assert load_tokenizer(tokenizer).end_of_text_id != 2
  SentencePieceTokenizer((tokenizer / "tokenizer.model").read_bytes(), 2).save(folder)
  wrong = {
    r"has num_layers=2, which the config says otherwise; set --config.teacher.mod": {
      "teacher.model.num_layers": 3
    },
    r"window.length=64 is more than the 32 positions of teacher.checkpoint": {"window.length": 64},
    r"is not the tokenizer of teacher.checkpoint=.* leave tokenizer.path empty": {
      "tokenizer.path": str(folder)
    },
    r"teacher.checkpoint='nowhere': no such file or folder": {"teacher.checkpoint": "nowhere"},
  }
  for message, changes in wrong.items():
    with pytest.raises(ValueError, match=message):
      make_config(**{"teacher.checkpoint": teacher, **changes})


def test_stages_that_no_arm_needs_are_left_out():
  names = lambda **changes: [stage.name for stage in cocomix.stages(make_config(**changes))]  # noqa: E731
  pause = {"students.arms.cocomix.concept.mode": "pause"}
  assert names(**pause) == ["tokenizer", "students", "evaluate", "report"]
  assert names(**pause, **{"students.arms.ntp.kd_weight": 0.1})[:3] == ["tokenizer", "teacher", "students"]
  predicting = {"students.arms.cocomix.concept.mode": "prediction_only"}
  assert names(**predicting)[-3:] == ["students", "evaluate", "report"] and "labels" in names(**predicting)
  assert "steer" in names()
