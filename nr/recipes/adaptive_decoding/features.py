"""What heads read of the frozen language model: computed once, kept on disk, given out in batches.

The model runs once over the pairs (only over their prompts, where that is all a loss reads), in pieces of a
few shapes. What is kept is one vector a pair, or one a response token, in the model's own type; the memory
taken is that of a piece or a batch, however many pairs there are.

Arrays in this file: P pairs, S response tokens of all pairs, T positions, D model, K settings.
"""

import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nr.data.example_batches import padded_batches
from nr.data.examples import EncodedExample
from nr.data.windows import shuffled_batches
from nr.generation.language_models import Network
from nr.objectives.latent_preference import LatentPreferenceSpec
from nr.recipes.adaptive_decoding.method import read_language_model
from nr.recipes.adaptive_decoding.pairs import PairArrays
from nr.recipes.adaptive_decoding.sampling import pieces_of
from nr.training import sharding

Batch = dict[str, np.ndarray]
BLOCK = 64
"""Prompt tokens carry no loss: whole blocks of so many are left out of the rows that heads are trained on."""


class Reader(NamedTuple):
  """The frozen language model, and how it reads.

  Attributes:
    network: the model.
    temperatures: of the words.
    mesh: that the model lies on; None: one device.
    pairs_per_call: pairs that it reads at once.
    loss_chunk: tokens whose logits are held at a time; None: all of a call.
  """

  network: Network
  temperatures: tuple[float, ...]
  mesh: jax.sharding.Mesh | None = None
  pairs_per_call: int = 256
  loss_chunk: int | None = None


class Features(NamedTuple):
  """What a loss reads of the language model, on disk.

  Attributes:
    level: "sequence" or "token".
    hidden: final-normed states, [P, D] at the prompts' last tokens, or [S, D], by level.
    words: float32 [S, K], log p(token | temperature); None for losses that read no words.
    starts_P2: where in S the tokens of each response begin.
  """

  level: str
  hidden: np.ndarray
  words: np.ndarray | None
  starts_P2: np.ndarray


class Places(NamedTuple):
  """Where responses lie in the arrays of pairs; both sides have one prompt.

  Attributes:
    first_P: position that predicts the first response token: the prompt's last token.
    stop_P2: behind the position that predicts the last one.
  """

  first_P: np.ndarray
  stop_P2: np.ndarray

  @classmethod
  def of(cls, arrays: PairArrays) -> "Places":
    """Returns the places of pairs."""
    first_P = np.argmax(arrays.weights[:, 0] > 0, axis=-1)
    return cls(first_P, first_P[:, None] + (arrays.weights > 0).sum(-1))


def read_features(
  reader: Reader,
  arrays: PairArrays,
  spec: LatentPreferenceSpec,
  directory: pathlib.Path,
  prompt_lengths: Sequence[int],
  pair_lengths: Sequence[int],
) -> Features:
  """Reads all pairs with the language model, or their prompts alone where the loss needs no more.

  Args:
    reader: the language model.
    arrays: the pairs.
    spec: of the loss, which decides what is read.
    directory: gets the features' files.
    prompt_lengths: growing, that prompts may be padded to; (): they are never read alone.
    pair_lengths: growing, that pairs may be padded to.
  """
  places = Places.of(arrays)
  is_whole = spec.level == "token" or spec.needs_words or not prompt_lengths
  source = arrays if is_whole else _prompts(arrays, places.first_P)
  sizes_P = places.stop_P2.max(axis=1) if is_whole else places.first_P + 1
  counts = (places.stop_P2 - places.first_P[:, None]).ravel()
  starts_P2 = np.concatenate([[0], np.cumsum(counts)[:-1]]).reshape(-1, 2)
  directory.mkdir(parents=True, exist_ok=True)
  hidden = words = None
  lengths = pair_lengths if is_whole else prompt_lengths
  for piece in pieces_of(sizes_P.tolist(), lengths, reader.pairs_per_call):
    # On a mesh rows divide over the devices; without one the last piece need not be filled.
    rows = piece.places if reader.mesh is None else piece.rows
    found = _read_piece(reader, source, rows, piece.length, spec)
    if hidden is None:
      count = int(counts.sum()) if spec.level == "token" else len(sizes_P)
      hidden = _file(directory / "hidden.bin", found.hidden, count)
      words = _file(directory / "words.bin", found.words, int(counts.sum())) if spec.needs_words else None
    for row, place in enumerate(piece.places):
      if spec.level == "sequence":
        hidden[place] = found.hidden[row]
      else:
        _put(hidden, found.hidden[row], places, starts_P2, place)
      if spec.needs_words:
        _put(words, found.words[row], places, starts_P2, place)
  return Features(spec.level, hidden, words, starts_P2)


def _prompts(arrays: PairArrays, first_P: np.ndarray) -> PairArrays:
  """Returns the prompts alone, as pairs with one side; their last position carries the weight."""
  is_last_P1T = np.arange(arrays.tokens.shape[-1]) == first_P[:, None, None]
  return PairArrays(
    arrays.tokens[:, :1], arrays.targets[:, :1], is_last_P1T.astype(np.float32), arrays.choices[:, :1]
  )


def _read_piece(
  reader: Reader, source: PairArrays, rows: Sequence[int], length: int, spec: LatentPreferenceSpec
) -> Any:
  fields = ("tokens", "targets", "weights")
  batch = {name: fitted(getattr(source, name)[rows], length) for name in fields}
  with sharding.context(reader.mesh):
    placed = sharding.put_batch(batch, reader.mesh)
    network = reader.network
    settings = spec, reader.temperatures, reader.loss_chunk
    return jax.device_get(_read(network.graphdef, network.params, placed, *settings))


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _read(graphdef, params, batch, spec, temperatures, loss_chunk):
  return read_language_model(graphdef, params, batch, spec, temperatures, loss_chunk=loss_chunk)


def fitted(values: np.ndarray, length: int) -> np.ndarray:
  """Returns arrays whose last axis is cut, or filled up with zeros, to a length."""
  values = values[..., :length]
  return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])])


def _file(path: pathlib.Path, like: np.ndarray, count: int) -> np.ndarray:
  """Returns an array on disk with `count` rows of the last axis of another."""
  return np.memmap(path, like.dtype, "w+", shape=(count, like.shape[-1]))


def _put(file: np.ndarray, values_2TX: np.ndarray, places: Places, starts_P2: np.ndarray, place: int) -> None:
  """Writes the response positions of a pair."""
  first = places.first_P[place]
  for side in (0, 1):
    count = places.stop_P2[place, side] - first
    start = starts_P2[place, side]
    file[start : start + count] = values_2TX[side, first : first + count]


class PairRows:
  """Pairs as rows of batches; a source by __len__ and __getitem__.

  A row holds choices and weights [2, T], pair_weights [], and of features hidden [D] or [2, T, D] and words
  [2, T, K], 0 at positions other than those of responses; without features tokens and targets [2, T], for a
  method that runs the language model itself.

  Args:
    arrays: the pairs.
    features: of the language model; None: the method runs it.
    lengths: growing, that rows may have; those beyond the longest pair are left out.
  """

  def __init__(self, arrays: PairArrays, features: Features | None, lengths: Sequence[int]):
    self._arrays, self._features, self._places = arrays, features, Places.of(arrays)
    is_cut = features is not None
    self._begin_P = self._places.first_P // BLOCK * BLOCK * is_cut
    self.sizes_P = self._places.stop_P2.max(axis=1) - self._begin_P
    needed = next(place for place, length in enumerate(lengths) if length >= self.sizes_P.max())
    self.lengths = tuple(lengths[: needed + 1])

  def __len__(self) -> int:
    return len(self.sizes_P)

  def __getitem__(self, index: int) -> Batch:
    return self.row(index, self.lengths[-1])

  def row(self, index: int, length: int) -> Batch:
    """Returns a pair in `length` positions."""
    begin, features = self._begin_P[index], self._features
    names = ("choices", "weights") if features else ("choices", "weights", "tokens", "targets")
    row = {name: fitted(getattr(self._arrays, name)[index][:, begin:], length) for name in names}
    row["pair_weights"] = np.float32(1)
    if features:
      is_token = features.level == "token"
      hidden = features.hidden
      row["hidden"] = self._spread(hidden, index, length) if is_token else np.array(hidden[index])
      if features.words is not None:
        row["words"] = self._spread(features.words, index, length)
    return row

  def _spread(self, values_SX: np.ndarray, index: int, length: int) -> np.ndarray:
    """Returns [2, length, X], the values of a pair's response tokens at their positions."""
    spread = np.zeros((2, length, values_SX.shape[-1]), values_SX.dtype)
    first = self._places.first_P[index]
    for side in (0, 1):
      start, count = self._features.starts_P2[index, side], self._places.stop_P2[index, side] - first
      place = first - self._begin_P[index]
      spread[side, place : place + count] = values_SX[start : start + count]
    return spread

  def example(self, index: int) -> EncodedExample:
    """Returns the tokens of a pair as far as its row holds them, for the planning of batches."""
    begin, first = self._begin_P[index], self._places.first_P[index]
    tokens, masks = [], []
    for side in (0, 1):
      stop = self._places.stop_P2[index, side]
      last = self._arrays.targets[index, side, stop - 1 : stop]
      tokens.append(np.concatenate([self._arrays.tokens[index, side, begin:stop], last]))
      masks.append(np.arange(begin, stop + 1) > first)
    return EncodedExample(str(index), tuple(tokens), tuple(masks))


def stacked(rows: PairRows, indices: Sequence[int], length: int) -> Batch:
  """Returns the rows of indices as a batch; -1 stands for a row that counts nothing."""
  found = [rows.row(max(int(index), 0), length) for index in indices]
  batch = {name: np.stack([row[name] for row in found]) for name in found[0]}
  is_empty = np.asarray(indices) < 0
  for name in ("weights", "pair_weights"):
    batch[name][is_empty] = 0
  return batch


def training_batches(rows: PairRows, batch_size: int, seed: int) -> Any:
  """Returns shuffled batches without end, resumable; those of rows of several lengths have one each.

  Args:
    rows: of the training pairs.
    batch_size: rows of a batch.
    seed: decides the order.
  """
  if len(rows.lengths) == 1:
    return shuffled_batches(rows, batch_size, seed=seed)
  return _RowBatches(rows, batch_size, seed)


def ordered_batches(rows: PairRows, batch_size: int) -> Iterator[Batch]:
  """Yields all rows once, those of like lengths together, in batches of at most `batch_size`."""
  for piece in pieces_of(rows.sizes_P.tolist(), rows.lengths, batch_size):
    yield stacked(rows, piece.places, piece.length)


class _RowBatches:
  """Rows in the order that `nr.data.example_batches` plans for their tokens."""

  def __init__(self, rows: PairRows, batch_size: int, seed: int):
    examples = [rows.example(index) for index in range(len(rows))]
    # A row has one position less than its tokens: the last is only predicted.
    self._batches = padded_batches(examples, batch_size, [length + 1 for length in rows.lengths], seed)
    self._rows = rows

  def __iter__(self) -> "_RowIterator":
    return _RowIterator(self._rows, iter(self._batches))


class _RowIterator(Iterator[Batch]):
  """Goes through planned batches; its place is theirs."""

  def __init__(self, rows: PairRows, planned: Any):
    self._rows, self._planned = rows, planned

  def __next__(self) -> Batch:
    batch = next(self._planned)
    return stacked(self._rows, batch["indices"][:, 0], batch["tokens"].shape[-1] - 1)

  def get_state(self) -> Mapping[str, Any]:
    """Returns the place after the last batch given out."""
    return self._planned.get_state()

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a place that `get_state` returned."""
    self._planned.set_state(state)
