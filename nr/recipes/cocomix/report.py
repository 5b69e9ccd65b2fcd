"""Stage `report`: report.json for programs, report.md and plots for people."""

from typing import Any

import numpy as np

from nr.evaluation import plots
from nr.evaluation.statistics import Interval
from nr.recipes.cocomix import report_text, settings
from nr.recipes.cocomix.steering import page
from nr.recipes.cocomix.students import run_name
from nr.recipes.environment import environment
from nr.recipes.stages import Artifact, StageContext, read_manifest, write_json
from nr.training.writers import read_metrics

STUDENT_FIELDS = (
  "params",
  "activated_params",
  "train_tokens",
  "tokens_per_second",
  "input_wait_seconds",
  "train_flops_per_token",
  "forward_flops_per_token",
)


def run(context: StageContext) -> Artifact:
  """Gathers every stage's numbers into the report."""
  report = gather(context)
  report["plots"] = draw(context, report)
  write_json(context.workdir / "report.json", report)
  (context.workdir / "report.md").write_text(report_text.render(report))
  return {"report": "report.json", "text": "report.md", "plots": report["plots"]}


def gather(context: StageContext) -> dict[str, Any]:
  """Returns the content of report.json; sections of stages that did not run are left out."""
  inputs, config = context.inputs, context.config
  manifest = read_manifest(context.workdir)
  seeds, arms = inputs["students"]["seeds"], inputs["students"]["arms"]
  students = {arm: student(inputs, run_name(arm, seeds[0])) for arm in arms}
  report = {
    "recipe": config.recipe,
    "variant": config.variant,
    "corpus": inputs["tokenizer"]["corpus"],
    "tokenizer": {key: inputs["tokenizer"][key] for key in ("fingerprint", "vocab_size")},
  }
  if "teacher" in inputs:
    report["teacher"] = {key: value for key, value in inputs["teacher"].items() if key != "summary"}
  report.update({name: inputs[name] for name in ("sae", "labels") if name in inputs})
  if "labels" in inputs:
    report["label_kinds"] = label_kinds(config)
  report["students"] = students
  report["baseline"] = arms[0]
  report["comparisons"] = {arm: comparison(inputs, students, arm) for arm in arms[1:]}
  if arms[1:]:
    report["comparison"] = report["comparisons"][arms[1]]
  if "steer" in inputs:
    report["steering"] = inputs["steer"]
  report["environment"] = environment()
  report["seconds"] = {name: entry["seconds"] for name, entry in manifest.items() if name != "report"}
  return report


def label_kinds(config: Any) -> dict[str, dict[str, Any]]:
  """Returns of every kind of labels the fingerprint by which section "labels" knows it, and the arms that read it."""
  arms = [arm for arm in settings.arm_names(config) if settings.predicts_concepts(config, arm)]
  return {
    kind or "targets": {
      "variant": settings.attribution_id(settings.attribution_spec(config, kind)),
      "arms": [arm for arm in arms if settings.label_kind(config, arm) == kind],
    }
    for kind in settings.label_kinds(config)
  }


def comparison(inputs: Any, students: dict[str, Any], arm: str) -> dict[str, Any]:
  """Returns an arm against the baseline: loss, nats a token, and ratios of FLOPs a token and of speed."""
  found = inputs["evaluate"]["comparisons"][arm]
  seeds = inputs["students"]["seeds"]
  first, this = students[inputs["students"]["arms"][0]], students[arm]
  return {
    "difference": found["differences"][str(seeds[0])],
    "seeds": seeds,
    "over_seeds": found["over_seeds"],
    "differences_by_seed": found["differences"],
    "flops_ratio": this["train_flops_per_token"] / first["train_flops_per_token"],
    "speed_ratio": ratio(first["tokens_per_second"], this["tokens_per_second"]),
  }


def student(inputs: Any, name: str) -> dict[str, Any]:
  """Returns the report's entry of one student: sizes and speed of training, scores of evaluation."""
  trained = inputs["students"]["runs"][name]
  return {**{field: trained[field] for field in STUDENT_FIELDS}, **inputs["evaluate"]["runs"][name]}


def ratio(first: float | None, second: float | None) -> float | None:
  """Returns first / second, None where a resumed run measured no speed."""
  return first / second if first and second else None


def draw(context: StageContext, report: dict[str, Any]) -> list[str]:
  """Draws every plot and returns their paths relative to the run directory."""
  folder = context.workdir / "plots"
  draw_students(context, report)
  if "sae" in context.inputs:
    draw_autoencoder(context)
  if "steering" in report:
    page.draw(folder, report["steering"])
  return sorted(context.relative(path) for path in folder.glob("*.png"))


def draw_students(context: StageContext, report: dict[str, Any]) -> None:
  """Draws losses while training, and the final perplexities."""
  folder, inputs = context.workdir / "plots", context.inputs
  seed = inputs["students"]["seeds"][0]
  runs = {arm: inputs["students"]["runs"][run_name(arm, seed)] for arm in inputs["students"]["arms"]}
  curves = {}
  if "checkpoint" not in inputs.get("teacher", {"checkpoint": ""}):  # a given one was not trained here
    curves["teacher"] = curve(context, inputs["teacher"], "next_token_loss")
  curves.update({arm: curve(context, run, "next_token_loss") for arm, run in runs.items()})
  curves.update(
    {f"{arm}, validation sample": curve(context, run, "validation/loss") for arm, run in runs.items()}
  )
  nats = {"x_label": "step", "y_label": "nats a token"}
  plots.plot_curves(folder / "language_models.png", curves, title="Next-token loss", **nats)
  concept = {arm: curve(context, runs[arm], "concept_loss") for arm in inputs["students"]["predicting"]}
  if concept:
    plots.plot_curves(folder / "concept_loss.png", concept, title="Concept loss", **nats)
  bars = {arm: Interval(entry["val_ppl"], *entry["ppl_ci95"]) for arm, entry in report["students"].items()}
  plots.plot_intervals(
    folder / "perplexity.png", bars, title="Validation perplexity, 95 % interval", y_label="perplexity"
  )


def draw_autoencoder(context: StageContext) -> None:
  """Draws the autoencoder's training, where it was trained here, and how often its latents fire."""
  folder, sae = context.workdir / "plots", context.inputs["sae"]
  if "checkpoint" not in sae:
    sae_curves = {"fraction of variance unexplained": curve(context, sae, "fvu")}
    plots.plot_curves(
      folder / "sae.png",
      sae_curves,
      title="Sparse autoencoder",
      x_label="step",
      y_label="FVU of the batch",
      logarithmic=True,
    )
  density = np.load(context.path(sae["density"]), allow_pickle=False)
  plots.plot_histogram(
    folder / "sae_density.png",
    density,
    title="How often latents fire",
    x_label="log10 fraction of tokens",
    y_label="latents",
  )


def curve(context: StageContext, artifact: Artifact, metric: str) -> tuple[list[float], list[float]]:
  """Returns (steps, values) of a metric in a stage's log."""
  rows = [row for row in read_metrics(context.path(artifact["directory"])) if metric in row]
  return [row["step"] for row in rows], [row[metric] for row in rows]
