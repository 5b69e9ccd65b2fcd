"""The plots of a report: one function a plot, PNG files, the same look for all."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from nr.evaluation.statistics import Interval


def _figure(title: str, x_label: str, y_label: str):
  """Returns a figure and its axes, drawn without any display."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6.4, 4.0), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.set(title=title, xlabel=x_label, ylabel=y_label)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[["top", "right"]].set_visible(False)
  return figure, axes


def _save(figure, path: pathlib.Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=140)


def plot_curves(
  path: pathlib.Path,
  curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  title: str,
  x_label: str,
  y_label: str,
  logarithmic: bool = False,
  x_logarithmic: bool = False,
) -> None:
  """Draws lines, each given as (x values, y values); `logarithmic` is the axis of y."""
  figure, axes = _figure(title, x_label, y_label)
  for name, (x, y) in curves.items():
    axes.plot(x, y, label=name, linewidth=1.4, marker="o" if len(x) < 16 else None, markersize=3)
  if logarithmic:
    axes.set_yscale("log")
  if x_logarithmic:
    axes.set_xscale("log")
  if len(curves) > 1:
    axes.legend(frameon=False)
  _save(figure, path)


def plot_bands(
  path: pathlib.Path,
  curves: Mapping[str, tuple[Sequence[float], Sequence[Interval]]],
  *,
  title: str,
  x_label: str,
  y_label: str,
) -> None:
  """Draws lines with their intervals as bands; curves without points are left out, infinite bounds not drawn."""
  figure, axes = _figure(title, x_label, y_label)
  drawn = {name: curve for name, curve in curves.items() if len(curve[0])}
  for name, (x, values) in drawn.items():
    (line,) = axes.plot(
      x, [value.estimate for value in values], label=name, linewidth=1.4, marker="o", markersize=3
    )
    low, high = (np.array([value[bound] for value in values], np.float64) for bound in (1, 2))
    axes.fill_between(
      x, low, high, where=np.isfinite(low) & np.isfinite(high), color=line.get_color(), alpha=0.15
    )
  if len(drawn) > 1:
    axes.legend(frameon=False)
  _save(figure, path)


def plot_intervals(path: pathlib.Path, values: Mapping[str, Interval], *, title: str, y_label: str) -> None:
  """Draws one bar a system with its confidence interval as an error bar."""
  figure, axes = _figure(title, "", y_label)
  estimates = np.array([value.estimate for value in values.values()])
  errors = np.array(
    [[value.estimate - value.low, value.high - value.estimate] for value in values.values()]
  ).T
  bars = axes.bar(list(values), estimates, width=0.5, yerr=errors, capsize=6, color=["#7a8ca3", "#2f6f9f"])
  axes.bar_label(bars, fmt="%.2f", padding=4)
  axes.grid(axis="x", visible=False)
  _save(figure, path)


def plot_histogram(
  path: pathlib.Path, values: np.ndarray, *, title: str, x_label: str, y_label: str, bins: int = 40
) -> None:
  """Draws a histogram of finite values; values of minus infinity are counted in the title."""
  finite = np.isfinite(values)
  never = int((~finite).sum())
  suffix = f" ({never} never fired)" if never else ""
  figure, axes = _figure(title + suffix, x_label, y_label)
  axes.hist(values[finite], bins=bins, color="#2f6f9f")
  _save(figure, path)
