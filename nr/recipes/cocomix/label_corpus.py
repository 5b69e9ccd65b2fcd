"""Labels a corpus with concepts: the teacher's upper half, the autoencoder and the label cache together."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nr.data.concept_labels import LabelCache, LabelHeader, LabelWriter
from nr.data.token_dataset import TokenDataset
from nr.data.windows import WindowSource
from nr.models import parameters
from nr.models.residual_tap import TapInputs, activations_at, check_layer, hidden_from
from nr.models.sparse_autoencoder import SparseAutoencoder
from nr.models.transformer import Transformer
from nr.objectives import attribution
from nr.objectives.attribution import AttributionSpec, ConceptLabels
from nr.objectives.language_modeling import token_nll


def label_batch(
  teacher: Transformer,
  autoencoder: SparseAutoencoder,
  batch: dict[str, jax.Array],
  *,
  layer: int,
  spec: AttributionSpec,
  loss_chunk: int | None = None,
) -> ConceptLabels:
  """Labels one batch of windows; pure, to be run under `jax.jit`.

  Args:
    teacher: the frozen language model.
    autoencoder: the frozen autoencoder of its residual stream.
    batch: tokens, targets, weights [B, L] and, where attention is reset, segment_ids and positions.
    layer: the block (from 0) whose output is tapped.
    spec: the attribution variant.
    loss_chunk: tokens whose logits are held at a time; None holds all of them.
  """
  inputs = TapInputs.of(batch)
  hidden_BLD = activations_at(teacher, inputs, layer)
  unembedding_VD = teacher.unembedding_VD

  def upper_loss(hidden_BLD: jax.Array) -> jax.Array:
    final_BLD = hidden_from(teacher, hidden_BLD, inputs, layer)
    losses_BL = token_nll(final_BLD, unembedding_VD, batch["targets"], chunk_size=loss_chunk)
    return (losses_BL * batch["weights"]).sum()

  code = autoencoder.encode(autoencoder.normalise(hidden_BLD).values_TD)
  return attribution.concept_labels(
    hidden_BLD, upper_loss, code.values_TK, code.indices_TK, autoencoder.decoder.kernel[...],
    batch["weights"], spec,
  )  # fmt: skip


def make_label_step(
  teacher_graphdef: Any,
  autoencoder_graphdef: Any,
  *,
  layer: int,
  spec: AttributionSpec,
  loss_chunk: int | None = None,
) -> Callable[[Any, Any, dict], ConceptLabels]:
  """Makes the jitted function (teacher params, autoencoder params, batch) -> ConceptLabels."""

  def step(teacher_params: Any, autoencoder_params: Any, batch: dict) -> ConceptLabels:
    teacher = parameters.merge(teacher_graphdef, teacher_params)
    autoencoder = parameters.merge(autoencoder_graphdef, autoencoder_params)
    return label_batch(teacher, autoencoder, batch, layer=layer, spec=spec, loss_chunk=loss_chunk)

  return jax.jit(step)


def label_dataset(
  directory: str | pathlib.Path,
  dataset: TokenDataset,
  header: LabelHeader,
  teacher: tuple[Any, Any],
  autoencoder: tuple[Any, Any],
  *,
  spec: AttributionSpec,
  batch_size: int,
  loss_chunk: int | None = None,
  progress: bool = True,
) -> LabelCache:
  """Labels every token of a dataset, or finishes a run that was stopped, and returns the cache.

  Args:
    directory: where the cache goes.
    dataset: the token stream.
    header: see `make_header`.
    teacher: (graph definition, parameters) of the teacher.
    autoencoder: (graph definition, parameters) of the autoencoder.
    spec: the attribution variant; must be the header's.
    batch_size: windows at a time.
    loss_chunk: tokens whose logits are held at a time; None holds all of them.
    progress: whether to show a progress bar.

  Raises:
    DataError: a partial cache in `directory` that was made with something else.
  """
  writer = LabelWriter(directory, header)
  source = WindowSource(dataset, header.window, reset_at_documents=header.reset_at_documents)
  step = make_label_step(teacher[0], autoencoder[0], layer=header.layer, spec=spec, loss_chunk=loss_chunk)
  bar = tqdm(total=len(writer.spans), initial=writer.windows_done, desc="labels", unit=" windows",
             disable=not progress)  # fmt: skip
  with bar:
    for spans in writer.remaining(batch_size):
      windows = [source.window(span.start) for span in spans]
      windows += [windows[-1]] * (batch_size - len(windows))  # one shape, one compilation
      batch = {name: np.stack([window[name] for window in windows]) for name in windows[0]}
      result = step(teacher[1], autoencoder[1], batch)
      writer.write(spans, *(np.asarray(field)[: len(spans)] for field in result))
      bar.update(len(spans))
  return writer.finish()


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
    active_latents: active latents k of the autoencoder.
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
  spec.check(active_latents)
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
