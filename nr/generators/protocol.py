"""Where text comes from: requests in, samples out, whatever stands behind.

Every kind (in_process, openai_compatible, batch_file, scripted) answers every
(request, index) exactly once. What failed comes as a sample with `error`, never as
an exception that loses the others, and never as an empty text.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

FAILED = "error"
COMPLETE = ("stop_id", "stop_string", "stop")
"""Reasons for which a text ended by itself, not at the limit of tokens."""


class Message(NamedTuple):
  """One turn of a chat.

  Attributes:
    role: "system", "user" or "assistant".
    content: text of the turn.
  """

  role: str
  content: str


@dataclasses.dataclass(frozen=True)
class Request:
  """Samples wanted of one prompt.

  Attributes:
    id: names the request; unique among those given together. Together with `seed` and
      the sample's index it decides the random key.
    prompt: text to continue, or the turns of a chat to answer.
    num_samples: samples, indices 0 .. num_samples - 1.
    max_new_tokens: most tokens of a sample, end of text included.
    chain: transforms as text, see `nr.generation.transforms.text`; "": the model's own law.
    stop: texts that end a sample and are left out of it.
    seed: of the random keys.

  Raises:
    ValueError: an empty prompt or id, or numbers below 1.
  """

  id: str
  prompt: str | tuple[Message, ...]
  num_samples: int = 1
  max_new_tokens: int = 128
  chain: str = ""
  stop: tuple[str, ...] = ()
  seed: int = 0

  def __post_init__(self):
    if not isinstance(self.id, str) or not self.id:
      raise ValueError(f"Request.id={self.id!r}: give a text that names the request")
    if not isinstance(self.prompt, str):
      turns = tuple(
        Message(*turn) if not isinstance(turn, Mapping) else Message(**turn) for turn in self.prompt
      )
      object.__setattr__(self, "prompt", turns)
      if not turns:
        raise ValueError(f"request {self.id!r}: its chat has no turn; give at least one")
    object.__setattr__(self, "stop", tuple(self.stop))
    for field in ("num_samples", "max_new_tokens"):
      if getattr(self, field) < 1:
        raise ValueError(f"request {self.id!r}, {field}={getattr(self, field)}: give at least 1")


@dataclasses.dataclass(frozen=True)
class Cost:
  """What text cost; costs add.

  Attributes:
    prompt_tokens: tokens read. Samples that share a reading carry it once, at index 0.
    generated_tokens: tokens drawn.
    calls: requests to a server, or calls of a model's driver; shares of one may be fractions.
    seconds: time taken, shared out among what was made together.
  """

  prompt_tokens: int = 0
  generated_tokens: int = 0
  calls: float = 0
  seconds: float = 0.0

  def __add__(self, other: "Cost") -> "Cost":
    """Returns the sum."""
    return Cost(*(mine + its for mine, its in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


@dataclasses.dataclass(frozen=True)
class Sample:
  """One text that was generated, or why there is none.

  Attributes:
    request_id: of the request.
    index: which of its samples.
    text: without stop strings and end of text; None when it failed.
    tokens: ids, the stop id included; None where the source does not tell.
    log_probs: nats of each token under the model at temperature 1, nothing truncated; None
      where the source does not tell.
    transformed_log_probs: nats of each token under the law it was drawn from; None likewise.
    finish_reason: of `nr.generation.stopping.FINISH_REASONS` or the server's word; "error"
      when it failed.
    model: fingerprint or name of what made it.
    cost: of this sample.
    extras: whatever else the source tells.
    error: why there is no text; None when there is.
  """

  request_id: str
  index: int
  text: str | None
  tokens: tuple[int, ...] | None = None
  log_probs: tuple[float, ...] | None = None
  transformed_log_probs: tuple[float, ...] | None = None
  finish_reason: str = "stop_id"
  model: str = ""
  cost: Cost = Cost()
  extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  error: str | None = None

  @property
  def is_complete(self) -> bool:
    """Whether the text ended by itself: at a stop id or stop string, not at the limit of tokens."""
    return self.finish_reason in COMPLETE


@runtime_checkable
class Generator(Protocol):
  """Where text comes from.

  Attributes:
    name: of the source, for reports.
  """

  name: str

  def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
    """Yields every (request, index) exactly once, in any order; failures as samples with `error`.

    Raises:
      ValueError: a mistake in a request, before anything is generated for it.
    """
    ...


def failed(request: Request, index: int, model: str, error: str, cost: Cost | None = None) -> Sample:
  """Returns the sample that says why there is no text."""
  return Sample(request.id, index, None, finish_reason=FAILED, model=model, cost=cost or Cost(), error=error)


def check_requests(requests: Iterable[Request]) -> list[Request]:
  """Returns the requests as a list.

  Raises:
    ValueError: two with the same id; names it.
  """
  requests, seen = list(requests), set()
  for request in requests:
    if request.id in seen:
      raise ValueError(f"Request.id={request.id!r} is given twice: give each request an id of its own")
    seen.add(request.id)
  return requests


def samples_by_request(requests: Sequence[Request], samples: Iterable[Sample]) -> list[list[Sample]]:
  """Returns the samples of each request, in the order of the requests and of the indices.

  Raises:
    ValueError: a sample that nobody asked for, one that came twice, or one that is missing.
  """
  found: dict[str, dict[int, Sample]] = {request.id: {} for request in requests}
  for sample in samples:
    if sample.request_id not in found:
      raise ValueError(f"a sample of request {sample.request_id!r}, which nobody asked for")
    if sample.index in found[sample.request_id]:
      raise ValueError(f"sample {sample.index} of request {sample.request_id!r} came twice")
    found[sample.request_id][sample.index] = sample
  for request in requests:
    if sorted(found[request.id]) != list(range(request.num_samples)):
      missing = sorted(set(range(request.num_samples)) ^ set(found[request.id]))
      raise ValueError(f"request {request.id!r}: samples {missing} are missing or too many")
  return [[found[request.id][index] for index in range(request.num_samples)] for request in requests]


def to_json(record: Request | Sample) -> dict[str, Any]:
  """Returns a request or sample as an object that JSON writes."""
  fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
  if isinstance(record, Sample):
    return fields | {"cost": dataclasses.asdict(record.cost), "extras": dict(record.extras)}
  if not isinstance(record.prompt, str):
    fields["prompt"] = [turn._asdict() for turn in record.prompt]
  return fields


def sample_from_json(fields: Mapping[str, Any]) -> Sample:
  """Returns the sample that `to_json` wrote. Raises ValueError where fields are missing or unknown."""
  try:
    fields = dict(fields) | {"cost": Cost(**fields["cost"])}
    for name in ("tokens", "log_probs", "transformed_log_probs"):
      fields[name] = None if fields[name] is None else tuple(fields[name])
    return Sample(**fields)
  except (KeyError, TypeError) as error:
    raise ValueError(f"no sample ({error!r}); write it with to_json") from error


def request_hash(request: Request, model: str) -> str:
  """Returns the sha256 (hex) of all that decides what a request is answered with, its id included."""
  text = json.dumps([model, to_json(request)], sort_keys=True, ensure_ascii=True)
  return hashlib.sha256(text.encode("ascii")).hexdigest()


def total_cost(samples: Iterable[Sample]) -> Cost:
  """Returns the cost of all."""
  return sum((sample.cost for sample in samples), Cost())
