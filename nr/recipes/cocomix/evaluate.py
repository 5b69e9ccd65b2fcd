"""Stage `evaluate`: both students on the same validation tokens, with intervals."""

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
from nr.recipes.cocomix import language_model
from nr.recipes.cocomix.method import run_on_labels
from nr.recipes.cocomix.students import KINDS, run_name
from nr.recipes.stages import Artifact, StageContext
from nr.training.model_files import load_model


def run(context: StageContext) -> Artifact:
  """Scores every student by document and compares the two kinds."""
  config, students = context.config, context.inputs["students"]
  scores: dict[str, DocumentScores] = {}
  results: dict[str, dict[str, Any]] = {}
  for name, trained in students["runs"].items():
    scores[name] = language_model.score_split(context, trained, "validation", config.evaluate.batch_size)
    results[name] = summary(scores[name], config.seed)
    if trained["kind"] == "cocomix":
      results[name].update(concept_metrics(context, trained))
  artifact: Artifact = {"runs": results, "differences": {}}
  for seed in students["seeds"]:
    pair = (scores[run_name("cocomix", seed)], scores[run_name("ntp", seed)])
    difference = loss_difference_interval(*pair, seed=config.seed)
    artifact["differences"][str(seed)] = difference._asdict()
  losses = {
    kind: np.array([results[run_name(kind, seed)]["val_loss"] for seed in students["seeds"]])
    for kind in KINDS
  }
  over_seeds = paired_difference(losses["cocomix"], losses["ntp"])
  artifact["over_seeds"] = over_seeds._asdict()
  np.savez(
    context.directory / "document_scores.npz",
    **{
      f"{name}_{field}": value for name, score in scores.items() for field, value in score._asdict().items()
    },
  )
  return artifact


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
  """Returns concept loss (nats) and label recall of a CoCoMix student on the validation split."""
  model = load_model(context.path(trained["model"]))
  labels = labels_stage.open_labels(context, context.inputs["labels"], "validation").labels
  source = language_model.window_source(context, "validation", labels, tail="pad")
  batches = ordered_batches(source, context.config.evaluate.batch_size)
  total = None
  for batch in tqdm(batches, total=len(batches), desc="concepts of validation", unit="batch", leave=False):
    measured = measure_concepts(model.graphdef, model.params, batch)
    total = measured if total is None else [add(first, second) for first, second in zip(total, measured)]
  loss, recall, recall_first = (float(value.mean()) for value in total)
  return {"concept_loss": loss, "label_recall": recall, "label_recall_first": recall_first}


@functools.partial(jax.jit, static_argnums=0)
def measure_concepts(graphdef: Any, params: Any, batch: dict[str, Any]) -> list[Weighted]:
  """Returns weighted sums of concept loss, recall among the top k, recall among the first labels."""
  return list(run_on_labels(parameters.merge(graphdef, params), batch)[1])
