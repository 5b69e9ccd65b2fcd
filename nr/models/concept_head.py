"""From hidden states to the selected concepts, computed once for mixing and loss.

One pass over the concept logits z = u M + a yields all that anything later needs:
the top-k values and indices (mixing), the log-normaliser and the logits of given
labels (loss). With `chunk_length` the logits of only that many positions exist at
a time, in the forward and in the backward pass, and the result is the same.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.models.concept_intervention import ConceptIntervention, edit_logits, edit_selection
from nr.models.partitioning import constrain
from nr.models.top_k import top_k, top_k_indices


class ConceptPrediction(NamedTuple):
  """What one pass over the concept logits z yields.

  Attributes:
    values_BLK: float32 [B, L, K], the largest logits (raw and signed), largest first.
    indices_BLK: int32 [B, L, K], their concepts; -1 marks a place emptied by an
      intervention.
    log_normalizer_BL: float32 [B, L], logsumexp of z over all concepts, nats.
    label_logits_BLA: float32 [B, L, A], z at the labels (arbitrary where a label
      is `nr.labels.NO_LABEL`), or None when no labels were given.
  """

  values_BLK: jax.Array
  indices_BLK: jax.Array
  log_normalizer_BL: jax.Array
  label_logits_BLA: jax.Array | None


def predict_concepts(
  u_BLD: jax.Array,
  kernel_DC: jax.Array,
  bias_C: jax.Array,
  *,
  k: int,
  labels_BLA: jax.Array | None = None,
  intervention: ConceptIntervention | None = None,
  top_k_impl: str = "chunked",
  chunk_length: int | None = None,
) -> ConceptPrediction:
  """Predicts concepts from normalised hidden states.

  Args:
    u_BLD: [B, L, D] head inputs, any float type; logits accumulate in float32.
    kernel_DC: [D, C], same type as `u_BLD`.
    bias_C: float32 [C].
    k: how many concepts to select.
    labels_BLA: integer [B, L, A] label concepts, `nr.labels.NO_LABEL` for none.
    intervention: edits the selection only; the log-normaliser and the label
      logits stay those of the model's own prediction. Uses all logits at once.
    top_k_impl: see `nr.models.top_k`.
    chunk_length: positions whose logits are held at a time; None holds all.
  """
  given_BLA = jnp.zeros((*u_BLD.shape[:2], 0), jnp.int32) if labels_BLA is None else labels_BLA
  if chunk_length is None or chunk_length >= u_BLD.shape[1] or intervention is not None:
    outputs = _predict_whole(u_BLD, kernel_DC, bias_C, given_BLA, k, top_k_impl, intervention)
  else:
    outputs = _predict_chunked(u_BLD, kernel_DC, bias_C, given_BLA, k, top_k_impl, chunk_length)
  return outputs._replace(label_logits_BLA=None) if labels_BLA is None else outputs


def concept_logits(u_BLD: jax.Array, kernel_DC: jax.Array, bias_C: jax.Array) -> jax.Array:
  """Returns z = u M + a, float32 [B, L, C]."""
  z_BLC = jnp.einsum("bld,dc->blc", u_BLD, kernel_DC, preferred_element_type=jnp.float32)
  return constrain(z_BLC + bias_C.astype(jnp.float32), "batch", "length", "activation_concepts")


def mix_concepts(
  values_BLK: jax.Array, indices_BLK: jax.Array, kernel_CD: jax.Array, *, implementation: str = "gather"
) -> jax.Array:
  """Returns the sum over the selected concepts of value times row of W, [B, L, D] float32.

  `gather` reads k rows a position; `dense` multiplies a mostly zero [B, L, C]
  by W, which partitions better when the concepts are split over devices. Equal
  up to the order of summation.
  """
  if implementation == "gather":
    return _mix_by_gather(values_BLK, indices_BLK, kernel_CD)
  zeros_BLC = jnp.zeros((*values_BLK.shape[:2], kernel_CD.shape[0]), jnp.float32)
  # Emptied places (index -1) carry 0, so where they land does not matter.
  sparse_BLC = _add_along_last(zeros_BLC, indices_BLK, values_BLK)
  sparse_BLC = constrain(sparse_BLC, "batch", "length", "activation_concepts")
  return jnp.einsum(
    "blc,cd->bld", sparse_BLC.astype(kernel_CD.dtype), kernel_CD, preferred_element_type=jnp.float32
  )


# Recomputing the gather in the backward pass keeps [B, L, K, D] out of memory.
@jax.checkpoint
def _mix_by_gather(values_BLK: jax.Array, indices_BLK: jax.Array, kernel_CD: jax.Array) -> jax.Array:
  rows_BLKD = kernel_CD[indices_BLK].astype(jnp.float32)
  # A product and a sum, not a dot: the compiler then never writes the rows out.
  return (values_BLK[..., None] * rows_BLKD).sum(axis=-2)


def _predict_whole(u_BLD, kernel_DC, bias_C, labels_BLA, k, top_k_impl, intervention) -> ConceptPrediction:
  z_BLC = concept_logits(u_BLD, kernel_DC, bias_C)
  log_normalizer_BL = jax.nn.logsumexp(z_BLC, axis=-1)
  label_logits_BLA = jnp.take_along_axis(z_BLC, _safe_labels(labels_BLA, z_BLC.shape[-1]), axis=-1)
  if intervention is None:
    values_BLK, indices_BLK = top_k(z_BLC, k, implementation=top_k_impl)
  else:
    values_BLK, indices_BLK = top_k(edit_logits(z_BLC, intervention), k, implementation=top_k_impl)
    values_BLK, indices_BLK = edit_selection(values_BLK, indices_BLK, intervention)
  return ConceptPrediction(values_BLK, indices_BLK, log_normalizer_BL, label_logits_BLA)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _predict_chunked(u_BLD, kernel_DC, bias_C, labels_BLA, k, top_k_impl, chunk_length) -> ConceptPrediction:
  def predict_chunk(chunk):
    u, labels = chunk
    z = concept_logits(u, kernel_DC, bias_C)
    indices = top_k_indices(z, k, implementation=top_k_impl)
    label_logits = jnp.take_along_axis(z, _safe_labels(labels, z.shape[-1]), axis=-1)
    values = jnp.take_along_axis(z, indices, axis=-1)
    return ConceptPrediction(values, indices, jax.nn.logsumexp(z, axis=-1), label_logits)

  chunks = _split((u_BLD, labels_BLA), chunk_length)
  return _join(jax.lax.map(predict_chunk, chunks), u_BLD.shape[1])


def _chunked_forward(u_BLD, kernel_DC, bias_C, labels_BLA, k, top_k_impl, chunk_length):
  outputs = _predict_chunked(u_BLD, kernel_DC, bias_C, labels_BLA, k, top_k_impl, chunk_length)
  saved = (u_BLD, kernel_DC, bias_C, labels_BLA, outputs.indices_BLK, outputs.log_normalizer_BL)
  return outputs, saved


def _chunked_backward(k, top_k_impl, chunk_length, saved, gradients):
  """Recomputes each chunk's logits: dz = softmax * dLSE + scatter(dvalues) + scatter(dlabels)."""
  del k, top_k_impl
  u_BLD, kernel_DC, bias_C, labels_BLA, indices_BLK, log_normalizer_BL = saved

  def chunk_gradient(totals, chunk):
    kernel_total_DC, bias_total_C = totals
    u, labels, indices, log_normalizer, d_values, d_normalizer, d_labels = chunk
    z = concept_logits(u, kernel_DC, bias_C)
    dz = jnp.exp(z - log_normalizer[..., None]) * d_normalizer[..., None]
    dz = _add_along_last(dz, indices, d_values)
    dz = _add_along_last(dz, _safe_labels(labels, z.shape[-1]), d_labels)
    dz = constrain(dz, "batch", "length", "activation_concepts")
    dz_cast = dz.astype(kernel_DC.dtype)
    du = jnp.einsum("blc,dc->bld", dz_cast, kernel_DC, preferred_element_type=jnp.float32)
    d_kernel_DC = jnp.einsum("bld,blc->dc", u, dz_cast, preferred_element_type=jnp.float32)
    return (kernel_total_DC + d_kernel_DC, bias_total_C + dz.sum(axis=(0, 1))), du.astype(u.dtype)

  arrays = (u_BLD, labels_BLA, indices_BLK, log_normalizer_BL)
  cotangents = (gradients.values_BLK, gradients.log_normalizer_BL, gradients.label_logits_BLA)
  zeros = (jnp.zeros(kernel_DC.shape, jnp.float32), jnp.zeros(bias_C.shape, jnp.float32))
  (d_kernel_DC, d_bias_C), du = jax.lax.scan(chunk_gradient, zeros, _split(arrays + cotangents, chunk_length))
  d_labels = np.zeros(labels_BLA.shape, jax.dtypes.float0)
  du_BLD = _join(du, u_BLD.shape[1])
  return du_BLD, d_kernel_DC.astype(kernel_DC.dtype), d_bias_C.astype(bias_C.dtype), d_labels


_predict_chunked.defvjp(_chunked_forward, _chunked_backward)


def _split(tree, chunk_length: int):
  """Cuts axis 1 of every [B, L, ...] into a leading axis of chunks, padding with zeros."""

  def split(array: jax.Array) -> jax.Array:
    batch, length = array.shape[:2]
    chunks = -(-length // chunk_length)
    padding = [(0, 0), (0, chunks * chunk_length - length)] + [(0, 0)] * (array.ndim - 2)
    padded = jnp.pad(array, padding)
    return jnp.moveaxis(padded.reshape(batch, chunks, chunk_length, *array.shape[2:]), 1, 0)

  return jax.tree.map(split, tree)


def _join(tree, length: int):
  """Undoes `_split`."""

  def join(array: jax.Array) -> jax.Array:
    chunks, batch, chunk_length = array.shape[:3]
    return jnp.moveaxis(array, 0, 1).reshape(batch, chunks * chunk_length, *array.shape[3:])[:, :length]

  return jax.tree.map(join, tree)


def _safe_labels(labels_BLA: jax.Array, num_concepts: int) -> jax.Array:
  """Replaces labels outside the concepts (such as `NO_LABEL`) by 0."""
  labels_BLA = labels_BLA.astype(jnp.int32)
  return jnp.where((labels_BLA >= 0) & (labels_BLA < num_concepts), labels_BLA, 0)


def _add_along_last(array_BLC: jax.Array, indices_BLK: jax.Array, updates_BLK: jax.Array) -> jax.Array:
  """Adds `updates` at `indices` of the last axis; repeated indices add up."""
  add_row = jax.vmap(jax.vmap(lambda row, indices, updates: row.at[indices].add(updates)))
  return add_row(array_BLC, indices_BLK, updates_BLK)
