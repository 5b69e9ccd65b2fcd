"""Stage `report`: report.json for programs, report.md and plots for people."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from nr.evaluation import plots
from nr.evaluation.reports import interval_cell, table
from nr.evaluation.statistics import Interval, bootstrap_ratio, mean_over_runs, paired_difference
from nr.recipes.divpo import settings
from nr.recipes.divpo.arms import run_name
from nr.recipes.environment import environment
from nr.recipes.stages import Artifact, StageContext, read_manifest, write_json
from nr.training.writers import read_metrics

# Columns of the table: field of a run's measurements, title, digits, and what is better.
MEASURES = {
  "validity": ("valid", 3),
  "distinct_valid": ("different valid texts over texts", 3),
  "attribute_entropy": ("attribute entropy, nats", 2),
  "top_share": ("share of the most frequent value", 3),
  "values": ("values seen", 1),
  "uniqueness": ("uniqueness", 3),
  "winrate": ("winrate against base", 3),
  "mean_tokens": ("tokens", 1),
}
POOL_MEASURES = {
  "unique_words": "unique words (higher is more diverse)",
  "unique_words_share": "unique words over words (higher)",
  "compression_ratio": "compression ratio (lower)",
  "self_bleu": "self-BLEU (lower)",
}
# Fields that every prompt has, for intervals over prompts.
PROMPT_MEASURES = ("validity", "distinct_valid", "mean_tokens")
TRAINING = (
  "pair_share",
  "preference_loss",
  "reward_accuracy",
  "reward_margin",
  "chosen_log_prob",
  "rejected_log_prob",
)


def run(context: StageContext) -> Artifact:
  """Gathers every stage's numbers into the report."""
  report = gather(context)
  report["plots"] = draw(context, report)
  write_json(context.workdir / "report.json", report)
  (context.workdir / "report.md").write_text(render(report), encoding="utf-8")
  return {"report": "report.json", "text": "report.md", "plots": report["plots"]}


def gather(context: StageContext) -> dict[str, Any]:
  """Returns the content of report.json."""
  inputs, config = context.inputs, context.config
  measured = inputs["evaluate"]
  arms, seeds = measured["arms"], measured["seeds"]
  values = {
    arm: {field: [measured["runs"][run_name(arm, seed)][field] for seed in seeds] for field in MEASURES}
    for arm in arms
  }
  return {
    "recipe": config.recipe,
    "variant": config.variant,
    "is_toy": settings.is_toy(config),
    "seeds": seeds,
    "arms": arms,
    "settings": {arm: config.arms[arm].to_dict() for arm in inputs["arms"]["arms"]},
    "steps": config.train.steps,
    "table": {
      arm: {field: over_seeds(each) for field, each in fields.items()} for arm, fields in values.items()
    },
    "over_prompts": over_prompts(measured),
    "entropy_over_base": {
      arm: paired(values[arm]["attribute_entropy"], values[settings.BASE]["attribute_entropy"])
      for arm in arms
      if arm != settings.BASE
    },
    "checks": checks(values),
    "training": {name: last_row(context, each) for name, each in inputs["arms"]["runs"].items()},
    "rounds": {name: of_rounds(each["rounds"]) for name, each in inputs["arms"]["runs"].items()},
    "step_seconds": {name: of_steps(config, each) for name, each in inputs["arms"]["runs"].items()},
    "runs": measured["runs"],
    "environment": environment(),
    "seconds": {
      name: entry["seconds"] for name, entry in read_manifest(context.workdir).items() if name != "report"
    },
  }


def over_seeds(values: list[float | None]) -> dict[str, float] | None:
  """Returns the mean over seeds with its interval; None where a seed has no number."""
  return None if any(value is None for value in values) else mean_over_runs(values)._asdict()


def over_prompts(measured: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns 95 % intervals over the prompts of the first seed, and of the differences between arms.

  None where there is one prompt. Prompts, not texts, are resampled.
  """
  arms, seed = measured["arms"], measured["seeds"][0]
  runs = {arm: measured["runs"][run_name(arm, seed)]["by_prompt"] for arm in arms}
  prompts = list(runs[arms[0]])
  if len(prompts) < 2:
    return None
  ones, found = np.ones(len(prompts)), {}
  for field in PROMPT_MEASURES:
    values = {arm: np.array([runs[arm][prompt][field] for prompt in prompts], float) for arm in arms}
    found[field] = {
      "arms": {arm: bootstrap_ratio(each, ones, seed=0)._asdict() for arm, each in values.items()},
      "differences": {
        f"{arm} minus {other}": paired_difference(values[arm], values[other])._asdict()
        for arm, other in itertools.permutations(arms, 2)
      },
    }
  return {"prompts": len(prompts), "measures": found}


def paired(first: list[float | None], second: list[float | None]) -> dict[str, float] | None:
  """Returns the mean difference over seeds with Student's 95 % interval."""
  if any(value is None for value in (*first, *second)):
    return None
  return paired_difference(np.array(first), np.array(second))._asdict()


def last_row(context: StageContext, trained: Mapping[str, Any]) -> dict[str, float]:
  """Returns what the last logged step of a training says."""
  rows = read_metrics(context.path(trained["directory"]))
  return {field: row[field] for row in rows for field in TRAINING if field in row}


def of_steps(config: Any, trained: Mapping[str, Any]) -> dict[str, float | None]:
  """Returns the seconds of a step, and of them those of sampling with scoring and of training.

  Means over the steps behind the first one, which compiles; offline all sampling is done before it.
  None where the last process did no further step.
  """
  whole, rounds = trained["summary"].get("step_seconds"), trained["rounds"]
  later = [row["seconds"] for row in rounds[1:] if row["seconds"] is not None]
  per_round = config.arms[trained["arm"]].steps_per_round
  sampling = float(np.mean(later)) / per_round if later else 0.0
  return {
    "step": whole,
    "sampling": None if whole is None else sampling,
    "training": None if whole is None else whole - sampling,
  }


def of_rounds(rounds: list[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns what the pools of a run came to: sums, and the mean score of the first and the last tenth."""
  tenth = max(1, len(rounds) // 10)
  ends = {
    name: [row["mean_score"] for row in part if row["mean_score"] is not None]
    for name, part in (("first_score", rounds[:tenth]), ("last_score", rounds[-tenth:]))
  }
  sums = {
    name: sum(row[name] for row in rounds)
    for name in ("pools", "samples", "unscored", "examples", "empty_steps")
  }
  means = {name: float(np.mean(scores)) if scores else None for name, scores in ends.items()}
  seconds = sum(row["seconds"] or 0.0 for row in rounds)
  return {"rounds": len(rounds), **sums, **means, "seconds": seconds}


def checks(values: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, bool | None]:
  """Returns whether the paper's findings hold in every seed; None where an arm is missing.

  Bounds are those of the experiment's specification.
  """

  def measured(arm: str, field: str) -> np.ndarray:
    if None in values[arm][field]:
      raise KeyError(field)  # nothing valid to measure in some seed
    return np.array(values[arm][field], float)

  def entropy(arm: str) -> np.ndarray:
    return measured(arm, "attribute_entropy")

  def validity(arm: str) -> np.ndarray:
    return measured(arm, "validity")

  base = settings.BASE
  rules = {
    "online DPO loses more than 0.5 nats of attribute entropy": (
      lambda: entropy("dpo_online") < entropy(base) - 0.5
    ),
    "online DivPO gains more than 0.5 nats": lambda: entropy("divpo_online") > entropy(base) + 0.5,
    "online DivPO stays valid (above 0.9)": lambda: validity("divpo_online") > 0.9,
    "a random choice from DivPO's sets collapses like DPO": (
      lambda: entropy("random_online") < entropy(base) - 0.5
    ),
    "offline DivPO is more diverse than offline DPO": (
      lambda: entropy("divpo_offline") > entropy("dpo_offline")
    ),
    "offline and without NLL, DPO loses validity": lambda: validity("dpo_offline_no_nll") < validity(base),
    "offline and without NLL, DivPO loses validity": (
      lambda: validity("divpo_offline_no_nll") < validity(base)
    ),
  }
  found: dict[str, bool | None] = {}
  for name, rule in rules.items():
    try:
      found[name] = bool(np.all(rule()))
    except (KeyError, TypeError):
      found[name] = None
  return found


def render(report: Mapping[str, Any]) -> str:
  """Returns the text of report.md."""
  seeds = len(report["seeds"])
  worth = (
    f"Means over {seeds} seeds with 95 % bootstrap intervals over seeds."
    if seeds > 1
    else "One seed: **one small run decides nothing**; the variant `seeds` repeats it."
  )
  yes_no = {True: "yes", False: "no", None: "not measured"}
  held = [f"- {yes_no[value]}: {name}" for name, value in report["checks"].items()]
  rows = [
    [arm, *(interval_cell(report["table"][arm][field], digits) for field, (_, digits) in MEASURES.items())]
    for arm in report["arms"]
  ]
  pool_rows = [
    [arm, *(_mean_of_pools(report, arm, field) for field in POOL_MEASURES)] for arm in report["arms"]
  ]
  training = [[name, *_training_cells(row)] for name, row in report["training"].items()]
  sections = [
    f"# Diverse preference optimization, variant `{report['variant']}`",
    worth,
    *(
      ["The findings of the paper in this world, in every seed:\n\n" + "\n".join(held)]
      if report["is_toy"]
      else []
    ),
    "## What the models write",
    table(["model", *(title for title, _ in MEASURES.values())], rows),
    "Validity first: diversity is measured over valid texts alone, and a model that writes few of them can look "
    "diverse. Uniqueness is the number of values seen over the number of texts, which is the same for all.",
    "![entropy](plots/attribute_entropy.png)\n\n![validity](plots/validity.png)",
    *(prompts_section(report["over_prompts"]) if report["over_prompts"] else []),
    "## Pools of all texts",
    table(["model", *POOL_MEASURES.values()], pool_rows),
    "## Training, mean over the last logging window",
    table(["run", *TRAINING], training),
    "The log-probabilities of chosen and rejected texts may both fall while the margin grows: that is how "
    "validity is lost offline, and what the NLL term is for.",
    "## Pools that were drawn",
    table(
      [
        "run",
        "rounds",
        "pools",
        "samples",
        "not scored",
        "examples",
        "score, first tenth",
        "last tenth",
        "seconds",
      ],
      [[name, *row.values()] for name, row in report["rounds"].items()],
    ),
    "![rounds](plots/validity_by_round.png)",
    "## Seconds of a step",
    table(
      ["run", "step", "of it sampling and scoring", "of it training"],
      [
        [name, *("-" if value is None else value for value in row.values())]
        for name, row in report["step_seconds"].items()
      ],
    ),
    f"Seconds by stage: {report['seconds']}",
  ]
  return "\n\n".join(sections) + "\n"


def _training_cells(row: Mapping[str, float]) -> list[Any]:
  """Returns the numbers of a training; without a pair in the window there is nothing to show but that."""
  share = row.get("pair_share")
  return [share, *(row.get(field) if share != 0 else "-" for field in TRAINING[1:])]


def prompts_section(found: Mapping[str, Any]) -> list[str]:
  """Returns the section with intervals over prompts."""
  measures = found["measures"]
  arms = list(measures[PROMPT_MEASURES[0]]["arms"])
  rows = [
    [arm, *(interval_cell(measures[field]["arms"][arm], 3) for field in PROMPT_MEASURES)] for arm in arms
  ]
  differences = [
    [name, *(interval_cell(measures[field]["differences"][name], 3) for field in PROMPT_MEASURES)]
    for name in measures[PROMPT_MEASURES[0]]["differences"]
  ]
  titles = [MEASURES[field][0] for field in PROMPT_MEASURES]
  return [
    f"## Over {found['prompts']} held-out prompts, first seed",
    table(["model", *titles], rows),
    table(["difference", *titles], differences),
    "Means over prompts with 95 % bootstrap intervals; differences are paired by prompt (Student's t).",
  ]


def _mean_of_pools(report: Mapping[str, Any], arm: str, field: str) -> float | None:
  found = [report["runs"][run_name(arm, seed)]["pools"].get(field) for seed in report["seeds"]]
  return None if None in found else float(np.mean(found))


def draw(context: StageContext, report: Mapping[str, Any]) -> list[str]:
  """Draws every plot and returns their paths relative to the run directory."""
  folder = context.workdir / "plots"
  for field in ("attribute_entropy", "validity"):
    drawn = {
      arm: Interval(**{name: _finite(row[field], name) for name in ("estimate", "low", "high")})
      for arm, row in report["table"].items()
      if row[field] is not None
    }
    plots.plot_intervals(folder / f"{field}.png", drawn, title=MEASURES[field][0], y_label=MEASURES[field][0])
  curves = {}
  for name, trained in context.inputs["arms"]["runs"].items():
    scored = [(row["round"], row["mean_score"]) for row in trained["rounds"] if row["mean_score"] is not None]
    if len(scored) > 1 and name.endswith(f"seed{report['seeds'][0]}"):
      curves[name] = tuple(zip(*scored))
  if curves:
    plots.plot_curves(
      folder / "validity_by_round.png",
      curves,
      title="Score of the pools while training, first seed",
      x_label="round",
      y_label="mean score",
    )
  return sorted(context.relative(path) for path in folder.glob("*.png"))


def _finite(interval: Mapping[str, float], name: str) -> float:
  return interval[name] if np.isfinite(interval[name]) else interval["estimate"]
