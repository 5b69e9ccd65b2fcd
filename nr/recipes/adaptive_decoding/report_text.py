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
  "votes": "Majority votes on sums",
}
NOTES = {
  "mini": "Easy by construction: the first word of the prompt says which task it is, and with it which "
  "temperature is best.",
  "hidden": "The prompt does not show whether variety or the most frequent word is wanted, so no head should "
  "beat the best fixed temperature here; one that seems to, measures noise.",
  "sentences": "First words of sentences must be the marker, all others should differ. Position 0, 4, 8, ... "
  "are first words.",
}
TOTALS = ("prompts", "no_pair", "same_setting", "train", "held_out")
"""Counts of pools and pairs."""


def render(report: dict[str, Any]) -> str:
  """Returns the text of report.md."""
  sections = [f"# Adaptive decoding, variant `{report['variant']}`", scope(report)]
  for name in sorted(report["evaluation"], key=[*TITLES, *report["evaluation"]].index):
    sections += [f"## {TITLES.get(name, name)}", NOTES.get(name, ""), *experiment(report, name)]
  sections += ["## Run", run(report)]
  return "\n\n".join(section for section in sections if section) + "\n"


def scope(report: dict[str, Any]) -> str:
  """Says what the numbers are worth."""
  shared = (
    "Winrates are the head's share of points in percent (ties 0.5), averaged over the tasks, with 95 % bootstrap "
    "intervals. The baselines' settings were not tuned. `best_single` is the fixed setting that the training pairs "
    "prefer; `oracle` is, for every task, the fixed setting that wins most on the test prompts themselves."
  )
  return checkpoint_scope(report, shared) if "checkpoint" in report else toy_scope(report, shared)


def seeds_text(report: dict[str, Any], of_several: str) -> str:
  """Says how many seeds there are, and what intervals cover."""
  count = len(report["seeds"])
  if count == 1:
    return "one seed, so **intervals cover the choice of prompts alone and one small run decides nothing**"
  return f"{count} seeds, {of_several}; intervals cover prompts and seeds"


def toy_scope(report: dict[str, Any], shared: str) -> str:
  """Says what the numbers of toys are worth."""
  seeds = seeds_text(report, "each with a language model of its own")
  return (
    f"Toys on a tiny language model, {seeds}. {shared}\n\n"
    f"A task has 100 prompts. The test prompts are drawn with repeats from {TEST_PAIRS} of them, which no head was "
    "trained on, always the same; the intervals take the draws as independent and do not cover which prompts were "
    "set aside. The frozen language model has learned on all 100. Held-out pairs are of prompts that the head was "
    "not trained on either. Plots show the first seed."
  )


def checkpoint_scope(report: dict[str, Any], shared: str) -> str:
  """Says what the numbers of a checkpoint are worth, what scored them, and what was left out."""
  seeds = seeds_text(report, "which differ in prompts, samples and heads, not in the language model")
  rows = []
  for name, task in report["tasks"].items():
    quality = task["quality"]["kind"] or "the same"
    rows.append(
      [name, task["train"] or task["source"], task["judge"]["kind"], quality, task["max_new_tokens"]]
    )
  parts = [
    f"Language model `{report['checkpoint']}`, frozen; {seeds}. {shared} Test prompts are not among the training "
    "prompts. Plots show the first seed.",
    table(["task", "prompts", "judge", "quality, where the judge ties", "most tokens"], rows),
  ]
  parts += [
    f"Left out: `{name}`, which needs {', '.join(fields)}." for name, fields in report["left_out"].items()
  ]
  return "\n\n".join(parts)


def experiment(report: dict[str, Any], name: str) -> list[str]:
  """Returns the pieces about one experiment."""
  plots = [f"![settings](plots/{name}_settings.png)", f"![rewards](plots/{name}_rewards.png)"]
  if report["levels"][name] == "token":
    plots.insert(0, f"![positions](plots/{name}_positions.png)")
  return [
    "Winrate in percent of each head against:",
    winrate_table(report, name),
    component_table(report, name),
    vote_table(report, name),
    "Mean reward on test prompts, over seeds:",
    reward_table(report, name),
    "What the heads pick, and how well they rank held-out pairs (mean over seeds):",
    head_table(report, name),
    position_table(report, name) if report["levels"][name] == "token" else "",
    sentence_table(report, name) if report["levels"][name] == "token" else "",
    pairs_text(report, name),
    "\n\n".join(plots),
  ]


def component_table(report: dict[str, Any], name: str) -> str:
  """Returns winrates by reward alone, by quality alone, and their mean, where they are two numbers.

  The table above lets the quality decide where rewards tie; the two are different metrics.
  """
  rates = report["evaluation"][name].get("winrates_by_score")
  if rates is None:
    return ""
  arms, rows = [arm for arm in rates["reward"] if arm == head_of(arm)], []
  for other in rates["reward"][arms[0]]:
    row: list[Any] = [other]
    for arm in arms:
      both = [100 * rates[component][arm][other]["estimate"] for component in ("reward", "quality")]
      row += [*map(number, both), number(sum(both) / 2)]
    rows.append(row)
  header = [f"{arm}, by {kind}" for arm in arms for kind in ("reward", "quality", "their mean")]
  return "By reward alone and by quality alone:\n\n" + table(["against", *header], rows)


def number(value: float) -> str:
  """Returns percent with one digit."""
  return f"{value:.1f}"


def vote_table(report: dict[str, Any], name: str) -> str:
  """Returns accuracies of votes and of single samples, and heads against the best fixed settings of training."""
  votes = report["evaluation"][name].get("votes")
  if votes is None:
    return ""
  rows = []
  for arm, found in votes["arms"].items():
    against = votes["against_tuned"].get(arm)
    cells = [percent(against[kind]) if against else "" for kind in ("vote", "one")]
    rows.append([arm, percent(found["vote"]), percent(found["one"]), *cells])
  tuned = "; ".join(
    f"seed {seed}: {best['vote']} for votes, {best['one']} for one sample"
    for seed, best in votes["tuned"].items()
  )
  header = ["arm", "vote", "one sample", "vote against the best fixed", "one sample against the best fixed"]
  return (
    f"Right answers in percent, by the most frequent of {votes['count']} answers and by one. The best fixed setting "
    f"on training prompts is, of {tuned}. Winrates over it (ties 0.5) are 50 plus half the difference of "
    "accuracies:\n\n" + table(header, rows)
  )


def percent(found: dict[str, float]) -> str:
  """Returns a share in percent with its interval."""
  return f"{100 * found['estimate']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def winrate_table(report: dict[str, Any], name: str) -> str:
  """Returns winrates with intervals, a column a head's arm."""
  rates = report["evaluation"][name]["winrates"]
  arms = list(rates)

  rows = [[other, *(percent(rates[arm][other]) for arm in arms)] for other in rates[arms[0]]]
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


def sentence_table(report: dict[str, Any], name: str) -> str:
  """Returns the mean setting at first tokens of sentences and elsewhere, of a checkpoint's tasks (figure 5)."""
  picks, rows = report["evaluation"][name]["picks"], []
  for arm, tasks in picks[str(report["seeds"][0])].items():
    for task, found in tasks.items():
      if "mean_at_first" not in found:
        return ""
      row: list[Any] = [arm, task]
      for field in ("mean_at_first", "mean_elsewhere"):
        of_seeds = [picks[str(seed)][arm][task][field] for seed in report["seeds"]]
        known = [value for value in of_seeds if value is not None]
        row.append(float(np.mean(known)) if known else "none")
      rows.append(row)
  header = ["head", "task", "first token of a sentence", "other tokens"]
  return "Mean setting by place in the sentence:\n\n" + table(header, rows)


def pairs_text(report: dict[str, Any], name: str) -> str:
  """Says how many pairs there were, and how often each setting was chosen and rejected."""
  made = [report["pairs"][f"{name}/{seed}"] for seed in report["seeds"]]
  total = {key: sum(entry["counts"][key] for entry in made) for key in TOTALS}
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
  unjudged = sum(entry["counts"].get("unjudged", 0) for entry in made)
  if unjudged:
    same += f" {unjudged} had too few responses that could be judged."
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
