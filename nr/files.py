"""Files that are whole or not there at all."""

import os
import pathlib


def replace_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text so that a reader sees the old content or the new, never half of it."""
  partial = path.with_name(path.name + ".partial")
  with open(partial, "w", encoding="utf-8") as stream:
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())
  os.replace(partial, path)
