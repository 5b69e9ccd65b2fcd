"""What the documents say exists: links, names in tables, chains in text, commands and examples."""

import ast
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import shlex

import pytest

import nr.generation
import nr.models
from nr.generate import make_parser
from nr.generation.transforms import REGISTRY, describe, parse

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
INFERENCE = ROOT / "docs" / "inference.md"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def prose(page: pathlib.Path) -> str:
  return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: pathlib.Path, language: str) -> list[str]:
  return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def tables(page: pathlib.Path) -> list[list[dict[str, str]]]:
  """Returns each table as rows by column; "|" within backticks is part of a cell."""
  found, lines = [], []
  for line in [*prose(page).splitlines(), ""]:
    if line.startswith("|"):
      guarded = re.sub(r"`[^`]*`", lambda code: code.group().replace("|", "\0"), line.strip()[1:-1])
      lines.append([cell.strip().replace("\0", "|") for cell in guarded.split("|")])
    elif lines:
      head, _, *rows = lines
      assert all(len(row) == len(head) for row in lines), (page.name, head)
      found.append([dict(zip(head, row)) for row in rows])
      lines = []
  return found


def slug(heading: str) -> str:
  return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  text = prose(page)
  anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
  missing = []
  for target in LINK.findall(text):
    if re.match(r"[a-z]+:", target):
      continue
    path, _, anchor = target.partition("#")
    if path and not (page.parent / path).exists():
      missing.append(target)
    if not path and anchor not in anchors:
      missing.append(target)
  assert not missing


@functools.cache
def public_names() -> dict[str, object]:
  """Returns what the modules of generation and models define, by name, modules too."""
  found = {}
  for package in (nr.models, nr.generation):
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
      module = importlib.import_module(info.name)
      found[info.name.rpartition(".")[2]] = module
      defined = {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == info.name and not name.startswith("_")
      }
      found.update(defined)
  return found


def assert_exists(code: str) -> None:
  """Looks a name or a call of a table up: a transform in text, or a public class or function."""
  call = ast.parse(code, mode="eval").body
  name = call.func.id if isinstance(call, ast.Call) else call.id
  if name in REGISTRY:
    if isinstance(call, ast.Call):
      assert describe(parse(code))
    return
  assert name in public_names(), f"`{code}`: no transform and nothing public has this name"
  if isinstance(call, ast.Call):
    parameters = inspect.signature(public_names()[name]).parameters
    for keyword in call.keywords:
      assert keyword.arg in parameters, f"`{code}`: it has no {keyword.arg}"


def test_names_in_tables_exist():
  count = 0
  for rows in tables(INFERENCE):
    columns = [column for column in ("in code", "model", "sampler") if column in rows[0]]
    for row in rows:
      for code in [code for column in columns for code in re.findall(r"`([^`]+)`", row[column])]:
        assert_exists(code)
        count += 1
  assert count > 100


def test_drivers_of_tables_exist():
  for rows in tables(INFERENCE):
    for row in rows:
      for code in re.findall(r"`(\w+)`", row.get("driver", "").partition(",")[0]):
        assert callable(public_names()[code]), code


def test_every_transform_is_told_of():
  text = INFERENCE.read_text(encoding="utf-8")
  ours = {name: cls for name, cls in REGISTRY.items() if cls.__module__.startswith("nr.")}
  words = set(re.findall(r"\w+", text))
  assert len(ours) > 40
  assert not {name for name, cls in ours.items() if name not in words and cls.__name__ not in words}


def test_proofs_are_tests():
  """Every algorithm names a test, and every cell of ours among the peers a test or the reason."""
  text = prose(INFERENCE)
  algorithms = peers = 0
  for rows in tables(INFERENCE):
    for row in rows:
      if "proof" in row:
        assert LINK.search(row["proof"]), row
        assert all(target.startswith("../tests/") for target in LINK.findall(row["proof"])), row
        algorithms += 1
      if "**nr**" in row:
        assert len(row) == 18, row
        ours = row["**nr**"]
        assert all(target.startswith("../tests/") for target in LINK.findall(ours)), row
        assert LINK.search(ours) or re.fullmatch(r"– \([a-z]\)", ours), row
        assert all(f"\n- {note}. " in text for note in re.findall(r"\(([a-z])\)", ours)), row
        assert all(value in ("Y", "p", "h", "–") for value in list(row.values())[2:]), row
        peers += 1
  assert algorithms > 70 and peers == 43


def imports(tree: ast.Module) -> list[tuple[str, list[str]]]:
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(alias.name, []) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      found.append((node.module, [alias.name for alias in node.names]))
  return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_compile_and_their_imports_exist(page):
  code = "\n".join(blocks(page, "python"))
  compile(code, str(page), "exec")
  for module, names in imports(ast.parse(code)):
    if module.partition(".")[0] == "nr":
      found = importlib.import_module(module)
      assert all(hasattr(found, name) for name in names), (module, names)


def test_commands_are_understood():
  commands = [
    line
    for block in blocks(INFERENCE, "sh")
    for line in block.splitlines()
    if line.startswith("python -m nr.generate")
  ]
  assert len(commands) >= 5
  for command in commands:
    parse(make_parser().parse_args(shlex.split(command)[3:]).chain)
