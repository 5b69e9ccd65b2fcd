"""Sweeps of CoCoMix (arXiv 2502.08524): one choice at a time.

  python -m nr.sweep --config=configs/cocomix.py:tiny --sweep=configs/sweeps/cocomix.py:sign --workdir=runs/sign

Three seeds of each student everywhere, for one small run decides nothing. Teacher, autoencoder and labels
are shared by all points that do not change them. The paper's comparisons with other methods (section 3.3:
distillation, pause tokens, direct regression, parts of CoCoMix alone) are `methods` here, a run each, and the arms of
one run in configs/cocomix.py:ablations.
"""

from nr.sweeps.combinators import axis, chain, fixed, product, together

SEEDS = {"students.seeds": (0, 1, 2)}
ARM = "students.arms.cocomix"
EQUATION_1 = {
  "targets.act": "pre",
  "targets.restrict_active": False,
  "targets.scope": "next",
  "targets.eval_point": "recon",
}
"""Eq. 1 of the paper's first version to the letter."""
CODE = {"targets.restrict_active": False, "targets.mask_last": False}
"""As the released code has it."""


def sweep_sign(config):
  """Labels that raise the teacher's loss (paper and code), that lower it, or either. The paper has no such ablation."""
  del config
  return fixed(axis("targets.sign", ("paper", "negated", "abs")), SEEDS)


def sweep_attribution(config):
  """From the released code's labels to those of Eq. 1, each difference by itself, and the paper's own ablation.

  That is: the most active latents instead of attributed ones (section 3.3). A gradient at the reconstruction of one
  position, with the losses of all later ones, is left out: it takes a pass a position, which is a run of its own.
  """
  del config
  return fixed(
    chain(
      [{}, CODE],
      [{"targets.act": "pre", "targets.restrict_active": False}],
      axis("targets.scope", ("next",)),
      axis("targets.eval_point", ("recon_everywhere",)),
      [{"targets.scope": "next", "targets.eval_point": "recon"}, EQUATION_1],
      axis("targets.criterion", ("activation",)),
    ),
    SEEDS,
  )


def sweep_sign_and_attribution(config):
  """Every sign with every multiplier and scope: whether the sign that helps depends on what it is the sign of."""
  del config
  multipliers = [
    {"targets.act": "post"},
    {"targets.act": "pre", "targets.restrict_active": False},
  ]
  signs, scopes = axis("targets.sign", ("paper", "negated", "abs")), axis("targets.scope", ("future", "next"))
  return fixed(product(signs, multipliers, scopes), SEEDS)


def sweep_targets(config):
  """How many labels, which positions have them, and what counts as one."""
  del config
  return fixed(
    chain(
      [{}, CODE],
      axis("targets.k_attr", (1, 2, 8)),
      axis("targets.restrict_active", (False,)),
      axis("targets.mask_first", (True,)),
      axis("targets.drop_nonpositive", (True,)),
    ),
    SEEDS,
  )


def sweep_label_weights(config):
  """Labels that count equally (paper), or by their share of the attribution, few and many (ours)."""
  del config
  return fixed(
    product(axis("targets.weights", ("uniform", "score")), axis("targets.k_attr", (2, 4, 8))), SEEDS
  )


def sweep_methods(config):
  """Another method in CoCoMix's place, each against the same baseline: the comparisons of section 3.3.

  Pauses and thoughts, which have no concept path, are as wide as the baseline.
  """
  width = {f"{ARM}.model.model_dim": config.students.arms.ntp.model.model_dim}
  mode, kd = f"{ARM}.concept.mode", {f"{ARM}.kd_weight": 0.1}
  regressions = [{mode: "hidden", **point} for point in axis(f"{ARM}.regression", ("l1", "l2", "cosine"))]
  return fixed(
    chain(
      axis(mode, ("cocomix", "prediction_only", "mix_only", "add")),
      [{mode: "none", **width, **kd}],
      [{mode: "pause", **width}, {mode: "pause", **width, **kd}],
      regressions,
      [{mode: "thought", **width, f"{ARM}.concept.insert_at": 0}],
      [{mode: "cocomix", **kd}],
    ),
    SEEDS,
  )


def metrics_methods(config):
  """Losses in nats a token; what not every method has is left to the reports of its runs."""
  names = ("difference, nats", "CoCoMix, nats", "baseline, nats", "FLOPs, ratio")
  found = metrics(config)
  return {name.replace("CoCoMix", "this method"): found[name] for name in names}


def sweep_backbone(config):
  """GPT-2 students, and Llama's: rotary positions, which a concept shares with its token, RMS norms, gated MLPs.

  The Llama baseline is as wide as CoCoMix; its MLPs have the parameters that concepts activate.
  """
  student, arms = config.students.arms.cocomix, ("cocomix", "ntp")
  width, layers = student.model.model_dim, student.model.num_layers
  hidden = -(-8 * width // (3 * 64)) * 64  # Llama's own
  extra = round((config.sae.num_latents + student.concept.top_k) / (3 * layers))
  llama = {f"students.arms.{arm}.model.family": "llama" for arm in arms}
  llama |= {f"students.arms.{arm}.model.model_dim": width for arm in arms}
  llama |= {f"{ARM}.model.mlp_dim": hidden, "students.arms.ntp.model.mlp_dim": hidden + extra}
  return fixed([{}, llama], SEEDS)


def sweep_length(config):
  """Tokens of a window, of the teacher's context too: labels and concepts of shorter and longer contexts."""
  return fixed(axis("window.length", [config.window.length * times // 2 for times in (1, 2, 4)]), SEEDS)


def sweep_concepts(config):
  """C, the number of concepts; the baseline is made as wide as matches the parameters that a token uses."""
  counts = (128, 256, 512, 1024)
  widths = [matched_width(config, count) for count in counts]
  return fixed(
    together(axis("sae.num_latents", counts), axis("students.arms.ntp.model.model_dim", widths)), SEEDS
  )


def sweep_top_k(config):
  """Concepts mixed into a vector: the first one alone, and up to twice as many as the autoencoder has active."""
  active = config.sae.k
  counts = sorted({1, max(2, active // 4), active, 2 * active})
  return fixed(axis(f"{ARM}.concept.top_k", counts), SEEDS)


def sweep_mixing(config):
  """Where predicted concepts go: a row of their own (paper), added to the token's, or mixed without being learnt.

  Each with the released code's normalisation and with Eq. 3 to the letter.
  """
  del config
  modes = axis(f"{ARM}.concept.mode", ("cocomix", "add", "mix_only"))
  return fixed(product(modes, axis(f"{ARM}.concept.norm", ("reference", "none"))), SEEDS)


def sweep_insertion(config):
  """The block before which concepts are inserted: the later, the fewer rows are doubled."""
  layers = range(config.students.arms.cocomix.model.num_layers)
  return fixed(axis(f"{ARM}.concept.insert_at", layers), SEEDS)


def sweep_every(config):
  """A concept row behind every token (paper), every second, fourth or eighth: what the cheaper ones cost in loss."""
  del config
  return fixed(axis(f"{ARM}.concept.insert_every", (1, 2, 4, 8)), SEEDS)


def sweep_loss_weight(config):
  """lambda of Eq. 4; the paper takes 0.1."""
  del config
  return fixed(axis(f"{ARM}.loss_weight", (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)), SEEDS)


def sweep_seeds(config):
  """Everything from the teacher on with another seed: how much of a difference is the pipeline's own noise."""
  del config
  return fixed(axis("seed", (0, 1, 2)), SEEDS)


def matched_width(config, num_concepts):
  """Returns the even width of a baseline whose parameters come nearest to those that CoCoMix activates.

  That is its transformer's and (C + k) d, of GPT-2's sizes: tables of V and L rows, 12 d^2 + 13 d a block, and
  the last norm.
  """
  student, layers = config.students.arms.cocomix, config.students.arms.cocomix.model.num_layers
  rows = config.tokenizer.vocab_size + config.window.length

  def parameters(width):
    return rows * width + layers * (12 * width**2 + 13 * width) + 2 * width

  width = student.model.model_dim
  wanted = parameters(width) + (num_concepts + student.concept.top_k) * width
  heads = config.students.arms.ntp.model.num_heads
  return min(range(heads, 4 * width, heads), key=lambda other: abs(parameters(other) - wanted))


def metrics(config):
  """Losses in nats a token; the difference is CoCoMix minus the baseline, over the seeds."""
  del config
  return {
    "difference, nats": "comparison.over_seeds",
    "CoCoMix, nats": "students.cocomix.val_loss",
    "baseline, nats": "students.ntp.val_loss",
    "FLOPs, ratio": "comparison.flops_ratio",
    "labels found": "students.cocomix.label_recall",
    "labels that are positive": "labels.mean_positive",
    "unexplained variance": "sae.fvu",
    "dead latents": "sae.dead_fraction",
  }
