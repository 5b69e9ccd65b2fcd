"""Responses that are good or bad by themselves, no pairs: JSON lines that people and programs write.

    {"id": "q1", "prompt": "Name a colour.", "response": "Teal.", "is_desirable": true}
    {"id": "q2", "prompt": [{"role": "user", "content": "Hi"}], "response": "No.", "is_desirable": false,
     "weight": 0.5, "provenance": {"judge": "rules"}}

KTO learns from them one by one (`encode_labelled`, `nr.data.unpaired_batches`), group DPO from all
of a prompt (`encode_groups`, `nr.data.example_batches`).
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nr.data.bad_records import DataError, Quarantine
from nr.data.examples import Encoded, EncodedExample, LengthLimits, TextFormat, encode_responses
from nr.data.json_lines import json_line, read_json_lines, write_json_lines
from nr.data.preferences import (
  PreferencePair,
  Prompt,
  as_tokens,
  freeze_prompt,
  prompt_problem,
  repeated_id,
  tokens_problem,
)
from nr.data.records import problem_of

SCHEMA = {
  "id": "str",
  "prompt": "object",
  "is_desirable": "bool",
  "response": "str?",
  "prompt_tokens": "list[int]?",
  "response_tokens": "list[int]?",
  "weight": "float?",
  "provenance": "object?",
}
ONE_KIND = "no good and bad response of the prompt"


class LabelledResponse(NamedTuple):
  """A response to a prompt, and whether it is wanted.

  Attributes:
    id: unique in its file.
    prompt: text, or messages with "role" and "content".
    is_desirable: whether such a response is to become more probable.
    response: as text; None where only its tokens are known.
    prompt_tokens: ids that stand for the prompt, instead of encoding its text.
    response_tokens: the ids as they were sampled, used as they are (see `PreferencePair`).
    weight: factor of this response's loss, 0 or more.
    provenance: anything JSON holds.
  """

  id: str
  prompt: Prompt
  is_desirable: bool
  response: str | None = None
  prompt_tokens: tuple[int, ...] | None = None
  response_tokens: tuple[int, ...] | None = None
  weight: float = 1.0
  provenance: Mapping[str, Any] = {}


def labelled_from_pairs(pairs: Iterable[PreferencePair]) -> list[LabelledResponse]:
  """Returns the chosen responses of pairs as desirable and the rejected ones as not, ids "<id>/chosen", ..."""
  return [
    LabelledResponse(
      id=f"{pair.id}/{side}",
      prompt=pair.prompt,
      is_desirable=side == "chosen",
      response=getattr(pair, side),
      prompt_tokens=pair.prompt_tokens,
      response_tokens=getattr(pair, f"{side}_tokens"),
      weight=pair.weight,
      provenance=pair.provenance,
    )
    for pair in pairs
    for side in ("chosen", "rejected")
  ]


def _problem(record: Mapping[str, Any]) -> tuple[str, str] | None:
  problem = prompt_problem(record["prompt"])
  if problem:
    return "prompt", problem
  if record.get("response") is None and record.get("response_tokens") is None:
    return "response", "is missing, and so is response_tokens"
  weight = record.get("weight", 1.0)
  if weight is not None and not (math.isfinite(weight) and weight >= 0):
    return "weight", f"is {weight}, not a number of 0 or more"
  if not isinstance(record.get("provenance") or {}, dict):
    return "provenance", f"is a {type(record['provenance']).__name__}, not an object"
  return tokens_problem(record, "prompt_tokens", "response_tokens")


def read_labelled(
  path: str | pathlib.Path, *, on_bad_record: str = "raise", quarantine_path: str | pathlib.Path | None = None
) -> list[LabelledResponse]:
  """Reads a file of labelled responses.

  Args:
    path: JSON lines.
    on_bad_record: "raise", or "quarantine": bad lines are written to `quarantine_path` and counted.
    quarantine_path: JSON lines file for the bad ones.

  Raises:
    DataError: no such file; a bad line, named by file, line and field; an id that occurs twice.
  """
  quarantine = Quarantine(on_bad_record, quarantine_path)
  seen: dict[str, int] = {}

  def check(record: dict[str, Any]) -> tuple[str, str] | None:
    return _problem(record) or repeated_id(record["id"], seen)

  responses = []
  for number, record in read_json_lines(path, SCHEMA, quarantine, check):
    seen[record["id"]] = number
    values = {name: value for name, value in record.items() if value is not None}
    for name in ("prompt_tokens", "response_tokens"):
      values[name] = as_tokens(values.get(name))
    responses.append(LabelledResponse(**{**values, "prompt": freeze_prompt(values["prompt"])}))
  return responses


def write_labelled(path: str | pathlib.Path, responses: Iterable[LabelledResponse]) -> None:
  """Writes labelled responses, whole or not at all; what is empty is left out.

  Raises:
    DataError: a response that `read_labelled` would refuse, named by id and field.
  """
  lines, seen = [], {}
  for number, response in enumerate(responses, start=1):
    record = {name: value for name, value in response._asdict().items() if value not in (None, {})}
    for name in ("prompt_tokens", "response_tokens"):
      if name in record:
        record[name] = list(record[name])
    problem = problem_of(record, SCHEMA) or _problem(record) or repeated_id(response.id, seen)
    if problem:
      raise DataError(
        f"{path}, response {response.id!r}, field {problem[0]!r}: {problem[1]}; correct the response"
      )
    seen[response.id] = number
    if not isinstance(response.prompt, str):
      record["prompt"] = [dict(message) for message in response.prompt]
    lines.append(json_line(record, f"{path}, response {response.id!r}"))
  write_json_lines(path, lines)


def encode_labelled(
  responses: Sequence[LabelledResponse], format: TextFormat, limits: LengthLimits
) -> Encoded:
  """Encodes labelled responses one by one, as `nr.data.examples.encode_responses` does, with their labels.

  Raises:
    DataError: an id that occurs twice, a response that is too long under the policy "raise", or
      nothing left.
  """
  labels: dict[str, bool] = {}
  for response in responses:
    if response.id in labels:
      raise DataError(f"response {response.id!r} occurs twice; give each an id of its own")
    labels[response.id] = response.is_desirable
  found = encode_responses(responses, format, limits)
  return found._replace(examples=[each._replace(labels=(labels[each.id],)) for each in found.examples])


def encode_groups(responses: Sequence[LabelledResponse], format: TextFormat, limits: LengthLimits) -> Encoded:
  """Encodes labelled responses, those of one prompt as one example, all examples of equally many sequences.

  An example has the id of its first response and the mean of the responses' weights. Responses
  of a prompt with none, or nothing but, good ones teach nothing and are left out. The report
  counts responses.

  Raises:
    DataError: as `encode_labelled`.
  """
  found = encode_labelled(responses, format, limits)
  prompts = {each.id: _prompt_key(each) for each in responses}
  groups: dict[str, list[EncodedExample]] = {}
  for example in found.examples:
    groups.setdefault(prompts[example.id], []).append(example)
  mixed = [members for members in groups.values() if has_both_kinds(members)]
  for members in groups.values():
    if not has_both_kinds(members):
      found.report.dropped[ONE_KIND] += [example.id for example in members]
  found.report.kept = sum(map(len, mixed))
  if not mixed:
    raise DataError(f"no example is left: {found.report.text()}; give good and bad responses to one prompt")
  size = max(map(len, mixed))
  return Encoded([join_group(members[0].id, members, size) for members in mixed], found.report)


def _prompt_key(response: LabelledResponse) -> str:
  if response.prompt_tokens is not None:
    return json.dumps(list(map(int, response.prompt_tokens)))
  prompt = response.prompt
  return json.dumps(prompt if isinstance(prompt, str) else [sorted(message.items()) for message in prompt])


def has_both_kinds(members: Sequence[EncodedExample]) -> bool:
  """Whether there is a desirable and an undesirable response among single ones."""
  return len({example.labels for example in members}) == 2


def join_group(id: str, members: Sequence[EncodedExample], size: int) -> EncodedExample:
  """Joins single labelled responses to one prompt into one example.

  Args:
    id: of the example.
    members: of one sequence each; their mean weight is the example's.
    size: number of sequences of the example; those that are missing are empty and have no response.
  """
  missing = size - len(members)
  return EncodedExample(
    id,
    tuple(example.tokens[0] for example in members) + (np.zeros(1, np.int32),) * missing,
    tuple(example.is_response[0] for example in members) + (np.zeros(1, bool),) * missing,
    float(np.mean([example.weight for example in members])),
    tuple(example.labels[0] for example in members) + (False,) * missing,
  )
