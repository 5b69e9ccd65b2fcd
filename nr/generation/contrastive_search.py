"""Contrastive search: the probable candidate that repeats the least of what was said.

    generation = contrastive_search(Network(graphdef, params, offers_hidden=True), prompts_BP, valid_BP,
                                    alpha=0.6, k=4, max_new_tokens=64)

Deterministic. At each step the k most probable tokens are read as siblings behind the
text, in one call; the one with the best score stays in the cache, the others are
forgotten.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.rows import Rows, draw
from nr.generation.sample import Generation, read
from nr.generation.samplers import sampler
from nr.generation.stopping import LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import (
  HIDDEN,
  IDENTITY,
  Chain,
  Context,
  Parameter,
  Transform,
  check_needs,
)

SMALLEST_NORM = 1e-30


def contrastive_search(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None = None,
  *,
  alpha: Parameter = 0.6,
  k: int = 4,
  max_new_tokens: int,
  chain: Transform = IDENTITY,
  stop: Stop | None = None,
  hidden: str = "last",
) -> Generation:
  """Continues prompts by contrastive search.

  Among the k tokens v that are the most probable given the text x, takes the one with
  the largest

      (1 - alpha) p(v | x) - alpha max_j cos(h_v, h_j)

  where h_v is the state of v read behind the text, and the h_j are the states of all
  tokens of the text. p is the law after the chain, which with no chain is the paper's;
  transformers 4.46.3 also ranks processed probabilities. Here padding never counts as
  text, candidates that the chain banned are never taken, and rows may have an alpha
  each. The prompt is read twice, the second time for the states of all of its tokens.

  Source: arXiv:2202.06417.

  Args:
    model: one that offers `hidden`, such as `Network(..., offers_hidden=True)`.
    prompts_BP: int32 token ids, padded on the left.
    valid_BP: bool, False at padding; None when there is none.
    alpha: weight of the repetition, 0 to 1; a scalar, or one a prompt. 0 is greedy.
    k: candidates; static. 1 is greedy.
    max_new_tokens: most tokens to add; static.
    chain: transforms of the logits; per-row parameters are those of prompts.
    stop: what ends a row before that; None: nothing.
    hidden: name of the states.

  Raises:
    ValueError: what `decoding.check_request` and `Stop.prepared` refuse, a model without
      the states, or k or alpha out of bounds.
  """
  law, prompts_BP, valid_BP = decoding.check_request(
    model, chain, prompts_BP, valid_BP, max_new_tokens, extra_tokens=1
  )
  check_needs({HIDDEN + hidden}, model.offers, "contrastive search")
  if not 0 < k <= model.vocab_size:
    raise ValueError(f"k={k}: give 1 to {model.vocab_size} candidates")
  batch = prompts_BP.shape[0]
  alpha_B = jnp.asarray(alpha, jnp.float32)
  if alpha_B.shape not in ((), (batch,)) or not bool(((alpha_B >= 0) & (alpha_B <= 1)).all()):
    raise ValueError(f"alpha={alpha}: give a number from 0 to 1, or one for each of the {batch} prompts")
  stop = (stop or Stop()).prepared(batch, max_new_tokens, model.vocab_size)
  alpha_B = jnp.broadcast_to(alpha_B, (batch,))
  settings = dict(k=k, max_new_tokens=max_new_tokens, hidden=hidden)
  return read(_search(model, law, stop, alpha_B, prompts_BP, valid_BP, **settings), stop)


def contrastive_scores(
  probabilities_BK: jax.Array,
  candidates_BKD: jax.Array,
  text_BSD: jax.Array,
  is_text_BS: jax.Array,
  alpha_B: jax.Array,
) -> jax.Array:
  """Returns float32 [B, K], (1 - alpha) p - alpha max cos; see `contrastive_search`.

  Args:
    probabilities_BK: float32, of the candidates; those with 0 score -inf.
    candidates_BKD: their states, of length 1 (`unit`).
    text_BSD: states of the text, of length 1.
    is_text_BS: bool, which of them there are.
    alpha_B: float32.
  """
  cosines_BKS = jnp.einsum("bkd,bsd->bks", candidates_BKD, text_BSD, precision=jax.lax.Precision.HIGHEST)
  repeated_BK = jnp.where(is_text_BS[:, None], cosines_BKS, -1.0).max(axis=-1)
  alpha_B1 = alpha_B[:, None]
  scores_BK = (1 - alpha_B1) * probabilities_BK - alpha_B1 * repeated_BK
  return jnp.where(probabilities_BK > 0, scores_BK, -jnp.inf)


def unit(states: jax.Array) -> jax.Array:
  """Returns states [..., D] at length 1, float32; a zero state stays zero."""
  states = states.astype(jnp.float32)
  return states / jnp.maximum(jnp.linalg.norm(states, axis=-1, keepdims=True), SMALLEST_NORM)


@sampler
class _Given:
  """Tokens that were chosen already."""

  tokens_B: jax.Array

  def draw(self, logits_BV: jax.Array, context: Context) -> jax.Array:
    """Returns them."""
    return self.tokens_B


class _Loop(NamedTuple):
  """Carry of the loop. Every token of `rows` has been read, the last one gave `outputs`."""

  rows: Rows
  outputs: Outputs
  text_BSD: jax.Array


@functools.partial(jax.jit, static_argnames=("k", "max_new_tokens", "hidden"))
def _search(model, law, stop, alpha_B, prompts_BP, valid_BP, *, k, max_new_tokens, hidden):
  """Reads the prompts and searches until every row has ended."""
  loop = _start(model, law, stop, prompts_BP, valid_BP, k, max_new_tokens, hidden)

  def is_open(loop: _Loop) -> jax.Array:
    return (loop.rows.finish_R == RUNNING).any()

  step = functools.partial(_step, model, law, stop, alpha_B, k=k, hidden=hidden)
  return jax.lax.while_loop(is_open, step, loop).rows


def _start(model, law, stop, prompts_BP, valid_BP, k, max_new_tokens, hidden) -> _Loop:
  batch, length = prompts_BP.shape
  keys_B = decoding.row_keys(None, None, batch)
  begun = decoding.begin(
    model, law, prompts_BP, valid_BP, keys_B, max_new_tokens, uneven=True, extra_tokens=k
  )
  # The prompt again, for all of its states; the logits, which nobody reads, are not computed.
  context = begun.context
  is_text_BP = jnp.arange(length) < context.lengths_B[:, None]
  again = model.init_cache(batch, length, uneven=True)
  outputs, _ = model.extend(context.tokens_BS[:, :length], again, is_text_BP, is_prompt=True)
  text_BSD = jnp.pad(unit(outputs.hidden[hidden]), ((0, 0), (0, max_new_tokens), (0, 0)))
  text_BSD = _write(text_BSD, context.lengths_B - 1, begun.outputs.hidden[hidden])
  empty_BN = jnp.zeros((batch, max_new_tokens))
  rows = Rows(
    cache=begun.cache,
    context=context,
    state=begun.state,
    stop_states_R=stop.init(batch),
    finish_R=jnp.where(stop.limits_B > 0, RUNNING, LENGTH).astype(jnp.int32),
    last_R=jnp.zeros(batch, jnp.int32),
    log_probs_RN=empty_BN,
    transformed_log_probs_RN=empty_BN,
    calls=jnp.int32(0),
  )
  return _Loop(rows, begun.outputs, text_BSD)


def _write(text_BSD: jax.Array, slots_B: jax.Array, states_BD: jax.Array) -> jax.Array:
  """Puts one state a row into its slot; slots beyond the end are dropped."""
  return text_BSD.at[jnp.arange(slots_B.shape[0]), slots_B].set(unit(states_BD), mode="drop")


def _step(
  model: LanguageModel, law: Chain, stop: Stop, alpha_B: jax.Array, loop: _Loop, *, k: int, hidden: str
) -> _Loop:
  """Reads the candidates, takes the best one of each row and forgets the others."""
  rows, text_BSD = loop.rows, loop.text_BSD
  is_running_B = rows.finish_R == RUNNING
  formed = decoding.form_law(law, rows.state, loop.outputs, rows.context)
  log_probs_BK, candidates_BK = jax.lax.top_k(formed.transformed_BV, k)
  alone_1KK = jnp.eye(k, dtype=bool)[None]
  outputs, cache = model.extend(candidates_BK.astype(jnp.int32), rows.cache, visible_BLL=alone_1KK)
  lengths_B = rows.context.lengths_B
  scores_BK = contrastive_scores(
    jnp.exp(log_probs_BK),
    unit(outputs.hidden[hidden]),
    text_BSD,
    jnp.arange(text_BSD.shape[1]) < lengths_B[:, None],
    alpha_B,
  )
  picked_B = jnp.argmax(scores_BK, axis=-1)
  tokens_B = jnp.take_along_axis(candidates_BK, picked_B[:, None], axis=1)[:, 0]
  cache = model.keep_path(cache, k, picked_B[:, None], is_running_B.astype(jnp.int32))
  outputs = jax.tree.map(lambda leaf: _pick(leaf, picked_B), outputs)
  slots_B = jnp.where(is_running_B, lengths_B, text_BSD.shape[1])
  return _Loop(
    rows=draw(law, _Given(tokens_B), stop, rows._replace(cache=cache, calls=rows.calls + 1), loop.outputs),
    outputs=decoding.select(is_running_B, outputs, loop.outputs),
    text_BSD=_write(text_BSD, slots_B, outputs.hidden[hidden]),
  )


def _pick(leaf: Any, picked_B: jax.Array) -> Any:
  """Returns [B, ...] of [B, K, ...]: one candidate a row."""
  return jnp.take_along_axis(leaf, picked_B.reshape(-1, *(1,) * (leaf.ndim - 1)), axis=1)[:, 0]
