"""Scores of candidate tokens by a second model: rewards, classifiers, values.

    scored = WithCandidateScores(main, scorer, linear_score, (kernel_D, bias), name="reward", k=20)
    sample(scored, prompts_BP, valid_BP, key, chain=chain(Rad(10.0)), max_new_tokens=64)

The scorer reads the text with a cache of its own. At every position it reads the k
most probable next tokens as siblings, which do not see each other, and forgets them
again; what its head makes of their states is offered as a stream [B, V].
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from nr.generation.language_models import LanguageModel, Outputs, left_aligned
from nr.generation.transforms.algebra import HIDDEN, STREAM

# From the parameters of a head and states [..., D] to scores [...].
Head = Callable[[Any, jax.Array], jax.Array]


def linear_score(head_params: tuple[jax.Array, jax.Array], states: jax.Array) -> jax.Array:
  """Returns states [..., D] times a kernel [D], plus a bias: a reward or a value, float32 [...]."""
  kernel_D, bias = head_params
  return jnp.einsum("...d,d->...", states, kernel_D, preferred_element_type=jnp.float32) + bias


def log_sigmoid_score(head_params: tuple[jax.Array, jax.Array], states: jax.Array) -> jax.Array:
  """Returns the log-probability of an attribute by logistic regression, float32 [...]."""
  return jax.nn.log_sigmoid(linear_score(head_params, states))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class WithCandidateScores(LanguageModel):
  """A main model, and a scorer that looks one token ahead.

  Candidates are the most probable tokens of the main model itself, before any
  transform. The siblings take k further slots of the scorer's cache while it reads them.

  Attributes:
    main: whose law the text is drawn from.
    scorer: a model that offers its state, such as `Network(..., offers_hidden=True)`,
      with the main model's tokenizer.
    head: from `head_params` and the scorer's states [..., D] to scores [...]; static.
    head_params: pytree of arrays.
    name: of the stream, -inf where a token was not scored.
    k: candidates.
    reads: most positions whose candidates are scored in one extension: 1 for plain
      decoding, the number of drafted tokens plus 1 (or of all nodes of a tree) under
      speculative decoding.
    hidden: name of the scorer's state.
  """

  main: LanguageModel
  scorer: LanguageModel
  head: Head = dataclasses.field(metadata=dict(static=True))
  head_params: Any
  name: str = dataclasses.field(default="reward", metadata=dict(static=True))
  k: int = dataclasses.field(default=20, metadata=dict(static=True))
  reads: int = dataclasses.field(default=1, metadata=dict(static=True))
  hidden: str = dataclasses.field(default="last", metadata=dict(static=True))

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return self.main.vocab_size

  @property
  def num_contexts(self) -> int:
    """Those of the main model."""
    return self.main.num_contexts

  @property
  def max_length(self) -> int | None:
    """The least of both."""
    lengths = [model.max_length for model in (self.main, self.scorer)]
    return min((length for length in lengths if length is not None), default=None)

  @property
  def offers(self) -> frozenset[str]:
    """The scores, and what the main model offers."""
    return self.main.offers | {STREAM + self.name}

  def check(self) -> None:
    """Raises ValueError for a scorer that has no state, another vocabulary, or useless numbers."""
    for model in (self.main, self.scorer):
      model.check()
    if HIDDEN + self.hidden not in self.scorer.offers:
      raise ValueError(
        f"hidden={self.hidden!r}: the scorer does not offer it; make it with Network(..., offers_hidden=True)"
      )
    if self.scorer.vocab_size < self.vocab_size:
      raise ValueError(
        f"the scorer has a vocabulary of {self.scorer.vocab_size}, the main model of {self.vocab_size}; "
        "it must share the main model's tokenizer"
      )
    if not 0 < self.k <= self.vocab_size:
      raise ValueError(f"k={self.k}: give 1 to {self.vocab_size} candidates")
    if self.reads < 1:
      raise ValueError(f"reads={self.reads}: give at least 1")

  def init_cache(self, batch: int, capacity: int, *, uneven: bool = False) -> dict[str, Any]:
    """Makes both caches; the scorer's has room for the siblings, and forgets, so that it is uneven."""
    return {
      "main": self.main.init_cache(batch, capacity, uneven=uneven),
      "scorer": self.scorer.init_cache(batch, capacity + self.reads * self.k, uneven=True),
    }

  def extend(self, tokens_BL, cache, valid_BL=None, *, visible_BLL=None, read_B=None, is_prompt=False):
    """Reads tokens with both models, and scores candidates where outputs are wanted.

    `read_B`, when given, must be each row's last valid token; without it padding must
    stand on the right.

    Raises:
      ValueError: more positions to score at once than `reads`, or one node of a tree.
    """
    length = tokens_BL.shape[1]
    if read_B is None and length > self.reads:
      raise ValueError(
        f"reads={self.reads}: {length} positions are to be scored at once; set reads to as many"
      )
    if read_B is not None and visible_BLL is not None and length > 1:
      raise ValueError("read_B: candidates at one node of a tree cannot be scored alone; leave read_B out")
    settings = dict(visible_BLL=visible_BLL, read_B=read_B, is_prompt=is_prompt)
    outputs, main = self.main.extend(tokens_BL, cache["main"], valid_BL, **settings)
    if read_B is not None and length > 1:
      outputs, scorer = self._score_last(tokens_BL, valid_BL, outputs, cache["scorer"], is_prompt)
    else:
      outputs, scorer = self._score_each(
        tokens_BL, valid_BL, visible_BLL, outputs, cache["scorer"], is_prompt
      )
    return outputs, {"main": main, "scorer": scorer}

  def prefill(self, prompts_BP, valid_BP, capacity, *, uneven=False):
    """Reads the prompts with both models, and scores the candidates behind them."""
    outputs, main = self.main.prefill(prompts_BP, valid_BP, capacity, uneven=uneven)
    scorer = self.scorer.init_cache(prompts_BP.shape[0], capacity + self.reads * self.k, uneven=True)
    outputs, scorer = self._score_last(prompts_BP, valid_BP, outputs, scorer, True)
    return outputs, {"main": main, "scorer": scorer}

  def _score_last(self, tokens_BL, valid_BL, outputs: Outputs, cache: Any, is_prompt: bool) -> tuple:
    """Reads tokens, then the candidates behind the last of them."""
    if valid_BL is not None:
      tokens_BL, lengths_B = left_aligned(tokens_BL, valid_BL)
      valid_BL = jnp.arange(tokens_BL.shape[1]) < lengths_B[:, None]
    _, cache = self.scorer.extend(tokens_BL, cache, valid_BL, is_prompt=is_prompt)
    candidates_BK = self._candidates(outputs.logits)
    alone_1KK = jnp.eye(self.k, dtype=bool)[None]
    read, cache = self.scorer.extend(candidates_BK, cache, visible_BLL=alone_1KK)
    cache = self.scorer.rollback(cache, jnp.full(candidates_BK.shape[:1], self.k))
    return self._offer(outputs, candidates_BK, read.hidden[self.hidden]), cache

  def _score_each(
    self, tokens_BL, valid_BL, visible_BLL, outputs: Outputs, cache: Any, is_prompt: bool
  ) -> tuple:
    """Reads tokens, and the candidates behind each of them, in one call."""
    batch, length = tokens_BL.shape
    candidates_BLK = self._candidates(outputs.logits).reshape(batch, length, self.k)
    count = length * self.k
    earlier_BLL = jnp.tril(jnp.ones((1, length, length), bool)) if visible_BLL is None else visible_BLL
    if valid_BL is not None:
      earlier_BLL = earlier_BLL & valid_BL[:, None]
      valid_BL = jnp.concatenate([valid_BL, jnp.ones((batch, count), bool)], axis=1)
    rows = earlier_BLL.shape[0]
    visible = jnp.block(
      [
        [earlier_BLL, jnp.zeros((rows, length, count), bool)],
        [
          jnp.repeat(earlier_BLL, self.k, axis=1),
          jnp.broadcast_to(jnp.eye(count, dtype=bool), (rows, count, count)),
        ],
      ]
    )
    tokens = jnp.concatenate([tokens_BL, candidates_BLK.reshape(batch, count)], axis=1)
    read, cache = self.scorer.extend(tokens, cache, valid_BL, visible_BLL=visible, is_prompt=is_prompt)
    cache = self.scorer.rollback(cache, jnp.full(batch, count))
    states = read.hidden[self.hidden][:, length:].reshape(batch, length, self.k, -1)
    if outputs.logits.ndim == 2:
      return self._offer(outputs, candidates_BLK[:, 0], states[:, 0]), cache
    return self._offer(outputs, candidates_BLK, states), cache

  def _candidates(self, logits: jax.Array) -> jax.Array:
    return jax.lax.top_k(logits, self.k)[1].astype(jnp.int32)

  def _offer(self, outputs: Outputs, candidates: jax.Array, states: jax.Array) -> Outputs:
    """Returns the outputs with the scores [..., V] of candidates [..., K] with states [..., K, D]."""
    scores = self.head(self.head_params, states).astype(jnp.float32)
    everywhere = jnp.full(outputs.logits.shape, -jnp.inf)
    scattered = jnp.put_along_axis(everywhere, candidates, scores, axis=-1, inplace=False)
    return outputs._replace(streams={**outputs.streams, self.name: scattered})

  def fork(self, cache: dict[str, Any], rows_B: jax.Array) -> dict[str, Any]:
    """Forks both caches."""
    return self._each(cache, lambda model, its: model.fork(its, rows_B))

  def rollback(self, cache: dict[str, Any], forgotten_B: jax.Array) -> dict[str, Any]:
    """Shortens the rows of both caches."""
    return self._each(cache, lambda model, its: model.rollback(its, forgotten_B))

  def keep_path(
    self, cache: dict[str, Any], size: int, offsets_BA: jax.Array, kept_B: jax.Array
  ) -> dict[str, Any]:
    """Keeps one path of a tree in both caches; the siblings have gone already."""
    return self._each(cache, lambda model, its: model.keep_path(its, size, offsets_BA, kept_B))

  def _each(self, cache: dict[str, Any], change: Callable[[LanguageModel, Any], Any]) -> dict[str, Any]:
    return {name: change(getattr(self, name), its) for name, its in cache.items()}

  def check_drafts(self, count: int) -> None:
    """Asks the main model and the scorer, which also takes its candidates back."""
    self.main.check_drafts(count)
    self.scorer.check_drafts(count + self.k)

  def take(self, rows_B: jax.Array) -> Self:
    """Gathers the rows of both models."""
    return dataclasses.replace(self, main=self.main.take(rows_B), scorer=self.scorer.take(rows_B))
