"""Names that nobody knows, answered with the nearest one that is known."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def nearest(value: str, valid: Iterable[str], *, likeness: float = 0.6) -> str | None:
  """Returns the valid name most like `value`, or None where none is alike enough (0: any, 1: equal)."""
  return next(iter(difflib.get_close_matches(value, list(valid), n=1, cutoff=likeness)), None)


def unknown(field: str, value: str, valid: Iterable[str]) -> str:
  """Says that `value` is not a valid `field`, naming the nearest valid one and all of them.

  >>> unknown("--stage", "lables", ["teacher", "labels"])
  "--stage='lables' is unknown: did you mean 'labels'? Valid: teacher, labels"
  """
  valid = list(valid)
  near = nearest(value, valid)
  hint = f"did you mean {near!r}? " if near else ""
  return f"{field}={value!r} is unknown: {hint}Valid: {', '.join(valid)}"


def from_dict(kind: type[Settings], settings: Mapping[str, Any]) -> Settings:
  """Makes a dataclass of settings from plain values by field name.

  Raises:
    ValueError: a field that `kind` does not have (with the nearest one that it has), or one
      without a default that is missing; and what the dataclass itself refuses.
  """
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for name in settings:
    if name not in fields:
      raise ValueError(unknown(f"field of {kind.__name__}", name, fields))
  for name, field in fields.items():
    is_required = field.default is field.default_factory is dataclasses.MISSING
    if is_required and name not in settings:
      raise ValueError(f"{kind.__name__}.{name} is missing: give a value")
  return kind(**settings)
