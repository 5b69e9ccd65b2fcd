"""The loss of a TopK sparse autoencoder, and what all sparse autoencoders share: counters and constraints.

From the released trainer openai/sparse_autoencoder (train.py, kernels.py; arXiv 2406.04093):

    L     = L_mse + alpha * L_aux
    L_mse = mean over tokens and width of (r - u)^2, times mse_scale (fixed once at the start)
    e     = stop_gradient(u - r)
    L_aux = mean((e_hat - e)^2) / mean((e - mean_tokens(e))^2),  e_hat = the k_aux largest dead latents
            decoded WITHOUT the pre-bias (adding it on one side only is a known defect elsewhere)

The losses of other architectures are in `sparse_coding_variants`, which also chooses among all. The
autoencoder is handed in as an object with `spec`, `normalise`, `pre_activations`, `decode` and
`decode_latents`, so that objectives need no model code. Arrays: N tokens, D width, C latents, K active.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nr.objectives.weighted import LossOutput, Weighted

FIRED_ABOVE = 1e-3
_COUNTER_LIMIT = 2**30


class FiredCounts(NamedTuple):
  """Statistics of one batch, summed over microbatches and devices.

  Attributes:
    fired_C: int32, tokens on which each latent was active (value > 1e-3).
    tokens: int32 scalar, tokens seen.
  """

  fired_C: jax.Array
  tokens: jax.Array


def error_scale(normalised_ND: jax.Array) -> jax.Array:
  """Returns mse_scale = 1 / mean((u - mean_tokens(u))^2) of a sample of normalised activations."""
  return 1 / jnp.mean(jnp.square(normalised_ND - normalised_ND.mean(0)))


def init_extra(spec: Any, scale: jax.Array | float) -> dict:
  """Returns the state kept beside the parameters: counters at 0 and the fixed scale of the error.

  Where the architecture needs them also the running inference threshold (-1: no batch seen yet) and the
  number of updates done.

  Args:
    spec: settings of the autoencoder.
    scale: `error_scale` of a sample taken once, before the first step.
  """
  extra = {
    "tokens_since_fired": jnp.zeros((spec.num_latents,), jnp.int32),
    "mse_scale": jnp.asarray(scale, jnp.float32),
  }
  if spec.is_selecting_in_batch:
    extra["threshold"] = jnp.asarray(-1, jnp.float32)
  if spec.sparsity_warmup:
    extra["step"] = jnp.zeros((), jnp.int32)
  return extra


def extra_axes(spec: Any) -> dict:
  """Returns the logical axis names of `init_extra`."""
  axes = {"tokens_since_fired": ("latents",), "mse_scale": ()}
  axes.update({"threshold": ()} if spec.is_selecting_in_batch else {})
  axes.update({"step": ()} if spec.sparsity_warmup else {})
  return axes


def update_extra(
  extra: dict, params: Any, statistics: FiredCounts, step: Any, *, threshold_rate: float | None = None
) -> dict:
  """Returns the counters after a batch: 0 where a latent fired, else more by the batch's tokens.

  The inference threshold moves by `threshold_rate` of its distance to the smallest activation that the
  batch kept (the mean over microbatches); the first one is taken whole.
  """
  del params
  counters_C = advance(extra["tokens_since_fired"], statistics.fired_C > 0, statistics.tokens)
  updated = {**extra, "tokens_since_fired": counters_C}
  if "threshold" in extra:
    old, batches = extra["threshold"], statistics.batches
    smallest = statistics.smallest / jnp.maximum(batches, 1)
    moved = jnp.where(old < 0, smallest, old + threshold_rate * (smallest - old))
    updated["threshold"] = jnp.where(batches > 0, moved, old)
  if "step" in extra:
    updated["step"] = jnp.asarray(step, jnp.int32) + 1
  return updated


def advance(counters_C: jax.Array, fired_C: jax.Array, tokens: jax.Array) -> jax.Array:
  """Advances tokens-since-fired counters, int32; they saturate instead of wrapping."""
  grown_C = jnp.minimum(counters_C + tokens.astype(jnp.int32), _COUNTER_LIMIT)
  return jnp.where(fired_C, 0, grown_C)


def topk_loss(
  autoencoder: Any, extra: dict, activations_ND: jax.Array, weights_N: jax.Array | None = None
) -> LossOutput:
  """Returns the TopK loss of a batch of raw activations.

  The counters are advanced with this batch BEFORE the dead mask is taken, as in the release. With
  gradient accumulation the mask and the normaliser of the auxiliary term are those of the microbatch
  (the term is a ratio of batch means); without dead latents microbatches agree exactly.

  Args:
    autoencoder: a sparse autoencoder with its parameters (see the module's docstring).
    extra: see `init_extra`.
    activations_ND: raw activations of the model, any float type.
    weights_N: weight of each token, 0 leaves it out; ones when None.

  Returns:
    LossOutput: loss; metrics `fvu` (L_mse, which is the fraction of variance unexplained in the
    normalised space, the variance being that of the sample that fixed mse_scale), `auxiliary`, `l0`,
    `dead_fraction`; statistics `FiredCounts`.
  """
  spec = autoencoder.spec
  u_ND, weights_N, counted_N = prepare(autoencoder, activations_ND, weights_N)
  scores_NC = autoencoder.pre_activations(u_ND)
  code = autoencoder.select(scores_NC)
  r_ND = autoencoder.decode(code)

  active_NK = code.values_TK > FIRED_ABOVE
  statistics = count_fired(active_NK & counted_N[:, None], code.indices_TK, counted_N, spec.num_latents)
  dead_C = dead_latents(spec, extra, statistics)

  error_N = jnp.square(r_ND - u_ND).mean(-1) * extra["mse_scale"]
  mse = Weighted.of(error_N, weights_N)
  residual_ND = jax.lax.stop_gradient(u_ND - r_ND)
  auxiliary = auxiliary_loss(autoencoder, scores_NC, residual_ND, dead_C, weights_N)
  loss = Weighted(mse.total + spec.alpha * auxiliary * mse.weight, mse.weight)

  metrics = {
    "fvu": mse,
    "auxiliary": Weighted(auxiliary * mse.weight, mse.weight),
    "l0": Weighted.of((code.values_TK > 0).sum(-1), weights_N),
    "dead_fraction": Weighted(dead_C.mean() * mse.weight, mse.weight),
  }
  return LossOutput(loss, metrics, statistics)


def prepare(
  autoencoder: Any, activations_ND: jax.Array, weights_N: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns normalised activations [N, D] (0 where they do not count), weights [N] and which count, bool [N]."""
  weights_N = jnp.ones(activations_ND.shape[:1]) if weights_N is None else weights_N.astype(jnp.float32)
  counted_N = weights_N > 0
  u_ND = jax.lax.stop_gradient(autoencoder.normalise(activations_ND).values_TD)
  return jnp.where(counted_N[:, None], u_ND, 0.0), weights_N, counted_N


def dead_latents(spec: Any, extra: dict, statistics: FiredCounts) -> jax.Array:
  """Returns bool [C], the latents that are dead once this batch has been counted."""
  counters_C = advance(extra["tokens_since_fired"], statistics.fired_C > 0, statistics.tokens)
  return jax.lax.stop_gradient(counters_C > spec.dead_tokens)


def auxiliary_loss(
  autoencoder: Any, scores_NC: jax.Array, residual_ND: jax.Array, dead_C: jax.Array, weights_N: jax.Array
) -> jax.Array:
  """Returns L_aux: how well the dead latents explain what the live ones leave over.

  Args:
    autoencoder: see the module's docstring.
    scores_NC: pre-activations of all latents.
    residual_ND: u - r with no gradient.
    dead_C: bool, the latents that may be used; at most k_aux of them are, all when fewer are dead.
    weights_N: weight of each token.

  Returns:
    Scalar; 0 with no dead latents or where the ratio is not a finite number.
  """
  spec = autoencoder.spec

  def explain(scores_NC):
    restricted_NC = jnp.where(dead_C, scores_NC, -jnp.inf)  # ReLU turns what is left over into 0
    code = autoencoder.select(restricted_NC, spec.k_aux)
    # Dense: gathering k_aux rows for every token would take N * k_aux * D numbers.
    estimate_ND = autoencoder.decode_latents(code, "dense")
    explained = Weighted.of(jnp.square(estimate_ND - residual_ND).mean(-1), weights_N).total
    centre_D = _weighted_mean(residual_ND, weights_N)
    spread = Weighted.of(jnp.square(residual_ND - centre_D).mean(-1), weights_N).total
    ratio = explained / jnp.where(spread == 0, 1.0, spread)
    return jnp.where((spread == 0) | ~jnp.isfinite(ratio), 0.0, ratio)

  # Most steps have no dead latents; then the second top-k and product are not run at all.
  return jax.lax.cond(dead_C.any(), explain, lambda scores_NC: jnp.zeros((), jnp.float32), scores_NC)


def count_fired(
  active_NK: jax.Array, indices_NK: jax.Array, counted_N: jax.Array, num_latents: int
) -> FiredCounts:
  """Counts on how many tokens each latent was active."""
  fired_C = jnp.zeros((num_latents,), jnp.int32).at[indices_NK].add(active_NK.astype(jnp.int32))
  return FiredCounts(fired_C, counted_N.sum(dtype=jnp.int32))


def constrained(spec: Any) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
  """Returns what keeps an autoencoder's parameters where they belong, to wrap an optimizer in.

  Decoder rows stay at norm 1 (unless they are free), thresholds at 0 or above. SAELens passes thresholds
  through a ReLU instead, whose gradient is 0 for one that has become negative: it stays there.
  """

  def wrap(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    if spec.arch == "jumprelu":
      inner = not_negative(inner, ("threshold",))
    return unit_norm_decoder(inner) if spec.decoder_norm == "unit" else inner

  return wrap


def not_negative(inner: optax.GradientTransformation, path: tuple[str, ...]) -> optax.GradientTransformation:
  """Keeps a parameter at 0 or above: what a step of `inner` makes negative becomes 0."""
  inner = optax.with_extra_args_support(inner)

  def update(gradients, state, params=None, **extra_args):
    if params is None:
      raise ValueError("not_negative needs the parameters: call update(gradients, state, params)")
    updates, state = inner.update(gradients, state, params, **extra_args)
    held = _read(params, path)
    return _replace(updates, path, jnp.maximum(_read(updates, path), -held)), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


def unit_norm_decoder(
  inner: optax.GradientTransformation, path: tuple[str, ...] = ("decoder", "kernel")
) -> optax.GradientTransformation:
  """Keeps the rows of the decoder at norm 1 through every step of `inner`.

  Each row moves on the unit sphere: its gradient loses the component along the row,
  G - W (W . G), the inner optimizer makes a step from that, and the result is scaled back to the
  sphere. The last part is expressed as an update, normalised(W + step) - W, so that the loop's plain
  addition lands on the sphere to float32 rounding. The release renormalises before its optimizer
  step and therefore saves rows that are only nearly of unit norm; dictionary_learning changed the
  order deliberately, and so do we.

  Args:
    inner: the optimizer to wrap.
    path: keys to the decoder [C, D] in the tree of parameters.

  Returns:
    A transformation whose update needs the parameters.
  """
  inner = optax.with_extra_args_support(inner)

  def update(gradients, state, params=None, **extra_args):
    if params is None:
      raise ValueError("unit_norm_decoder needs the parameters: call update(gradients, state, params)")
    rows_CD = _read(params, path)
    projected = _replace(gradients, path, remove_parallel(_read(gradients, path), rows_CD))
    updates, state = inner.update(projected, state, params, **extra_args)
    moved_CD = rows_CD + _read(updates, path)
    norms_C1 = jnp.linalg.norm(moved_CD, axis=-1, keepdims=True)
    landed_CD = moved_CD / jnp.where(norms_C1 == 0, 1.0, norms_C1)
    return _replace(updates, path, landed_CD - rows_CD), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


def remove_parallel(gradients_CD: jax.Array, rows_CD: jax.Array) -> jax.Array:
  """Removes from each row of the gradient its component along the same row of the decoder."""
  squared_C1 = jnp.square(rows_CD).sum(-1, keepdims=True)
  along_C1 = (gradients_CD * rows_CD).sum(-1, keepdims=True)
  return gradients_CD - rows_CD * (along_C1 / jnp.where(squared_C1 == 0, 1.0, squared_C1))


def _weighted_mean(values_ND: jax.Array, weights_N: jax.Array) -> jax.Array:
  total = weights_N.sum()
  return (values_ND * weights_N[:, None]).sum(0) / jnp.where(total == 0, 1.0, total)


def _read(tree: Any, path: tuple[str, ...]) -> Any:
  for name in path:
    tree = tree[name]
  return tree


def _replace(tree: Any, path: tuple[str, ...], value: Any) -> Any:
  if not path:
    return value
  return {**tree, path[0]: _replace(tree[path[0]], path[1:], value)}
