"""A tokenizer's folder: its defining files, and settings with a fingerprint of them."""

import hashlib
import json
import pathlib
from collections.abc import Mapping

SETTINGS_FILE = "nr_tokenizer.json"


def fingerprint_of(kind: str, end_of_text_id: int, files: Mapping[str, bytes]) -> str:
  """Returns the sha256 (hex) over the kind, the end-of-text id and the defining files."""
  digest = hashlib.sha256(f"{kind}\0{end_of_text_id}\0".encode())
  for name in sorted(files):
    digest.update(f"{name}\0{len(files[name])}\0".encode())
    digest.update(files[name])
  return digest.hexdigest()


def save_files(
  path: str | pathlib.Path, kind: str, end_of_text_id: int, fingerprint: str, files: Mapping[str, bytes]
) -> None:
  """Writes the defining files and the settings of a tokenizer into a folder."""
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (folder / name).write_bytes(content)
  settings = {"kind": kind, "end_of_text_id": end_of_text_id, "fingerprint": fingerprint}
  (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
