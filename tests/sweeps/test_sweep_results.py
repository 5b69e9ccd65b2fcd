"""Tables of a sweep: what reports hold at dotted paths, beside the settings that differ."""

import csv
import dataclasses
import json

import pytest

from nr.sweeps import results, reuse
from nr.sweeps.points import Point
from nr.sweeps.results import MetricError, Row, collect, look_up, read_metrics, write_tables

REPORT = {
  "arms": {"fixed 0.2": {"wins": [0.5, 0.75]}},
  "interval": {"estimate": 1.0, "low": None, "high": 2.0},
}


def row(x, y, loss, status="finished", **changes):
  made = Row(
    f"x={x}", {"x": x}, {"x": x, "mode": y}, status, {"loss": loss} if loss is not None else {}, 90.0
  )
  return dataclasses.replace(made, **changes)


def test_paths_lead_through_dots_and_lists():
  assert look_up(REPORT, "arms.fixed 0.2.wins.1") == 0.75
  assert look_up(REPORT, "interval") == REPORT["interval"]


@pytest.mark.parametrize(
  "path, words",
  [
    ("arm.fixed 0.2", "report.json has no 'arm.fixed 0.2'; did you mean 'arms'"),
    ("arms.fixed 0.3.wins", "arms has no 'fixed 0.3.wins'; did you mean 'fixed 0.2'"),
    ("arms.fixed 0.2.wins.2", "has no '2'"),
    ("interval.low.x", "interval.low has no 'x'; there are: no names"),
  ],
)
def test_paths_that_lead_nowhere_name_the_nearest(path, words):
  with pytest.raises(MetricError, match=words):
    look_up(REPORT, path)


def test_metrics_are_numbers_or_intervals():
  found, problems = read_metrics(
    REPORT, {"a": "interval", "b": "arms", "c": "arms.fixed 0.2.wins.0", "d": "none"}
  )
  assert found == {"a": {"estimate": 1.0, "low": None, "high": 2.0}, "c": 0.5}
  assert [problem.split(":")[0] for problem in problems] == ["metric 'arms'", "metric 'none'"]


def work(folder, name, status="finished", config=1, report=True):
  """A point with the manifest of one stage."""
  directory = folder / name
  directory.mkdir()
  record = {"config": {"seed": 1}, "fingerprint": "f"}
  entry = {**record, "config": {"seed": config}, "status": status, "seconds": 30.0}
  (directory / "manifest.json").write_text(
    json.dumps({"report": entry, "old": {**entry, "copied_from": "x"}})
  )
  if report:
    (directory / "report.json").write_text(json.dumps({"loss": 0.5}))
  return reuse.Work(Point(name, {}, {}), directory, {"report": record}, frozenset())


def test_only_finished_points_of_this_config_are_read(tmp_path):
  works = [
    work(tmp_path, "done"),
    work(tmp_path, "running", status="running"),
    work(tmp_path, "other", config=2),
    work(tmp_path, "lost", report=False),
  ]
  rows, problems = collect(works, {"loss": "loss"})
  assert [(each.name, each.status, each.metrics) for each in rows] == [
    ("done", "finished", {"loss": 0.5}),
    ("running", "unfinished", {}),
    ("other", "of another config", {}),
    ("lost", "unfinished", {}),
  ]
  assert not problems and rows[0].seconds == 30.0, "what was copied took no time here"
  _, problems = collect(works, {"loss": "los"})
  assert problems == ["done: metric 'los': report.json has no 'los'; did you mean 'loss'?"]


def test_tables_say_the_same(tmp_path):
  interval = {"estimate": 0.25, "low": 0.125, "high": 0.5}
  rows = [row(1, "a", 0.5), row(2, "a", interval), row(3, "a|b", None, status="unfinished")]
  write_tables(tmp_path, "A sweep", "python -m x", rows, ["loss"], ["x=1: no such metric"])
  with open(tmp_path / "table.csv") as stream:
    [first, second, third] = csv.DictReader(stream)
  assert first == {
    "point": "x=1",
    "status": "finished",
    "x": "1",
    "mode": "a",
    "loss": "0.5",
    "loss, low": "",
    "loss, high": "",
    "minutes": "1.5",
  }
  assert [second[name] for name in ("loss", "loss, low", "loss, high")] == ["0.25", "0.125", "0.5"]
  assert third["status"] == "unfinished" and third["loss"] == ""
  held = json.loads((tmp_path / "table.json").read_text())
  assert held["axes"] == ["x", "mode"] and held["rows"][1]["metrics"]["loss"] == interval
  text = (tmp_path / "table.md").read_text()
  assert "2 of 3 points finished" in text and "| 2 | 'a' | 0.2500 (0.1250 to 0.5000) | 1.5 |" in text
  assert "- x=3: unfinished" in text and "- x=1: no such metric" in text
  [plot] = (tmp_path / "plots").iterdir()
  assert f"(plots/{plot.name})" in text


@pytest.mark.parametrize(
  "rows, lines",
  [
    ([row(1, "a", 0.5), row(2, "a", 0.4)], {"mode=a": ([1, 2], [0.5, 0.4])}),
    (
      [row(2, "a", 0.5), row(1, "b", 0.4), row(1, "a", None), row(3, "a", 0.1)],
      {"mode=a": ([2, 3], [0.5, 0.1])},
    ),
    ([row(1, "a", 0.5), row(2, "b", 0.4)], {}),
  ],
)
def test_a_line_has_two_points_or_more(rows, lines):
  assert results._lines(rows, "x", ["mode"], "loss") == lines


def test_nothing_is_drawn_without_a_numeric_axis(tmp_path):
  rows = [row("a", "b", 0.5), row("c", "b", 0.5)]
  assert results.draw(tmp_path, rows, ["x", "mode"], ["loss"]) == []
