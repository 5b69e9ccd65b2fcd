"""Weighted texts, and what every driver that draws them shares: start, commit a token, end, read out.

A particle is a row of the batch, prompt-major: particle k of prompt b is row b * K + k.
Its random keys belong to the row and not to the particle, so that copies of one text
go on in different ways.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.particles import resampling
from nr.generation.particles.potentials import Potential, product
from nr.generation.sample import generated_tokens
from nr.generation.stopping import BROKEN, DEAD_END, LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import Chain, Context, Transform, chain


class Particles(NamedTuple):
  """Weighted texts of each prompt.

  Attributes:
    tokens_BKN: int32 [B, K, max_new_tokens]; the first stop id (0 without one) fills
      what follows the end.
    lengths_BK: int32, new tokens, the stop id included.
    log_weights_BK: float32 nats, not normalised: the mean of exp(log-weight) * f(text)
      is an unbiased estimate of sum p * phi * f. -inf for texts of no weight.
    log_evidence_B: float32 nats, log of the mean weight: the estimate of Z. -inf when
      no particle found a text that the potential allows.
    log_probs_BK: float32 nats, log p of each text.
    finish_BK: int32 codes of `nr.generation.stopping`. DEAD_END: every next token had
      weight 0 (or the one that was drawn); BROKEN: the law or a factor was no number.
    effective_sample_size_BN: float32, after each new token and before resampling; 0
      for steps not made and prompts without weight.
    is_resampled_BN: bool, after which new tokens a prompt's particles were resampled.
    calls: int32 scalar, calls of the model after the prompt was read.
  """

  tokens_BKN: jax.Array
  lengths_BK: jax.Array
  log_weights_BK: jax.Array
  log_evidence_B: jax.Array
  log_probs_BK: jax.Array
  finish_BK: jax.Array
  effective_sample_size_BN: jax.Array
  is_resampled_BN: jax.Array
  calls: jax.Array

  @property
  def weights_BK(self) -> jax.Array:
    """Returns weights that sum to 1 for each prompt, or are all 0 where no text has weight."""
    return resampling.normalised(self.log_weights_BK)

  @property
  def tokens_RN(self) -> jax.Array:
    """Returns the tokens as rows [B * K, N], as other drivers do."""
    return self.tokens_BKN.reshape(-1, self.tokens_BKN.shape[-1])

  @property
  def lengths_R(self) -> jax.Array:
    """Returns the lengths as rows [B * K]."""
    return self.lengths_BK.reshape(-1)


class Goal(NamedTuple):
  """What particles are drawn towards, and how: all that is given for each prompt."""

  law: Chain
  potential: Potential
  proposal: Chain
  stop: Stop

  def take(self, rows_B: jax.Array) -> "Goal":
    """Gathers what belongs to rows."""
    return Goal(*(each.take(rows_B) for each in self))


class Rows(NamedTuple):
  """What travels with a particle, besides its cache. The last token has been drawn but not read."""

  context: Context
  law: Any
  potential: Any
  proposal: Any
  stops_R: jax.Array
  finish_R: jax.Array
  last_R: jax.Array
  log_probs_R: jax.Array

  def take(self, rows_R: jax.Array) -> "Rows":
    """Gathers particles. Random keys stay in their place, so that copies go different ways."""
    taken = decoding.take(self, rows_R)
    return taken._replace(context=taken.context._replace(keys_B=self.context.keys_B))


def prepare(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None,
  potential: Potential,
  law: Transform,
  proposal: Transform,
  size: int,
  max_new_tokens: int,
  stop: Stop | None,
) -> tuple[Goal, jax.Array, jax.Array]:
  """Checks a request for particles; returns its goal and the prompts as arrays."""
  if size < 1:
    raise ValueError(f"num_particles={size}: give at least 1")
  request = (prompts_BP, valid_BP, max_new_tokens, size)
  law, prompts_BP, valid_BP = decoding.check_request(model, law, *request)
  # A potential is a transform: the same checks hold.
  checked, _, _ = decoding.check_request(model, chain(product(potential)), *request)
  proposal, _, _ = decoding.check_request(model, proposal, *request)
  stop = (stop or Stop()).prepared(prompts_BP.shape[0], max_new_tokens, model.vocab_size)
  return Goal(law, checked.transforms[0], proposal, stop), prompts_BP, valid_BP


def start(
  model: LanguageModel,
  goal: Goal,
  prompts_BP: jax.Array,
  valid_BP: jax.Array,
  keys_R: jax.Array,
  max_new_tokens: int,
  size: int,
) -> tuple[Any, Outputs, Rows, jax.Array]:
  """Reads each prompt once, for K particles.

  Returns:
    Cache, outputs at the last prompt token, particles, and float32 [R] the factor of
    texts that may not have any token.
  """
  begun = decoding.begin(model, goal.law, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples=size)
  rows_R = jnp.repeat(jnp.arange(prompts_BP.shape[0]), size)
  goal, vocab_size = goal.take(rows_R), model.vocab_size
  is_running_R = goal.stop.limits_B > 0
  rows = Rows(
    context=begun.context,
    law=begun.state,
    potential=goal.potential.init(begun.context, vocab_size),
    proposal=goal.proposal.init(begun.context, vocab_size),
    stops_R=goal.stop.init(rows_R.shape[0]),
    finish_R=jnp.where(is_running_R, RUNNING, LENGTH).astype(jnp.int32),
    last_R=jnp.zeros(rows_R.shape, jnp.int32),
    log_probs_R=jnp.zeros(rows_R.shape),
  )
  rows, log_final_R = _close(goal, rows, ~is_running_R)
  return begun.cache, begun.outputs, rows, log_final_R


def read(model: LanguageModel, rows: Rows, cache: Any) -> tuple[Outputs, Any]:
  """Reads the last token of every particle."""
  return model.extend(rows.last_R[:, None], cache, read_B=jnp.zeros_like(rows.last_R))


def settle(
  goal: Goal,
  rows: Rows,
  formed: decoding.Law,
  proposed: decoding.Law | None,
  tokens_R: jax.Array,
  increments_R: jax.Array,
  is_broken_R: jax.Array,
) -> tuple[Rows, jax.Array]:
  """Commits a token to every running particle.

  Args:
    goal: for each row.
    rows: the particles.
    formed: law of the next token, with its context.
    proposed: that of a proposal chain, or None.
    tokens_R: int32.
    increments_R: float32 log-weights of the tokens; -inf ends the particle.
    is_broken_R: bool, particles without a law.

  Returns:
    The particles, and changes of log-weights [R]: the increments, final factors
    included; 0 for particles that had ended.
  """
  is_running_R = rows.finish_R == RUNNING
  # Also no number, and infinite.
  is_broken_R = is_broken_R | ~(increments_R < jnp.inf)
  is_dead_R = is_broken_R | (increments_R == -jnp.inf)
  is_kept_R = is_running_R & ~is_dead_R
  law, context = decoding.commit(goal.law, rows.law, formed, tokens_R, is_kept_R)
  potential = goal.potential.commit(rows.potential, tokens_R, formed.context)
  proposal = rows.proposal
  if proposed is not None:
    proposal = goal.proposal.commit(rows.proposal, tokens_R, proposed.context)
  finish_R, stops_R = goal.stop.advance(rows.stops_R, tokens_R, context, is_broken_R)
  finish_R = jnp.where(is_dead_R & ~is_broken_R, DEAD_END, finish_R)
  log_probs_R = rows.log_probs_R + decoding.chosen(formed.transformed_BV, tokens_R)
  moved = (potential, proposal, stops_R, tokens_R, log_probs_R)
  before = (rows.potential, rows.proposal, rows.stops_R, rows.last_R, rows.log_probs_R)
  potential, proposal, stops_R, last_R, log_probs_R = decoding.select(is_kept_R, moved, before)
  finish_R = jnp.where(is_running_R, finish_R, rows.finish_R)
  rows = Rows(context, law, potential, proposal, stops_R, finish_R, last_R, log_probs_R)
  rows, log_final_R = _close(goal, rows, is_kept_R & (finish_R != RUNNING))
  changes_R = jnp.where(is_dead_R, -jnp.inf, increments_R) + log_final_R
  return rows, jnp.where(is_running_R, changes_R, 0.0)


def _close(goal: Goal, rows: Rows, is_ending_R: jax.Array) -> tuple[Rows, jax.Array]:
  """Returns the final log-factors of particles that just ended, 0 for others; a factor that is no number breaks."""

  def final() -> jax.Array:
    return goal.potential.final(rows.potential, rows.context).astype(jnp.float32)

  # Under a condition, for factors that cost as much as a reward model.
  values_R = jax.lax.cond(is_ending_R.any(), final, lambda: jnp.zeros(is_ending_R.shape))
  is_broken_R = is_ending_R & ~(values_R < jnp.inf)
  finish_R = jnp.where(is_broken_R, BROKEN, rows.finish_R)
  values_R = jnp.where(is_broken_R, -jnp.inf, values_R)
  return rows._replace(finish_R=finish_R), jnp.where(is_ending_R, values_R, 0.0)


def result(
  rows: Rows,
  log_weights_BK: jax.Array,
  stop: Stop,
  max_new_tokens: int,
  sizes_BN: jax.Array,
  is_resampled_BN: jax.Array,
  calls: jax.Array,
) -> Particles:
  """Reads the result out of the particles of B * K rows."""
  shape = log_weights_BK.shape
  return Particles(
    generated_tokens(rows.context, max_new_tokens, stop.filler).reshape(*shape, max_new_tokens),
    rows.context.generated_B.reshape(shape),
    log_weights_BK,
    resampling.log_mean_exp(log_weights_BK),
    rows.log_probs_R.reshape(shape),
    rows.finish_R.reshape(shape),
    sizes_BN,
    is_resampled_BN,
    calls,
  )


def draw_index(particles: Particles, key: jax.Array, row_ids_B: jax.Array | None = None) -> jax.Array:
  """Draws one text of each prompt by weight.

  Returns:
    int32 [B] in 0..K-1; -1 where no text has weight.
  """
  keys_B = decoding.row_keys(key, row_ids_B, particles.log_weights_BK.shape[0])
  index_B = jax.vmap(jax.random.categorical)(keys_B, particles.log_weights_BK)
  return jnp.where(particles.log_evidence_B == -jnp.inf, -1, index_B).astype(jnp.int32)
