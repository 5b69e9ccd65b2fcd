"""Writes tests/golden/trl_losses.json: losses and their gradients as TRL computes them.

Run: python tests/golden/make_trl_goldens.py   (needs trl and torch, not this package)

Loss methods of TRL's trainers are called on stand-ins for the trainer and the model, so that
nothing is restated. Token log-probabilities go in; what comes out is the mean loss of the batch
and its gradient with respect to those of the policy.
"""

import collections
import json
import pathlib
from types import SimpleNamespace

import numpy as np

FILE = pathlib.Path(__file__).parent / "trl_losses.json"
PAIRS, LENGTH = 4, 7

# Name of the case: attributes of TRL's trainer, by kind of trainer.
DPO = {
  "sigmoid": dict(loss_types=["sigmoid"], beta=0.1),
  "sigmoid_beta": dict(loss_types=["sigmoid"], beta=0.7),
  "sigmoid_norm": dict(loss_types=["sigmoid_norm"], beta=2.0),
  "robust": dict(loss_types=["robust"], beta=0.3, label_smoothing=0.1),
  "hinge": dict(loss_types=["hinge"], beta=0.5),
  "ipo": dict(loss_types=["ipo"], beta=0.2),
  "sppo_hard": dict(loss_types=["sppo_hard"], beta=0.1),
  "apo_zero": dict(loss_types=["apo_zero"], beta=0.4),
  "apo_down": dict(loss_types=["apo_down"], beta=0.4),
  "ld_dpo": dict(loss_types=["sigmoid"], beta=0.3, ld_alpha=0.4),
  "wpo": dict(loss_types=["sigmoid"], beta=0.3, use_weighting=True),
}
CPO = {
  "cpo": dict(loss_type="sigmoid", beta=0.3),
  "cpo_smoothed": dict(loss_type="sigmoid", beta=0.3, label_smoothing=0.1),
  "simpo": dict(loss_type="simpo", beta=2.0, simpo_gamma=0.5),
}
ORPO = {"orpo": dict(beta=0.1), "orpo_beta": dict(beta=1.0)}
KTO = {
  "kto": dict(beta=0.3),
  "kto_weights": dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
  "kto_below": dict(beta=0.3, is_below=True),
}
REWARD = {"reward": {}, "reward_margin": dict(margin=True), "reward_centred": dict(centre=0.01)}
GRPO = {
  "grpo": dict(loss_type="grpo", beta=0.04),
  "dr_grpo": dict(loss_type="dr_grpo"),
  "token_mean": dict(loss_type="bnpo", epsilon_high=0.28),
  "dapo": dict(loss_type="dapo", epsilon_high=0.28),
  "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.03, epsilon_high=0.04),
  "entropy": dict(loss_type="bnpo", entropy_coef=0.05),
}


def inputs() -> dict[str, np.ndarray]:
  """Returns the token log-probabilities [2 * PAIRS, LENGTH] (chosen first) and masks of every case."""
  random = np.random.default_rng(7)
  shape = (2 * PAIRS, LENGTH)
  mask = np.zeros(shape, np.float32)
  for row, (start, length) in enumerate(
    zip(random.integers(0, 3, len(mask)), random.integers(2, 5, len(mask)))
  ):
    mask[row, start : start + length] = 1

  def log_probs() -> np.ndarray:
    return (-random.gamma(2.0, 0.5, shape) * mask).astype(np.float32)

  return dict(
    mask=mask,
    policy=log_probs(),
    reference=log_probs(),
    mismatched=log_probs() * 0.5,
    mismatched_reference=log_probs(),
    log_sum_squares=-random.uniform(0.1, 1.0, shape).astype(np.float32),
    entropies=random.uniform(0.1, 2.0, shape).astype(np.float32),
    labels=np.asarray([1, 1, 0, 1, 0, 0, 1, 0], bool),
    rewards=random.normal(size=2 * PAIRS).astype(np.float32),
    margins=random.uniform(0, 1, PAIRS).astype(np.float32),
    advantages=random.normal(size=2 * PAIRS).astype(np.float32),
  )


def trainer(**attributes) -> SimpleNamespace:
  """Returns a stand-in with what TRL's loss methods read of a trainer."""
  import torch

  same = lambda value, **_: value  # noqa: E731
  return SimpleNamespace(
    model=SimpleNamespace(training=False),
    accelerator=SimpleNamespace(
      device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same, num_processes=1
    ),
    aux_loss_enabled=False,
    _total_train_tokens=0,
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    **attributes,
  )


def outputs(values, log_probs):
  """Returns what TRL reads of a model's output, for given token log-probabilities."""
  import torch

  zeros = torch.zeros_like(log_probs)
  return SimpleNamespace(
    log_probs=log_probs,
    log_sum_sq_probs=torch.from_numpy(values["log_sum_squares"]),
    entropy=zeros,
    mean_logits=zeros,
    is_top1=zeros > 1,
  )


def token_inputs(values):
  """Returns ids and masks one position longer than the targets, as TRL shifts them itself."""
  import torch

  completion = torch.from_numpy(np.pad(values["mask"], ((0, 0), (1, 0)))).long()
  ids = torch.ones_like(completion)
  return dict(input_ids=ids, attention_mask=ids, completion_mask=completion)


def dpo(values, policy, *, ld_alpha=None, use_weighting=False, label_smoothing=0.0, **attributes):
  """Returns the loss of TRL's DPOTrainer."""
  import torch
  from trl import DPOTrainer

  reference = torch.from_numpy(values["reference"])
  weights = torch.ones_like(reference)
  if ld_alpha is not None:
    # TRL weighs the precomputed sums beforehand; the same weights, from the masks.
    counts = values["mask"].sum(1)
    shared = np.tile(np.minimum(counts[:PAIRS], counts[PAIRS:]), 2)
    is_tail = values["mask"].cumsum(1) > shared[:, None]
    weights = torch.from_numpy(np.where(is_tail, np.float32(ld_alpha), np.float32(1)))
  sums = (reference * weights).sum(1)
  stand_in = trainer(
    ld_alpha=ld_alpha,
    use_weighting=use_weighting,
    label_smoothing=label_smoothing,
    loss_weights=[1.0],
    f_divergence_type="reverse_kl",
    precompute_ref_logps=True,
    **attributes,
  )
  batch = dict(**token_inputs(values), ref_chosen_logps=sums[:PAIRS], ref_rejected_logps=sums[PAIRS:])
  model = lambda **_: outputs(values, policy)  # noqa: E731
  return DPOTrainer._compute_loss(stand_in, model, batch, False)


def sums_of(values, policy, is_mean):
  """Returns sums (or means) over the tokens of chosen and rejected."""
  import torch

  sums = policy.sum(1) / (torch.from_numpy(values["mask"]).sum(1) if is_mean else 1)
  return sums[:PAIRS], sums[PAIRS:]


def cpo(values, policy, *, loss_type, label_smoothing=0.0, simpo_gamma=0.0, **attributes):
  """Returns the preference term of TRL's CPOTrainer, without its NLL."""
  from trl.experimental.cpo import CPOTrainer

  stand_in = trainer(
    loss_type=loss_type, label_smoothing=label_smoothing, simpo_gamma=simpo_gamma, alpha=0.0, **attributes
  )
  return CPOTrainer.cpo_loss(stand_in, *sums_of(values, policy, loss_type == "simpo"))[0].mean()


def orpo(values, policy, **attributes):
  """Returns the odds-ratio term of TRL's ORPOTrainer, without its NLL."""
  from trl.experimental.orpo import ORPOTrainer

  return -ORPOTrainer.odds_ratio_loss(trainer(**attributes), *sums_of(values, policy, True))[0].mean()


def kto(values, policy, *, desirable_weight=1.0, undesirable_weight=1.0, is_below=False, **attributes):
  """Returns the loss of TRL's KTOTrainer; `is_below`: with a mismatched mean below 0, which it clips."""
  import torch
  from trl import KTOTrainer

  mismatched = [torch.from_numpy(values[name]).sum(1) for name in ("mismatched", "mismatched_reference")]
  own, other = mismatched[::-1] if is_below else mismatched
  stand_in = trainer(
    loss_type="kto",
    calculate_KL=True,
    precompute_ref_logps=True,
    desirable_weight=desirable_weight,
    undesirable_weight=undesirable_weight,
    _compute_kl_logps=lambda model, batch: own,
    **attributes,
  )
  batch = dict(
    **token_inputs(values),
    label=torch.from_numpy(values["labels"]),
    ref_logps=torch.from_numpy(values["reference"]).sum(1),
    ref_KL_logps=other,
  )
  model = lambda **_: outputs(values, policy)  # noqa: E731
  return KTOTrainer._compute_loss(stand_in, model, batch, False)


def reward(values, rewards, *, margin=False, centre=None):
  """Returns the loss of TRL's RewardTrainer; the gradient is that of the rewards."""
  import torch
  from trl import RewardTrainer

  stand_in = trainer(args=SimpleNamespace(center_rewards_coefficient=centre))
  batch = dict(margin=torch.from_numpy(values["margins"])) if margin else {}
  model = lambda **_: SimpleNamespace(logits=rewards[:, None])  # noqa: E731
  return RewardTrainer.compute_loss(stand_in, model, batch)


def grpo(values, policy, *, loss_type, entropy_coef=0.0, **attributes):
  """Returns the loss of TRL's GRPOTrainer; the policy that sampled is `reference`, so is the reference."""
  import torch
  from trl import GRPOTrainer

  mask = torch.from_numpy(values["mask"])
  old = torch.from_numpy(values["reference"])
  settings = dict(beta=0.0, epsilon_low=0.2, epsilon_high=0.2, importance_sampling_level="token") | attributes
  stand_in = trainer(
    loss_type=loss_type,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    use_vllm=False,
    max_completion_length=LENGTH,
    current_gradient_accumulation_steps=1,
    _entropy_bonus_enabled=entropy_coef > 0,
    use_adaptive_entropy=False,
    entropy_coef=entropy_coef,
    args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.from_numpy(values["entropies"]), None),
    **settings,
  )
  ids = torch.ones_like(mask).long()
  batch = dict(
    prompt_ids=ids[:, :1],
    prompt_mask=ids[:, :1],
    completion_ids=ids,
    completion_mask=mask,
    advantages=torch.from_numpy(values["advantages"]),
    old_per_token_logps=old,
    ref_per_token_logps=torch.from_numpy(values["mismatched_reference"]),
    num_items_in_batch=mask.sum(),
  )
  return GRPOTrainer._compute_loss(stand_in, None, batch)


KINDS = dict(dpo=(dpo, DPO), cpo=(cpo, CPO), orpo=(orpo, ORPO), kto=(kto, KTO), grpo=(grpo, GRPO))


def compute(values: dict[str, np.ndarray]) -> dict[str, dict]:
  """Returns {case: {loss, gradient}} as the installed TRL has them."""
  import torch

  found = {}
  for function, cases in (*KINDS.values(), (reward, REWARD)):
    for name, settings in cases.items():
      variable = torch.from_numpy(values["rewards" if function is reward else "policy"]).requires_grad_()
      # TRL's models give 0 where a token is not scored.
      scored = variable if function is reward else variable * torch.from_numpy(values["mask"])
      loss = function(values, scored, **settings)
      (gradient,) = torch.autograd.grad(loss, variable)
      found[name] = {"loss": loss.item(), "gradient": gradient.numpy().tolist()}
  return found


def main() -> None:
  """Writes the file."""
  import trl

  values = inputs()
  content = {
    "trl": trl.__version__,
    "inputs": {name: value.tolist() for name, value in values.items()},
    "cases": compute(values),
  }
  FILE.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
  main()
