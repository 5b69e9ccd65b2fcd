"""Multiple-choice questions from files, one JSON object a line: what `configs/harness` hands to lm-evaluation-harness.

{"context": "Plants use sunlight to make", "choices": ["soil.", "minerals.", "food.", "water."], "label": 2}
"""

import os
import pathlib
from typing import Any

from nr.data.bad_records import DataError, Quarantine
from nr.data.file_sources import json_records
from nr.data.records import problem_of

DATA = "NR_DATA"
"""Environment variable that names the folder of data sets."""

SCHEMA = {"context": "str", "choices": "list[str]", "label": "int"}
GAP = "_"
"""What stands for the gap in questions that are filled in, as WinoGrande's are."""


def choice_file(name: str, root: str | None = None) -> pathlib.Path:
  """Returns where the questions `name` lie: choice/NAME.jsonl.gz (or .jsonl) in the folder of data sets.

  Args:
    name: such as "piqa_dev".
    root: the folder; None: what the environment variable NR_DATA names.

  Raises:
    DataError: no folder, or no such file there.
  """
  root = os.environ.get(DATA) if root is None else root
  if not root:
    raise DataError(f"{DATA} is not set; let it name the folder that holds choice/{name}.jsonl.gz")
  files = [pathlib.Path(root) / "choice" / f"{name}{suffix}" for suffix in (".jsonl.gz", ".jsonl")]
  for path in files:
    if path.is_file():
      return path
  raise DataError(f"{files[0]}: no such file; put it there, or let {DATA} name another folder")


def read_choices(path: str | pathlib.Path, quarantine: Quarantine | None = None) -> list[dict[str, Any]]:
  """Reads questions.

  Args:
    path: JSON lines (.jsonl or .jsonl.gz): `context`, a text; `choices`, at least two texts; `label`, the
      place of the right one, from 0. Further fields are kept.
    quarantine: takes bad questions; None: the first is an error.

  Raises:
    DataError: no such file, no question, or a bad one; names line and field.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise DataError(f"{path}: no such file; give a .jsonl or .jsonl.gz")
  quarantine, questions = quarantine or Quarantine(), []
  for record in json_records(path, path.name.split(".")[0], quarantine):
    problem = problem_of({name: record.fields[name] for name in SCHEMA if name in record.fields}, SCHEMA)
    problem = problem or _problem(record.fields)
    if problem is not None:
      quarantine.reject(path, record.where, *problem, "correct the record", record.fields)
      continue
    questions.append(record.fields)
  quarantine.report(path)
  if not questions:
    raise DataError(f"{path} holds no question; give a file with at least one")
  return questions


def _problem(question: dict[str, Any]) -> tuple[str, str] | None:
  """Returns (field, problem) of a question that cannot be asked."""
  choices, label = question["choices"], question["label"]
  if len(choices) < 2 or not all(choice.strip() for choice in choices):
    return "choices", f"holds {choices!r}; there must be at least two, none of them blank"
  if not 0 <= label < len(choices):
    return "label", f"is {label}, there are {len(choices)} choices"
  return None


def filled_in(question: dict[str, Any]) -> tuple[list[str], str]:
  """Returns a question with a gap as contexts, one a choice, and the text behind the gap.

  That is the scoring of arXiv 1806.02847: which choice makes what follows more likely?

  Raises:
    DataError: no gap, or more than one.

  >>> filled_in({"context": "He ate the _ because it was ripe.", "choices": ["pear", "stone"], "label": 0})
  (['He ate the pear', 'He ate the stone'], 'because it was ripe.')
  """
  before, gap, behind = question["context"].partition(GAP)
  if not gap or GAP in behind:
    raise DataError(f"context: {question['context']!r} must have one gap, written {GAP!r}")
  return [before + choice for choice in question["choices"]], behind.strip()
