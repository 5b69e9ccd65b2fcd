"""Edits of predicted concepts, as arrays: how a concept model is steered.

CoCoMix (arXiv 2502.08524, section 3.2) steers by multiplying one concept logit
and leaves open where and when. Each mode here says both. An intervention is a
pytree of arrays, so a sweep of strengths compiles once.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nr.names import unknown


class InterventionMode(enum.IntEnum):
  """What happens to concept j with strength `value`; S is the selected set.

  Attributes:
    SCALE_PRE: z_j times value before the top-k; j may enter or leave S.
    SCALE_POST: if j is in S, its coefficient times value; S stays.
    FORCE: j is put in S (evicting the smallest if absent) with value times the
      largest coefficient of S.
    FORCE_VALUE: as FORCE, with the coefficient given absolutely.
    SET: z_j = value before the top-k.
    ADD: z_j += value before the top-k.
    ABLATE_PRE: j cannot be selected; the next concept takes its place.
    ABLATE_POST: j leaves S after the top-k; its place stays empty (index -1).
  """

  SCALE_PRE = 0
  SCALE_POST = 1
  FORCE = 2
  FORCE_VALUE = 3
  SET = 4
  ADD = 5
  ABLATE_PRE = 6
  ABLATE_POST = 7


class ConceptIntervention(NamedTuple):
  """Edits of S concepts, applied wherever `active_BL` is true.

  Attributes:
    concepts_S: int32 [S] or [B, S], the concepts to edit, distinct in a row.
    modes_S: int32, same shape, values of `InterventionMode`.
    values_S: float32, same shape, strengths; ignored by the ablations.
    active_BL: bool, broadcastable to [B, L]: the token positions to edit.
  """

  concepts_S: jax.Array
  modes_S: jax.Array
  values_S: jax.Array
  active_BL: jax.Array


def concept_intervention(
  concepts: Sequence[int],
  mode: str | InterventionMode | Sequence[str | InterventionMode],
  values: Sequence[float] | float = 1.0,
  *,
  num_concepts: int,
  active_BL: jax.Array | bool = True,
) -> ConceptIntervention:
  """Builds an intervention on a list of concepts, shared by all rows.

  Args:
    concepts: indices of the concepts to edit, distinct, each below `num_concepts`.
    mode: one mode for all, or one for each; names in any case.
    values: one strength for all, or one for each.
    num_concepts: how many concepts the model has.
    active_BL: bool, broadcastable to [B, L]; where to edit, everywhere by default.

  Raises:
    ValueError: for a concept out of range or repeated, an unknown mode, or
      lengths that differ.
  """
  concepts = [int(concept) for concept in concepts]
  outside = [concept for concept in concepts if not 0 <= concept < num_concepts]
  if outside:
    raise ValueError(f"concepts {outside} are outside 0..{num_concepts - 1}")
  if len(set(concepts)) != len(concepts):
    raise ValueError(f"concepts {concepts} name one concept twice; merge its edits")
  modes = [mode] * len(concepts) if isinstance(mode, str | InterventionMode) else list(mode)
  strengths = [values] * len(concepts) if isinstance(values, int | float) else list(values)
  if not len(concepts) == len(modes) == len(strengths):
    raise ValueError(f"{len(concepts)} concepts, {len(modes)} modes and {len(strengths)} values must match")
  return ConceptIntervention(
    jnp.asarray(concepts, jnp.int32),
    jnp.asarray([int(_parse_mode(name)) for name in modes], jnp.int32),
    jnp.asarray(strengths, jnp.float32),
    jnp.asarray(active_BL, bool),
  )


def edit_logits(z_BLC: jax.Array, intervention: ConceptIntervention) -> jax.Array:
  """Applies the modes that act before the top-k (scale, set, add, ablate).

  Args:
    z_BLC: float32 [B, L, C] concept logits.
    intervention: what to change; modes that act later leave z as it is.
  """
  concepts_BLS, modes_BLS, strengths_BLS, active_BLS = _broadcast(intervention, z_BLC.shape[:2])
  old_BLS = jnp.take_along_axis(z_BLC, concepts_BLS, axis=-1)
  new_BLS = jnp.select(
    [
      modes_BLS == InterventionMode.SCALE_PRE,
      modes_BLS == InterventionMode.SET,
      modes_BLS == InterventionMode.ADD,
      modes_BLS == InterventionMode.ABLATE_PRE,
    ],
    [old_BLS * strengths_BLS, strengths_BLS, old_BLS + strengths_BLS, jnp.full_like(old_BLS, -jnp.inf)],
    old_BLS,
  )
  new_BLS = jnp.where(active_BLS, new_BLS, old_BLS)
  return jnp.put_along_axis(z_BLC, concepts_BLS, new_BLS, axis=-1, inplace=False)


def edit_selection(
  values_BLK: jax.Array, indices_BLK: jax.Array, intervention: ConceptIntervention
) -> tuple[jax.Array, jax.Array]:
  """Applies the modes that act after the top-k (scale, force, ablate).

  Args:
    values_BLK: float32 [B, L, K] coefficients, largest first.
    indices_BLK: int32 [B, L, K] selected concepts.
    intervention: what to change; modes that act earlier change nothing here.

  Returns:
    Edited coefficients and concepts. An emptied place has coefficient 0 and
    index -1; the order by size is not restored.
  """
  # A concept removed before the top-k comes back only if too few others were left.
  is_empty_BLK = jnp.isneginf(values_BLK)
  values_BLK, indices_BLK = jnp.where(is_empty_BLK, 0.0, values_BLK), jnp.where(is_empty_BLK, -1, indices_BLK)
  largest_BL = values_BLK.max(axis=-1)
  edits = _broadcast(intervention, values_BLK.shape[:2])

  def edit_one(carry, edit):
    values_BLK, indices_BLK, locked_BLK = carry
    concept_BL, mode_BL, strength_BL, active_BL = edit
    here_BLK = indices_BLK == concept_BL[..., None]
    evicted_BL = jnp.argmin(jnp.where(locked_BLK, jnp.inf, values_BLK), axis=-1)
    evicted_BLK = jnp.arange(values_BLK.shape[-1]) == evicted_BL[..., None]
    target_BLK = jnp.where(here_BLK.any(axis=-1, keepdims=True), here_BLK, evicted_BLK)
    is_forced = (mode_BL == InterventionMode.FORCE) | (mode_BL == InterventionMode.FORCE_VALUE)
    scaled = here_BLK & (active_BL & (mode_BL == InterventionMode.SCALE_POST))[..., None]
    forced = target_BLK & (active_BL & is_forced)[..., None]
    ablated = here_BLK & (active_BL & (mode_BL == InterventionMode.ABLATE_POST))[..., None]
    force_BL = strength_BL * jnp.where(mode_BL == InterventionMode.FORCE, largest_BL, 1.0)
    values_BLK = jnp.where(scaled, values_BLK * strength_BL[..., None], values_BLK)
    values_BLK = jnp.where(forced, force_BL[..., None], jnp.where(ablated, 0.0, values_BLK))
    indices_BLK = jnp.where(forced, concept_BL[..., None], jnp.where(ablated, -1, indices_BLK))
    return (values_BLK, indices_BLK, locked_BLK | forced), None

  start = (values_BLK, indices_BLK, jnp.zeros(values_BLK.shape, bool))
  edits = jax.tree.map(lambda array: jnp.moveaxis(array, -1, 0), edits)
  (values_BLK, indices_BLK, _), _ = jax.lax.scan(edit_one, start, edits)
  return values_BLK, indices_BLK


def _broadcast(intervention: ConceptIntervention, shape: tuple[int, int]) -> tuple[jax.Array, ...]:
  """Returns concepts, modes, strengths and activity, each [B, L, S]."""
  size = intervention.concepts_S.shape[-1]
  active_BL = jnp.broadcast_to(intervention.active_BL, shape)

  def spread(array: jax.Array) -> jax.Array:
    per_row = array[:, None, :] if array.ndim == 2 else array
    return jnp.broadcast_to(per_row, (*shape, size))

  concepts, modes, values = map(spread, intervention[:3])
  return concepts, modes, values, jnp.broadcast_to(active_BL[..., None], (*shape, size))


def _parse_mode(mode: str | InterventionMode) -> InterventionMode:
  if isinstance(mode, InterventionMode):
    return mode
  try:
    return InterventionMode[mode.upper()]
  except KeyError:
    modes = [member.name.lower() for member in InterventionMode]
    raise ValueError(unknown("mode", mode, modes)) from None
