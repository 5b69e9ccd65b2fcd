"""The words and tables of report.md."""

from typing import Any

import numpy as np

from nr.evaluation.reports import table
from nr.recipes.adaptive_decoding.evaluate import head_of
from nr.recipes.adaptive_decoding.families import SENTENCE, SENTENCES, TEST_PAIRS

TITLES = {
  "mini": "Two tasks that the prompt tells apart",
  "hidden": "Counter-experiment: what decides is not in the prompt",
  "sentences": "A temperature for every token",
}
NOTES = {
  "mini": "Easy by construction: the first word of the prompt says which task it is, and with it which "
  "temperature is best.",
  "hidden": "The prompt does not show whether variety or the most frequent word is wanted, so no head should "
  "beat the best fixed temperature here; one that seems to, measures noise.",
  "sentences": "First words of sentences must be the marker, all others should differ. Position 0, 4, 8, ... "
  "are first words.",
}


def render(report: dict[str, Any]) -> str:
  """Returns the text of report.md."""
  sections = [f"# Adaptive decoding, variant `{report['variant']}`", scope(report)]
  for name in sorted(report["evaluation"], key=[*TITLES, *report["evaluation"]].index):
    sections += [f"## {TITLES.get(name, name)}", NOTES.get(name, ""), *experiment(report, name)]
  sections += ["## Run", run(report)]
  return "\n\n".join(section for section in sections if section) + "\n"


def scope(report: dict[str, Any]) -> str:
  """Says what the numbers are worth."""
  count = len(report["seeds"])
  seeds = (
    "one seed, so **intervals cover the choice of prompts alone and one small run decides nothing**"
    if count == 1
    else f"{count} seeds, each with a language model of its own; intervals cover prompts and seeds"
  )
  return (
    f"Toys on a tiny language model, {seeds}. Winrates are the head's share of points in percent (ties 0.5), "
    "averaged over the tasks, with 95 % bootstrap intervals. The baselines' settings were not tuned. "
    "`best_single` is the fixed setting that the training pairs prefer; `oracle` is, for every task, the fixed "
    "setting that wins most on the test prompts themselves.\n\n"
    f"A task has 100 prompts. The test prompts are drawn with repeats from {TEST_PAIRS} of them, which no head was "
    "trained on, always the same; the intervals take the draws as independent and do not cover which prompts were "
    "set aside. The frozen language model has learned on all 100. Held-out pairs are of prompts that the head was "
    "not trained on either. Plots show the first seed."
  )


def experiment(report: dict[str, Any], name: str) -> list[str]:
  """Returns the pieces about one experiment."""
  plots = [f"![settings](plots/{name}_settings.png)", f"![rewards](plots/{name}_rewards.png)"]
  if report["levels"][name] == "token":
    plots.insert(0, f"![positions](plots/{name}_positions.png)")
  return [
    "Winrate in percent of each head against:",
    winrate_table(report, name),
    "Mean reward on test prompts, over seeds:",
    reward_table(report, name),
    "What the heads pick, and how well they rank held-out pairs (mean over seeds):",
    head_table(report, name),
    position_table(report, name) if report["levels"][name] == "token" else "",
    pairs_text(report, name),
    "\n\n".join(plots),
  ]


def winrate_table(report: dict[str, Any], name: str) -> str:
  """Returns winrates with intervals, a column a head's arm."""
  rates = report["evaluation"][name]["winrates"]
  arms = list(rates)

  def cell(found: dict[str, float]) -> str:
    return f"{100 * found['estimate']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"

  rows = [[other, *(cell(rates[arm][other]) for arm in arms)] for other in rates[arms[0]]]
  return table(["against", *arms], rows)


def reward_table(report: dict[str, Any], name: str) -> str:
  """Returns the mean reward of every arm by task; quality where it is another number."""
  arms = report["evaluation"][name]["arms"]
  tasks = list(next(iter(arms.values())))
  has_quality = {
    task: any(abs(arm[task]["reward"] - arm[task]["quality"]) > 1e-12 for arm in arms.values())
    for task in tasks
  }
  header, rows = ["arm"], []
  for task in tasks:
    header += [task, f"{task}, quality"] if has_quality[task] else [task]
  for arm, found in arms.items():
    row: list[Any] = [arm]
    for task in tasks:
      row += [found[task]["reward"], found[task]["quality"]] if has_quality[task] else [found[task]["reward"]]
    rows.append(row)
  return table(header, rows)


def head_table(report: dict[str, Any], name: str) -> str:
  """Returns mean settings by task and accuracies on held-out pairs, beside rules that see no prompt."""
  seeds = [str(seed) for seed in report["seeds"]]
  picks = report["evaluation"][name]["picks"]
  tasks = list(next(iter(picks[seeds[0]].values())))
  rows = []
  for arm in picks[seeds[0]]:
    means = [np.mean([picks[seed][arm][task]["mean"] for seed in seeds]) for task in tasks]
    moved = [np.mean([picks[seed][arm][task]["not_lowest"] for seed in seeds]) for task in tasks]
    held_out = [report["heads"][f"{name}/{seed}"]["heads"][head_of(arm)]["held_out"] for seed in seeds]
    accuracy, entropy = (np.mean([found[key] for found in held_out]) for key in ("accuracy", "entropy"))
    rows.append([arm, *map(float, means), *map(float, moved), float(accuracy), float(entropy)])
  baselines = [report["heads"][f"{name}/{seed}"]["baseline_accuracies"] for seed in seeds]
  for rule in baselines[0]:
    accuracy = float(np.mean([found[rule] for found in baselines]))
    rows.append([rule.replace("_", " "), *[""] * 2 * len(tasks), accuracy, ""])
  header = [
    "head",
    *(f"mean setting, {task}" for task in tasks),
    *(f"share not lowest, {task}" for task in tasks),
    "pair accuracy",
    "entropy of the head, nats",
  ]
  return table(header, rows)


def position_table(report: dict[str, Any], name: str) -> str:
  """Returns the mean setting by place in the sentence, over seeds and sentences (the paper's figure 5).

  Only stories have sentences; without that task there is no table. Words that no response of a seed reaches
  are left out of the mean.
  """
  picks, rows = report["evaluation"][name]["picks"], []
  for arm, tasks in picks[str(report["seeds"][0])].items():
    if "story" not in tasks:
      return ""
    found = [picks[str(seed)][arm]["story"]["mean_by_position"] for seed in report["seeds"]]
    by_place = [
      [mean for means in found for mean in means[place : SENTENCE * SENTENCES : SENTENCE]]
      for place in range(SENTENCE)
    ]
    rows.append([arm, *(float(np.mean(means)) if means else "none" for means in by_place)])
  header = ["head", "first word of a sentence", *(f"word {place + 1}" for place in range(1, SENTENCE))]
  return "Mean setting by place in the sentence, stories:\n\n" + table(header, rows)


def pairs_text(report: dict[str, Any], name: str) -> str:
  """Says how many pairs there were, and how often each setting was chosen and rejected."""
  made = [report["pairs"][f"{name}/{seed}"] for seed in report["seeds"]]
  total = {key: sum(entry["counts"][key] for entry in made) for key in made[0]["counts"]}
  same, rows = "", []
  if report["levels"][name] == "sequence":
    same = (
      f" {total['same_setting']} pairs have the same setting on both sides, on which Eq. 10 has no gradient."
    )
  for index, value in enumerate(report["values"][name]):
    chosen, rejected = (
      sum(entry["settings"][side][index] for entry in made) for side in ("chosen", "rejected")
    )
    rows.append(
      [value, float(chosen), float(rejected), float(chosen / rejected) if rejected else "none rejected"]
    )
  return (
    f"Of {total['prompts']} pools {total['train'] + total['held_out']} gave a pair; {total['no_pair']} had only "
    f"ties.{same} How often each setting was chosen and rejected in the training pairs:\n\n"
    + table(["setting", "chosen", "rejected", "ratio"], rows)
  )


def run(report: dict[str, Any]) -> str:
  """Returns device and times."""
  seconds = report["seconds"]
  total = sum(seconds.values())
  parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
  where = report["environment"]
  return f"{where['device']}, {where['devices']} device(s); {total:.0f} s in all: {parts}."
