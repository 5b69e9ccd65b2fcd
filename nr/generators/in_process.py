"""Text from a model in this process: requests in padded buckets through one sampling program.

    generator = InProcess(network, tokenizer, end_ids=[0], model=fingerprint)
    for sample in generator.generate([Request("a", "the cat", num_samples=4)]): ...
    generator = generator.with_params(params)        # the policy after a step, nothing compiled again

Requests that differ in what is traced (parameters of the chain, limits of tokens, seeds)
share a program; those that differ in what is static (transforms, stop strings, bucket
lengths, samples a prompt) do not. A sample's random key is that of (seed, request id,
index), so the batch that a request falls into does not decide its tokens.
"""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from nr.data.examples import LeftOut, TextFormat
from nr.generation.constraints.stop_strings import cut_text
from nr.generation.decoding import SMALLEST_BUCKET, pad_prompts
from nr.generation.language_models import LanguageModel
from nr.generation.sample import sample
from nr.generation.stopping import FINISH_REASONS, Stop
from nr.generation.transforms.algebra import IDENTITY, Chain, Transform, chain
from nr.generation.transforms.text import parse
from nr.generators.protocol import Cost, Request, Sample, check_requests, failed
from nr.models import parameters
from nr.training import sharding


class _Work(NamedTuple):
  """A request made ready."""

  request: Request
  ids: list[int]
  law: Chain


class InProcess:
  """A generator over a language model of this process.

  Args:
    network: the model; `Network`, or any other language model that drivers accept.
    tokenizer: its tokenizer.
    end_ids: token ids that end a text; None: the tokenizer's end of text. (): none does.
    begin_ids: token ids in front of every prompt that is no chat.
    format: how prompts become tokens, text and chats alike, in place of `begin_ids` and the
      tokenizer's template: give what the model was trained with (`nr.data.examples`).
    name: of the generator, for reports.
    model: fingerprint of the parameters, recorded with every sample.
    batch_size: most rows (prompts times samples) decoded together; a prompt with more
      samples than that is decoded alone.
    law: transforms in front of every request's chain, such as one with learned parameters.
    mesh: devices that the model's parameters lie on; None: where they are.

  Raises:
    ValueError: a batch size below 1.
  """

  def __init__(
    self,
    network: LanguageModel,
    tokenizer: Any,
    *,
    end_ids: Sequence[int] | None = None,
    begin_ids: Sequence[int] = (),
    format: TextFormat | None = None,
    name: str = "in_process",
    model: str = "",
    batch_size: int = 64,
    law: Transform = IDENTITY,
    mesh: jax.sharding.Mesh | None = None,
  ):
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size}: give at least 1 row")
    self.network, self.tokenizer, self.name, self.model = network, tokenizer, name, model
    self.end_ids = (tokenizer.end_of_text_id,) if end_ids is None else tuple(map(int, end_ids))
    self.begin_ids = tuple(map(int, begin_ids))
    self.format, self.batch_size, self.law, self.mesh = format, batch_size, law, mesh
    self._strings: dict[tuple[str, ...], Any] = {}

  @classmethod
  def of_checkpoint(cls, checkpoint: Any, **settings: Any) -> Self:
    """Returns the generator of a `nr.generators.checkpoints.Checkpoint`; settings as above."""
    settings = {"model": checkpoint.name, "name": checkpoint.name, **settings}
    ids = dict(end_ids=checkpoint.end_ids, begin_ids=checkpoint.begin_ids)
    return cls(checkpoint.network, checkpoint.tokenizer, **{**ids, **settings})

  def with_params(self, params: Any, *, model: str | None = None, law: Transform | None = None) -> Self:
    """Returns it with other parameters, which stay on their devices.

    Args:
      params: of the same model, stacked or apart.
      model: their fingerprint; None keeps the one there is.
      law: transforms in front of every chain; None keeps them.
    """
    its_layout = getattr(getattr(self.network, "spec", None), "layers", None)
    if its_layout is not None:
      convert = parameters.unstack_layers if its_layout == "unroll" else parameters.stack_layers
      params = convert(params)
    other = self.__class__.__new__(self.__class__)
    other.__dict__.update(self.__dict__)  # compiled stop strings come along
    other.network = dataclasses.replace(self.network, params=params)
    other.model = self.model if model is None else model
    other.law = self.law if law is None else law
    return other

  def encode(self, prompt: str | tuple) -> list[int]:
    """Returns the token ids that the model reads for a prompt.

    Raises:
      ValueError: a chat for a tokenizer without a template; text it cannot spell.
      LeftOut: text that the format refuses.
    """
    if self.format is not None:
      turns = prompt if isinstance(prompt, str) else tuple(turn._asdict() for turn in prompt)
      return self.format.encode_prompt(turns)
    if isinstance(prompt, str):
      return [*self.begin_ids, *self.tokenizer.encode(prompt)] or [self.tokenizer.end_of_text_id]
    if not hasattr(self.tokenizer, "render_chat"):
      raise ValueError(
        f"{self.name}: its tokenizer has no chat template; give prompts as text, or a tokenizer with one"
      )
    text = self.tokenizer.render_chat([turn._asdict() for turn in prompt])
    return self.tokenizer.encode(text, use_special_tokens=True)

  def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
    """Yields every sample of every request; see `Generator`.

    A prompt too long for the model, or a model whose law breaks (NaN), gives failed samples.

    Raises:
      ValueError: two requests with one id, a chain that is none, a prompt that cannot
        be encoded; names it, before anything is generated.
    """
    groups: dict[Any, list[_Work]] = {}
    refused: list[tuple[Request, str]] = []
    for request in check_requests(requests):
      law = chain(self.law, parsed_chain(request.chain))
      try:
        work = _Work(request, self.encode(request.prompt), law)
        self._check_room(work)
        groups.setdefault(self._program(work), []).append(work)
      except LeftOut as reason:
        refused.append((request, str(reason)))
    for request, problem in refused:
      yield from (failed(request, index, self.model, problem) for index in range(request.num_samples))
    for (_, num_samples, _, length, new_tokens, _), works in groups.items():
      count = max(1, self.batch_size // num_samples)
      for start in range(0, len(works), count):
        yield from self._decode(works[start : start + count], count, length, new_tokens)

  def _check_room(self, work: _Work) -> None:
    needed, most = len(work.ids) + work.request.max_new_tokens - 1, self.network.max_length
    if most is not None and needed > most:
      raise LeftOut(
        f"its prompt of {len(work.ids)} tokens and max_new_tokens={work.request.max_new_tokens} need "
        f"{needed} positions, the model has {most}"
      )

  def _program(self, work: _Work) -> tuple:
    """Returns what requests must share to be decoded together."""
    request, most = work.request, self.network.max_length
    length, new_tokens = _bucket(len(work.ids)), _bucket(request.max_new_tokens)
    exact = None
    if most is not None and len(work.ids) + new_tokens - 1 > most:
      # Rounded up it would not fit: only requests of the very same lengths go with it.
      exact, new_tokens = len(work.ids), request.max_new_tokens
    law = chain(*(each.prepared() for each in work.law.transforms))
    if any(np.ndim(value) for value in law.row_parameters().values()):
      raise ValueError(
        f"request {request.id!r}, chain={request.chain!r}: give one value for each parameter, not one a row"
      )
    tables = tuple(
      (np.asarray(leaf).shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(law.tables())
    )
    return (jax.tree.structure(law), tables), request.num_samples, request.stop, length, new_tokens, exact

  def _stop(self, strings: tuple[str, ...], limits_B: np.ndarray) -> Stop:
    if strings and strings not in self._strings:
      from nr.generation.constraints.stop_strings import stop_strings
      from nr.generation.constraints.vocabulary import token_bytes

      spelled = token_bytes(self.tokenizer)
      spelled += [None] * (self.network.vocab_size - len(spelled))  # models may have more rows than ids
      self._strings[strings] = stop_strings(strings, spelled)
    return Stop(ids_E=list(self.end_ids) or None, strings=self._strings.get(strings), limits_B=limits_B)

  def _decode(self, works: list[_Work], count: int, length: int, new_tokens: int) -> Iterator[Sample]:
    """Decodes one batch; `count` prompts are the most there may be."""
    began = time.perf_counter()
    rows, num_samples = min(count, _power(len(works))), works[0].request.num_samples
    padded = [*works, *[works[-1]] * (rows - len(works))]
    limits = [work.request.max_new_tokens for work in works]
    # Rows that only fill the batch end before their first step.
    limits_B = np.array([*limits, *[0] * (rows - len(works))], np.int32)
    first, *others = (chain(*(each.prepared() for each in work.law.transforms)) for work in padded)
    law = first.map_rows(lambda *values: np.stack([np.asarray(value) for value in values]), *others)
    row_ids_B = np.array([row_id(work.request) for work in padded], np.int32)
    with sharding.context(self.mesh) if self.mesh is not None else contextlib.nullcontext():
      generation = sample(
        self.network,
        *pad_prompts([work.ids for work in padded], length),
        jax.random.key(0),
        chain=law,
        max_new_tokens=new_tokens,
        num_samples=num_samples,
        stop=self._stop(works[0].request.stop, limits_B),
        row_ids_B=row_ids_B,
      )
    host = [np.asarray(leaf) for leaf in generation[:5]]
    share = 1 / (len(works) * num_samples)
    cost = Cost(calls=share, seconds=(time.perf_counter() - began) * share)
    for place, work in enumerate(works):
      for index in range(num_samples):
        yield self._sample(work, index, [leaf[place * num_samples + index] for leaf in host], cost)

  def _sample(self, work: _Work, index: int, row: list[np.ndarray], cost: Cost) -> Sample:
    tokens_N, size, log_probs_N, transformed_N, finish = row
    tokens = tuple(map(int, tokens_N[:size]))
    cost += Cost(prompt_tokens=0 if index else len(work.ids), generated_tokens=len(tokens))
    reason = FINISH_REASONS[int(finish)]
    if reason == "broken":
      problem = f"the law of token {len(tokens)} is NaN or allows nothing; check the parameters and the chain"
      return failed(work.request, index, self.model, problem, cost)
    text = self.tokenizer.decode(list(tokens[:-1] if reason == "stop_id" else tokens))
    cut = cut_text(text, work.request.stop) if work.request.stop else None
    return Sample(
      request_id=work.request.id,
      index=index,
      text=text if cut is None else text[:cut],
      tokens=tokens,
      log_probs=tuple(map(float, log_probs_N[:size])),
      transformed_log_probs=tuple(map(float, transformed_N[:size])),
      finish_reason=reason,
      model=self.model,
      cost=cost,
    )


def row_id(request: Request) -> int:
  """Returns 31 bits of (seed, id) for the random keys.

  Two of n requests share them with probability n^2 / 2^32; such two draw with the same
  noise, each still by its own law.
  """
  digest = hashlib.sha256(f"{request.seed}\0{request.id}".encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:4], "big") >> 1


@functools.lru_cache(maxsize=1024)
def parsed_chain(text: str) -> Chain:
  """Returns the chain that a text describes, kept for the next request with the same."""
  return parse(text)


def _power(count: int) -> int:
  """Returns the smallest power of two that is not below `count`."""
  return 1 << (count - 1).bit_length()


def _bucket(length: int) -> int:
  """Returns the length that a prompt or a text is padded to."""
  return max(SMALLEST_BUCKET, _power(length))
