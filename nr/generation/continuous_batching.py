"""Continuous batching: a stream of requests over a fixed number of slots.

When a row ends, its slot is given to the next request while the others go on, so
that throughput does not fall to the slowest row of a batch. Prefill, insert and step
are three compiled programs with static shapes; every slot has its own place in an
uneven cache. A request draws the same tokens here as alone in `sample`.

Interface after JetStream's engine (prefill, insert, generate); code our own.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Network
from nr.generation.rows import Rows, advance, open_rows
from nr.generation.sample import generated_tokens
from nr.generation.samplers import Greedy, Gumbel
from nr.generation.stopping import FINISH_REASONS, LENGTH, RUNNING, Stop
from nr.generation.streams import WithStreams
from nr.generation.transforms.algebra import IDENTITY, Chain, Transform, chain


@dataclasses.dataclass(frozen=True)
class Request:
  """One text to generate.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: most tokens to add; None: the engine's.
    row_id: identity for the random key; None: the number of the request in the stream.
    chain: transforms like the engine's, with other parameters; None: the engine's.
    tag: anything, handed back.
  """

  prompt: list[int]
  max_new_tokens: int | None = None
  row_id: int | None = None
  chain: Transform | None = None
  tag: Any = None


class Finished(NamedTuple):
  """A request that has ended.

  Attributes:
    number: of the request in the stream.
    request: as it was given.
    tokens: int32 [n], new tokens, the stop id included.
    log_probs: float32 [n] nats under the model.
    transformed_log_probs: float32 [n] nats under the law drawn from.
    finish_reason: one of `nr.generation.stopping.FINISH_REASONS`.
  """

  number: int
  request: Request
  tokens: np.ndarray
  log_probs: np.ndarray
  transformed_log_probs: np.ndarray
  finish_reason: str


def serve(
  model: LanguageModel,
  requests: Iterable[Request],
  key: jax.Array | None = None,
  *,
  chain: Transform = IDENTITY,
  stop: Stop | None = None,
  slots: int,
  max_prompt_tokens: int,
  max_new_tokens: int,
  tokens_per_call: int | None = None,
) -> Iterator[Finished]:
  """Generates for a stream of requests and yields each as soon as it has ended.

  Args:
    model: any language model without per-row parts (interventions may be shared).
    requests: read as slots become free, so that it may be endless.
    key: random key; None: greedy.
    chain: transforms of the logits.
    stop: stop ids, strings and loops; limits come from the requests.
    slots: rows decoded together; static.
    max_prompt_tokens: longest prompt that is accepted.
    max_new_tokens: most tokens a request may ask for.
    tokens_per_call: tokens between two looks at the slots; None: until a row ends.

  Yields:
    Finished requests, in the order in which they end.

  Raises:
    ValueError: naming the request: a prompt that is empty or too long for the cache,
      more tokens than allowed, a chain of other transforms than the engine's.
  """
  if slots < 1 or (tokens_per_call is not None and tokens_per_call < 1):
    raise ValueError(f"slots={slots}, tokens_per_call={tokens_per_call}: give at least 1 of each")
  _check_model(model)
  engine = _Engine.make(model, key, chain, stop, slots, max_prompt_tokens, max_new_tokens)
  waiting, running = enumerate(requests), {}
  is_drained = False
  while True:
    while not is_drained and len(running) < slots:
      following = next(waiting, None)
      is_drained = following is None
      if not is_drained:
        slot = next(slot for slot in range(slots) if slot not in running)
        engine.insert(slot, *following)
        running[slot] = following
    if not running:
      return
    finish_R = engine.finish_codes()
    # A request for one token has ended when it is inserted; the others still go one token on.
    has_ended = any(finish_R[slot] != RUNNING for slot in running)
    engine.step(1 if has_ended else tokens_per_call, leave_at_end=not is_drained)
    finish_R = engine.finish_codes()
    for slot in [slot for slot in running if finish_R[slot] != RUNNING]:
      yield engine.harvest(slot, *running.pop(slot), finish_R[slot])


def _check_model(model: LanguageModel) -> None:
  """Refuses models whose rows cannot be exchanged one by one."""
  streams = model.streams.values() if isinstance(model, WithStreams) else ()
  for member in (model.main if isinstance(model, WithStreams) else model, *(each.model for each in streams)):
    if isinstance(member, Network) and member.cache.layout == "paged":
      raise ValueError("CacheSpec.layout='paged': its pages belong to all rows; serve with another layout")
  if any(stream.prompts_BP is not None for stream in streams):
    raise ValueError("serve: a stream has prompts of its own; requests bring theirs, so leave prompts_BP out")


class _Engine:
  """Slots on the device, and the programs that fill and advance them."""

  @classmethod
  def make(cls, model, key, transforms, stop, slots, max_prompt_tokens, max_new_tokens):
    """Checks the settings and makes empty slots."""
    engine = cls()
    engine.buckets = _buckets(max_prompt_tokens)
    engine.max_prompt_tokens, engine.max_new_tokens = max_prompt_tokens, max_new_tokens
    longest_1P = jnp.zeros((1, max_prompt_tokens), jnp.int32)
    engine.model, engine.key = model, key
    engine.sampler = Greedy() if key is None else Gumbel()
    decoding.check_request(model, transforms, longest_1P, None, max_new_tokens)
    engine.law = _every_transform(transforms)
    stop = (stop or Stop()).prepared(1, max_new_tokens, model.vocab_size)
    engine.stop_1 = stop
    engine.stop = dataclasses.replace(stop, limits_B=jnp.zeros(slots, jnp.int32))
    engine.laws = engine.law.spread(slots)
    engine.rows = None
    engine.slots = slots
    return engine

  def insert(self, slot: int, number: int, request: Request) -> None:
    """Reads the prompt of a request into a slot and draws its first token."""
    law, limit = self._checked(number, request)
    length = next(bucket for bucket in self.buckets if bucket >= len(request.prompt))
    tokens_1P, valid_1P = decoding.pad_prompts([request.prompt], length)
    row_id = number if request.row_id is None else request.row_id
    keys_1 = decoding.row_keys(self.key, jnp.array([row_id]), 1)
    stop = dataclasses.replace(self.stop_1, limits_B=jnp.array([limit], jnp.int32))
    arrays = (jnp.asarray(tokens_1P), jnp.asarray(valid_1P), keys_1)
    sizes = dict(max_prompt_tokens=self.max_prompt_tokens, max_new_tokens=self.max_new_tokens)
    one = _prefill(self.model, law.spread(1), self.sampler, stop, *arrays, **sizes)
    if self.rows is None:
      self.rows = _empty(self.model, one, self.slots, self.max_prompt_tokens + self.max_new_tokens - 1)
    self.rows, self.laws, limits_R = _insert(
      self.model, self.rows, (self.laws, self.stop.limits_B), one, (law.spread(1), stop.limits_B), slot
    )
    self.stop = dataclasses.replace(self.stop, limits_B=limits_R)

  def _checked(self, number: int, request: Request) -> tuple[Chain, int]:
    if not 0 < len(request.prompt) <= self.max_prompt_tokens:
      raise ValueError(
        f"request {number}: its prompt has {len(request.prompt)} tokens; give 1 to "
        f"max_prompt_tokens={self.max_prompt_tokens}"
      )
    limit = self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
    if not 0 <= limit <= self.max_new_tokens:
      raise ValueError(
        f"request {number}: max_new_tokens={limit}; the engine was made for {self.max_new_tokens}"
      )
    if request.chain is None:
      return self.law, limit
    law = _every_transform(request.chain)
    if jax.tree.structure(law) != jax.tree.structure(self.law):
      mine, theirs = ([each.name for each in some.transforms] for some in (self.law, law))
      raise ValueError(
        f"request {number}: its chain is {theirs}, the engine's {mine}; use the same transforms"
      )
    shared, its = (jax.tree.leaves(each.tables()) for each in (self.law, law))
    if any(not np.array_equal(ours, theirs) for ours, theirs in zip(shared, its, strict=True)):
      raise ValueError(
        f"request {number}: its chain has other tables (tokens, automata) than the engine's, which all rows share; "
        "join automata and give each request its start, or serve such requests apart"
      )
    return law, limit

  def finish_codes(self) -> np.ndarray:
    """Returns int32 [slots]."""
    return np.asarray(self.rows.finish_R)

  def step(self, tokens_per_call: int | None, leave_at_end: bool) -> None:
    """Advances all slots."""
    many = self.max_new_tokens if tokens_per_call is None else tokens_per_call
    until = self.rows.calls + many
    self.rows = advance(
      self.model,
      self.laws,
      self.sampler,
      self.stop,
      self.rows,
      until,
      is_uneven=True,
      leave_at_end=leave_at_end,
    )

  def harvest(self, slot: int, number: int, request: Request, finish: int) -> Finished:
    """Reads one slot."""
    length, *values = (np.asarray(value) for value in _read_slot(self.rows, slot))
    return Finished(number, request, *(value[: int(length)] for value in values), FINISH_REASONS[int(finish)])


def _every_transform(law: Transform) -> Chain:
  """Returns the chain checked, with the transforms that are off: another request may turn them on."""
  return chain(*(each.prepared() for each in chain(law).transforms))


def _buckets(longest: int) -> list[int]:
  """Returns the prompt lengths that are compiled: powers of two, and the longest."""
  sizes, size = [], decoding.SMALLEST_BUCKET
  while size < longest:
    sizes.append(size)
    size *= 2
  return [*sizes, longest]


@functools.partial(jax.jit, static_argnames=("max_prompt_tokens", "max_new_tokens"))
def _prefill(
  model, law, sampler, stop, tokens_1P, valid_1P, keys_1, *, max_prompt_tokens, max_new_tokens
) -> Rows:
  """Reads one prompt into a cache as long as a slot's."""
  # Bucketed prompts are shorter than the longest; their caches and histories are not.
  room = max_prompt_tokens - tokens_1P.shape[1]
  begun = decoding.begin(
    model, law, tokens_1P, valid_1P, keys_1, max_new_tokens, uneven=True, extra_tokens=room
  )
  return open_rows(law, sampler, stop, begun, max_new_tokens)


def _empty(model: LanguageModel, one: Rows, slots: int, capacity: int) -> Rows:
  """Returns slots that have ended, shaped after one row."""

  def widen(leaf: jax.Array) -> jax.Array:
    return jnp.repeat(leaf[:1], slots, axis=0)

  wide = jax.tree.map(widen, one._replace(cache=(), calls=()))
  cache = model.init_cache(slots, capacity, uneven=True)
  ended_R = jnp.full(slots, LENGTH, jnp.int32)
  return wide._replace(cache=cache, calls=jnp.int32(0), finish_R=ended_R)


@functools.partial(jax.jit, donate_argnames="rows")
def _insert(model, rows: Rows, settings: tuple, one: Rows, its_settings: tuple, slot: jax.Array) -> tuple:
  """Writes one row, its chain's parameters and its limit into a slot."""

  def place(stored: jax.Array, new: jax.Array, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stored, new.astype(stored.dtype), slot, axis)

  cache = jax.tree.map(place, rows.cache, one.cache, cache_axes(model))
  bare, new = (each._replace(cache=(), calls=()) for each in (rows, one))
  merged = jax.tree.map(place, bare, new)._replace(cache=cache, calls=rows.calls)
  (laws, limits_R), (law, limit_1) = settings, its_settings
  return merged, laws.map_rows(place, law), place(limits_R, limit_1)


def cache_axes(model: LanguageModel) -> Any:
  """Returns, for each leaf of an uneven cache of the model, which axis counts rows."""

  def shapes(batch: int) -> Any:
    return jax.eval_shape(lambda: model.init_cache(batch, 8, uneven=True))

  def differing(two: jax.ShapeDtypeStruct, three: jax.ShapeDtypeStruct) -> int:
    return next(axis for axis, (a, b) in enumerate(zip(two.shape, three.shape)) if a != b)

  return jax.tree.map(differing, shapes(2), shapes(3))


@jax.jit
def _read_slot(rows: Rows, slot: jax.Array) -> tuple[jax.Array, ...]:
  context = rows.context.take(slot[None])
  tokens_1N = generated_tokens(context, rows.log_probs_RN.shape[1], jnp.int32(0))
  return context.generated_B[0], tokens_1N[0], rows.log_probs_RN[slot], rows.transformed_log_probs_RN[slot]
