"""Markdown pieces of a report: tables and numbers a person reads."""

from collections.abc import Sequence
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


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a Markdown table; cells that would break it are escaped."""

  def line(cells: Sequence[Any]) -> str:
    texts = [number(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "| " + " | ".join(texts) + " |"

  return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])
