"""A reward model as a judge: ours, or a sequence classifier from Hugging Face."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from nr.data.bad_records import DataError
from nr.data.examples import PlainText, TextFormat
from nr.generation.decoding import SMALLEST_BUCKET
from nr.judges.protocol import Item, Judgement, judgement
from nr.models import parameters
from nr.models.reward import RewardModelSpec
from nr.training import model_files


class RewardModelJudge:
  """The reward of a prompt with its response, read at the response's end.

  Args:
    spec: of the reward model.
    params: its parameters, in either layout.
    format: how prompt and response become tokens; a chat template for a model trained with one.
    max_length: most tokens; what is longer is not judged.
    batch_size: texts scored together.
    name: for reports.
  """

  def __init__(
    self,
    spec: RewardModelSpec,
    params: Mapping,
    format: TextFormat,
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    name: str = "reward model",
  ):
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size}: give at least 1")
    is_unrolled = spec.transformer.layers == "unroll"
    params = (parameters.unstack_layers if is_unrolled else parameters.stack_layers)(params)
    self._params = jax.tree.map(jnp.asarray, params)
    self._graphdef = model_files.graphdef_of(spec)
    learned = spec.transformer.max_length if spec.transformer.positions == "learned" else None
    limits = [limit for limit in (max_length, learned) if limit is not None]
    self.max_length = min(limits) if limits else None
    self._format, self.batch_size, self.name = format, batch_size, name

  @classmethod
  def of_folder(cls, folder: str | pathlib.Path, format: TextFormat | None = None, **settings: Any) -> Self:
    """Returns the judge of a sequence classifier in Hugging Face's format.

    Args:
      folder: with its tokenizer beside it.
      format: how texts become tokens; None: plain text by that tokenizer.
      **settings: of the judge.
    """
    from nr.data.tokenizers import load_tokenizer
    from nr.interchange.huggingface import load_huggingface_reward_model

    layers = "unroll" if jax.default_backend() == "cpu" else "scan"
    spec, params = load_huggingface_reward_model(folder, layers=layers)
    format = PlainText(load_tokenizer(folder)) if format is None else format
    return cls(spec, params, format, **{"name": pathlib.Path(folder).name, **settings})

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns the reward of each item; None where it is NaN, or the text cannot be encoded or is too long."""
    texts, fitting = [], []
    found: list[Judgement | None] = [None] * len(items)
    for place, item in enumerate(items):
      try:
        ids = self._encode(item)
      except DataError as error:
        ids, found[place] = [], Judgement(None, f"no tokens: {error}")
      texts.append(ids)
      if found[place] is not None:
        continue
      if self.max_length is not None and len(ids) > self.max_length:
        found[place] = Judgement(None, f"{len(ids)} tokens, the reward model reads {self.max_length}")
      else:
        fitting.append(place)
    # Texts of like lengths together, so that little is padding.
    fitting.sort(key=lambda place: len(texts[place]))
    for start in range(0, len(fitting), self.batch_size):
      places = fitting[start : start + self.batch_size]
      for place, reward in zip(places, self._score([texts[place] for place in places])):
        found[place] = judgement(reward, tokens=len(texts[place]))
    return found

  def _encode(self, item: Item) -> list[int]:
    response = self._format.encode_response(item.response)
    end = [] if response[-1:] == [self._format.end_id] else [self._format.end_id]
    return [*self._format.encode_prompt(item.prompt), *response, *end]

  def _score(self, texts: list[list[int]]) -> np.ndarray:
    """Returns float32 [texts]."""
    length = max(SMALLEST_BUCKET, 1 << (max(map(len, texts)) - 1).bit_length())
    length = length if self.max_length is None else min(length, self.max_length)
    tokens_BL = np.zeros((self.batch_size, length), np.int32)
    lengths_B = np.ones(self.batch_size, np.int32)
    for row, ids in enumerate(texts):
      tokens_BL[row, : len(ids)], lengths_B[row] = ids, len(ids)
    return np.asarray(_rewards(self._graphdef, self._params, tokens_BL, lengths_B))[: len(texts)]


@functools.partial(jax.jit, static_argnums=0)
def _rewards(graphdef: Any, params: Mapping, tokens_BL: jax.Array, lengths_B: jax.Array) -> jax.Array:
  return parameters.merge(graphdef, params)(tokens_BL, lengths_B)
