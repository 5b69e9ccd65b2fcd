"""Notebooks as they lie in the repository: run from top to bottom, without an error, without traces of a machine."""

import ast
import importlib
import json
import pathlib
import re

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(path):
  return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def python(cell):
  """The source without the magic commands of IPython."""
  lines = "".join(cell["source"]).splitlines()
  return "\n".join(re.sub(r"^(\s*)%.*", r"\1pass", line) for line in lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_from_top_to_bottom(path):
  cells = code_cells(path)
  counts = [cell["execution_count"] for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell["outputs"]]
  assert not [output for output in outputs if output["output_type"] == "error"]
  assert any("image/png" in output.get("data", {}) for output in outputs)
  # Whole words, so that base64 images cannot hit them by chance.
  assert not re.search(r"[\"' =(](/home|/root|/tmp|/work|/opt|/Users)/\w", path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_it_imports_exists(path):
  names = []
  for cell in code_cells(path):
    for node in ast.walk(ast.parse(python(cell))):
      if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "nr":
        names += [(node.module, alias.name) for alias in node.names]
  assert names
  for module, name in names:
    loaded = importlib.import_module(module)
    assert hasattr(loaded, name) or importlib.import_module(f"{module}.{name}"), f"{module}.{name}"


def test_the_page_names_every_notebook():
  text = (FOLDER / "README.md").read_text()
  assert NOTEBOOKS and all(path.name in text for path in NOTEBOOKS)
