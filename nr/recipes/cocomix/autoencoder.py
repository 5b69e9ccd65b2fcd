"""Stage `sae`: a sparse autoencoder on the teacher's activations; its latents are the concepts.

It is trained here, or `sae.checkpoint` names one: a file of OpenAI, or a folder of sparsify or SAELens.
"""

import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from nr import names
from nr.data.activation_cache import DTYPES, ActivationCache, ActivationHeader
from nr.data.windows import ordered_batches
from nr.evaluation import sae_metrics
from nr.interchange.sae import ForeignAutoencoder, open_autoencoder, tap_layer
from nr.models.sparse_autoencoder import SparseAutoencoderSpec, normalise
from nr.models.sparse_autoencoder_start import inference_form, initial_pre_bias
from nr.objectives.sparse_coding import error_scale
from nr.recipes.activations import ActivationBatches, fill_cache, make_tap
from nr.recipes.cocomix import language_model, settings
from nr.recipes.cocomix.method import sparse_autoencoder_method
from nr.recipes.sections import training_config
from nr.recipes.stages import Artifact, StageContext
from nr.training import integrity, sharding
from nr.training.loop import train
from nr.training.method import Method
from nr.training.model_files import Model, load_model, save_model

REPORTED = ("fvu", "l0", "delta_ce", "loss_recovered")


def check(config: Any) -> None:
  """Checks what the config says of a given autoencoder and of the cache, before any device time is spent.

  Raises:
    ValueError: one line with field, value and remedy.
  """
  cache = config.sae.activation_cache
  if cache.dtype not in DTYPES:
    raise ValueError(names.unknown("sae.activation_cache.dtype", cache.dtype, DTYPES))
  if cache.dtype != DTYPES[0] and not cache.directory:
    raise ValueError(
      f"sae.activation_cache.dtype={cache.dtype!r} decides nothing without sae.activation_cache.directory; "
      "name a folder, or leave it"
    )
  if config.sae.checkpoint and cache.directory:
    raise ValueError(
      f"sae.activation_cache.directory={cache.directory!r} is for training, and sae.checkpoint="
      f"{config.sae.checkpoint!r} is trained; leave one of them empty"
    )
  if config.sae.checkpoint:
    open_given(config, config.teacher.model.model_dim)


def run(context: StageContext) -> Artifact:
  """Trains the autoencoder by the common loop, or opens a given one, and measures it on the validation split."""
  tokenizer = context.inputs["tokenizer"]["fingerprint"]
  teacher = load_model(context.path(context.inputs["teacher"]["model"]), tokenizer)
  make = opened if context.config.sae.checkpoint else trained
  spec, params, artifact = make(context, teacher)
  directory = context.directory / "model"
  fingerprint = save_model(directory, spec, params, tokenizer)
  if jax.process_index():
    return artifact  # the first process alone measures and reports
  metrics, density = evaluate(context, teacher, load_model(directory, tokenizer))
  if metrics["crowded_fraction"]:
    logging.warning(
      "%.3g of the tokens have more than sae.max_active=%d active latents: labels and steering see the largest %d; "
      "raise sae.max_active",
      metrics["crowded_fraction"], spec.max_active, spec.max_active,
    )  # fmt: skip
  np.save(context.directory / "log10_density.npy", density, allow_pickle=False)
  return {
    "model": context.relative(directory),
    "fingerprint": fingerprint,
    "directory": context.relative(context.directory),
    "density": context.relative(context.directory / "log10_density.npy"),
    "arch": context.config.sae.arch,
    **artifact,
    **{name: metrics[name] for name in REPORTED},
    "all_metrics": metrics,
  }


def trained(context: StageContext, teacher: Model) -> tuple[SparseAutoencoderSpec, Any, Artifact]:
  """Trains an autoencoder; returns it in the form that is used, and what the artifact says of its training."""
  config = context.config
  spec = settings.autoencoder_spec(config)
  training = training_config(config.sae.train, config.seed)
  # On the mesh of the training, so that all devices read the teacher, and cached activations are those that
  # training would compute.
  with sharding.context(sharding.make_mesh(training.mesh)):
    data = activation_batches(context, teacher, training.batch_size, training.seed)
    sample_ND = data.sample(config.sae.sample_tokens)
  method = make_method(spec, sample_ND)
  tokenizer = context.inputs["tokenizer"]["fingerprint"]
  metadata = {"tokenizer": tokenizer, "spec": spec.to_dict(), "teacher": teacher.fingerprint}
  result = train(training, method, data, (), context.directory, metadata=metadata)
  extra = result.state.extra
  used_spec, params = inference_form(spec, result.state.params, extra.get("threshold"))
  dead = sae_metrics.dead_fraction(integrity.to_host(extra["tokens_since_fired"]), spec.dead_tokens)
  return used_spec, params, {
    "train_tokens": training.steps * training.batch_size,
    "tokens_per_second": result.summary.get("tokens_per_second"),
    "input_wait_seconds": result.summary.get("input_wait_seconds"),
    "dead_fraction": dead,
  }  # fmt: skip


def opened(context: StageContext, teacher: Model) -> tuple[SparseAutoencoderSpec, Any, Artifact]:
  """Opens the given autoencoder; returns it in the form that is used, and what the artifact says of its origin."""
  found = open_given(context.config, teacher.spec.model_dim)
  params = jax.tree.map(jnp.asarray, found.read_params())
  used_spec, params = inference_form(found.spec, params)
  # How long its latents have been silent is not known; `never_active_fraction` is among the metrics.
  artifact = {"checkpoint": context.config.sae.checkpoint, "origin": found.origin, "dead_fraction": None}
  return used_spec, params, artifact


def open_given(config: Any, model_dim: int) -> ForeignAutoencoder:
  """Opens `sae.checkpoint` and checks that it is what the config says.

  Args:
    config: the whole config.
    model_dim: width of the teacher.

  Raises:
    ValueError: another width, settings, or layer; names the fields and what to set them to.
  """
  sae = config.sae
  fields = ("decoding", "top_k", "dtype", "dead_tokens", "max_active")
  given = {name: sae[name] for name in fields if sae[name] is not None}
  found = open_autoencoder(sae.checkpoint, k=sae.k, **given)
  where = f"sae.checkpoint={sae.checkpoint!r}"
  if found.spec.model_dim != model_dim:
    raise ValueError(
      f"{where} was made for activations of width {found.spec.model_dim}, the teacher's are {model_dim}; "
      "give the teacher that it was made for"
    )
  stated = {name: getattr(found.spec, name) for name in ("arch", "num_latents", "k", "normalisation")}
  wrong = {name: value for name, value in stated.items() if sae[name] != value}
  if wrong:
    told = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
    flags = " ".join(f"--config.sae.{name}={value}" for name, value in wrong.items())
    raise ValueError(f"{where} has {told}, which the config says otherwise; set {flags}")
  hook = found.origin.get("hook_name")
  if hook and tap_layer(hook) != config.teacher.tap_layer:
    raise ValueError(
      f"{where} reads {hook}, which is after block {tap_layer(hook)}; the config says "
      f"teacher.tap_layer={config.teacher.tap_layer}, set it to {tap_layer(hook)}"
    )
  return found


def activation_batches(
  context: StageContext, teacher: Model, batch_size: int, seed: int
) -> ActivationBatches:
  """Returns the shuffled stream of the teacher's activations on the training split."""
  config = context.config
  source = language_model.window_source(context, "train")
  tap = make_tap(teacher.graphdef, teacher.params, config.teacher.tap_layer)
  return ActivationBatches(
    source,
    tap,
    batch_size=batch_size,
    seed=seed,
    chunk_batches=config.sae.chunk_batches,
    windows_per_call=config.sae.windows_per_call,
    skip_first=config.sae.skip_first,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    cache=activation_cache(context, teacher, source, tap),
  )


def activation_cache(context: StageContext, teacher: Model, source: Any, tap: Any) -> ActivationCache | None:
  """Opens, or writes, the cache that `sae.activation_cache` names; None where it names none."""
  config = context.config
  cache = config.sae.activation_cache
  if not cache.directory:
    return None
  header = ActivationHeader(
    teacher=teacher.fingerprint,
    tokenizer=source.dataset.tokenizer,
    dataset=source.dataset.fingerprint,
    layer=config.teacher.tap_layer,
    window=config.window.length,
    reset_at_documents=config.window.reset_at_documents,
    num_windows=len(source),
    model_dim=teacher.spec.model_dim,
    dtype=cache.dtype,
  )
  directory = pathlib.Path(cache.directory).expanduser()
  logging.info("activations of %d windows take %.3g GB in %s", len(source), header.bytes / 1e9, directory)
  return fill_cache(
    directory,
    source,
    tap,
    header,
    windows_per_call=config.sae.windows_per_call,
    process_count=jax.process_count(),
    progress=config.sae.train.progress,
  )


def make_method(spec: SparseAutoencoderSpec, sample_ND: np.ndarray) -> Method:
  """Returns the method, with what is fixed once by a sample of raw activations."""
  scale = float(error_scale(normalise(sample_ND, spec.epsilon, spec.normalisation).values_TD))
  pre_bias_D = initial_pre_bias(spec, sample_ND)
  if jax.process_count() > 1:  # each has a sample of its own windows, and one program needs one start
    scale, pre_bias_D = multihost_utils.broadcast_one_to_all((np.float32(scale), np.asarray(pre_bias_D)))
  return sparse_autoencoder_method(spec, jnp.asarray(pre_bias_D), float(scale))


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
