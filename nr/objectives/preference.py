"""Losses on pairs of responses: DPO and its family, one record of settings, one function.

    loss, metrics = preference_loss(PreferenceSpec(loss="ipo", beta=0.1), chosen, rejected)

Notation: w chosen, l rejected; S sum of log-probabilities of the response's n tokens under the policy,
d = S - S_ref, delta = d(w) - d(l). Losses of the literature that are settings here:

    conservative DPO (label_smoothing)         dpo, label_smoothing=e
    length-normalised DPO (arXiv 2411.15124)   dpo, is_length_normalised=True
    R-DPO (arXiv 2403.19159)                   dpo, length_penalty=alpha
    LD-DPO (arXiv 2409.06411)                  dpo, ld_alpha=a
    DPO + NLL (arXiv 2404.19733)               dpo, nll_weight=c
    WPO (arXiv 2406.11827)                     any, weighting="wpo"

KTO and the group form of DPO, which have no pairs, are in `nr.objectives.unpaired_preference`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr import names
from nr.objectives.sequence_scores import SequenceScores
from nr.spec import Spec

NLL_NORMS = ("mean", "sum")
WEIGHTINGS = ("none", "wpo")


@dataclasses.dataclass(frozen=True)
class PreferenceSpec(Spec):
  """Settings of a loss on pairs. An option that the loss would ignore is refused.

  Attributes:
    loss: a name of `LOSSES`.
    beta: weight of the implicit reward; for "ipo" the paper's tau. "orpo" has odds_weight instead.
    label_smoothing: probability e in [0, 0.5) that a label is wrong: conservative for "dpo", "simpo" and
      "cpo", unbiased for "robust".
    is_length_normalised: whether S and S_ref are divided by n. IPO's paper does not, TRL does: it changes
      the meaning of beta by a factor of the length.
    length_penalty: alpha of R-DPO, added as alpha (n(w) - n(l)); positive shortens.
    ld_alpha: a of LD-DPO in [0, 1], weight of what lies behind the shorter response's length; 1 is off.
    gamma: SimPO's margin, inside the logistic function (not the ratio gamma / beta).
    positive_weight: c of DPO-positive.
    odds_weight: lambda of ORPO.
    nll_weight: weight of the chosen response's NLL; None: 1 for "cpo" and "orpo", else 0.
    nll_norm: "mean" over the response's tokens or their "sum"; needs an NLL term.
    entropy_weight: weight of the mean token entropy of the chosen response, which is subtracted.
    weighting: "none" or "wpo", which multiplies the preference term by how probable both responses are.
  """

  loss: str = "dpo"
  beta: float = 0.1
  label_smoothing: float = 0.0
  is_length_normalised: bool = False
  length_penalty: float = 0.0
  ld_alpha: float = 1.0
  gamma: float = 0.0
  positive_weight: float = 5.0
  odds_weight: float = 0.1
  nll_weight: float | None = None
  nll_norm: str = "mean"
  entropy_weight: float = 0.0
  weighting: str = "none"

  def __post_init__(self):
    for field, allowed in dict(loss=LOSSES, nll_norm=NLL_NORMS, weighting=WEIGHTINGS).items():
      if getattr(self, field) not in allowed:
        raise ValueError(names.unknown(field, getattr(self, field), allowed))
    if not self.beta > 0:
      raise ValueError(f"beta={self.beta}: give a positive number")
    if not 0 <= self.label_smoothing < 0.5:
      raise ValueError(f"label_smoothing={self.label_smoothing}: give a probability in [0, 0.5)")
    if not 0 <= self.ld_alpha <= 1:
      raise ValueError(f"ld_alpha={self.ld_alpha}: give a value in [0, 1]; 1 is off")
    for field in ("positive_weight", "odds_weight", "entropy_weight"):
      if not getattr(self, field) >= 0:
        raise ValueError(f"{field}={getattr(self, field)}: give 0 or more")
    if self.nll_weight is not None and not self.nll_weight >= 0:
      raise ValueError(f"nll_weight={self.nll_weight}: give 0 or more, or None for the loss's own")
    self._refuse_idle_options()

  def _refuse_idle_options(self) -> None:
    """Raises ValueError for an option that was given and that the others make meaningless."""
    fields = PreferenceSpec.__dataclass_fields__
    chosen = {name: getattr(self, name) for name in fields if getattr(self, name) != fields[name].default}
    for field in _CHECKED_OPTIONS:
      if field in chosen and field not in LOSSES[self.loss].options:
        users = [name for name, other in LOSSES.items() if field in other.options]
        raise ValueError(
          f"{field}={chosen[field]}: loss {self.loss!r} does not use it; only {', '.join(users)} do"
        )
    if "beta" in chosen and not LOSSES[self.loss].uses_beta:
      raise ValueError(f"beta={self.beta}: loss {self.loss!r} does not use it; set odds_weight instead")
    if "nll_norm" in chosen and not self.nll:
      raise ValueError(
        f"nll_norm={self.nll_norm!r}: there is no NLL term to norm; set nll_weight, or leave it"
      )

  @property
  def needs_reference(self) -> bool:
    """Whether the loss reads log-probabilities of a reference model."""
    return LOSSES[self.loss].needs_reference

  @property
  def needs_head(self) -> bool:
    """Whether the loss reads sums over the first m tokens, m = min(n(w), n(l))."""
    return self.ld_alpha != 1

  @property
  def nll(self) -> float:
    """Weight of the chosen response's NLL."""
    return LOSSES[self.loss].nll_weight if self.nll_weight is None else self.nll_weight


class Sides(NamedTuple):
  """What a loss of `LOSSES` sees of the pairs, any shape; sums are divided by n where the spec says so.

  Attributes:
    d_w: d(w), or S(w) for a loss without a reference.
    d_l: the same of the rejected.
    mean_w: S(w) / n(w).
    mean_l: S(l) / n(l).
    extra_tokens: n(w) - n(l).
  """

  d_w: jax.Array
  d_l: jax.Array
  mean_w: jax.Array
  mean_l: jax.Array
  extra_tokens: jax.Array


class Loss(NamedTuple):
  """An entry of `LOSSES`.

  Attributes:
    compute: (spec, Sides) -> the preference term, the NLL not included.
    needs_reference: whether d subtracts a reference model's sum.
    options: names of the optional settings that it uses.
    nll_weight: of the chosen response, where the spec does not say.
    rewards_are_means: whether the reported reward is beta S / n.
    uses_beta: whether beta is in the loss; if not, the reported reward has odds_weight in its place.
  """

  compute: Callable[[PreferenceSpec, Sides], jax.Array]
  needs_reference: bool = True
  options: tuple[str, ...] = ()
  nll_weight: float = 0.0
  rewards_are_means: bool = False
  uses_beta: bool = True


def log_one_minus_exp(a: jax.Array) -> jax.Array:
  """log(1 - exp(a)) for a <= 0 without loss of digits at either end.

  Source: Machler 2012, "Accurately computing log(1 - exp(-|a|))". Values above -1e-7 count as -1e-7: a
  response of probability 1 would have infinite odds.
  """
  a = jnp.minimum(a, -1e-7)
  is_near_0 = a > -0.6931472
  # Both branches are kept finite: a gradient of the branch not taken would be NaN otherwise.
  near = jnp.log(-jnp.expm1(jnp.where(is_near_0, a, -1.0)))
  far = jnp.log1p(-jnp.exp(jnp.where(is_near_0, -1.0, a)))
  return jnp.where(is_near_0, near, far)


def _smoothed(z: jax.Array, smoothing: float) -> jax.Array:
  loss = -jax.nn.log_sigmoid(z)
  if smoothing == 0:
    return loss
  return (1 - smoothing) * loss - smoothing * jax.nn.log_sigmoid(-z)


def _margin(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  return spec.beta * (sides.d_w - sides.d_l) + spec.length_penalty * sides.extra_tokens


def _dpo(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  return _smoothed(_margin(spec, sides), spec.label_smoothing)


def _robust(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  z, e = _margin(spec, sides), spec.label_smoothing
  return (-(1 - e) * jax.nn.log_sigmoid(z) + e * jax.nn.log_sigmoid(-z)) / (1 - 2 * e)


def _hinge(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  return jax.nn.relu(1 - _margin(spec, sides))


def _ipo(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  return (sides.d_w - sides.d_l - 1 / (2 * spec.beta)) ** 2


def _dpo_positive(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  penalty = spec.positive_weight * jax.nn.relu(-sides.d_w)
  return -jax.nn.log_sigmoid(spec.beta * (sides.d_w - sides.d_l - penalty))


def _simpo(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  return _smoothed(spec.beta * (sides.mean_w - sides.mean_l) - spec.gamma, spec.label_smoothing)


def _cpo(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  return _smoothed(spec.beta * (sides.d_w - sides.d_l), spec.label_smoothing)


def _orpo(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  log_odds_w = sides.mean_w - log_one_minus_exp(sides.mean_w)
  log_odds_l = sides.mean_l - log_one_minus_exp(sides.mean_l)
  return -spec.odds_weight * jax.nn.log_sigmoid(log_odds_w - log_odds_l)


def _sppo_hard(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  goal = 1 / (2 * spec.beta)
  return (sides.d_w - goal) ** 2 + (sides.d_l + goal) ** 2


def _apo_zero(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  return jax.nn.sigmoid(-spec.beta * sides.d_w) + jax.nn.sigmoid(spec.beta * sides.d_l)


def _apo_down(spec: PreferenceSpec, sides: Sides) -> jax.Array:
  return jax.nn.sigmoid(spec.beta * sides.d_w) + jax.nn.sigmoid(-spec.beta * (sides.d_w - sides.d_l))


_SUMS = ("is_length_normalised", "ld_alpha")
_LOGISTIC = (*_SUMS, "length_penalty")
LOSSES: dict[str, Loss] = {
  "dpo": Loss(_dpo, options=(*_LOGISTIC, "label_smoothing")),  # arXiv 2305.18290
  "robust": Loss(_robust, options=(*_LOGISTIC, "label_smoothing")),  # arXiv 2403.00409
  "hinge": Loss(_hinge, options=_LOGISTIC),  # arXiv 2305.10425
  "ipo": Loss(_ipo, options=_SUMS),  # arXiv 2310.12036
  "dpo_positive": Loss(_dpo_positive, options=(*_SUMS, "positive_weight")),  # arXiv 2402.13228
  "sppo_hard": Loss(_sppo_hard, options=_SUMS),  # arXiv 2405.00675
  "apo_zero": Loss(_apo_zero, options=_SUMS),  # arXiv 2408.06266
  "apo_down": Loss(_apo_down, options=_SUMS),  # arXiv 2408.06266
  "simpo": Loss(  # arXiv 2405.14734
    _simpo, needs_reference=False, options=("gamma", "label_smoothing"), rewards_are_means=True
  ),
  "cpo": Loss(  # arXiv 2401.08417
    _cpo, needs_reference=False, options=("ld_alpha", "label_smoothing"), nll_weight=1.0
  ),
  "orpo": Loss(  # arXiv 2403.07691
    _orpo,
    needs_reference=False,
    options=("odds_weight",),
    nll_weight=1.0,
    rewards_are_means=True,
    uses_beta=False,
  ),
}
_CHECKED_OPTIONS = (
  "label_smoothing",
  "is_length_normalised",
  "length_penalty",
  "ld_alpha",
  "gamma",
  "positive_weight",
  "odds_weight",
)


def wide(x: jax.Array) -> jax.Array:
  """Returns an array in float32, or in its own type if that is wider."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def given(scores: SequenceScores, field: str, reason: str) -> jax.Array:
  """Returns a field of scores, at least float32.

  Raises:
    ValueError: it is None; `reason` says who needs it.
  """
  value = getattr(scores, field)
  if value is None:
    raise ValueError(f"SequenceScores.{field} is missing: {reason} needs it")
  return wide(value)


def log_ratio(spec: PreferenceSpec, scores: SequenceScores) -> jax.Array:
  """Returns d = S - S_ref (or S without a reference) as the spec's options make it, nats."""

  def total(field: str) -> jax.Array:
    value = given(scores, field, f"loss {spec.loss!r}")
    if not spec.needs_head:
      return value
    head = given(scores, f"{field}_head", f"ld_alpha={spec.ld_alpha}")
    return head + spec.ld_alpha * (value - head)

  ratio = total("policy") - total("reference") if spec.needs_reference else total("policy")
  return ratio / _length(scores) if spec.is_length_normalised else ratio


def _length(scores: SequenceScores) -> jax.Array:
  return jnp.maximum(wide(scores.tokens), 1.0)  # An empty response has a sum of 0 to divide.


def preference_loss(
  spec: PreferenceSpec, chosen: SequenceScores, rejected: SequenceScores
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of each pair, and what is worth watching.

  Args:
    spec: which loss.
    chosen: scores of the preferred responses, any shape.
    rejected: scores of the others, same shape.

  Returns:
    float32 loss of each pair, and by name, of each pair: `chosen_reward` and `rejected_reward` (beta d;
    beta S / n for SimPO, lambda S / n for ORPO), `reward_margin`, `reward_accuracy` (1 where the chosen
    has the larger reward, 0.5 where they tie), `chosen_log_prob` and `rejected_log_prob` (S, nats).

  Raises:
    ValueError: a score that the loss needs is None.
  """
  entry = LOSSES[spec.loss]
  means = [wide(side.policy) / _length(side) for side in (chosen, rejected)]
  sides = Sides(
    log_ratio(spec, chosen), log_ratio(spec, rejected), *means, wide(chosen.tokens) - wide(rejected.tokens)
  )
  loss = entry.compute(spec, sides)
  if spec.weighting == "wpo":
    aligned = given(chosen, "aligned", "weighting='wpo'") + given(rejected, "aligned", "weighting='wpo'")
    loss = loss * jax.lax.stop_gradient(jnp.exp(aligned))
  if spec.nll:
    loss = loss - spec.nll * (sides.mean_w if spec.nll_norm == "mean" else wide(chosen.policy))
  if spec.entropy_weight:
    reason = f"entropy_weight={spec.entropy_weight}"
    loss = loss - spec.entropy_weight * given(chosen, "entropy", reason)
  rewards = means if entry.rewards_are_means else (sides.d_w, sides.d_l)
  weight = spec.beta if entry.uses_beta else spec.odds_weight
  reward_w, reward_l = (jax.lax.stop_gradient(weight * reward) for reward in rewards)
  metrics = {
    "chosen_reward": reward_w,
    "rejected_reward": reward_l,
    "reward_margin": reward_w - reward_l,
    "reward_accuracy": 0.5 * (1 + jnp.sign(reward_w - reward_l)),
    "chosen_log_prob": jax.lax.stop_gradient(wide(chosen.policy)),
    "rejected_log_prob": jax.lax.stop_gradient(wide(rejected.policy)),
  }
  return loss, metrics
