"""Messages for names that nobody knows, with the nearest one that is known."""

import difflib
from collections.abc import Iterable


def unknown(field: str, value: str, valid: Iterable[str]) -> str:
  """Says that `value` is not a valid `field`, naming the nearest valid one and all of them.

  >>> unknown("--stage", "lables", ["teacher", "labels"])
  "--stage='lables' is unknown: did you mean 'labels'? Valid: teacher, labels"
  """
  valid = list(valid)
  near = difflib.get_close_matches(value, valid, n=1)
  hint = f"did you mean {near[0]!r}? " if near else ""
  return f"{field}={value!r} is unknown: {hint}Valid: {', '.join(valid)}"
