"""Sampling and greedy decoding in one compiled loop with static shapes.

    generation = sample(model, prompts_BP, valid_BP, key, chain=chain(Temperature(0.7), TopP(0.9)),
                        max_new_tokens=64, num_samples=4)

The prompt is read once whatever the number of samples. The loop leaves when every
row has ended. Parameters of the chain are traced: sweeping them compiles nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.samplers import Greedy, Gumbel, Sampler
from nr.generation.stopping import LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import IDENTITY, Chain, Context, Transform


class Generation(NamedTuple):
  """What prompts were continued with; rows R = B * num_samples, prompt-major.

  Attributes:
    tokens_RN: int32 [R, max_new_tokens]; the first stop id (0 without one) fills
      what follows the end.
    lengths_R: int32, new tokens of each row, the stop id included.
    log_probs_RN: float32 nats, of each token under the model; 0 after the end.
    transformed_log_probs_RN: float32 nats, of each token under the law that it was
      drawn from; 0 after the end.
    finish_R: int32, why each row ended; see `nr.generation.stopping`.
    calls: int32 scalar, calls of the model after the prompt was read.
  """

  tokens_RN: jax.Array
  lengths_R: jax.Array
  log_probs_RN: jax.Array
  transformed_log_probs_RN: jax.Array
  finish_R: jax.Array
  calls: jax.Array


class _Loop(NamedTuple):
  """Carry of the loop. The last token of each row has been drawn but not read."""

  step: jax.Array
  cache: Any
  context: Context
  state: Any
  stop_states_R: jax.Array
  finish_R: jax.Array
  last_R: jax.Array
  log_probs_RN: jax.Array
  transformed_RN: jax.Array


def sample(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None = None,
  key: jax.Array | None = None,
  *,
  chain: Transform = IDENTITY,
  sampler: Sampler | None = None,
  max_new_tokens: int,
  num_samples: int = 1,
  stop: Stop | None = None,
  row_ids_B: jax.Array | None = None,
  on_tokens: Callable[[Generation], None] | None = None,
  stream_every: int = 1,
) -> Generation:
  """Continues prompts token by token, with a key-value cache.

  Args:
    model: any language model; interventions and streams are part of it.
    prompts_BP: int32 token ids, padded on the left (`pad_prompts`).
    valid_BP: bool, False at padding; None when there is none.
    key: random key. Without one, decoding is greedy.
    chain: transforms of the logits; per-row parameters are those of prompts.
    sampler: how tokens are drawn; None: `Gumbel` with a key, else `Greedy`. One that
      holds values for each row holds them for all R rows.
    max_new_tokens: most tokens to add; static.
    num_samples: samples of each prompt, from one reading of it; static.
    stop: what ends a row before that; None: nothing.
    row_ids_B: int32 identity of each prompt for its random keys; 0..B-1 when None.
      A request with the same id draws the same in any batch.
    on_tokens: called on the host with what there is so far, every `stream_every`
      tokens and at the end. The result does not depend on it.
    stream_every: tokens between two calls.

  Raises:
    ValueError: what `decoding.check_request` and `Stop.prepared` refuse, a sampler
      that needs a key without one, or a stream step below 1.
  """
  law, prompts_BP, valid_BP = decoding.check_request(
    model, chain, prompts_BP, valid_BP, max_new_tokens, num_samples
  )
  batch = prompts_BP.shape[0]
  sampler = (Greedy() if key is None else Gumbel()) if sampler is None else sampler
  if key is None and isinstance(sampler, Gumbel):
    raise ValueError("key: the Gumbel sampler draws at random; give a random key, or Greedy()")
  if on_tokens is not None and stream_every < 1:
    raise ValueError(f"stream_every={stream_every}: give at least 1")
  stop = (stop or Stop()).prepared(batch, max_new_tokens, model.vocab_size)
  keys_R = decoding.row_keys(key, row_ids_B, batch, num_samples)
  loop = _start(model, law, sampler, stop, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples)
  rows_R = jnp.repeat(jnp.arange(batch), num_samples)
  model, law, stop = (each.take(rows_R) for each in (model, law, stop))
  if on_tokens is None:
    return _read(_advance(model, law, sampler, stop, loop, max_new_tokens), stop, max_new_tokens)
  on_tokens(_read(loop, stop, max_new_tokens))
  for until in range(1 + stream_every, max_new_tokens + stream_every, stream_every):
    if not bool((loop.finish_R == RUNNING).any()):
      break
    loop = _advance(model, law, sampler, stop, loop, min(until, max_new_tokens))
    on_tokens(_read(loop, stop, max_new_tokens))
  return _read(loop, stop, max_new_tokens)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "num_samples"))
def _start(model, law, sampler, stop, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples):
  """Reads the prompts and draws the first token of every row."""
  batch = prompts_BP.shape[0]
  begun = decoding.begin(model, law, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples=num_samples)
  rows_R = jnp.repeat(jnp.arange(batch), num_samples)
  law, stop = law.take(rows_R), stop.take(rows_R)
  empty_RN = jnp.zeros((rows_R.shape[0], max_new_tokens))
  loop = _Loop(
    step=jnp.int32(0),
    cache=begun.cache,
    context=begun.context,
    state=begun.state,
    stop_states_R=stop.init(rows_R.shape[0]),
    finish_R=jnp.where(stop.limits_B > 0, RUNNING, LENGTH).astype(jnp.int32),
    last_R=jnp.zeros(rows_R.shape, jnp.int32),
    log_probs_RN=empty_RN,
    transformed_RN=empty_RN,
  )
  return _draw(law, sampler, stop, loop, begun.outputs)


@functools.partial(jax.jit, donate_argnames=("loop",))
def _advance(model, law, sampler, stop, loop, until):
  """Reads and draws until every row has ended or `until` tokens were drawn."""

  def is_open(loop: _Loop) -> jax.Array:
    return (loop.step < until) & (loop.finish_R == RUNNING).any()

  def advance(loop: _Loop) -> _Loop:
    outputs, cache = model.extend(loop.last_R[:, None], loop.cache, read_B=jnp.zeros_like(loop.last_R))
    return _draw(law, sampler, stop, loop._replace(cache=cache), outputs)

  return jax.lax.while_loop(is_open, advance, loop)


def _draw(law: Chain, sampler: Sampler, stop: Stop, loop: _Loop, outputs: Outputs) -> _Loop:
  """Draws one token a row and says which rows end with it."""
  is_running_R = loop.finish_R == RUNNING
  formed = decoding.form_law(law, loop.state, outputs, loop.context)
  tokens_R = sampler.draw(formed.transformed_BV, formed.context)
  state, context = decoding.commit(law, loop.state, formed, tokens_R, is_running_R)
  finish_R, stop_states_R = stop.advance(loop.stop_states_R, tokens_R, context, formed.is_broken_B)

  def record(stored_RN: jax.Array, log_probs_RV: jax.Array) -> jax.Array:
    values_R = jnp.where(is_running_R, decoding.chosen(log_probs_RV, tokens_R), 0.0)
    return jax.lax.dynamic_update_slice(stored_RN, values_R[:, None], (0, loop.step))

  return _Loop(
    step=loop.step + 1,
    cache=loop.cache,
    context=context,
    state=state,
    stop_states_R=jnp.where(is_running_R, stop_states_R, loop.stop_states_R),
    finish_R=jnp.where(is_running_R, finish_R, loop.finish_R),
    last_R=tokens_R,
    log_probs_RN=record(loop.log_probs_RN, formed.log_probs_BV),
    transformed_RN=record(loop.transformed_RN, formed.transformed_BV),
  )


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def _read(loop: _Loop, stop: Stop, max_new_tokens: int) -> Generation:
  """Reads the result out of the carry."""
  tokens_RN = generated_tokens(loop.context, max_new_tokens, stop.filler)
  lengths_R = loop.context.generated_B
  values = (loop.log_probs_RN, loop.transformed_RN)
  return Generation(tokens_RN, lengths_R, *values, loop.finish_R, loop.step - 1)


def generated_tokens(context: Context, max_new_tokens: int, filler: jax.Array) -> jax.Array:
  """Returns int32 [R, max_new_tokens]: what each row added to its prompt, `filler` behind it."""
  slots_RN = context.prompt_lengths_B[:, None] + jnp.arange(max_new_tokens)
  tokens_RN = jnp.take_along_axis(context.tokens_BS, slots_RN, axis=1, mode="clip")
  return jnp.where(jnp.arange(max_new_tokens) < context.generated_B[:, None], tokens_RN, filler)


def texts(
  generation: Generation, decode: Callable[[list[int]], str], stop_ids: tuple[int, ...] = ()
) -> list[str]:
  """Returns the text of each row, without its stop id.

  Args:
    generation: of any driver with `tokens_RN` and `lengths_R`.
    decode: from token ids to text.
    stop_ids: ids left out of the text.
  """
  tokens_RN, lengths_R = np.asarray(generation.tokens_RN), np.asarray(generation.lengths_R)
  return [
    decode([int(token) for token in row[:length] if int(token) not in stop_ids])
    for row, length in zip(tokens_RN, lengths_R)
  ]
