"""Stage `sae`: a sparse autoencoder on the teacher's activations; its latents are the concepts."""

from typing import Any

import jax
import numpy as np

from nr.data.windows import ordered_batches
from nr.evaluation import sae_metrics
from nr.models.sparse_autoencoder import SparseAutoencoderSpec, initial_pre_bias, normalise
from nr.objectives.sparse_coding import error_scale
from nr.recipes.activations import ActivationBatches, make_tap
from nr.recipes.cocomix import language_model, settings
from nr.recipes.cocomix.method import sparse_autoencoder_method
from nr.recipes.sections import training_config
from nr.recipes.stages import Artifact, StageContext
from nr.training.loop import train
from nr.training.method import Method
from nr.training.model_files import Model, load_model, save_model

REPORTED = ("fvu", "l0", "delta_ce", "loss_recovered")


def run(context: StageContext) -> Artifact:
  """Trains the autoencoder by the common loop and measures it on the validation split."""
  config = context.config
  tokenizer = context.inputs["tokenizer"]["fingerprint"]
  teacher = load_model(context.path(context.inputs["teacher"]["model"]), tokenizer)
  spec = settings.autoencoder_spec(config)
  training = training_config(config.sae.train, config.seed)
  data = activation_batches(context, teacher, training.batch_size, training.seed)
  method = make_method(spec, data.sample(config.sae.sample_tokens))
  metadata = {"tokenizer": tokenizer, "spec": spec.to_dict(), "teacher": teacher.fingerprint}
  result = train(training, method, data, (), context.directory, metadata=metadata)

  params, extra = result.state.params, result.state.extra
  directory = context.directory / "model"
  fingerprint = save_model(directory, spec, params, tokenizer)
  metrics, density = evaluate(context, teacher, load_model(directory, tokenizer))
  np.save(context.directory / "log10_density.npy", density, allow_pickle=False)
  return {
    "model": context.relative(directory),
    "fingerprint": fingerprint,
    "directory": context.relative(context.directory),
    "density": context.relative(context.directory / "log10_density.npy"),
    "train_tokens": training.steps * training.batch_size,
    "tokens_per_second": result.summary.get("tokens_per_second"),
    "input_wait_seconds": result.summary.get("input_wait_seconds"),
    "dead_fraction": sae_metrics.dead_fraction(np.asarray(extra["tokens_since_fired"]), spec.dead_tokens),
    **{name: metrics[name] for name in REPORTED},
    "all_metrics": metrics,
  }


def activation_batches(
  context: StageContext, teacher: Model, batch_size: int, seed: int
) -> ActivationBatches:
  """Returns the shuffled stream of the teacher's activations on the training split."""
  config = context.config
  return ActivationBatches(
    language_model.window_source(context, "train"),
    make_tap(teacher.graphdef, teacher.params, config.teacher.tap_layer),
    batch_size=batch_size,
    seed=seed,
    chunk_batches=config.sae.chunk_batches,
    windows_per_call=config.sae.windows_per_call,
    skip_first=config.sae.skip_first,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def make_method(spec: SparseAutoencoderSpec, sample_ND: np.ndarray) -> Method:
  """Returns the method, with what is fixed once by a sample of raw activations."""
  scale = float(error_scale(normalise(sample_ND, spec.epsilon).values_TD))
  return sparse_autoencoder_method(spec, initial_pre_bias(spec, sample_ND), scale)


def evaluate(context: StageContext, teacher: Model, autoencoder: Model) -> tuple[dict[str, Any], np.ndarray]:
  """Returns the metrics on the validation split, and log10 of each latent's firing frequency."""
  config = context.config
  source = language_model.window_source(context, "validation", tail="pad")
  metrics, fired_C = sae_metrics.evaluate_transformer(
    ordered_batches(source, config.sae.windows_per_call),
    (teacher.graphdef, teacher.params),
    (autoencoder.graphdef, autoencoder.params),
    layer=config.teacher.tap_layer,
  )
  with np.errstate(divide="ignore"):  # a latent that never fired has frequency 0: minus infinity
    return metrics, np.log10(fired_C / metrics["evaluation_tokens"])
