"""Stage `report`: report.json for programs, report.md and plots for people."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nr.evaluation import plots
from nr.evaluation.statistics import mean_over_runs, paired_difference
from nr.recipes.environment import environment
from nr.recipes.length_instruct import report_text, settings
from nr.recipes.length_instruct.arms import run_name
from nr.recipes.stages import Artifact, StageContext, read_manifest, write_json
from nr.training.writers import read_metrics

MEASURES = {
  "violation": ("limited", "violation"),
  "words": ("limited", "words"),
  "quality": ("limited", "quality"),
  "free_words": ("unlimited", "words"),
  "free_quality": ("unlimited", "quality"),
  "benchmark_violation": ("benchmark", "violation"),
  "benchmark_win": ("benchmark", "win"),
  "benchmark_words": ("benchmark", "words"),
}
"""Columns of the toy's table: where each stands in a run's measurements."""


def run(context: StageContext) -> Artifact:
  """Gathers every stage's numbers into the report."""
  report = gather(context)
  report["plots"] = draw(context, report) if report["is_toy"] else []
  write_json(context.workdir / "report.json", report)
  (context.workdir / "report.md").write_text(report_text.render(report), encoding="utf-8")
  return {"report": "report.json", "text": "report.md", "plots": report["plots"]}


def gather(context: StageContext) -> dict[str, Any]:
  """Returns the content of report.json."""
  inputs, config = context.inputs, context.config
  measured = inputs["evaluate"]
  is_toy = settings.is_toy(config)
  report = {
    "recipe": config.recipe,
    "variant": config.variant,
    "is_toy": is_toy,
    "seeds": measured["seeds"],
    "arms": measured["arms"],
    "lift": config.lift.to_dict(),
    "losses": {arm: config.arms[arm].to_dict() for arm in inputs["arms"]["arms"]},
    "base": inputs["base"],
    "pairs": inputs["pairs"]["files"],
    "limited_pairs": inputs["augment"]["files"],
    "training": {name: _of_training(context, each) for name, each in inputs["arms"]["runs"].items()},
    "runs": measured["runs"],
    "environment": environment(),
    "seconds": {
      name: entry["seconds"] for name, entry in read_manifest(context.workdir).items() if name != "report"
    },
  }
  if is_toy:
    report["table"] = {arm: _row(report, arm) for arm in report["arms"]}
    report["curves"] = {arm: _by_limit(report, arm) for arm in report["arms"]}
    report["checks"] = checks(report["table"])
  else:
    report["differences"] = differences(measured)
  return report


def differences(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns paired differences over the prompts of each benchmark, first seed, with 95 % intervals.

  Every arm minus the model before, and every other arm minus plain DPO.

  Returns:
    benchmark -> "arm minus other" -> violation and words, of the prompts that both answered;
    None where they answered none.
  """
  arms, seed = measured["arms"], measured["seeds"][0]
  before, *trained = arms
  compared = [(arm, before) for arm in trained] + [(arm, "dpo") for arm in trained if arm != "dpo" in trained]
  titles = [name for name in measured["runs"][run_name(before, seed)] if name not in ("arm", "seed")]

  def difference(title: str, field: str, arm: str, other: str) -> dict[str, float] | None:
    sides = [measured["runs"][run_name(each, seed)][title]["by_case"][field] for each in (arm, other)]
    both = [pair for pair in zip(*sides, strict=True) if None not in pair]
    return paired_difference(*np.array(both).T)._asdict() if both else None

  return {
    title: {
      f"{arm} minus {other}": {
        field: difference(title, field, arm, other) for field in ("violation", "words")
      }
      for arm, other in compared
    }
    for title in titles
  }


def _of_training(context: StageContext, trained: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what the last logged step of a training says."""
  rows = read_metrics(context.path(trained["directory"]))
  fields = ("preference_loss", "reward_accuracy", "reward_margin", "chosen_log_prob", "rejected_log_prob")
  last = {field: row[field] for row in rows for field in fields if field in row}
  kept = {field: trained[field] for field in ("pairs", "left_out", "mix")}
  return {**kept, "seconds": trained["summary"].get("seconds"), **last}


def _values(report: Mapping[str, Any], arm: str, section: str, field: str) -> list[float]:
  """Returns one measurement of an arm, by seed; what could not be measured is left out."""
  found = [report["runs"][run_name(arm, seed)][section][field] for seed in report["seeds"]]
  return [value for value in found if value is not None]


def _row(report: Mapping[str, Any], arm: str) -> dict[str, Any]:
  row = {name: mean_over_runs(_values(report, arm, *place)) for name, place in MEASURES.items()}
  scales = report["runs"][run_name(arm, report["seeds"][0])]["scaled"]
  for scale in scales:
    values = [report["runs"][run_name(arm, seed)]["scaled"][scale]["violation"] for seed in report["seeds"]]
    row[f"violation_x{scale}"] = mean_over_runs([value for value in values if value is not None])
  return {name: None if value is None else value._asdict() for name, value in row.items()}


def _by_limit(report: Mapping[str, Any], arm: str) -> dict[str, list[float]]:
  """Returns limit, words, violation and quality of an arm, means over seeds."""
  runs = [report["runs"][run_name(arm, seed)]["by_limit"] for seed in report["seeds"]]
  limits = list(runs[0])
  curves = {
    field: [float(np.mean([run[limit][field] for run in runs])) for limit in limits]
    for field in ("words", "violation", "quality")
  }
  return {"limit": [int(limit) for limit in limits], **curves}


def checks(table: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | None]:
  """Returns whether the paper's findings appear; None where an arm is missing.

  Bounds are those of the experiment's specification: violations of LIFT below 0.1, those of
  the model before above 0.4 and of DPO above that, of R-DPO above 0.4, and quality without a
  limit at least 95 % of DPO's.
  """

  def value(arm: str, name: str) -> float:
    return table[arm][name]["estimate"]

  rules = {
    "LIFT follows limits (violations below 0.1)": lambda: value("lift", "violation") < 0.1,
    "the model before does not (above 0.4)": lambda: value("sft", "violation") > 0.4,
    "DPO makes it worse": lambda: value("dpo", "violation") > value("sft", "violation"),
    "R-DPO cannot follow limits (above 0.4)": lambda: (
      min(value(arm, "violation") for arm in ("r_dpo_small", "r_dpo_large")) > 0.4
    ),
    "R-DPO shortens answers, the larger weight more": lambda: (
      value("r_dpo_large", "free_words") < value("r_dpo_small", "free_words") < value("dpo", "free_words")
    ),
    "LIFT loses no quality without a limit (at least 0.95 of DPO's)": lambda: (
      value("lift", "free_quality") >= 0.95 * value("dpo", "free_quality")
    ),
    "LIFT wins more of the benchmark than DPO": lambda: (
      value("lift", "benchmark_win") > value("dpo", "benchmark_win")
    ),
  }
  found: dict[str, bool | None] = {}
  for name, rule in rules.items():
    try:
      found[name] = bool(rule())
    except (KeyError, TypeError):  # an arm that was left out, or a number that is not there
      found[name] = None
  return found


def draw(context: StageContext, report: Mapping[str, Any]) -> list[str]:
  """Draws every plot and returns their paths relative to the run directory."""
  folder = context.workdir / "plots"
  curves = report["curves"]
  limits = next(iter(curves.values()))["limit"]
  words = {arm: (limits, each["words"]) for arm, each in curves.items()}
  plots.plot_curves(
    folder / "words_by_limit.png",
    {**words, "the limit": (limits, limits)},
    title="Words of answers by the limit in the prompt",
    x_label="limit, words",
    y_label="mean words",
  )
  for field, label in (("violation", "share of violations"), ("quality", "mean quality")):
    plots.plot_curves(
      folder / f"{field}_by_limit.png",
      {arm: (limits, each[field]) for arm, each in curves.items()},
      title=f"{label.capitalize()} by the limit in the prompt",
      x_label="limit, words",
      y_label=label,
    )
  names = [name for name in next(iter(report["table"].values())) if name.startswith("violation_x")]
  scales = [1.0, *(float(name.removeprefix("violation_x")) for name in names)]
  plots.plot_curves(
    folder / "violation_by_scale.png",
    {
      arm: (scales, [row[name]["estimate"] for name in ("violation", *names)])
      for arm, row in report["table"].items()
    },
    title="Violations when every limit is scaled",
    x_label="scale of the limits",
    y_label="share of violations",
  )
  return sorted(context.relative(path) for path in folder.glob("*.png"))
