"""Sequential Monte Carlo over texts: weighted particles of p(y) * phi(y), and an unbiased estimate of its mass.

    particles = particle_filter(model, prompts_BP, valid_BP, key, potential=HardConstraint(grammar),
                                num_particles=16, max_new_tokens=64, stop=Stop(ids_E=[end]))
    index_B = draw_index(particles, key)               # one text a prompt, by weight

p is the law of `sample` with the same chain, stops and limits: what the chain does to
each next-token law is part of p, and the potential is what p is multiplied by. The
mean of exp(log_evidence) over runs is Z = sum over finished texts of p * phi, whatever
the proposal, the number of particles, the threshold and the scheme of resampling.

Source: sequential Monte Carlo steering, arXiv:2306.03081; twisted, arXiv:2404.17546.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.particles import resampling
from nr.generation.particles.potentials import Potential, add_twist
from nr.generation.particles.weighted_texts import Goal, Particles, Rows, prepare, read, result, settle, start
from nr.generation.samplers import Gumbel, Sampler
from nr.generation.stopping import RUNNING, Stop
from nr.generation.transforms.algebra import IDENTITY, Transform
from nr.names import unknown

LOCALLY_OPTIMAL, MODEL, CHAIN = "locally_optimal", "model", "chain"
# Keeps the draws of resampling apart from those of tokens and transforms.
# Far from positions and row ids, which fold into the same keys.
RESAMPLING = 2**31 + 7919


class _Loop(NamedTuple):
  step: jax.Array
  cache: Any
  rows: Rows
  log_weights_BK: jax.Array
  sizes_BN: jax.Array
  is_resampled_BN: jax.Array


def particle_filter(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None,
  key: jax.Array,
  *,
  potential: Potential,
  chain: Transform = IDENTITY,
  proposal: str | Transform = LOCALLY_OPTIMAL,
  num_particles: int,
  max_new_tokens: int,
  stop: Stop | None = None,
  threshold: jax.Array | float = 0.5,
  scheme: str = "systematic",
  sampler: Sampler | None = None,
  row_ids_B: jax.Array | None = None,
) -> Particles:
  """Draws weighted texts of p * phi, token by token, in one compiled loop.

  Particles of a prompt are rows of the batch; the prompt is read once. After each
  token, particles of a prompt are resampled when their effective sample size is below
  `threshold` * K: caches, states and texts are gathered, never across prompts.
  Finished particles keep their weight and take part.

  Args:
    model: any language model.
    prompts_BP: int32 token ids, padded on the left (`decoding.pad_prompts`).
    valid_BP: bool, False at padding; None when there is none.
    key: random key.
    potential: phi. `product()` is 1: plain sampling.
    chain: transforms of the logits that make the law p; per-row parameters (also of
      the potential and the proposal) are those of prompts.
    proposal: how tokens are drawn. "locally_optimal": from p * psi, weight sum p * psi;
      "model": from p, weight psi; a transform: from the model's law through it,
      weight p * psi / q. It must be able to draw whatever p * psi allows, or Z is
      that of the texts that it can draw.
    num_particles: K of each prompt; static.
    max_new_tokens: most tokens to add; static. Texts that reach it end there.
    stop: what ends a text before that.
    threshold: in [0, 1], a scalar or [B]; 0 never resamples, 1 whenever weights differ.
    scheme: "systematic", "stratified", "multinomial" or "residual"; static.
    sampler: draws from the proposal; `Gumbel` when None. Another one must draw by
      probability for the weights to be right (or replay given texts, to weigh them).
      Values for each row are those of all B * K rows.
    row_ids_B: int32 identity of each prompt for its random keys; 0..B-1 when None.

  Raises:
    ValueError: what `sample` refuses, an unknown proposal or scheme, a threshold
      outside [0, 1], a potential that reads what the model does not offer.
    TypeError: a potential that is none.
  """
  resampling.check_scheme("scheme", scheme)
  mode, proposal = _proposal(proposal)
  threshold = np.asarray(threshold, np.float32)
  batch = np.shape(prompts_BP)[0] if np.ndim(prompts_BP) else 0
  if threshold.shape not in ((), (batch,)) or not ((threshold >= 0) & (threshold <= 1)).all():
    raise ValueError(f"threshold={threshold.tolist()}: give a number in [0, 1], or one a prompt")
  goal, prompts_BP, valid_BP = prepare(
    model, prompts_BP, valid_BP, potential, chain, proposal, num_particles, max_new_tokens, stop
  )
  keys_R = decoding.row_keys(key, row_ids_B, batch, num_particles)
  threshold_B = jnp.broadcast_to(threshold, (batch,))
  settings = dict(size=num_particles, max_new_tokens=max_new_tokens, mode=mode, scheme=scheme)
  return _run(model, goal, sampler or Gumbel(), prompts_BP, valid_BP, keys_R, threshold_B, **settings)


def _proposal(proposal: str | Transform) -> tuple[str, Transform]:
  if isinstance(proposal, Transform):
    return CHAIN, proposal
  if proposal not in (LOCALLY_OPTIMAL, MODEL):
    raise ValueError(unknown("proposal", str(proposal), (LOCALLY_OPTIMAL, MODEL)) + ", or a transform")
  return proposal, IDENTITY


@functools.partial(jax.jit, static_argnames=("size", "max_new_tokens", "mode", "scheme"))
def _run(
  model, goal, sampler, prompts_BP, valid_BP, keys_R, threshold_B, *, size, max_new_tokens, mode, scheme
):
  """Reads the prompts and draws until every particle has ended."""
  batch = prompts_BP.shape[0]
  cache, outputs, rows, log_final_R = start(model, goal, prompts_BP, valid_BP, keys_R, max_new_tokens, size)
  rows_R = jnp.repeat(jnp.arange(batch), size)
  model, goal = model.take(rows_R), goal.take(rows_R)
  empty_BN = jnp.zeros((batch, max_new_tokens))
  loop = _Loop(jnp.int32(0), cache, rows, log_final_R.reshape(batch, size), empty_BN, empty_BN > 0)

  def draw(loop: _Loop, outputs: Outputs) -> _Loop:
    was_open_B = (loop.rows.finish_R == RUNNING).reshape(batch, size).any(axis=1)
    rows, changes_R = _draw(goal, sampler, mode, loop.rows, outputs)
    loop = loop._replace(rows=rows, log_weights_BK=loop.log_weights_BK + changes_R.reshape(batch, size))
    return _resample(model, loop, keys_R.reshape(batch, size)[:, 0], threshold_B, was_open_B, scheme)

  def advance(loop: _Loop) -> _Loop:
    outputs, cache = read(model, loop.rows, loop.cache)
    return draw(loop._replace(cache=cache), outputs)

  loop = jax.lax.while_loop(
    lambda loop: (loop.step < max_new_tokens) & (loop.rows.finish_R == RUNNING).any(),
    advance,
    draw(loop, outputs),
  )
  return result(
    loop.rows,
    loop.log_weights_BK,
    goal.stop,
    max_new_tokens,
    loop.sizes_BN,
    loop.is_resampled_BN,
    loop.step - 1,
  )


def _draw(goal: Goal, sampler: Sampler, mode: str, rows: Rows, outputs: Outputs) -> tuple[Rows, jax.Array]:
  """Draws one token a particle; returns the particles and the changes [R] of their log-weights."""
  formed = decoding.form_law(goal.law, rows.law, outputs, rows.context)
  log_probs_RV, proposed, is_broken_R = formed.transformed_BV, None, formed.is_broken_B
  twist_RV = goal.potential.log_twist(log_probs_RV, rows.potential, formed.context)
  target_RV = add_twist(log_probs_RV, twist_RV)
  drawn_RV = target_RV if mode == LOCALLY_OPTIMAL else log_probs_RV
  if mode == CHAIN:
    proposed = decoding.form_law(goal.proposal, rows.proposal, outputs, rows.context)
    drawn_RV, is_broken_R = proposed.transformed_BV, is_broken_R | proposed.is_broken_B
  # A particle whose every next token has weight 0 draws any; its weight ends it below.
  drawable_RV, _ = decoding.guarded(drawn_RV, log_probs_RV)
  tokens_R = sampler.draw(drawable_RV, formed.context)
  if mode == LOCALLY_OPTIMAL:
    # Less the (rounded) mass of p, so that phi = 1 changes no weight at all.
    increments_R = jax.nn.logsumexp(target_RV, axis=-1) - jax.nn.logsumexp(log_probs_RV, axis=-1)
  else:
    increments_R = decoding.chosen(target_RV, tokens_R) - decoding.chosen(drawable_RV, tokens_R)
  # A sampler that replays texts may choose what the target forbids.
  is_forbidden_R = decoding.chosen(target_RV, tokens_R) == -jnp.inf
  increments_R = jnp.where(is_forbidden_R, -jnp.inf, increments_R)
  return settle(goal, rows, formed, proposed, tokens_R, increments_R, is_broken_R)


def _resample(
  model: LanguageModel,
  loop: _Loop,
  keys_B: jax.Array,
  threshold_B: jax.Array,
  was_open_B: jax.Array,
  scheme: str,
) -> _Loop:
  """Resamples the particles of the prompts that need it."""
  batch, size = loop.log_weights_BK.shape
  sizes_B = resampling.effective_sample_size(loop.log_weights_BK)
  is_open_B = (loop.rows.finish_R == RUNNING).reshape(batch, size).any(axis=1)
  # A prompt with a running particle has weight: those that lose theirs have ended.
  is_due_B = is_open_B & (sizes_B < threshold_B * size)

  def gather(moving: tuple[Any, Rows]) -> tuple[Any, Rows]:
    cache, rows = moving
    fold = jax.vmap(jax.random.fold_in, (0, None))
    parents_BK = resampling.SCHEMES[scheme](loop.log_weights_BK, fold(fold(keys_B, loop.step), RESAMPLING))
    parents_BK = jnp.where(is_due_B[:, None], parents_BK, jnp.arange(size))
    rows_R = (jnp.arange(batch)[:, None] * size + parents_BK).reshape(-1)
    return model.fork(cache, rows_R), rows.take(rows_R)

  cache, rows = jax.lax.cond(is_due_B.any(), gather, lambda moving: moving, (loop.cache, loop.rows))
  mean_B1 = resampling.log_mean_exp(loop.log_weights_BK)[:, None]
  return _Loop(
    step=loop.step + 1,
    cache=cache,
    rows=rows,
    log_weights_BK=jnp.where(is_due_B[:, None], mean_B1, loop.log_weights_BK),
    sizes_BN=loop.sizes_BN.at[:, loop.step].set(jnp.where(was_open_B, sizes_B, 0.0)),
    is_resampled_BN=loop.is_resampled_BN.at[:, loop.step].set(is_due_B),
  )
