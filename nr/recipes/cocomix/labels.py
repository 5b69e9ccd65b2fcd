"""Stage `labels`: four concepts for every token, computed once and cached on disk."""

from typing import Any

import numpy as np

from nr.data.concept_labels import LabelCache, latent_counts
from nr.data.token_dataset import TokenDataset
from nr.recipes.cocomix import corpus, settings
from nr.recipes.cocomix.label_corpus import label_dataset, make_header
from nr.recipes.stages import Artifact, StageContext
from nr.training.model_files import load_model


def run(context: StageContext) -> Artifact:
  """Labels both splits; a run that was stopped goes on where it left off."""
  config = context.config
  tokenizer = context.inputs["tokenizer"]["fingerprint"]
  teacher = load_model(context.path(context.inputs["teacher"]["model"]), tokenizer)
  autoencoder = load_model(context.path(context.inputs["sae"]["model"]), tokenizer)
  spec = settings.attribution_spec(config)
  artifact: Artifact = {"splits": {}}
  for split in corpus.SPLITS:
    dataset = corpus.open_split(context, split)
    header = make_header(
      dataset,
      teacher_hash=teacher.fingerprint,
      autoencoder_hash=autoencoder.fingerprint,
      teacher_layers=teacher.spec.num_layers,
      layer=config.teacher.tap_layer,
      active_latents=autoencoder.spec.k,
      num_concepts=autoencoder.spec.num_latents,
      spec=spec,
      window=config.window.length,
      reset_at_documents=config.window.reset_at_documents,
    )
    cache = label_dataset(
      context.directory / split,
      dataset,
      header,
      (teacher.graphdef, teacher.params),
      (autoencoder.graphdef, autoencoder.params),
      spec=spec,
      batch_size=config.labels.batch_size,
      loss_chunk=settings.loss_chunk(config),
    )
    artifact["splits"][split] = {
      "directory": context.relative(context.directory / split),
      "header": header.to_dict(),
      **cache.counts,
    }
  counts = latent_counts(open_labels(context, artifact, "train").labels, autoencoder.spec.num_latents)
  artifact.update(
    mean_positive=artifact["splits"]["train"]["mean_positive"],
    fewer_than_labels=artifact["splits"]["train"]["fewer_than_labels"],
    coverage=artifact["splits"]["train"]["coverage"],
    label_entropy=_entropy(counts),
    tokens=int(sum(split["scored"] for split in artifact["splits"].values())),
  )
  return artifact


def open_labels(
  context: StageContext, artifact: Artifact, split: str, dataset: TokenDataset | None = None
) -> LabelCache:
  """Opens the labels of a split, refusing any that were not made from this very run."""
  recorded = artifact["splits"][split]
  dataset = dataset or corpus.open_split(context, split)
  expected: dict[str, Any] = {
    **recorded["header"],
    "layer": context.config.teacher.tap_layer,
    "tokenizer": dataset.tokenizer,
    "dataset": dataset.fingerprint,
    "window": context.config.window.length,
    "attribution": settings.attribution_spec(context.config).to_dict(),
  }
  return LabelCache.open(context.path(recorded["directory"]), expected)


def _entropy(counts: np.ndarray) -> float:
  """Entropy in nats of how often each concept is a label; at most ln C."""
  probabilities = counts[counts > 0] / counts.sum()
  return float(-(probabilities * np.log(probabilities)).sum())
