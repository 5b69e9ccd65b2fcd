"""Labelling a corpus: cached labels equal labels computed at once, and stopped runs go on."""

import numpy as np
import pytest
from flax import nnx

from nr.data.concept_labels import LabelCache, LabelWriter
from nr.data.sources import Document
from nr.data.token_dataset import write_token_dataset
from nr.data.windows import WindowSource
from nr.labels import NO_LABEL
from nr.models import parameters
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec
from nr.models.transformer import Transformer, TransformerSpec
from nr.objectives.attribution import AttributionSpec
from nr.recipes.cocomix import label_corpus

VOCABULARY, WINDOW, LAYER = 30, 8, 0


class Letters:
  """A tokenizer of lower-case letters."""

  vocab_size, end_of_text_id, fingerprint = VOCABULARY, 0, "letters"

  def encode(self, text):
    return [ord(letter) - ord("a") + 1 for letter in text]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  rng = np.random.default_rng(0)
  texts = ["".join(chr(ord("a") + i) for i in rng.integers(0, 26, size)) for size in (13, 5, 20, 9)]
  documents = [Document(str(index), text) for index, text in enumerate(texts)]
  return write_token_dataset(tmp_path_factory.mktemp("tokens") / "train", documents, Letters())


@pytest.fixture(scope="module")
def models():
  sizes = {"vocab_size": VOCABULARY, "num_layers": 2, "model_dim": 16, "num_heads": 2}
  spec = TransformerSpec.gpt2(**sizes, max_length=WINDOW)
  teacher = parameters.split(Transformer(spec, rngs=nnx.Rngs(0)))
  sae = SparseAutoencoderSpec(16, 48, 8, k_aux=8)
  return teacher, parameters.split(SparseAutoencoder(sae, rngs=nnx.Rngs(1)))


def make_header(dataset, spec, **changes):
  settings = {
    "teacher_hash": "t", "autoencoder_hash": "s", "teacher_layers": 2, "layer": LAYER, "active_latents": 8,
    "num_concepts": 48, "spec": spec, "window": WINDOW, **changes,
  }  # fmt: skip
  return label_corpus.make_header(dataset, **settings)


def run(directory, dataset, header, models, spec, **changes):
  settings = {"batch_size": 2, "progress": False, **changes}
  return label_corpus.label_dataset(directory, dataset, header, *models, spec=spec, **settings)


@pytest.mark.parametrize("reset_at_documents", [False, True])
def test_24_cached_labels_equal_online_labels(tmp_path, dataset, models, reset_at_documents):
  spec = AttributionSpec()
  header = make_header(dataset, spec, reset_at_documents=reset_at_documents)
  cache = run(tmp_path, dataset, header, models, spec)
  cache = LabelCache.open(tmp_path, header, verify_hash=True)
  source = WindowSource(dataset, WINDOW, cache.labels, reset_at_documents)
  batch = {name: np.stack([source[i][name] for i in range(len(source))]) for name in source[0]}
  step = label_corpus.make_label_step(models[0][0], models[1][0], layer=LAYER, spec=spec)
  cached = batch.pop("labels")
  online = step(models[0][1], models[1][1], batch)
  np.testing.assert_array_equal(cached, online.labels_BLA)
  # No loss depends on a window's last token, nor on a document's last when attention is reset.
  np.testing.assert_array_equal(cached == NO_LABEL, (batch["weights"] == 0)[..., None].repeat(4, -1))
  assert cache.counts["scored"] > 30 and 0 < cache.counts["coverage"] <= 1


def test_overlapping_windows_give_every_token_context_and_labels(tmp_path, dataset, models):
  spec = AttributionSpec()
  header = make_header(dataset, spec, stride=3)
  cache = run(tmp_path, dataset, header, models, spec, batch_size=3)
  assert (cache.labels[:-1] != NO_LABEL).all() and (cache.labels[-1] == NO_LABEL).all()


def test_a_stopped_job_goes_on_and_gives_the_same_labels(tmp_path, dataset, models):
  spec = AttributionSpec(sign="abs")
  header = make_header(dataset, spec)
  whole = run(tmp_path / "whole", dataset, header, models, spec)
  writer = LabelWriter(tmp_path / "parts", header)
  spans = next(writer.remaining(2))
  zeros = np.zeros((2, WINDOW), np.int32)
  writer.write(spans, np.zeros((2, WINDOW, 4), np.int32), zeros, zeros > 0)
  writer.save()
  parts = run(tmp_path / "parts", dataset, header, models, spec)
  np.testing.assert_array_equal(parts.labels[2 * WINDOW :], whole.labels[2 * WINDOW :])
  assert (parts.labels[: 2 * WINDOW] == 0).all()  # what was written before was kept, not computed again


def test_impossible_jobs_are_refused_before_any_work(dataset):
  with pytest.raises(ValueError, match="layer=2 is outside the model: choose 0..1"):
    make_header(dataset, AttributionSpec(), layer=2)
  with pytest.raises(ValueError, match="k_attr=9 is above the 8 active latents"):
    make_header(dataset, AttributionSpec(k_attr=9))
  with pytest.raises(ValueError, match="num_concepts=70000 does not fit"):
    make_header(dataset, AttributionSpec(), num_concepts=70_000)
