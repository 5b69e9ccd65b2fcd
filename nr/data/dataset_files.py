"""The frame that all datasets on disk share: a folder that is whole or not there, and its dataset.json."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from nr.data.bad_records import DataError

HEADER = "dataset.json"


@contextlib.contextmanager
def new_folder(folder: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
  """Gives an empty folder to fill, which takes the name `folder` if the block ends without an error.

  After an error nothing is left of it, and what stood at `folder` stays.

  Raises:
    DataError: `folder` exists and is not to be overwritten.
  """
  if folder.exists() and not overwrite:
    raise DataError(f"{folder} exists; remove it, name another, or pass overwrite=True")
  partial = folder.with_name(folder.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  if folder.exists():
    shutil.rmtree(folder)
  os.rename(partial, folder)


def header_text(header: Mapping[str, Any]) -> str:
  """Returns the content of dataset.json."""
  return json.dumps(header, indent=2) + "\n"


def describe_file(path: pathlib.Path) -> dict[str, Any]:
  """Returns {"bytes", "sha256"} of a file, read in pieces."""
  with open(path, "rb") as stream:
    return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def read_header(directory: pathlib.Path, expected_format: str, version: int) -> dict[str, Any]:
  """Reads dataset.json of a directory and checks its format and version.

  Raises:
    DataError: missing, not JSON, or of another format or version.
  """
  path = directory / HEADER
  if not path.is_file():
    raise DataError(f"{path} is missing; give a directory that holds a finished dataset")
  try:
    header = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise DataError(f"{path} is not valid JSON ({error}); write the dataset again") from error
  if not isinstance(header, dict) or header.get("format") != expected_format:
    found = header.get("format") if isinstance(header, dict) else header
    raise DataError(f"{path}, field 'format': is {found!r}, expected {expected_format!r}")
  if header.get("version") != version:
    raise DataError(
      f"{path}, field 'version': is {header.get('version')!r}, this code reads {version}; "
      "write the dataset again"
    )
  return header


def check_files(directory: pathlib.Path, files: Mapping[str, Mapping[str, Any]], verify_hash: bool) -> None:
  """Checks that each file is there with the recorded size, and content when `verify_hash`.

  Raises:
    DataError: names the file, what was recorded and what was found.
  """
  for name, recorded in files.items():
    path = directory / name
    if not path.is_file():
      raise DataError(f"{path} is missing; write the dataset again")
    size = path.stat().st_size
    if size != recorded["bytes"]:
      raise DataError(
        f"{path} has {size} bytes, dataset.json records {recorded['bytes']}; it was cut off or "
        "changed, write the dataset again"
      )
    if verify_hash:
      found = describe_file(path)["sha256"]
      if found != recorded["sha256"]:
        raise DataError(
          f"{path} has sha256 {found}, dataset.json records {recorded['sha256']}; it was damaged, "
          "write the dataset again"
        )
