"""Metrics of a sparse autoencoder, each defined once; sums are aggregated before anything is divided.

Definitions (specification of the house, after arXiv 2406.04093, 2404.16014 and the libraries):

    fvu                   sum |x - x_hat|^2 / sum |x - mean(x)|^2, the mean over the whole evaluation
                          set (not about zero, not a mean of per-token ratios)
    explained_variance    1 - fvu
    nmse                  mean over tokens of |x - x_hat|^2 / |x|^2; second moment, not comparable with fvu
    cosine, l2_ratio      mean cos(x, x_hat), mean |x_hat| / |x|
    reconstruction_bias   E |x_hat|^2 / E <x, x_hat>
    l0                    mean number of latents above 0
    crowded_fraction      share of tokens with more active latents than a sparse code has room for
    never_active_fraction latents that no token of the evaluation set activates
    delta_ce              CE with x_hat in place of the tapped activations, minus clean CE, nats
    loss_recovered        (CE_zero - CE_sub) / (CE_zero - CE_clean), zero ablation at the tap
    loss_recovered_mean   the same with the mean activation instead of zeros
    kl                    mean KL(clean || substituted) of the next-token distributions, nats
    kl_recovered          (KL_zero - KL_sub) / KL_zero, KL to the clean distributions, zero ablation
    kl_recovered_mean     the same with the mean activation instead of zeros

`fvu` is in the autoencoder's normalised space; `fvu_raw` in the model's own; `*_without_first` leaves out
position 0. All are of the whole function of an autoencoder: where a token has more active latents than a
sparse code has room for, all of them count. Arrays: B batch, L positions, D width, C latents, K active latents.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.models import parameters
from nr.models.residual_tap import TapInputs, activations_at, hidden_from
from nr.models.sparse_autoencoder import SparseCode
from nr.objectives.language_modeling import token_nll

Batch = Mapping[str, jax.Array]


class TappedModel(NamedTuple):
  """A model cut at the tap. Every function is pure and takes a batch of windows.

  Attributes:
    activations: batch -> tapped activations [B, L, D].
    losses: (activations, batch) -> token losses [B, L] in nats, of a run that continues from them.
    divergence: (clean, substituted activations, batch) -> KL [B, L] in nats; None leaves `kl` out.
  """

  activations: Callable[[Batch], jax.Array]
  losses: Callable[[jax.Array, Batch], jax.Array]
  divergence: Callable[[jax.Array, jax.Array, Batch], jax.Array] | None = None


class Autoencoding(NamedTuple):
  """What an autoencoder makes of raw activations.

  Attributes:
    inputs: normalised activations [B, L, D].
    outputs: their reconstruction, in the same space.
    raw_outputs: the reconstruction in the model's own space.
    values: active latents' values [B, L, K], or those of all latents [B, L, C].
    indices: their indices; None where all latents are written out.
  """

  inputs: jax.Array
  outputs: jax.Array
  raw_outputs: jax.Array
  values: jax.Array
  indices: jax.Array | None


class ReconstructionSums(NamedTuple):
  """Sums over tokens of one space; `merge` adds them exactly enough for float32.

  Attributes:
    count: tokens.
    mean_D: their mean.
    spread: sum |x - mean|^2, kept about the mean: about zero, float32 loses it when the mean is large.
    error: sum |x - x_hat|^2.
    relative_error: sum |x - x_hat|^2 / |x|^2.
    cosine: sum of cosines.
    norm_ratio: sum |x_hat| / |x|.
    squared_output: sum |x_hat|^2.
    inner: sum <x, x_hat>.
  """

  count: jax.Array
  mean_D: jax.Array
  spread: jax.Array
  error: jax.Array
  relative_error: jax.Array
  cosine: jax.Array
  norm_ratio: jax.Array
  squared_output: jax.Array
  inner: jax.Array

  @classmethod
  def of(cls, x: jax.Array, x_hat: jax.Array, is_counted: jax.Array) -> "ReconstructionSums":
    """Sums over the tokens that `is_counted` [...] marks in x, x_hat [..., D]."""
    w_N = is_counted.reshape(-1).astype(jnp.float32)
    # Tokens that do not count may hold anything, NaN included.
    x_ND, y_ND = (
      jnp.where(w_N[:, None] > 0, values.reshape(w_N.size, -1).astype(jnp.float32), 0)
      for values in (x, x_hat)
    )
    count = w_N.sum()
    mean_D = x_ND.sum(0) / jnp.maximum(count, 1)
    squared_N, output_N, inner_N = (x_ND**2).sum(-1), (y_ND**2).sum(-1), (x_ND * y_ND).sum(-1)
    error_N = jnp.square(x_ND - y_ND).sum(-1)
    norms_N = jnp.sqrt(squared_N * output_N)
    return cls(
      count=count,
      mean_D=mean_D,
      spread=(jnp.square(x_ND - mean_D).sum(-1) * w_N).sum(),
      error=error_N.sum(),
      relative_error=_ratio(error_N, squared_N).sum(),
      cosine=_ratio(inner_N, norms_N).sum(),
      norm_ratio=jnp.sqrt(_ratio(output_N, squared_N)).sum(),
      squared_output=output_N.sum(),
      inner=inner_N.sum(),
    )

  def merge(self, other: "ReconstructionSums") -> "ReconstructionSums":
    """Joins the sums of disjoint tokens (the parallel formula of Chan et al. for the spread)."""
    added = jax.tree.map(jnp.add, self, other)
    share = other.count / jnp.maximum(added.count, 1)
    difference_D = other.mean_D - self.mean_D
    between = jnp.square(difference_D).sum() * self.count * share
    return added._replace(mean_D=self.mean_D + difference_D * share, spread=added.spread + between)

  @property
  def fvu(self) -> jax.Array:
    """Fraction of variance unexplained."""
    return self.error / self.spread


class LatentSums(NamedTuple):
  """Sums over tokens of the code.

  Attributes:
    count: tokens.
    active: sum of latents above 0.
    crowded: tokens with more latents above 0 than a sparse code has room for.
    fired_C: int32, tokens on which each latent is above 0.
  """

  count: jax.Array
  active: jax.Array
  crowded: jax.Array
  fired_C: jax.Array

  @classmethod
  def of(
    cls,
    values: jax.Array,
    indices: jax.Array | None,
    is_counted: jax.Array,
    num_latents: int,
    max_active: int | None = None,
  ) -> "LatentSums":
    """Sums over the tokens that `is_counted` [...] marks in a code [..., K], or [..., C] without indices."""
    active = (values > 0) & is_counted[..., None]
    if indices is None:
      fired_C = active.reshape(-1, num_latents).sum(0, dtype=jnp.int32)
    else:
      fired_C = jnp.zeros((num_latents,), jnp.int32).at[indices].add(active.astype(jnp.int32))
    room = values.shape[-1] if max_active is None else max_active
    crowded = (active.sum(-1) > room).sum(dtype=jnp.float32)
    return cls(is_counted.sum(dtype=jnp.float32), active.sum(dtype=jnp.float32), crowded, fired_C)


class LossSums(NamedTuple):
  """Sums of token losses in nats, weighted, and of KL from the clean distribution; all float32 scalars."""

  weight: jax.Array
  clean: jax.Array
  substituted: jax.Array
  zero: jax.Array
  mean: jax.Array
  divergence: jax.Array
  zero_divergence: jax.Array
  mean_divergence: jax.Array


class SparseAutoencoderSums(NamedTuple):
  """All sums of an evaluation; a pytree."""

  normalised: ReconstructionSums
  normalised_without_first: ReconstructionSums
  raw: ReconstructionSums
  raw_without_first: ReconstructionSums
  latents: LatentSums
  losses: LossSums

  def merge(self, other: "SparseAutoencoderSums") -> "SparseAutoencoderSums":
    """Joins the sums of disjoint tokens."""
    reconstructions = [mine.merge(theirs) for mine, theirs in zip(self[:4], other[:4])]
    return SparseAutoencoderSums(*reconstructions, *jax.tree.map(jnp.add, self[4:], other[4:]))


def measure_batch(
  model: TappedModel,
  autoencode: Callable[[jax.Array], Autoencoding],
  num_latents: int,
  mean_D: jax.Array,
  batch: Batch,
  max_active: int | None = None,
) -> SparseAutoencoderSums:
  """Returns the sums of one batch; pure, to be run under `jax.jit`.

  Args:
    model: the model, cut at the tap.
    autoencode: raw activations -> Autoencoding.
    num_latents: C.
    mean_D: mean activation for the mean ablation.
    batch: tokens, targets and weights [B, L], and what the model's functions need.
    max_active: active latents that a sparse code has room for; None: as many as the code given here.
  """
  x_BLD = model.activations(batch)
  coded = autoencode(x_BLD)
  real_BL = real_tokens(batch)
  later_BL = real_BL & (_positions(batch) > 0)
  weights_BL = batch["weights"].astype(jnp.float32)

  def total(losses_BL: jax.Array) -> jax.Array:
    return jnp.where(weights_BL > 0, losses_BL * weights_BL, 0).sum()

  def loss(x_BLD: jax.Array) -> jax.Array:
    return total(model.losses(x_BLD, batch))

  substitutes = {
    "substituted": coded.raw_outputs.astype(x_BLD.dtype),
    "zero": jnp.zeros_like(x_BLD),
    "mean": jnp.broadcast_to(mean_D.astype(x_BLD.dtype), x_BLD.shape),
  }
  divergences = dict.fromkeys(substitutes, jnp.zeros(()))
  if model.divergence is not None:
    divergences = {
      name: total(model.divergence(x_BLD, changed_BLD, batch)) for name, changed_BLD in substitutes.items()
    }
  losses = LossSums(
    weight=weights_BL.sum(),
    clean=loss(x_BLD),
    **{name: loss(changed_BLD) for name, changed_BLD in substitutes.items()},
    divergence=divergences["substituted"],
    zero_divergence=divergences["zero"],
    mean_divergence=divergences["mean"],
  )
  return SparseAutoencoderSums(
    ReconstructionSums.of(coded.inputs, coded.outputs, real_BL),
    ReconstructionSums.of(coded.inputs, coded.outputs, later_BL),
    ReconstructionSums.of(x_BLD, coded.raw_outputs, real_BL),
    ReconstructionSums.of(x_BLD, coded.raw_outputs, later_BL),
    LatentSums.of(coded.values, coded.indices, real_BL, num_latents, max_active),
    losses,
  )


def evaluate(
  batches: Iterable[Batch],
  measure: Callable[[jax.Array, Batch], SparseAutoencoderSums],
  activations: Callable[[Batch], jax.Array],
) -> SparseAutoencoderSums:
  """Goes through the evaluation set twice: for the mean activation, then for everything else.

  Args:
    batches: can be gone through again and again, such as `nr.data.windows.ordered_batches`.
    measure: jitted (mean_D, batch) -> sums.
    activations: jitted batch -> activations [B, L, D].

  Raises:
    ValueError: no batches.
  """
  count, total_D = 0, 0.0
  for batch in batches:
    real_BL = np.asarray(real_tokens(batch))
    total_D = total_D + np.asarray(activations(batch), np.float64)[real_BL].sum(0)
    count += int(real_BL.sum())
  if not count:
    raise ValueError("the evaluation set has no tokens; give at least one window")
  mean_D = jnp.asarray(total_D / count, jnp.float32)
  sums = None
  for batch in batches:
    found = measure(mean_D, batch)
    sums = found if sums is None else sums.merge(found)
  return sums


def summarise(sums: SparseAutoencoderSums) -> dict[str, float]:
  """Divides the sums; keys as in the module's docstring, plus the losses and the size of the set."""
  normalised, raw, latents = sums.normalised, sums.raw, sums.latents
  losses = LossSums(*(float(value) for value in sums.losses))
  weight = max(losses.weight, 1e-30)
  results = {
    "fvu": normalised.fvu,
    "fvu_without_first": sums.normalised_without_first.fvu,
    "fvu_raw": raw.fvu,
    "fvu_raw_without_first": sums.raw_without_first.fvu,
    "explained_variance": 1 - normalised.fvu,
    "nmse": normalised.relative_error / normalised.count,
    "cosine": normalised.cosine / normalised.count,
    "l2_ratio": normalised.norm_ratio / normalised.count,
    "reconstruction_bias": normalised.squared_output / normalised.inner,
    "l0": latents.active / latents.count,
    "crowded_fraction": latents.crowded / latents.count,
    "never_active_fraction": (latents.fired_C == 0).mean(),
    "evaluation_tokens": latents.count,
    "ce_clean": losses.clean / weight,
    "ce_substituted": losses.substituted / weight,
    "ce_zero": losses.zero / weight,
    "ce_mean": losses.mean / weight,
    "delta_ce": (losses.substituted - losses.clean) / weight,
    "loss_recovered": _recovered(losses.zero, losses.substituted, losses.clean),
    "loss_recovered_mean": _recovered(losses.mean, losses.substituted, losses.clean),
    "kl": losses.divergence / weight,
    "kl_zero": losses.zero_divergence / weight,
    "kl_mean": losses.mean_divergence / weight,
    "kl_recovered": _recovered(losses.zero_divergence, losses.divergence, 0.0),
    "kl_recovered_mean": _recovered(losses.mean_divergence, losses.divergence, 0.0),
  }
  return {name: float(value) for name, value in results.items()}


def dead_fraction(tokens_since_fired_C: np.ndarray, dead_tokens: int) -> float:
  """Returns the share of latents that did not fire in the last `dead_tokens` training tokens."""
  return float((np.asarray(tokens_since_fired_C) > dead_tokens).mean())


def evaluate_transformer(
  batches: Iterable[Batch],
  teacher: tuple[Any, Any],
  autoencoder: tuple[Any, Any],
  *,
  layer: int,
  use_divergence: bool = True,
  loss_chunk: int | None = None,
) -> tuple[dict[str, float], np.ndarray]:
  """Evaluates a sparse autoencoder inside a transformer.

  Args:
    batches: windows with tokens, targets and weights; gone through twice.
    teacher: (graph definition, parameters) of the transformer.
    autoencoder: (graph definition, parameters) of the autoencoder.
    layer: the block (from 0) whose output is tapped.
    use_divergence: whether to measure `kl` and its like, which hold two [B, L, V] arrays of log-probabilities.
    loss_chunk: tokens whose logits are held at a time for the losses; None holds all of them.

  Returns:
    (metrics, see `summarise`; int32 [C], on how many tokens each latent was active).
  """

  @jax.jit
  def activations(teacher_params: Any, batch: Batch) -> jax.Array:
    return tapped_transformer(teacher[0], teacher_params, layer).activations(batch)

  @jax.jit
  def measure(teacher_params: Any, autoencoder_params: Any, mean_D: jax.Array, batch: Batch) -> Any:
    model = tapped_transformer(
      teacher[0], teacher_params, layer, use_divergence=use_divergence, loss_chunk=loss_chunk
    )
    module = parameters.merge(autoencoder[0], autoencoder_params)
    spec = module.spec
    return measure_batch(model, autoencoding(module), spec.num_latents, mean_D, batch, spec.max_active)

  sums = evaluate(
    batches,
    lambda mean_D, batch: measure(teacher[1], autoencoder[1], mean_D, batch),
    lambda batch: activations(teacher[1], batch),
  )
  return summarise(sums), np.asarray(sums.latents.fired_C)


def tapped_transformer(
  graphdef: Any, params: Any, layer: int, *, use_divergence: bool = True, loss_chunk: int | None = None
) -> TappedModel:
  """Binds `TappedModel` to a transformer, tapped after block `layer` (from 0)."""
  model = parameters.merge(graphdef, params)

  def losses(x_BLD: jax.Array, batch: Batch) -> jax.Array:
    hidden_BLD = hidden_from(model, x_BLD, TapInputs.of(batch), layer)
    return token_nll(hidden_BLD, model.unembedding_VD, batch["targets"], chunk_size=loss_chunk)

  def divergence(clean_BLD: jax.Array, changed_BLD: jax.Array, batch: Batch) -> jax.Array:
    inputs = TapInputs.of(batch)
    clean_BLV, changed_BLV = (
      jax.nn.log_softmax(model.logits(hidden_from(model, x_BLD, inputs, layer)))
      for x_BLD in (clean_BLD, changed_BLD)
    )
    return (jnp.exp(clean_BLV) * (clean_BLV - changed_BLV)).sum(-1)

  return TappedModel(
    activations=lambda batch: activations_at(model, TapInputs.of(batch), layer),
    losses=losses,
    divergence=divergence if use_divergence else None,
  )


def autoencoding(module: Any) -> Callable[[jax.Array], Autoencoding]:
  """Binds `Autoencoding` to a `SparseAutoencoder`."""

  def run(x_BLD: jax.Array) -> Autoencoding:
    normalised = module.normalise(x_BLD)
    if module.spec.arch == "topk":
      values, indices = module.encode(normalised.values_TD)
      outputs = module.decode(SparseCode(values, indices))
    else:
      values, indices = module.activations(normalised.values_TD), None
      outputs = module.decode_activations(values) + module.pre_bias[...]
    raw_outputs = module.denormalise(outputs, normalised)
    return Autoencoding(normalised.values_TD, outputs, raw_outputs, values, indices)

  return run


def real_tokens(batch: Batch) -> jax.Array:
  """Returns bool [B, L]: tokens that are scored or were a scored target, so not padding."""
  scored_BL = jnp.asarray(batch["weights"]) > 0
  return scored_BL | jnp.pad(scored_BL[:, :-1], ((0, 0), (1, 0)))


def _positions(batch: Batch) -> jax.Array:
  return batch["positions"] if "positions" in batch else jnp.arange(batch["weights"].shape[1])[None]


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  return jnp.where(denominator == 0, 0, numerator / jnp.where(denominator == 0, 1, denominator))


def _recovered(ablated: float, substituted: float, clean: float) -> float:
  gap = ablated - clean
  return (ablated - substituted) / gap if gap else float("nan")
