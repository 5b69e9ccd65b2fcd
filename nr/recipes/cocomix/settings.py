"""From the config to the specs that models, targets and students take."""

import hashlib
import json
from typing import Any

from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.concept_mixing_spec import MIXING, PREDICTING
from nr.models.sparse_autoencoder_spec import OPTIONS, SparseAutoencoderSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.attribution import AttributionSpec
from nr.recipes.cocomix.method import StudentLoss
from nr.recipes.sections import transformer_spec
from nr.training.model_files import ConceptMixingModelSpec

SOURCES = ("cache", "online")
"""Where labels come from: a cache made once, or the train step."""


def arm_names(config: Any) -> list[str]:
  """Returns the arms that are on: the baseline that the others are compared with, the main one, the rest by name."""
  students = config.students
  on = [name for name in sorted(students.arms) if students.arms[name].concept.mode]
  return sorted(on, key=lambda name: (name != students.baseline, name != students.main))


def mode_of(config: Any, arm: str) -> str:
  """Returns what an arm inserts."""
  return config.students.arms[arm].concept.mode


def student_spec(config: Any, arm: str, vocab_size: int) -> TransformerSpec | ConceptMixingModelSpec:
  """Returns the settings of an arm's model, a plain transformer in mode "none"."""
  section = config.students.arms[arm]
  transformer = transformer_spec(section.model, vocab_size, config.window.length)
  if mode_of(config, arm) == "none":
    return transformer
  concepts = {"num_concepts": config.sae.num_latents, **section.concept.to_dict()}
  if concepts["mode"] == "hidden":
    concepts["target_dim"] = config.teacher.model.model_dim
  return ConceptMixingModelSpec(transformer, ConceptMixingSpec.from_dict(concepts))


def student_loss(config: Any, arm: str) -> StudentLoss:
  """Returns what an arm is trained on besides the next token."""
  section = config.students.arms[arm]
  fields = ("loss_weight", "kd_weight", "kd_temperature", "regression", "regression_target")
  return StudentLoss(**{name: section[name] for name in fields})


def predicts_concepts(config: Any, arm: str) -> bool:
  """Whether an arm reads labels."""
  return mode_of(config, arm) in PREDICTING


def is_online(config: Any, arm: str) -> bool:
  """Whether an arm's labels are made in its train step."""
  return predicts_concepts(config, arm) and targets_of(config, label_kind(config, arm))["source"] == "online"


def learns_from_teacher(config: Any, arm: str) -> bool:
  """Whether an arm's loss reads the teacher's outputs."""
  return config.students.arms[arm].kd_weight > 0 or mode_of(config, arm) == "hidden"


def runs_teacher(config: Any, arm: str) -> bool:
  """Whether the teacher runs in an arm's train step."""
  return is_online(config, arm) or learns_from_teacher(config, arm)


def steered_arm(config: Any) -> str | None:
  """Returns the arm that is steered: `steer.arm`, or the first whose concepts reach the stream; None without one."""
  if config.steer.arm:
    return config.steer.arm
  return next((arm for arm in arm_names(config) if mode_of(config, arm) in MIXING), None)


def label_kind(config: Any, arm: str) -> str:
  """Returns the kind of labels that an arm reads: a name in `targets.variants`, or "" for `targets` as it is."""
  return config.students.arms[arm].labels


def label_kinds(config: Any) -> list[str]:
  """Returns all kinds of labels that the config knows."""
  return ["", *config.targets.variants]


def targets_of(config: Any, kind: str = "") -> dict[str, Any]:
  """Returns the settings of a kind of labels: section `targets`, and what the variant says otherwise."""
  fields = config.targets.to_dict()
  variants = fields.pop("variants")
  return {**fields, **variants[kind]} if kind else fields


def attribution_spec(config: Any, kind: str = "") -> AttributionSpec:
  """Returns which latents are labels of a kind."""
  fields = targets_of(config, kind)
  del fields["source"]  # where labels come from, not what they are
  return AttributionSpec.from_dict(fields)


def attribution_id(spec: AttributionSpec) -> str:
  """Returns the fingerprint of what labels are: 12 hexadecimal digits."""
  return hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def autoencoder_spec(config: Any) -> SparseAutoencoderSpec:
  """Returns the settings of the sparse autoencoder on the teacher's stream."""
  fields = (
    "arch",
    "normalisation",
    "num_latents",
    "k",
    "dead_tokens",
    "decoder_norm",
    "decoding",
    "top_k",
    "dtype",
    *OPTIONS,
  )
  return SparseAutoencoderSpec(
    model_dim=config.teacher.model.model_dim, **{name: config.sae[name] for name in fields}
  )


def loss_chunk(config: Any) -> int | None:
  """Returns how many tokens' logits are held at a time, None for all."""
  return config.compute.loss_chunk or None
