"""Sweeps of adaptive decoding (arXiv 2411.09661).

  python -m nr.sweep --config=configs/adaptive_decoding.py:tiny --sweep=configs/sweeps/adaptive_decoding.py \
    --workdir=runs/adaptive

The paper gives neither beta nor the learning rate: the grid of `sweep` is ours. What it varies itself are
the level, the losses (sections 3.3, 4.6) and the pair rules (appendix A); other actions than temperatures
it only mentions. Language model, pools and pairs are shared by all points that do not change them.
"""

from nr.sweeps.combinators import axis, chain, fixed, product, together

# What stands in for the temperatures 0 to 1: each from nearly greedy to the model's own law (ours).
ACTIONS = {
  "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
  "top_k": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
  "top_p": (0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
  "min_p": (1.0, 0.5, 0.2, 0.1, 0.05, 0.0),
}


def sweep(config):
  """Learning rate and beta of the head's training: both set how far it moves, so they are varied together."""
  del config
  return product(
    axis("heads.train.optimizer.learning_rate", (3e-5, 1e-4, 3e-4, 1e-3)),
    axis("heads.lpo.beta", (0.05, 0.1, 0.5, 1.0)),
  )


def sweep_actions(config):
  """What the head chooses: temperatures, or how much of the distribution is kept."""
  del config
  actions = together(
    axis("experiments.mini.action", ACTIONS), axis("experiments.mini.values", ACTIONS.values())
  )
  # The likelihood of words under every setting, which the other losses need, is known for temperatures only.
  return fixed(actions, {"heads.variants": ("separate",)})


def sweep_pair_rules(config):
  """How a pair is picked from a pool, for tasks whose reward is graded.

  "constraint" takes it from the best and worst eighth, quarter (the paper: 4 of 16) and half of the pool.
  """
  rule, size = "experiments.mini.pair_rule", config.experiments.mini.num_samples
  return chain(
    axis(rule, ("extremes", "random_pair")),
    fixed(axis("experiments.mini.pair_top", (size // 8, size // 4, size // 2)), {rule: "constraint"}),
  )


def sweep_correctness(config):
  """The rule for rewards that are 0 or 1, beside the others, on sums alone."""
  del config
  rules = axis("experiments.mini.pair_rule", ("correctness", "extremes", "random_pair"))
  return fixed(rules, {"experiments.mini.families": ("sums",)})


def sweep_levels(config):
  """One setting a response, or one a token; of pools of N responses (the paper: 8, 10 or 16)."""
  del config
  return product(
    axis("experiments.mini.level", ("sequence", "token")), axis("experiments.mini.num_samples", (8, 16))
  )


def sweep_losses(config):
  """Equations 9, 10 and 11 and the likelihood of what was chosen; Eq. 11 to the letter; normalised by length."""
  del config
  every = {"heads.variants": ("separate", "joint", "latent", "nll")}
  return fixed(
    product(
      axis("heads.lpo.sequence_marginal", ("exact", "per_token")),
      axis("heads.lpo.is_length_normalised", (False, True)),
    ),
    every,
  )


def metrics(config):
  """Winrates of the head of Eq. 10 over the best fixed setting, and how it ranks held-out pairs."""
  return {
    "mini: winrate over the best fixed": "evaluation.mini.winrates.separate.best_single",
    "mini: winrate over the oracle": "evaluation.mini.winrates.separate.oracle",
    "hidden: winrate over the best fixed": "evaluation.hidden.winrates.separate.best_single",
    "sentences: winrate over the best fixed": "evaluation.sentences.winrates.separate.best_single",
    "mini: held-out pair accuracy": f"heads.mini/{config.seeds[0]}.heads.separate.held_out.accuracy",
    "mini: entropy of the head": f"heads.mini/{config.seeds[0]}.heads.separate.held_out.entropy",
  }


def metrics_losses(config):
  """The same winrate, of the heads of all four losses."""
  del config
  return {
    f"{experiment}: {variant} over the best fixed": f"evaluation.{experiment}.winrates.{variant}.best_single"
    for experiment in ("mini", "sentences")
    for variant in ("separate", "joint", "latent", "nll")
  }
