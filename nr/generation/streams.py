"""Several language models advanced by the same tokens: what contrastive and guided decoding read."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from nr.generation.language_models import LanguageModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """A further model that reads the same generated tokens.

  Attributes:
    model: with the vocabulary of the main model.
    prompts_BP: its own prompts, int32, padded on the left; None: those of the main
      model (another model, the same text).
    valid_BP: bool, False at padding of `prompts_BP`; None: no padding.
  """

  model: LanguageModel
  prompts_BP: jax.Array | None = None
  valid_BP: jax.Array | None = None

  def take(self, rows_B: jax.Array) -> "Stream":
    """Gathers rows of the prompts."""
    prompts_BP = None if self.prompts_BP is None else self.prompts_BP[rows_B]
    valid_BP = None if self.valid_BP is None else self.valid_BP[rows_B]
    return Stream(self.model.take(rows_B), prompts_BP, valid_BP)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class WithStreams(LanguageModel):
  """A main model and further ones, each with a cache of its own, advanced by the same tokens.

  Contrastive decoding, classifier-free guidance, expert and anti-expert models and
  context-aware decoding read the further ones' logits from `Context.streams`.

  Attributes:
    main: whose law the text is drawn from.
    streams: the further ones by name.
  """

  main: LanguageModel
  streams: dict[str, Stream]

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return self.main.vocab_size

  @property
  def num_contexts(self) -> int:
    """Those of the main model."""
    return self.main.num_contexts

  @property
  def max_length(self) -> int | None:
    """The least of all."""
    models = [self.main, *(stream.model for stream in self.streams.values())]
    return min((model.max_length for model in models if model.max_length is not None), default=None)

  @property
  def offers(self) -> frozenset[str]:
    """The further models' logits, and what the main model offers."""
    return self.main.offers | {f"streams:{name}" for name in self.streams}

  def check(self) -> None:
    """Raises ValueError for a stream with another vocabulary, and for what its members refuse."""
    for member in (self.main, *(stream.model for stream in self.streams.values())):
      member.check()
    for name, stream in self.streams.items():
      if stream.model.vocab_size != self.vocab_size:
        raise ValueError(
          f"stream {name!r} has a vocabulary of {stream.model.vocab_size}, the main model of "
          f"{self.vocab_size}; streams must share the main model's tokenizer"
        )

  def check_drafts(self, count: int) -> None:
    """Asks every member."""
    for member in (self.main, *(stream.model for stream in self.streams.values())):
      member.check_drafts(count)

  def init_cache(self, batch: int, capacity: int, *, uneven: bool = False) -> dict[str, Any]:
    """Makes a cache for each model."""
    rest = {
      name: stream.model.init_cache(batch, capacity, uneven=uneven) for name, stream in self.streams.items()
    }
    return {"": self.main.init_cache(batch, capacity, uneven=uneven), **rest}

  def extend(self, tokens_BL, cache, valid_BL=None, *, visible_BLL=None, read_B=None, is_prompt=False):
    """Extends every model by the same tokens."""
    settings = dict(visible_BLL=visible_BLL, read_B=read_B, is_prompt=is_prompt)
    outputs, main = self.main.extend(tokens_BL, cache[""], valid_BL, **settings)
    streams, caches = dict(outputs.streams), {"": main}
    for name, stream in self.streams.items():
      its_outputs, caches[name] = stream.model.extend(tokens_BL, cache[name], valid_BL, **settings)
      streams[name] = its_outputs.logits
    return outputs._replace(streams=streams), caches

  def prefill(self, prompts_BP, valid_BP, capacity, *, uneven=False):
    """Reads every model's own prompts; those that are longer get a longer cache."""
    outputs, main = self.main.prefill(prompts_BP, valid_BP, capacity, uneven=uneven)
    streams, caches = dict(outputs.streams), {"": main}
    for name, stream in self.streams.items():
      its_prompts_BP, its_valid_BP = prompts_BP, valid_BP
      if stream.prompts_BP is not None:
        its_prompts_BP = stream.prompts_BP
        if its_prompts_BP.shape[0] != prompts_BP.shape[0]:
          raise ValueError(
            f"stream {name!r} has {its_prompts_BP.shape[0]} prompts for {prompts_BP.shape[0]} rows: give one a row"
          )
        whole_BP = jnp.ones(its_prompts_BP.shape, bool)
        its_valid_BP = whole_BP if stream.valid_BP is None else stream.valid_BP
      its_capacity = capacity - prompts_BP.shape[1] + its_prompts_BP.shape[1]
      its_outputs, caches[name] = stream.model.prefill(
        its_prompts_BP, its_valid_BP, its_capacity, uneven=uneven
      )
      streams[name] = its_outputs.logits
    return outputs._replace(streams=streams), caches

  def fork(self, cache: dict[str, Any], rows_B: jax.Array) -> dict[str, Any]:
    """Forks every cache."""
    return self._each(cache, lambda model, its: model.fork(its, rows_B))

  def fork_prompts(self, cache: dict[str, Any], batch: int, num_samples: int, prompt_length: int) -> dict:
    """Makes rows of each prompt in every cache."""

    def forked(model: LanguageModel, its: Any, own_BP: jax.Array | None) -> Any:
      length = prompt_length if own_BP is None else own_BP.shape[1]
      return model.fork_prompts(its, batch, num_samples, length)

    rest = {name: forked(each.model, cache[name], each.prompts_BP) for name, each in self.streams.items()}
    return {"": forked(self.main, cache[""], None), **rest}

  def rollback(self, cache: dict[str, Any], forgotten_B: jax.Array) -> dict[str, Any]:
    """Shortens the rows of every cache."""
    return self._each(cache, lambda model, its: model.rollback(its, forgotten_B))

  def keep_path(
    self, cache: dict[str, Any], size: int, offsets_BA: jax.Array, kept_B: jax.Array
  ) -> dict[str, Any]:
    """Keeps one path of a tree in every cache."""
    return self._each(cache, lambda model, its: model.keep_path(its, size, offsets_BA, kept_B))

  def _each(self, cache: dict[str, Any], change: Callable[[LanguageModel, Any], Any]) -> dict[str, Any]:
    rest = {name: change(stream.model, cache[name]) for name, stream in self.streams.items()}
    return {"": change(self.main, cache[""]), **rest}

  def take(self, rows_B: jax.Array) -> Self:
    """Gathers the rows of every model."""
    streams = {name: stream.take(rows_B) for name, stream in self.streams.items()}
    return WithStreams(self.main.take(rows_B), streams)
