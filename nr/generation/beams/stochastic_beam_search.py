"""Samples without replacement from the law of whole texts: stochastic beam search.

Beams are kept by the Gumbel-perturbed log-probability of their text so far, and the
perturbations of a beam's continuations are drawn given that the largest is the
beam's own. The K largest perturbed texts are then K draws without replacement from
the law of the chain (arXiv:1903.06059), with the weights that make estimates
unbiased.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.sample import generated_tokens
from nr.generation.stopping import DEAD_END, LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import IDENTITY, Chain, Context, Transform
from nr.models.top_k import top_k

# Purpose of the perturbations, apart from the sampler's draws (0) and the transforms'.
_PERTURB = 7_002


class StochasticBeams(NamedTuple):
  """K different texts of each prompt, in the order of their perturbed log-probabilities.

  Attributes:
    tokens_BKN: int32 [B, K, max_new_tokens]; the first stop id (0 without one) fills
      what follows the end.
    lengths_BK: int32 tokens, the stop id included; 0 in an empty slot.
    log_probs_BK: float32 nats, under the model.
    transformed_log_probs_BK: float32 nats, under the chain's law: what is drawn from.
    perturbed_BK: float32; -inf in an empty slot (fewer texts than K exist).
    inclusion_BK: float32, the probability that the text's perturbed log-probability
      exceeds the threshold; 1 where all texts were found.
    log_weights_BK: float32, log(probability / inclusion): the sum of weight * f(text)
      estimates the mean of f without bias, and with the weights' softmax with less
      variance; -inf in an empty slot.
    threshold_B: float32, the (K+1)-th largest perturbed log-probability.
    finish_BK: int32, why each text ended; DEAD_END in an empty slot.
    calls: int32 scalar, calls of the model after the prompt was read.
  """

  tokens_BKN: jax.Array
  lengths_BK: jax.Array
  log_probs_BK: jax.Array
  transformed_log_probs_BK: jax.Array
  perturbed_BK: jax.Array
  inclusion_BK: jax.Array
  log_weights_BK: jax.Array
  threshold_B: jax.Array
  finish_BK: jax.Array
  calls: jax.Array


class _Loop(NamedTuple):
  """Carry of the loop: R = B * (K + 1) beams, and the outputs that follow them.

  Between a step and the next reading, beam r is `last_R[r]` behind beam `parents_R[r]` of the cache.
  """

  step: jax.Array
  cache: Any
  outputs: Outputs
  context: Context
  state: Any
  stop_states_R: jax.Array
  finish_R: jax.Array
  parents_R: jax.Array
  last_R: jax.Array
  log_probs_R: jax.Array
  transformed_R: jax.Array
  perturbed_R: jax.Array


def stochastic_beam_search(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None = None,
  key: jax.Array | None = None,
  *,
  chain: Transform = IDENTITY,
  num_samples: int,
  max_new_tokens: int,
  stop: Stop | None = None,
  row_ids_B: jax.Array | None = None,
) -> StochasticBeams:
  """Draws texts of each prompt without replacement.

  Args:
    model: any language model.
    prompts_BP: int32 token ids, padded on the left (`pad_prompts`).
    valid_BP: bool, False at padding; None when there is none.
    key: random key.
    chain: transforms of the logits; per-row parameters are those of prompts.
    num_samples: K, texts of each prompt; one beam more is searched, for the threshold.
    max_new_tokens: most tokens to add; a text of that length has ended.
    stop: what ends a text before that; None: nothing.
    row_ids_B: int32 identity of each prompt for its random keys.

  Raises:
    ValueError: what `decoding.check_request` and `Stop.prepared` refuse, or no key.

  Source: arXiv:1903.06059, with the stable form of the conditional perturbation of
  its reference code.
  """
  if key is None:
    raise ValueError("key: stochastic beam search draws at random; give a random key")
  law, prompts_BP, valid_BP = decoding.check_request(
    model, chain, prompts_BP, valid_BP, max_new_tokens, num_samples
  )
  batch = prompts_BP.shape[0]
  stop = (stop or Stop()).prepared(batch, max_new_tokens, model.vocab_size)
  return _search(max_new_tokens, num_samples + 1, model, law, stop, prompts_BP, valid_BP, key, row_ids_B)


def conditional_perturbations(largest: jax.Array, perturbed_V: jax.Array) -> jax.Array:
  """Shifts Gumbel perturbed values, along the last axis, so that their maximum is `largest`.

  With Z their maximum, v = T - g + log(1 - exp(g - Z)) and T - max(0, v) -
  log(1 + exp(-|v|)); values of -inf stay so.

  Args:
    largest: float32 [...]; T.
    perturbed_V: float32 [..., V]; g.
  """
  largest_1 = largest[..., None]
  maximum_1 = perturbed_V.max(axis=-1, keepdims=True)
  is_possible_V = (perturbed_V > -jnp.inf) & (largest_1 > -jnp.inf)
  safe_V = jnp.where(is_possible_V, perturbed_V, 0.0)
  gap_V = jnp.where(is_possible_V, perturbed_V - maximum_1, -1.0)
  shift_V = jnp.where(is_possible_V, largest_1, 0.0) - safe_V + _log_one_minus_exp(gap_V)
  shifted_V = largest_1 - jnp.maximum(shift_V, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(shift_V)))
  return jnp.where(is_possible_V, shifted_V, -jnp.inf)


def _log_one_minus_exp(x: jax.Array) -> jax.Array:
  """Returns log(1 - exp(x)) for x <= 0 without cancellation at either end; -inf at 0."""
  is_near = x > -0.6931472
  near = jnp.log(-jnp.expm1(jnp.where(is_near, x, -1.0)))
  return jnp.where(is_near, near, jnp.log1p(-jnp.exp(jnp.where(is_near, -1.0, x))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(max_new_tokens: int, width: int, model, law, stop, prompts_BP, valid_BP, key, row_ids_B):
  """The whole search, over one beam more than is returned."""
  batch = prompts_BP.shape[0]
  keys_R = decoding.row_keys(key, row_ids_B, batch, width)
  begun = decoding.begin(model, law, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples=width)
  rows_R = jnp.repeat(jnp.arange(batch), width)
  model, law, stop = model.take(rows_R), law.take(rows_R), stop.take(rows_R)
  is_first_R = jnp.arange(rows_R.shape[0]) % width == 0
  root_R = jax.vmap(jax.random.gumbel)(begun.context.step_keys(_PERTURB + 1))
  start_R = jnp.where(is_first_R, 0.0, -jnp.inf)
  loop = _Loop(
    step=jnp.int32(0),
    cache=begun.cache,
    outputs=begun.outputs,
    context=begun.context,
    state=begun.state,
    stop_states_R=stop.init(rows_R.shape[0]),
    finish_R=jnp.where(is_first_R, jnp.where(stop.limits_B > 0, RUNNING, LENGTH), DEAD_END).astype(jnp.int32),
    parents_R=jnp.arange(rows_R.shape[0]),
    last_R=jnp.zeros(rows_R.shape, jnp.int32),
    log_probs_R=start_R,
    transformed_R=start_R,
    perturbed_R=start_R + root_R,
  )

  def is_open(loop: _Loop) -> jax.Array:
    return (loop.step < max_new_tokens) & (loop.finish_R == RUNNING).any()

  def read(loop: _Loop) -> tuple[Outputs, Any]:
    cache = model.fork(loop.cache, loop.parents_R)
    return model.extend(loop.last_R[:, None], cache, read_B=jnp.zeros_like(loop.last_R))

  def advance(loop: _Loop) -> _Loop:
    loop = _step(width, law, stop, loop)
    outputs, cache = jax.lax.cond(is_open(loop), read, lambda loop: (loop.outputs, loop.cache), loop)
    return loop._replace(outputs=outputs, cache=cache)

  return _read(max_new_tokens, width, stop, jax.lax.while_loop(is_open, advance, loop))


def _step(width: int, law: Chain, stop: Stop, loop: _Loop) -> _Loop:
  """Extends the beams that go on and keeps the largest perturbed ones of those and of whole texts."""
  formed = decoding.form_law(law, loop.state, loop.outputs, loop.context)
  is_running_R = loop.finish_R == RUNNING
  goes_on_R1 = (is_running_R & ~formed.is_broken_B)[:, None]
  sums_RV = jnp.where(goes_on_R1, loop.transformed_R[:, None] + formed.transformed_BV, -jnp.inf)
  vocab_size = sums_RV.shape[1]
  keys_R = formed.context.step_keys(_PERTURB)
  noise_RV = jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,)))(keys_R)
  children_RV = conditional_perturbations(loop.perturbed_R, sums_RV + noise_RV)
  # A whole text is its own only continuation, in a column behind the vocabulary.
  whole_R1 = jnp.where(is_running_R, -jnp.inf, loop.perturbed_R)[:, None]
  ranked_BX = jnp.concatenate([children_RV, whole_R1], axis=1).reshape(-1, width * (vocab_size + 1))
  perturbed_BW, flat_BW = top_k(ranked_BX, width)
  first_B1 = jnp.arange(ranked_BX.shape[0])[:, None] * width
  parents_R = (first_B1 + flat_BW // (vocab_size + 1)).reshape(-1)
  columns_R = (flat_BW % (vocab_size + 1)).reshape(-1)
  is_extended_R, tokens_R = columns_R < vocab_size, jnp.minimum(columns_R, vocab_size - 1)
  parent_law, state = decoding.take((formed, loop.state), parents_R)
  state, context = decoding.commit(law, state, parent_law, tokens_R, is_extended_R)
  stop_states_R = loop.stop_states_R[parents_R]
  finish_R, stepped_R = stop.advance(stop_states_R, tokens_R, context, jnp.zeros(tokens_R.shape, bool))
  finish_R = jnp.where(is_extended_R, finish_R, loop.finish_R[parents_R])

  def extended(sums_R: jax.Array, log_probs_RV: jax.Array) -> jax.Array:
    return sums_R[parents_R] + jnp.where(is_extended_R, decoding.chosen(log_probs_RV, tokens_R), 0.0)

  return loop._replace(
    step=loop.step + 1,
    # Keys stay with the slots: two continuations of one beam must not draw alike.
    context=context._replace(keys_B=loop.context.keys_B),
    state=state,
    stop_states_R=jnp.where(is_extended_R, stepped_R, stop_states_R),
    finish_R=jnp.where(perturbed_BW.reshape(-1) > -jnp.inf, finish_R, DEAD_END).astype(jnp.int32),
    parents_R=parents_R,
    last_R=tokens_R,
    log_probs_R=extended(loop.log_probs_R, parent_law.log_probs_BV),
    transformed_R=extended(loop.transformed_R, parent_law.transformed_BV),
    perturbed_R=perturbed_BW.reshape(-1),
  )


def _read(max_new_tokens: int, width: int, stop: Stop, loop: _Loop) -> StochasticBeams:
  """Returns all but the last beam, whose perturbed value is the threshold."""
  is_real_R = loop.perturbed_R > -jnp.inf
  tokens_RN = generated_tokens(loop.context, max_new_tokens, stop.filler)
  per_row = (
    jnp.where(is_real_R[:, None], tokens_RN, stop.filler),
    jnp.where(is_real_R, loop.context.generated_B, 0),
    jnp.where(is_real_R, loop.log_probs_R, -jnp.inf),
    jnp.where(is_real_R, loop.transformed_R, -jnp.inf),
    loop.perturbed_R,
    loop.finish_R,
  )
  tokens, lengths, log_probs, transformed, perturbed, finish = (
    leaf.reshape(-1, width, *leaf.shape[1:])[:, :-1] for leaf in per_row
  )
  threshold_B = loop.perturbed_R.reshape(-1, width)[:, -1]
  is_real_BK = perturbed > -jnp.inf
  log_inclusion_BK = jnp.where(is_real_BK, _log_exceeds(transformed - threshold_B[:, None]), 0.0)
  log_weights_BK = jnp.where(is_real_BK, transformed - log_inclusion_BK, -jnp.inf)
  values = (perturbed, jnp.exp(log_inclusion_BK), log_weights_BK, threshold_B, finish)
  return StochasticBeams(tokens, lengths, log_probs, transformed, *values, jnp.maximum(loop.step - 1, 0))


def _log_exceeds(above: jax.Array) -> jax.Array:
  """Returns log P(a + Gumbel > t) = log(1 - exp(-exp(a - t))) of a - t, however small."""
  is_small = above < -15.0
  return jnp.where(is_small, above, jnp.log(-jnp.expm1(-jnp.exp(jnp.where(is_small, 0.0, above)))))
