"""Activations of a frozen teacher as a shuffled, resumable stream of batches.

The stream is cut into chunks of windows. A chunk's activations are computed at once, or read from a cache
on disk, its rows are permuted across windows, and batches are cut from them. Everything is a function of
(seed, chunk, offset), so the position is two numbers, and going on from it gives the same bits: the chunk is
made again. Rows that do not fill a last batch of a chunk are left out (fewer than one batch in
`chunk_batches`).
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from tqdm import tqdm

from nr.data.activation_cache import ActivationCache, ActivationHeader, ActivationWriter
from nr.data.bad_records import DataError
from nr.models import parameters
from nr.models.residual_tap import TapInputs, activations_at
from nr.training import sharding

Batch = Mapping[str, np.ndarray]
Tap = Callable[[Batch], Any]

_TAP_FIELDS = ("tokens", "positions", "segment_ids")
# Domains of the random streams that share a seed.
_WINDOWS, _ROWS = 0, 1


def make_tap(graphdef: Any, params: Any, layer: int) -> Tap:
  """Makes the function from a batch of windows to the teacher's activations [B, L, D].

  Args:
    graphdef: definition of the teacher.
    params: its parameters; in a run of several processes, a copy local to each, which reads its own windows
      with its own devices.
    layer: the block (from 0) whose output is tapped.
  """

  @jax.jit
  def tap(params: Any, batch: Batch) -> jax.Array:
    return activations_at(parameters.merge(graphdef, params), TapInputs.of(batch), layer)

  # Training runs within its mesh, and parameters elsewhere cannot be read there: each mesh has a copy.
  @functools.cache
  def params_on(mesh: jax.sharding.Mesh) -> Any:
    return params if mesh.empty else jax.device_put(params, jax.NamedSharding(mesh, jax.P()))

  own = None
  if jax.process_count() > 1:
    own = sharding.make_mesh(sharding.DATA_PARALLEL, jax.local_devices())

  def read(batch: Batch) -> jax.Array:
    inputs = {name: batch[name] for name in _TAP_FIELDS if name in batch}
    with sharding.context(own):
      return tap(params_on(jax.sharding.get_mesh()), inputs)

  return read


class ActivationBatches(grain.IterDataset):
  """An endless dataset of {"activations" float32 [b, D], "weights" float32 [b]}.

  Args:
    source: windows by __len__ and __getitem__, such as `nr.data.windows.WindowSource`.
    tap: see `make_tap`.
    batch_size: tokens of a global batch.
    seed: decides the order of windows and of rows.
    chunk_batches: batches a chunk holds at least; 50 or more mixes well. A chunk takes
      chunk_batches * batch_size * D * 4 bytes of host memory.
    windows_per_call: windows the teacher reads at once.
    skip_first: leave out position 0, whose activation is abnormal in many models.
    process_index: which share of the windows to read.
    process_count: number of shares.
    cache: activations of all windows of the source, read in place of running the teacher.

  Raises:
    DataError: a batch that does not divide over the processes, too few windows.
  """

  def __init__(
    self,
    source: Any,
    tap: Tap,
    *,
    batch_size: int,
    seed: int,
    chunk_batches: int = 50,
    windows_per_call: int = 8,
    skip_first: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    cache: ActivationCache | None = None,
  ):
    super().__init__()
    if batch_size < 1 or batch_size % process_count:
      raise DataError(f"batch_size={batch_size} must be a positive multiple of the {process_count} processes")
    if chunk_batches < 1:
      raise DataError(f"chunk_batches={chunk_batches} must be at least 1")
    if len(source) < process_count:
      raise DataError(f"{len(source)} windows cannot be shared by {process_count} processes; give more text")
    self.source, self.tap, self.seed, self.cache = source, tap, seed, cache
    self.rows = batch_size // process_count
    self.windows_per_call, self.skip_first = windows_per_call, skip_first
    self.process_index, self.process_count = process_index, process_count
    kept = int(kept_rows({name: value[None] for name, value in source[0].items()}, skip_first).sum())
    self.chunk_windows = -(-self.rows * chunk_batches // max(1, kept))

  def __iter__(self) -> "ActivationIterator":
    return ActivationIterator(self)

  def windows_of(self, chunk: int) -> np.ndarray:
    """Returns the indices of this process's windows in a chunk; epochs run into one another."""
    places = (chunk * self.chunk_windows + np.arange(self.chunk_windows)) * self.process_count
    places += self.process_index
    epochs, within = np.divmod(places, len(self.source))
    indices = np.empty(len(places), np.int64)
    for epoch in np.unique(epochs):
      order = np.random.default_rng([self.seed, _WINDOWS, int(epoch)]).permutation(len(self.source))
      indices[epochs == epoch] = order[within[epochs == epoch]]
    return indices

  def compute(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rows [R, D] float32 in window order, permutation [R]) of a chunk."""
    indices = self.windows_of(chunk)
    pieces = []
    for begin in range(0, len(indices), self.windows_per_call):
      some = indices[begin : begin + self.windows_per_call]
      batch = stack_windows(self.source, some, self.windows_per_call)
      if self.cache is None:
        activations_BLD = np.asarray(self.tap(batch), np.float32)[: len(some)]
      else:
        activations_BLD = self.cache.read(some)
      pieces.append(activations_BLD[kept_rows(batch, self.skip_first)[: len(some)]])
    rows_RD = np.concatenate(pieces)
    order_R = np.random.default_rng([self.seed, _ROWS, chunk, self.process_index]).permutation(len(rows_RD))
    return rows_RD, order_R

  def sample(self, count: int) -> np.ndarray:
    """Returns up to `count` shuffled activations [count, D] from the first chunks, for initialisation."""
    pieces, chunk, total = [], 0, 0
    # One pass over the windows is all there is to sample from.
    while total < count and chunk * self.chunk_windows * self.process_count < len(self.source):
      rows_RD, order_R = self.compute(chunk)
      pieces.append(rows_RD[order_R[: count - total]])
      total += len(pieces[-1])
      chunk += 1
    return np.concatenate(pieces)


class ActivationIterator(grain.DatasetIterator):
  """Iterator of `ActivationBatches`; its state is {"chunk", "offset"}, offset in batches."""

  def __init__(self, dataset: ActivationBatches):
    super().__init__()
    self._dataset = dataset
    self._chunk, self._offset = 0, 0
    self._computed: tuple[int, np.ndarray, np.ndarray] | None = None

  def __next__(self) -> dict[str, np.ndarray]:
    rows = self._dataset.rows
    rows_RD, order_R = self._rows()
    if (self._offset + 1) * rows > len(order_R):
      self._chunk, self._offset = self._chunk + 1, 0
      rows_RD, order_R = self._rows()
      if rows > len(order_R):
        raise DataError(f"a chunk gives {len(order_R)} activations, fewer than a batch of {rows}; "
                        "raise chunk_batches or lower batch_size")
    picked = order_R[self._offset * rows : (self._offset + 1) * rows]
    self._offset += 1
    return {"activations": rows_RD[picked], "weights": np.ones(rows, np.float32)}

  def get_state(self) -> dict[str, int]:
    """Returns the position: the chunk, and the batches of it that were handed out."""
    return {"chunk": self._chunk, "offset": self._offset}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to a position; the chunk is computed when the next batch is asked for."""
    self._chunk, self._offset = int(state["chunk"]), int(state["offset"])

  def _rows(self) -> tuple[np.ndarray, np.ndarray]:
    if self._computed is None or self._computed[0] != self._chunk:
      self._computed = None  # two chunks are never held at once
      self._computed = (self._chunk, *self._dataset.compute(self._chunk))
    return self._computed[1:]


def stack_windows(source: Any, indices: Sequence[int], count: int) -> dict[str, np.ndarray]:
  """Returns windows of a source as one batch of `count` rows, the last window repeated: one shape, one compilation."""
  windows = [source[int(index)] for index in indices]
  windows += [windows[-1]] * (count - len(windows))
  return {name: np.stack([window[name] for window in windows]) for name in windows[0]}


def fill_cache(
  directory: str | pathlib.Path,
  source: Any,
  tap: Tap,
  header: ActivationHeader,
  *,
  windows_per_call: int = 8,
  process_count: int = 1,
  progress: bool = True,
) -> ActivationCache:
  """Opens a cache of the activations of every window, writing it, or the rest of it, where it is not there.

  Args:
    directory: where the cache is or goes.
    source: windows by __len__ and __getitem__.
    tap: see `make_tap`.
    header: what the activations depend on.
    windows_per_call: windows the teacher reads at once.
    process_count: processes of the run; several only read.
    progress: whether to show a progress bar.

  Raises:
    DataError: a cache of something else, a full disk, or several processes before there is a cache.
  """
  if ActivationCache.is_there(directory):
    return ActivationCache.open(directory, header)
  if process_count > 1:
    raise DataError(
      f"{directory}: {process_count} processes cannot write one cache; write it first with a run of one process"
    )
  writer = ActivationWriter(directory, header)
  with tqdm(total=header.num_windows, initial=writer.windows_done, desc="activations", unit=" windows",
            disable=not progress) as bar:  # fmt: skip
    for some in writer.remaining(windows_per_call):
      batch = stack_windows(source, some, windows_per_call)
      writer.write(np.asarray(tap(batch), np.float32)[: len(some)])
      bar.update(len(some))
  return writer.finish()


def kept_rows(batch: Batch, skip_first: bool) -> np.ndarray:
  """Returns bool [B, L]: real tokens, without position 0 where asked.

  A token is real where its target is scored or where it is a scored target itself.
  """
  scored_BL = batch["weights"] > 0
  kept_BL = scored_BL.copy()
  kept_BL[:, 1:] |= scored_BL[:, :-1]
  if "segment_ids" in batch:
    kept_BL &= batch["segment_ids"] > 0
  if skip_first:
    positions_BL = batch.get("positions", np.arange(kept_BL.shape[1])[None])
    kept_BL &= positions_BL > 0
  return kept_BL
