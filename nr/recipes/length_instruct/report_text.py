"""The words and tables of report.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from nr.evaluation.reports import interval_cell, number, table

TITLES = {
  "sft": "before (SFT)",
  "dpo": "DPO",
  "r_dpo_small": "R-DPO, small alpha",
  "r_dpo_large": "R-DPO, large alpha",
  "lift_augmented_only": "LIFT, D' only",
  "lift": "LIFT, D plus D'",
  "lift_no_nll": "LIFT, D plus D', no NLL",
}


def render(report: Mapping[str, Any]) -> str:
  """Returns the text of report.md."""
  sections = [f"# Length-instruction fine-tuning, variant `{report['variant']}`"]
  sections += toy(report) if report["is_toy"] else files(report)
  sections += ["## Pairs", pairs(report), "## Training", training(report), "## Run", run(report)]
  return "\n\n".join(sections) + "\n"


def title(arm: str) -> str:
  """Returns what an arm is called in tables."""
  return TITLES.get(arm, arm)


def toy(report: Mapping[str, Any]) -> list[str]:
  """Returns the sections of the toy world."""
  return [
    verdict(report),
    "## With limits, and without",
    arms_table(report),
    "Violations are the share of answers with more words than the limit, or without an end of their own. Quality is "
    "the number of different words of the topic; an empty answer obeys every limit, so read the two together.",
    "![words](plots/words_by_limit.png)\n\n![violations](plots/violation_by_limit.png)\n\n"
    "![quality](plots/quality_by_limit.png)",
    "## Limits scaled down",
    scaled(report),
    "![scaled](plots/violation_by_scale.png)",
    "## The benchmark's rule",
    benchmark(report),
  ]


def verdict(report: Mapping[str, Any]) -> str:
  """Says which of the paper's findings appear, and how the means lie against the limit."""
  lines = [
    f"- {'yes' if held else 'no' if held is False else 'not measured'}: {name}"
    for name, held in report["checks"].items()
  ]
  seeds = len(report["seeds"])
  worth = (
    f"Means over {seeds} seeds, 95 % bootstrap intervals over seeds."
    if seeds > 1
    else "One seed: **one small run decides nothing**; the variant `seeds` repeats it."
  )
  over = overshoot(report)
  return "\n".join(
    ["The findings of the paper in this world:", "", *lines, "", worth, *([over] if over else [])]
  )


def overshoot(report: Mapping[str, Any]) -> str:
  """Says how far below its limits LIFT stays: the price that this world shows most clearly."""
  curve = report["curves"].get("lift")
  if curve is None:
    return ""
  limits, words = curve["limit"], curve["words"]
  mean_limit, mean_words = sum(limits) / len(limits), sum(words) / len(words)
  return (
    f"LIFT answers with {mean_words:.1f} words where the mean limit is {mean_limit:.1f}: what is far below its limit "
    "gives quality away, which the share of violations does not show."
  )


def arms_table(report: Mapping[str, Any]) -> str:
  """Returns violations, words and quality with limits, words and quality without."""
  header = ["arm", "violations", "words", "quality", "words without limit", "quality without limit"]
  fields = ("violation", "words", "quality", "free_words", "free_quality")
  rows = [
    [title(arm), *(interval_cell(row[field]) for field in fields)] for arm, row in report["table"].items()
  ]
  return table(header, rows)


def scaled(report: Mapping[str, Any]) -> str:
  """Returns violations by the scale of the limits."""
  names = [name for name in next(iter(report["table"].values())) if name.startswith("violation_x")]
  header = ["arm", "x1", *(name.removeprefix("violation_") for name in names)]
  rows = [
    [title(arm), *(interval_cell(row[name], 3) for name in ("violation", *names))]
    for arm, row in report["table"].items()
  ]
  return table(header, rows)


def benchmark(report: Mapping[str, Any]) -> str:
  """Returns violation, win and words by the rule of AlpacaEval-LI."""
  fields = ("benchmark_violation", "benchmark_win", "benchmark_words")
  rows = [
    [title(arm), *(interval_cell(row[field]) for field in fields)] for arm, row in report["table"].items()
  ]
  text = (
    "Baseline and limit are the shortest of three answers of the model before; a violation loses, quality decides "
    "the rest, ties count half."
  )
  return text + "\n\n" + table(["arm", "violations", "wins", "words"], rows)


def files(report: Mapping[str, Any]) -> list[str]:
  """Returns the sections of a given checkpoint: a few tables a benchmark."""
  sections = []
  first = next(iter(report["runs"].values()))
  for name in [key for key in first if key not in ("arm", "seed")]:
    rows = []
    for entry in report["runs"].values():
      found = entry[name]
      judged = f"{found['judged']} of {found['obeying']}"
      rows.append([title(entry["arm"]), entry["seed"], *_cells(found), judged, found["count"]])
    header = ["arm", "seed", "Vlt%", "Win%", "words", "judged of obeying", "prompts"]
    counted = (
      f"Words are counted by `{first[name]['counter']}`, judged by {first[name]['judge'] or 'nobody'}. Intervals are "
      "95 % bootstrap over prompts. An answer that did not end by itself violates."
    )
    if first[name]["seen"]:
      counted += f" **{first[name]['seen']} of these prompts are among the pairs that arms were trained on.**"
    sections += [f"## {name}", counted, table(header, rows)]
    sections += [
      part
      for part in (_differences(report, name), _by_limit(report, name), _scaled_files(report, name))
      if part
    ]
  return sections


def _cells(found: Mapping[str, Any]) -> list[str]:
  """Returns violations in percent, wins and words, with intervals over prompts where there are."""
  violation, win, words = _percents(found)
  if found["violation_ci95"]:
    violation += " ({:.1f} to {:.1f})".format(*(100 * bound for bound in found["violation_ci95"]))
    words += " ({:.0f} to {:.0f})".format(*found["words_ci95"])
  return [violation, win, words]


def _differences(report: Mapping[str, Any], name: str) -> str:
  rows = [
    [between, *(interval_cell(found[field], digits) for field, digits in (("violation", 3), ("words", 1)))]
    for between, found in report["differences"][name].items()
  ]
  told = "Paired by prompt, first seed, Student's 95 % intervals:"
  return f"{told}\n\n" + table(["difference", "share of violations", "words"], rows) if rows else ""


def _by_limit(report: Mapping[str, Any], name: str) -> str:
  """Returns violations and words with each fixed limit, and words without one."""
  first = next(iter(report["runs"].values()))[name]
  limits, is_free = list(first["by_limit"]), first["unlimited"] is not None
  header = ["arm", "seed", *(f"{kind}, limit {limit}" for limit in limits for kind in ("Vlt%", "words"))]
  rows = []
  for entry in report["runs"].values():
    found, row = entry[name], [title(entry["arm"]), entry["seed"]]
    for limit in limits:
      violation, _, words = _cells(found["by_limit"][limit])
      row += [violation, words]
    rows.append([*row, *([_cells(found["unlimited"])[2]] if is_free else [])])
  return table([*header, *(["words without limit"] if is_free else [])], rows) if limits or is_free else ""


def _percents(found: Mapping[str, Any]) -> list[str]:
  shares = [found["violation"], found["win"]]
  words = found["words"]
  return ["-" if each is None else f"{100 * each:.1f}" for each in shares] + [
    "-" if words is None else f"{words:.0f}"
  ]


def _scaled_files(report: Mapping[str, Any], name: str) -> str:
  scales: Sequence[str] = list(next(iter(report["runs"].values()))[name]["scales"])
  if not scales:
    return ""
  rows = [
    [title(entry["arm"]), entry["seed"], *(_percents(entry[name]["scales"][scale])[0] for scale in scales)]
    for entry in report["runs"].values()
  ]
  return table(["arm", "seed", *(f"Vlt% x{scale}" for scale in scales)], rows)


def pairs(report: Mapping[str, Any]) -> str:
  """Returns the counts of pairs and of what augmentation made of them."""
  rows = [
    [
      seed,
      found["pairs"],
      found["kept"],
      found["limited"],
      found["swaps"],
      number(found["chosen_words"]),
      number(found["rejected_words"]),
      *("-" if share is None else f"{100 * share:.1f}%" for share in found["shorter_wins"].values()),
    ]
    for seed, found in report["pairs"].items()
  ]
  header = ["seed", "pairs D", "kept", "limited D'", "swaps", "words chosen", "words rejected"]
  header += ["shorter wins in D", "in D'", "in both"]
  sampled = [
    f"Seed {seed}, sampled here: "
    + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
    for seed, found in report["pairs"].items()
    if (counts := found.get("sampling"))
  ]
  return "\n\n".join([table(header, rows), *sampled])


def training(report: Mapping[str, Any]) -> str:
  """Returns the last logged numbers of every training."""
  fields = ("preference_loss", "reward_accuracy", "reward_margin", "chosen_log_prob", "rejected_log_prob")
  rows = [
    [name, found["pairs"], *(number(found[field]) if field in found else "-" for field in fields)]
    for name, found in report["training"].items()
  ]
  left_out = [
    f"{name}, left out: " + ", ".join(f"{reason} {count}" for reason, count in found["left_out"].items())
    for name, found in report["training"].items()
    if found["left_out"]
  ]
  header = ["training", "pairs", "loss", "accuracy", "margin", "log p chosen", "log p rejected"]
  return "\n\n".join([table(header, rows), *left_out])


def run(report: Mapping[str, Any]) -> str:
  """Returns times and versions."""
  spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items())
  found = report["environment"]
  versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
  place = f"{found['devices']} x {found['device']}"
  return f"Stages: {spent}. On {place}; {versions}; commit {found['commit'] or 'unknown'}."
