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

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from nr.data.bad_records import DataError
from nr.data.dataset_files import HEADER, check_files, describe_file, header_text, new_folder, read_header
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
  directory = pathlib.Path(directory)
  stored = token_dtype(tokenizer.vocab_size, dtype)
  with new_folder(directory, overwrite=overwrite) as partial:
    counts = _write_arrays(partial, documents, tokenizer, stored, directory.name if progress else None)
    if not counts["num_documents"]:
      raise DataError(f"{directory}: there are no documents to write; check corpus.name and its splits")
    header = {
      "format": FORMAT,
      "version": VERSION,
      **counts,
      "dtype": stored.name,
      "vocab_size": tokenizer.vocab_size,
      "end_of_text_id": tokenizer.end_of_text_id,
      "tokenizer": tokenizer.fingerprint,
      "provenance": dict(provenance or {}),
      "files": {name: describe_file(partial / name) for name in (*ARRAYS, IDS)},
    }
    (partial / HEADER).write_text(header_text(header), encoding="utf-8")
  return TokenDataset.open(directory)


def _write_arrays(
  folder: pathlib.Path, documents: Iterable[Document], tokenizer: Tokenizer, stored: np.dtype, title: str | None
) -> dict[str, int]:
  """Writes the arrays and ids of all documents, under a progress bar if it has a title; returns counts."""
  from tqdm import tqdm

  tokens = ArrayWriter(folder / ARRAYS[0], stored)
  starts, sizes = [], []
  with open(folder / IDS, "w", encoding="utf-8") as ids:
    for document in tqdm(documents, desc=f"tokens {title}", unit=" documents", disable=title is None):
      starts.append(tokens.length)
      sizes.append(len(document.text.encode("utf-8")))
      tokens.append([*tokenizer.encode(document.text), tokenizer.end_of_text_id])
      ids.write(json.dumps(document.id) + "\n")
  tokens.close()
  np.save(folder / ARRAYS[1], np.array(starts, np.int64), allow_pickle=False)
  np.save(folder / ARRAYS[2], np.array(sizes, np.int64), allow_pickle=False)
  return {"num_tokens": tokens.length, "num_documents": len(starts), "num_bytes": int(sum(sizes))}


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
          f"{directory / HEADER}, field {name!r}: is {header[name]}, the arrays hold {found}"
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
