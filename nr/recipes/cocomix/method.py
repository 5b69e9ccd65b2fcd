"""The two methods that are CoCoMix's own: the autoencoder's training and the student's."""

from typing import Any

import jax

from nr.models import parameters
from nr.models.sparse_autoencoder import SparseAutoencoderSpec, initialise
from nr.objectives import sparse_coding
from nr.objectives.concept_prediction import ConceptPredictionLoss, concept_prediction_loss
from nr.objectives.language_modeling import next_token_loss
from nr.objectives.weighted import LossOutput, Weighted
from nr.training.method import Method
from nr.training.model_files import ConceptMixingModelSpec, axes_of, build_model, graphdef_of


def sparse_autoencoder_method(spec: SparseAutoencoderSpec, pre_bias_D: jax.Array, mse_scale: float) -> Method:
  """Returns the method that trains a TopK sparse autoencoder (arXiv 2406.04093).

  Args:
    spec: settings of the autoencoder.
    pre_bias_D: initial pre-bias, the geometric median of normalised activations.
    mse_scale: factor of the squared error, fixed for the whole run.

  Returns:
    A `Method` whose batches hold `activations` [B, D] and `weights` [B].
  """
  graphdef = graphdef_of(spec)

  def loss(params: Any, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> LossOutput:
    del frozen, key
    autoencoder = parameters.merge(graphdef, params)
    return sparse_coding.topk_loss(autoencoder, extra, batch["activations"], batch["weights"])

  return Method(
    name="sparse_autoencoder",
    init=lambda key: initialise(spec, pre_bias_D, key),
    loss=loss,
    axes=axes_of(spec),
    init_extra=lambda params: sparse_coding.init_extra(spec.num_latents, mse_scale),
    extra_axes=sparse_coding.EXTRA_AXES,
    update_extra=sparse_coding.update_extra,
    decay=(),
    constrain=sparse_coding.unit_norm_decoder,
  )


def cocomix_method(
  spec: ConceptMixingModelSpec, *, loss_weight: float, loss_chunk: int | None = None
) -> Method:
  """Returns the method that trains a CoCoMix student (arXiv 2502.08524 Eq. 4).

      L = sum over t of [ -log p(x_{t+1}) + lambda * L_concept(t) ]

  divided by the number of scored tokens; a position without labels has no second term.

  Args:
    spec: settings of the student.
    loss_weight: lambda; 0 leaves the concept head to the next-token loss alone.
    loss_chunk: tokens whose next-token logits are held at a time; None: all.

  Returns:
    A `Method` whose batches hold what next-token prediction needs, and `labels` [B, L, A].
  """
  graphdef = graphdef_of(spec)

  def loss(params: Any, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> LossOutput:
    del frozen, extra
    model = parameters.merge(graphdef, params)
    hidden_BLD, concept = run_on_labels(model, batch, key if spec.transformer.dropout else None)
    next_token = next_token_loss(
      hidden_BLD, model.unembedding_VD, batch["targets"], batch["weights"], chunk_size=loss_chunk
    )
    total = Weighted(next_token.total + loss_weight * concept.loss.total, next_token.weight)
    metrics = {
      "next_token_loss": next_token,
      "concept_loss": concept.loss,
      "label_recall": concept.recall,
      "label_recall_first": concept.recall_first,
    }
    return LossOutput(total, metrics)

  return Method(
    name="cocomix",
    init=lambda key: parameters.split(build_model(spec, key))[1],
    loss=loss,
    axes=axes_of(spec),
  )


def run_on_labels(
  model: Any, batch: Any, key: jax.Array | None = None
) -> tuple[jax.Array, ConceptPredictionLoss]:
  """Runs a CoCoMix model on a labelled batch.

  Returns:
    Final-normed readout rows [B, L, D], and how well its concepts match the labels.
  """
  output = model.forward(
    batch["tokens"],
    labels_BLA=batch["labels"],
    segment_ids_BL=batch.get("segment_ids"),
    positions_BL=batch.get("positions"),
    key=key,
  )
  concepts = output.concepts
  return output.hidden_BLD, concept_prediction_loss(
    concepts.log_normalizer_BL, concepts.label_logits_BLA, batch["labels"], concepts.indices_BLK
  )
