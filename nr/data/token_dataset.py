"""A corpus as one stream of tokens on disk, memory-mapped, with its documents marked.

    directory/
      tokens.npy            [num_tokens] uint16 or uint32: documents in order, each followed by end of text
      document_starts.npy   [num_documents] int64: index of each document's first token
      document_bytes.npy    [num_documents] int64: UTF-8 bytes of its text (for bits per byte)
      document_ids.jsonl    one JSON string a line
      dataset.json          version, counts, tokenizer, provenance, size and sha256 of each file

Fixed windows of tokens, read at random, are what training needs; no record
format serves that better than a mapped array, and it needs no library.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from nr.data.bad_records import DataError
from nr.data.sources import Document
from nr.data.tokenizers import Tokenizer, check_fingerprint

FORMAT = "nr.token_dataset"
VERSION = 1
ARRAYS = ("tokens.npy", "document_starts.npy", "document_bytes.npy")
IDS = "document_ids.jsonl"


class ArrayWriter:
  """Writes a one-dimensional .npy array of unknown length, piece by piece.

  The header is written for length 0 and corrected on `close`: NumPy pads it so
  that the length may grow.

  Args:
    path: the .npy file.
    dtype: element type.
  """

  def __init__(self, path: pathlib.Path, dtype: Any):
    self.dtype, self.length = np.dtype(dtype), 0
    self._stream: BinaryIO = open(path, "wb")
    self._write_header()
    self._header_size = self._stream.tell()

  def _write_header(self) -> None:
    element = np.lib.format.dtype_to_descr(self.dtype)
    header = {"descr": element, "fortran_order": False, "shape": (self.length,)}
    np.lib.format.write_array_header_1_0(self._stream, header)

  def append(self, values: Any) -> None:
    """Appends values [n]; they must fit the type."""
    values = np.ascontiguousarray(values, self.dtype)
    if values.ndim != 1:
      raise ValueError(f"values have shape {values.shape}; the array has one dimension")
    self._stream.write(values.tobytes())
    self.length += len(values)

  def close(self) -> None:
    """Writes the true length and closes the file."""
    self._stream.seek(0)
    self._write_header()
    if self._stream.tell() != self._header_size:
      raise RuntimeError("NumPy's header left no room for the length")
    self._stream.close()


def token_dtype(vocab_size: int, dtype: str = "auto") -> np.dtype:
  """Returns the type tokens are stored in: uint16 up to 65,536 ids, uint32 above.

  Raises:
    DataError: `dtype` is not "auto", "uint16" or "uint32", or is too small.
  """
  if dtype not in ("auto", "uint16", "uint32"):
    raise DataError(f"dtype={dtype!r} must be 'auto', 'uint16' or 'uint32'")
  if dtype == "uint16" and vocab_size > 65_536:
    raise DataError(
      f"dtype='uint16' holds ids up to 65535, the tokenizer has vocab_size={vocab_size}; "
      "use dtype='auto' or a smaller vocabulary"
    )
  if dtype == "auto":
    dtype = "uint16" if vocab_size <= 65_536 else "uint32"
  return np.dtype(dtype)


def write_token_dataset(
  directory: str | pathlib.Path,
  documents: Iterable[Document],
  tokenizer: Tokenizer,
  *,
  provenance: Mapping[str, Any] | None = None,
  dtype: str = "auto",
  overwrite: bool = False,
  progress: bool = False,
) -> "TokenDataset":
  """Tokenizes documents into a directory, in bounded memory; finished or not there at all.

  Args:
    directory: where to write; must not exist unless `overwrite`.
    documents: at least one.
    tokenizer: its fingerprint is recorded.
    provenance: what the documents are (corpus settings, split), kept as JSON.
    dtype: "auto", "uint16" or "uint32".
    overwrite: replace a directory that exists.
    progress: show a progress bar.

  Returns:
    The dataset, opened.

  Raises:
    DataError: no documents, a type too small for the vocabulary, or a directory
      that exists.
  """
  from tqdm import tqdm

  directory = pathlib.Path(directory)
  stored = token_dtype(tokenizer.vocab_size, dtype)
  if directory.exists() and not overwrite:
    raise DataError(f"{directory} exists; remove it, name another, or pass overwrite=True")
  partial = directory.with_name(directory.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  tokens = ArrayWriter(partial / ARRAYS[0], stored)
  starts, sizes = [], []
  with open(partial / IDS, "w", encoding="utf-8") as ids:
    bar = tqdm(documents, desc=f"tokens {directory.name}", unit=" documents", disable=not progress)
    for document in bar:
      starts.append(tokens.length)
      sizes.append(len(document.text.encode("utf-8")))
      tokens.append([*tokenizer.encode(document.text), tokenizer.end_of_text_id])
      ids.write(json.dumps(document.id) + "\n")
  tokens.close()
  if not starts:
    shutil.rmtree(partial)
    raise DataError(f"{directory}: there are no documents to write; check corpus.name and its splits")
  np.save(partial / ARRAYS[1], np.array(starts, np.int64), allow_pickle=False)
  np.save(partial / ARRAYS[2], np.array(sizes, np.int64), allow_pickle=False)
  header = {
    "format": FORMAT,
    "version": VERSION,
    "num_tokens": tokens.length,
    "num_documents": len(starts),
    "num_bytes": int(sum(sizes)),
    "dtype": stored.name,
    "vocab_size": tokenizer.vocab_size,
    "end_of_text_id": tokenizer.end_of_text_id,
    "tokenizer": tokenizer.fingerprint,
    "provenance": dict(provenance or {}),
    "files": {name: describe_file(partial / name) for name in (*ARRAYS, IDS)},
  }
  (partial / "dataset.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
  if directory.exists():
    shutil.rmtree(directory)
  os.rename(partial, directory)
  return TokenDataset.open(directory)


def describe_file(path: pathlib.Path) -> dict[str, Any]:
  """Returns {"bytes", "sha256"} of a file, read in pieces."""
  with open(path, "rb") as stream:
    return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def read_header(directory: pathlib.Path, expected_format: str, version: int) -> dict[str, Any]:
  """Reads dataset.json of a directory and checks its format and version.

  Raises:
    DataError: missing, not JSON, or of another format or version.
  """
  path = directory / "dataset.json"
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


class TokenDataset:
  """An opened token dataset; make it with `open`.

  Attributes:
    directory: where it is.
    header: content of dataset.json.
    tokens: [num_tokens] uint16 or uint32, memory-mapped, read only.
    document_starts: [num_documents] int64, index of each first token.
    document_bytes: [num_documents] int64, UTF-8 bytes of each text.
  """

  def __init__(self, directory: pathlib.Path, header: dict[str, Any]):
    self.directory, self.header = directory, header
    mapped = [np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in ARRAYS]
    self.tokens, self.document_starts, self.document_bytes = mapped

  @classmethod
  def open(
    cls, directory: str | pathlib.Path, expected_tokenizer: str | None = None, *, verify_hash: bool = False
  ) -> "TokenDataset":
    """Opens a directory after checking it.

    Args:
      directory: written by `write_token_dataset`.
      expected_tokenizer: fingerprint of the tokenizer in use; None to take any.
      verify_hash: also read every file and compare its sha256.

    Raises:
      DataError: missing or damaged files, another version, another tokenizer.
    """
    directory = pathlib.Path(directory)
    header = read_header(directory, FORMAT, VERSION)
    if expected_tokenizer is not None:
      check_fingerprint(expected_tokenizer, header["tokenizer"], str(directory))
    check_files(directory, header["files"], verify_hash)
    dataset = cls(directory, header)
    for name, found in (("num_tokens", len(dataset.tokens)), ("num_documents", len(dataset.document_starts))):
      if header[name] != found:
        raise DataError(
          f"{directory / 'dataset.json'}, field {name!r}: is {header[name]}, the arrays hold {found}"
        )
    return dataset

  @property
  def num_tokens(self) -> int:
    """Number of tokens, ends of text included."""
    return len(self.tokens)

  @property
  def num_documents(self) -> int:
    """Number of documents."""
    return len(self.document_starts)

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of all texts."""
    return self.header["num_bytes"]

  @property
  def vocab_size(self) -> int:
    """Number of ids of the tokenizer."""
    return self.header["vocab_size"]

  @property
  def end_of_text_id(self) -> int:
    """The id that follows each document."""
    return self.header["end_of_text_id"]

  @property
  def tokenizer(self) -> str:
    """Fingerprint of the tokenizer."""
    return self.header["tokenizer"]

  @property
  def fingerprint(self) -> str:
    """The sha256 (hex) of the token stream, as recorded: names this dataset in other artifacts."""
    return self.header["files"][ARRAYS[0]]["sha256"]

  def document_ids(self) -> list[str]:
    """Returns the ids of all documents, in order."""
    with open(self.directory / IDS, encoding="utf-8") as stream:
      return [json.loads(line) for line in stream]

  def document_span(self, index: int) -> tuple[int, int]:
    """Returns (start, stop) of a document in the stream; stop - 1 is its end of text."""
    stop = self.document_starts[index + 1] if index + 1 < self.num_documents else self.num_tokens
    return int(self.document_starts[index]), int(stop)

  def document_tokens(self, index: int) -> np.ndarray:
    """Returns the tokens of a document, its end of text included, as a view."""
    return self.tokens[slice(*self.document_span(index))]

  def document_of(self, positions: np.ndarray) -> np.ndarray:
    """Returns the index (int32) of the document that holds each position of the stream."""
    return (np.searchsorted(self.document_starts, positions, side="right") - 1).astype(np.int32)
