"""Sampling and greedy decoding in one compiled loop with static shapes.

    generation = sample(model, prompts_BP, valid_BP, key, chain=chain(Temperature(0.7), TopP(0.9)),
                        max_new_tokens=64, num_samples=4)

The prompt is read once whatever the number of samples. The loop leaves when every
row has ended. Parameters of the chain are traced: sweeping them compiles nothing.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import LanguageModel
from nr.generation.rows import Rows, advance, open_rows
from nr.generation.samplers import Greedy, Gumbel, Sampler
from nr.generation.stopping import RUNNING, Stop
from nr.generation.transforms.algebra import IDENTITY, Context, Transform


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
  if hasattr(sampler, "check"):
    sampler.check(batch * num_samples, max_new_tokens)
  if on_tokens is not None and stream_every < 1:
    raise ValueError(f"stream_every={stream_every}: give at least 1")
  stop = (stop or Stop()).prepared(batch, max_new_tokens, model.vocab_size)
  keys_R = decoding.row_keys(key, row_ids_B, batch, num_samples)
  rows = _start(model, law, sampler, stop, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples)
  rows_R = jnp.repeat(jnp.arange(batch), num_samples)
  model, law, stop = (each.take(rows_R) for each in (model, law, stop))
  if on_tokens is None:
    return read(advance(model, law, sampler, stop, rows, max_new_tokens), stop)
  on_tokens(read(rows, stop))
  for until in range(stream_every, max_new_tokens - 1 + stream_every, stream_every):
    if not bool((rows.finish_R == RUNNING).any()):
      break
    rows = advance(model, law, sampler, stop, rows, min(until, max_new_tokens))
    on_tokens(read(rows, stop))
  return read(rows, stop)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "num_samples"))
def _start(model, law, sampler, stop, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples):
  """Reads the prompts and draws the first token of every row."""
  begun = decoding.begin(model, law, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples=num_samples)
  rows_R = jnp.repeat(jnp.arange(prompts_BP.shape[0]), num_samples)
  return open_rows(law.take(rows_R), sampler, stop.take(rows_R), begun, max_new_tokens)


@jax.jit
def read(rows: Rows, stop: Stop) -> Generation:
  """Returns what rows have generated so far."""
  tokens_RN = generated_tokens(rows.context, rows.log_probs_RN.shape[1], stop.filler)
  values = (rows.log_probs_RN, rows.transformed_log_probs_RN)
  return Generation(tokens_RN, rows.context.generated_B, *values, rows.finish_R, rows.calls)


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
