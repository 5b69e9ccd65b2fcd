"""CoCoMix: a transformer that predicts concepts and mixes them into its own stream; and its baselines.

Source: arXiv 2502.08524 section 2.2, with the normalisation of the released code.
Before block `insert_at` every token's stream predicts concepts; the largest logits
are compressed into one vector, the continuous concept, that becomes a row of its
own behind the token's. Later blocks see twice the rows, and the next token is read
at the concept rows. Baselines (section 3.3) insert something else, or elsewhere:
see `ConceptMixingSpec.mode`.

    model = ConceptMixingTransformer(transformer_spec, concept_spec, rngs=nnx.Rngs(key))
    output = model.forward(tokens_BL, labels_BLA=labels_BLA)
    logits_BLV = model.logits(output.hidden_BLD)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models import cache as caches
from nr.models.attention import AttentionInputs
from nr.models.cache import Cache, CacheSpec
from nr.models.concept_head import ConceptPrediction
from nr.models.concept_intervention import ConceptIntervention
from nr.models.concept_mixing_spec import ConceptMixingSpec
from nr.models.concept_paths import ConceptPath, HiddenPath, PausePath
from nr.models.concept_readout import run_last_block
from nr.models.concept_rows import RowLayout
from nr.models.latent_thoughts import think
from nr.models.transformer import Transformer, continued_rows
from nr.models.transformer_spec import TransformerSpec

__all__ = [
  "ConceptIntervention",
  "ConceptMixingCache",
  "ConceptMixingOutput",
  "ConceptMixingSpec",
  "ConceptMixingTransformer",
  "ConceptPath",
  "ConceptPrediction",
]


class ConceptMixingOutput(NamedTuple):
  """What one pass over a batch yields.

  Attributes:
    hidden_BLD: final-normed stream at the readout rows, compute type; row t
      predicts token t + 1.
    concepts: the concept predictions, or None in modes that make none.
    regressed_BLE: in mode "hidden", the predictions of the teacher's tapped state.
  """

  hidden_BLD: jax.Array
  concepts: ConceptPrediction | None
  regressed_BLE: jax.Array | None = None


class ConceptMixingCache(NamedTuple):
  """Key-value caches of the blocks before and after the insertion.

  Attributes:
    lower: blocks 0..insert_at, one slot a token.
    upper: the other blocks, two slots a token where rows are inserted.
    thoughts: in mode "thought", the other blocks once more for each earlier pass: the
      first with one slot a token, the refinements with two.
  """

  lower: Cache
  upper: Cache
  thoughts: tuple[Cache, ...] = ()

  @property
  def capacity(self) -> int:
    """Number of tokens that fit."""
    return self.lower.capacity

  @property
  def length(self) -> jax.Array:
    """Number of tokens read, padding included; see `Cache`."""
    return self.lower.length


class Insertion(NamedTuple):
  """What the insertion makes of the stream that arrives at it.

  Attributes:
    rows_BRD: the stream that enters block `insert_at`.
    attention: positions and segments of its rows.
    layout: which row is whose; None without rows besides those of the tokens.
    concepts: as in `ConceptMixingOutput`.
    regressed_BLE: likewise.
    thoughts: caches of the earlier passes, extended; () without any.
  """

  rows_BRD: jax.Array
  attention: AttentionInputs
  layout: RowLayout | None
  concepts: ConceptPrediction | None = None
  regressed_BLE: jax.Array | None = None
  thoughts: tuple[Cache, ...] = ()


class ConceptMixingTransformer(nnx.Module):
  """A transformer that inserts rows of concepts, or of a baseline, before block `insert_at`.

  Arguments shared by the methods are those of `Transformer`, and
    labels_BLA: integer [B, L, A] label concepts, 65535 for none; asks for their logits.
    intervention: edits of the predicted concepts.

  Raises:
    ValueError: when the insertion is outside the model, or, from the methods, when
      labels or an intervention are given to a mode that has no use for them.
  """

  def __init__(self, spec: TransformerSpec, concept_spec: ConceptMixingSpec, *, rngs: nnx.Rngs):
    concept_spec.check_model(spec)
    self.spec = spec
    self.concept_spec = concept_spec
    self.transformer = Transformer(spec, rngs=rngs)
    self.concepts = _make_path(spec, concept_spec, rngs)

  @property
  def unembedding_VD(self) -> jax.Array:
    """The output head [V, D]."""
    return self.transformer.unembedding_VD

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    """Returns float32 logits [B, L, V] of final-normed hidden states."""
    return self.transformer.logits(x_BLD)

  def forward(
    self,
    tokens_BL: jax.Array,
    *,
    labels_BLA: jax.Array | None = None,
    segment_ids_BL: jax.Array | None = None,
    positions_BL: jax.Array | None = None,
    intervention: ConceptIntervention | None = None,
    key: jax.Array | None = None,
  ) -> ConceptMixingOutput:
    """Runs the model over whole sequences."""
    embed_key, block_key = (None, None) if key is None else jax.random.split(key)
    x_BLD, attention = self.transformer.enter(tokens_BL, positions_BL, segment_ids_BL, key=embed_key)
    insert_at = self.concept_spec.insert_at
    x_BLD, _ = self.transformer.run_blocks(x_BLD, 0, insert_at, attention=attention, key=block_key)
    is_counted_from_0 = positions_BL is None and segment_ids_BL is None
    inserted = self.insert(
      x_BLD, attention, labels_BLA, intervention, is_counted_from_0=is_counted_from_0, key=block_key
    )
    x_BLD = self.transformer.final_norm(self._run_upper(inserted, block_key))
    return ConceptMixingOutput(x_BLD, inserted.concepts, inserted.regressed_BLE)

  def hidden(self, tokens_BL: jax.Array, **settings: Any) -> jax.Array:
    """Returns final-normed hidden states [B, L, D]; settings as of `forward`."""
    return self.forward(tokens_BL, **settings).hidden_BLD

  def __call__(self, tokens_BL: jax.Array, **settings: Any) -> jax.Array:
    """Returns float32 next-token logits [B, L, V]; settings as of `forward`."""
    return self.logits(self.hidden(tokens_BL, **settings))

  def insert(
    self,
    x_BLD: jax.Array,
    attention: AttentionInputs,
    labels_BLA: jax.Array | None = None,
    intervention: ConceptIntervention | None = None,
    *,
    is_counted_from_0: bool = False,
    thoughts: tuple[Cache, ...] | None = None,
    key: jax.Array | None = None,
  ) -> Insertion:
    """Turns the stream that arrives at the insertion into the one that enters block `insert_at`.

    Args:
      x_BLD: the stream.
      attention: positions and segments of the tokens.
      labels_BLA: see the class.
      intervention: see the class.
      is_counted_from_0: whether positions are known to be 0, 1, ..., L - 1. With `insert_every`
        above 1 there are fewer rows then; same values.
      thoughts: caches of earlier passes, for mode "thought" while decoding.
      key: random key for dropout in those passes.
    """
    spec, path = self.concept_spec, self.concepts
    self._check_use(labels_BLA, intervention)
    prediction = path.predict(x_BLD, labels_BLA, intervention) if spec.is_predicting else None
    if spec.mode == "add":
      return Insertion(x_BLD + path.mix(x_BLD, prediction), attention, None, prediction)
    if not spec.is_interleaving:
      return Insertion(x_BLD, attention, None, prediction)
    layout = RowLayout.of(attention, spec.insert_every, is_counted_from_0)
    parents_BMD, regressed_BLE, passes = layout.parents(x_BLD), None, ()
    if spec.mode == "pause":
      c_BMD = path.rows(parents_BMD)
    elif spec.mode == "hidden":
      regressed_BLE = path.predict(x_BLD)
      c_BMD = path.mix(parents_BMD, layout.parents(regressed_BLE))
    elif spec.mode == "thought":
      settings = dict(refinements=spec.refinements, norm=spec.norm, caches=thoughts, key=key)
      c_BMD, passes = think(self.transformer, spec.insert_at, x_BLD, attention, layout, **settings)
    else:
      c_BMD = path.mix(parents_BMD, jax.tree.map(layout.parents, prediction))
    rows_BRD, attention = layout.insert(x_BLD, c_BMD), layout.attention(attention)
    return Insertion(rows_BRD, attention, layout, prediction, regressed_BLE, passes)

  def _check_use(self, labels_BLA: jax.Array | None, intervention: ConceptIntervention | None) -> None:
    mode = self.concept_spec.mode
    if intervention is not None and not self.concept_spec.is_mixing:
      raise ValueError(f"intervention: mode {mode!r} mixes no concepts, so that it would change nothing")
    if labels_BLA is not None and not self.concept_spec.is_predicting:
      raise ValueError(f"labels_BLA: mode {mode!r} predicts no concepts; leave the labels out")

  def _run_upper(self, inserted: Insertion, key: jax.Array | None) -> jax.Array:
    """Runs blocks `insert_at` and later, and keeps the readout rows."""
    rows_BRD, attention, layout = inserted.rows_BRD, inserted.attention, inserted.layout
    run, start = self.transformer.run_blocks, self.concept_spec.insert_at
    if layout is None:
      return run(rows_BRD, start, attention=attention, key=key)[0]
    if self.concept_spec.last_block == "all_rows" or self.concept_spec.insert_every > 1:
      return layout.readout(run(rows_BRD, start, attention=attention, key=key)[0])
    rows_BRD, _ = run(rows_BRD, start, self.spec.num_layers - 1, attention=attention, key=key)
    return run_last_block(self.transformer, rows_BRD, attention, key=key)

  def init_cache(
    self,
    batch: int,
    length: int,
    dtype: Any = None,
    *,
    uneven: bool = False,
    layout: CacheSpec | None = None,
  ) -> ConceptMixingCache:
    """Makes an empty cache for `length` tokens a row, padding included; see `Transformer.init_cache`.

    Raises:
      ValueError: as `Transformer.init_cache`, or a paged layout with `insert_every` above 1.
    """
    spec, rows = self.concept_spec, self._rows_per_token
    if spec.insert_every > 1 and layout is not None and layout.layout == "paged":
      raise ValueError(
        f"CacheSpec.layout='paged' shows every row that was read, and with insert_every={spec.insert_every} some "
        "rows are to be unseen; use another layout"
      )

    def make(start: int, stop: int | None, rows_per_token: int) -> Cache:
      settings = dict(uneven=uneven, layout=layout, rows_per_token=rows_per_token)
      slots = rows_per_token * length
      return self.transformer.init_cache(batch, slots, dtype, start=start, stop=stop, **settings)

    passes = ()
    if spec.mode == "thought":
      passes = tuple(make(spec.insert_at, None, count) for count in (1, *[rows] * spec.refinements))
    return ConceptMixingCache(make(0, spec.insert_at, 1), make(spec.insert_at, None, rows), passes)

  @property
  def _rows_per_token(self) -> int:
    """Rows of a token in the blocks above the insertion."""
    return 2 if self.concept_spec.is_interleaving else 1

  def _each(self, cache: ConceptMixingCache, change: Callable[[Cache, int], Cache]) -> ConceptMixingCache:
    """Applies `change`, a function of a cache and of the slots of a token in it, to all parts."""
    rows = self._rows_per_token
    thoughts = tuple(change(part, rows if index else 1) for index, part in enumerate(cache.thoughts))
    return ConceptMixingCache(change(cache.lower, 1), change(cache.upper, rows), thoughts)

  def fork(self, cache: ConceptMixingCache, rows_B: jax.Array) -> ConceptMixingCache:
    """Returns a cache whose row b continues row `rows_B[b]` of `cache`; any number of rows."""
    return self._each(cache, lambda part, rows: caches.take_rows(part, rows_B))

  def share_prefix(
    self, cache: ConceptMixingCache, num_samples: int, prefix_length: int
  ) -> ConceptMixingCache:
    """Forks each row into `num_samples` that read one copy of its first `prefix_length` tokens."""
    return self._each(cache, lambda part, rows: caches.share_prefix(part, num_samples, rows * prefix_length))

  def rollback(self, cache: ConceptMixingCache, length: jax.Array) -> ConceptMixingCache:
    """Forgets all but the first `length` tokens (scalar, or [B] for an uneven cache)."""
    return self._each(cache, lambda part, rows: caches.rollback(part, rows * jnp.asarray(length)))

  def keep_path(
    self, cache: ConceptMixingCache, start_B: jax.Array, offsets_BA: jax.Array
  ) -> ConceptMixingCache:
    """Keeps one path of a tree of tokens read from token `start_B` on; see `nr.models.cache.keep_path`."""

    def keep(part: Cache, rows: int) -> Cache:
      slots_BR = (rows * offsets_BA[..., None] + jnp.arange(rows)).reshape(offsets_BA.shape[0], -1)
      return caches.keep_path(part, rows * start_B, slots_BR)

    return self._each(cache, keep)

  def extend_hidden(
    self,
    tokens_BL: jax.Array,
    cache: ConceptMixingCache,
    valid_BL: jax.Array | None = None,
    *,
    visible_BLL: jax.Array | None = None,
    intervention: ConceptIntervention | None = None,
  ) -> tuple[jax.Array, ConceptMixingCache]:
    """Reads L more tokens behind those in the cache; as `Transformer.extend_hidden`.

    An intervention acts on the new tokens; its `active_BL` refers to them.
    """
    # Positions count tokens, so they come from the lower cache, which has one slot a token.
    attention = continued_rows(tokens_BL, cache.lower, valid_BL, visible_BLL)
    insert_at = self.concept_spec.insert_at
    x_BLD = self.transformer.embed(tokens_BL, attention.positions_BL)
    x_BLD, lower = self.transformer.run_blocks(x_BLD, 0, insert_at, attention=attention, cache=cache.lower)
    inserted = self.insert(x_BLD, attention, intervention=intervention, thoughts=cache.thoughts)
    x_BLD, upper = self.transformer.run_blocks(
      inserted.rows_BRD, insert_at, attention=inserted.attention, cache=cache.upper
    )
    if inserted.layout is not None:
      x_BLD = inserted.layout.readout(x_BLD)
    return self.transformer.final_norm(x_BLD), ConceptMixingCache(lower, upper, inserted.thoughts)

  def extend(
    self,
    tokens_BL: jax.Array,
    cache: ConceptMixingCache,
    valid_BL: jax.Array | None = None,
    *,
    visible_BLL: jax.Array | None = None,
    intervention: ConceptIntervention | None = None,
  ) -> tuple[jax.Array, ConceptMixingCache]:
    """As `extend_hidden`, but returns float32 logits [B, L, V] of every new token."""
    settings = dict(visible_BLL=visible_BLL, intervention=intervention)
    x_BLD, cache = self.extend_hidden(tokens_BL, cache, valid_BL, **settings)
    return self.logits(x_BLD), cache


def _make_path(spec: TransformerSpec, concept_spec: ConceptMixingSpec, rngs: nnx.Rngs) -> nnx.Module | None:
  """Makes the module that says what is inserted; modes "thought" and "none" have no parameters of their own."""
  if concept_spec.is_predicting:
    return ConceptPath(spec, concept_spec, rngs=rngs)
  if concept_spec.mode == "pause":
    return PausePath(spec, rngs=rngs)
  if concept_spec.mode == "hidden":
    return HiddenPath(spec, concept_spec, rngs=rngs)
  return None
