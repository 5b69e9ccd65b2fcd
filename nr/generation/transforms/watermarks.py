"""Watermarks: text that its maker can tell apart by a key, and the tests that do.

All choices come from a counter hash of (key, last tokens, token). It needs no state and
no permutation of the vocabulary, so it runs in place on a sharded one; marks made
elsewhere, from other hashes, cannot be detected here, nor ours there.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from nr.generation.transforms.algebra import (
  Context,
  Parameter,
  State,
  Transform,
  all_equal,
  column,
  row,
  static,
  transform,
)
from nr.generation.transforms.history import tail


def mix(x: jax.Array) -> jax.Array:
  """Returns a hash of uint32 values: the final mixing of MurmurHash3, a bijection."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def seeds(keys: jax.Array, recent_TK: jax.Array) -> jax.Array:
  """Returns uint32 [T], a seed for each row of recent tokens.

  Args:
    keys: uint32 [T] or a scalar.
    recent_TK: int32, the tokens before; their order matters.
  """
  seeds_T = mix(jnp.broadcast_to(jnp.asarray(keys, jnp.uint32), recent_TK.shape[:1]))
  for k in range(recent_TK.shape[1]):
    seeds_T = mix((seeds_T + jnp.uint32(0x9E3779B9)) ^ mix(recent_TK[:, k].astype(jnp.uint32)))
  return seeds_T


def hashes(seeds_T: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns uint32 hashes of tokens under seeds; the two broadcast."""
  return mix(seeds_T ^ mix(tokens.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(0x7F4A7C15)))


def uniforms(hashed: jax.Array) -> jax.Array:
  """Returns float32 in (0, 1), never an end, from uint32."""
  return ((hashed >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def _token_hashes(keys: jax.Array, context: Context, width: int, vocab_size: int) -> jax.Array:
  seeds_B = seeds(keys, tail(context, width))
  return hashes(seeds_B[:, None], jnp.arange(vocab_size)[None])


def _windows(tokens_BT: jax.Array, lengths_B: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
  """Returns the tokens before each [B, T, width], and bool [B, T] which tokens can be scored.

  Those without a full window cannot, nor those that repeat an earlier (window,
  token): their hash is the same again, and would count as fresh evidence.
  """
  slots_T = jnp.arange(tokens_BT.shape[1])
  shifts = [jnp.roll(tokens_BT, back, axis=1) for back in range(width, 0, -1)]
  recent_BTK = jnp.stack(shifts, axis=-1)
  is_scored_BT = (slots_T >= width) & (slots_T < lengths_B[:, None])
  flat = seeds(0, jnp.concatenate([recent_BTK, tokens_BT[..., None]], axis=-1).reshape(-1, width + 1))
  grams_BT = jnp.where(is_scored_BT, flat.reshape(tokens_BT.shape), 0)
  is_same_BTU = (grams_BT[:, :, None] == grams_BT[:, None]) & is_scored_BT[:, None]
  is_repeat_BT = (is_same_BTU & (slots_T[None, :] < slots_T[:, None])).any(axis=-1)
  return recent_BTK, is_scored_BT & ~is_repeat_BT


def _scored_hashes(
  key: Parameter, tokens_BT: jax.Array, lengths_B: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the hash that each token had when it was chosen, uint32 [B, T], and which count."""
  recent_BTK, is_scored_BT = _windows(tokens_BT, lengths_B, width)
  keys_BT = jnp.broadcast_to(column(key), tokens_BT.shape)
  seeds_BT = seeds(keys_BT.reshape(-1), recent_BTK.reshape(-1, width)).reshape(tokens_BT.shape)
  return hashes(seeds_BT, tokens_BT), is_scored_BT


def green_z_score(green: jax.Array | float, total: jax.Array | float, fraction: Parameter) -> jax.Array:
  """Returns (g - f T) / sqrt(T f (1 - f)): about standard normal for T tokens that know nothing of the key.

  It is 0 for no tokens.
  """
  return (green - fraction * total) / jnp.sqrt(jnp.maximum(total, 1) * fraction * (1 - fraction))


@transform("green_list")
class GreenList(Transform):
  """Adds a bias to the tokens that a hash of the key and the last tokens calls green.

  Each token is green with probability `fraction` by itself, where transformers takes
  exactly that share of a permutation. Without `width` tokens before there is no bias.
  Source: arXiv:2301.10226.

  Attributes:
    bias: nats; 0 is off.
    fraction: of the vocabulary that is green.
    key: the secret, 0 to 2^32 - 1; the default is that of transformers.
    width: how many tokens before seed the hash.
  """

  bias: Parameter = row(2.0)
  fraction: Parameter = row(0.25, above=0, below=1)
  key: Parameter = row(15485863, dtype=jnp.uint32, least=0)
  width: int = static(1)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns logits with the green ones raised."""
    is_full_B1 = context.lengths_B[:, None] >= self.width
    is_raised_BV = self.is_green(context, logits_BV.shape[1]) & is_full_B1
    return logits_BV + jnp.where(is_raised_BV, column(self.bias), 0.0)

  def is_green(self, context: Context, vocab_size: int) -> jax.Array:
    """Returns bool [B, V]."""
    hashes_BV = _token_hashes(self.key, context, self.width, vocab_size)
    return uniforms(hashes_BV) < column(self.fraction)

  def detect(self, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Returns z-scores [B] of texts: above 4, say, for marked ones.

    Args:
      tokens_BT: int32, whole texts; of repeated (window, token) the first counts.
      lengths_B: int32.
    """
    hashes_BT, is_scored_BT = _scored_hashes(self.key, tokens_BT, lengths_B, self.width)
    is_green_BT = uniforms(hashes_BT) < column(self.fraction)
    fraction_B = jnp.reshape(jnp.asarray(self.fraction), (-1,))
    return green_z_score((is_green_BT & is_scored_BT).sum(axis=1), is_scored_BT.sum(axis=1), fraction_B)

  def is_off(self) -> bool:
    """Whether the bias is 0 everywhere."""
    return all_equal(self.bias, 0)


@transform("tournament")
class Tournament(Transform):
  """Raises, layer after layer, what the key favours: p (1 + g - sum(p g)), g a hashed bit of the token.

  Each layer is a tournament of two draws; averaged over keys the law equals p. Source:
  the two-candidate form in transformers' `SynthIDTextWatermarkLogitsProcessor`; unlike
  there, a window that came before is marked again.

  Attributes:
    key: the secret, 0 to 2^32 - 1.
    width: how many tokens before seed the hash.
    depth: layers, at most 32; 0 is off.
  """

  key: Parameter = row(dtype=jnp.uint32, least=0)
  width: int = static(4)
  depth: int = static(30, tuple(range(33)))

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns log-probabilities."""
    hashes_BV = _token_hashes(self.key, context, self.width, logits_BV.shape[1])

    def play(layer: jax.Array, probs_BV: jax.Array) -> jax.Array:
      bits_BV = ((hashes_BV >> layer.astype(jnp.uint32)) & 1).astype(jnp.float32)
      return probs_BV * (1 + bits_BV - (probs_BV * bits_BV).sum(axis=-1, keepdims=True))

    probs_BV = jax.lax.fori_loop(0, self.depth, play, jax.nn.softmax(logits_BV, axis=-1))
    return jnp.log(probs_BV)

  def detect(self, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Returns z-scores [B] of the mean bit of texts: int32 tokens [B, T] of given lengths."""
    hashes_BT, is_scored_BT = _scored_hashes(self.key, tokens_BT, lengths_B, self.width)
    mask = jnp.uint32((1 << self.depth) - 1)
    ones_B = jnp.where(is_scored_BT, jax.lax.population_count(hashes_BT & mask), 0).sum(axis=1)
    return green_z_score(ones_B, self.depth * is_scored_BT.sum(axis=1), 0.5)

  def is_off(self) -> bool:
    """Whether it has no layers."""
    return self.depth == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GumbelWatermark:
  """A sampler whose noise is a hash of the key and the last tokens: argmax ln(u) / p.

  Given the key a text is determined; averaged over keys the law equals softmax(logits),
  so a single token bears no trace. A window of tokens that comes again draws the same
  noise again. Scheme of S. Aaronson, as in SGLang and vLLM, with a hash of our own.

  Attributes:
    keys_B: uint32, the secret of each row.
    width: how many tokens before seed the hash.
  """

  keys_B: jax.Array
  width: int = dataclasses.field(default=4, metadata=dict(static=True))

  def draw(self, logits_BV: jax.Array, context: Context) -> jax.Array:
    """Returns int32 [B] tokens."""
    hashes_BV = _token_hashes(self.keys_B, context, self.width, logits_BV.shape[1])
    # argmax ln(u) / p = argmax ln p - ln(-ln u), which needs no softmax.
    noise_BV = -jnp.log(-jnp.log(uniforms(hashes_BV)))
    return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)

  def take(self, rows_B: jax.Array) -> Self:
    """Returns the sampler of the given rows."""
    return dataclasses.replace(self, keys_B=jnp.take(self.keys_B, rows_B, axis=0))

  def detect(self, tokens_BT: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tests texts for the key.

    The sum of -ln(1 - u) over T tokens that know nothing of the key has a Gamma(T, 1)
    law; tokens that were chosen for their large u raise it.

    Args:
      tokens_BT: int32, whole texts; of repeated (window, token) the first counts.
      lengths_B: int32.

    Returns:
      z-scores (sum - T) / sqrt(T) and p-values, float32 [B].
    """
    hashes_BT, is_scored_BT = _scored_hashes(self.keys_B, tokens_BT, lengths_B, self.width)
    terms_BT = jnp.where(is_scored_BT, -jnp.log1p(-uniforms(hashes_BT)), 0.0)
    sums_B, counts_B = terms_BT.sum(axis=1), is_scored_BT.sum(axis=1).astype(jnp.float32)
    scores_B = (sums_B - counts_B) / jnp.sqrt(jnp.maximum(counts_B, 1))
    return scores_B, jax.scipy.special.gammaincc(jnp.maximum(counts_B, 1), sums_B)
