"""A first-order Markov chain as a language model: every law over its texts can be enumerated."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr.generation.language_models import LanguageModel, Outputs


class MarkovCache(NamedTuple):
  """How many tokens each row has read: all that a first-order chain could forget."""

  lengths_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Markov(LanguageModel):
  """A first-order Markov chain: every law over its texts can be enumerated.

  Attributes:
    logits_CV: float32, the next token's logits after each context token; contexts
      beyond V serve as beginnings of text in prompts.
    extra_CV: further distributions by name, offered as streams.
    hidden_CD: hidden states by name.
  """

  logits_CV: jax.Array
  extra_CV: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  hidden_CD: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  @property
  def vocab_size(self) -> int:
    """Number of token ids that can be drawn."""
    return self.logits_CV.shape[1]

  @property
  def num_contexts(self) -> int:
    """Number of rows of the table."""
    return self.logits_CV.shape[0]

  @property
  def offers(self) -> frozenset[str]:
    """The extra tables."""
    return frozenset(
      [f"streams:{name}" for name in self.extra_CV] + [f"hidden:{name}" for name in self.hidden_CD]
    )

  def init_cache(self, batch: int, capacity: int, *, uneven: bool = False) -> MarkovCache:
    """Makes an empty cache."""
    return MarkovCache(jnp.zeros(batch, jnp.int32))

  def extend(self, tokens_BL, cache, valid_BL=None, *, visible_BLL=None, read_B=None, is_prompt=False):
    """Looks the tokens up."""
    valid_BL = jnp.ones(tokens_BL.shape, bool) if valid_BL is None else valid_BL
    cache = MarkovCache(cache.lengths_B + valid_BL.sum(axis=1, dtype=jnp.int32))
    if read_B is not None:
      tokens_BL = jnp.take_along_axis(tokens_BL, read_B[:, None], axis=1)[:, 0]
    tables = Outputs(self.logits_CV, self.extra_CV, self.hidden_CD)
    return jax.tree.map(lambda rows_C: rows_C[tokens_BL], tables), cache

  def fork(self, cache: MarkovCache, rows_B: jax.Array) -> MarkovCache:
    """Gathers rows."""
    return MarkovCache(cache.lengths_B[rows_B])

  def rollback(self, cache: MarkovCache, forgotten_B: jax.Array) -> MarkovCache:
    """Shortens the rows."""
    return MarkovCache(cache.lengths_B - forgotten_B)

  def keep_path(self, cache: MarkovCache, size: int, offsets_BA: jax.Array, kept_B: jax.Array) -> MarkovCache:
    """Forgets what is not kept; a chain has no slots to move."""
    return MarkovCache(cache.lengths_B - size + kept_B)
