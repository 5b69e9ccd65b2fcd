"""Writing responses: prompts in pieces of a few shapes, so that one program serves all pieces of a shape."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.adaptive_decoding import AdaptiveNetwork, DrawnSetting, sample_adaptively
from nr.generation.decoding import pad_prompts
from nr.generation.language_models import Network
from nr.generation.sample import Generation, sample
from nr.generation.stopping import Stop
from nr.generation.transforms import parse
from nr.training import sharding
from nr.training.model_files import Model


class Room(NamedTuple):
  """What responses may take, and the shapes that they are written in.

  Attributes:
    max_new_tokens: most tokens of a response, its end included.
    end_ids: token ids that end one.
    lengths: growing; a prompt is padded on the left to the first that holds it.
    prompts_per_call: prompts that are read together.
    mesh: devices that the model lies on; None: where it is.
  """

  max_new_tokens: int
  end_ids: tuple[int, ...]
  lengths: tuple[int, ...]
  prompts_per_call: int = 250
  mesh: jax.sharding.Mesh | None = None


class Written(NamedTuple):
  """Responses on the host, rows R prompt-major.

  Attributes:
    tokens_RN: int32, the end of text included where it was reached.
    lengths_R: int32.
    log_probs_RN: nats a token under the model.
    transformed_log_probs_RN: nats a token under what it was drawn from.
    choices_RN: int, the setting that each token was drawn with; -1 behind the end; None without settings.
    finish_R: int32, why each ended; see `nr.generation.stopping`.
  """

  tokens_RN: np.ndarray
  lengths_R: np.ndarray
  log_probs_RN: np.ndarray
  transformed_log_probs_RN: np.ndarray
  choices_RN: np.ndarray | None = None
  finish_R: np.ndarray | None = None


class Piece(NamedTuple):
  """Prompts that are read together.

  Attributes:
    places: which of the prompts.
    rows: the same, and the last of them again until the piece is full: its further answers are thrown away.
    length: tokens that they are padded to.
  """

  places: list[int]
  rows: list[int]
  length: int


def with_head(network: Network, head: Model | None, num_settings: int) -> AdaptiveNetwork:
  """Returns the network with a trained head, or with settings that are equally likely."""
  fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(Network)}
  if head is None:
    return AdaptiveNetwork(**fields, num_settings=num_settings)
  return AdaptiveNetwork(**fields, head_graphdef=head.graphdef, head_params=head.params)


def pieces_of(sizes: Sequence[int], lengths: Sequence[int], per_call: int) -> Iterator[Piece]:
  """Yields the pieces of prompts: those of a length together, all but one piece shape a length.

  Args:
    sizes: tokens of each prompt.
    lengths: growing, that prompts may be padded to.
    per_call: prompts of a piece.

  Raises:
    ValueError: a prompt that is longer than all lengths.
  """
  by_length: dict[int, list[int]] = {}
  for place, size in enumerate(sizes):
    length = next((length for length in lengths if length >= size), None)
    if length is None:
      raise ValueError(f"prompt {place} has {size} tokens, at most {lengths[-1]} are read; shorten it")
    by_length.setdefault(length, []).append(place)
  for length in sorted(by_length):
    places = by_length[length]
    size = min(per_call, len(places))
    for start in range(0, len(places), size):
      kept = places[start : start + size]
      yield Piece(kept, [*kept, *[kept[-1]] * (size - len(kept))], length)


def write_piece(
  model: Network,
  prompts: Sequence[Sequence[int]],
  piece: Piece,
  room: Room,
  *,
  key: jax.Array,
  num_samples: int,
  law: DrawnSetting | None = None,
  chain: str = "",
) -> Written:
  """Samples responses to the prompts of a piece, with picked settings or a chain of transforms.

  Args:
    model: a network, adaptive if `law` is given.
    prompts: token ids of all prompts.
    piece: which of them.
    room: for responses.
    key: random key; the prompt's number decides the rest.
    num_samples: responses a prompt.
    law: how settings are picked.
    chain: transforms in text form, where no setting is picked.
  """
  tokens_BP, valid_BP = pad_prompts([prompts[row] for row in piece.rows], piece.length)
  shared: dict[str, Any] = dict(
    key=key,
    max_new_tokens=room.max_new_tokens,
    num_samples=num_samples,
    stop=Stop(ids_E=jnp.asarray(room.end_ids)),
    row_ids_B=jnp.asarray(piece.rows),
  )
  kept = len(piece.places) * num_samples
  with sharding.context(room.mesh):
    if law is None:
      found = _host(sample(model, tokens_BP, valid_BP, chain=parse(chain), **shared))
    else:
      adaptive = sample_adaptively(model, tokens_BP, valid_BP, law=law, **shared)
      found = _host(adaptive.generation)._replace(choices_RN=np.asarray(adaptive.choices_RN, np.int32))
  return Written(*(None if leaf is None else leaf[:kept] for leaf in found))


def _host(generation: Generation) -> Written:
  fields = ("tokens_RN", "lengths_R", "log_probs_RN", "transformed_log_probs_RN", "finish_R")
  found = {field: np.asarray(getattr(generation, field)) for field in fields}
  return Written(**found)
