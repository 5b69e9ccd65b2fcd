"""Markdown pieces of a report: tables and numbers a person reads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def number(value: Any, digits: int = 4) -> str:
  """Formats a number for people: significant digits, thousands separated.

  >>> number(1234567), number(0.123456), number(float("nan")), number(12345.6)
  ('1,234,567', '0.1235', 'nan', '12,346')
  """
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return str(value)
  if isinstance(value, int):
    return f"{value:,}"
  if abs(value) >= 10_000:
    return f"{value:,.0f}"
  return f"{value:.{digits}g}"


def interval_cell(interval: Mapping[str, float | None] | None, digits: int = 2) -> str:
  """Returns a number with its interval, the number alone where the interval is not finite, "-" for None.

  >>> interval_cell(dict(estimate=0.5, low=0.25, high=0.75)), interval_cell(None)
  ('0.50 (0.25 to 0.75)', '-')
  """
  if interval is None:
    return "-"
  text, bounds = f"{interval['estimate']:.{digits}f}", (interval["low"], interval["high"])
  if any(bound is None or not math.isfinite(bound) for bound in bounds):
    return text
  return f"{text} ({bounds[0]:.{digits}f} to {bounds[1]:.{digits}f})"


def inline(text: str) -> str:
  """Makes generated text safe inside a code span: one line, no back-ticks."""
  return " ".join(text.replace("`", "'").split())


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a Markdown table; cells that would break it are escaped."""

  def line(cells: Sequence[Any]) -> str:
    texts = [number(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "| " + " | ".join(texts) + " |"

  return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])
