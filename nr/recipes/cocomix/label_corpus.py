"""Labels a corpus with concepts: the teacher's upper half, the autoencoder and the label cache together."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from nr.data.concept_labels import LabelCache, LabelHeader, LabelWriter
from nr.data.token_dataset import TokenDataset
from nr.data.windows import WindowSource
from nr.models import parameters
from nr.models.diagonal_gradient import hidden_apart
from nr.models.residual_tap import TapInputs, activations_at, check_layer, hidden_from
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseCode
from nr.models.transformer import Transformer
from nr.objectives import attribution
from nr.objectives.attribution import AttributionSpec, ConceptLabels, UpperHalf
from nr.objectives.label_ranking import Latents, PreActivations
from nr.objectives.language_modeling import token_nll
from nr.training import sharding


class Labelling(NamedTuple):
  """How batches are labelled.

  Attributes:
    layer: the block (from 0) whose output is tapped.
    spec: the attribution variant.
    loss_chunk: tokens whose logits, and whose scores of all latents, are held at a time; None: all.
    concept_chunk: latents scored at a time where all are candidates (`act="pre"`).
    positions_at_once: positions replaced at a time where each needs a pass of its own
      (`eval_point="recon"` with `scope="future"`).
  """

  layer: int
  spec: AttributionSpec
  loss_chunk: int | None = None
  concept_chunk: int = attribution.CONCEPT_CHUNK
  positions_at_once: int = attribution.POSITIONS_AT_ONCE


def label_batch(
  teacher: Transformer, autoencoder: SparseAutoencoder, batch: Mapping[str, jax.Array], labelling: Labelling
) -> ConceptLabels:
  """Labels one batch of windows; pure, to be run under `jax.jit`.

  Labels of a window depend on nothing but the window, so those made here in a train step are those of
  a cache made of the same windows.

  Args:
    teacher: the frozen language model.
    autoencoder: the frozen autoencoder of its residual stream.
    batch: tokens, targets, weights [B, L] and, where attention is reset, segment_ids and positions.
    labelling: the variant, and how much is held at a time.
  """
  inputs = TapInputs.of(batch)
  hidden_BLD = activations_at(teacher, inputs, labelling.layer)
  normalised = autoencoder.normalise(hidden_BLD)
  code = encode_in_chunks(autoencoder, normalised.values_TD, labelling.loss_chunk)
  reconstruction_BLD = None
  if labelling.spec.needs_reconstruction:
    reconstruction_BLD = autoencoder.denormalise(autoencoder.decode(code), normalised)
    reconstruction_BLD = reconstruction_BLD.astype(hidden_BLD.dtype)
  return attribution.concept_labels(
    upper_half(teacher, inputs, batch, labelling),
    hidden_BLD,
    reconstruction_BLD,
    read_latents(autoencoder, normalised.values_TD, code, labelling.spec.act),
    batch["weights"],
    labelling.spec,
    concept_chunk=labelling.concept_chunk,
    positions_at_once=labelling.positions_at_once,
  )


def encode_in_chunks(autoencoder: SparseAutoencoder, u_BLD: jax.Array, chunk_size: int | None) -> SparseCode:
  """Returns the code of normalised activations, all latents scored for about `chunk_size` tokens at a time."""
  B, L, _ = u_BLD.shape
  if chunk_size is None or chunk_size >= B * L:
    return autoencoder.encode(u_BLD)
  positions = max(1, chunk_size // B)
  code = jax.lax.map(autoencoder.encode, u_BLD.swapaxes(0, 1), batch_size=positions)
  return SparseCode(*(part_LBK.swapaxes(0, 1) for part_LBK in code))


def read_latents(autoencoder: SparseAutoencoder, u_BLD: jax.Array, code: SparseCode, act: str) -> Latents:
  """Returns what attribution needs of an autoencoder, for activations after ("post") or before ("pre").

  Activation times decoder row is what counts. Where decoder rows are free (`decoder_norm="scaled"`),
  activations are measured in units of the rows' norms and decoded with unit rows, while the map before
  them is not, and belongs to the rows as they are. Before its activation function, a gated
  autoencoder's latent is what its gate reads (our choice: the paper's has no gate).
  """
  if act == "post":
    return Latents(code.values_TK, code.indices_TK, autoencoder.decoder_rows())
  pre = PreActivations(*autoencoder.score_map(u_BLD))
  return Latents(code.values_TK, code.indices_TK, autoencoder.decoder.kernel[...], pre)


def upper_half(
  teacher: Transformer, inputs: TapInputs, batch: Mapping[str, jax.Array], labelling: Labelling
) -> UpperHalf:
  """Returns the teacher above the tap as functions of the tapped activations."""
  unembedding_VD = teacher.unembedding_VD

  def summed(final_BLD: jax.Array) -> jax.Array:
    chunk = labelling.loss_chunk
    losses_BL = token_nll(final_BLD, unembedding_VD, batch["targets"], chunk_size=chunk)
    return (losses_BL * batch["weights"]).sum()

  def loss(hidden_BLD: jax.Array) -> jax.Array:
    return summed(hidden_from(teacher, hidden_BLD, inputs, labelling.layer))

  def loss_apart(rows_BLD: jax.Array, context_BLD: jax.Array | None) -> jax.Array:
    return summed(hidden_apart(teacher, rows_BLD, inputs, labelling.layer, context_BLD=context_BLD))

  return UpperHalf(loss, loss_apart)


def make_label_step(
  teacher_graphdef: Any, autoencoder_graphdef: Any, labelling: Labelling
) -> Callable[[Any, Any, Mapping], ConceptLabels]:
  """Makes the jitted function (teacher params, autoencoder params, batch) -> ConceptLabels."""

  def step(teacher_params: Any, autoencoder_params: Any, batch: Mapping) -> ConceptLabels:
    teacher = parameters.merge(teacher_graphdef, teacher_params)
    autoencoder = parameters.merge(autoencoder_graphdef, autoencoder_params)
    return label_batch(teacher, autoencoder, batch, labelling)

  return jax.jit(step)


def label_dataset(
  directory: str | pathlib.Path,
  dataset: TokenDataset,
  header: LabelHeader,
  teacher: tuple[Any, Any],
  autoencoder: tuple[Any, Any],
  labelling: Labelling,
  *,
  batch_size: int,
  mesh: jax.sharding.Mesh | None = None,
  progress: bool = True,
) -> LabelCache:
  """Labels every token of a dataset, or finishes a run that was stopped, and returns the cache.

  Args:
    directory: where the cache goes.
    dataset: the token stream.
    header: see `make_header`.
    teacher: (graph definition, parameters) of the teacher.
    autoencoder: (graph definition, parameters) of the autoencoder.
    labelling: how; layer and variant must be the header's.
    batch_size: windows at a time.
    mesh: devices that label, each an equal share of a batch with a copy of teacher and autoencoder; None: one.
    progress: whether to show a progress bar.

  Raises:
    ValueError: a header that says another layer or variant, or a batch that does not divide over the devices.
    DataError: a partial cache in `directory` that was made with something else.
  """
  if (header.layer, dict(header.attribution)) != (labelling.layer, labelling.spec.to_dict()):
    raise ValueError(
      f"the header says layer={header.layer}, attribution={dict(header.attribution)}; labels would be made with "
      f"layer={labelling.layer}, attribution={labelling.spec.to_dict()}; make both from the same settings"
    )
  writer = LabelWriter(directory, header)
  source = WindowSource(dataset, header.window, reset_at_documents=header.reset_at_documents)
  check_division(batch_size, mesh)
  step = make_label_step(teacher[0], autoencoder[0], labelling)
  params = teacher[1], autoencoder[1]
  if mesh is not None:
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
  bar = tqdm(total=len(writer.spans), initial=writer.windows_done, desc="labels", unit=" windows",
             disable=not progress)  # fmt: skip
  with bar, sharding.context(mesh):
    for spans in writer.remaining(batch_size):
      windows = [source.window(span.start) for span in spans]
      windows += [windows[-1]] * (batch_size - len(windows))  # one shape, one compilation
      batch = {name: np.stack([window[name] for window in windows]) for name in windows[0]}
      writer.write(spans, *jax.device_get(step(*params, sharding.put_batch(batch, mesh))))
      bar.update(len(spans))
  return writer.finish()


def check_division(batch_size: int, mesh: jax.sharding.Mesh | None) -> None:
  """Raises ValueError when windows labelled at a time are not shared equally by the devices."""
  devices = 1 if mesh is None else mesh.size
  if batch_size < 1 or batch_size % devices:
    raise ValueError(
      f"labels.batch_size={batch_size} must be a positive multiple of the {devices} devices that label; change it, "
      "or set labels.devices to fewer"
    )


def make_header(
  dataset: TokenDataset,
  *,
  teacher_hash: str,
  autoencoder_hash: str,
  teacher_layers: int,
  layer: int,
  active_latents: int,
  num_concepts: int,
  spec: AttributionSpec,
  window: int,
  stride: int | None = None,
  reset_at_documents: bool = False,
) -> LabelHeader:
  """Returns the header of a labelling job, its settings checked before any device time is spent.

  Args:
    dataset: the token stream.
    teacher_hash: hash of the teacher's parameters.
    autoencoder_hash: hash of the autoencoder's parameters.
    teacher_layers: blocks of the teacher.
    layer: the block (from 0) whose output is tapped.
    active_latents: most latents that the autoencoder has active at a position.
    num_concepts: its latents.
    spec: the attribution variant.
    window: tokens of context; the students' window unless there is a reason.
    stride: tokens between windows; `window` when None.
    reset_at_documents: whether the teacher's attention stays within documents.

  Raises:
    ValueError: a layer outside the teacher, more labels than active latents, too many concepts for
      uint16, a window that does not fit.
  """
  check_layer(teacher_layers, layer)
  spec.check(active_latents, num_concepts)
  return LabelHeader(
    teacher=teacher_hash,
    autoencoder=autoencoder_hash,
    tokenizer=dataset.tokenizer,
    dataset=dataset.fingerprint,
    layer=layer,
    attribution=spec.to_dict(),
    window=window,
    stride=window if stride is None else stride,
    num_concepts=num_concepts,
    num_tokens=dataset.num_tokens,
    labels_per_token=spec.k_attr,
    reset_at_documents=reset_at_documents,
  )
