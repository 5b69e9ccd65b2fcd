"""Batches of encoded examples: padded to few lengths, or packed into rows of one length.

    batches = padded_batches(encoded.examples, 16, (128, 256, 512), seed=0)
    batches = packed_batches(encoded.examples, 16, 1024, seed=0, slots=8)

A batch of pairs holds, with S=2 padded and S=1 packed, P=1 padded and P=`slots` packed,
  tokens, targets [B, S, L] int32, weights [B, S, L] float32 (1 where the target is a
    response token, its end included),
  segment_ids, positions [B, S, L] int32 (packed only): segments 2p - 1 and 2p are the
    chosen and rejected sequence of pair p, 0 is padding,
  pair_weights [B, P] float32, 0 where there is no pair,
  indices [B, P] int32, which example it is, -1 for none,
  reference_log_probs [B, P, 2] float32 where they are given.
Groups (all responses to a prompt; padded) have S sequences; labelled examples add
is_desirable [B, P, labels of an example] bool.
Examples of one sequence (fine-tuning) come without the axes S and P: tokens [B, L],
weights times the example's weight, indices [B, P].

The order depends on the seed alone: not on the number of processes, nor on where a run
was interrupted. Every epoch is planned from (seed, epoch) and holds every example once;
its last batches are filled with rows of weight 0. Global batch t holds the same rows on
1 and on 8 processes, each process its contiguous share.

Why not Grain, as for windows: its packing places one sequence at a time, and both sides
of a pair must land in one row; its batches have one length.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nr.data.bad_records import DataError
from nr.data.examples import EncodedExample, reference_rows
from nr.data.windows import Batch, rows_per_process

# A row of a plan: the examples in it; a batch of a plan: its length and its rows.
Row = tuple[int, ...]


class PlannedBatch(NamedTuple):
  """Which examples stand in which rows of a batch, and how long its rows are."""

  length: int
  rows: list[Row]


class ExampleBatches:
  """A stream of batches that can be gone through again, and resumed.

  `iter()` gives an iterator with get_state and set_state. Made by `padded_batches` and
  `packed_batches`.
  """

  def __init__(
    self,
    examples: Sequence[EncodedExample],
    batch_size: int,
    seed: int | None,
    epochs: int | None,
    reference: Mapping[str, Any] | None,
    process_index: int,
    process_count: int,
    *,
    lengths: tuple[int, ...],
    slots: int,
    num_open: int,
    is_packed: bool,
  ):
    self._share = rows_per_process(batch_size, process_index, process_count) * process_index
    self._rows = batch_size // process_count
    if not examples:
      raise DataError("there are no examples; give at least one")
    counts = {len(example.tokens) for example in examples}
    if len(counts) != 1:
      raise DataError(
        f"examples have {sorted(counts)} sequences each; give pairs, or single responses, not both"
      )
    labels = {len(example.labels) for example in examples}
    if len(labels) != 1:
      raise DataError(
        f"examples have {sorted(labels)} labels each; give labelled examples, or none with labels"
      )
    if slots < 1 or num_open < 1:
      raise DataError(f"slots={slots} and num_open={num_open} must be at least 1")
    if not lengths or any(length < 2 for length in lengths) or list(lengths) != sorted(set(lengths)):
      raise DataError(f"lengths={lengths} must be growing numbers of tokens of at least 2")
    self.examples, self.batch_size, self.seed, self.epochs = examples, batch_size, seed, epochs
    self.num_sequences, self.num_labels = counts.pop(), labels.pop()
    self.lengths, self.slots, self.num_open, self.is_packed = lengths, slots, num_open, is_packed
    # What an example takes of a row: all its sequences when packed, the longest when each has its own.
    total = sum if is_packed else max
    self._sizes = [total(len(ids) for ids in example.tokens) for example in examples]
    for example, size in zip(examples, self._sizes):
      if size > lengths[-1]:
        raise DataError(
          f"example {example.id!r} takes {size} tokens and the longest row has {lengths[-1]}; "
          "give longer rows, or lower max_length when encoding"
        )
    self._reference = None if reference is None else reference_rows(examples, reference)
    self._plan: tuple[int, list[PlannedBatch]] | None = None
    settings = repr((seed, batch_size, lengths, slots, num_open, is_packed)).encode()
    digests = "".join(example.digest for example in examples).encode()
    if self.num_labels:
      digests += repr([example.labels for example in examples]).encode()
    self.fingerprint = hashlib.sha256(settings + digests).hexdigest()[:16]

  def __iter__(self) -> "ExampleIterator":
    return ExampleIterator(self)

  def plan(self, epoch: int) -> list[PlannedBatch]:
    """Returns the batches of an epoch: which examples stand in which rows."""
    if self._plan is None or self._plan[0] != epoch:
      order = np.arange(len(self.examples))
      generator = None
      if self.seed is not None:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(order)
      batches = self._pack(order.tolist()) if self.is_packed else self._bucket(order.tolist())
      if generator is not None:
        batches = [batches[index] for index in generator.permutation(len(batches))]
      self._plan = epoch, batches
    return self._plan[1]

  def _bucket(self, order: list[int]) -> list[PlannedBatch]:
    """Gathers examples by the shortest length that holds them; what is left over moves up a length."""
    waiting: dict[int, list[Row]] = {length: [] for length in self.lengths}
    batches = []
    for index in order:
      length = next(length for length in self.lengths if length >= self._sizes[index])
      waiting[length].append((index,))
      if len(waiting[length]) == self.batch_size:
        batches.append(PlannedBatch(length, waiting[length]))
        waiting[length] = []
    rest: list[Row] = []
    for length in self.lengths:
      rest += waiting[length]
      if len(rest) >= self.batch_size:
        batches.append(PlannedBatch(length, rest[: self.batch_size]))
        rest = rest[self.batch_size :]
    if rest:
      longest = max(self._sizes[index] for (index,) in rest)
      batches.append(PlannedBatch(next(length for length in self.lengths if length >= longest), rest))
    return batches

  def _pack(self, order: list[int]) -> list[PlannedBatch]:
    """Puts each example whole into the first open row with room; the fullest row closes when none has."""
    length = self.lengths[-1]
    rows: list[list[int]] = []
    open_rows: list[tuple[list[int], int]] = []  # examples, tokens that are free
    for index in order:
      size = self._sizes[index]
      place = next((i for i, (_, free) in enumerate(open_rows) if free >= size), None)
      if place is None:
        if len(open_rows) == self.num_open:
          fullest = min(range(len(open_rows)), key=lambda i: open_rows[i][1])
          rows.append(open_rows.pop(fullest)[0])
        open_rows.append(([index], length - size))
        place = len(open_rows) - 1
      else:
        members, free = open_rows[place]
        members.append(index)
        open_rows[place] = members, free - size
      if len(open_rows[place][0]) == self.slots:
        rows.append(open_rows.pop(place)[0])
    rows += [members for members, _ in open_rows]
    return [
      PlannedBatch(length, [tuple(row) for row in rows[start : start + self.batch_size]])
      for start in range(0, len(rows), self.batch_size)
    ]

  def make(self, planned: PlannedBatch) -> Batch:
    """Returns this process's rows of a planned batch."""
    return self._fill(planned, self.examples)

  def _fill(
    self, planned: PlannedBatch, examples: Sequence[EncodedExample] | Mapping[int, EncodedExample]
  ) -> Batch:
    """Writes the examples of a planned batch, found by index, into arrays."""
    empty: list[Row] = [()] * (self.batch_size - len(planned.rows))
    rows = [*planned.rows, *empty][self._share : self._share + self._rows]
    shape = (len(rows), 1 if self.is_packed else self.num_sequences, planned.length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets")}
    batch["weights"] = np.zeros(shape, np.float32)
    if self.is_packed:
      batch |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
    batch["pair_weights"] = np.zeros((len(rows), self.slots), np.float32)
    batch["indices"] = np.full((len(rows), self.slots), -1, np.int32)
    if self.num_labels:
      batch["is_desirable"] = np.zeros((len(rows), self.slots, self.num_labels), bool)
    if self._reference is not None:
      batch["reference_log_probs"] = np.zeros((len(rows), self.slots, self.num_sequences), np.float32)
    for row, members in enumerate(rows):
      start = 0
      for slot, index in enumerate(members):
        batch["indices"][row, slot] = index
        if self._reference is not None:
          batch["reference_log_probs"][row, slot] = self._reference[index]
        start = self._place(batch, row, slot, examples[index], start)
    return batch if self.num_sequences > 1 else _without_sequence_axis(batch)

  def _place(self, batch: Batch, row: int, slot: int, example: EncodedExample, start: int) -> int:
    """Writes an example into a row from `start` on. Returns where the next may begin."""
    batch["pair_weights"][row, slot] = example.weight
    if self.num_labels:
      batch["is_desirable"][row, slot] = example.labels
    factor = 1.0 if self.num_sequences > 1 else example.weight
    for number, (ids, mask) in enumerate(zip(example.tokens, example.is_response)):
      sequence, begin = (0, start) if self.is_packed else (number, 0)
      stop = begin + len(ids)
      batch["tokens"][row, sequence, begin:stop] = ids
      batch["targets"][row, sequence, begin : stop - 1] = ids[1:]
      batch["weights"][row, sequence, begin : stop - 1] = mask[1:] * factor
      if self.is_packed:
        batch["segment_ids"][row, 0, begin:stop] = slot * self.num_sequences + number + 1
        batch["positions"][row, 0, begin:stop] = np.arange(len(ids))
        start = stop
    return start


def _without_sequence_axis(batch: Batch) -> Batch:
  names = ("tokens", "targets", "weights", "segment_ids", "positions")
  plain = {name: batch[name][:, 0] for name in names if name in batch}
  return {**plain, **{name: batch[name] for name in ("indices", "is_desirable") if name in batch}}


class ExampleIterator(Iterator[Batch]):
  """Goes through the batches of `ExampleBatches` and can be set to any of them."""

  def __init__(self, batches: ExampleBatches):
    self._batches, self._epoch, self._batch = batches, 0, 0

  def __next__(self) -> Batch:
    plan = self._batches.plan(self._epoch)
    if self._batch == len(plan):
      self._epoch, self._batch = self._epoch + 1, 0
    if self._batches.epochs is not None and self._epoch >= self._batches.epochs:
      raise StopIteration
    planned = self._batches.plan(self._epoch)[self._batch]
    self._batch += 1
    return self._batches.make(planned)

  def get_state(self) -> dict[str, Any]:
    """Returns the place after the last batch given out, as JSON values."""
    return {"epoch": self._epoch, "batch": self._batch, "fingerprint": self._batches.fingerprint}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a place that `get_state` returned.

    Raises:
      DataError: it was taken with other examples or settings.
    """
    if state["fingerprint"] != self._batches.fingerprint:
      raise DataError(
        f"the data's position was saved with other examples or batch settings (fingerprint {state['fingerprint']}, "
        f"here {self._batches.fingerprint}); restore those, or begin in another workdir"
      )
    self._epoch, self._batch = int(state["epoch"]), int(state["batch"])


def padded_batches(
  examples: Sequence[EncodedExample],
  batch_size: int,
  lengths: Sequence[int],
  seed: int | None,
  epochs: int | None = None,
  *,
  reference: Mapping[str, Any] | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> ExampleBatches:
  """Returns batches with one example a row, each sequence padded on the right.

  Args:
    examples: from `nr.data.examples`.
    batch_size: rows of the global batch, over all processes.
    lengths: the lengths that a batch may have, growing; each is one program to
      compile. Examples wait for others of their length.
    seed: decides the order; None for the order of the records (evaluation).
    epochs: None to go on forever.
    reference: id -> `nr.data.preferences.ReferenceScore`.
    process_index: which share to read, jax.process_index().
    process_count: number of shares, jax.process_count().

  Raises:
    DataError: an example longer than the last length, a batch that does not divide
      over the processes, or reference scores that are missing or not of these tokens.
  """
  return ExampleBatches(
    examples, batch_size, seed, epochs, reference, process_index, process_count,
    lengths=tuple(lengths), slots=1, num_open=1, is_packed=False,
  )  # fmt: skip


def packed_batches(
  examples: Sequence[EncodedExample],
  batch_size: int,
  length: int,
  seed: int | None,
  epochs: int | None = None,
  *,
  slots: int = 8,
  num_open: int = 16,
  reference: Mapping[str, Any] | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> ExampleBatches:
  """Returns batches of rows of one length, each filled with whole examples, first fit.

  Args:
    examples: from `nr.data.examples`.
    batch_size: rows of the global batch, over all processes.
    length: tokens a row.
    seed: decides the order; None for the order of the records.
    epochs: None to go on forever.
    slots: most examples a row.
    num_open: rows open at once; more means less padding.
    reference: id -> `nr.data.preferences.ReferenceScore`.
    process_index: which share to read.
    process_count: number of shares.

  Raises:
    DataError: as `padded_batches`.
  """
  return ExampleBatches(
    examples, batch_size, seed, epochs, reference, process_index, process_count,
    lengths=(length,), slots=slots, num_open=num_open, is_packed=True,
  )  # fmt: skip
