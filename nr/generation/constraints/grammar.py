"""Sampling under a host matcher: context-free grammars, JSON schemas of any nesting.

A Python loop over two compiled programs. The one that reads tokens is dispatched
first; while the device runs it, the host advances the matchers and computes the
masks that the one that draws needs. Tokens that a matcher forces are not drawn one
by one: they are read together with the last drawn one, in one call of the model.

    vocabulary = grammar_vocabulary(tokenizer)
    drawn = sample_with_grammar(model, prompts_BP, valid_BP, key, grammar=json_grammar(schema, vocabulary),
                                max_new_tokens=256, stop=Stop(ids_E=[tokenizer.end_of_text_id]))
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.constraints.matchers import Matcher, num_words
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.rows import Rows, draw, open_rows
from nr.generation.sample import read
from nr.generation.samplers import Greedy, Gumbel, Sampler
from nr.generation.samplers import sampler as sampler_class
from nr.generation.stopping import LENGTH, RUNNING, Stop
from nr.generation.transforms.algebra import IDENTITY, Chain, Context, Transform, keep, transform
from nr.generation.transforms.algebra import chain as compose

EVERYTHING = -1


@transform("grammar_mask")
class GrammarMask(Transform):
  """Bans what the host's mask of each row does not allow. Its state is the mask, int32 [B, W].

  Outside of `sample_with_grammar`, which writes it, the mask allows everything.
  """

  is_rebuilt_by_init = False

  def init(self, context: Context, vocab_size: int) -> jax.Array:
    """Returns masks that allow everything."""
    return jnp.full((context.tokens_BS.shape[0], num_words(vocab_size)), EVERYTHING, jnp.int32)

  def apply(self, logits_BV: jax.Array, state: jax.Array, context: Context) -> jax.Array:
    """Bans the tokens whose bit is 0."""
    return keep(logits_BV, unpack(state, logits_BV.shape[1]))


def unpack(words_BW: jax.Array, num_tokens: int) -> jax.Array:
  """Returns bool [B, V] of int32 words: bit k % 32 of word k // 32 is entry k."""
  bits_BWK = (words_BW[:, :, None] >> jnp.arange(32)) & 1
  return bits_BWK.reshape(words_BW.shape[0], -1)[:, :num_tokens] == 1


class GrammarGeneration(NamedTuple):
  """What prompts were continued with; rows R = B * num_samples, prompt-major.

  Attributes:
    tokens_RN: see `nr.generation.sample.Generation`, and so the next five.
    lengths_R: new tokens of each row.
    log_probs_RN: of each token under the model; forced ones included.
    transformed_log_probs_RN: of each token under the law that it was drawn from; 0
      for forced ones.
    finish_R: why each row ended.
    calls: int32, calls of the model after the prompt was read.
    forced_R: int32 numpy, tokens of each row that were read without a draw of their own.
    errors: why a row's matcher gave up ("" if it did not); such a row ends broken.
  """

  tokens_RN: jax.Array
  lengths_R: jax.Array
  log_probs_RN: jax.Array
  transformed_log_probs_RN: jax.Array
  finish_R: jax.Array
  calls: jax.Array
  forced_R: np.ndarray
  errors: tuple[str, ...]


def sample_with_grammar(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None = None,
  key: jax.Array | None = None,
  *,
  grammar: Matcher | Sequence[Matcher],
  chain: Transform = IDENTITY,
  sampler: Sampler | None = None,
  max_new_tokens: int,
  num_samples: int = 1,
  stop: Stop,
  row_ids_B: jax.Array | None = None,
  fast_forward: int = 7,
) -> GrammarGeneration:
  """Continues prompts with texts of a grammar; otherwise as `nr.generation.sample.sample`.

  The mask is applied before the chain, or where the chain holds `GrammarMask()`.
  Random keys are those of positions, so what is drawn does not depend on `fast_forward`.

  Args:
    model: see `sample`, and so the others that are not named here.
    prompts_BP: int32 token ids, padded on the left.
    valid_BP: bool, False at padding.
    key: random key; without one, decoding is greedy.
    grammar: a matcher in its first state, or one a prompt; they are forked, not changed.
    chain: transforms of the logits.
    sampler: how tokens are drawn; it is not asked for forced ones.
    max_new_tokens: most tokens to add; a text may be cut before its grammar completes it.
    num_samples: samples of each prompt.
    stop: what ends a row; must know an id with which the grammar ends a text.
    row_ids_B: int32 identity of each prompt for its random keys.
    fast_forward: most forced tokens that are read in one call besides the one that
      was drawn; 0: none. Static.

  Raises:
    ValueError: what `sample` refuses; another number of matchers than prompts; a
      vocabulary larger than the model's; a stop that no grammar can reach.
  """
  law, prompts_BP, valid_BP = decoding.check_request(
    model, _with_mask(chain), prompts_BP, valid_BP, max_new_tokens, num_samples
  )
  batch = prompts_BP.shape[0]
  sampler = (Greedy() if key is None else Gumbel()) if sampler is None else sampler
  if key is None and isinstance(sampler, Gumbel):
    raise ValueError("key: the Gumbel sampler draws at random; give a random key, or Greedy()")
  if fast_forward < 0:
    raise ValueError(f"fast_forward={fast_forward}: give 0 (off) or the most forced tokens of one call")
  stop = stop.prepared(batch, max_new_tokens, model.vocab_size)
  matchers = _checked(grammar, batch, model.vocab_size, stop)
  keys_R = decoding.row_keys(key, row_ids_B, batch, num_samples)
  begun = _begin(model, law, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples)
  followers = _Followers(matchers, num_samples, model.vocab_size)
  rows_R = jnp.repeat(jnp.arange(batch), num_samples)
  model, law, stop = (each.take(rows_R) for each in (model, law, stop))
  rows = _open(law, sampler, stop, begun, followers.masks(np.ones(len(keys_R), bool)), max_new_tokens)
  return _run(model, law, sampler, stop, rows, followers, fast_forward)


def _run(
  model: LanguageModel,
  law: Chain,
  sampler: Sampler,
  stop: Stop,
  rows: Rows,
  followers: "_Followers",
  fast_forward: int,
) -> GrammarGeneration:
  """Reads and draws until every row has ended."""
  limits_R, forced_R = np.asarray(stop.limits_B), np.zeros(len(followers.matchers), np.int32)
  while True:
    last_R, generated_R = np.asarray(rows.last_R), np.asarray(rows.context.generated_B)
    is_running_R = np.asarray(rows.finish_R) == RUNNING
    if not is_running_R.any():
      return GrammarGeneration(*read(rows, stop), forced_R, followers.errors())
    room_R = np.minimum(limits_R - generated_R - 1, fast_forward)
    tokens_RL, counts_R = followers.advance(last_R, is_running_R, room_R, fast_forward + 1)
    outputs, cache = _read(model, rows.cache, tokens_RL, counts_R)
    # The device is busy with that call while the host computes the masks.
    words_RW = followers.masks(is_running_R)
    rows = _draw(law, sampler, stop, rows._replace(cache=cache), outputs, tokens_RL, counts_R, words_RW)
    gained_R = np.asarray(rows.context.generated_B) - generated_R
    forced_R += np.minimum(gained_R, np.maximum(counts_R - 1, 0))


def _with_mask(law: Transform) -> Chain:
  law = compose(law)
  return law if any(isinstance(each, GrammarMask) for each in law.transforms) else compose(GrammarMask(), law)


def _checked(grammar: Matcher | Sequence[Matcher], batch: int, vocab_size: int, stop: Stop) -> list[Matcher]:
  """Returns a matcher a prompt. Raises ValueError for those that do not fit the request."""
  matchers = list(grammar) if isinstance(grammar, Sequence) else [grammar] * batch
  if len(matchers) != batch:
    raise ValueError(f"grammar: {len(matchers)} matchers for {batch} prompts; give one, or one a prompt")
  stop_ids = [] if stop.ids_E is None else stop.ids_E.tolist()
  for matcher in matchers:
    if matcher.num_tokens > vocab_size:
      raise ValueError(
        f"grammar was made for {matcher.num_tokens} tokens, the model has {vocab_size}: make it with the "
        "model's tokenizer"
      )
    missing = sorted(set(matcher.end_of_text_ids) - set(stop_ids))
    if missing or not matcher.end_of_text_ids:
      raise ValueError(
        f"stop ids {stop_ids}: the grammar ends its texts with {list(matcher.end_of_text_ids)}; let the stop "
        "know all of them, and the grammar at least one"
      )
  return matchers


class _Followers:
  """The matchers of all rows."""

  def __init__(self, matchers: Sequence[Matcher], num_samples: int, vocab_size: int):
    self.matchers = [matcher.fork() for matcher in matchers for _ in range(num_samples)]
    self._words = num_words(vocab_size)

  def masks(self, is_running_R: np.ndarray) -> np.ndarray:
    """Returns int32 [R, W], what may come next; everything where a row has ended."""
    words_RW = np.full((len(self.matchers), self._words), EVERYTHING, np.int32)
    for row in np.nonzero(is_running_R)[0]:
      self.matchers[row].fill(words_RW[row])
    return words_RW

  def errors(self) -> tuple[str, ...]:
    """Returns why each matcher gave up, "" where it did not."""
    return tuple(matcher.error for matcher in self.matchers)

  def advance(
    self, last_R: np.ndarray, is_running_R: np.ndarray, room_R: np.ndarray, most: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Reads the last tokens and what is forced behind them.

    Returns:
      int32 [R, L] tokens to read, padded on the right, and int32 [R] how many; L is 1
      where nothing is forced, else `most`: two compiled programs, not one a length.
    """
    tokens_RL = np.zeros((len(last_R), most), np.int32)
    counts_R = is_running_R.astype(np.int32)
    tokens_RL[:, 0] = last_R
    for row in np.nonzero(is_running_R)[0]:
      matcher = self.matchers[row]
      if not matcher.consume(int(last_R[row])):
        continue
      forced = matcher.forced()[: room_R[row]] if room_R[row] > 0 else []
      for token in forced:
        matcher.consume(token)
      tokens_RL[row, 1 : 1 + len(forced)] = forced
      counts_R[row] += len(forced)
    return tokens_RL[:, : 1 if counts_R.max() == 1 else most], counts_R


@sampler_class
class _Forced:
  """The tokens that a matcher forces."""

  tokens_B: jax.Array

  def draw(self, logits_BV: jax.Array, context: Context) -> jax.Array:
    """Returns them."""
    return self.tokens_B

  def take(self, rows_B: jax.Array) -> "_Forced":
    """Gathers them."""
    return _Forced(self.tokens_B[rows_B])


def _masked(law: Chain, state: Any, words_RW: jax.Array) -> Any:
  """Returns the chain's state with other masks."""
  return tuple(
    words_RW if isinstance(each, GrammarMask) else its_state
    for each, its_state in zip(law.transforms, state, strict=True)
  )


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "num_samples"))
def _begin(model, law, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples):
  """Reads the prompts."""
  return decoding.begin(
    model, law, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples=num_samples, uneven=True
  )


@functools.partial(jax.jit, static_argnames=("max_new_tokens",))
def _open(law, sampler, stop, begun, words_RW, max_new_tokens) -> Rows:
  """Draws the first token of every row."""
  begun = begun._replace(state=_masked(law, begun.state, words_RW))
  return open_rows(law, sampler, stop, begun, max_new_tokens)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _read(model, cache, tokens_RL, counts_R) -> tuple[Outputs, Any]:
  """Reads the first `counts_R` of the tokens of each row."""
  return model.extend(tokens_RL, cache, jnp.arange(tokens_RL.shape[1]) < counts_R[:, None])


@functools.partial(jax.jit, donate_argnames=("rows",))
def _draw(law, sampler, stop, rows, outputs, tokens_RL, counts_R, words_RW) -> Rows:
  """Takes the forced tokens over one by one, as if drawn, and draws one more in rows that still run."""
  words = jnp.arange(words_RW.shape[1])

  def force(offset: jax.Array, rows: Rows) -> Rows:
    tokens_R = jax.lax.dynamic_index_in_dim(tokens_RL, offset + 1, axis=1, keepdims=False)
    is_forced_R = (offset + 1 < counts_R) & (rows.finish_R == RUNNING)
    bits_R1 = jnp.left_shift(jnp.int32(1), tokens_R % 32)[:, None]
    only_RW = jnp.where(words == tokens_R[:, None] // 32, bits_R1, 0)
    held = rows._replace(
      state=_masked(law, rows.state, only_RW), finish_R=jnp.where(is_forced_R, RUNNING, LENGTH)
    )
    here = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, offset, 1, keepdims=False), outputs)
    drawn = draw(law, _Forced(tokens_R), stop, held, here)
    return drawn._replace(finish_R=jnp.where(is_forced_R, drawn.finish_R, rows.finish_R))

  if tokens_RL.shape[1] > 1:
    rows = jax.lax.fori_loop(0, tokens_RL.shape[1] - 1, force, rows)
  rows = rows._replace(state=_masked(law, rows.state, words_RW), calls=rows.calls + 1)
  place_R = jnp.maximum(counts_R - 1, 0)
  last = jax.tree.map(lambda leaf: leaf[jnp.arange(place_R.shape[0]), place_R], outputs)
  return draw(law, sampler, stop, rows, last)
