"""What input files hold: their hashes, so that a changed file under the same path is noticed.

A file counts by its size and the SHA-256 of all its bytes. Large checkpoints are read once
a run directory: `inputs.json` there keeps each hash with the file's size, times and inode,
and a file that still has these is not read again. (Parts of a file would be cheaper and miss
what a fine-tuning, an edit or a faulty copy changes in the middle.)

A folder counts by the files below it, hidden ones left out. A run directory counts by what
its manifest records of finished stages, where every model has the hash of its parameters,
which is checked when it is opened: its logs may grow.
"""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from nr.files import replace_text

CACHE, MANIFEST = "inputs.json", "manifest.json"
# A file that was written a moment ago may be written again without its times telling.
_SETTLED_SECONDS = 2.0


class FileHashes:
  """Hashes of files, kept in a run directory.

  Args:
    workdir: the run directory.
  """

  def __init__(self, workdir: pathlib.Path):
    self._path = workdir / CACHE
    self._known = _read_cache(self._path)
    self._is_changed = False

  def describe(self, path: str | pathlib.Path) -> dict[str, Any] | None:
    """Returns what a file or folder holds.

    Args:
      path: "~" is expanded.

    Returns:
      bytes (their number) and sha256 (hex), of a folder also files (their number); None
      where nothing lies there.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
      return {"bytes": path.stat().st_size, "sha256": self._sha256(path)}
    if not path.is_dir():
      return None
    if (path / MANIFEST).is_file():
      return _of_run(path / MANIFEST)
    files = sorted(_files_below(path), key=lambda file: file.relative_to(path).as_posix())
    digest = hashlib.sha256()
    for file in files:
      digest.update(
        f"{file.relative_to(path).as_posix()}\0{self._sha256(file)}\n".encode("utf-8", "surrogatepass")
      )
    return {
      "bytes": sum(file.stat().st_size for file in files),
      "sha256": digest.hexdigest(),
      "files": len(files),
    }

  def save(self) -> None:
    """Writes the hashes that were new."""
    if self._is_changed:
      replace_text(self._path, json.dumps(self._known, indent=1, sort_keys=True) + "\n")
      self._is_changed = False

  def _sha256(self, path: pathlib.Path) -> str:
    found, name = path.stat(), str(path.absolute())
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    known = self._known.get(name, {})
    if known.get("state") == state:
      return known["sha256"]
    began = time.time()
    with open(path, "rb") as stream:
      sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if began - max(found.st_mtime, found.st_ctime) > _SETTLED_SECONDS:
      self._known[name] = {"state": state, "sha256": sha256}
      self._is_changed = True
    return sha256


def _read_cache(path: pathlib.Path) -> dict[str, Any]:
  """Returns the hashes that are kept; none where the file is missing or damaged: they are made again."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _files_below(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns all files of a folder and its folders, links followed, hidden ones left out."""
  found = []
  for parent, folders, files in os.walk(folder, followlinks=True):
    folders[:] = [name for name in folders if not name.startswith(".")]
    found += [pathlib.Path(parent, name) for name in files if not name.startswith(".")]
  return [path for path in found if path.is_file()]


def _of_run(manifest: pathlib.Path) -> dict[str, Any]:
  """Returns what a run directory counts by: artifacts of its finished stages."""
  content = manifest.read_text(encoding="utf-8")
  try:
    entries: Mapping[str, Any] = json.loads(content)
    finished = {
      name: [entry["fingerprint"], entry["artifact"]]
      for name, entry in entries.items()
      if entry.get("status") == "finished"
    }
    content = json.dumps(finished, sort_keys=True)
  except (ValueError, KeyError, TypeError, AttributeError):
    pass  # another program's file of this name: it counts as it is
  return {"bytes": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}
