"""Pairs of responses, one preferred: JSON lines that people and programs write.

    {"id": "q1", "prompt": "Name a colour.", "chosen": "Teal.", "rejected": "Colour."}
    {"id": "q2", "prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello!", "rejected": "No.",
     "weight": 0.5, "provenance": {"round": 2}}

`nr.data.examples` turns pairs into tokens and `nr.data.example_batches` those into
batches. Log-probabilities under a frozen reference can be computed once, kept in a
file of their own and joined by id: they are held to the tokens they belong to.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nr.data.bad_records import DataError, Quarantine
from nr.data.json_lines import json_line, read_json_lines, write_json_lines

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]

SCHEMA = {
  "id": "str",
  "prompt": "object",
  "chosen": "str?",
  "rejected": "str?",
  "prompt_tokens": "list[int]?",
  "chosen_tokens": "list[int]?",
  "rejected_tokens": "list[int]?",
  "weight": "float?",
  "provenance": "object?",
}
REFERENCE_SCHEMA = {"id": "str", "digest": "str", "log_probs": "list[float]"}


class PreferencePair(NamedTuple):
  """Two responses to one prompt.

  Attributes:
    id: unique in its file; other records are joined by it.
    prompt: text, or messages with "role" and "content".
    chosen: the preferred response as text; None where only its tokens are known.
    rejected: the other response.
    prompt_tokens: ids that stand for the prompt, instead of encoding its text.
    chosen_tokens: the ids as they were sampled, end of text included if it was
      sampled. They are used as they are: nothing is appended, for a response that
      was cut at a limit has no end.
    rejected_tokens: likewise.
    weight: factor of this pair's loss, 0 or more.
    provenance: anything JSON holds.
  """

  id: str
  prompt: Prompt
  chosen: str | None = None
  rejected: str | None = None
  prompt_tokens: tuple[int, ...] | None = None
  chosen_tokens: tuple[int, ...] | None = None
  rejected_tokens: tuple[int, ...] | None = None
  weight: float = 1.0
  provenance: Mapping[str, Any] = {}


class ReferenceScore(NamedTuple):
  """Log-probabilities of a pair's responses under a frozen reference.

  Attributes:
    digest: of the tokens they were computed for (`EncodedExample.digest`).
    log_probs: sums over response tokens in nats, one a response: (chosen, rejected).
  """

  digest: str
  log_probs: tuple[float, ...]


def prompt_problem(prompt: Any) -> str | None:
  """Says what is wrong with a prompt that should be text or messages; None for a good one."""
  if isinstance(prompt, str):
    return None
  if not isinstance(prompt, list | tuple):
    return f"is a {type(prompt).__name__}; give text or a list of messages"
  if not prompt:
    return "is an empty list of messages"
  for index, message in enumerate(prompt):
    if not isinstance(message, Mapping):
      return f"message {index} is a {type(message).__name__}, not an object with role and content"
    for name in ("role", "content"):
      if not isinstance(message.get(name), str):
        return f"message {index}: {name!r} is missing or not text"
  return None


def tokens_problem(record: Mapping[str, Any], *fields: str) -> tuple[str, str] | None:
  """Returns (field, problem) of the first field of token ids that holds a negative one."""
  for field in fields:
    if any(token < 0 for token in record.get(field) or ()):
      return field, "holds a negative token id"
  return None


def _pair_problem(record: dict[str, Any]) -> tuple[str, str] | None:
  problem = prompt_problem(record["prompt"])
  if problem:
    return "prompt", problem
  for side in ("chosen", "rejected"):
    if record.get(side) is None and record.get(f"{side}_tokens") is None:
      return side, f"is missing, and so is {side}_tokens"
  weight = record.get("weight", 1.0)
  if weight is not None and not (math.isfinite(weight) and weight >= 0):
    return "weight", f"is {weight}, not a number of 0 or more"
  if not isinstance(record.get("provenance") or {}, dict):
    return "provenance", f"is a {type(record['provenance']).__name__}, not an object"
  return tokens_problem(record, "prompt_tokens", "chosen_tokens", "rejected_tokens")


def freeze_prompt(prompt: str | list[dict[str, str]]) -> Prompt:
  """Returns a prompt read from JSON as text or a tuple of messages."""
  return prompt if isinstance(prompt, str) else tuple(prompt)


def as_tokens(ids: Iterable[int] | None) -> tuple[int, ...] | None:
  """Returns token ids as a tuple, None as None."""
  return None if ids is None else tuple(int(id) for id in ids)


def read_pairs(
  path: str | pathlib.Path, *, on_bad_record: str = "raise", quarantine_path: str | pathlib.Path | None = None
) -> list[PreferencePair]:
  """Reads a file of pairs.

  Args:
    path: JSON lines.
    on_bad_record: "raise", or "quarantine": bad lines are written to `quarantine_path` and counted.
    quarantine_path: JSON lines file for the bad ones.

  Raises:
    DataError: no such file; a bad line, named by file, line and field; an id that
      occurs twice.
  """
  quarantine = Quarantine(on_bad_record, quarantine_path)
  seen: dict[str, int] = {}

  def check(record: dict[str, Any]) -> tuple[str, str] | None:
    return _pair_problem(record) or repeated_id(record["id"], seen)

  pairs = []
  for number, record in read_json_lines(path, SCHEMA, quarantine, check):
    seen[record["id"]] = number
    values = {name: value for name, value in record.items() if value is not None}
    for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens"):
      values[name] = as_tokens(values.get(name))
    values["prompt"] = freeze_prompt(values["prompt"])
    pairs.append(PreferencePair(**values))
  return pairs


def repeated_id(id: str, seen: Mapping[str, int]) -> tuple[str, str] | None:
  """Returns (field, problem) of an id that an earlier line has; `seen` maps ids to their lines."""
  return ("id", f"{id!r} stands on line {seen[id]} already") if id in seen else None


def write_pairs(path: str | pathlib.Path, pairs: Iterable[PreferencePair]) -> None:
  """Writes pairs, whole or not at all; what is empty is left out.

  Raises:
    DataError: a pair that `read_pairs` would refuse, named by id and field.
  """
  lines, seen = [], {}
  for number, pair in enumerate(pairs, start=1):
    record = {name: value for name, value in pair._asdict().items() if value not in (None, {})}
    problem = _pair_problem(record) or repeated_id(pair.id, seen)
    if problem:
      raise DataError(f"{path}, pair {pair.id!r}, field {problem[0]!r}: {problem[1]}; correct the pair")
    seen[pair.id] = number
    if not isinstance(pair.prompt, str):
      record["prompt"] = [dict(message) for message in pair.prompt]
    lines.append(json_line(record, f"{path}, pair {pair.id!r}"))
  write_json_lines(path, lines)


def write_reference_scores(path: str | pathlib.Path, scores: Mapping[str, ReferenceScore]) -> None:
  """Writes reference log-probabilities by id, whole or not at all."""
  write_json_lines(
    path,
    (
      json_line({"id": id, "digest": score.digest, "log_probs": list(score.log_probs)}, f"{path}, id {id!r}")
      for id, score in scores.items()
    ),
  )


def read_reference_scores(path: str | pathlib.Path) -> dict[str, ReferenceScore]:
  """Reads what `write_reference_scores` wrote.

  Raises:
    DataError: no such file, or a bad line, named by file, line and field.
  """
  scores: dict[str, ReferenceScore] = {}
  seen: dict[str, int] = {}
  check = lambda record: repeated_id(record["id"], seen)  # noqa: E731
  for number, record in read_json_lines(path, REFERENCE_SCHEMA, Quarantine(), check):
    seen[record["id"]] = number
    scores[record["id"]] = ReferenceScore(record["digest"], tuple(map(float, record["log_probs"])))
  return scores
