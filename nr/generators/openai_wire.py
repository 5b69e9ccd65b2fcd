"""What servers with OpenAI's interface are asked, and what their answers say.

Shared by the client (`openai_compatible`) and by batch files (`batch_file`): the
same request gives the same body, and the same body's answer the same samples.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nr.generators.protocol import Cost, Request, Sample, failed
from nr.names import unknown

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# The order in which servers apply them (vLLM; OpenAI knows the first, second and last).
_FIELDS = {
  "frequency_presence": {"frequency": "frequency_penalty", "presence": "presence_penalty"},
  "temperature": {"tau": "temperature"},
  "min_p": {"p": "min_p"},
  "top_k": {"k": "top_k"},
  "top_p": {"p": "top_p"},
}


class AnswerError(ValueError):
  """An answer that is none: not of the form, or (`is_final`: so it would be again) not as many texts as asked for."""

  def __init__(self, message: str, *, is_final: bool = False):
    super().__init__(message)
    self.is_final = is_final


@dataclasses.dataclass(frozen=True)
class Wire:
  """How requests are put to a server.

  Attributes:
    model: name by which the server knows its model.
    use_chat: send prompts that are plain text as a user's turn; chats always go as chats.
    use_log_probs: ask for the log-probability of each token.
    body: further fields of every request, such as {"ignore_eos": True}.
    max_tokens_field: of chats; OpenAI's newer models want "max_completion_tokens".
  """

  model: str
  use_chat: bool = False
  use_log_probs: bool = False
  body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  max_tokens_field: str = "max_tokens"

  def path_of(self, request: Request) -> str:
    """Returns the path that the request goes to."""
    is_chat = self.use_chat or not isinstance(request.prompt, str)
    return CHAT if is_chat else COMPLETIONS

  def body_of(self, request: Request, indices: Sequence[int]) -> dict[str, Any]:
    """Returns the body that asks for the samples `indices` of a request.

    Temperature and top-p are always spelled out, since servers have defaults of their own.

    Raises:
      ValueError: a chain that servers do not know; names the transform.
    """
    is_chat = self.path_of(request) == CHAT
    body = {"model": self.model, "temperature": 1.0, "top_p": 1.0, "n": len(indices)}
    body["seed"] = seed_of(request, indices[0])
    body[self.max_tokens_field if is_chat else "max_tokens"] = request.max_new_tokens
    if is_chat:
      turns = [("user", request.prompt)] if isinstance(request.prompt, str) else request.prompt
      body["messages"] = [{"role": role, "content": content} for role, content in turns]
    else:
      body["prompt"] = request.prompt
    if request.stop:
      body["stop"] = list(request.stop)
    if self.use_log_probs:
      body["logprobs"] = True if is_chat else 0
    return body | sampling_fields(request) | dict(self.body)

  def samples_of(
    self, request: Request, indices: Sequence[int], answer: Any, cost: Cost, extras: Mapping[str, Any] = {}
  ) -> list[Sample]:
    """Returns the samples `indices` of an answer.

    Args:
      request: what was asked.
      indices: samples that were asked for.
      answer: the answer's JSON.
      cost: calls and seconds of all of them; tokens are read from the answer.
      extras: recorded with every sample.

    Raises:
      AnswerError: not of the form, or another number of texts.
    """
    try:
      return self._samples_of(request, indices, answer, cost, extras)
    except AnswerError:
      raise
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
      told = json.dumps(answer)[:200]
      raise AnswerError(f"the answer is not of the form ({error!r}): {told}") from error

  def _samples_of(
    self, request: Request, indices: Sequence[int], answer: Any, cost: Cost, extras: Mapping[str, Any]
  ) -> list[Sample]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
      raise AnswerError(f"the answer has no list of choices: {json.dumps(answer)[:200]}")
    if len(choices) != len(indices):
      raise AnswerError(
        f"{len(choices)} texts for n={len(indices)}; for a server that does not know n, set samples_per_call=1",
        is_final=True,
      )
    choices = sorted(choices, key=lambda choice: choice.get("index", 0))
    usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
    read, drawn = (int(usage.get(field) or 0) for field in ("prompt_tokens", "completion_tokens"))
    share = 1 / len(indices)
    samples = []
    for place, (index, choice) in enumerate(zip(indices, choices)):
      text, token_texts, tokens, log_probs = _read_choice(choice)
      # A server tells how many tokens all texts have together.
      even = drawn // len(indices) + (place < drawn % len(indices))
      generated = even if log_probs is None else len(log_probs)
      its_cost = Cost(0 if place else read, generated, cost.calls * share, cost.seconds * share)
      if text is None:
        samples.append(failed(request, index, self.model, f"no text: {json.dumps(choice)[:200]}", its_cost))
        continue
      samples.append(
        Sample(
          request_id=request.id,
          index=index,
          text=text,
          tokens=tokens,
          log_probs=log_probs,
          finish_reason=str(choice.get("finish_reason") or "unknown"),
          model=str(answer.get("model") or self.model),
          cost=its_cost,
          extras={**extras, **({"token_texts": token_texts} if token_texts else {})},
        )
      )
    return samples


def _read_choice(choice: dict) -> tuple[str | None, list[str] | None, tuple | None, tuple | None]:
  """Returns (text, token texts, token ids, log-probabilities) of one choice, None for what it lacks."""
  message, told = choice.get("message"), choice.get("logprobs")
  text = choice.get("text") if message is None else message.get("content")
  # A character cut in half (a lone surrogate) becomes U+FFFD, as where tokenizers decode: UTF-8 cannot write it.
  text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(text, str) else None
  if not isinstance(told, dict):
    return text, None, None, None
  if isinstance(told.get("content"), list):
    pieces = [entry.get("token") for entry in told["content"]]
    values = [entry.get("logprob") for entry in told["content"]]
  else:
    pieces, values = told.get("tokens"), told.get("token_logprobs")
  if not pieces or not values or len(pieces) != len(values):
    return text, None, None, None
  # JSON has no -Infinity, but servers write it.
  if any(value is None or not math.isfinite(value) for value in values):
    return text, None, None, None
  # vLLM's return_tokens_as_token_ids.
  prefix = "token_id:"
  if all(piece.startswith(prefix) for piece in pieces):
    return text, None, tuple(int(piece.removeprefix(prefix)) for piece in pieces), tuple(map(float, values))
  return text, pieces, None, tuple(map(float, values))


def sampling_fields(request: Request) -> dict[str, Any]:
  """Returns the chain of a request as the fields that servers know.

  Raises:
    ValueError: a transform or a setting that they do not, or another order than theirs.
  """
  if not request.chain.strip():
    return {}
  from nr.generation.transforms.text import parse

  order, fields, places = list(_FIELDS), {}, []
  for each in parse(request.chain).transforms:
    if each.name not in _FIELDS:
      raise ValueError(f"request {request.id!r}: " + unknown("transform of servers", each.name, order))
    known, defaults = _FIELDS[each.name], {field.name: field.default for field in dataclasses.fields(each)}
    for name, default in defaults.items():
      if name in known:
        fields[known[name]] = np.asarray(getattr(each, name)).item()
      elif getattr(each, name) != default:
        raise ValueError(
          f"request {request.id!r}, {each.name}.{name}: servers know no such setting; leave it out"
        )
    places.append(order.index(each.name))
  if places != sorted(set(places)):
    raise ValueError(
      f"request {request.id!r}, chain={request.chain!r}: servers apply each once and in the order {', '.join(order)}"
    )
  return fields


def seed_of(request: Request, index: int) -> int:
  """Returns 31 bits of (seed, id, index): the seed that a server is given."""
  digest = hashlib.sha256(f"{request.seed}\0{request.id}\0{index}".encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:4], "big") >> 1
