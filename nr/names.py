"""Names that nobody knows, answered with the nearest one that is known."""

import difflib
from collections.abc import Iterable


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
