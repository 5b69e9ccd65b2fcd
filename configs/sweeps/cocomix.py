"""Sweeps of CoCoMix (arXiv 2502.08524): one choice at a time.

  python -m nr.sweep --config=configs/cocomix.py:tiny --sweep=configs/sweeps/cocomix.py:sign --workdir=runs/sign

Three seeds of each student everywhere, for one small run decides nothing. Teacher, autoencoder and labels
are shared by all points that do not change them. The paper's comparisons with other methods (section 3.3:
distillation, pause tokens, direct regression, parts of CoCoMix alone) are arms of one run instead:
configs/cocomix.py:ablations.
"""

from nr.sweeps.combinators import axis, chain, fixed, product, together

SEEDS = {"students.seeds": (0, 1, 2)}


def sweep_sign(config):
  """Labels that raise the teacher's loss (paper and code), that lower it, or either. The paper has no such ablation."""
  del config
  return fixed(axis("targets.sign", ("paper", "negated", "abs")), SEEDS)


def sweep_targets(config):
  """Each choice of the labels by itself, and the released code's."""
  del config
  return fixed(
    chain(
      [{}],
      axis("targets.k_attr", (1, 2, 8)),
      [{"targets.restrict_active": False, "targets.mask_last": False}],  # as the code has it
      axis("targets.restrict_active", (False,)),
      axis("targets.mask_first", (True,)),
      axis("targets.drop_nonpositive", (True,)),
    ),
    SEEDS,
  )


def sweep_concepts(config):
  """C, the number of concepts; the baseline is made as wide as matches the parameters that a token uses."""
  counts = (128, 256, 512, 1024)
  widths = [matched_width(config, count) for count in counts]
  return fixed(
    together(axis("sae.num_latents", counts), axis("students.arms.ntp.model.model_dim", widths)), SEEDS
  )


def sweep_mixing(config):
  """Where predicted concepts go: a row of their own (paper), added to the token's, or mixed without being learnt.

  Each with the released code's normalisation and with Eq. 3 to the letter.
  """
  del config
  modes = axis("students.arms.cocomix.concept.mode", ("cocomix", "add", "mix_only"))
  return fixed(product(modes, axis("students.arms.cocomix.concept.norm", ("reference", "none"))), SEEDS)


def sweep_insertion(config):
  """The block before which concepts are inserted: the later, the fewer rows are doubled."""
  layers = range(config.students.arms.cocomix.model.num_layers)
  return fixed(axis("students.arms.cocomix.concept.insert_at", layers), SEEDS)


def sweep_every(config):
  """A concept row behind every token (paper), every second, fourth or eighth: what the cheaper ones cost in loss."""
  del config
  return fixed(axis("students.arms.cocomix.concept.insert_every", (1, 2, 4, 8)), SEEDS)


def sweep_loss_weight(config):
  """lambda of Eq. 4; the paper takes 0.1."""
  del config
  return fixed(axis("students.arms.cocomix.loss_weight", (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)), SEEDS)


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
