"""A recipe of three small stages; its config and its sweeps are beside it."""

from nr.recipes.stages import Stage, write_json


def validate(config):
  if config.train.rate > 1:
    raise ValueError(f"train.rate={config.train.rate}: at most 1")


def stages(config):
  del config
  return [
    Stage("base", base, sections=("base", "seed")),
    Stage("train", train, sections=("train",), inputs=("base",)),
    Stage("report", report, sections=("recipe",), inputs=("base", "train")),
  ]


def base(context):
  path = context.directory / "made_in.txt"
  path.write_text(context.workdir.name)
  return {"value": context.config.base.size + context.config.seed, "path": context.relative(path)}


def train(context):
  rate = context.config.train.rate
  if rate == 0.75:
    raise RuntimeError("the loss is not finite")
  loss = context.inputs["base"]["value"] * rate
  return {"loss": loss, "interval": {"estimate": loss, "low": loss - 1, "high": loss + 1}}


def report(context):
  write_json(context.workdir / "report.json", {"arms": {"lift 0.5": context.inputs["train"]}, "flag": True})
  (context.workdir / "report.md").write_text("toy\n")
  return {"report": "report.json"}
