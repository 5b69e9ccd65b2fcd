"""CoCoMix: a transformer that predicts concepts and mixes them into its own stream.

Source: arXiv 2502.08524 section 2.2, with the normalisation of the released code.
Before block `insert_at` every token's stream predicts concepts; the largest logits
are compressed into one vector, the continuous concept, that becomes a row of its
own behind the token's. Later blocks see twice the rows, and the next token is read
at the concept rows.

    model = ConceptMixingTransformer(transformer_spec, concept_spec, rngs=nnx.Rngs(key))
    output = model.forward(tokens_BL, labels_BLA=labels_BLA)
    logits_BLV = model.logits(output.hidden_BLD)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models import cache as caches
from nr.models.attention import AttentionInputs
from nr.models.cache import Cache, CacheSpec
from nr.models.concept_head import ConceptPrediction, concept_logits, mix_concepts, predict_concepts
from nr.models.concept_intervention import ConceptIntervention
from nr.models.concept_mixing_spec import ConceptMixingSpec
from nr.models.concept_readout import run_last_block
from nr.models.parameters import parameter
from nr.models.partitioning import constrain
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

# Added to the standard deviation, not to the variance: as the released code does.
NORM_EPSILON = 1e-5


class ConceptMixingOutput(NamedTuple):
  """What one pass over a batch yields.

  Attributes:
    hidden_BLD: final-normed stream at the readout rows, compute type; row t
      predicts token t + 1.
    concepts: the concept predictions, or None in mode "none".
  """

  hidden_BLD: jax.Array
  concepts: ConceptPrediction | None


class ConceptMixingCache(NamedTuple):
  """Key-value caches of the blocks before and after the insertion.

  Attributes:
    lower: blocks 0..insert_at, one slot a token.
    upper: the other blocks, two slots a token where concepts have rows of their own.
  """

  lower: Cache
  upper: Cache

  @property
  def capacity(self) -> int:
    """Number of tokens that fit."""
    return self.lower.capacity

  @property
  def length(self) -> jax.Array:
    """Number of tokens read, padding included; see `Cache`."""
    return self.lower.length


class ConceptHead(nnx.Module):
  """Parameters of the linear map from the stream to concept logits."""

  def __init__(self, model: TransformerSpec, num_concepts: int, *, rngs: nnx.Rngs):
    normal, zeros = jax.nn.initializers.normal(model.init_std), jax.nn.initializers.zeros
    shape = (model.model_dim, num_concepts)
    self.kernel = parameter(rngs.params(), normal, shape, ("embed", "concepts"), model.param_dtype)
    self.bias = parameter(rngs.params(), zeros, shape[1:], ("concepts",), model.param_dtype)


class ConceptCompression(nnx.Module):
  """Parameters of the linear map from selected concepts back to the stream."""

  def __init__(self, model: TransformerSpec, num_concepts: int, *, rngs: nnx.Rngs):
    normal, zeros = jax.nn.initializers.normal(model.init_std), jax.nn.initializers.zeros
    shape = (num_concepts, model.model_dim)
    self.kernel = parameter(rngs.params(), normal, shape, ("concepts", "embed"), model.param_dtype)
    self.bias = parameter(rngs.params(), zeros, shape[1:], ("embed",), model.param_dtype)


class ConceptPath(nnx.Module):
  """From the stream to concept logits, and from the largest of them to one vector.

  With h the stream entering block `insert_at`, mu its mean, s its standard
  deviation over D (denominator D - 1), M, a the head, W, b the compression and p
  the shared `pre_bias`:

      z = M ((h - mu) / (s + 1e-5) - p) + a
      c = (W top_k(z) + b + p) s + mu

  The selected logits themselves are the coefficients: no softmax, no ReLU.
  Gradients reach mu, s and the selected logits, and not the choice.
  """

  def __init__(self, model: TransformerSpec, spec: ConceptMixingSpec, *, rngs: nnx.Rngs):
    self.spec = spec
    self.dtype = model.dtype
    self.head = ConceptHead(model, spec.num_concepts, rngs=rngs)
    self.compression = ConceptCompression(model, spec.num_concepts, rngs=rngs) if spec.is_mixing else None
    zeros, shape = jax.nn.initializers.zeros, (model.model_dim,)
    self.pre_bias = parameter(rngs.params(), zeros, shape, ("embed",), model.param_dtype)

  def predict(
    self,
    h_BLD: jax.Array,
    labels_BLA: jax.Array | None = None,
    intervention: ConceptIntervention | None = None,
  ) -> ConceptPrediction:
    """Predicts concepts from the stream [B, L, D]; see `predict_concepts`."""
    is_chunked = self.spec.head_impl == "fused" and self.spec.chunk_length > 0
    return predict_concepts(
      *self._head_operands(h_BLD),
      k=self.spec.top_k,
      labels_BLA=labels_BLA,
      intervention=intervention,
      top_k_impl=self.spec.top_k_impl,
      chunk_length=self.spec.chunk_length if is_chunked else None,
    )

  def logits(self, h_BLD: jax.Array) -> jax.Array:
    """Returns all concept logits, float32 [B, L, C]: for probes and small models."""
    return concept_logits(*self._head_operands(h_BLD))

  def _head_operands(self, h_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the normalised stream, the kernel and the bias."""
    mean_BL1, std_BL1 = self._statistics(h_BLD)
    u_BLD = (h_BLD.astype(jnp.float32) - mean_BL1) / (std_BL1 + self._epsilon)
    u_BLD = u_BLD - self.pre_bias[...].astype(jnp.float32)
    kernel_DC, bias_C = self.head.kernel[...], self.head.bias[...]
    return u_BLD.astype(self.dtype), kernel_DC.astype(self.dtype), bias_C.astype(jnp.float32)

  def mix(self, h_BLD: jax.Array, prediction: ConceptPrediction) -> jax.Array:
    """Returns the continuous concepts [B, L, D], in the type and at the scale of the stream."""
    mean_BL1, std_BL1 = self._statistics(h_BLD)
    kernel_CD = self.compression.kernel[...].astype(self.dtype)
    settings = dict(implementation=self.spec.compression_impl)
    e_BLD = mix_concepts(prediction.values_BLK, prediction.indices_BLK, kernel_CD, **settings)
    e_BLD = e_BLD + self.compression.bias[...].astype(jnp.float32) + self.pre_bias[...].astype(jnp.float32)
    c_BLD = (e_BLD * std_BL1 + mean_BL1).astype(h_BLD.dtype)
    return constrain(c_BLD, "batch", "length", "activation_embed")

  @property
  def _epsilon(self) -> float:
    return NORM_EPSILON if self.spec.norm == "reference" else 0.0

  def _statistics(self, h_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32 mean and unbiased standard deviation [B, L, 1]; 0 and 1 without norm."""
    if self.spec.norm == "none":
      return jnp.zeros((*h_BLD.shape[:-1], 1)), jnp.ones((*h_BLD.shape[:-1], 1))
    wide_BLD = h_BLD.astype(jnp.float32)
    mean_BL1 = wide_BLD.mean(axis=-1, keepdims=True)
    centred_BLD = wide_BLD - mean_BL1
    variance_BL1 = (centred_BLD * centred_BLD).sum(axis=-1, keepdims=True) / (h_BLD.shape[-1] - 1)
    # The square root has no finite gradient at 0 (a constant row); 0 serves there.
    is_zero_BL1 = variance_BL1 == 0
    std_BL1 = jnp.sqrt(jnp.where(is_zero_BL1, 1.0, variance_BL1))
    return mean_BL1, jnp.where(is_zero_BL1, 0.0, std_BL1)


def interleave(first_BLD: jax.Array, second_BLD: jax.Array) -> jax.Array:
  """Returns [B, 2L, D]: row 2t from `first`, row 2t + 1 from `second`."""
  B, L, D = first_BLD.shape
  rows = jnp.stack([first_BLD, second_BLD], axis=2).reshape(B, 2 * L, D)
  return constrain(rows, "batch", "length", "activation_embed")


def double_rows(attention: AttentionInputs) -> AttentionInputs:
  """Gives each concept row the position and the segment of its token.

  In a tree, both rows of a token see both rows of its ancestors, its own token row,
  and only the concept row sees itself.
  """
  positions_BR = jnp.repeat(attention.positions_BL, 2, axis=1)
  segment_ids_BR, visible_BRR = attention.segment_ids_BL, attention.visible_BLL
  if segment_ids_BR is not None:
    segment_ids_BR = jnp.repeat(segment_ids_BR, 2, axis=1)
  if visible_BRR is not None:
    visible_BRR = jnp.repeat(jnp.repeat(visible_BRR, 2, axis=1), 2, axis=2)
    visible_BRR = visible_BRR & jnp.tril(jnp.ones(visible_BRR.shape[1:], bool))
  return AttentionInputs(positions_BR, segment_ids_BR, visible_BRR)


class ConceptMixingTransformer(nnx.Module):
  """A transformer with a concept path before block `insert_at`.

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
    self.concepts = None if concept_spec.mode == "none" else ConceptPath(spec, concept_spec, rngs=rngs)

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
    x_BLD, attention, concepts = self.insert(x_BLD, attention, labels_BLA, intervention)
    x_BLD = self._run_upper(x_BLD, attention, block_key)
    return ConceptMixingOutput(self.transformer.final_norm(x_BLD), concepts)

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
  ) -> tuple[jax.Array, AttentionInputs, ConceptPrediction | None]:
    """Turns the stream that arrives at the insertion into the one that enters block `insert_at`.

    Returns:
      The stream ([B, 2L, D] when concepts have rows), the attention inputs of its
      rows, and the predictions (None in mode "none").
    """
    spec = self.concept_spec
    if intervention is not None and not spec.is_mixing:
      raise ValueError(f"intervention: mode {spec.mode!r} mixes no concepts, so that it would change nothing")
    if labels_BLA is not None and self.concepts is None:
      raise ValueError("labels_BLA: mode 'none' predicts no concepts; leave the labels out")
    if self.concepts is None:
      return x_BLD, attention, None
    prediction = self.concepts.predict(x_BLD, labels_BLA, intervention)
    if not spec.is_mixing:
      return x_BLD, attention, prediction
    c_BLD = self.concepts.mix(x_BLD, prediction)
    if not spec.is_interleaving:
      return x_BLD + c_BLD, attention, prediction
    return interleave(x_BLD, c_BLD), double_rows(attention), prediction

  def _run_upper(self, x_BLD: jax.Array, attention: AttentionInputs, key: jax.Array | None) -> jax.Array:
    """Runs blocks `insert_at` and later, and keeps the readout rows."""
    run, start = self.transformer.run_blocks, self.concept_spec.insert_at
    if not self.concept_spec.is_interleaving:
      return run(x_BLD, start, attention=attention, key=key)[0]
    if self.concept_spec.last_block == "all_rows":
      return run(x_BLD, start, attention=attention, key=key)[0][:, 1::2]
    x_BLD, _ = run(x_BLD, start, self.spec.num_layers - 1, attention=attention, key=key)
    return run_last_block(self.transformer, x_BLD, attention, key=key)

  def init_cache(
    self,
    batch: int,
    length: int,
    dtype: Any = None,
    *,
    uneven: bool = False,
    layout: CacheSpec | None = None,
  ) -> ConceptMixingCache:
    """Makes an empty cache for `length` tokens a row, padding included; see `Transformer.init_cache`."""
    insert_at, rows = self.concept_spec.insert_at, self._rows_per_token
    make, settings = self.transformer.init_cache, dict(uneven=uneven, layout=layout)
    return ConceptMixingCache(
      make(batch, length, dtype, start=0, stop=insert_at, **settings),
      make(batch, rows * length, dtype, start=insert_at, rows_per_token=rows, **settings),
    )

  @property
  def _rows_per_token(self) -> int:
    """Rows of a token in the blocks above the insertion."""
    return 2 if self.concept_spec.is_interleaving else 1

  def fork(self, cache: ConceptMixingCache, rows_B: jax.Array) -> ConceptMixingCache:
    """Returns a cache whose row b continues row `rows_B[b]` of `cache`; any number of rows."""
    return ConceptMixingCache(*(caches.take_rows(part, rows_B) for part in cache))

  def share_prefix(
    self, cache: ConceptMixingCache, num_samples: int, prefix_length: int
  ) -> ConceptMixingCache:
    """Forks each row into `num_samples` that read one copy of its first `prefix_length` tokens."""
    return ConceptMixingCache(
      caches.share_prefix(cache.lower, num_samples, prefix_length),
      caches.share_prefix(cache.upper, num_samples, self._rows_per_token * prefix_length),
    )

  def rollback(self, cache: ConceptMixingCache, length: jax.Array) -> ConceptMixingCache:
    """Forgets all but the first `length` tokens (scalar, or [B] for an uneven cache)."""
    upper = caches.rollback(cache.upper, self._rows_per_token * jnp.asarray(length))
    return ConceptMixingCache(caches.rollback(cache.lower, length), upper)

  def keep_path(
    self, cache: ConceptMixingCache, start_B: jax.Array, offsets_BA: jax.Array
  ) -> ConceptMixingCache:
    """Keeps one path of a tree of tokens read from token `start_B` on; see `nr.models.cache.keep_path`."""
    rows = self._rows_per_token
    upper_BR = (rows * offsets_BA[..., None] + jnp.arange(rows)).reshape(offsets_BA.shape[0], -1)
    return ConceptMixingCache(
      caches.keep_path(cache.lower, start_B, offsets_BA),
      caches.keep_path(cache.upper, rows * start_B, upper_BR),
    )

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
    x_BLD, attention, _ = self.insert(x_BLD, attention, intervention=intervention)
    x_BLD, upper = self.transformer.run_blocks(x_BLD, insert_at, attention=attention, cache=cache.upper)
    if self.concept_spec.is_interleaving:
      x_BLD = x_BLD[:, 1::2]
    return self.transformer.final_norm(x_BLD), ConceptMixingCache(lower, upper)

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
