"""Instructions from a user's file, with the answer that a person gave where there is one.

    fields = InstructionFields(input="instances.0.input", reference="instances.0.output")
    instructions = read_instructions("seed_tasks.jsonl.gz", fields)

Fields are found by their paths, numbers standing for places in lists, so that files need
not be rewritten.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from nr.data.bad_records import DataError, Quarantine
from nr.data.file_sources import FileRecord, json_records, parquet_records
from nr.spec import Spec

SUFFIXES = (".jsonl.gz", ".jsonl", ".json", ".parquet")


@dataclasses.dataclass(frozen=True)
class InstructionFields(Spec):
  """Where a record holds what; paths such as "instances.0.output".

  Attributes:
    instruction: text, required.
    input: text that is put behind the instruction, a blank line between; "": none has one.
    reference: an answer; "": none has one.
    id: names the instruction; records without it are named by file and place.
  """

  instruction: str = "instruction"
  input: str = ""
  reference: str = ""
  id: str = "id"

  def __post_init__(self):
    if not self.instruction:
      raise ValueError("instruction='': name the field that holds the instruction")


class Instruction(NamedTuple):
  """Something to answer.

  Attributes:
    id: unique in its file.
    text: the instruction, with its input.
    reference: an answer to it; None where there is none.
  """

  id: str
  text: str
  reference: str | None = None


def read_instructions(
  path: str | pathlib.Path,
  fields: InstructionFields | None = None,
  *,
  on_bad_record: str = "raise",
  quarantine_path: str | pathlib.Path | None = None,
) -> list[Instruction]:
  """Reads instructions.

  Args:
    path: JSON lines (.jsonl, .jsonl.gz), a JSON list (.json) or Parquet.
    fields: where a record holds what.
    on_bad_record: "raise", or "quarantine": bad records are written to `quarantine_path` and counted.
    quarantine_path: JSON lines file for the bad ones.

  Raises:
    DataError: no such file, or one of another kind; a bad record, named by file, place and
      field; an id that occurs twice; no instruction.
  """
  path, fields = pathlib.Path(path).expanduser(), fields or InstructionFields()
  quarantine = Quarantine(on_bad_record, quarantine_path)
  found: list[Instruction] = []
  seen: dict[str, str] = {}
  for record in _records(path, fields, quarantine):
    problem = _problem(record, fields)
    own = _at(record.fields, fields.id) if fields.id else None
    id = record.id if own is None else str(own)
    if problem is None and id in seen:
      problem = fields.id or "id", f"{id!r} stands on {seen[id]} already"
    if problem is not None:
      quarantine.reject(path, record.where, *problem, "correct the record or the field's name", record.fields)
      continue
    seen[id] = record.where
    found.append(_instruction(id, record, fields))
  quarantine.report(path)
  if not found:
    raise DataError(f"{path} holds no instruction; give a file with at least one")
  return found


def _records(path: pathlib.Path, fields: InstructionFields, quarantine: Quarantine) -> Iterator[FileRecord]:
  if not path.is_file():
    raise DataError(f"{path}: no such file; give one of {', '.join(SUFFIXES)}")
  name = path.name.lower()
  stem = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), None)
  if stem is None:
    raise DataError(f"{path}: files of this kind hold no records; give one of {', '.join(SUFFIXES)}")
  if name.endswith(".json"):
    return _json_list(path, stem, quarantine)
  if name.endswith(".parquet"):
    columns = [each.split(".")[0] for each in dataclasses.astuple(fields) if each]
    required = fields.instruction.split(".")[0]
    return parquet_records(path, stem, columns, required, "the field of the instruction")
  return json_records(path, stem, quarantine)


def _json_list(path: pathlib.Path, stem: str, quarantine: Quarantine) -> Iterator[FileRecord]:
  try:
    entries = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise DataError(f"{path} is not valid JSON in UTF-8 ({error}); write it again") from error
  if not isinstance(entries, list):
    raise DataError(f"{path} holds a {type(entries).__name__}; give a JSON list of objects")
  for number, entry in enumerate(entries):
    if isinstance(entry, dict):
      yield FileRecord(f"entry {number}", f"{stem}:{number}", entry)
    else:
      problem = f"is a {type(entry).__name__}, not an object"
      quarantine.reject(path, f"entry {number}", None, problem, "give a list of objects", entry)


def _at(record: Any, path: str) -> Any:
  """Returns what stands at a path; None where it leads nowhere."""
  for name in path.split("."):
    if isinstance(record, dict):
      record = record.get(name)
    elif isinstance(record, list) and name.isdigit() and int(name) < len(record):
      record = record[int(name)]
    else:
      return None
  return record


def _problem(record: FileRecord, fields: InstructionFields) -> tuple[str, str] | None:
  """Returns (field, problem) of a record that cannot be used."""
  for path in (fields.instruction, fields.input, fields.reference):
    value = _at(record.fields, path) if path else None
    if value is not None and not isinstance(value, str):
      return path, f"is a {type(value).__name__}, not text"
  if not (_at(record.fields, fields.instruction) or "").strip():
    has = ", ".join(map(str, record.fields)) or "none"
    return fields.instruction, f"is missing or empty (the record has {has})"
  return None


def _instruction(id: str, record: FileRecord, fields: InstructionFields) -> Instruction:
  text = _at(record.fields, fields.instruction)
  more = _at(record.fields, fields.input) if fields.input else None
  reference = _at(record.fields, fields.reference) if fields.reference else None
  if more and more.strip():
    text = f"{text}\n\n{more}"
  return Instruction(id, text, reference if reference and reference.strip() else None)
