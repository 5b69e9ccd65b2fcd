"""A baseline without any teacher: the model's own last hidden state as the row behind a token.

In the style of PonderLM-2 (arXiv 2509.23184 and its released code). Published: a thought is the last, normed
hidden state at its token; it is read as one more input behind that token, at the token's position; the next
token is predicted there; training replaces the sequential dependence of thoughts on earlier ones by Jacobi
iterations, of which the code takes 2 or 3 (at random) besides the first pass, with gradients through all; it
multiplies token embeddings by sqrt(2.5 D), which gives them the scale of normed states.

Ours: the block before which thoughts are inserted is free (theirs is block 0); thoughts are brought to the
mean and deviation of their token's stream, as continuous concepts are, where theirs scales embeddings; the
number of refinements is fixed; and decoding repeats the passes of training, each with a cache of its own.
Their decoding keeps ONE cache of tokens and final thoughts, the limit of many refinements: cheaper, and no
longer the function that was trained.
"""

import jax

from nr.models.attention import AttentionInputs
from nr.models.cache import Cache
from nr.models.concept_paths import at_scale_of
from nr.models.concept_rows import RowLayout
from nr.models.transformer import Transformer


def think(
  transformer: Transformer,
  start: int,
  x_BLD: jax.Array,
  attention: AttentionInputs,
  layout: RowLayout,
  *,
  refinements: int,
  norm: str,
  caches: tuple[Cache, ...] | None = None,
  key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache | None, ...]]:
  """Runs the passes in which thoughts are made.

  Args:
    transformer: the model.
    start: block before which rows are inserted.
    x_BLD: stream of the tokens that enters it.
    attention: positions and segments of the tokens.
    layout: which tokens have a row behind them.
    refinements: passes in which thoughts see those of the pass before.
    norm: "reference" brings thoughts to the scale of the stream, "none" leaves them.
    caches: of blocks `start` and later, one for each of the 1 + refinements passes; the first has a slot
      a token, the others two.
    key: random key for dropout.

  Returns:
    The rows [B, M, D] to insert, and the caches, extended (None without any).
  """
  count = 1 + refinements
  caches = (None,) * count if caches is None else caches
  # Blocks fold their index into the key; the number of blocks is free.
  keys = [None] * count if key is None else list(_split(key, transformer, count))
  parents_BMD, rows_attention = layout.parents(x_BLD), layout.attention(attention)

  def thoughts(last_BLD: jax.Array) -> jax.Array:
    return at_scale_of(parents_BMD, layout.parents(transformer.final_norm(last_BLD)), norm)

  last_BLD, extended = transformer.run_blocks(x_BLD, start, attention=attention, cache=caches[0], key=keys[0])
  passes = [extended]
  for cache, pass_key in zip(caches[1:], keys[1:]):
    rows_BRD = layout.insert(x_BLD, thoughts(last_BLD))
    rows_BRD, extended = transformer.run_blocks(
      rows_BRD, start, attention=rows_attention, cache=cache, key=pass_key
    )
    last_BLD = layout.tokens(rows_BRD)
    passes.append(extended)
  return thoughts(last_BLD), tuple(passes)


def _split(key: jax.Array, transformer: Transformer, count: int) -> jax.Array:
  return jax.random.split(jax.random.fold_in(key, transformer.spec.num_layers), count)
