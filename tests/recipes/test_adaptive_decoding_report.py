"""Adaptive decoding: what the report says and draws where tasks and seeds differ."""

import numpy as np

from nr.recipes.adaptive_decoding import pools, report, report_text

TAUS = (0.0, 0.5, 1.0)


class Section(dict):
  """A config section that a test writes out."""

  __getattr__ = dict.__getitem__


def test_a_setting_that_was_never_drawn_has_no_mean_reward():
  choices = np.asarray([[0, 0, -1], [2, 2, 2]])
  curve = pools.reward_curve(choices, np.asarray([0.25, 0.75]), 3)
  assert curve == [0.25, None, 0.75]
  assert report.drawn_points(list(TAUS), curve) == ([0.0, 1.0], [0.25, 0.75])


def token_report():
  """Two tasks of different lengths with a setting a token; the second seed's stories end early."""
  picks = {
    str(seed): {
      arm: {
        task: {"histogram": [0.5, 0.0, 0.5], "mean_by_position": means}
        for task, means in (("sums", [0.0, 0.0]), ("story", [0.0, 1.0, 1.0, 0.5, 0.5, 1.0][: 6 - 3 * seed]))
      }
      for arm in ("separate", "separate_sample")
    }
    for seed in (0, 1)
  }
  curves = {"mean_reward_by_setting": {"sums": [0.5, None, 1.0], "story": [0.5, 0.5, 0.5]}}
  return {
    "seeds": [0, 1],
    "values": {"two": list(TAUS)},
    "levels": {"two": "token"},
    "evaluation": {"two": {"picks": picks}},
    "pools": {f"two/{seed}": curves for seed in (0, 1)},
  }


def test_positions_are_of_stories_and_may_differ_in_number_between_seeds():
  found = report_text.position_table(token_report(), "two").splitlines()
  # First words: 0 and 0.5 of seed 0, 0 of seed 1; second ones: 1, 1 and 1; third: 1 and 1; fourth: 0.5.
  assert found[-1] == "| separate_sample | 0.1667 | 1 | 1 | 0.5 |" and len(found) == 6
  without = token_report()
  for arms in without["evaluation"]["two"]["picks"].values():
    for tasks in arms.values():
      del tasks["story"]
  assert report_text.position_table(without, "two") == ""


def test_plots_have_a_line_for_every_task_and_name_their_seed(monkeypatch, tmp_path):
  drawn = {}

  def keep(path, curves, *, title, **labels):
    drawn[path.name] = (set(curves), title)

  monkeypatch.setattr(report.plots, "plot_curves", keep)
  report.draw(Section(workdir=tmp_path), token_report())
  assert drawn["two_positions.png"][0] == {"separate, sums", "separate, story"}
  assert len(drawn) == 3 and all("seed 0" in title for _, title in drawn.values())


def test_the_scope_says_that_prompts_repeat():
  text = report_text.scope(token_report())
  assert "drawn with repeats from 30" in text and "language model has learned on all 100" in text
