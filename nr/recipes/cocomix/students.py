"""Stage `students`: the next-token baseline and CoCoMix, from the same batches in the same order."""

from typing import Any

import jax

from nr.models import parameters
from nr.recipes.cocomix import labels as labels_stage
from nr.recipes.cocomix import language_model, settings
from nr.recipes.cocomix.method import cocomix_method
from nr.recipes.sections import training_config
from nr.recipes.stages import Artifact, StageContext
from nr.training import trees
from nr.training.method import Method
from nr.training.model_files import build_model, load_model
from nr.training.next_token import next_token_method

KINDS = ("ntp", "cocomix")


def run(context: StageContext) -> Artifact:
  """Trains every student of every seed; those that finished earlier are not trained again."""
  config = context.config
  concept_labels = labels_stage.open_labels(context, context.inputs["labels"], "train").labels
  runs: dict[str, dict[str, Any]] = {}
  for seed in config.students.seeds:
    for kind in KINDS:
      name = run_name(kind, seed)
      spec = settings.student_spec(config, kind, context.inputs["tokenizer"]["vocab_size"])
      training = training_config(config.students.train, config.seed + seed)
      artifact = language_model.train_language_model(
        context,
        context.directory / name,
        student_method(config, kind, spec),
        spec,
        training,
        concept_labels if kind == "cocomix" else None,
      )
      model = load_model(context.path(artifact["model"]))
      runs[name] = {
        **artifact,
        "kind": kind,
        "seed": seed,
        "activated_params": activated_parameters(spec),
        "forward_flops_per_token": language_model.forward_flops_per_token(model, config.window.length),
      }
  return {"runs": runs, "seeds": list(config.students.seeds)}


def run_name(kind: str, seed: int) -> str:
  """Returns the folder name of a student."""
  return f"{kind}_seed{seed}"


def student_method(config: Any, kind: str, spec: Any) -> Method:
  """Returns the method that trains a student of a kind."""
  if kind == "ntp":
    return next_token_method(spec, name="ntp", loss_chunk=settings.loss_chunk(config))
  mode = spec.concepts.mode
  weight = 0.0 if mode == "mix_only" else config.students.cocomix.loss_weight
  return cocomix_method(spec, loss_weight=weight, loss_chunk=settings.loss_chunk(config))


def activated_parameters(spec: Any) -> int:
  """Parameters that one token uses, by the paper's rule (appendix A).

  All of the transformer, and of the concept path (C + k) D: only k rows of the
  compression are read for a token.
  """
  transformer = getattr(spec, "transformer", spec)
  shapes = jax.eval_shape(lambda: parameters.split(build_model(transformer, jax.random.key(0)))[1])
  active = spec.concepts.num_parameters(transformer)[1] if spec is not transformer else 0
  return trees.count(shapes) + active
