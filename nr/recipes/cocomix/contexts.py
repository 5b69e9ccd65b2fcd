"""Where concepts fire: their strongest contexts in held-out text, and how often."""

from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from nr.data.token_dataset import TokenDataset
from nr.data.tokenizers import Tokenizer
from nr.data.windows import WindowSource, ordered_batches
from nr.models import parameters
from nr.models.residual_tap import TapInputs, activations_at
from nr.recipes.cocomix import language_model
from nr.recipes.stages import StageContext
from nr.training.model_files import Model


class Firings(NamedTuple):
  """Every activation of every latent on a split, sorted by latent, strongest first.

  Attributes:
    latents: [firings] int32.
    values: [firings] float32, activations after ReLU in the autoencoder's space.
    places: [firings] int64, index of the token in the stream.
    starts: [latents + 1] where each latent's firings begin.
    tokens: number of tokens read.
  """

  latents: np.ndarray
  values: np.ndarray
  places: np.ndarray
  starts: np.ndarray
  tokens: int

  def frequency(self) -> np.ndarray:
    """Fraction of tokens on which each latent fires."""
    return np.diff(self.starts) / self.tokens

  def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of a latent's firings and their values, strongest first."""
    rows = slice(self.starts[latent], self.starts[latent + 1])
    return self.places[rows], self.values[rows]

  def largest(self, latent: int) -> float:
    """Returns a latent's strongest activation, 0 where it never fires."""
    values = self.of(latent)[1]
    return float(values[0]) if len(values) else 0.0

  def pieces(self, latent: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the text that was read into pieces of `length` tokens.

    Returns:
      The first places of the pieces in which a latent fires, and of those in which it never does.
    """
    count = self.tokens // length
    has_fired = np.zeros(count, bool)
    numbers = self.of(latent)[0] // length
    has_fired[numbers[numbers < count]] = True
    starts = np.arange(count) * length
    return starts[has_fired], starts[~has_fired]

  def strongest(self, latent: int, count: int, apart: int) -> list[tuple[int, float]]:
    """Returns up to `count` (place, value) of a latent, no two within `apart` tokens."""
    found: list[tuple[int, float]] = []
    for index in range(self.starts[latent], self.starts[latent + 1]):
      place = int(self.places[index])
      if all(abs(place - other) > apart for other, _ in found):
        found.append((place, float(self.values[index])))
      if len(found) == count:
        break
    return found


def find_firings(
  context: StageContext, teacher: Model, autoencoder: Model, layer: int, batch_size: int, max_windows: int
) -> Firings:
  """Runs teacher and autoencoder over the first `max_windows` validation windows (0: all)."""
  source = first_windows(language_model.window_source(context, "validation"), max_windows)
  batches, count = ordered_batches(source, batch_size), len(source)

  @jax.jit
  def encode(teacher_params: Any, autoencoder_params: Any, batch: Any) -> Any:
    module = parameters.merge(autoencoder.graphdef, autoencoder_params)
    stream_BLD = activations_at(
      parameters.merge(teacher.graphdef, teacher_params), TapInputs.of(batch), layer
    )
    return module.encode(module.normalise(stream_BLD).values_TD)

  latents, values, places = [], [], []
  for number, batch in enumerate(
    tqdm(batches, total=len(batches), desc="contexts", unit="batch", leave=False)
  ):
    code = encode(teacher.params, autoencoder.params, batch)
    values_BLK, indices_BLK = np.asarray(code.values_TK), np.asarray(code.indices_TK)
    first = number * batch_size * source.length
    place_BL = first + np.arange(values_BLK.shape[0] * source.length).reshape(values_BLK.shape[:2])
    is_fired = (values_BLK > 0) & (place_BL < count * source.length)[..., None]
    latents.append(indices_BLK[is_fired])
    values.append(values_BLK[is_fired])
    places.append(np.broadcast_to(place_BL[..., None], is_fired.shape)[is_fired])
  latent, value, place = (np.concatenate(pieces) for pieces in (latents, values, places))
  order = np.lexsort((-value, latent))
  starts = np.searchsorted(latent[order], np.arange(autoencoder.spec.num_latents + 1))
  return Firings(latent[order], value[order], place[order], starts, count * source.length)


def first_windows(source: WindowSource, count: int) -> "_First":
  """Returns the first `count` windows of a source (0: all), as a source."""
  return _First(source, min(count, len(source)) if count else len(source))


class _First:
  """The first elements of a source."""

  def __init__(self, source: WindowSource, count: int):
    self._source, self._count, self.length = source, count, source.length

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> Any:
    return self._source[index]


def context_text(dataset: TokenDataset, tokenizer: Tokenizer, place: int, around: int) -> str:
  """Returns the text around a token of the stream, the token itself between « and »."""
  tokens = dataset.tokens
  before = tokenizer.decode(tokens[max(0, place - around) : place].tolist())
  after = tokenizer.decode(tokens[place + 1 : place + 1 + around].tolist())
  return f"{before}«{tokenizer.decode([int(tokens[place])])}»{after}"
