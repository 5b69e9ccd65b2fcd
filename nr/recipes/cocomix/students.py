"""Stage `students`: CoCoMix and its baselines, from the same batches in the same order."""

from typing import Any

import jax

from nr.models import parameters
from nr.recipes.cocomix import labels as labels_stage
from nr.recipes.cocomix import language_model, settings
from nr.recipes.cocomix.method import student_method
from nr.recipes.cocomix.online_labels import with_online_labels
from nr.recipes.sections import training_config
from nr.recipes.stages import Artifact, StageContext
from nr.training import trees
from nr.training.method import Method
from nr.training.model_files import Model, build_model, load_model
from nr.training.next_token import next_token_method


def run(context: StageContext) -> Artifact:
  """Trains every arm of every seed; those that finished earlier are not trained again."""
  config, arms = context.config, settings.arm_names(context.config)
  teacher, autoencoder = open_teachers(context)
  runs: dict[str, dict[str, Any]] = {}
  for seed in config.students.seeds:
    for arm in arms:
      name = run_name(arm, seed)
      spec = settings.student_spec(config, arm, context.inputs["tokenizer"]["vocab_size"])
      labels = None
      if settings.predicts_concepts(config, arm) and not settings.is_online(config, arm):
        kind = settings.label_kind(config, arm)
        labels = labels_stage.open_labels(context, context.inputs["labels"], "train", kind)
      artifact = language_model.train_language_model(
        context,
        context.directory / name,
        arm_method(config, arm, spec, teacher, autoencoder),
        spec,
        arm_training(config, arm, seed),
        labels,
      )
      runs[name] = {
        **artifact,
        "arm": arm,
        "labels": settings.label_kind(config, arm),
        "seed": seed,
        "activated_params": activated_parameters(spec),
        "forward_flops_per_token": language_model.forward_flops_per_token(spec, config.window.length),
      }
  return {
    "runs": runs,
    "seeds": list(config.students.seeds),
    "arms": arms,
    "predicting": [arm for arm in arms if settings.predicts_concepts(config, arm)],
  }


def run_name(arm: str, seed: int) -> str:
  """Returns the folder name of a student."""
  return f"{arm}_seed{seed}"


def open_teachers(context: StageContext) -> tuple[Model | None, Model | None]:
  """Opens the teacher and the autoencoder where an arm's train step runs them."""
  config, fingerprint = context.config, context.inputs["tokenizer"]["fingerprint"]

  def opened(name: str, is_needed: Any) -> Model | None:
    if not any(is_needed(config, arm) for arm in settings.arm_names(config)):
      return None
    return load_model(context.path(context.inputs[name]["model"]), fingerprint)

  return opened("teacher", settings.runs_teacher), opened("sae", settings.is_online)


def arm_method(config: Any, arm: str, spec: Any, teacher: Model | None, autoencoder: Model | None) -> Method:
  """Returns the method that trains an arm.

  Args:
    config: the whole config.
    arm: its name.
    spec: settings of its model.
    teacher: read by arms that distil or regress it, or make labels with it; None where there is none.
    autoencoder: read by arms that make labels with it.
  """
  loss_chunk = settings.loss_chunk(config)
  learns = settings.learns_from_teacher(config, arm)
  if settings.mode_of(config, arm) == "none" and not learns:
    return next_token_method(spec, name=arm, loss_chunk=loss_chunk)
  method = student_method(
    spec,
    settings.student_loss(config, arm),
    name=arm,
    loss_chunk=loss_chunk,
    teacher=teacher if learns else None,
    tap_layer=config.teacher.tap_layer,
  )
  if not settings.is_online(config, arm):
    return method
  labelling = labels_stage.labelling(
    config, settings.attribution_spec(config, settings.label_kind(config, arm))
  )
  return with_online_labels(method, teacher, autoencoder, labelling)


def arm_training(config: Any, arm: str, seed: int) -> Any:
  """Returns the training section of an arm, with its own number of steps where it has one."""
  training = training_config(config.students.train, config.seed + seed)
  training.steps = config.students.arms[arm].steps or training.steps
  return training


def activated_parameters(spec: Any) -> int:
  """Parameters that one token uses, by the paper's rule (appendix A).

  All of the transformer, and of the concept path (C + k) D: only k rows of the
  compression are read for a token.
  """
  transformer = getattr(spec, "transformer", spec)
  shapes = jax.eval_shape(lambda: parameters.split(build_model(transformer, jax.random.key(0)))[1])
  active = spec.concepts.num_parameters(transformer)[1] if spec is not transformer else 0
  return trees.count(shapes) + active
