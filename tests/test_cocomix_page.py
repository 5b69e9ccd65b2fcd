"""docs/cocomix.md: its figures are those of the result files, its laws have tests, its fields and sweeps exist."""

import json
import os
import pathlib
import re

from configs import cocomix as configs
from nr.models.concept_mixing_spec import MODES
from nr.sweeps.points import sweeps_of
from tests.test_docs import tables

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cocomix.md"
# A figure, then in a comment the file of benchmarks/results and the path of the value in it.
FIGURE = re.compile(r"([-+]?)(\d[\d,]*)(\.\d+)?( %)?<!-- (\S+\.json) (\S+) -->")
TEST = re.compile(r"\[[^\]]*\]\(\.\./(tests/\S+\.py)\)((?:,? `test_\w+`)*)")


def figure_of(match):
  """The figure as the result file has it, written as the one on the page."""
  sign, whole, decimals, percent, name, path = match.groups()
  value = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
  for key in path.split("."):
    value = value[int(key)] if isinstance(value, list) else value[key]
  digits = len(decimals or ".") - 1
  text = f"{value * (100 if percent else 1):{'+' if sign else ''}{',' if ',' in whole else ''}.{digits}f}"
  return f"{text}{percent or ''}<!-- {name} {path} -->"


def rows_with(column):
  return [row for rows in tables(PAGE) if column in rows[0] for row in rows]


def test_figures_are_those_of_the_result_files():
  """NR_UPDATE_GOLDEN=1 writes them anew; the words around them are then to be read again."""
  text = PAGE.read_text(encoding="utf-8")
  found = FIGURE.sub(figure_of, text)
  if os.environ.get("NR_UPDATE_GOLDEN"):
    PAGE.write_text(found, encoding="utf-8")
    return
  assert len(FIGURE.findall(text)) == text.count(".json ") >= 10
  assert found == text


def test_every_law_has_a_test_that_bears_its_number():
  laws = rows_with("law")
  assert [int(row["law"]) for row in laws] == list(range(1, 37))
  for row in laws:
    cited = [(path, re.findall(r"test_\w+", names)) for path, names in TEST.findall(row["tests"])]
    names = [name for _, names in cited for name in names]
    assert names and all(name.startswith(f"test_{int(row['law']):02}_") for name in names), row


def test_tests_that_are_named_are_there():
  count = 0
  for path, names in TEST.findall(PAGE.read_text(encoding="utf-8")):
    source = (ROOT / path).read_text(encoding="utf-8")
    for name in re.findall(r"test_\w+", names):
      assert f"\ndef {name}(" in source, (path, name)
      count += 1
  assert count > 80


def test_fields_arms_and_sweeps_that_are_named_are_there():
  assert {row["`concept.mode`"].strip("`") for row in rows_with("`concept.mode`")} == set(MODES[0])
  targets = {row["field"].strip("`") for row in rows_with("field")}
  assert targets == set(configs.get_config("tiny").targets) - {"k_attr", "variants"}
  sweeps, arms = (
    sweeps_of(ROOT / "configs" / "sweeps" / "cocomix.py"),
    configs.get_config("ablations").students.arms,
  )
  asked = rows_with("sweep")
  assert {name for row in asked for name in re.findall(r"`(\w+)`", row["sweep"])} == set(sweeps)
  assert {name for row in asked for name in re.findall(r"`(\w+)`", row["arms"])} <= set(arms)
  named = set(re.findall(r"configs/cocomix\.py:(\w+)", PAGE.read_text(encoding="utf-8")))
  assert named <= set(configs.VARIANTS) and {"tiny", "seeds", "ablations", "paper_69m"} <= named
