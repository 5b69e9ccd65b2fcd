"""Stage `evaluate`: all students on the same validation tokens, each arm against the baseline, with intervals."""

import functools
import math
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nr.data.windows import ordered_batches
from nr.evaluation.perplexity import DocumentScores, loss_difference_interval
from nr.evaluation.statistics import paired_difference
from nr.models import parameters
from nr.objectives.weighted import Weighted, add
from nr.recipes.cocomix import labels as labels_stage
from nr.recipes.cocomix import language_model, text_measures
from nr.recipes.cocomix.method import run_on_labels
from nr.recipes.cocomix.students import run_name
from nr.recipes.stages import Artifact, StageContext
from nr.training.model_files import load_model


def run(context: StageContext) -> Artifact:
  """Scores every student by document and compares every arm with the baseline."""
  config, students = context.config, context.inputs["students"]
  scores: dict[str, DocumentScores] = {}
  results: dict[str, dict[str, Any]] = {}
  for name, trained in students["runs"].items():
    scores[name] = language_model.score_split(context, trained, "validation", config.evaluate.batch_size)
    results[name] = {**summary(scores[name], config.seed), **text_measures.measure(context, trained)}
    if trained["arm"] in students["predicting"]:
      results[name].update(concept_metrics(context, trained))
  first, *others = students["arms"]
  artifact: Artifact = {"runs": results, "comparisons": {}}
  for arm in others:
    artifact["comparisons"][arm] = compare(arm, first, students["seeds"], scores, results, config.seed)
  np.savez(
    context.directory / "document_scores.npz",
    **{
      f"{name}_{field}": value for name, score in scores.items() for field, value in score._asdict().items()
    },
  )
  return artifact


def compare(
  arm: str,
  first: str,
  seeds: list[int],
  scores: dict[str, DocumentScores],
  results: dict[str, dict[str, Any]],
  seed: int,
) -> dict[str, Any]:
  """Returns an arm's loss minus that of the baseline, nats a token: by seed over documents, and over seeds."""
  differences = {}
  for each in seeds:
    pair = (scores[run_name(arm, each)], scores[run_name(first, each)])
    differences[str(each)] = loss_difference_interval(*pair, seed=seed)._asdict()
  losses = [np.array([results[run_name(name, each)]["val_loss"] for each in seeds]) for name in (arm, first)]
  return {"differences": differences, "over_seeds": paired_difference(*losses)._asdict()}


def summary(scores: DocumentScores, seed: int) -> dict[str, Any]:
  """Returns loss (nats a token), perplexity and bits a byte; 95 % intervals by document bootstrap."""
  loss = scores.loss_interval(seed)
  return {
    "val_loss": loss.estimate,
    "val_ppl": scores.perplexity(),
    "bits_per_byte": scores.bits_per_byte(),
    "ci95": [loss.low, loss.high],
    "ppl_ci95": [math.exp(loss.low), math.exp(loss.high)],
    "scored_tokens": int(scores.tokens.sum()),
    "documents": int((scores.tokens > 0).sum()),
  }


def concept_metrics(context: StageContext, trained: Artifact) -> dict[str, float]:
  """Returns concept loss, its excess (nats) and recalls of a student on its own labels of the validation split."""
  model = load_model(context.path(trained["model"]))
  labels = labels_stage.open_labels(context, context.inputs["labels"], "validation", trained["labels"])
  source = language_model.window_source(context, "validation", labels, tail="pad")
  batches = ordered_batches(source, context.config.evaluate.batch_size)
  total = None
  for batch in tqdm(batches, total=len(batches), desc="concepts of validation", unit="batch", leave=False):
    measured = measure_concepts(model.graphdef, model.params, batch)
    total = measured if total is None else [add(first, second) for first, second in zip(total, measured)]
  names = ("concept_loss", "concept_excess", "label_recall", "label_recall_first")
  return {name: float(value.mean()) for name, value in zip(names, total, strict=True)}


@functools.partial(jax.jit, static_argnums=0)
def measure_concepts(graphdef: Any, params: Any, batch: dict[str, Any]) -> list[Weighted]:
  """Returns the weighted sums of `ConceptPredictionLoss`."""
  return list(run_on_labels(parameters.merge(graphdef, params), batch)[1])
