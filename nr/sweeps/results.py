"""What the reports of a sweep's points hold, side by side: CSV, JSON, Markdown and plots."""

import csv
import dataclasses
import io
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nr import names
from nr.evaluation import plots, reports
from nr.files import replace_text
from nr.recipes import stages as stages_lib
from nr.sweeps.reuse import Work

_MOST_LINES = 8
"""Lines of a plot that can be told apart."""
_LOGARITHMIC_FROM = 30.0
"""Ratio of the largest to the smallest setting from which an axis is logarithmic."""


class MetricError(ValueError):
  """A path that a report does not have."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A point in the table.

  Attributes:
    name: of the point.
    overrides: that it sets.
    values: of every axis.
    status: "finished", "unfinished", or "of another config".
    metrics: by name, a number, a truth, a text, or {estimate, low, high}; None where a report says null.
    seconds: of all its stages, those copied from other points left out.
  """

  name: str
  overrides: dict[str, Any]
  values: dict[str, Any]
  status: str
  metrics: dict[str, Any]
  seconds: float


def look_up(report: Any, path: str) -> Any:
  """Returns what a report holds at a dotted path; keys may hold dots, lists take numbers.

  >>> look_up({"arms": {"fixed 0.2": [5, 6]}}, "arms.fixed 0.2.1")
  6

  Raises:
    MetricError: there is nothing at the path; names the nearest that is there.
  """
  return _look_up(report, path.split("."), path)


def _look_up(tree: Any, parts: list[str], path: str) -> Any:
  if not parts:
    return tree
  if isinstance(tree, list) and parts[0].lstrip("-").isdigit() and int(parts[0]) < len(tree):
    return _look_up(tree[int(parts[0])], parts[1:], path)
  children = list(tree) if isinstance(tree, dict) else []
  # A key with dots takes several parts; the longest that fits is meant.
  for length in range(len(parts), 0, -1):
    key = ".".join(parts[:length])
    if key in children:
      return _look_up(tree[key], parts[length:], path)
  where = path[: len(path) - len(".".join(parts))].rstrip(".") or "report.json"
  near = names.nearest(parts[0], children)
  valid = f"did you mean {near!r}?" if near else f"there are: {', '.join(children[:12]) or 'no names'}"
  raise MetricError(f"metric {path!r}: {where} has no {'.'.join(parts)!r}; {valid}")


def read_metrics(report: Any, metrics: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
  """Returns the metrics of a report by name, and what is wrong with their paths."""
  found: dict[str, Any] = {}
  problems: list[str] = []
  for name, path in metrics.items():
    try:
      value = look_up(report, path)
      if isinstance(value, dict) and "estimate" in value:
        value = {key: value.get(key) for key in ("estimate", "low", "high")}
      elif isinstance(value, (dict, list)):
        raise MetricError(f"metric {path!r}: it is a {type(value).__name__}; name a number in it")
      found[name] = value
    except MetricError as error:
      problems.append(str(error))
  return found, problems


def collect(works: Sequence[Work], metrics: Mapping[str, str]) -> tuple[list[Row], list[str]]:
  """Reads the reports of all points.

  Args:
    works: the points.
    metrics: dotted paths by name.

  Returns:
    A row a point, and the problems that were found, each once with the first point that has it.
  """
  rows, problems = [], {}
  for work in works:
    manifest, path = stages_lib.read_manifest(work.directory), work.directory / "report.json"
    status, found = _status(work, manifest, path), {}
    if status == "finished":
      found, wrong = read_metrics(json.loads(path.read_text(encoding="utf-8")), metrics)
      for problem in wrong:
        problems.setdefault(problem, f"{work.point.name}: {problem}")
    own = [entry for entry in manifest.values() if "copied_from" not in entry]
    seconds = sum(entry.get("seconds", 0.0) for entry in own)
    rows.append(Row(work.point.name, work.point.overrides, work.point.values, status, found, seconds))
  return rows, list(problems.values())


def _status(work: Work, manifest: Mapping[str, Any], report: pathlib.Path) -> str:
  # By config and not by fingerprint: the table may be made with other versions than the runs.
  made = [name for name in work.records if manifest.get(name, {}).get("status") == "finished"]
  if any(manifest[name]["config"] != work.records[name]["config"] for name in made):
    return "of another config"
  return "finished" if len(made) == len(work.records) and report.is_file() else "unfinished"


def write_tables(
  workdir: pathlib.Path,
  title: str,
  command: str,
  rows: Sequence[Row],
  metrics: Sequence[str],
  problems: list[str],
) -> None:
  """Writes table.csv, table.json, table.md and plots/ into the folder of a sweep.

  Args:
    workdir: of the sweep.
    title: heading of the Markdown.
    command: that made it.
    rows: of `collect`.
    metrics: their names, in order.
    problems: what is to be said below the table.
  """
  axes = list(rows[0].values)
  replace_text(workdir / "table.csv", _csv(rows, axes, metrics))
  stages_lib.write_json(
    workdir / "table.json",
    {
      "command": command,
      "axes": axes,
      "rows": [dataclasses.asdict(row) for row in rows],
      "problems": problems,
    },
  )
  drawn = draw(workdir / "plots", rows, axes, metrics)
  text = _markdown(title, command, rows, axes, metrics, problems, [path.name for path in drawn])
  replace_text(workdir / "table.md", text)


def _number(value: Any) -> Any:
  """Returns a metric without its interval."""
  return value["estimate"] if isinstance(value, dict) else value


def _csv(rows: Sequence[Row], axes: Sequence[str], metrics: Sequence[str]) -> str:
  has_interval = {name for row in rows for name in metrics if isinstance(row.metrics.get(name), dict)}
  header: list[str] = ["point", "status", *axes]
  for name in metrics:
    header += [name, f"{name}, low", f"{name}, high"] if name in has_interval else [name]
  stream = io.StringIO()
  writer = csv.writer(stream, lineterminator="\n")
  writer.writerow([*header, "minutes"])
  for row in rows:
    cells = [row.name, row.status, *row.values.values()]
    for name in metrics:
      value = row.metrics.get(name)
      cells.append(_number(value))
      if name in has_interval:
        cells += [value[bound] if isinstance(value, dict) else None for bound in ("low", "high")]
    writer.writerow([*cells, round(row.seconds / 60, 2)])
  return stream.getvalue()


def _markdown(
  title: str,
  command: str,
  rows: Sequence[Row],
  axes: Sequence[str],
  metrics: Sequence[str],
  problems: Sequence[str],
  drawn: Sequence[str],
) -> str:
  finished = [row for row in rows if row.status == "finished"]
  parts = [f"# {title}", f"{len(finished)} of {len(rows)} points finished. Written by `{command}`."]
  header = [*axes, *metrics, "minutes"] if axes else ["point", *metrics, "minutes"]
  parts.append(
    reports.table(
      header,
      [
        [
          *(map(_setting, row.values.values()) if axes else [row.name]),
          *(_cell(row.metrics.get(name)) for name in metrics),
          reports.number(row.seconds / 60, 3),
        ]
        for row in finished
      ],
    )
  )
  if any(isinstance(value, dict) for row in finished for value in row.metrics.values()):
    parts.append("In brackets: the interval that the report gives.")
  parts += [f"![{name.removesuffix('.png')}](plots/{name})" for name in drawn]
  open_ = [f"- {row.name}: {row.status}" for row in rows if row.status != "finished"]
  parts += ["Not in the table:", "\n".join(open_)] if open_ else []
  parts += ["Problems:", "\n".join(f"- {problem}" for problem in problems)] if problems else []
  return "\n\n".join(parts) + "\n"


def _setting(value: Any) -> str:
  """Writes a setting as the config does; "" would be an empty cell."""
  return repr(value) if isinstance(value, (str, float, tuple)) else str(value)


def _cell(value: Any) -> str:
  if value is None:
    return "-"
  return reports.interval_cell(value, 4) if isinstance(value, dict) else reports.number(value)


def draw(
  folder: pathlib.Path, rows: Sequence[Row], axes: Sequence[str], metrics: Sequence[str]
) -> list[pathlib.Path]:
  """Draws each metric against the numeric axis with the most values, a line a setting of the other axes.

  Returns:
    The plots; none where no axis is numeric, or lines would have one point each or be too many.
  """
  finished = [row for row in rows if row.status == "finished"]
  numeric = [axis for axis in axes if all(_is_number(row.values[axis]) for row in finished)]
  if len(finished) < 2 or not numeric:
    return []
  across = max(numeric, key=lambda axis: len({row.values[axis] for row in finished}))
  others = [axis for axis in axes if axis != across]
  drawn = []
  for number, metric in enumerate(metrics):
    lines = _lines(finished, across, others, metric)
    if not 0 < len(lines) <= _MOST_LINES:
      continue
    settings = [x for xs, _ in lines.values() for x in xs]
    path = folder / f"{number}_{''.join(c if c.isalnum() else '_' for c in metric)}.png"
    plots.plot_curves(
      path,
      lines,
      title=metric,
      x_label=across,
      y_label=metric,
      x_logarithmic=min(settings) > 0 and max(settings) / min(settings) >= _LOGARITHMIC_FROM,
    )
    drawn.append(path)
  return drawn


def _lines(
  rows: Sequence[Row], across: str, others: Sequence[str], metric: str
) -> dict[str, tuple[list[float], list[float]]]:
  """Returns (settings, values) of each line with two points or more."""

  def line_of(row: Row) -> str:
    return ", ".join(f"{axis}={row.values[axis]}" for axis in others) or metric

  lines = {}
  ordered = sorted(rows, key=lambda row: (line_of(row), row.values[across]))
  for name, members in itertools.groupby(ordered, line_of):
    found = [(row.values[across], _number(row.metrics.get(metric))) for row in members]
    kept = [(x, y) for x, y in found if _is_number(y) and math.isfinite(y)]
    if len(kept) > 1:
      lines[name] = tuple(map(list, zip(*kept)))
  return lines


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
