"""What decoders drive: anything that can be extended, forked and rolled back.

A language model is a pytree (definition static, parameters leaves), so drivers take
it as an argument of one compiled program. `Network` wraps the models of `nr.models`;
`nr.generation.streams` advances several with the same tokens, and `nr.generation.markov`
is a chain whose law can be enumerated.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models import parameters
from nr.models.cache import CacheSpec
from nr.models.concept_intervention import ConceptIntervention
from nr.models.partitioning import constrain
from nr.names import unknown

INTERVENE_ON = ("all", "generation")


class Outputs(NamedTuple):
  """What a model says of L tokens, or of the one that was asked for (without the axis L).

  Attributes:
    logits: float32 [B, L, V] or [B, V]; the next token after each.
    streams: float32 logits of other distributions over the same token, by name.
    hidden: hidden states [B, L, D] or [B, D], by name.
  """

  logits: jax.Array
  streams: dict[str, jax.Array]
  hidden: dict[str, jax.Array]

  def at(self, position: int) -> "Outputs":
    """Returns the outputs [B, ...] of one position of L."""
    return jax.tree.map(lambda leaf: leaf[:, position], self)


class LanguageModel:
  """Base of what drivers accept. Subclasses are pytrees.

  Arguments shared by the methods:
    tokens_BL: int32 token ids, new ones.
    valid_BL: bool, False at padding: on the left of a cache whose rows share their
      free end, on the right of an uneven one. None: no padding.
    visible_BLL: bool, which new tokens each new token sees, itself included, when
      they form a tree. None: a chain.
    read_B: int32, the new token whose outputs are wanted; None: all, with an axis L.
    is_prompt: whether the tokens were given (and not generated), for interventions
      that act on generated text only.
  """

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    raise NotImplementedError

  @property
  def num_contexts(self) -> int:
    """Number of token ids that prompts may hold."""
    return self.vocab_size

  @property
  def max_length(self) -> int | None:
    """Most tokens a row may have, or None."""
    return None

  @property
  def offers(self) -> frozenset[str]:
    """Names "streams:<name>" and "hidden:<name>" that its outputs hold."""
    return frozenset()

  def init_cache(self, batch: int, capacity: int, *, uneven: bool = False) -> Any:
    """Makes an empty cache for `capacity` tokens a row; `uneven`: rows advance by themselves."""
    raise NotImplementedError

  def extend(
    self,
    tokens_BL: jax.Array,
    cache: Any,
    valid_BL: jax.Array | None = None,
    *,
    visible_BLL: jax.Array | None = None,
    read_B: jax.Array | None = None,
    is_prompt: bool = False,
  ) -> tuple[Outputs, Any]:
    """Reads new tokens behind those in the cache."""
    raise NotImplementedError

  def prefill(
    self, prompts_BP: jax.Array, valid_BP: jax.Array, capacity: int, *, uneven: bool = False
  ) -> tuple[Outputs, Any]:
    """Reads prompts, padded on the left, and returns the outputs [B, ...] at their last tokens.

    Args:
      prompts_BP: int32.
      valid_BP: bool.
      capacity: tokens the cache must hold, prompt included.
      uneven: as in `init_cache`; the prompts then lie in the cache without padding.
    """
    cache = self.init_cache(prompts_BP.shape[0], capacity, uneven=uneven)
    if not uneven:
      read_B = jnp.full(prompts_BP.shape[:1], prompts_BP.shape[1] - 1)
      return self.extend(prompts_BP, cache, valid_BP, read_B=read_B, is_prompt=True)
    tokens_BP, lengths_B = left_aligned(prompts_BP, valid_BP)
    valid_BP = jnp.arange(prompts_BP.shape[1]) < lengths_B[:, None]
    return self.extend(tokens_BP, cache, valid_BP, read_B=lengths_B - 1, is_prompt=True)

  def fork(self, cache: Any, rows_B: jax.Array) -> Any:
    """Returns a cache whose row b continues row `rows_B[b]`; any number of rows."""
    raise NotImplementedError

  def fork_prompts(self, cache: Any, batch: int, num_samples: int, prompt_length: int) -> Any:
    """Makes `num_samples` rows of each row that has just read its prompt, prompt-major.

    Args:
      cache: of `prefill`.
      batch: number of prompts B.
      num_samples: rows a prompt.
      prompt_length: columns P of the prompts, padding included.
    """
    return self.fork(cache, jnp.repeat(jnp.arange(batch), num_samples))

  def rollback(self, cache: Any, forgotten_B: jax.Array) -> Any:
    """Forgets the last `forgotten_B` tokens of each row of an uneven cache."""
    raise NotImplementedError

  def keep_path(self, cache: Any, size: int, offsets_BA: jax.Array, kept_B: jax.Array) -> Any:
    """Keeps one path of a tree of tokens that an uneven cache has just read, and forgets the rest.

    Args:
      cache: after `extend` with `visible_BLL`.
      size: tokens L of the tree.
      offsets_BA: int32, increasing along A: where in the tree the path's tokens are.
      kept_B: int32, how many of the A are kept.
    """
    raise NotImplementedError

  def check(self) -> None:
    """Raises ValueError for settings that it has no use for."""

  def check_drafts(self, count: int) -> None:
    """Raises ValueError when its cache cannot take back `count` tokens."""

  def take(self, rows_B: jax.Array) -> Self:
    """Returns the model with what belongs to rows (interventions, prompts of streams) gathered."""
    return self


def left_aligned(tokens_BP: jax.Array, valid_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Moves the valid tokens of each row to the front.

  Returns:
    int32 [B, P] tokens, 0 behind them, and int32 [B] their number.
  """
  order_BP = jnp.argsort(~valid_BP, axis=1, stable=True)
  lengths_B = valid_BP.sum(axis=1, dtype=jnp.int32)
  moved_BP = jnp.take_along_axis(tokens_BP.astype(jnp.int32), order_BP, axis=1)
  return jnp.where(jnp.arange(tokens_BP.shape[1]) < lengths_B[:, None], moved_BP, 0), lengths_B


def _read(states_BLD: jax.Array, read_B: jax.Array | None) -> jax.Array:
  if read_B is None:
    return states_BLD
  return jnp.take_along_axis(states_BLD, read_B[:, None, None], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Network(LanguageModel):
  """A `Transformer` or a `ConceptMixingTransformer`, by definition and parameters.

  Attributes:
    graphdef: its definition.
    params: its parameters. On CPU the unrolled layout decodes faster.
    intervention: concept edits, for a concept model; `active_BL` of shape [] or
      [B, 1] says for which rows.
    intervene_on: "all" edits every token; "generation" those from which a token is
      sampled: the last of the prompt and all new ones.
    taps: blocks whose entering stream, read through the final norm and the output
      head, is offered as stream "layer_<block>" (early exits, DoLa).
    offers_hidden: whether the final-normed state is offered as hidden "last".
    cache: layout of the key-value cache. In a paged one rows are always uneven.
  """

  graphdef: Any = dataclasses.field(metadata=dict(static=True))
  params: Mapping
  intervention: ConceptIntervention | None = None
  intervene_on: str = dataclasses.field(default="all", metadata=dict(static=True))
  taps: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))
  offers_hidden: bool = dataclasses.field(default=False, metadata=dict(static=True))
  cache: CacheSpec = dataclasses.field(default=CacheSpec(), metadata=dict(static=True))

  def model(self) -> nnx.Module:
    """Returns the module."""
    return parameters.merge(self.graphdef, self.params)

  @property
  def spec(self) -> Any:
    """Settings of the transformer."""
    return self.model().spec

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return self.spec.vocab_size

  @property
  def max_length(self) -> int | None:
    """Number of learned positions, or None for rotary ones."""
    return self.spec.max_length if self.spec.positions == "learned" else None

  @property
  def offers(self) -> frozenset[str]:
    """A stream for each tap, and the hidden state if it is offered."""
    hidden = {"hidden:last"} if self.offers_hidden else set()
    return frozenset({f"streams:layer_{block}" for block in self.taps} | hidden)

  def check(self) -> None:
    """Raises ValueError for settings that this model has no use for."""
    if self.intervene_on not in INTERVENE_ON:
      raise ValueError(unknown("intervene_on", self.intervene_on, INTERVENE_ON))
    model = self.model()
    if self.intervention is not None:
      shape = jnp.shape(self.intervention.active_BL)
      if shape and (len(shape) != 2 or shape[1] != 1):
        raise ValueError(f"intervention.active_BL has shape {shape}: give [] or [rows, 1] while generating")
      if not hasattr(model, "concept_spec"):
        raise ValueError(f"intervention: {type(model).__name__} has no concepts to edit; leave it out")
    if self.taps and not hasattr(model, "run_blocks"):
      raise ValueError(f"taps={self.taps}: {type(model).__name__} offers no early exits; leave taps empty")
    if any(not 0 < block < self.spec.num_layers for block in self.taps) or list(self.taps) != sorted(
      set(self.taps)
    ):
      raise ValueError(f"taps={self.taps}: give increasing blocks in 1..{self.spec.num_layers - 1}")

  def check_drafts(self, count: int) -> None:
    """Raises ValueError for a ring that overwrites what `count` refused drafts would need again."""
    if self.cache.layout == "ring" and self.cache.slack < count:
      raise ValueError(
        f"CacheSpec.slack={self.cache.slack}: {count} drafts may be taken back; give a ring as much slack, "
        "or draft less"
      )

  def init_cache(self, batch: int, capacity: int, *, uneven: bool = False) -> Any:
    """Makes an empty cache; see `LanguageModel`."""
    uneven = uneven or self.cache.is_always_uneven
    return self.model().init_cache(batch, capacity, uneven=uneven, layout=self.cache)

  def prefill(self, prompts_BP, valid_BP, capacity, *, uneven=False):
    """Reads prompts; see `LanguageModel`."""
    return super().prefill(prompts_BP, valid_BP, capacity, uneven=uneven or self.cache.is_always_uneven)

  def extend(self, tokens_BL, cache, valid_BL=None, *, visible_BLL=None, read_B=None, is_prompt=False):
    """Reads new tokens; see `LanguageModel`."""
    model, settings = self.model(), {}
    if self.intervention is not None:
      settings["intervention"] = self._edit(tokens_BL, read_B, is_prompt)
    if self.taps:
      settings["taps"] = self.taps
    hidden_BLD, cache, *tapped = model.extend_hidden(
      tokens_BL, cache, valid_BL, visible_BLL=visible_BLL, **settings
    )

    def logits(states_BLD: jax.Array) -> jax.Array:
      read = model.logits(_read(states_BLD, read_B))
      return read if read_B is None else constrain(read[:, 0], "batch", "activation_vocab")

    streams = {f"layer_{block}": logits(tapped[0][block]) for block in self.taps}
    hidden = {}
    if self.offers_hidden:
      read_BLD = _read(hidden_BLD, read_B)
      hidden["last"] = read_BLD if read_B is None else read_BLD[:, 0]
    return Outputs(logits(hidden_BLD), streams, hidden), cache

  def _edit(self, tokens_BL: jax.Array, read_B: jax.Array | None, is_prompt: bool) -> ConceptIntervention:
    active_BL = jnp.broadcast_to(jnp.asarray(self.intervention.active_BL), tokens_BL.shape)
    if is_prompt and self.intervene_on == "generation":
      read_B = jnp.full(tokens_BL.shape[:1], -1) if read_B is None else read_B
      active_BL = active_BL & (jnp.arange(tokens_BL.shape[1]) == read_B[:, None])
    return self.intervention._replace(active_BL=active_BL)

  def fork(self, cache: Any, rows_B: jax.Array) -> Any:
    """Gathers rows of the cache."""
    return self.model().fork(cache, rows_B)

  def fork_prompts(self, cache: Any, batch: int, num_samples: int, prompt_length: int) -> Any:
    """Makes rows of each prompt; with layout "shared_prefix" they read one copy of it."""
    has_room = prompt_length < cache.capacity
    if self.cache.layout == "shared_prefix" and num_samples > 1 and has_room:
      return self.model().share_prefix(cache, num_samples, prompt_length)
    return super().fork_prompts(cache, batch, num_samples, prompt_length)

  def rollback(self, cache: Any, forgotten_B: jax.Array) -> Any:
    """Shortens the rows of an uneven cache."""
    return self.model().rollback(cache, cache.length - forgotten_B)

  def keep_path(self, cache: Any, size: int, offsets_BA: jax.Array, kept_B: jax.Array) -> Any:
    """Keeps one path of a tree in an uneven cache; see `LanguageModel`."""
    model, start_B = self.model(), cache.length - size
    return model.rollback(model.keep_path(cache, start_B, offsets_BA), start_B + kept_B)

  def take(self, rows_B: jax.Array) -> Self:
    """Gathers the rows of the intervention, where it differs between rows."""
    if self.intervention is None:
      return self

    def gather(leaf: jax.Array) -> jax.Array:
      return jnp.take(leaf, rows_B, axis=0) if jnp.ndim(leaf) == 2 and leaf.shape[0] > 1 else leaf

    return dataclasses.replace(self, intervention=jax.tree.map(gather, self.intervention))
