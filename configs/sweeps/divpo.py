"""Sweeps of DivPO (arXiv 2501.18101).

  python -m nr.sweep --config=configs/divpo.py:tiny --sweep=configs/sweeps/divpo.py:beta --workdir=runs/beta

The authors vary beta (of DPO), rho and the criterion; N, ties, rounds and the weight of the likelihood
are ours. The model that arms begin from is shared by all points that do not change it.
"""

from nr.sweeps.combinators import axis, fixed, product

CRITERIA = ("probability", "frequency", "attribute_frequency", "jaccard", "random")
ONLINE = ("dpo_online", "divpo_online")
OFFLINE = ("dpo_offline", "divpo_offline")


def sweep_beta(config):
  """beta of the online arms."""
  return fixed(axis(fields(ONLINE, "loss.beta"), (0.01, 0.03, 0.1, 0.3, 1.0)), only(config, ONLINE))


def sweep_rho(config):
  """The share of the reward scale that counts as good and as bad.

  Where rewards are 0 or 1, every rho below 0.5 gives the same sets, and 0.5 takes all responses into both.
  """
  arms = ("divpo_online",)
  return fixed(axis(fields(arms, "select.rho"), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)), only(config, arms))


def sweep_criteria(config):
  """Which response is the most diverse, and what becomes of pools whose rewards are all equal."""
  arms = ("divpo_online",)
  return fixed(
    product(
      axis(fields(arms, "select.criterion"), CRITERIA),
      axis(fields(arms, "select.tie_policy"), ("diversity_only", "skip")),
    ),
    only(config, arms),
  )


def sweep_pool_size(config):
  """N, the responses of a pool."""
  return fixed(axis("sampling.num_samples", (2, 4, 8, 16, 32)), only(config, ONLINE))


def sweep_rounds(config):
  """From online to offline: training steps on the pools of a round; 0 is one round for the whole run."""
  steps = (1, 5, 15, 50, 0)
  return fixed(axis(fields(ONLINE, "steps_per_round"), steps), only(config, ONLINE))


def sweep_nll(config):
  """The weight of the chosen response's likelihood, off the policy."""
  return fixed(axis(fields(OFFLINE, "loss.nll_weight"), (0.0, 0.1, 0.3, 1.0)), only(config, OFFLINE))


def fields(arms, name):
  """Returns a field of several arms, which are swept together."""
  return [f"arms.{arm}.{name}" for arm in arms]


def only(config, arms):
  """Returns the overrides that leave all other arms out."""
  return {f"arms.{arm}.select.method": "" for arm in config.arms if arm not in arms}


def metrics_of(arms):
  """Returns validity and diversity of arms; `base` is what they begin from."""
  measures = {"valid": "validity", "entropy, nats": "attribute_entropy", "unique": "uniqueness"}
  return {
    f"{arm}: {name}": f"table.{arm}.{measure}"
    for arm in ("base", *arms)
    for name, measure in measures.items()
  }


def metrics(config):
  """Of the online arms."""
  del config
  return metrics_of(ONLINE)


def metrics_rho(config):
  """Of the one arm that is swept."""
  del config
  return metrics_of(("divpo_online",))


metrics_criteria = metrics_rho


def metrics_nll(config):
  """Of the offline arms."""
  del config
  return metrics_of(OFFLINE)
