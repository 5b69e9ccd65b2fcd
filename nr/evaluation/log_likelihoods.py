"""Log-likelihoods of given texts: what harnesses, perplexities and last words share.

    scorer = TextScorer(network, tokenizer, prefix_id=tokenizer.end_of_text_id, batch_size=16)
    scores = scorer.continuations([("The sea is", " blue"), ("The sea is", " red")])
    [each.total() for each in scores]                  # nats, negative
    scorer.texts(["a text longer than the model's window ..."], stride=64)

Texts are read whole, without a cache, in padded batches of few lengths: a length, rounded up
to a power of two, is one program. A causal model does not see what stands behind a token,
concept rows included, so that padding on the right changes nothing.
"""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from nr.generation.decoding import SMALLEST_BUCKET
from nr.generation.language_models import Network
from nr.objectives.sequence_scores import TokenStatistics, token_statistics
from nr.training import sharding

Pair = tuple[Sequence[int], Sequence[int]]


class TokenScores(NamedTuple):
  """What a model says of M given tokens.

  Attributes:
    log_probs_M: float32 nats, at most 0.
    is_greedy_M: bool, whether greedy decoding would have taken the token.
  """

  log_probs_M: np.ndarray
  is_greedy_M: np.ndarray

  def total(self) -> float:
    """Returns the log-probability of all, summed in float64."""
    return float(self.log_probs_M.sum(dtype=np.float64))

  def is_greedy(self) -> bool:
    """Returns whether greedy decoding would have given all of them."""
    return bool(self.is_greedy_M.all())


class TokenScorer:
  """Scores continuations of contexts, both token ids.

  Args:
    network: the model; its interventions act on every token.
    batch_size: rows read together; a batch that is not full is filled up, so that a length is one program.
    max_length: most tokens that the model reads; None: the spec's `max_length`.
    chunk_tokens: about how many tokens' logits are held at a time; None: those of a whole batch.
    mesh: devices that the parameters lie on, rows over its data axes; None: where they are.

  Raises:
    ValueError: sizes below 1, a max_length beyond learned positions, or rows that the mesh does not divide.
  """

  def __init__(
    self,
    network: Network,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    chunk_tokens: int | None = 1024,
    mesh: jax.sharding.Mesh | None = None,
  ):
    own = network.spec.max_length
    max_length = own if max_length is None else max_length
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
      if value < 1:
        raise ValueError(f"{name}={value}: give at least 1")
    if network.max_length is not None and max_length > network.max_length:
      raise ValueError(
        f"max_length={max_length}: the model has learned {network.max_length} positions; give fewer"
      )
    if mesh is not None and batch_size % (shards := mesh.shape["data"] * mesh.shape["fsdp"]):
      raise ValueError(f"batch_size={batch_size}: give a multiple of the mesh's {shards} shares of a batch")
    if network.intervention is not None and network.intervene_on != "all":
      raise ValueError(f"intervene_on={network.intervene_on!r}: given texts are scored; give 'all'")
    self.network, self.batch_size, self.max_length = network, batch_size, max_length
    self.chunk_tokens, self.mesh = chunk_tokens, mesh

  def score(self, pairs: Sequence[Pair], description: str = "scoring") -> list[TokenScores]:
    """Returns the scores of every continuation, in order.

    Args:
      pairs: (context, continuation), each at least one id. Of a context that does not fit the
        last tokens are read, as lm-evaluation-harness does; how many were cut is logged.
      description: title of the progress bar.

    Raises:
      ValueError: an empty context or continuation, or a continuation that alone is too long; names it.
    """
    buckets: dict[tuple[int, int], list[int]] = {}
    inputs, cut = [], 0
    for place, (context, continuation) in enumerate(pairs):
      self._check(place, context, continuation)
      cut += len(context) + len(continuation) > self.max_length + 1
      inputs.append([*context, *continuation][-(self.max_length + 1) : -1])
      key = (self._bucket(len(inputs[-1])), self._bucket(len(continuation)))
      buckets.setdefault(key, []).append(place)
    if cut:
      logging.warning("%d of %d contexts are cut to the model's %d tokens", cut, len(pairs), self.max_length)
    batches = [
      (*key, places[start : start + self.batch_size])
      for key, places in sorted(
        buckets.items(), reverse=True
      )  # the largest first: what does not fit fails at once
      for start in range(0, len(places), self.batch_size)
    ]
    found: list[TokenScores | None] = [None] * len(pairs)
    for length, count, places in tqdm(
      batches, desc=description, unit="batch", leave=False, disable=len(batches) < 2
    ):
      rows = self._rows(len(buckets[length, count]))
      scored = self._score(
        [inputs[place] for place in places], [pairs[place][1] for place in places], rows, length, count
      )
      for place, scores in zip(places, scored):
        found[place] = scores
    return found

  def _check(self, place: int, context: Sequence[int], continuation: Sequence[int]) -> None:
    if not len(context) or not len(continuation):
      raise ValueError(
        f"pairs[{place}]: {len(context)} tokens of context and {len(continuation)} to be scored; give at least one each"
      )
    if len(continuation) > self.max_length:
      raise ValueError(
        f"pairs[{place}]: {len(continuation)} tokens are to be scored and the model reads {self.max_length}; score a "
        "long text in windows"
      )

  def _bucket(self, length: int) -> int:
    return min(self.max_length, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()))

  def _rows(self, count: int) -> int:
    """Rows of the batches of a bucket with `count` sequences: one number, so that there is one program."""
    if self.mesh is not None:
      return self.batch_size
    return min(self.batch_size, 1 << (count - 1).bit_length())

  def _score(self, inputs, targets, rows: int, length: int, count: int) -> list[TokenScores]:
    """Scores up to `rows` sequences, padded to `length` tokens read and `count` scored."""
    tokens_BL, targets_BM = np.zeros((rows, length), np.int32), np.zeros((rows, count), np.int32)
    starts_B = np.zeros(rows, np.int32)
    for row, (read, scored) in enumerate(zip(inputs, targets)):
      tokens_BL[row, : len(read)], targets_BM[row, : len(scored)] = read, scored
      starts_B[row] = len(read) - len(scored)
    batch = sharding.put_batch(dict(tokens=tokens_BL, targets=targets_BM, starts=starts_B), self.mesh)
    with sharding.context(self.mesh):
      statistics = _statistics(
        self.network, batch["tokens"], batch["targets"], batch["starts"], self.chunk_tokens
      )
    log_probs_BM, is_greedy_BM = np.asarray(statistics.log_probs_RL), np.asarray(statistics.is_greedy_RL)
    sizes = [len(scored) for scored in targets]
    return [TokenScores(log_probs_BM[row, :size], is_greedy_BM[row, :size]) for row, size in enumerate(sizes)]


@functools.partial(jax.jit, static_argnames="chunk_tokens")
def _statistics(
  network: Network, tokens_BL: jax.Array, targets_BM: jax.Array, starts_B: jax.Array, chunk_tokens: int | None
) -> TokenStatistics:
  """Reads the tokens and scores targets [B, M], the first of which is predicted at `starts_B`."""
  model = network.model()
  settings = {} if network.intervention is None else {"intervention": network.intervention}
  hidden_BLD = model.hidden(tokens_BL, **settings)
  places_BM = starts_B[:, None] + jnp.arange(targets_BM.shape[1])
  hidden_BMD = jnp.take_along_axis(hidden_BLD, places_BM[..., None], axis=1, mode="clip")
  return token_statistics(
    hidden_BMD, model.unembedding_VD, targets_BM, chunk_size=chunk_tokens, with_greedy=True
  )


def rolling_pairs(
  prefix_id: int, tokens: Sequence[int], max_length: int, stride: int | None = None
) -> list[tuple[list[int], list[int]]]:
  """Cuts a text into (context, continuation) pairs that score every token once.

  The first window scores all its tokens, the first of them behind `prefix_id`. Each later one
  scores the next `stride` tokens and reads the `max_length` tokens before the last of them, so that a
  token has at least max_length - stride + 1 tokens of context. A last window with less to score
  reads as many tokens all the same. With stride = max_length these are the windows of
  lm-evaluation-harness (context_len=1).

  Args:
    prefix_id: read before the text, never scored.
    tokens: of the text.
    max_length: most tokens read at a time.
    stride: tokens scored by each further window, 1 .. max_length; None: max_length.

  Returns:
    No pair for a text without tokens.

  Raises:
    ValueError: a stride outside its bounds.

  >>> rolling_pairs(0, [1, 2, 3, 4, 5, 6], max_length=4, stride=2)
  [([0], [1, 2, 3, 4]), ([2, 3, 4], [5, 6])]
  """
  stride = max_length if stride is None else stride
  if not 1 <= stride <= max_length:
    raise ValueError(f"stride={stride}: give 1 to max_length={max_length} tokens")
  read = [prefix_id, *tokens]
  pairs, start = [], 0
  while start < len(tokens):
    stop = min(len(tokens), start + (stride if start else max_length))
    first = max(0, stop - max_length)
    pairs.append((read[first : start + 1], read[start + 1 : stop + 1]))
    start = stop
  return pairs


def split_pair(context: str, continuation: str) -> tuple[str, str]:
  """Moves spaces at the end of the context to the continuation, where tokenizers of words want them.

  >>> split_pair("The sea ", "is blue")
  ('The sea', ' is blue')
  """
  kept = context.rstrip()
  return kept, context[len(kept) :] + continuation


class TextScorer:
  """Scores text: tokenizes as lm-evaluation-harness does, and scores with a `TokenScorer`.

  Args:
    network: the model.
    tokenizer: its tokenizer.
    prefix_id: what stands before a text whose first token is to be scored too.
    begin_ids: ids in front of every context, such as the begin of text where the model wants one.
    use_special_tokens: whether text that spells special tokens becomes them (rendered chats).
    **settings: of `TokenScorer`.
  """

  def __init__(
    self,
    network: Network,
    tokenizer: Any,
    *,
    prefix_id: int,
    begin_ids: Sequence[int] = (),
    use_special_tokens: bool = False,
    **settings: Any,
  ):
    self.tokens = TokenScorer(network, **settings)
    self.tokenizer, self.prefix_id, self.begin_ids = tokenizer, prefix_id, tuple(begin_ids)
    self.use_special_tokens = use_special_tokens

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, nothing added."""
    if self.use_special_tokens:
      return self.tokenizer.encode(text, use_special_tokens=True)
    return self.tokenizer.encode(text)

  def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of what follows it.

    The two are encoded together and cut where the context alone would end, so that the first token
    of the continuation is the one that the tokenizer writes there. Without a context the
    continuation stands behind `prefix_id`.

    Raises:
      ValueError: a continuation of which no token is left, since the tokenizer joins it to the context.
    """
    context, continuation = split_pair(context, continuation)
    whole, before = self.encode(context + continuation), self.encode(context) if context else []
    if len(whole) <= len(before):
      raise ValueError(
        f"the continuation {continuation!r} adds no token to its context {context[-40:]!r}; begin it with a space or "
        "at a word"
      )
    return self._begun(before), whole[len(before) :]

  def encode_context(self, context: str) -> list[int]:
    """Returns the ids of a context alone, with what stands before it."""
    return self._begun(self.encode(context))

  def _begun(self, ids: list[int]) -> list[int]:
    if self.begin_ids and tuple(ids[: len(self.begin_ids)]) == self.begin_ids:
      return ids  # a chat template has written them
    return [*(self.begin_ids or (() if ids else (self.prefix_id,))), *ids]

  def continuations(
    self, pairs: Iterable[tuple[str, str]], description: str = "scoring"
  ) -> list[TokenScores]:
    """Returns the scores of every continuation's tokens, given its context, in order."""
    return self.tokens.score([self.encode_pair(*pair) for pair in pairs], description)

  def texts(
    self, texts: Iterable[str], stride: int | None = None, description: str = "scoring"
  ) -> list[TokenScores]:
    """Returns the scores of every token of each text, in windows; see `rolling_pairs`."""
    return self.token_lists([self.encode(text) for text in texts], stride, description)

  def token_lists(
    self, token_lists: Sequence[Sequence[int]], stride: int | None = None, description: str = "scoring"
  ) -> list[TokenScores]:
    """As `texts`, of texts that are encoded already."""
    windows = [
      rolling_pairs(self.prefix_id, tokens, self.tokens.max_length, stride) for tokens in token_lists
    ]
    scored = iter(self.tokens.score([pair for pairs in windows for pair in pairs], description))
    return [_joined([next(scored) for _ in pairs]) for pairs in windows]


def _joined(parts: Sequence[TokenScores]) -> TokenScores:
  if not parts:
    return TokenScores(np.zeros(0, np.float32), np.zeros(0, bool))
  return TokenScores(*(np.concatenate(arrays) for arrays in zip(*parts)))


def prefix_id_of(tokenizer: Any, begin_ids: Sequence[int] = ()) -> int:
  """Returns what stands before a text: its begin of text, else the end of the text before it."""
  if begin_ids:
    return begin_ids[-1]
  begin = getattr(tokenizer, "begin_of_text_id", None)
  return tokenizer.end_of_text_id if begin is None else begin
