"""Runs of CoCoMix's recipe on very little text, stage by stage, in this process."""

import importlib
import shutil

from nr.recipes import cocomix
from nr.recipes.stages import run_stages


def make_config(variants=None, **changes):
  """The variant `miniature` on eight documents, with steps enough to run; `changes` by dotted name."""
  config = importlib.import_module("configs.cocomix").get_config("miniature")
  config.corpus.max_documents = 8
  for train in (config.teacher.train, config.sae.train, config.students.train):
    train.update(steps=2, eval_every=0, log_every=1)
    train.schedule.warmup_steps = 0
    train.checkpoint.every = 0
    train.mesh.data = 1  # programs for eight devices take longer to compile
  config.sae.train.steps, config.labels.devices = 8, 1
  if variants:
    with config.unlocked():
      config.targets.variants = variants
  config.update_from_flattened_dict(changes)
  cocomix.validate(config)
  return config


def run(config, workdir, last, begun=None):
  """Runs stages up to `last`, from a copy of the run `begun` where one is given; returns their artifacts."""
  if begun is not None:
    shutil.copytree(begun, workdir)
  stages = cocomix.stages(config)
  return run_stages(stages[: [stage.name for stage in stages].index(last) + 1], config, workdir)
