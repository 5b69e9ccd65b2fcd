"""Labelling a corpus: cached labels equal labels computed at once, and stopped runs go on."""

import jax
import numpy as np
import pytest
from flax import nnx

from nr.data.concept_labels import LabelCache, LabelWriter
from nr.data.sources import Document
from nr.data.token_dataset import write_token_dataset
from nr.data.windows import WindowSource
from nr.evaluation.flops import count_flops
from nr.labels import NO_LABEL
from nr.models import parameters
from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.residual_tap import TapInputs, activations_at
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec
from nr.models.transformer import Transformer, TransformerSpec
from nr.objectives.attribution import AttributionSpec, hidden_gradient
from nr.recipes.cocomix import label_corpus
from nr.recipes.cocomix.label_corpus import Labelling
from nr.recipes.cocomix.method import cocomix_method
from nr.recipes.cocomix.online_labels import with_online_labels
from nr.training import sharding
from nr.training.model_files import ConceptMixingModelSpec, Model
from nr.training.state import place_frozen
from nr.training.step import accumulate

VOCABULARY, WINDOW, LAYER = 30, 8, 0
TEACHER = TransformerSpec.gpt2(
  vocab_size=VOCABULARY, num_layers=2, model_dim=16, num_heads=2, max_length=WINDOW
)
AUTOENCODER = SparseAutoencoderSpec(16, 48, 8, k_aux=8)


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
  teacher = parameters.split(Transformer(TEACHER, rngs=nnx.Rngs(0)))
  return teacher, parameters.split(SparseAutoencoder(AUTOENCODER, rngs=nnx.Rngs(1)))


def make_header(dataset, spec, **changes):
  settings = {
    "teacher_hash": "t", "autoencoder_hash": "s", "teacher_layers": 2, "layer": LAYER, "active_latents": 8,
    "num_concepts": 48, "spec": spec, "window": WINDOW, **changes,
  }  # fmt: skip
  return label_corpus.make_header(dataset, **settings)


def run(directory, dataset, header, models, spec, **changes):
  settings = {"batch_size": 2, "progress": False, **changes}
  return label_corpus.label_dataset(directory, dataset, header, *models, Labelling(LAYER, spec), **settings)


def windows_of(dataset, cache, rows=None, **options):
  """A batch of the cache's windows, which go round until there are `rows` of them."""
  source = WindowSource(dataset, WINDOW, cache.labels, label_weights=cache.weights, **options)
  order = [row % len(source) for row in range(rows or len(source))]
  return {name: np.stack([source[row][name] for row in order]) for name in source[0]}


@pytest.mark.parametrize("reset_at_documents", [False, True])
def test_24_cached_labels_equal_online_labels(tmp_path, dataset, models, reset_at_documents):
  spec = AttributionSpec()
  header = make_header(dataset, spec, reset_at_documents=reset_at_documents)
  cache = run(tmp_path, dataset, header, models, spec)
  cache = LabelCache.open(tmp_path, header, verify_hash=True)
  batch = windows_of(dataset, cache, reset_at_documents=reset_at_documents)
  step = label_corpus.make_label_step(models[0][0], models[1][0], Labelling(LAYER, spec))
  cached = batch.pop("labels")
  online = step(models[0][1], models[1][1], batch)
  np.testing.assert_array_equal(cached, online.labels_BLA)
  # No loss depends on a window's last token, nor on a document's last when attention is reset.
  np.testing.assert_array_equal(cached == NO_LABEL, (batch["weights"] == 0)[..., None].repeat(4, -1))
  assert cache.counts["scored"] > 30 and 0 < cache.counts["coverage"] <= 1
  assert cache.weights is None and "label_weights" not in batch


def test_several_devices_label_as_one_does(tmp_path, dataset, models):
  """Each has a share of every batch; a batch that does not divide is refused."""
  spec = AttributionSpec(weights="score")
  header = make_header(dataset, spec)
  one = run(tmp_path / "one", dataset, header, models, spec)
  mesh = sharding.make_mesh(dict(data=4, fsdp=1, tensor=1, sequence=1))
  many = run(tmp_path / "many", dataset, header, models, spec, batch_size=4, mesh=mesh)
  np.testing.assert_array_equal(many.labels, one.labels)
  np.testing.assert_allclose(many.weights, one.weights, atol=1e-3)  # float16: a step of it
  assert many.counts == one.counts
  with pytest.raises(
    ValueError, match="batch_size=6 must be a positive multiple of the 4 devices that label"
  ):
    run(tmp_path / "odd", dataset, header, models, spec, batch_size=6, mesh=mesh)


def test_the_teacher_s_backward_stops_at_the_tap_and_forms_no_gradient_of_a_parameter(models):
  """By FLOPs, in closed form: a product of weights costs as much again backward, one of activations twice as much."""
  (graphdef, params), _ = models
  B, D, L, V = 2, 16, WINDOW, VOCABULARY
  tokens = jax.ShapeDtypeStruct((B, L), "int32")
  batch = {"tokens": tokens, "targets": tokens, "weights": jax.ShapeDtypeStruct((B, L), "float32")}
  block, head = 2 * B * L * 12 * D * D, 2 * B * L * D * V
  attention = 2 * 2 * B * L * L * D  # scores and their products with values, every pair of positions

  def gradient(params, batch):
    teacher = parameters.merge(graphdef, params)
    inputs = TapInputs.of(batch)
    upper = label_corpus.upper_half(teacher, inputs, batch, Labelling(LAYER, AttributionSpec()))
    return hidden_gradient(upper.loss, activations_at(teacher, inputs, LAYER))

  below = block + attention
  assert count_flops(gradient, params, batch) == below + 2 * (block + head) + 3 * attention


STUDENT = ConceptMixingModelSpec(
  TransformerSpec.gpt2(vocab_size=VOCABULARY, num_layers=2, model_dim=8, num_heads=2, max_length=WINDOW),
  ConceptMixingSpec(insert_at=1, num_concepts=48, top_k=4),
)


def test_24_labels_made_in_the_train_step_equal_cached_ones_bit_for_bit(tmp_path, dataset, models):
  """Weighted labels of Eq. 1, on one device and with teacher and autoencoder split over eight."""
  spec = AttributionSpec.equation_1(weights="score")
  cache = run(tmp_path, dataset, make_header(dataset, spec), models, spec)
  assert cache.weights.dtype == np.float16 and not cache.weights.flags.writeable
  batch = windows_of(dataset, cache, rows=8)
  cached = {name: batch[name] for name in ("labels", "label_weights")}
  plain = cocomix_method(STUDENT, loss_weight=0.1)

  def loss(params, frozen, extra, batch, key):
    output = plain.loss(params, frozen, extra, batch, key)
    return output._replace(statistics={name: batch[name] for name in cached})

  teacher, autoencoder = (
    Model(spec, graphdef, params, "", {}) for spec, (graphdef, params) in zip((TEACHER, AUTOENCODER), models)
  )
  online = with_online_labels(plain._replace(loss=loss), teacher, autoencoder, Labelling(LAYER, spec))
  assert set(online.frozen) == {"teacher", "autoencoder"}
  unlabelled = {name: value for name, value in batch.items() if name not in cached}
  params, key = jax.jit(plain.init)(jax.random.key(0)), jax.random.key(1)

  def statistics(frozen, arrays, mesh=None):
    return accumulate(online, params, frozen, (), arrays, key, mesh=mesh)

  gradients, output = jax.jit(statistics)(place_frozen(online, None), unlabelled)
  jax.tree.map(np.testing.assert_array_equal, output.statistics, cached)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["concepts"]))
  mesh = sharding.make_mesh(dict(data=2, fsdp=4, tensor=1, sequence=1))
  with sharding.context(mesh):
    frozen, arrays = place_frozen(online, mesh), sharding.put_batch(unlabelled, mesh)
    assert not frozen["autoencoder"]["encoder"]["kernel"].sharding.is_fully_replicated
    split = jax.jit(lambda *given: online.loss(params, given[0], (), given[1], key))(frozen, arrays)
  jax.tree.map(np.testing.assert_array_equal, split.statistics, cached)
  # Weights change the loss: they are read, not only carried.
  equal = jax.jit(plain.loss)(params, {}, (), {**unlabelled, "labels": cached["labels"]}, key)
  assert abs(equal.metrics["concept_loss"].mean() - output.metrics["concept_loss"].mean()) > 1e-4


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


def test_a_header_of_another_variant_is_refused(tmp_path, dataset, models):
  with pytest.raises(ValueError, match="make both from the same settings"):
    run(tmp_path, dataset, make_header(dataset, AttributionSpec(sign="abs")), models, AttributionSpec())


def test_impossible_jobs_are_refused_before_any_work(dataset):
  with pytest.raises(ValueError, match="layer=2 is outside the model: choose 0..1"):
    make_header(dataset, AttributionSpec(), layer=2)
  with pytest.raises(ValueError, match="k_attr=9 is above the 8 active latents"):
    make_header(dataset, AttributionSpec(k_attr=9))
  with pytest.raises(ValueError, match="num_concepts=70000 does not fit"):
    make_header(dataset, AttributionSpec(), num_concepts=70_000)
