"""Stage `labels`: a few concepts for every token, computed once and cached on disk.

`targets` says what they are, and `targets.variants` names other kinds (signs, criteria, ...) that arms may ask
for. Each kind has a cache of its own, known by the fingerprint of its settings, side by side in the stage's
folder, in which those of `targets` itself lie directly. Where labels are made in the train step instead
(source "online"), those of the validation split are cached all the same: arms are measured on them.
"""

import pathlib
from typing import Any

import jax
import numpy as np

from nr.data.concept_labels import LabelCache, latent_counts
from nr.data.token_dataset import TokenDataset
from nr.evaluation.flops import count_flops
from nr.objectives.attribution import AttributionSpec
from nr.recipes.cocomix import corpus, language_model, settings
from nr.recipes.cocomix.label_corpus import Labelling, label_dataset, make_header, make_label_step
from nr.recipes.stages import Artifact, StageContext
from nr.training import sharding
from nr.training.model_files import Model, load_model


def run(context: StageContext) -> Artifact:
  """Labels both splits for every variant; a run that was stopped goes on where it left off."""
  config = context.config
  tokenizer = context.inputs["tokenizer"]["fingerprint"]
  teacher = load_model(context.path(context.inputs["teacher"]["model"]), tokenizer)
  autoencoder = load_model(context.path(context.inputs["sae"]["model"]), tokenizer)
  artifact: Artifact = {"variants": {}}
  for kind in settings.label_kinds(config):
    spec = settings.attribution_spec(config, kind)
    name = settings.attribution_id(spec)
    if name == artifact.get("variant") or name in artifact["variants"]:
      continue  # differs from another kind in its source alone
    directory = context.directory / name if kind else context.directory
    found = label_variant(context, directory, name, spec, teacher, autoencoder)
    if kind:
      artifact["variants"][name] = found
    else:
      artifact.update(found, variant=name)
  return artifact


def label_variant(
  context: StageContext,
  directory: pathlib.Path,
  name: str,
  spec: AttributionSpec,
  teacher: Model,
  autoencoder: Model,
) -> Artifact:
  """Labels the splits that are read of one variant, and counts."""
  config = context.config
  job = labelling(config, spec)
  artifact: Artifact = {"splits": {}}
  for split in corpus.SPLITS if _is_cached(config, name) else ("validation",):
    dataset = corpus.open_split(context, split)
    header = make_header(
      dataset,
      teacher_hash=teacher.fingerprint,
      autoencoder_hash=autoencoder.fingerprint,
      teacher_layers=teacher.spec.num_layers,
      layer=job.layer,
      active_latents=autoencoder.spec.max_active,
      num_concepts=autoencoder.spec.num_latents,
      spec=job.spec,
      window=config.window.length,
      stride=config.labels.stride or None,
      reset_at_documents=config.window.reset_at_documents,
    )
    cache = label_dataset(
      directory / split,
      dataset,
      header,
      (teacher.graphdef, teacher.params),
      (autoencoder.graphdef, autoencoder.params),
      job,
      batch_size=config.labels.batch_size,
      mesh=labelling_mesh(config),
    )
    artifact["splits"][split] = {
      "directory": context.relative(directory / split),
      "header": header.to_dict(),
      **cache.counts,
    }
  counted = counted_split(artifact)
  dataset = corpus.open_split(context, counted)
  cache = open_cache(context, artifact, counted, dataset, spec)
  counts = latent_counts(cache.labels, autoencoder.spec.num_latents)
  artifact.update(
    mean_positive=artifact["splits"][counted]["mean_positive"],
    fewer_than_labels=artifact["splits"][counted]["fewer_than_labels"],
    coverage=artifact["splits"][counted]["coverage"],
    label_entropy=_entropy(counts),
    flops_per_token=flops_per_token(context, job, teacher, autoencoder),
    tokens=int(sum(split["scored"] for split in artifact["splits"].values())),
  )
  return artifact


def labelling_mesh(config: Any) -> jax.sharding.Mesh:
  """Returns the devices that label: of this process, which labels alone."""
  mesh = {**sharding.DATA_PARALLEL, "data": config.labels.devices or -1}
  return sharding.make_mesh(mesh, jax.local_devices())


def flops_per_token(context: StageContext, job: Labelling, teacher: Model, autoencoder: Model) -> float:
  """Counts the FLOPs that the labels of one token cost, once: windows that overlap read a token more than once."""
  config = context.config
  rows, length = config.labels.batch_size, config.window.length
  window = language_model.window_source(context, "validation", tail="pad")[0]
  batch = {name: jax.ShapeDtypeStruct((rows, *value.shape), value.dtype) for name, value in window.items()}
  step = make_label_step(teacher.graphdef, autoencoder.graphdef, job)
  flops = count_flops(step, teacher.params, autoencoder.params, batch)
  return flops / (rows * (config.labels.stride or length))


def _is_cached(config: Any, name: str) -> bool:
  """Whether a kind of labels with this fingerprint is read from a cache in training."""
  return any(
    settings.targets_of(config, kind)["source"] == "cache"
    for kind in settings.label_kinds(config)
    if settings.attribution_id(settings.attribution_spec(config, kind)) == name
  )


def labelling(config: Any, spec: AttributionSpec) -> Labelling:
  """Returns how labels of a variant are made, cached or in the train step."""
  return Labelling(
    layer=config.teacher.tap_layer,
    spec=spec,
    loss_chunk=settings.loss_chunk(config),
    concept_chunk=config.labels.concept_chunk,
    positions_at_once=config.labels.positions_at_once,
  )


def variant_of(artifact: Artifact, spec: AttributionSpec) -> Artifact:
  """Returns what the stage's artifact says of a variant."""
  name = settings.attribution_id(spec)
  return artifact if name == artifact["variant"] else artifact["variants"][name]


def counted_split(variant: Artifact) -> str:
  """Returns the split that a variant's counts describe: the training split where it has labels."""
  return "train" if "train" in variant["splits"] else "validation"


def open_labels(
  context: StageContext, artifact: Artifact, split: str, kind: str = "", dataset: TokenDataset | None = None
) -> LabelCache:
  """Opens the labels of a split and kind, refusing any that were not made from this very run."""
  spec = settings.attribution_spec(context.config, kind)
  dataset = dataset or corpus.open_split(context, split)
  return open_cache(context, variant_of(artifact, spec), split, dataset, spec)


def counted_labels(context: StageContext, artifact: Artifact, kind: str = "") -> LabelCache:
  """Opens the labels of a kind that the artifact's counts describe."""
  variant = variant_of(artifact, settings.attribution_spec(context.config, kind))
  return open_labels(context, artifact, counted_split(variant), kind)


def open_cache(
  context: StageContext, variant: Artifact, split: str, dataset: TokenDataset, spec: AttributionSpec
) -> LabelCache:
  """Opens a variant's labels of a split."""
  recorded = variant["splits"][split]
  expected: dict[str, Any] = {
    **recorded["header"],
    "layer": context.config.teacher.tap_layer,
    "tokenizer": dataset.tokenizer,
    "dataset": dataset.fingerprint,
    "window": context.config.window.length,
    "stride": context.config.labels.stride or context.config.window.length,
    "attribution": spec.to_dict(),
  }
  return LabelCache.open(context.path(recorded["directory"]), expected)


def _entropy(counts: np.ndarray) -> float:
  """Entropy in nats of how often each concept is a label; at most ln C."""
  probabilities = counts[counts > 0] / counts.sum()
  return float(-(probabilities * np.log(probabilities)).sum())
