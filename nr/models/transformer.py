"""Decoder-only transformer: GPT-2, Llama, Qwen and Gemma are settings of one definition.

    model = Transformer(TransformerSpec.gpt2(), rngs=nnx.Rngs(0))
    graphdef, params = parameters.split(model)
    logits_BLV = parameters.merge(graphdef, params)(tokens_BL)

Blocks 0..i, something in between, and i..N is a plain call of `run_blocks`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models import cache as caches
from nr.models.attention import AttentionInputs, RowContext, default_positions, rotary_angles
from nr.models.blocks import make_blocks, rematerialise
from nr.models.cache import Cache, CacheSizes, CacheSpec, KVCache
from nr.models.layers import LayerNorm, Linear, Mlp, RMSNorm, drop, make_norm
from nr.models.parameters import parameter
from nr.models.partitioning import constrain
from nr.models.transformer_spec import RotaryScaling, TransformerSpec
from nr.models.weights import as_array, contract, look_up

__all__ = [
  "AttentionInputs",
  "KVCache",
  "LayerNorm",
  "Linear",
  "Mlp",
  "RMSNorm",
  "RotaryScaling",
  "Transformer",
  "TransformerSpec",
  "make_norm",
]


def continued_rows(
  tokens_BL: jax.Array,
  cache: Cache,
  valid_BL: jax.Array | None,
  visible_BLL: jax.Array | None = None,
) -> AttentionInputs:
  """Returns positions and segments of new tokens behind those of a cache with one slot a token.

  Args:
    tokens_BL: the new tokens.
    cache: what the rows hold so far.
    valid_BL: bool, False where a row has padding; None when there is none.
    visible_BLL: which new tokens each new token sees, itself included, when they
      form a tree; a token's position is then its depth. None: a chain.
  """
  is_valid_BL = jnp.ones(tokens_BL.shape, bool) if valid_BL is None else valid_BL.astype(bool)
  if visible_BLL is None:
    counted_BL = jnp.cumsum(is_valid_BL, axis=1, dtype=jnp.int32)
  else:
    counted_BL = visible_BLL.sum(axis=-1, dtype=jnp.int32)
  positions_BL = jnp.maximum(caches.count_tokens(cache)[:, None] + counted_BL - 1, 0)
  return AttentionInputs(positions_BL, is_valid_BL.astype(jnp.int32), visible_BLL)


class Transformer(nnx.Module):
  """Decoder-only language model. See `TransformerSpec` for the settings.

  Arguments shared by the methods:
    tokens_BL: int32 token ids.
    positions_BL: int32 positions; counted from the start of each segment when None.
    segment_ids_BL: int32; rows see only earlier rows of their own segment, and 0
      is padding. None: one segment, no padding.
    key: random key for dropout; None is deterministic.
  """

  def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    normal = jax.nn.initializers.normal(spec.init_std)
    table, dtype = (spec.vocab_size, spec.model_dim), spec.param_dtype
    self.token_embedding = parameter(rngs.params(), normal, table, ("vocab", "embed"), dtype)
    if spec.positions == "learned":
      positions = (spec.max_length, spec.model_dim)
      self.position_embedding = parameter(rngs.params(), normal, positions, ("positions", "embed"), dtype)
    else:
      self.position_embedding = None
    self.blocks = make_blocks(spec, rngs=rngs)
    self.final_norm = make_norm(spec, rngs=rngs)
    if spec.tied_head:
      self.unembedding = None
    else:
      self.unembedding = parameter(rngs.params(), normal, table, ("vocab", "embed"), dtype)

  def embed(
    self,
    tokens_BL: jax.Array,
    positions_BL: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the stream [B, L, D] that enters block 0, in the compute type.

    Raises:
      ValueError: if L exceeds the spec's max_length and positions are learned.
    """
    spec, length = self.spec, tokens_BL.shape[1]
    # Whole rows on every device: a look-up in a table split along D would make the
    # partitioner copy the activations to every device before it splits them anew.
    table = jax.tree.map(
      lambda leaf_VD: constrain(leaf_VD, "vocab", "activation_embed"), self.token_embedding[...]
    )
    x_BLD = look_up(table, tokens_BL).astype(spec.dtype)
    if spec.scale_embedding:
      x_BLD = x_BLD * jnp.asarray(spec.model_dim**0.5, spec.dtype)
    if self.position_embedding is not None:
      # Given positions may be fewer than rows: padding takes none.
      if length > spec.max_length and positions_BL is None:
        raise ValueError(f"tokens_BL has length {length}: max_length={spec.max_length} is the most")
      table_PD = self.position_embedding[...].astype(spec.dtype)
      x_BLD = x_BLD + (table_PD[:length] if positions_BL is None else table_PD[positions_BL])
    x_BLD = drop(x_BLD, spec.dropout, key)
    return constrain(x_BLD, "batch", "length", "activation_embed")

  def enter(
    self,
    tokens_BL: jax.Array,
    positions_BL: jax.Array | None = None,
    segment_ids_BL: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, AttentionInputs]:
    """Returns the stream that enters block 0, and what the blocks need besides it."""
    # Rows that count from 0 take a slice of the position table, which is cheaper than a look-up.
    is_counted_from_0 = positions_BL is None and segment_ids_BL is None
    if positions_BL is None:
      positions_BL = default_positions(*tokens_BL.shape, segment_ids_BL)
    x_BLD = self.embed(tokens_BL, None if is_counted_from_0 else positions_BL, key=key)
    return x_BLD, AttentionInputs(positions_BL, segment_ids_BL)

  def run_blocks(
    self,
    x_BLD: jax.Array,
    start: int = 0,
    stop: int | None = None,
    *,
    attention: AttentionInputs,
    cache: Cache | None = None,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Runs blocks `start` to `stop` (exclusive; None: to the end).

    Running a range in pieces, with the same key, equals running it at once.

    Args:
      x_BLD: stream that enters block `start`.
      start: first block.
      stop: block to stop before.
      attention: positions and segments of the rows.
      cache: keys and values of earlier rows, for exactly these blocks; the new
        rows are written behind them.
      key: random key for dropout.

    Returns:
      The stream after block `stop - 1`, and the cache with L more rows (or None).

    Raises:
      ValueError: if the range is not inside the model, or the cache is for
        another number of blocks or has fewer than L slots.
    """
    stop = self._check_range(start, stop, x_BLD.shape[1], cache)
    context, cache = self._row_context(x_BLD.shape[:2], attention, cache)
    stored = None if cache is None else cache.stored
    run = self._scan_blocks if self.spec.layers == "scan" else self._unroll_blocks
    x_BLD, stored = run(x_BLD, start, stop, context, stored, key)
    if cache is None:
      return x_BLD, None
    segment_ids_BL = attention.segment_ids_BL
    if segment_ids_BL is None:
      segment_ids_BL = jnp.ones(x_BLD.shape[:2], jnp.int32)
    return x_BLD, cache.finish(stored, segment_ids_BL)

  def _check_range(self, start: int, stop: int | None, length: int, cache: Cache | None) -> int:
    num_layers = self.spec.num_layers
    stop = num_layers if stop is None else stop
    if not 0 <= start <= stop <= num_layers:
      raise ValueError(f"start={start}, stop={stop}: need 0 <= start <= stop <= num_layers={num_layers}")
    if cache is not None:
      if cache.num_layers != stop - start:
        needed = f"start={start}, stop={stop} needs {stop - start}"
        raise ValueError(f"cache covers {cache.num_layers} blocks: {needed}")
      cache.check_rows(length)
    return stop

  def _row_context(self, shape: tuple[int, int], attention: AttentionInputs, cache: Cache | None) -> tuple:
    rotation = None
    if self.spec.positions == "rotary":
      rotation = rotary_angles(attention.positions_BL, self.spec)
    segment_ids_BL = attention.segment_ids_BL
    if cache is None:
      return RowContext(rotation, segment_ids_BL), None
    written_BL = jnp.ones(shape, jnp.int32) if segment_ids_BL is None else segment_ids_BL
    cache, view = cache.begin(attention.positions_BL, written_BL, attention.visible_BLL)
    return RowContext(rotation, segment_ids_BL, view), cache

  def _unroll_blocks(self, x_BLD, start, stop, context, stored, key) -> tuple:
    layers = []
    for index in range(start, stop):
      graphdef, state = nnx.split(self.blocks[index])

      def step(state, x_BLD, layer_stored, layer_key, graphdef=graphdef):
        return nnx.merge(graphdef, state)(x_BLD, context, layer_stored, key=layer_key)

      layer_stored = None if stored is None else tuple(part[index - start] for part in stored)
      layer_key = None if key is None else jax.random.fold_in(key, index)
      step = rematerialise(step, self.spec.remat, is_scanned=False)
      x_BLD, layer_stored = step(state, x_BLD, layer_stored, layer_key)
      layers.append(layer_stored)
    if stored is None or not layers:
      return x_BLD, stored
    return x_BLD, tuple(zip(*layers))

  def _scan_blocks(self, x_BLD, start, stop, context, stored, key) -> tuple:
    if start == stop:
      return x_BLD, stored
    graphdef, state = nnx.split(self.blocks)
    if (start, stop) != (0, self.spec.num_layers):
      state = jax.tree.map(lambda leaf: leaf[start:stop], state)

    def step(carry, scanned):
      x_BLD, stored = carry
      state, index = scanned
      layer_key = None if key is None else jax.random.fold_in(key, index)
      x_BLD, stored = nnx.merge(graphdef, state)(x_BLD, context, stored, index - start, key=layer_key)
      return (x_BLD, stored), None

    step = rematerialise(step, self.spec.remat, is_scanned=True)
    (x_BLD, stored), _ = jax.lax.scan(step, (x_BLD, stored), (state, jnp.arange(start, stop)))
    return x_BLD, stored

  @property
  def unembedding_VD(self) -> jax.Array:
    """The output head [V, D]: the token embedding when tied."""
    return as_array(self._head)

  @property
  def _head(self) -> Any:
    return self.token_embedding[...] if self.unembedding is None else self.unembedding[...]

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    """Returns float32 logits [B, L, V] of final-normed hidden states [B, L, D]."""
    logits = contract("...d,vd->...v", x_BLD, self._head, preferred=jnp.float32)
    if logits.ndim != 3:
      return logits
    return constrain(logits, "batch", "length", "activation_vocab")

  def hidden(
    self,
    tokens_BL: jax.Array,
    *,
    segment_ids_BL: jax.Array | None = None,
    positions_BL: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Returns final-normed hidden states [B, L, D] in the compute type."""
    embed_key, block_key = (None, None) if key is None else jax.random.split(key)
    x_BLD, attention = self.enter(tokens_BL, positions_BL, segment_ids_BL, key=embed_key)
    x_BLD, _ = self.run_blocks(x_BLD, attention=attention, key=block_key)
    return self.final_norm(x_BLD)

  def __call__(
    self,
    tokens_BL: jax.Array,
    *,
    segment_ids_BL: jax.Array | None = None,
    positions_BL: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Returns float32 next-token logits [B, L, V]."""
    settings = dict(segment_ids_BL=segment_ids_BL, positions_BL=positions_BL, key=key)
    return self.logits(self.hidden(tokens_BL, **settings))

  def init_cache(
    self,
    batch: int,
    length: int,
    dtype: Any = None,
    *,
    start: int = 0,
    stop: int | None = None,
    uneven: bool = False,
    layout: CacheSpec | None = None,
    rows_per_token: int = 1,
  ) -> Cache:
    """Makes an empty cache of `length` slots for blocks `start` to `stop` (exclusive).

    Args:
      batch: number of rows B.
      length: number of slots S, padding included.
      dtype: storage type; the compute type when None.
      start: first block.
      stop: block to stop before; None: to the end.
      uneven: whether every row has a free end of its own; see `KVCache`.
      layout: how rows are kept; a slot for each when None.
      rows_per_token: rows of a token in these blocks.
    """
    spec = self.spec
    stop = self._check_range(start, stop, 0, None)
    heads = (spec.num_kv_heads, spec.head_dim)
    sizes = CacheSizes(stop - start, batch, length, *heads, rows_per_token=rows_per_token)
    return caches.make_cache(sizes, dtype or spec.dtype, spec.layers == "scan", uneven, layout)

  def fork(self, cache: Cache, rows_B: jax.Array) -> Cache:
    """Returns a cache whose row b continues row `rows_B[b]` of `cache`; any number of rows."""
    return caches.take_rows(cache, rows_B)

  def share_prefix(self, cache: Cache, num_samples: int, prefix_length: int) -> Cache:
    """Forks each row into `num_samples` that read one copy of its first `prefix_length` slots.

    See `nr.models.cache.share_prefix`.
    """
    return caches.share_prefix(cache, num_samples, prefix_length)

  def rollback(self, cache: Cache, length: jax.Array) -> Cache:
    """Forgets all but the first `length` slots (scalar, or [B] for an uneven cache)."""
    return caches.rollback(cache, length)

  def keep_path(self, cache: Cache, start_B: jax.Array, offsets_BA: jax.Array) -> Cache:
    """Keeps one path of a tree of tokens read from slot `start_B` on; see `nr.models.cache.keep_path`."""
    return caches.keep_path(cache, start_B, offsets_BA)

  def extend_hidden(
    self,
    tokens_BL: jax.Array,
    cache: Cache,
    valid_BL: jax.Array | None = None,
    *,
    visible_BLL: jax.Array | None = None,
    taps: tuple[int, ...] = (),
  ) -> tuple[jax.Array, Cache] | tuple[jax.Array, Cache, dict[int, jax.Array]]:
    """Reads L more tokens behind those in the cache.

    Any way of cutting a sequence into calls gives the same hidden states as one
    call. Rows may be padded on the left, or on the right of an uneven cache:
    positions count valid tokens only.

    Args:
      tokens_BL: int32 token ids; any L, also 1.
      cache: of all blocks, with at least L free slots.
      valid_BL: bool, False where a row has padding; None when there is none.
      visible_BLL: bool [B or 1, L, L], which new tokens each new token sees, itself
        included, when they form a tree of drafts; None: all earlier ones.
      taps: blocks whose input is asked for as well, increasing.

    Returns:
      Final-normed hidden states [B, L, D] (finite and meaningless at padding), and
      the cache; with `taps` also {block: final-normed stream [B, L, D] that enters it}.
    """
    attention = continued_rows(tokens_BL, cache, valid_BL, visible_BLL)
    x_BLD = self.embed(tokens_BL, attention.positions_BL)
    if not taps:
      x_BLD, cache = self.run_blocks(x_BLD, attention=attention, cache=cache)
      return self.final_norm(x_BLD), cache
    tapped, pieces = {}, []
    bounds = (0, *taps, self.spec.num_layers)
    for start, stop in zip(bounds, bounds[1:]):
      piece = caches.take_layers(cache, start, stop)
      x_BLD, piece = self.run_blocks(x_BLD, start, stop, attention=attention, cache=piece)
      pieces.append(piece)
      if stop in taps:
        tapped[stop] = self.final_norm(x_BLD)
    return self.final_norm(x_BLD), caches.join_layers(pieces), tapped

  def extend(
    self,
    tokens_BL: jax.Array,
    cache: Cache,
    valid_BL: jax.Array | None = None,
    *,
    visible_BLL: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """As `extend_hidden`, but returns float32 logits [B, L, V] of every new row.

    For a long prompt whose last row alone matters, `extend_hidden` and `logits`
    of that row spare [B, L, V].
    """
    x_BLD, cache = self.extend_hidden(tokens_BL, cache, valid_BL, visible_BLL=visible_BLL)
    return self.logits(x_BLD), cache
