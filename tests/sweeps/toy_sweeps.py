"""Sweeps of the toy recipe."""

from nr.sweeps.combinators import axis, fixed, product


def sweep(config):
  del config
  return axis("train.rate", (0.25, 0.5, 0.75))


def sweep_grid(config):
  return fixed(
    product(axis("base.size", (2, 4)), axis("train.rate", (0.1, 1.0))),
    {"arms.first.mode": config.arms.second.mode},
  )


def sweep_arms(config):
  for beta in (0.1, 1.0):
    yield {f"arms.{arm}.beta": beta for arm in config.arms}


def sweep_refused(config):
  del config
  return axis("train.rate", (0.5, 2.0))


def sweep_misspelt(config):
  del config
  return [{"train.rat": 0.5}]


def metrics(config):
  del config
  return {"loss": "arms.lift 0.5.loss", "loss, interval": "arms.lift 0.5.interval", "flag": "flag"}


def metrics_grid(config):
  del config
  return {"loss": "arms.lift 0.5.loss", "missing": "arms.lift 0.5.los"}
