"""What teacher and students share: training by the one loop, and scoring by document."""

import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from nr.data.concept_labels import LabelCache
from nr.data.windows import WindowSource, ordered_batches, shuffled_batches
from nr.evaluation.flops import count_flops
from nr.evaluation.perplexity import DocumentScores, score_documents
from nr.models import parameters
from nr.objectives.language_modeling import token_nll
from nr.objectives.weighted import Weighted, add
from nr.recipes.cocomix import corpus, settings
from nr.recipes.stages import Artifact, StageContext
from nr.training import trees
from nr.training.loop import train
from nr.training.method import Evaluator, Method
from nr.training.model_files import build_model, graphdef_of, load_model, save_model

VALIDATION_BATCHES = 4
"""Batches of the validation split that are measured while training; the final score uses all of it."""


def window_source(
  context: StageContext, split: str, labels: LabelCache | None = None, **options: Any
) -> WindowSource:
  """Returns the windows of a split as the config's `window` section asks for them, with their labels."""
  window = context.config.window
  dataset = corpus.open_split(context, split)
  if labels is not None:
    options.update(labels=labels.labels, label_weights=labels.weights)
  return WindowSource(dataset, window.length, reset_at_documents=window.reset_at_documents, **options)


def train_language_model(
  context: StageContext,
  directory: pathlib.Path,
  method: Method,
  spec: Any,
  training: Any,
  labels: LabelCache | None = None,
) -> Artifact:
  """Trains a model on the training split and saves it.

  The order of the batches depends on the seed alone, so two methods with the
  same seed and batch size see the same batches in the same order.

  Args:
    context: the stage's context; needs the artifact of stage `tokenizer`.
    directory: where checkpoints, metrics and the final model go.
    method: what is trained.
    spec: settings of the model, saved with it.
    training: training section of the config.
    labels: concept labels of the training split, if the method reads them.

  Returns:
    Where the model is, its hash, sizes, counted FLOPs and the loop's summary.
  """
  source = window_source(context, "train", labels)
  data = shuffled_batches(
    source,
    training.batch_size,
    seed=training.seed,
    shift=context.config.window.shift,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    prefetch=2,
  )
  flops = training_flops_per_token(method, source, training.batch_size)
  training.flops_per_token = flops
  tokenizer = context.inputs["tokenizer"]["fingerprint"]
  metadata = {"tokenizer": tokenizer, "spec": spec.to_dict()}
  evaluators = [validation_evaluator(context, spec)]
  result = train(training, method, data, evaluators, directory, metadata=metadata)
  fingerprint = save_model(directory / "model", spec, result.state.params, tokenizer)
  scored = source.length - 1
  return {
    "model": context.relative(directory / "model"),
    "fingerprint": fingerprint,
    "directory": context.relative(directory),
    "params": trees.count(result.state.params),
    "train_tokens": training.steps * training.batch_size * source.length,
    "scored_train_tokens": training.steps * training.batch_size * scored,
    "train_flops_per_token": flops,
    "tokens_per_second": result.summary.get("tokens_per_second"),
    "input_wait_seconds": result.summary.get("input_wait_seconds"),
    "summary": result.summary,
  }


def validation_evaluator(context: StageContext, spec: Any) -> Evaluator:
  """Returns the measurement taken while training: loss on the first few validation batches, nats a token."""
  config = context.config
  source = window_source(context, "validation", tail="pad")
  batches = list(itertools.islice(ordered_batches(source, config.evaluate.batch_size), VALIDATION_BATCHES))
  token_losses = make_token_losses(graphdef_of(spec), settings.loss_chunk(config))
  # Summed in the program: of several processes, none holds all losses.
  sum_of = jax.jit(lambda params, batch: Weighted.of(token_losses(params, batch), batch["weights"]))

  def run(params: Any, frozen: Any, extra: Any) -> dict[str, float]:
    del frozen, extra
    sums = [sum_of(params, batch) for batch in batches]
    return {"loss": float(functools.reduce(add, sums).mean())}

  return Evaluator("validation", run)


def training_flops_per_token(method: Method, source: WindowSource, batch_size: int) -> float:
  """Counts the matrix-product FLOPs of forward and backward from the program, per token read."""
  element = source[0]
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, *value.shape), value.dtype) for name, value in element.items()
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(method.init, key)
  extra = jax.eval_shape(method.init_extra, params)

  def loss(params: Any, frozen: Any, extra: Any, batch: Any, key: Any) -> Any:
    return jax.grad(lambda params: method.loss(params, frozen, extra, batch, key).loss.total)(params)

  return count_flops(loss, params, method.frozen, extra, batch, key) / (batch_size * source.length)


def forward_flops_per_token(spec: Any, length: int) -> float:
  """Counts the FLOPs of one forward pass of a model with logits at every position, per token."""
  graphdef, params = parameters.split(nnx.eval_shape(lambda: build_model(spec, jax.random.key(0))))
  tokens = jax.ShapeDtypeStruct((1, length), np.int32)
  return count_flops(lambda params, tokens: parameters.merge(graphdef, params)(tokens), params, tokens) / length


def make_token_losses(graphdef: Any, loss_chunk: int | None = None) -> Callable[[Any, Any], jax.Array]:
  """Returns the jitted function from (params, batch) to the nats [B, L] of the batch's targets."""

  @jax.jit
  def token_losses(params: Any, batch: Any) -> jax.Array:
    module = parameters.merge(graphdef, params)
    hidden_BLD = module.hidden(
      batch["tokens"], segment_ids_BL=batch.get("segment_ids"), positions_BL=batch.get("positions")
    )
    return token_nll(hidden_BLD, module.unembedding_VD, batch["targets"], chunk_size=loss_chunk)

  return token_losses


def score_split(context: StageContext, artifact: Artifact, split: str, batch_size: int) -> DocumentScores:
  """Scores every token of a split but the first with a saved model, by document.

  Windows overlap by one token, so that the first token of a window is a target
  of the window before it.
  """
  tokenizer = context.inputs["tokenizer"]["fingerprint"]
  model = load_model(context.path(artifact["model"]), tokenizer)
  source = window_source(context, split, tail="pad", overlap=1, with_documents=True)
  batches = ordered_batches(source, batch_size)
  token_losses = make_token_losses(model.graphdef, settings.loss_chunk(context.config))
  document_bytes = source.dataset.document_bytes
  return score_documents(
    lambda batch: token_losses(model.params, batch),
    batches,
    document_bytes,
    total=len(batches),
    description=f"scoring {split}",
  )
