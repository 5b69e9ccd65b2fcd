"""Prompts and responses as tokens: pairs for preference learning, single responses for fine-tuning.

A prompt and a response are encoded each by itself and then joined, as they are when a
model answers: a token never spans the border. What does not fit is shortened, left out
or refused as the policy says, and always counted; a response is never cut, so that its
end of text cannot be lost.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from absl import logging

from nr.data.bad_records import DataError
from nr.data.preferences import PreferencePair, Prompt
from nr.names import unknown

POLICIES = ("truncate_prompt", "drop", "raise")


class TextFormat(Protocol):
  """How prompts and responses become ids.

  Attributes:
    begin_ids: ids that every prompt begins with (begin of text); shortening keeps them.
    end_id: id that ends a response.
  """

  begin_ids: tuple[int, ...]
  end_id: int

  def encode_prompt(self, prompt: Prompt) -> list[int]:
    """Returns the ids of a prompt, `begin_ids` and what opens the answer included."""
    ...

  def encode_response(self, text: str) -> list[int]:
    """Returns the ids of a response without its end."""
    ...


@dataclasses.dataclass(frozen=True)
class PlainText:
  """Prompts and responses as plain text, nothing between them.

  Attributes:
    tokenizer: encodes both.
    begin_ids: ids in front of every prompt.
    end_id: ends a response; the tokenizer's end of text when None is given.
  """

  tokenizer: Any
  begin_ids: tuple[int, ...] = ()
  end_id: int | None = None

  def __post_init__(self):
    if self.end_id is None:
      object.__setattr__(self, "end_id", self.tokenizer.end_of_text_id)

  def encode_prompt(self, prompt: Prompt) -> list[int]:
    """Returns `begin_ids` and the ids of a text, end of text where there are none; refuses messages.

    Raises:
      DataError: the prompt is a conversation.
    """
    if not isinstance(prompt, str):
      raise DataError(
        "prompt is a conversation and the format is plain text; give nr.data.chat.ChatFormat or text prompts"
      )
    return [*self.begin_ids, *self.tokenizer.encode(prompt)] or [self.tokenizer.end_of_text_id]

  def encode_response(self, text: str) -> list[int]:
    """Returns the ids of a response without its end."""
    return self.tokenizer.encode(text)


@dataclasses.dataclass(frozen=True)
class LengthLimits:
  """What fits, and what becomes of the rest.

  Attributes:
    max_length: most tokens of a prompt with one response and its end.
    max_prompt_length: most tokens of a prompt; None for no limit of its own.
    when_long: "truncate_prompt": the oldest prompt tokens after `begin_ids` go, alike
      for both sides of a pair, and an example whose response alone does not fit is
      left out; "drop": the example is left out; "raise".

  Raises:
    DataError: an unknown policy, or a limit that leaves no room.
  """

  max_length: int
  max_prompt_length: int | None = None
  when_long: str = "truncate_prompt"

  def __post_init__(self):
    if self.when_long not in POLICIES:
      raise DataError(unknown("when_long", self.when_long, POLICIES))
    if self.max_length < 2:
      raise DataError(f"max_length={self.max_length} must be at least 2: a prompt token and a response token")
    if self.max_prompt_length is not None and self.max_prompt_length < 1:
      raise DataError(f"max_prompt_length={self.max_prompt_length} must be at least 1, or None")


class EncodedExample(NamedTuple):
  """Token sequences that belong together: (chosen, rejected), one alone, or all of a prompt.

  Attributes:
    id: of the record.
    tokens: one int32 array [n] a sequence, prompt included.
    is_response: bool arrays of the same lengths: the tokens to be learnt.
    weight: factor of the example's loss.
    labels: whether each sequence is desirable; () where nothing is said of that.
  """

  id: str
  tokens: tuple[np.ndarray, ...]
  is_response: tuple[np.ndarray, ...]
  weight: float = 1.0
  labels: tuple[bool, ...] = ()

  @property
  def digest(self) -> str:
    """Hash of the tokens and of which are responses, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for ids, mask in zip(self.tokens, self.is_response):
      digest.update(f"{len(ids)}\0".encode() + ids.astype("<i4").tobytes() + np.packbits(mask).tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass
class EncodingReport:
  """What became of the records.

  Attributes:
    total: records read.
    kept: examples made.
    shortened: of these, how many lost prompt tokens.
    without_end: responses given as tokens that do not close with the end id.
    dropped: reason -> ids of the records left out.
  """

  total: int = 0
  kept: int = 0
  shortened: int = 0
  without_end: int = 0
  dropped: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

  def text(self) -> str:
    """Returns one line, such as "kept 8 of 10, 1 with a shortened prompt; left out 2 (identical: 2, as p1)"."""
    line = f"kept {self.kept} of {self.total}"
    if self.shortened:
      line += f", {self.shortened} with a shortened prompt"
    if self.without_end:
      line += f", {self.without_end} sampled responses without an end"
    left_out = [f"{reason}: {len(ids)}, as {ids[0]}" for reason, ids in sorted(self.dropped.items())]
    return line + (f"; left out {self.total - self.kept} ({'; '.join(left_out)})" if left_out else "")


class Encoded(NamedTuple):
  """Examples, and the report of how they came about."""

  examples: list[EncodedExample]
  report: EncodingReport


class LeftOut(DataError):
  """A record of which no example can be made; its text is the reason under which it is counted."""


Record = TypeVar("Record")


def encode_all(
  records: Iterable[Record],
  encode_one: Callable[[Record, EncodingReport], EncodedExample],
  identify: Callable[[Record], str],
) -> Encoded:
  """Encodes records, counting those that `encode_one` leaves out by raising `LeftOut`.

  Raises:
    DataError: nothing is left.
  """
  report, examples = EncodingReport(), []
  for record in records:
    report.total += 1
    try:
      examples.append(encode_one(record, report))
    except LeftOut as reason:
      report.dropped[str(reason)].append(identify(record))
  report.kept = len(examples)
  if not examples:
    raise DataError(f"no example is left: {report.text()}; give more records, or raise max_length")
  (logging.warning if report.dropped else logging.info)("examples: %s", report.text())
  return Encoded(examples, report)


def encode_pairs(pairs: Iterable[PreferencePair], format: TextFormat, limits: LengthLimits) -> Encoded:
  """Encodes preference pairs.

  Responses given as text get the end id behind them; those given as tokens are used
  as they were sampled. A pair is left out, and counted, when its two responses are
  identical, one is empty, or the prompt has no token (the first response token
  would follow nothing).

  Args:
    pairs: from `nr.data.preferences.read_pairs`.
    format: text to ids.
    limits: lengths and policy.

  Raises:
    DataError: a pair that is too long under the policy "raise", or nothing left.
  """

  def encode_one(pair: PreferencePair, report: EncodingReport) -> EncodedExample:
    prompt = _prompt_ids(pair.prompt, pair.prompt_tokens, format)
    chosen = _response_ids(pair.chosen, pair.chosen_tokens, format, report)
    rejected = _response_ids(pair.rejected, pair.rejected_tokens, format, report)
    if chosen == rejected:
      raise LeftOut("identical responses")
    return join(pair.id, prompt, (chosen, rejected), pair.weight, format, limits, report)

  return encode_all(pairs, encode_one, lambda pair: pair.id)


class Response(NamedTuple):
  """One response to a prompt, to be learnt (supervised fine-tuning); fields as in `PreferencePair`."""

  id: str
  prompt: Prompt
  response: str | None = None
  prompt_tokens: tuple[int, ...] | None = None
  response_tokens: tuple[int, ...] | None = None
  weight: float = 1.0


def encode_responses(responses: Iterable[Response], format: TextFormat, limits: LengthLimits) -> Encoded:
  """Encodes single responses, as `encode_pairs` does pairs."""

  def encode_one(record: Response, report: EncodingReport) -> EncodedExample:
    prompt = _prompt_ids(record.prompt, record.prompt_tokens, format)
    response = _response_ids(record.response, record.response_tokens, format, report)
    return join(record.id, prompt, (response,), record.weight, format, limits, report)

  return encode_all(responses, encode_one, lambda record: record.id)


def chosen_responses(pairs: Iterable[PreferencePair]) -> list[Response]:
  """Returns the preferred responses of pairs, to be learnt on their own."""
  return [
    Response(pair.id, pair.prompt, pair.chosen, pair.prompt_tokens, pair.chosen_tokens, pair.weight)
    for pair in pairs
  ]


def _prompt_ids(prompt: Prompt, tokens: Sequence[int] | None, format: TextFormat) -> list[int]:
  ids = format.encode_prompt(prompt) if tokens is None else list(tokens)
  if not ids:
    raise LeftOut("empty prompt")
  return ids


def _response_ids(
  text: str | None, tokens: Sequence[int] | None, format: TextFormat, report: EncodingReport
) -> list[int]:
  """Returns the ids of a response. Raises LeftOut for an empty one."""
  if tokens is None:
    ids = format.encode_response(text or "")
    if not ids:
      raise LeftOut("empty response")
    return ids if ids[-1] == format.end_id else [*ids, format.end_id]
  ids = list(tokens)
  if not ids or ids == [format.end_id]:
    raise LeftOut("empty response")
  report.without_end += ids[-1] != format.end_id
  return ids


def join(
  id: str,
  prompt: list[int],
  responses: Sequence[list[int]],
  weight: float,
  format: TextFormat,
  limits: LengthLimits,
  report: EncodingReport,
  is_response: Sequence[Sequence[bool]] | None = None,
) -> EncodedExample:
  """Joins a prompt and its responses into an example within the limits.

  Args:
    id: of the record.
    prompt: its ids.
    responses: ids of what follows it, one a sequence.
    weight: of the example.
    format: for `begin_ids`.
    limits: lengths and policy.
    report: gets the count of shortened prompts.
    is_response: which of the ids that follow are learnt; all when None.

  Raises:
    LeftOut: too long, and to be left out.
    DataError: too long, and to be refused.
  """
  longest = max(map(len, responses))
  room = min(limits.max_length - longest, limits.max_prompt_length or limits.max_length)
  if len(prompt) > room:
    begin = format.begin_ids if tuple(prompt[: len(format.begin_ids)]) == tuple(format.begin_ids) else ()
    if limits.when_long == "raise":
      raise DataError(
        f"example {id!r}: {len(prompt)} tokens of prompt and {longest} of response do not fit "
        f"max_length={limits.max_length}, max_prompt_length={limits.max_prompt_length}; raise them or set when_long"
      )
    if limits.when_long == "drop":
      raise LeftOut("too long")
    if room <= len(begin):  # at least one token of the prompt proper stays
      raise LeftOut("response too long")
    prompt = [*begin, *prompt[len(prompt) - (room - len(begin)) :]]
    report.shortened += 1
  masks = is_response or [[True] * len(ids) for ids in responses]
  return EncodedExample(
    id,
    tuple(np.array([*prompt, *ids], np.int32) for ids in responses),
    tuple(np.array([*[False] * len(prompt), *mask], bool) for mask in masks),
    weight,
  )


def reference_rows(examples: Sequence[EncodedExample], scores: Mapping[str, Any]) -> np.ndarray:
  """Returns reference log-probabilities [N, S] float32 of examples, joined by id.

  Args:
    examples: N encoded examples of S sequences.
    scores: id -> `nr.data.preferences.ReferenceScore`.

  Raises:
    DataError: an id without a score, or a score computed for other tokens.
  """
  rows = []
  for example in examples:
    score = scores.get(example.id)
    if score is None:
      raise DataError(f"reference scores: id {example.id!r} is missing; compute them for these pairs again")
    if score.digest != example.digest or len(score.log_probs) != len(example.tokens):
      raise DataError(
        f"reference scores: id {example.id!r} was scored for other tokens (digest {score.digest}, here "
        f"{example.digest}); compute them again with this tokenizer and these limits"
      )
    rows.append(score.log_probs)
  return np.array(rows, np.float32)
