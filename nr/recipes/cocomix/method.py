"""The two methods that are CoCoMix's own: the autoencoder's training, and that of a student or a baseline."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr import names
from nr.models import parameters
from nr.models.concept_mixing import ConceptMixingOutput
from nr.models.concept_paths import normalised
from nr.models.residual_tap import TapInputs, activations_at, hidden_from
from nr.models.sparse_autoencoder_spec import SparseAutoencoderSpec
from nr.models.sparse_autoencoder_start import initialise
from nr.models.transformer import Transformer, TransformerSpec
from nr.objectives import sparse_coding
from nr.objectives.concept_prediction import ConceptPredictionLoss, concept_prediction_loss
from nr.objectives.distillation import REGRESSIONS, distilled_next_token_loss, regression_loss
from nr.objectives.language_modeling import next_token_loss
from nr.objectives.sparse_coding_variants import sparse_coding_loss
from nr.objectives.weighted import LossOutput, Weighted
from nr.training.method import Method
from nr.training.model_files import ConceptMixingModelSpec, Model, axes_of, build_model, graphdef_of

TEACHER = "teacher"
"""Its name in `Method.frozen`."""
REGRESSION_TARGETS = ("normalised", "raw")


def sparse_autoencoder_method(spec: SparseAutoencoderSpec, pre_bias_D: jax.Array, mse_scale: float) -> Method:
  """Returns the method that trains a sparse autoencoder of any architecture (see `sparse_coding_variants`).

  Args:
    spec: settings of the autoencoder.
    pre_bias_D: initial pre-bias, the geometric median of normalised activations.
    mse_scale: factor of the squared error, fixed for the whole run.

  Returns:
    A `Method` whose batches hold `activations` [B, D] and `weights` [B]. Trained parameters are used through
    `nr.models.sparse_autoencoder_start.inference_form`.
  """
  graphdef = graphdef_of(spec)

  def loss(params: Any, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> LossOutput:
    del frozen, key
    autoencoder = parameters.merge(graphdef, params)
    return sparse_coding_loss(autoencoder, extra, batch["activations"], batch["weights"])

  return Method(
    name="sparse_autoencoder",
    init=lambda key: initialise(spec, pre_bias_D, key),
    loss=loss,
    axes=axes_of(spec),
    init_extra=lambda params: sparse_coding.init_extra(spec, mse_scale),
    extra_axes=sparse_coding.extra_axes(spec),
    update_extra=functools.partial(sparse_coding.update_extra, threshold_rate=spec.threshold_rate),
    decay=(),
    constrain=sparse_coding.constrained(spec),
  )


@dataclasses.dataclass(frozen=True)
class StudentLoss:
  """What a student is trained on besides the next token.

  Attributes:
    loss_weight: lambda of Eq. 4, the weight of the concept loss; in mode "hidden" of the regression
      (nothing is published of that weight). Modes with neither do not read it.
    kd_weight: of KL(teacher || student); 0: no distillation.
    kd_temperature: of both distributions (the paper names none).
    regression: distance to the teacher's tapped state in mode "hidden": "l1", "l2" or "cosine".
    regression_target: that state with mean 0 and deviation 1 ("normalised", ours: as the autoencoder
      reads it), or as it is ("raw").
  """

  loss_weight: float = 0.1
  kd_weight: float = 0.0
  kd_temperature: float = 1.0
  regression: str = "l2"
  regression_target: str = "normalised"

  def __post_init__(self):
    for field in ("loss_weight", "kd_weight"):
      if getattr(self, field) < 0:
        raise ValueError(f"{field}={getattr(self, field)}: give 0 or more")
    if self.kd_temperature <= 0:
      raise ValueError(f"kd_temperature={self.kd_temperature}: give a positive number")
    for field, allowed in (("regression", REGRESSIONS), ("regression_target", REGRESSION_TARGETS)):
      if getattr(self, field) not in allowed:
        raise ValueError(names.unknown(field, getattr(self, field), allowed))


def cocomix_method(
  spec: ConceptMixingModelSpec, *, loss_weight: float, loss_chunk: int | None = None
) -> Method:
  """Returns the method that trains a CoCoMix student (arXiv 2502.08524 Eq. 4); see `student_method`."""
  return student_method(spec, StudentLoss(loss_weight=loss_weight), loss_chunk=loss_chunk)


def student_method(
  spec: TransformerSpec | ConceptMixingModelSpec,
  settings: StudentLoss,
  *,
  name: str = "cocomix",
  loss_chunk: int | None = None,
  teacher: Model | None = None,
  tap_layer: int | None = None,
) -> Method:
  """Returns the method that trains CoCoMix or one of its baselines.

      L = sum over t of [ -log p(x_{t+1}) + lambda * L_concept(t) + kd_weight * KL_t ]

  divided by the number of scored tokens; a position without labels has no second term (Eq. 4). In mode
  "hidden" the regression stands in the place of L_concept, in modes without either there is no second
  term.

  Args:
    spec: settings of the student.
    settings: weights and kinds of the terms.
    name: of the method, in logs and errors.
    loss_chunk: tokens whose next-token logits are held at a time; None: all.
    teacher: frozen, run in the train step; needed for distillation and for mode "hidden".
    tap_layer: its block (from 0) whose output is regressed; needed for mode "hidden".

  Returns:
    A `Method` whose batches hold what next-token prediction needs and, where concepts are predicted,
    `labels` [B, L, A].

  Raises:
    ValueError: a teacher that is missing, or whose sizes are not those that the student needs.
  """
  mode = spec.concepts.mode if isinstance(spec, ConceptMixingModelSpec) else "none"
  is_distilling, is_regressing = settings.kd_weight > 0, mode == "hidden"
  reads_teacher = is_distilling or is_regressing
  if reads_teacher:
    _check_teacher(spec, teacher, tap_layer, is_distilling, is_regressing)
  if mode == "mix_only":
    settings = dataclasses.replace(settings, loss_weight=0.0)
  graphdef = graphdef_of(spec)

  def loss(params: Any, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> LossOutput:
    del extra
    model = parameters.merge(graphdef, params)
    output, states = _run(model, batch, key if transformer_of(spec).dropout else None), None
    if reads_teacher:
      module = parameters.merge(teacher.graphdef, jax.lax.stop_gradient(frozen[TEACHER]))
      states = _read_teacher(module, batch, tap_layer if is_regressing else None, is_distilling)
    return _student_loss(output, model.unembedding_VD, batch, states, settings, loss_chunk)

  return Method(
    name=name,
    init=lambda key: parameters.split(build_model(spec, key))[1],
    loss=loss,
    axes=axes_of(spec),
    frozen={TEACHER: teacher.params} if reads_teacher else {},
    frozen_axes={TEACHER: axes_of(teacher.spec)} if reads_teacher else None,
  )


class TeacherStates(NamedTuple):
  """What a student learns from a teacher that runs in its train step.

  Attributes:
    tapped_BLE: its stream behind the tapped block, or None.
    final_BLE: its final-normed hidden states, or None.
    unembedding_VE: its output head.
  """

  tapped_BLE: jax.Array | None
  final_BLE: jax.Array | None
  unembedding_VE: jax.Array


def _student_loss(
  output: ConceptMixingOutput,
  unembedding_VD: jax.Array,
  batch: Any,
  states: TeacherStates | None,
  settings: StudentLoss,
  loss_chunk: int | None,
) -> LossOutput:
  """Adds up the terms that a batch, a student and what was read of its teacher have."""
  weights_BL, targets_BL, metrics = batch["weights"], batch["targets"], {}
  extra = jnp.zeros(())
  if states is not None and states.final_BLE is not None:
    next_token, divergence = distilled_next_token_loss(
      output.hidden_BLD,
      unembedding_VD,
      states.final_BLE,
      states.unembedding_VE,
      targets_BL,
      weights_BL,
      temperature=settings.kd_temperature,
      chunk_size=loss_chunk,
    )
    metrics["distillation_loss"] = divergence
    extra = extra + settings.kd_weight * divergence.total
  else:
    next_token = next_token_loss(
      output.hidden_BLD, unembedding_VD, targets_BL, weights_BL, chunk_size=loss_chunk
    )
  metrics["next_token_loss"] = next_token
  if output.concepts is not None:
    concept = score_concepts(output, batch)
    extra = extra + settings.loss_weight * concept.loss.total
    metrics.update(concept_loss=concept.loss, concept_excess=concept.excess)
    metrics.update(label_recall=concept.recall, label_recall_first=concept.recall_first)
  if output.regressed_BLE is not None:
    state_BLE = states.tapped_BLE
    if settings.regression_target == "normalised":
      state_BLE = normalised(state_BLE, "reference")
    distance = regression_loss(output.regressed_BLE, state_BLE, weights_BL, settings.regression)
    extra = extra + settings.loss_weight * distance.total
    metrics["regression_loss"] = distance
  return LossOutput(Weighted(next_token.total + extra, next_token.weight), metrics)


def transformer_of(spec: TransformerSpec | ConceptMixingModelSpec) -> TransformerSpec:
  """Returns the settings of a student's transformer."""
  return getattr(spec, "transformer", spec)


def _check_teacher(
  spec: Any, teacher: Model | None, tap_layer: int | None, is_distilling: bool, is_regressing: bool
) -> None:
  """Refuses a teacher that is missing, or that the student cannot learn from."""
  what = "kd_weight" if is_distilling else "mode 'hidden'"
  if teacher is None:
    raise ValueError(f"{what} needs the teacher in the train step; give one")
  student, given = transformer_of(spec), teacher.spec
  if is_distilling and given.vocab_size != student.vocab_size:
    raise ValueError(
      f"kd_weight: the teacher has {given.vocab_size} token ids and the student {student.vocab_size}; distillation "
      "needs the same ones"
    )
  if is_regressing and tap_layer is None:
    raise ValueError("tap_layer: mode 'hidden' regresses the state behind a block of the teacher; name it")
  if is_regressing and given.model_dim != spec.concepts.target_dim:
    raise ValueError(
      f"target_dim={spec.concepts.target_dim} is not the width of the teacher, {given.model_dim}; set it to that"
    )


def _run(model: Any, batch: Any, key: jax.Array | None = None) -> ConceptMixingOutput:
  """Runs a student of either kind on a batch."""
  given = dict(segment_ids_BL=batch.get("segment_ids"), positions_BL=batch.get("positions"), key=key)
  if isinstance(model, Transformer):
    return ConceptMixingOutput(model.hidden(batch["tokens"], **given), None)
  labels_BLA = batch["labels"] if model.concept_spec.is_predicting else None
  return model.forward(batch["tokens"], labels_BLA=labels_BLA, **given)


def _read_teacher(teacher: Transformer, batch: Any, layer: int | None, needs_final: bool) -> TeacherStates:
  """Runs the frozen teacher once: up to block `layer` where one is named, to the top where that is needed."""
  inputs = TapInputs.of(batch)
  if layer is None:
    settings = dict(segment_ids_BL=inputs.segment_ids_BL, positions_BL=inputs.positions_BL)
    return TeacherStates(None, teacher.hidden(inputs.tokens_BL, **settings), teacher.unembedding_VD)
  tapped_BLE = activations_at(teacher, inputs, layer)
  final_BLE = hidden_from(teacher, tapped_BLE, inputs, layer) if needs_final else None
  return TeacherStates(tapped_BLE, final_BLE, teacher.unembedding_VD)


def score_concepts(output: ConceptMixingOutput, batch: Any) -> ConceptPredictionLoss:
  """Returns how well a model's concepts match the labels of its batch."""
  concepts = output.concepts
  return concept_prediction_loss(
    concepts.log_normalizer_BL,
    concepts.label_logits_BLA,
    batch["labels"],
    concepts.indices_BLK,
    weights_BLA=batch.get("label_weights"),
  )


def run_on_labels(
  model: Any, batch: Any, key: jax.Array | None = None
) -> tuple[jax.Array, ConceptPredictionLoss]:
  """Runs a model that predicts concepts on a labelled batch.

  Returns:
    Final-normed readout rows [B, L, D], and how well its concepts match the labels.
  """
  output = _run(model, batch, key)
  return output.hidden_BLD, score_concepts(output, batch)
