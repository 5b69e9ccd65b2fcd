"""Batches for training and evaluation: fixed windows over a stream of tokens, by Grain.

Training reads windows in an order that depends on the seed alone: not on the
number of processes, nor on where a run was interrupted. Global batch t holds
the same rows on 1 and on 8 processes, each process its contiguous share.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from nr.data.bad_records import DataError
from nr.data.token_dataset import TokenDataset
from nr.labels import NO_LABEL
from nr.names import unknown

SHIFTS = ("none", "sample", "epoch")
Batch = dict[str, np.ndarray]


class WindowSource:
  """Windows of `length` tokens as a random access source, one after the other by default.

  An element is a dict of
    tokens [L] int32; targets [L] int32, the next tokens (last one: weight 0);
    weights [L] float32, 1 where the target is scored: L - 1 of a window, as in
      the CoCoMix reference, so only a window's first token is never a target;
    labels [L, A] int32 where labels are given, 65535 = none;
    label_weights [L, A] float32 where weights of the labels are given, 0 = none;
    documents [L] int32 where asked for: index of the document that the target
      belongs to, -1 where nothing is scored;
    segment_ids [L] int32 (from 1, 0 = padding) and positions [L] int32 (from 0
      at each document's start) where `reset_at_documents`; then a document's
      first token is not a target either, since nothing of it was seen.

  Args:
    dataset: the stream.
    length: tokens a window, at least 2.
    labels: [num_tokens, k] integers aligned with the stream, such as a mapped
      cache of concept labels; None for none.
    reset_at_documents: keep attention within documents.
    tail: "drop" the last, shorter window (training) or "pad" it with tokens 0 of
      weight 0 (evaluation). A tail of one token has nothing to score, and is dropped.
    with_documents: add `documents`.
    overlap: tokens that a window shares with the one before it. With 1, a window's
      first token is a target of the window before, so that every token of the
      stream but the very first is scored exactly once.
    label_weights: weights of the labels, an array like theirs; None where they
      count equally.

  Raises:
    DataError: a corpus shorter than a window (under "drop"), labels of another
      length, or bad settings.
  """

  def __init__(
    self,
    dataset: TokenDataset,
    length: int,
    labels: np.ndarray | None = None,
    reset_at_documents: bool = False,
    *,
    tail: str = "drop",
    with_documents: bool = False,
    overlap: int = 0,
    label_weights: np.ndarray | None = None,
  ):
    if length < 2:
      raise DataError(f"length={length} must be at least 2: a window of one token has no target")
    if tail not in ("drop", "pad"):
      raise DataError(f"tail={tail!r} must be 'drop' or 'pad'")
    if labels is not None and len(labels) != dataset.num_tokens:
      raise DataError(
        f"labels cover {len(labels)} tokens, {dataset.directory} has {dataset.num_tokens}; "
        "label this dataset again"
      )
    if label_weights is not None and (labels is None or label_weights.shape != labels.shape):
      found = None if labels is None else labels.shape
      raise DataError(f"label_weights of shape {label_weights.shape} belong to labels of shape {found}; "
                      "give those that were written together")  # fmt: skip
    self.dataset, self.length, self.labels = dataset, length, labels
    self.label_weights = label_weights
    self.reset_at_documents, self.with_documents = reset_at_documents, with_documents
    if not 0 <= overlap < length:
      raise DataError(f"overlap={overlap} must lie between 0 and length - 1 = {length - 1}")
    self.stride = length - overlap
    whole = max(0, (dataset.num_tokens - length) // self.stride + 1)
    rest = dataset.num_tokens - whole * self.stride
    self._count = whole + (tail == "pad" and rest > max(1, overlap))
    if self._count == 0:
      raise DataError(
        f"length={length} is more than the {dataset.num_tokens} tokens of {dataset.directory}; "
        "choose a shorter window or give more text"
      )

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> Batch:
    """Returns window `index`. Raises IndexError outside 0 .. len - 1."""
    if not 0 <= index < self._count:
      raise IndexError(f"window {index} of {self._count}")
    return self.window(int(index) * self.stride)

  def window(self, start: int) -> Batch:
    """Returns the window that begins at token `start` of the stream, padded at its end."""
    length, dataset = self.length, self.dataset
    stop = min(start + length, dataset.num_tokens)
    size = stop - start
    tokens_L = np.zeros(length, np.int32)
    tokens_L[:size] = dataset.tokens[start:stop]
    weights_L = np.zeros(length, np.float32)
    weights_L[: size - 1] = 1
    element = {"tokens": tokens_L, "targets": np.append(tokens_L[1:], np.int32(0)), "weights": weights_L}
    if self.labels is not None:
      element["labels"] = np.full((length, self.labels.shape[1]), NO_LABEL, np.int32)
      element["labels"][:size] = self.labels[start:stop]
    if self.label_weights is not None:
      element["label_weights"] = np.zeros((length, self.labels.shape[1]), np.float32)
      element["label_weights"][:size] = self.label_weights[start:stop]
    if self.reset_at_documents or self.with_documents:
      # One more than the window: the document of each target, and of each token.
      documents = dataset.document_of(np.arange(start, start + length + 1))
      if self.reset_at_documents:
        weights_L *= documents[1:] == documents[:-1]
        inside_L = np.arange(length) < size
        segment_ids_L = documents[:-1] - documents[0] + 1
        begins_L = np.maximum(dataset.document_starts[documents[:-1]] - start, 0)
        element["segment_ids"] = np.where(inside_L, segment_ids_L, 0).astype(np.int32)
        element["positions"] = np.where(inside_L, np.arange(length) - begins_L, 0).astype(np.int32)
      if self.with_documents:
        element["documents"] = np.where(weights_L > 0, documents[1:], -1).astype(np.int32)
    return element


def shuffled_batches(
  source: Any,
  batch_size: int,
  seed: int,
  epochs: int | None = None,
  *,
  shift: str = "none",
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 0,
) -> grain.IterDataset:
  """Returns shuffled batches, deterministic by seed and exactly resumable.

  Every epoch has its own order. Epochs run into one another, so no window is
  dropped but at the very end. The iterator's get_state and set_state resume the
  stream at any step.

  Args:
    source: elements (dicts of arrays) by __len__ and __getitem__, such as a
      `WindowSource`; `shift` needs its `window`.
    batch_size: rows of the global batch, over all processes.
    seed: decides the order, and the shifts.
    epochs: None to go on forever.
    shift: "none"; "sample": every window begins a uniform 0..length tokens later
      (the CoCoMix reference); "epoch": all windows of an epoch share one shift in
      0..length-1, so that none overlap. Tokens and labels move together; a
      window that would run over the end ends at the end.
    process_index: which share to read, jax.process_index().
    process_count: number of shares, jax.process_count().
    prefetch: batches a thread prepares ahead, 0 for none. The state counts
      batches handed out, so resuming stays exact.

  Returns:
    A dataset of dicts of arrays [batch_size / process_count, ...].

  Raises:
    DataError: a corpus smaller than one batch, a batch that does not divide
      over the processes, an unknown shift.
  """
  if shift not in SHIFTS:
    raise DataError(unknown("shift", shift, SHIFTS))
  rows = rows_per_process(batch_size, process_index, process_count)
  count = len(source)
  if count < batch_size:
    raise DataError(
      f"batch_size={batch_size} is more than the {count} windows of the training split; "
      "lower batch_size or the window length, or give more text"
    )
  read = _reader(source, seed, shift)
  order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)
  windows = order.map_with_index(lambda index, window: read(index // count, int(window)))
  local = _share(windows.batch(rows, drop_remainder=True), process_index, process_count)
  batches = local.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  if prefetch:
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
  return batches


def _reader(source: Any, seed: int, shift: str) -> Callable[[int, int], Batch]:
  """Returns the function from (epoch, window) to an element, shifted as asked."""
  if shift == "none":
    return lambda epoch, window: source[window]
  length, last = source.length, source.dataset.num_tokens - source.length

  def read(epoch: int, window: int) -> Batch:
    if shift == "epoch":
      moved = np.random.default_rng([seed, epoch]).integers(0, length)
    else:
      moved = np.random.default_rng([seed, epoch, window]).integers(0, length + 1)
    return source.window(min(window * source.stride + int(moved), last))

  return read


def rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
  """Returns batch_size / process_count. Raises DataError where it is not whole."""
  if batch_size < 1 or batch_size % process_count:
    raise DataError(f"batch_size={batch_size} must be a positive multiple of the {process_count} processes")
  if not 0 <= process_index < process_count:
    raise DataError(f"process_index={process_index} must be in 0..{process_count - 1}")
  return batch_size // process_count


def _share(batches: grain.MapDataset, process_index: int, process_count: int) -> grain.MapDataset:
  """Returns every process_count-th batch from process_index on, as many for every process."""
  whole = len(batches) - len(batches) % process_count
  return batches[process_index:whole:process_count]


def ordered_batches(
  source: Any, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> "OrderedBatches":
  """Returns the batches of an evaluation: every element once, in order.

  The last batch is filled with rows of weight 0 (tokens 0, labels 65535,
  documents -1), and every process has the same number of batches.

  Args:
    source: elements by __len__ and __getitem__; usually a `WindowSource` with
      tail="pad".
    batch_size: rows of the global batch.
    process_index: which share to read.
    process_count: number of shares.

  Raises:
    DataError: a batch that does not divide over the processes.
  """
  return OrderedBatches(
    source, rows_per_process(batch_size, process_index, process_count), process_index, process_count
  )


class OrderedBatches:
  """A finite sequence of batches that can be gone through again and again."""

  def __init__(self, source: Any, rows: int, process_index: int, process_count: int):
    self._source, self._rows = source, rows
    self._process_index, self._process_count = process_index, process_count

  def __len__(self) -> int:
    return -(-len(self._source) // (self._rows * self._process_count))

  def __getitem__(self, index: int) -> Batch:
    """Returns batch `index` of this process. Raises IndexError past the end."""
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    first = (index * self._process_count + self._process_index) * self._rows
    last = min(first + self._rows, len(self._source))
    elements = [self._source[row] for row in range(first, last)]
    empty = _empty_like(elements[0] if elements else self._source[0])
    elements += [empty] * (self._rows - len(elements))
    return {name: np.stack([element[name] for element in elements]) for name in empty}

  def __iter__(self) -> Iterator[Batch]:
    return (self[index] for index in range(len(self)))


_FILL = {"labels": NO_LABEL, "documents": -1}


def _empty_like(element: Batch) -> Batch:
  """Returns an element of the same shapes in which nothing is scored."""
  return {name: np.full_like(value, _FILL.get(name, 0)) for name, value in element.items()}
