"""Checkpoints under the CoCoMix reference's names: parity with committed numbers, round trips, refusals."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from nr.interchange.cocomix_reference import load_cocomix_reference, save_cocomix_reference
from nr.models import parameters
from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.transformer import TransformerSpec
from nr.objectives.concept_prediction import concept_prediction_loss
from nr.objectives.language_modeling import next_token_loss
from nr.recipes.cocomix.reference_files import export_student, import_student
from nr.training import artifacts
from nr.training.model_files import ConceptMixingModelSpec, build_model, graphdef_of, load_model, save_model
from tests.golden import make_cocomix_reference_goldens as goldens

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors (extra [hub])")

INSERTION = {"insert_at": goldens.INSERT_AT, "top_k": goldens.TOP_K}


def write_checkpoint(folder, weights, **config):
  """A folder as the reference's `save_pretrained` leaves it: its config does not know the concept path."""
  folder.mkdir()
  safetensors_numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
  settings = {"model_type": "gpt2", "architectures": ["GPT2CoCoMixLMHeadModel"], **goldens.SIZES}
  dropout = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
  (folder / "config.json").write_text(json.dumps({**settings, **dropout, **config}))
  return folder


@pytest.fixture(scope="module")
def weights():
  return goldens.make_weights()


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
  return write_checkpoint(tmp_path_factory.mktemp("reference") / "model", weights)


def test_18_logits_concept_logits_and_losses_are_those_of_the_reference(weights, checkpoint):
  golden = np.load(goldens.PATH, allow_pickle=False)
  assert goldens.hash_of(weights) == golden["weights_sha256"], "NumPy draws other numbers from this seed"
  spec, concepts, params = load_cocomix_reference(checkpoint, **INSERTION)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == goldens.NUM_PARAMETERS == 243_520
  assert spec.dropout == 0 and concepts.norm == "reference"
  graphdef = graphdef_of(ConceptMixingModelSpec(spec, concepts))
  tokens, labels = golden["tokens"], golden["labels"]

  @jax.jit
  def run(params):
    model = parameters.merge(graphdef, params)
    output = model.forward(tokens, labels_BLA=labels)
    x, attention = model.transformer.enter(tokens)
    h, _ = model.transformer.run_blocks(x, 0, concepts.insert_at, attention=attention)
    scored = np.ones(tokens.shape, np.float32)
    scored[:, -1] = 0
    targets = np.roll(tokens, -1, axis=1)
    next_token = next_token_loss(output.hidden_BLD, model.unembedding_VD, targets, scored)
    found = output.concepts
    concept = concept_prediction_loss(
      found.log_normalizer_BL, found.label_logits_BLA, labels, found.indices_BLK
    )
    return model.logits(output.hidden_BLD), model.concepts.logits(h), next_token.mean(), concept.loss.mean()

  names = ("logits", "concept_logits", "next_token_loss", "concept_loss")
  for name, found in zip(names, run(params), strict=True):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, golden[name], atol=1e-5, rtol=0, err_msg=name)
  assert golden["logits"].std() > 0.5 and golden["concept_logits"].std() > 0.5


def test_18_saving_gives_the_same_tensors_bit_for_bit_and_loads_again(weights, checkpoint, tmp_path):
  spec, concepts, params = load_cocomix_reference(checkpoint, **INSERTION)
  save_cocomix_reference(
    tmp_path, spec, concepts, parameters.unstack_layers(params)
  )  # either layout is taken
  written = safetensors_numpy.load_file(tmp_path / "model.safetensors")
  assert sorted(written) == sorted(weights)
  for name, tensor in weights.items():
    assert written[name].dtype == tensor.dtype
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)
  again = load_cocomix_reference(tmp_path)  # our file says where concepts go and how many
  assert again[:2] == (spec, concepts)
  jax.tree.map(np.testing.assert_array_equal, again[2], params)
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["architectures"] == ["GPT2CoCoMixLMHeadModel"] and config["model_type"] == "gpt2"


def test_a_stored_head_must_be_the_token_embedding(weights, tmp_path):
  embedding = weights["transformer.wte.weight"]
  write_checkpoint(tmp_path / "copy", {**weights, "lm_head.weight": embedding})
  load_cocomix_reference(tmp_path / "copy", **INSERTION)
  write_checkpoint(tmp_path / "other", {**weights, "lm_head.weight": 2 * embedding})
  with pytest.raises(ValueError, match="lm_head.weight differs from transformer.wte.weight"):
    load_cocomix_reference(tmp_path / "other", **INSERTION)


def test_tensors_that_are_missing_or_unknown_are_named(weights, tmp_path):
  some = {name: tensor for name, tensor in weights.items() if name != "transformer.compress_layer.bias"}
  write_checkpoint(tmp_path / "missing", some)
  with pytest.raises(ValueError, match="1 missing from the checkpoint: transformer.compress_layer.bias"):
    load_cocomix_reference(tmp_path / "missing", **INSERTION)
  write_checkpoint(tmp_path / "unknown", {**weights, "transformer.gate.weight": np.zeros(3, np.float32)})
  with pytest.raises(
    ValueError, match="1 in the checkpoint, but not in the name map: transformer.gate.weight"
  ):
    load_cocomix_reference(tmp_path / "unknown", **INSERTION)
  narrow = {**weights, "transformer.pre_bias": np.zeros(3, np.float32)}
  write_checkpoint(tmp_path / "narrow", narrow)
  with pytest.raises(ValueError, match=r"concepts/pre_bias \(3,\) instead of \(64,\)"):
    load_cocomix_reference(tmp_path / "narrow", **INSERTION)


def test_settings_that_are_missing_or_contradict_are_named(checkpoint, weights, tmp_path):
  with pytest.raises(ValueError, match="has no 'insert_layer_idx'.* give insert_at="):
    load_cocomix_reference(checkpoint, top_k=8)
  with pytest.raises(ValueError, match="insert_at=4: the model has 4 blocks"):
    load_cocomix_reference(checkpoint, insert_at=4, top_k=8)
  told = write_checkpoint(tmp_path / "told", weights, insert_layer_idx=2, concept_num=8, concept_dim=255)
  with pytest.raises(ValueError, match="concept_num is 8, yet top_k is 9"):
    load_cocomix_reference(told, top_k=9)
  with pytest.raises(ValueError, match="concept_dim is 255, yet num_concepts is 256"):
    load_cocomix_reference(told)


def test_what_the_reference_cannot_compute_is_not_written(checkpoint, tmp_path):
  spec, concepts, params = load_cocomix_reference(checkpoint, **INSERTION)
  for changes in ({"mode": "add"}, {"norm": "none"}):
    field, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"ConceptMixingSpec.{field}='{value}'"):
      save_cocomix_reference(tmp_path, spec, dataclasses.replace(concepts, **changes), params)
  llama = TransformerSpec.llama(vocab_size=97, num_layers=4, model_dim=64, num_heads=4, tied_head=True)
  with pytest.raises(
    ValueError, match="model_type 'llama', tied_head=True: the CoCoMix reference is a GPT-2"
  ):
    save_cocomix_reference(tmp_path, llama, concepts, params)


def test_a_student_is_exported_and_imported_bit_for_bit(tmp_path):
  transformer = TransformerSpec.gpt2(
    vocab_size=19, num_layers=2, model_dim=8, num_heads=2, max_length=16, layers="unroll"
  )
  spec = ConceptMixingModelSpec(transformer, ConceptMixingSpec(insert_at=1, num_concepts=12, top_k=3))
  params = parameters.split(build_model(spec, jax.random.key(0)))[1]
  fingerprint = save_model(tmp_path / "student", spec, params, "a tokenizer")
  export_student(tmp_path / "student", tmp_path / "reference")
  assert import_student(tmp_path / "reference", tmp_path / "again", tokenizer="a tokenizer") == fingerprint
  again = load_model(tmp_path / "again", "a tokenizer")
  assert again.spec.concepts == spec.concepts
  assert again.spec.transformer == dataclasses.replace(transformer, layers="scan")
  assert artifacts.tree_hash(again.params) == fingerprint
  save_model(tmp_path / "plain", transformer, params["transformer"], "a tokenizer")
  with pytest.raises(ValueError, match="holds a 'transformer'; give the folder of a CoCoMix student"):
    export_student(tmp_path / "plain", pathlib.Path(tmp_path / "nothing"))
