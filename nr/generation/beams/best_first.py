"""Best-first search: the most probable text, exactly, and Levin tree search.

A queue on the host holds texts by cost; the cheapest is taken (a pop), and unless it
is whole, its continuations enter. With the cost -log p the first whole text that is
popped is the mode of the law. What is cheap to get wrong here is the number of model
calls: prefixes are scored in batches, ahead of their pops, which changes no pop.
"""

import functools
import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, left_aligned
from nr.generation.stopping import FINISH_REASONS, LENGTH, RUNNING, STOP_ID, STOP_STRING, Stop
from nr.generation.transforms.algebra import IDENTITY, Chain, Context, Transform
from nr.names import unknown

COSTS = ("log_prob", "levin")


class FoundText(NamedTuple):
  """A whole text.

  Attributes:
    tokens: the generated ids, the stop id included.
    log_prob: nats, under the chain's law.
    cost: by which it was popped.
    pop: how many pops it took, its own included.
    finish: why it ended, a word of `stopping.FINISH_REASONS`.
  """

  tokens: tuple[int, ...]
  log_prob: float
  cost: float
  pop: int
  finish: str


class BestFirst(NamedTuple):
  """What a search found.

  Attributes:
    texts: in the order found; fewer than asked for when the queue ran empty or the
      budget of pops did.
    pops: texts and beginnings of texts taken from the queue, pruned ones left out.
    scored: prefixes scored by the model.
    calls: calls of the model.
    is_exhausted: whether the queue ran empty without pruning: no other text exists.
  """

  texts: list[FoundText]
  pops: int
  scored: int
  calls: int
  is_exhausted: bool


class _Node:
  """A beginning of a text in the search tree; its law is filled in once it is scored."""

  __slots__ = ("tokens", "log_prob", "stop_state", "finish", "order_V", "log_probs_V")

  def __init__(self, tokens: tuple[int, ...], log_prob: float, stop_state: int, finish: int):
    self.tokens, self.log_prob, self.stop_state, self.finish = tokens, log_prob, stop_state, finish
    self.order_V = self.log_probs_V = None


def best_first_search(
  model: LanguageModel,
  prompt: Sequence[int],
  *,
  chain: Transform = IDENTITY,
  max_new_tokens: int,
  stop: Stop | None = None,
  cost: str = "log_prob",
  heuristic: Callable[[tuple[int, ...]], float] | None = None,
  is_goal: Callable[[tuple[int, ...]], bool] | None = None,
  num_return: int = 1,
  max_pops: int = 10_000,
  beam_width: int | None = None,
  batch: int = 8,
  key: jax.Array | None = None,
) -> BestFirst:
  """Takes texts from a queue by cost until whole ones come up.

  Args:
    model: any language model; prefixes are read anew each time, without a cache.
    prompt: token ids.
    chain: transforms of the logits, scalar parameters.
    max_new_tokens: most tokens to add; a text of that length is whole.
    stop: stop ids and strings; loop detection and limits by row do not apply here.
    cost: "log_prob": -log p in nats, for the mode of the law. "levin": tokens / p,
      which bounds the pops before a goal by 1 + its cost (Levin tree search).
    heuristic: a bound from below of what the generated tokens' completion still adds
      to the cost; added to it. None: 0. With one, all continuations of a text enter
      the queue, else only as many as are popped.
    is_goal: which whole texts (generated tokens) are wanted; None: all.
    num_return: ends the search.
    max_pops: ends it too.
    beam_width: most beginnings of one length that are popped: best-first beam search
      (arXiv:2007.03909), which then is no longer exact. None: no bound.
    batch: prefixes scored in one call: the cheapest in the queue, ahead of their turn.
    key: for transforms that draw.

  Raises:
    ValueError: what `decoding.check_request` and `Stop.prepared` refuse, an unknown
      cost, per-row parameters, counts below 1, loop detection, streams with prompts
      of their own, or an intervention on generated tokens only.
  """
  if cost not in COSTS:
    raise ValueError(unknown("cost", cost, COSTS))
  counts = dict(num_return=num_return, max_pops=max_pops, batch=batch, beam_width=beam_width)
  for name, count in counts.items():
    if count is not None and count < 1:
      raise ValueError(f"{name}={count}: give at least 1")
  prompts_BP, _ = decoding.pad_prompts([prompt], len(prompt))
  law, _, _ = decoding.check_request(model, chain, prompts_BP, None, max_new_tokens)
  _check_law(law)
  stop = (stop or Stop()).prepared(1, max_new_tokens, model.vocab_size)
  if stop.loop_period:
    raise ValueError(f"loop_period={stop.loop_period}: best-first search detects no loops; leave it 0")
  _check_rereadable(model)
  score = _Scorer(model, law, stop, tuple(prompt), max_new_tokens, batch, key)
  queue = _Queue(cost, heuristic)
  limit = int(stop.limits_B[0])
  queue.push(_Node((), 0.0, int(stop.init(1)[0]), RUNNING if limit else LENGTH))
  texts, popped, pops = [], {}, 0
  while queue.items and pops < max_pops and len(texts) < num_return:
    priority, node = queue.pop()
    if beam_width is not None:
      popped[len(node.tokens)] = popped.get(len(node.tokens), 0) + 1
      if popped[len(node.tokens)] > beam_width:
        continue
    pops += 1
    if node.finish != RUNNING:
      if is_goal is None or is_goal(node.tokens):
        texts.append(FoundText(node.tokens, node.log_prob, priority, pops, FINISH_REASONS[node.finish]))
      continue
    if node.log_probs_V is None:
      score([node, *queue.unscored(batch - 1)])
    queue.expand(node, score.child)
  return BestFirst(
    texts,
    pops,
    score.scored,
    score.calls,
    not queue.items and not any(count > beam_width for count in popped.values()),
  )


def _check_law(law: Chain) -> None:
  """Refuses chains whose state no text alone decides, and parameters for several rows."""
  for each in law.transforms:
    if not each.is_rebuilt_by_init:
      raise ValueError(
        f"chain: {each.name}() remembers probabilities of the past, and best-first search reads every text anew; "
        "leave it out"
      )
  if any(jnp.ndim(value) > 0 for value in law.row_parameters().values()):
    raise ValueError("chain: best-first search has one prompt; give scalar parameters")


def _check_rereadable(model: LanguageModel) -> None:
  """Refuses models that read a prompt otherwise than what they generated: here both are read together."""
  for name, stream in getattr(model, "streams", {}).items():
    if stream.prompts_BP is not None:
      raise ValueError(f"stream {name!r} has prompts of its own: best-first search needs one text for all")
  if getattr(model, "intervention", None) is not None and model.intervene_on != "all":
    raise ValueError(f"intervene_on={model.intervene_on!r}: best-first search rereads texts; give 'all'")


class _Queue:
  """Texts by cost. Continuations of one text enter one at a time, the next when one is popped."""

  def __init__(self, cost: str, heuristic: Callable | None):
    self.items: list[tuple] = []
    self._cost, self._heuristic, self._count = cost, heuristic, 0

  def push(self, node: _Node, siblings: tuple | None = None) -> None:
    """Enters a text; `siblings` = (parent, its next place, child) enters the next one later."""
    if self._cost == "log_prob":
      priority = -node.log_prob
    else:
      priority = len(node.tokens) * float(np.exp(min(-node.log_prob, 700.0)))
    if self._heuristic is not None:
      priority += float(self._heuristic(node.tokens))
    heapq.heappush(self.items, (priority, self._count, node, siblings))
    self._count += 1  # the first come of equal costs, and nodes are never compared

  def pop(self) -> tuple[float, _Node]:
    """Returns the cheapest text, and lets its next sibling in."""
    priority, _, node, siblings = heapq.heappop(self.items)
    if siblings is not None:
      self._enter(*siblings)
    return priority, node

  def expand(self, parent: _Node, child: Callable) -> None:
    """Enters the continuations of a scored text."""
    if self._heuristic is None:
      self._enter(parent, 0, child)
      return
    for token in parent.order_V:
      self.push(child(parent, int(token)))

  def _enter(self, parent: _Node, place: int, child: Callable) -> None:
    if place < len(parent.order_V):
      self.push(child(parent, int(parent.order_V[place])), (parent, place + 1, child))

  def unscored(self, count: int) -> list[_Node]:
    """Returns the cheapest texts that will need the model."""
    wanted = (item for item in self.items if item[2].finish == RUNNING and item[2].log_probs_V is None)
    return [item[2] for item in heapq.nsmallest(count, wanted)]


class _Scorer:
  """Asks the model for the laws of texts, in batches of one size and lengths that are powers of two."""

  def __init__(self, model, law, stop, prompt, max_new_tokens, batch, key):
    self._model, self._law, self._stop, self._prompt = model, law, stop, prompt
    self._limit, self._longest, self._batch = int(stop.limits_B[0]), len(prompt) + max_new_tokens - 1, batch
    self._stop_ids = () if stop.ids_E is None else tuple(np.asarray(stop.ids_E).tolist())
    self._keys_R = jnp.repeat(decoding.row_keys(key, None, 1), batch, axis=0)
    self.scored = self.calls = 0

  def __call__(self, nodes: list[_Node]) -> None:
    """Fills in the laws of texts."""
    texts = [self._prompt + node.tokens for node in nodes]
    texts += [self._prompt] * (self._batch - len(nodes))
    length = min(1 << (max(map(len, texts)) - 1).bit_length(), self._longest)
    tokens_BP, valid_BP = decoding.pad_prompts(texts, length)
    log_probs_BV, is_broken_B = _laws(
      self._model, self._law, tokens_BP, valid_BP, self._keys_R, jnp.int32(len(self._prompt))
    )
    self.scored, self.calls = self.scored + len(nodes), self.calls + 1
    for node, log_probs_V, is_broken in zip(nodes, np.asarray(log_probs_BV, np.float64), is_broken_B):
      log_probs_V = np.full_like(log_probs_V, -np.inf) if is_broken else log_probs_V
      order_V = np.argsort(-log_probs_V, kind="stable")
      node.log_probs_V, node.order_V = log_probs_V, order_V[: int((log_probs_V > -np.inf).sum())]

  def child(self, parent: _Node, token: int) -> _Node:
    """Returns the text with one more token."""
    tokens, finish, state = (*parent.tokens, token), RUNNING, parent.stop_state
    if len(tokens) >= self._limit:
      finish = LENGTH
    if self._stop.strings is not None:
      states_1 = self._stop.strings.step(jnp.array([state]), jnp.array([token]))
      state = int(states_1[0])
      finish = STOP_STRING if bool(self._stop.strings.is_accepting(states_1)[0]) else finish
    finish = STOP_ID if token in self._stop_ids else finish
    return _Node(tokens, parent.log_prob + float(parent.log_probs_V[token]), state, finish)


@functools.partial(jax.jit)
def _laws(model: Any, law: Chain, tokens_BP, valid_BP, keys_B, prompt_length) -> tuple[jax.Array, jax.Array]:
  """Returns float32 [B, V], the law after each text, and which could not be formed."""
  batch, length = tokens_BP.shape
  outputs, _ = model.prefill(tokens_BP, valid_BP, length)
  history_BP, lengths_B = left_aligned(tokens_BP, valid_BP)
  context = Context(history_BP, lengths_B, jnp.full((batch,), prompt_length, jnp.int32), keys_B)
  formed = decoding.form_law(law, law.init(context, model.vocab_size), outputs, context)
  return formed.transformed_BV, formed.is_broken_B
