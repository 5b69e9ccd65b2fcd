"""What every driver does: check a request, read the prompts once, form the law, commit a token.

Rows are prompt-major: sample n of prompt b is row b * N + n. Random keys are those
of (row id, sample, position), so no driver, batch or mesh changes what a row draws.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.language_models import LanguageModel, Outputs, left_aligned
from nr.generation.transforms.algebra import Chain, Context, Transform, chain, check_needs, guarded

SMALLEST_BUCKET = 8


class Decoding(NamedTuple):
  """Rows that have read their prompts.

  Attributes:
    cache: of the model, prompts read.
    outputs: [R, ...] at the last prompt token.
    context: history of each row, with room for what will be generated.
    state: of the chain.
  """

  cache: Any
  outputs: Outputs
  context: Context
  state: Any


class Law(NamedTuple):
  """The law of the next token.

  Attributes:
    transformed_BV: float32 log-probabilities after the chain, normalised.
    log_probs_BV: float32 log-probabilities of the model.
    is_broken_B: rows in which nothing could be drawn, now certain of one token.
    context: the context with streams, hidden states and both laws filled in.
  """

  transformed_BV: jax.Array
  log_probs_BV: jax.Array
  is_broken_B: jax.Array
  context: Context


def pad_prompts(prompts: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Pads token lists on the left to a common length, a power of two.

  Few lengths mean few compilations.

  Args:
    prompts: token ids of each row.
    length: pads to this instead.

  Returns:
    int32 [B, P] tokens and bool [B, P], False at padding.

  Raises:
    ValueError: no prompt, an empty prompt, or one that is longer than `length`.
  """
  if len(prompts) == 0:
    raise ValueError("prompts: there are none; give at least one")
  for number, prompt in enumerate(prompts):
    if len(prompt) == 0:
      raise ValueError(f"prompts[{number}] is empty: give at least one token, such as the beginning of text")
  longest = max(map(len, prompts))
  if length is None:
    length = max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length())
  if longest > length:
    raise ValueError(
      f"length={length}: a prompt has {longest} tokens; give a larger length or shorten the prompt"
    )
  tokens_BP = np.zeros((len(prompts), length), np.int32)
  for padded, prompt in zip(tokens_BP, prompts):
    padded[length - len(prompt) :] = prompt
  lengths_B = np.array([len(prompt) for prompt in prompts])
  return tokens_BP, np.arange(length) >= length - lengths_B[:, None]


def check_request(
  model: LanguageModel,
  law: Transform,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None,
  max_new_tokens: int,
  num_samples: int = 1,
  extra_tokens: int = 0,
) -> tuple[Chain, jax.Array, jax.Array]:
  """Refuses what cannot be decoded, before device time is spent.

  Args:
    model: the language model.
    law: transform or chain.
    prompts_BP: int32, padded on the left.
    valid_BP: bool, or None when there is no padding.
    max_new_tokens: most tokens that a row may add.
    num_samples: rows a prompt.
    extra_tokens: positions that the driver needs beyond those (drafts).

  Returns:
    The chain, prepared, and the prompts and their validity as arrays.

  Raises:
    ValueError: an empty prompt, padding in the last column, no new tokens, more
      tokens than the model has positions, per-row parameters of another number of
      rows, or a chain that reads what the model does not offer.
  """
  prompts_BP = jnp.asarray(prompts_BP, jnp.int32)
  if prompts_BP.ndim != 2 or 0 in prompts_BP.shape:
    raise ValueError(f"prompts_BP has shape {prompts_BP.shape}: give [rows, tokens], at least one of each")
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens={max_new_tokens}: give at least 1")
  if num_samples < 1:
    raise ValueError(f"num_samples={num_samples}: give at least 1")
  valid_BP = jnp.ones(prompts_BP.shape, bool) if valid_BP is None else jnp.asarray(valid_BP, bool)
  if valid_BP.shape != prompts_BP.shape:
    raise ValueError(f"valid_BP has shape {valid_BP.shape}, prompts_BP {prompts_BP.shape}: make them equal")
  if not isinstance(valid_BP, jax.core.Tracer) and not bool(valid_BP[:, -1].all()):
    raise ValueError("valid_BP: the last column holds padding; prompts are padded on the left")
  model.check()
  is_concrete = not any(isinstance(each, jax.core.Tracer) for each in (prompts_BP, valid_BP))
  # Padding takes no position.
  longest = int(valid_BP.sum(axis=1).max()) if is_concrete else prompts_BP.shape[1]
  needed = longest + max_new_tokens - 1 + extra_tokens
  if model.max_length is not None and needed > model.max_length:
    raise ValueError(
      f"prompts of {longest} and max_new_tokens={max_new_tokens} need {needed} positions; "
      f"the model has max_length={model.max_length}; shorten one of them"
    )
  known = model.num_contexts
  if is_concrete and bool((valid_BP & ((prompts_BP < 0) | (prompts_BP >= known))).any()):
    raise ValueError(f"prompts_BP holds ids outside 0..{known - 1}: give ids of the model's tokenizer")
  prepared = chain(law).prepared()
  for name, value in prepared.row_parameters().items():
    if jnp.ndim(value) > 0 and value.shape[0] != prompts_BP.shape[0]:
      raise ValueError(
        f"{name} has {value.shape[0]} values for {prompts_BP.shape[0]} prompts: give one, or one a prompt"
      )
  for each in prepared.transforms:
    check_needs(each.needs, model.offers, f"{each.name}()")
  return prepared, prompts_BP, valid_BP


def row_keys(
  key: jax.Array | None, row_ids_B: jax.Array | None, batch: int, num_samples: int = 1
) -> jax.Array:
  """Returns random keys [B * N] of (row id, sample).

  Args:
    key: of the request; None where nothing random is drawn.
    row_ids_B: identity of each prompt, 0..B-1 when None. A request with the same id
      draws the same in any batch.
    batch: B.
    num_samples: N.
  """
  key = jax.random.key(0) if key is None else key
  row_ids_B = jnp.arange(batch) if row_ids_B is None else jnp.asarray(row_ids_B, jnp.int32)
  if row_ids_B.shape != (batch,):
    raise ValueError(f"row_ids_B has shape {row_ids_B.shape}: give one id for each of the {batch} prompts")
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids_B)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  return fold(keys_B, jnp.arange(num_samples)).reshape(-1)


def begin(
  model: LanguageModel,
  law: Chain,
  prompts_BP: jax.Array,
  valid_BP: jax.Array,
  keys_R: jax.Array,
  max_new_tokens: int,
  *,
  num_samples: int = 1,
  uneven: bool = False,
  extra_tokens: int = 0,
) -> Decoding:
  """Reads each prompt once and forks it into N rows.

  Args:
    model: the language model.
    law: prepared chain; its per-row parameters are those of prompts.
    prompts_BP: int32, padded on the left.
    valid_BP: bool.
    keys_R: [B * N], of `row_keys`.
    max_new_tokens: room for new tokens.
    num_samples: N.
    uneven: whether rows will advance by themselves.
    extra_tokens: further room in the cache, for drafts.
  """
  batch, length = prompts_BP.shape
  capacity = length + max_new_tokens - 1 + extra_tokens
  outputs, cache = model.prefill(prompts_BP, valid_BP, capacity, uneven=uneven)
  tokens_BP, lengths_B = left_aligned(prompts_BP, valid_BP)
  tokens_BS = jnp.pad(tokens_BP, ((0, 0), (0, max_new_tokens + extra_tokens)))
  rows_R = jnp.repeat(jnp.arange(batch), num_samples)
  if num_samples > 1:
    cache = model.fork_prompts(cache, batch, num_samples, length)
    outputs = jax.tree.map(lambda leaf: jnp.take(leaf, rows_R, axis=0), outputs)
  context = Context(tokens_BS[rows_R], lengths_B[rows_R], lengths_B[rows_R], keys_R)
  return Decoding(cache, outputs, context, law.take(rows_R).init(context, model.vocab_size))


def observe(context: Context, outputs: Outputs) -> Context:
  """Returns the context with what the model offers besides its logits."""
  return context._replace(streams=outputs.streams, hidden=outputs.hidden)


def form_law(law: Chain, state: Any, outputs: Outputs, context: Context) -> Law:
  """Returns the law of the next token: the model's, through the chain, normalised in float32."""
  context = observe(context, outputs)
  raw_BV = outputs.logits.astype(jnp.float32)
  logits_BV, is_broken_B = guarded(law.apply(raw_BV, state, context), raw_BV)
  # A NaN of the model is flagged; what is recorded of such a row stays NaN.
  log_probs_BV = jax.nn.log_softmax(raw_BV, axis=-1)
  transformed_BV = jax.nn.log_softmax(logits_BV, axis=-1) if law.transforms else log_probs_BV
  transformed_BV = jnp.where(is_broken_B[:, None], logits_BV, transformed_BV)
  context = context._replace(log_probs_BV=log_probs_BV, transformed_BV=transformed_BV)
  return Law(transformed_BV, log_probs_BV, is_broken_B, context)


def commit(
  law: Chain, state: Any, formed: Law, tokens_B: jax.Array, is_kept_B: jax.Array | bool = True
) -> tuple[Any, Context]:
  """Returns the chain's state and the history after `tokens_B`, unchanged in rows that are not kept."""
  is_kept_B = jnp.broadcast_to(jnp.asarray(is_kept_B), tokens_B.shape)
  state = select(is_kept_B, law.commit(state, tokens_B, formed.context), state)
  bare = formed.context._replace(streams={}, hidden={}, log_probs_BV=None, transformed_BV=None)
  return state, bare.append(tokens_B, is_kept_B)


def chosen(log_probs_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
  """Returns float32 [B], the log-probability of one token a row; the nearest id's for one outside."""
  return jnp.take_along_axis(log_probs_BV, tokens_B[:, None], axis=1, mode="clip")[:, 0]


def select(is_first_B: jax.Array, first: Any, second: Any) -> Any:
  """Returns the rows of `first` where `is_first_B`, else those of `second`, of any pytree."""

  def choose(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where(is_first_B.reshape(-1, *(1,) * (one.ndim - 1)), one, other)

  return jax.tree.map(choose, first, second)


def take(tree: Any, rows_B: jax.Array) -> Any:
  """Gathers rows of every leaf of a pytree whose leaves lead with the batch axis."""
  return jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=0), tree)
