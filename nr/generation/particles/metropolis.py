"""Markov chains over texts: redraw the end of a text from a random place, accept by the target's ratio.

The target is p(y)^exponent * phi(y): the power law that lower temperatures only
resemble token by token, with or without a potential. Chains forget where they
started, but how fast is not known; `particle_filter` with `Reweighting(Temperature(t))`
draws weighted texts of the same target.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import LanguageModel
from nr.generation.particles.particle_filter import MODEL, particle_filter
from nr.generation.particles.potentials import Potential, product
from nr.generation.samplers import Gumbel, sampler
from nr.generation.stopping import Stop
from nr.generation.transforms.algebra import IDENTITY, Context, Transform

# Keep the draws of places and of acceptance apart from those of tokens.
# Far from positions and row ids, which fold into the same keys.
PLACES, ACCEPTANCE = 2**31 + 7949, 2**31 + 7951


class Chains(NamedTuple):
  """The last text of each chain.

  Attributes:
    tokens_BKN: int32 [B, K, max_new_tokens]; filler behind the end.
    lengths_BK: int32, new tokens, the stop id included.
    log_probs_BK: float32 nats, log p of each text.
    log_weights_BK: float32 nats, log(p * phi / q), where q is the proposal; -inf for a
      chain that never met a text that the potential allows.
    finish_BK: int32 codes of `nr.generation.stopping`.
    acceptance_rates_BK: float32, accepted steps over steps.
  """

  tokens_BKN: jax.Array
  lengths_BK: jax.Array
  log_probs_BK: jax.Array
  log_weights_BK: jax.Array
  finish_BK: jax.Array
  acceptance_rates_BK: jax.Array


@sampler
class Redraw:
  """Replays the first tokens of given texts, then draws."""

  tokens_RN: jax.Array
  kept_R: jax.Array

  def draw(self, logits_BV: jax.Array, context: Context) -> jax.Array:
    """Returns the given token before `kept_R`, else a draw."""
    slots_R1 = jnp.minimum(context.generated_B, self.tokens_RN.shape[1] - 1)[:, None]
    given_R = jnp.take_along_axis(self.tokens_RN, slots_R1, axis=1)[:, 0]
    return jnp.where(context.generated_B < self.kept_R, given_R, Gumbel().draw(logits_BV, context))

  def take(self, rows_B: jax.Array) -> "Redraw":
    """Gathers rows."""
    return Redraw(self.tokens_RN[rows_B], self.kept_R[rows_B])


def metropolis(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None,
  key: jax.Array,
  *,
  exponent: jax.Array | float = 1.0,
  potential: Potential | None = None,
  chain: Transform = IDENTITY,
  proposal: str | Transform = MODEL,
  num_chains: int = 1,
  num_steps: int,
  max_new_tokens: int,
  stop: Stop | None = None,
  row_ids_B: jax.Array | None = None,
) -> Chains:
  """Moves chains of texts whose law tends to p^exponent * phi.

  A step draws a place uniformly among the tokens of the text and redraws from there on
  with the proposal q; it is accepted with probability
  min(1, (p'/p)^(exponent - 1) * (w'/w) * length/length'), w = p * phi / q. The first
  texts are draws from q.

  Args:
    model, prompts_BP, valid_BP, key, chain, proposal, stop, row_ids_B: those of
      `particle_filter`; p is the law of the chain.
    exponent: power of p; a scalar or [B].
    potential: phi; None: 1.
    num_chains: K independent chains of each prompt; static.
    num_steps: steps of each; each reads all tokens again.
    max_new_tokens: most tokens of a text; static.

  Raises:
    ValueError: what `particle_filter` refuses, or a negative number of steps.

  Source: Metropolis-Hastings; redrawing a suffix is our choice of move, for it keeps
  any law of p's texts reachable.
  """
  if num_steps < 0:
    raise ValueError(f"num_steps={num_steps}: give at least 0")
  batch = np.shape(prompts_BP)[0]
  exponent = jnp.asarray(exponent, jnp.float32)
  if exponent.shape not in ((), (batch,)):
    raise ValueError(
      f"exponent has shape {exponent.shape}: give a number, or one for each of {batch} prompts"
    )
  settings = dict(
    potential=product() if potential is None else potential,
    chain=chain,
    proposal=proposal,
    num_particles=num_chains,
    max_new_tokens=max_new_tokens,
    stop=stop,
    threshold=0.0,
    row_ids_B=row_ids_B,
  )
  rows = batch * num_chains
  tokens_RN, kept_R = jnp.zeros((rows, max_new_tokens), jnp.int32), jnp.zeros(rows, jnp.int32)

  def draw(number: int, tokens_RN: jax.Array, kept_R: jax.Array) -> Chains:
    redraw, its_key = Redraw(tokens_RN, kept_R), jax.random.fold_in(key, number)
    new = particle_filter(model, prompts_BP, valid_BP, its_key, sampler=redraw, **settings)
    texts = (new.tokens_BKN, new.lengths_BK, new.log_probs_BK, new.log_weights_BK, new.finish_BK)
    return Chains(*texts, jnp.zeros((batch, num_chains)))

  now = draw(0, tokens_RN, kept_R)
  for number in range(1, num_steps + 1):
    keys_R = decoding.row_keys(jax.random.fold_in(key, number), row_ids_B, batch, num_chains)
    kept_R = _places(keys_R, now.lengths_BK.reshape(-1))
    now = _choose(now, draw(number, now.tokens_BKN.reshape(rows, -1), kept_R), exponent, keys_R)
  return now._replace(acceptance_rates_BK=now.acceptance_rates_BK / max(num_steps, 1))


@jax.jit
def _places(keys_R: jax.Array, lengths_R: jax.Array) -> jax.Array:
  """Returns a place of each text, uniform in 0..length-1."""
  uniforms_R = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, PLACES)))(keys_R)
  return jnp.minimum((uniforms_R * lengths_R).astype(jnp.int32), jnp.maximum(lengths_R - 1, 0))


@jax.jit
def _choose(now: Chains, new: Chains, exponent: jax.Array, keys_R: jax.Array) -> Chains:
  """Moves the chains that accept, and counts."""

  def log_target(texts: Chains) -> jax.Array:
    power_B1 = jnp.broadcast_to(exponent - 1, texts.lengths_BK.shape[:1])[:, None]
    log_lengths_BK = jnp.log(jnp.maximum(texts.lengths_BK, 1))
    log_target_BK = power_B1 * texts.log_probs_BK + texts.log_weights_BK - log_lengths_BK
    return jnp.where(texts.log_weights_BK == -jnp.inf, -jnp.inf, log_target_BK)

  before_BK, after_BK = log_target(now), log_target(new)
  uniforms_R = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPTANCE)))(keys_R)
  # A chain without weight goes anywhere; -inf - -inf is never formed.
  is_lost_BK = before_BK == -jnp.inf
  ratio_BK = jnp.exp(jnp.minimum(after_BK - jnp.where(is_lost_BK, 0.0, before_BK), 0.0))
  is_moved_BK = is_lost_BK | (uniforms_R.reshape(before_BK.shape) < ratio_BK)

  def choose(new_leaf: jax.Array, leaf: jax.Array) -> jax.Array:
    return jnp.where(is_moved_BK.reshape(*is_moved_BK.shape, *(1,) * (leaf.ndim - 2)), new_leaf, leaf)

  moved = jax.tree.map(choose, new, now)
  return moved._replace(acceptance_rates_BK=now.acceptance_rates_BK + is_moved_BK)
