"""Arithmetic sampling: samples that spread over the law without talking to each other.

Every text is the interval that arithmetic coding gives it; the samples of a prompt
are the texts at N evenly spaced codes with one random offset. Each sample by itself
follows the law of the chain, so means over samples are unbiased, and together they
are more diverse than independent draws (arXiv:2210.15458).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.generation import decoding
from nr.generation.decoding import Law
from nr.generation.language_models import LanguageModel
from nr.generation.sample import Generation, generated_tokens
from nr.generation.stopping import LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import IDENTITY, Chain, Context, Transform

# Purposes of the draws, apart from the sampler's (0) and the transforms'.
_OFFSET, _REFRESH, _PERMUTE = 7_003, 7_004, 7_005
# A code has 24 bits; once 20 of them have chosen tokens, the others are drawn anew.
_LEAST_WIDTH, _RESOLUTION = 2.0**-20, 2.0**24


class _Loop(NamedTuple):
  """Carry of the loop. The last token of each row has been chosen but not read.

  Attributes:
    codes_R: float32 in [0, 1), where each row is in the interval of its text so far.
    widths_R: float32, how wide that interval is, in parts of what codes resolve.
  """

  step: jax.Array
  cache: Any
  context: Context
  state: Any
  stop_states_R: jax.Array
  finish_R: jax.Array
  last_R: jax.Array
  codes_R: jax.Array
  widths_R: jax.Array
  log_probs_RN: jax.Array
  transformed_RN: jax.Array


def arithmetic_sample(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None = None,
  key: jax.Array | None = None,
  *,
  chain: Transform = IDENTITY,
  num_samples: int,
  max_new_tokens: int,
  stop: Stop | None = None,
  offsets_B: jax.Array | float | None = None,
  is_permuted: bool = False,
  row_ids_B: jax.Array | None = None,
) -> Generation:
  """Draws evenly spread samples of each prompt.

  Args:
    model: any language model.
    prompts_BP: int32 token ids, padded on the left (`pad_prompts`).
    valid_BP: bool, False at padding; None when there is none.
    key: random key: of the offsets, of what long texts need beyond them, and of
      permutations.
    chain: transforms of the logits; per-row parameters are those of prompts.
    num_samples: N.
    max_new_tokens: most tokens to add.
    stop: what ends a row before that; None: nothing.
    offsets_B: float32 in [0, 1), a number or [B], instead of drawn ones; the code of
      sample i = 1..N is (i / (N + 1) + offset) mod 1.
    is_permuted: whether the vocabulary is permuted anew at each position, alike for
      all samples of a prompt, so that which ids are neighbours does not matter.
    row_ids_B: int32 identity of each prompt for its random keys.

  Raises:
    ValueError: what `decoding.check_request` and `Stop.prepared` refuse, no key, or
      offsets outside [0, 1) or of another number of prompts.

  Source: arXiv:2210.15458. Float32 codes wear out after some 24 bits of text; then
  the bits that chose nothing yet are drawn anew (our choice), which keeps the law.
  """
  if key is None:
    raise ValueError("key: arithmetic sampling draws at random; give a random key")
  law, prompts_BP, valid_BP = decoding.check_request(
    model, chain, prompts_BP, valid_BP, max_new_tokens, num_samples
  )
  batch = prompts_BP.shape[0]
  stop = (stop or Stop()).prepared(batch, max_new_tokens, model.vocab_size)
  if offsets_B is not None:
    offsets_B = jnp.asarray(offsets_B, jnp.float32)
    if offsets_B.shape not in ((), (batch,)):
      raise ValueError(f"offsets_B has shape {offsets_B.shape}: give one for each of the {batch} prompts")
    if bool((offsets_B < 0).any() | (offsets_B >= 1).any()):
      raise ValueError(f"offsets_B={offsets_B.tolist()}: give numbers in [0, 1)")
    offsets_B = jnp.broadcast_to(offsets_B, (batch,))
  settings = (max_new_tokens, num_samples, is_permuted)
  return _sample(settings, model, law, stop, prompts_BP, valid_BP, key, row_ids_B, offsets_B)


def bucket(log_probs_BV: jax.Array, codes_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Finds the token whose part of [0, 1) holds the code.

  Args:
    log_probs_BV: float32, normalised; -inf tokens have no part.
    codes_B: float32 in [0, 1).

  Returns:
    int32 [B] tokens, float32 [B] the code's place in the part, in [0, 1), and
    float32 [B] the part's width.
  """
  ends_BV = jnp.cumsum(jnp.exp(log_probs_BV), axis=-1)
  # Scaled instead of compared with 1, which the rounded sum may miss.
  scaled_B1 = (codes_B * ends_BV[:, -1])[:, None]
  tokens_B = jnp.argmax((ends_BV > scaled_B1) & (log_probs_BV > -jnp.inf), axis=-1).astype(jnp.int32)
  end_B1 = jnp.take_along_axis(ends_BV, tokens_B[:, None], axis=1)
  before_B1 = jnp.take_along_axis(ends_BV, jnp.maximum(tokens_B[:, None] - 1, 0), axis=1)
  start_B1 = jnp.where(tokens_B[:, None] > 0, before_B1, 0.0)
  width_B1 = jnp.maximum(end_B1 - start_B1, jnp.finfo(jnp.float32).tiny)
  places_B = jnp.clip((scaled_B1 - start_B1) / width_B1, 0.0, 1.0 - 2.0**-24)[:, 0]
  return tokens_B, places_B, width_B1[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def _sample(settings, model, law, stop, prompts_BP, valid_BP, key, row_ids_B, offsets_B) -> Generation:
  """The whole loop."""
  max_new_tokens, num_samples, is_permuted = settings
  batch = prompts_BP.shape[0]
  keys_R = decoding.row_keys(key, row_ids_B, batch, num_samples)
  begun = decoding.begin(model, law, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples=num_samples)
  rows_R = jnp.repeat(jnp.arange(batch), num_samples)
  model, law, stop = model.take(rows_R), law.take(rows_R), stop.take(rows_R)
  if offsets_B is None:
    offsets_B = jax.vmap(jax.random.uniform)(begun.context.step_keys(_OFFSET)[::num_samples])
  spaced_N = jnp.arange(1, num_samples + 1) / (num_samples + 1)
  empty_RN = jnp.zeros((rows_R.shape[0], max_new_tokens))
  loop = _Loop(
    step=jnp.int32(0),
    cache=begun.cache,
    context=begun.context,
    state=begun.state,
    stop_states_R=stop.init(rows_R.shape[0]),
    finish_R=jnp.where(stop.limits_B > 0, RUNNING, LENGTH).astype(jnp.int32),
    last_R=jnp.zeros(rows_R.shape, jnp.int32),
    codes_R=((spaced_N + offsets_B[:, None]) % 1.0).reshape(-1),
    widths_R=jnp.ones(rows_R.shape),
    log_probs_RN=empty_RN,
    transformed_RN=empty_RN,
  )

  def draw(loop: _Loop, outputs: Any) -> _Loop:
    return _draw(law, stop, loop, outputs, num_samples if is_permuted else 0)

  def is_open(loop: _Loop) -> jax.Array:
    return (loop.step < max_new_tokens) & (loop.finish_R == RUNNING).any()

  def advance(loop: _Loop) -> _Loop:
    outputs, cache = model.extend(loop.last_R[:, None], loop.cache, read_B=jnp.zeros_like(loop.last_R))
    return draw(loop._replace(cache=cache), outputs)

  loop = jax.lax.while_loop(is_open, advance, draw(loop, begun.outputs))
  tokens_RN = generated_tokens(loop.context, max_new_tokens, stop.filler)
  values = (loop.log_probs_RN, loop.transformed_RN)
  return Generation(tokens_RN, loop.context.generated_B, *values, loop.finish_R, loop.step - 1)


def _draw(law: Chain, stop: Stop, loop: _Loop, outputs: Any, permuted_by: int) -> _Loop:
  """Takes the token at each row's code."""
  is_running_R = loop.finish_R == RUNNING
  formed = decoding.form_law(law, loop.state, outputs, loop.context)
  tokens_R, codes_R, widths_R = _choose(formed, loop.codes_R, loop.step, permuted_by)
  codes_R, widths_R = _refreshed(codes_R, loop.widths_R * widths_R, formed.context.step_keys(_REFRESH))
  state, context = decoding.commit(law, loop.state, formed, tokens_R, is_running_R)
  finish_R, stop_states_R = stop.advance(loop.stop_states_R, tokens_R, context, formed.is_broken_B)

  def record(stored_RN: jax.Array, log_probs_RV: jax.Array) -> jax.Array:
    values_R = jnp.where(is_running_R, decoding.chosen(log_probs_RV, tokens_R), 0.0)
    return jax.lax.dynamic_update_slice(stored_RN, values_R[:, None], (0, loop.step))

  return loop._replace(
    step=loop.step + 1,
    context=context,
    state=state,
    stop_states_R=jnp.where(is_running_R, stop_states_R, loop.stop_states_R),
    finish_R=jnp.where(is_running_R, finish_R, loop.finish_R),
    last_R=tokens_R,
    codes_R=codes_R,
    widths_R=widths_R,
    log_probs_RN=record(loop.log_probs_RN, formed.log_probs_BV),
    transformed_RN=record(loop.transformed_RN, formed.transformed_BV),
  )


def _choose(
  formed: Law, codes_R: jax.Array, step: jax.Array, permuted_by: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns `bucket` of the law, its vocabulary permuted alike for every `permuted_by` rows (0: not)."""
  if not permuted_by:
    return bucket(formed.transformed_BV, codes_R)
  vocab_size = formed.transformed_BV.shape[1]
  # By step: the position of a sample that has ended stands still, the others go on.
  fold = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, step), _PERMUTE))
  keys_B = fold(formed.context.keys_B[::permuted_by])
  order_BV = jax.vmap(lambda key: jax.random.permutation(key, vocab_size))(keys_B)
  order_RV = jnp.repeat(order_BV, permuted_by, axis=0)
  tokens_R, codes_R, widths_R = bucket(jnp.take_along_axis(formed.transformed_BV, order_RV, axis=1), codes_R)
  return jnp.take_along_axis(order_RV, tokens_R[:, None], axis=1)[:, 0], codes_R, widths_R


def _refreshed(codes_R: jax.Array, widths_R: jax.Array, keys_R: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws the worn-out bits of codes anew: a code then falls anywhere in the cell that it still resolves."""
  cells_R = jnp.maximum(jnp.floor(widths_R * _RESOLUTION), 1.0)
  drawn_R = jax.vmap(jax.random.uniform)(keys_R)
  fresh_R = jnp.clip((jnp.floor(codes_R * cells_R) + drawn_R) / cells_R, 0.0, 1.0 - 2.0**-24)
  is_worn_R = widths_R < _LEAST_WIDTH
  return jnp.where(is_worn_R, fresh_R, codes_R), jnp.where(is_worn_R, 1.0, widths_R)
