"""Conversations to learn from: the assistant's turns, their ends included, as examples.

encoded = encode_conversations(read_conversations(path), ChatFormat(tokenizer), LengthLimits(2048))
batches = packed_batches(encoded.examples, 16, 2048, seed=0)
"""

import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nr.data.bad_records import DataError, Quarantine
from nr.data.chat import ASSISTANT, ChatFormat
from nr.data.examples import Encoded, EncodedExample, EncodingReport, LeftOut, LengthLimits, encode_all, join
from nr.data.json_lines import read_json_lines
from nr.data.preferences import Message, PreferencePair, prompt_problem, repeated_id


class Conversation(NamedTuple):
  """A conversation to learn from.

  Attributes:
    id: unique in its file.
    messages: with "role" and "content".
    weight: factor of its loss.
  """

  id: str
  messages: tuple[Message, ...]
  weight: float = 1.0


def read_conversations(
  path: str | pathlib.Path, *, on_bad_record: str = "raise", quarantine_path: str | pathlib.Path | None = None
) -> list[Conversation]:
  """Reads JSON lines {"id", "messages", "weight"}; errors as in `nr.data.preferences.read_pairs`."""
  schema = {"id": "str", "messages": "list[object]", "weight": "float?"}
  quarantine = Quarantine(on_bad_record, quarantine_path)
  seen: dict[str, int] = {}

  def check(record: dict[str, Any]) -> tuple[str, str] | None:
    problem = prompt_problem(record["messages"])
    if problem:
      return "messages", problem
    weight = record.get("weight")
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
      return "weight", f"is {weight}, not a number of 0 or more"
    return repeated_id(record["id"], seen)

  found = []
  for number, record in read_json_lines(path, schema, quarantine, check):
    seen[record["id"]] = number
    weight = record.get("weight")
    found.append(Conversation(record["id"], tuple(record["messages"]), 1.0 if weight is None else weight))
  return found


def encode_conversations(
  conversations: Iterable[Conversation], format: ChatFormat, limits: LengthLimits, *, turns: str = "all"
) -> Encoded:
  """Encodes conversations for fine-tuning: the assistant's turns are learnt, with their ends.

  Of one that is too long, only tokens before the first turn to be learnt can go.

  Args:
    conversations: to learn from.
    format: template and tokenizer.
    limits: lengths and policy.
    turns: "all" of the assistant's, or the "last".

  Raises:
    DataError: as `ChatFormat.encode_turns`, with the id; or nothing left.
  """

  def encode_one(record: Conversation, report: EncodingReport) -> EncodedExample:
    try:
      ids, is_said = format.encode_turns(record.messages, turns)
    except LeftOut:
      raise
    except DataError as error:
      raise DataError(f"conversation {record.id!r}, {error}") from error
    lead = is_said.index(True)
    return join(
      record.id, ids[:lead], (ids[lead:],), record.weight, format, limits, report, (is_said[lead:],)
    )

  return encode_all(conversations, encode_one, lambda record: record.id)


def pair_of_conversations(
  id: str, chosen: Sequence[Message], rejected: Sequence[Message], weight: float = 1.0
) -> PreferencePair:
  """Returns the pair of two conversations that differ in the assistant's last message (UltraFeedback's layout).

  Raises:
    DataError: they differ elsewhere, or do not end with the assistant.
  """
  for side, messages in (("chosen", chosen), ("rejected", rejected)):
    problem = prompt_problem(list(messages))
    if not problem and messages[-1]["role"] != ASSISTANT:
      problem = "does not end with the assistant's turn"
    if problem:
      raise DataError(f"pair {id!r}, field {side!r}: {problem}")
  if list(chosen[:-1]) != list(rejected[:-1]):
    raise DataError(
      f"pair {id!r}: chosen and rejected differ before the last message; give one prompt for both"
    )
  if len(chosen) < 2:
    raise DataError(f"pair {id!r}, field 'chosen': holds no prompt before the assistant's turn")
  return PreferencePair(id, tuple(chosen[:-1]), chosen[-1]["content"], rejected[-1]["content"], weight=weight)
