"""Whole documents packed into rows, so that attention never crosses a document.

First fit, by Grain: documents fill the first row of a small set that has room.
Nothing is concatenated across documents and little is padding; a document
longer than a row is cut into chunks.
"""

from typing import Any

import grain
import numpy as np

from nr.data.bad_records import DataError
from nr.data.token_dataset import TokenDataset
from nr.data.windows import rows_per_process
from nr.labels import NO_LABEL


class ChunkSource:
  """The documents of a stream in chunks of at most `length` tokens, as a random access source.

  An element is a dict of tokens, targets [n] int32, weights [n] float32, and
  labels [n, k] int32 where given. Every token of a document but its first is the
  target of exactly one scored position: a chunk's last position predicts the
  first token of the document's next chunk. End of text counts as the document's last token.

  Args:
    dataset: the stream.
    length: most tokens a chunk, at least 2.
    labels: [num_tokens, k] integers aligned with the stream, or None.
  """

  def __init__(self, dataset: TokenDataset, length: int, labels: np.ndarray | None = None):
    if length < 2:
      raise DataError(f"length={length} must be at least 2: a row of one token has no target")
    if labels is not None and len(labels) != dataset.num_tokens:
      raise DataError(
        f"labels cover {len(labels)} tokens, {dataset.directory} has {dataset.num_tokens}; "
        "label this dataset again"
      )
    self.dataset, self.length, self.labels = dataset, length, labels
    stops = np.append(dataset.document_starts[1:], dataset.num_tokens)
    chunks = [
      (start, min(start + length, stop), stop)
      for begin, stop in zip(dataset.document_starts.tolist(), stops.tolist())
      # A chunk of one token that ends a document would have nothing to predict.
      for start in range(begin, stop, length)
      if start + 1 < stop
    ]
    self._chunks = np.array(chunks, np.int64).reshape(-1, 3)

  def __len__(self) -> int:
    return len(self._chunks)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns chunk `index`."""
    start, stop, document_stop = map(int, self._chunks[index])
    # One token further than the chunk, where the document goes on.
    following = np.asarray(self.dataset.tokens[start : min(stop + 1, document_stop)], np.int32)
    size = stop - start
    targets = np.zeros(size, np.int32)
    targets[: len(following) - 1] = following[1:]
    weights = (np.arange(size) < len(following) - 1).astype(np.float32)
    element = {"tokens": following[:size], "targets": targets, "weights": weights}
    if self.labels is not None:
      element["labels"] = np.asarray(self.labels[start:stop], np.int32)
    return element


def packed_batches(
  source: ChunkSource,
  batch_size: int,
  seed: int,
  epochs: int | None = None,
  *,
  num_rows: int = 16,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 0,
) -> grain.IterDataset:
  """Returns shuffled batches of packed rows, deterministic by seed and exactly resumable.

  A batch holds tokens, targets, weights, segment_ids (from 1 in each row, 0 =
  padding), positions (from 0 in each chunk), all [B, L], and labels [B, L, k]
  where the source has them (65535 on padding).

  Args:
    source: chunks of at most L tokens.
    batch_size: rows of the global batch, over all processes.
    seed: decides the order.
    epochs: None to go on forever. With a number, the last rows that fill no
      whole batch are dropped, and processes may end some batches apart, since
      each packs its own documents.
    num_rows: rows open at once; more means less padding.
    process_index: which share of the chunks to read.
    process_count: number of shares.
    prefetch: batches a thread prepares ahead, 0 for none.

  Raises:
    DataError: fewer chunks than rows of a batch, or a batch that does not divide.
  """
  rows = rows_per_process(batch_size, process_index, process_count)
  if len(source) < batch_size:
    raise DataError(
      f"batch_size={batch_size} is more than the {len(source)} chunks of documents; "
      "lower batch_size or give more text"
    )
  names = ["tokens", "targets", "weights"] + (["labels"] if source.labels is not None else [])
  chunks = grain.MapDataset.source(source).seed(seed).shuffle().repeat(epochs)
  stream = chunks[process_index::process_count].to_iter_dataset(
    grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  )
  packed = grain.experimental.FirstFitPackIterDataset(
    stream,
    length_struct={name: source.length for name in names},
    num_packing_bins=num_rows,
    padding_struct={name: NO_LABEL if name == "labels" else 0 for name in names},
    shuffle_bins=False,
  )
  batches = packed.map(lambda row: _plain(row, names)).batch(rows, drop_remainder=True)
  if prefetch:
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
  return batches


def _plain(row: dict[str, Any], names: list[str]) -> dict[str, np.ndarray]:
  """Renames Grain's per-feature ids to the batch's one set."""
  return {
    **{name: row[name] for name in names},
    "segment_ids": np.asarray(row["tokens_segment_ids"], np.int32),
    "positions": np.asarray(row["tokens_positions"], np.int32),
  }
