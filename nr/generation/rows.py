"""Rows that are being decoded: the carry of the decoding loop, and the loop.

Shared by the drivers that draw one token a row and call: `nr.generation.sample`,
whose rows advance together, and `nr.generation.continuous_batching`, whose rows do not.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.samplers import Sampler
from nr.generation.stopping import LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import Chain, Context


class Rows(NamedTuple):
  """Carry of the loop. The last token of each row has been drawn but not read.

  Attributes:
    cache: of the model.
    context: history of each row.
    state: of the chain.
    stop_states_R: int32, of the stop strings.
    finish_R: int32 finish codes.
    last_R: int32, last token.
    log_probs_RN: float32 nats under the model, by generated position; 0 after the end.
    transformed_log_probs_RN: float32 nats under the law drawn from; 0 after the end.
    calls: int32, calls of the model.
  """

  cache: Any
  context: Context
  state: Any
  stop_states_R: jax.Array
  finish_R: jax.Array
  last_R: jax.Array
  log_probs_RN: jax.Array
  transformed_log_probs_RN: jax.Array
  calls: jax.Array


def open_rows(
  law: Chain, sampler: Sampler, stop: Stop, begun: decoding.Decoding, max_new_tokens: int
) -> Rows:
  """Draws the first token of rows that have read their prompts.

  Args:
    law: chain, per-row parameters those of the rows.
    sampler: how tokens are drawn.
    stop: what ends rows, limits those of the rows.
    begun: of `decoding.begin`.
    max_new_tokens: N of what is recorded.
  """
  count = begun.context.lengths_B.shape[0]
  rows = Rows(
    cache=begun.cache,
    context=begun.context,
    state=begun.state,
    stop_states_R=stop.init(count),
    finish_R=jnp.where(stop.limits_B > 0, RUNNING, LENGTH).astype(jnp.int32),
    last_R=jnp.zeros(count, jnp.int32),
    log_probs_RN=jnp.zeros((count, max_new_tokens)),
    transformed_log_probs_RN=jnp.zeros((count, max_new_tokens)),
    calls=jnp.int32(0),
  )
  return draw(law, sampler, stop, rows, begun.outputs)


def draw(law: Chain, sampler: Sampler, stop: Stop, rows: Rows, outputs: Outputs) -> Rows:
  """Draws one token a row and says which rows end with it; rows that have ended stay as they are."""
  is_running_R = rows.finish_R == RUNNING
  formed = decoding.form_law(law, rows.state, outputs, rows.context)
  tokens_R = sampler.draw(formed.transformed_BV, formed.context)
  state, context = decoding.commit(law, rows.state, formed, tokens_R, is_running_R)
  finish_R, stop_states_R = stop.advance(rows.stop_states_R, tokens_R, context, formed.is_broken_B)
  place_R = jnp.where(is_running_R, rows.context.generated_B, rows.log_probs_RN.shape[1])

  def record(stored_RN: jax.Array, log_probs_RV: jax.Array) -> jax.Array:
    values_R = decoding.chosen(log_probs_RV, tokens_R)
    return stored_RN.at[jnp.arange(values_R.shape[0]), place_R].set(values_R, mode="drop")

  return rows._replace(
    context=context,
    state=state,
    stop_states_R=jnp.where(is_running_R, stop_states_R, rows.stop_states_R),
    finish_R=jnp.where(is_running_R, finish_R, rows.finish_R),
    last_R=jnp.where(is_running_R, tokens_R, rows.last_R),
    log_probs_RN=record(rows.log_probs_RN, formed.log_probs_BV),
    transformed_log_probs_RN=record(rows.transformed_log_probs_RN, formed.transformed_BV),
  )


@functools.partial(jax.jit, donate_argnames=("rows",), static_argnames=("is_uneven", "leave_at_end"))
def advance(
  model: LanguageModel,
  law: Chain,
  sampler: Sampler,
  stop: Stop,
  rows: Rows,
  until: jax.Array | int,
  *,
  is_uneven: bool = False,
  leave_at_end: bool = False,
) -> Rows:
  """Reads and draws until every row has ended, or the model has been called `until` times.

  Args:
    model: the language model, its per-row parts those of the rows.
    law: chain, likewise.
    sampler: likewise.
    stop: likewise.
    rows: donated.
    until: bound of `rows.calls`; traced.
    is_uneven: whether the cache is; rows that have ended then take no more room in it.
    leave_at_end: whether to leave as soon as one more row ends.
  """
  running = (rows.finish_R == RUNNING).sum()

  def is_open(rows: Rows) -> jax.Array:
    now = (rows.finish_R == RUNNING).sum()
    is_going = (now == running) if leave_at_end else True
    return (rows.calls < until) & (now > 0) & is_going

  def step(rows: Rows) -> Rows:
    valid_R1 = (rows.finish_R == RUNNING)[:, None] if is_uneven else None
    read_R = jnp.zeros_like(rows.last_R)
    outputs, cache = model.extend(rows.last_R[:, None], rows.cache, valid_R1, read_B=read_R)
    return draw(law, sampler, stop, rows._replace(cache=cache, calls=rows.calls + 1), outputs)

  return jax.lax.while_loop(is_open, step, rows)
