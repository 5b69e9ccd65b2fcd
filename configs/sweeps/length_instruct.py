"""Sweeps of LIFT (arXiv 2406.17744).

  python -m nr.sweep --config=configs/length_instruct.py:tiny --sweep=configs/sweeps/length_instruct.py:mix \
    --workdir=runs/mix

The paper reports R-DPO at two weights and the mixtures; the other grids are ours. Base model and pairs are
shared by all points that change neither the limits nor the world.
"""

from nr.sweeps.combinators import axis, fixed, product


def sweep_mix(config):
  """Which pairs LIFT sees: D, D' or both, with and without the likelihood of the chosen answer."""
  return fixed(
    product(
      axis("arms.lift.mix", ("plain", "augmented_only", "union")),
      axis("arms.lift.loss.nll_weight", (0.0, 0.3)),
    ),
    only(config, "lift"),
  )


def sweep_beta(config):
  """beta of DPO and of LIFT."""
  beta = axis(("arms.dpo.loss.beta", "arms.lift.loss.beta"), (0.01, 0.03, 0.1, 0.3, 1.0))
  return fixed(beta, only(config, "dpo", "lift"))


def sweep_length_penalty(config):
  """alpha of R-DPO, which penalises length in tokens; 0 is DPO. The paper: 0.01 and 0.1."""
  penalty = axis("arms.r_dpo_small.loss.length_penalty", (0.0, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0))
  return fixed(penalty, only(config, "r_dpo_small"))


def sweep_margin(config):
  """Room above the longer response in the loose limit, and by how much responses must differ.

  The world's longest limit is the longest answer and the largest margin.
  """
  return fixed(
    product(axis("lift.margin", (0, 1, 2, 4)), axis("lift.min_difference", (1, 2, 4))),
    {"world.max_limit": config.world.max_words + 4, **only(config, "lift")},
  )


def sweep_counter(config):
  """What a word is: ours, NLTK's rules (extra [synthesis]), or what stands between spaces."""
  return fixed(axis("lift.counter", ("words", "nltk", "spaces")), only(config, "lift"))


def only(config, *arms):
  """Returns the overrides that leave all other arms out."""
  return {f"arms.{arm}.mix": "" for arm in config.arms if arm not in arms}


def metrics_of(*arms):
  """Returns what limits and quality come to; `sft` is what arms begin from."""
  measures = {
    "over the limit": "violation",
    "quality": "quality",
    "words": "words",
    "words without a limit": "free_words",
    "quality without a limit": "free_quality",
  }
  return {
    f"{arm}: {name}": f"table.{arm}.{measure}" for arm in ("sft", *arms) for name, measure in measures.items()
  }


def metrics(config):
  """Of LIFT."""
  del config
  return metrics_of("lift")


def metrics_beta(config):
  """Of both arms that are swept."""
  del config
  return metrics_of("dpo", "lift")


def metrics_length_penalty(config):
  """Of R-DPO."""
  del config
  return metrics_of("r_dpo_small")
