"""Pure pieces of sweeps. A point is a dictionary from dotted config fields to values; a sweep is a list of them.

product(axis("train.steps", (10, 20)), axis("train.clip", (0.0, 1.0)))    # four points
together(axis("train.steps", (10, 20)), axis("train.clip", (0.0, 1.0)))   # two: 10 with 0.0, 20 with 1.0
chain(axis("train.steps", (10, 20)), axis("train.clip", (0.0, 1.0)))      # four, each changes one field
fixed(axis("train.steps", (10, 20)), {"seed": 1})                         # two, both with seed 1
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Overrides = dict[str, Any]


def axis(fields: str | Iterable[str], values: Iterable[Any]) -> list[Overrides]:
  """Returns a point a value.

  Args:
    fields: a dotted field, or several that all get the value.
    values: to go through.

  Raises:
    ValueError: no field, or no value.
  """
  fields = [fields] if isinstance(fields, str) else list(fields)
  found = [dict.fromkeys(fields, value) for value in values]
  if not fields or not found:
    raise ValueError(f"axis({fields}, {found}): give at least one field and one value")
  return found


def product(*sweeps: Iterable[Overrides]) -> list[Overrides]:
  """Returns every combination of the points of several sweeps, the last one changing fastest.

  >>> product(axis("a", (1, 2)), axis("b", (3,)))
  [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]

  Raises:
    ValueError: two of the sweeps set the same field.
  """
  return [_merged(points) for points in itertools.product(*map(list, sweeps))]


def together(*sweeps: Iterable[Overrides]) -> list[Overrides]:
  """Returns the first points of all sweeps as one point, the second ones as one, and so on.

  Raises:
    ValueError: sweeps of different lengths, or two that set the same field.
  """
  lists = [list(sweep) for sweep in sweeps]
  if len({len(points) for points in lists}) > 1:
    raise ValueError(f"together: sweeps of {[len(points) for points in lists]} points; give as many in each")
  return [_merged(points) for points in zip(*lists, strict=True)]


def chain(*sweeps: Iterable[Overrides]) -> list[Overrides]:
  """Returns the points of all sweeps, one sweep after another."""
  return [dict(point) for sweep in sweeps for point in sweep]


def fixed(sweep: Iterable[Overrides], overrides: Mapping[str, Any]) -> list[Overrides]:
  """Returns the points with the same overrides added to each.

  Raises:
    ValueError: a point sets one of these fields itself.
  """
  return product(sweep, [dict(overrides)])


def _merged(points: Sequence[Mapping[str, Any]]) -> Overrides:
  merged: Overrides = {}
  for point in points:
    twice = sorted(merged.keys() & point.keys())
    if twice:
      raise ValueError(f"{twice[0]}: two sweeps that are combined both set it; leave it out of one")
    merged.update(point)
  return merged
