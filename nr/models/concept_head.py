"""From hidden states to the selected concepts, computed once for mixing and loss.

One pass over the concept logits z = u M + a yields all that anything later needs:
the top-k values and indices (mixing), the log-normaliser and the logits of given
labels (loss). With `concept_chunk` the pass takes that many concepts at a time, keeps
a running log-sum-exp and a running exact top-k, and computes each chunk's logits again
in the backward pass: [B, L, C] never exists, and memory does not grow with C.

Where concepts are split over devices, each device passes over its own piece, and
what is kept of the pieces is put together at the end: k pairs of value and index
a position travel, and a few numbers of the log-sum-exp and the labels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.models.concept_intervention import ConceptIntervention, edit_logits, edit_selection
from nr.models.partitioning import constrain, shard_count
from nr.models.top_k import merge_top_k, top_k, top_k_indices


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
  concept_chunk: int | None = None,
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
    concept_chunk: concepts (of those on a device) whose logits are held at a time;
      None holds all. The result is the same up to the order of summation.
  """
  given_BLA = jnp.zeros((*u_BLD.shape[:2], 0), jnp.int32) if labels_BLA is None else labels_BLA
  num_concepts = bias_C.shape[0]
  if (
    concept_chunk is None or intervention is not None or concept_chunk * _pieces(num_concepts) >= num_concepts
  ):
    outputs = _predict_whole(u_BLD, kernel_DC, bias_C, given_BLA, k, top_k_impl, intervention)
  else:
    outputs = _predict_in_chunks(u_BLD, kernel_DC, bias_C, given_BLA, k, top_k_impl, concept_chunk)
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


# Concepts in chunks: C = P pieces on different devices x Q chunks of a piece x E concepts of a chunk.


class _Pass(NamedTuple):
  """What is kept of the chunks so far, for each piece; indices count from the start of the piece."""

  maximum_BLP: jax.Array
  total_BLP: jax.Array  # of exp(z - maximum)
  values_BLPK: jax.Array
  indices_BLPK: jax.Array
  label_logits_BLPA: jax.Array  # 0 where the label is not among the concepts seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _predict_in_chunks(
  u_BLD, kernel_DC, bias_C, labels_BLA, k, top_k_impl, concept_chunk
) -> ConceptPrediction:
  kernel_DC, bias_PQE = _split_concepts(kernel_DC, bias_C, concept_chunk)
  pieces, chunks, size = bias_PQE.shape
  length = bias_C.shape[0] // pieces
  places_BLPA = _places(_safe_labels(labels_BLA, bias_C.shape[0]), pieces, length)

  def read_chunk(kept: _Pass, chunk: jax.Array) -> tuple[_Pass, None]:
    z_BLPE = _chunk_logits(u_BLD, kernel_DC, bias_PQE, chunk)
    maximum_BLP = jnp.maximum(kept.maximum_BLP, z_BLPE.max(axis=-1))
    total_BLP = jnp.exp(z_BLPE - maximum_BLP[..., None]).sum(axis=-1)
    total_BLP = total_BLP + kept.total_BLP * jnp.exp(kept.maximum_BLP - maximum_BLP)
    best_BLPK = top_k_indices(z_BLPE, min(k, size), implementation=top_k_impl)
    values_BLPK, indices_BLPK = merge_top_k(
      kept.values_BLPK,
      kept.indices_BLPK,
      jnp.take_along_axis(z_BLPE, best_BLPK, axis=-1),
      best_BLPK + chunk * size,
    )
    inside_BLPA = places_BLPA - chunk * size
    found_BLPA = jnp.take_along_axis(z_BLPE, jnp.clip(inside_BLPA, 0, size - 1), axis=-1)
    is_here_BLPA = (inside_BLPA >= 0) & (inside_BLPA < size)
    label_logits_BLPA = jnp.where(is_here_BLPA, found_BLPA, kept.label_logits_BLPA)
    return _Pass(maximum_BLP, total_BLP, values_BLPK, indices_BLPK, label_logits_BLPA), None

  lead = (*u_BLD.shape[:2], pieces)
  nothing = _Pass(
    maximum_BLP=jnp.full(lead, -jnp.inf, jnp.float32),
    total_BLP=jnp.zeros(lead, jnp.float32),
    values_BLPK=jnp.full((*lead, k), -jnp.inf, jnp.float32),
    indices_BLPK=jnp.zeros((*lead, k), jnp.int32),
    label_logits_BLPA=jnp.zeros((*lead, labels_BLA.shape[-1]), jnp.float32),
  )
  kept, _ = jax.lax.scan(read_chunk, nothing, jnp.arange(chunks, dtype=jnp.int32))
  return _join_pieces(kept, length)


def _join_pieces(kept: _Pass, length: int) -> ConceptPrediction:
  """Puts together what was kept of the pieces, each of `length` concepts."""
  maximum_BL = kept.maximum_BLP.max(axis=-1)
  total_BL = (kept.total_BLP * jnp.exp(kept.maximum_BLP - maximum_BL[..., None])).sum(axis=-1)
  *lead, pieces, k = kept.values_BLPK.shape
  # Pieces stand in the order of their concepts, so that here too position orders ties by index.
  indices_BLPK = kept.indices_BLPK + length * jnp.arange(pieces, dtype=jnp.int32)[:, None]
  values_BLK, best_BLK = top_k(kept.values_BLPK.reshape(*lead, pieces * k), k, implementation="lax")
  indices_BLK = jnp.take_along_axis(indices_BLPK.reshape(*lead, pieces * k), best_BLK, axis=-1)
  return ConceptPrediction(
    values_BLK, indices_BLK, maximum_BL + jnp.log(total_BL), kept.label_logits_BLPA.sum(axis=-2)
  )


def _chunked_forward(u_BLD, kernel_DC, bias_C, labels_BLA, k, top_k_impl, concept_chunk):
  outputs = _predict_in_chunks(u_BLD, kernel_DC, bias_C, labels_BLA, k, top_k_impl, concept_chunk)
  saved = (u_BLD, kernel_DC, bias_C, labels_BLA, outputs.indices_BLK, outputs.log_normalizer_BL)
  return outputs, saved


def _chunked_backward(k, top_k_impl, concept_chunk, saved, gradients):
  """Recomputes each chunk's logits: dz = softmax * dLSE + scatter(dvalues) + scatter(dlabels)."""
  del k, top_k_impl
  u_BLD, kernel_DC, bias_C, labels_BLA, indices_BLK, log_normalizer_BL = saved
  kernel_DC, bias_PQE = _split_concepts(kernel_DC, bias_C, concept_chunk)
  pieces, chunks, size = bias_PQE.shape
  # Selected concepts and labels receive gradients alike; one scatter serves both.
  receivers_BLS = jnp.concatenate([indices_BLK, _safe_labels(labels_BLA, bias_C.shape[0])], axis=-1)
  places_BLPS = _places(receivers_BLS, pieces, bias_C.shape[0] // pieces)
  received_BLS = jnp.concatenate([gradients.values_BLK, gradients.label_logits_BLA], axis=-1)
  received_BLPS = jnp.broadcast_to(received_BLS[..., None, :], places_BLPS.shape)

  def read_chunk(totals, chunk):
    du_BLD, d_kernel_DPC = totals
    z_BLPE = _chunk_logits(u_BLD, kernel_DC, bias_PQE, chunk)
    dz_BLPE = jnp.exp(z_BLPE - log_normalizer_BL[..., None, None])
    dz_BLPE = dz_BLPE * gradients.log_normalizer_BL[..., None, None]
    dz_BLPE = _add_along_last(dz_BLPE, _drop_outside(places_BLPS - chunk * size, size), received_BLPS)
    dz_BLPE = constrain(dz_BLPE, "batch", "length", "activation_concepts", None)
    cast_BLPE, kernel_DPE = dz_BLPE.astype(kernel_DC.dtype), _chunk_of(kernel_DC, bias_PQE, chunk)
    du_BLD += jnp.einsum("blpe,dpe->bld", cast_BLPE, kernel_DPE, preferred_element_type=jnp.float32)
    d_kernel_DPE = jnp.einsum("bld,blpe->dpe", u_BLD, cast_BLPE, preferred_element_type=jnp.float32)
    d_kernel_DPE = constrain(d_kernel_DPE.astype(kernel_DC.dtype), "embed", "activation_concepts", None)
    d_kernel_DPC = jax.lax.dynamic_update_slice_in_dim(d_kernel_DPC, d_kernel_DPE, chunk * size, axis=2)
    return (du_BLD, d_kernel_DPC), dz_BLPE.sum(axis=(0, 1))

  zeros_DPC = jnp.zeros((u_BLD.shape[-1], pieces, chunks * size), kernel_DC.dtype)
  zeros = (jnp.zeros(u_BLD.shape, jnp.float32), zeros_DPC)
  (du_BLD, d_kernel_DPC), d_bias_QPE = jax.lax.scan(read_chunk, zeros, jnp.arange(chunks, dtype=jnp.int32))
  d_kernel_DC = _join_concepts(d_kernel_DPC, bias_C.shape[0])
  d_bias_C = _join_concepts(d_bias_QPE.swapaxes(0, 1).reshape(pieces, -1), bias_C.shape[0])
  d_labels = np.zeros(labels_BLA.shape, jax.dtypes.float0)
  return du_BLD.astype(u_BLD.dtype), d_kernel_DC, d_bias_C.astype(bias_C.dtype), d_labels


_predict_in_chunks.defvjp(_chunked_forward, _chunked_backward)


def _pieces(num_concepts: int) -> int:
  """Returns into how many pieces devices cut the concepts."""
  pieces = shard_count("activation_concepts")
  return 1 if num_concepts % pieces else pieces


def _split_concepts(kernel_DC, bias_C, concept_chunk: int) -> tuple[jax.Array, jax.Array]:
  """Cuts C into pieces and chunks, at the end of a piece padded with concepts whose logits are -inf.

  Returns the padded kernel, still of two axes, and the bias [P, Q, E].
  """
  num_concepts = bias_C.shape[0]
  pieces = _pieces(num_concepts)
  length = num_concepts // pieces
  chunks = -(-length // concept_chunk)
  size = -(-length // chunks)
  padding = chunks * size - length
  bias_PC = bias_C.astype(jnp.float32).reshape(pieces, length)
  if padding:
    kernel_DPC = jnp.pad(kernel_DC.reshape(-1, pieces, length), ((0, 0), (0, 0), (0, padding)))
    kernel_DC = kernel_DPC.reshape(kernel_DC.shape[0], -1)
    bias_PC = jnp.pad(bias_PC, ((0, 0), (0, padding)), constant_values=-jnp.inf)
  return kernel_DC, bias_PC.reshape(pieces, chunks, size)


def _join_concepts(array_PC: jax.Array, num_concepts: int) -> jax.Array:
  """Takes the padding of [..., P, C / P] away and joins the pieces."""
  pieces = array_PC.shape[-2]
  return array_PC[..., : num_concepts // pieces].reshape(*array_PC.shape[:-2], num_concepts)


def _chunk_of(kernel_DC, bias_PQE, chunk) -> jax.Array:
  """Returns one chunk of every piece, [D, P, E]."""
  pieces, chunks, size = bias_PQE.shape
  # Reshaped here and not before the loop, into which an array with an axis of size 1 would be copied.
  kernel_DPC = kernel_DC.reshape(-1, pieces, chunks * size)
  return jax.lax.dynamic_slice_in_dim(kernel_DPC, chunk * size, size, axis=2)


def _chunk_logits(u_BLD, kernel_DC, bias_PQE, chunk) -> jax.Array:
  """Returns the logits of one chunk of every piece, float32 [B, L, P, E]."""
  kernel_DPE = _chunk_of(kernel_DC, bias_PQE, chunk)
  bias_PE = jax.lax.dynamic_index_in_dim(bias_PQE, chunk, axis=1, keepdims=False)
  z_BLPE = jnp.einsum("bld,dpe->blpe", u_BLD, kernel_DPE, preferred_element_type=jnp.float32)
  return constrain(z_BLPE + bias_PE, "batch", "length", "activation_concepts", None)


def _places(concepts_BLA: jax.Array, pieces: int, length: int) -> jax.Array:
  """Returns where in each piece a concept lies, int32 [B, L, P, A]; -1 where it is of another piece."""
  first_P1 = length * jnp.arange(pieces, dtype=jnp.int32)[:, None]
  places_BLPA = concepts_BLA[..., None, :] - first_P1
  return jnp.where((places_BLPA >= 0) & (places_BLPA < length), places_BLPA, -1)


def _drop_outside(places: jax.Array, size: int) -> jax.Array:
  """Moves places outside 0..size - 1 to `size`, where a scatter drops them."""
  return jnp.where((places >= 0) & (places < size), places, size)


def _safe_labels(labels_BLA: jax.Array, num_concepts: int) -> jax.Array:
  """Replaces labels outside the concepts (such as `NO_LABEL`) by 0."""
  labels_BLA = labels_BLA.astype(jnp.int32)
  return jnp.where((labels_BLA >= 0) & (labels_BLA < num_concepts), labels_BLA, 0)


def _add_along_last(array_BLC: jax.Array, indices_BLK: jax.Array, updates_BLK: jax.Array) -> jax.Array:
  """Adds `updates` at `indices` of the last axis; repeated indices add up, those outside are dropped."""
  add = lambda row, indices, updates: row.at[indices].add(updates, mode="drop")  # noqa: E731
  for _ in range(array_BLC.ndim - 1):
    add = jax.vmap(add)
  return add(array_BLC, indices_BLK, updates_BLK)
