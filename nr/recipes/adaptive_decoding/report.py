"""Stage `report`: report.json, report.md and plots."""

from typing import Any

import jax

from nr.evaluation import plots
from nr.recipes.adaptive_decoding import report_text, settings
from nr.recipes.stages import Artifact, StageContext, read_manifest, versions, write_json


def run(context: StageContext) -> Artifact:
  """Gathers every stage's numbers into the report."""
  report = gather(context)
  report["plots"] = draw(context, report)
  write_json(context.workdir / "report.json", report)
  (context.workdir / "report.md").write_text(report_text.render(report))
  return {"report": "report.json", "text": "report.md", "plots": report["plots"]}


def gather(context: StageContext) -> dict[str, Any]:
  """Returns the content of report.json."""
  inputs, config = context.inputs, context.config
  manifest, run = read_manifest(context.workdir), settings.experiments(config)
  found = {
    "recipe": config.recipe,
    "variant": config.variant,
    "seeds": list(config.seeds),
    "values": {name: list(experiment["values"]) for name, experiment in run.items()},
    "levels": {name: experiment.level for name, experiment in run.items()},
    "num_test_prompts": {name: each.num_test_prompts for name, each in run.items()},
    "variants": list(config.heads.variants),
    "language_model": inputs["language_model"],
    "pools": inputs["pools"],
    "pairs": inputs["pairs"],
    "heads": inputs["heads"],
    "evaluation": inputs["evaluate"],
    "environment": {
      "versions": versions(),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
    },
    "seconds": {name: entry["seconds"] for name, entry in manifest.items() if name != "report"},
  }
  if not settings.is_toy(config):
    specs = settings.task_specs(config)
    found["checkpoint"] = config.language_model.checkpoint
    found["tasks"] = {name: specs[name].to_dict() for name in settings.tasks_run(config)}
    found["left_out"] = settings.left_out(config)
  return found


def draw(context: StageContext, report: dict[str, Any]) -> list[str]:
  """Draws what the heads of the first seed picked; returns the plots' paths relative to the run directory."""
  folder, seed = context.workdir / "plots", str(report["seeds"][0])
  for name, evaluated in report["evaluation"].items():
    values, picks = report["values"][name], evaluated["picks"][seed]
    picked = {
      f"{arm}, {family}": found
      for arm, tasks in picks.items()
      for family, found in tasks.items()
      if not arm.endswith("_sample")
    }
    histograms = {label: (values, found["histogram"]) for label, found in picked.items()}
    plots.plot_curves(
      folder / f"{name}_settings.png",
      histograms,
      title=f"What the heads pick: {name}, seed {seed}",
      x_label="setting",
      y_label="share of the tokens",
    )
    if report["levels"][name] == "token":
      lines = {
        label: (list(range(len(found["mean_by_position"]))), found["mean_by_position"])
        for label, found in picked.items()
      }
      plots.plot_curves(
        folder / f"{name}_positions.png",
        lines,
        title=f"Mean setting by token of the response: {name}, seed {seed}",
        x_label="token",
        y_label="mean setting",
      )
    curves = {
      family: drawn_points(values, curve)
      for family, curve in report["pools"][f"{name}/{seed}"]["mean_reward_by_setting"].items()
    }
    plots.plot_curves(
      folder / f"{name}_rewards.png",
      curves,
      title=f"Mean reward by setting, training pools: {name}, seed {seed}",
      x_label="setting",
      y_label="reward",
    )
  return sorted(context.relative(path) for path in folder.glob("*.png"))


def drawn_points(values: list[float], curve: list[float | None]) -> tuple[list[float], list[float]]:
  """Returns the points of a curve without settings that were never drawn."""
  points = [(value, reward) for value, reward in zip(values, curve, strict=True) if reward is not None]
  return [value for value, _ in points], [reward for _, reward in points]
