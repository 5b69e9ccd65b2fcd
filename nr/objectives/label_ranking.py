"""Ranking latents by their attribution scores, without ever writing out all latents of all positions.

Among equal scores the latent with the lowest index comes first, as in a top-k over all latents.
Arrays as in `nr.objectives.attribution`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PreActivations(NamedTuple):
  """The affine map whose result an autoencoder's activation function takes: inputs @ encoder + bias.

  Attributes:
    inputs_BLD: normalised activations without the pre-bias, in the compute type.
    encoder_DC: encoder, in the compute type.
    bias_C: float32 at least.
  """

  inputs_BLD: jax.Array
  encoder_DC: jax.Array
  bias_C: jax.Array


class Latents(NamedTuple):
  """What an autoencoder reads at every position.

  Attributes:
    values_BLK: activations of the slots of the code, 0 in a slot that is not in use.
    indices_BLK: int32, their latents; arbitrary but valid in a slot that is not in use.
    decoder_CD: decoder rows that go with the values, or with `pre` where it is given.
    pre: the map before the activation function; needed where labels are made of it.
  """

  values_BLK: jax.Array
  indices_BLK: jax.Array
  decoder_CD: jax.Array
  pre: PreActivations | None = None


class Ranking(NamedTuple):
  """The first candidates of every position.

  Attributes:
    scores_BLA: signed scores, falling; -inf where there are fewer candidates.
    latents_BLA: int32, their latents; arbitrary where the score is -inf.
    positive_BL: int32, how many of all candidates have a positive signed score.
  """

  scores_BLA: jax.Array
  latents_BLA: jax.Array
  positive_BL: jax.Array


def signed(scores: jax.Array, sign: str) -> jax.Array:
  """Turns scores so that the wanted ones are largest: as they are, negated, or their magnitude."""
  turned = {"paper": scores, "negated": -scores, "abs": jnp.abs(scores)}[sign]
  return jnp.where(turned == 0, 0.0, turned)  # a negative zero would rank below a zero


def along_rows(table_CD: jax.Array, indices_BLK: jax.Array, x_BLD: jax.Array) -> jax.Array:
  """Returns <row j of the table, x> for the given rows, float32 at least."""
  wide = jnp.promote_types(x_BLD.dtype, jnp.float32)
  rows_BLKD = table_CD[indices_BLK].astype(wide)
  # A product and a sum, not a dot: one small product a token is slow on CPU, and the rows are never written out.
  return (rows_BLKD * x_BLD[..., None, :].astype(wide)).sum(-1)


def pre_activations(latents: Latents) -> jax.Array:
  """Returns the activations before the activation function, in the slots of the code only."""
  pre = latents.pre
  return along_rows(pre.encoder_DC.T, latents.indices_BLK, pre.inputs_BLD) + pre.bias_C[latents.indices_BLK]


def rank_active(latents: Latents, ranked_BLK: jax.Array, k: int) -> Ranking:
  """Ranks the latents that are active, by the signed scores of their slots."""
  active_BLK = latents.values_BLK > 0
  scores_BLK = jnp.where(active_BLK, ranked_BLK, -jnp.inf)
  return Ranking(*_first(scores_BLK, latents.indices_BLK, k), _count(scores_BLK))


def rank_active_and_zeros(latents: Latents, ranked_BLK: jax.Array, k: int) -> Ranking:
  """Ranks all latents where those that are not active score 0, as the released code does.

  Among C - K zeros the lowest indices win, and the first K + k latents hold at least k of them: no
  other zero can be among the first k.
  """
  active_BLK = latents.values_BLK > 0
  scores_BLK = jnp.where(active_BLK, ranked_BLK, -jnp.inf)
  low_Z = jnp.arange(min(latents.decoder_CD.shape[0], latents.indices_BLK.shape[-1] + k))
  is_same_BLZK = low_Z[:, None] == latents.indices_BLK[..., None, :]
  is_active_BLZ = (is_same_BLZK & active_BLK[..., None, :]).any(-1)
  zeros_BLZ = jnp.where(is_active_BLZ, -jnp.inf, jnp.zeros((), scores_BLK.dtype))
  indices_BLZ = jnp.broadcast_to(low_Z, zeros_BLZ.shape).astype(latents.indices_BLK.dtype)
  candidates = jnp.concatenate([scores_BLK, zeros_BLZ], axis=-1)
  indices = jnp.concatenate([latents.indices_BLK, indices_BLZ], axis=-1)
  return Ranking(*_first(candidates, indices, k), _count(scores_BLK))


def rank_all(latents: Latents, gradient_BLD: jax.Array, sign: str, k: int, chunk: int) -> Ranking:
  """Ranks all latents by activation before the activation function times gradient, `chunk` at a time.

  Keeps the first k of what it has seen; memory does not depend on C.
  """
  num_latents = latents.decoder_CD.shape[0]
  size = min(chunk, num_latents)
  wide = jnp.promote_types(gradient_BLD.dtype, jnp.float32)
  decoder_CD, gradient_BLD = latents.decoder_CD, gradient_BLD.astype(wide)
  inputs_BLD, encoder_DC, bias_C = latents.pre

  def step(seen: Ranking, index: jax.Array) -> tuple[Ranking, None]:
    first = index * size
    start = jnp.minimum(first, num_latents - size)  # the last chunk overlaps the one before it
    encoder_DS = jax.lax.dynamic_slice_in_dim(encoder_DC, start, size, axis=1)
    bias_S = jax.lax.dynamic_slice_in_dim(bias_C, start, size)
    decoder_SD = jax.lax.dynamic_slice_in_dim(decoder_CD, start, size).astype(wide)
    pre_BLS = jnp.einsum("bld,ds->bls", inputs_BLD, encoder_DS, preferred_element_type=wide) + bias_S
    scores_BLS = signed(pre_BLS * jnp.einsum("bld,sd->bls", gradient_BLD, decoder_SD), sign)
    scores_BLS = jnp.where(start + jnp.arange(size) >= first, scores_BLS, -jnp.inf)
    # What was seen has lower indices and comes first, so that it wins ties.
    best_BLA, places_BLA = jax.lax.top_k(jnp.concatenate([seen.scores_BLA, scores_BLS], axis=-1), k)
    before_BLA = jnp.take_along_axis(seen.latents_BLA, jnp.minimum(places_BLA, k - 1), axis=-1)
    latents_BLA = jnp.where(places_BLA < k, before_BLA, start + places_BLA - k).astype(jnp.int32)
    return Ranking(best_BLA, latents_BLA, seen.positive_BL + _count(scores_BLS)), None

  shape = gradient_BLD.shape[:2]
  none = Ranking(
    jnp.full((*shape, k), -jnp.inf, wide), jnp.zeros((*shape, k), jnp.int32), jnp.zeros(shape, jnp.int32)
  )
  return jax.lax.scan(step, none, jnp.arange(-(-num_latents // size), dtype=jnp.int32))[0]


def _first(scores_BLK: jax.Array, indices_BLK: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the k largest scores and their latents, the lowest index first among equals."""
  order_BLK = jnp.argsort(indices_BLK, axis=-1)
  best_BLA, places_BLA = jax.lax.top_k(jnp.take_along_axis(scores_BLK, order_BLK, axis=-1), k)
  chosen_BLA = jnp.take_along_axis(order_BLK, places_BLA, axis=-1)
  return best_BLA, jnp.take_along_axis(indices_BLK, chosen_BLA, axis=-1)


def _count(scores_BLK: jax.Array) -> jax.Array:
  return (scores_BLK > 0).sum(axis=-1, dtype=jnp.int32)
