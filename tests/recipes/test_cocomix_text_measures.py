"""What stage `evaluate` measures besides packed windows: on a saved student, against the scores of its documents."""

import math

import jax
import numpy as np
import pytest

from configs.cocomix import get_config
from nr.data.sources import Document
from nr.data.token_dataset import write_token_dataset
from nr.data.tokenizers import train_sentencepiece
from nr.models import parameters
from nr.models.concept_mixing import ConceptMixingSpec
from nr.models.transformer import TransformerSpec
from nr.recipes.cocomix import checks, text_measures
from nr.recipes.stages import StageContext
from nr.training.model_files import ConceptMixingModelSpec, build_model, save_model

WORDS = "the sea is blue and the sky is red when people sing of old ships".split()
LENGTH = 16


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  """A run directory with a tokenizer, a validation split of five documents and a random student."""
  workdir = tmp_path_factory.mktemp("run")
  draws = np.random.default_rng(0)
  documents = [Document(f"d{n}", " ".join(draws.choice(WORDS, 9 * n + 7))) for n in range(5)]
  tokenizer = train_sentencepiece([document.text for document in documents], 300)
  tokenizer.save(workdir / "tokenizer")
  write_token_dataset(workdir / "validation", documents, tokenizer)
  base = TransformerSpec.gpt2(
    vocab_size=tokenizer.vocab_size, num_layers=2, model_dim=16, num_heads=2, max_length=LENGTH, init_std=0.3
  )
  spec = ConceptMixingModelSpec(base, ConceptMixingSpec(insert_at=1, num_concepts=24, top_k=4))
  _, params = parameters.split(build_model(spec, jax.random.key(0)))
  save_model(workdir / "model", spec, params, tokenizer.fingerprint)
  artifact = {"tokenizer": "tokenizer", "fingerprint": tokenizer.fingerprint, "validation": "validation"}
  return workdir, {"tokenizer": artifact}, documents


def measure(student, **changes):
  workdir, inputs, _ = student
  config = get_config("miniature")
  config.window.length = LENGTH
  config.evaluate.update(batch_size=4, **changes)
  context = StageContext(config, workdir, workdir / "evaluate", inputs)
  return text_measures.measure(context, {"model": "model"})


def test_nothing_is_measured_unless_asked_for(student):
  assert measure(student) == {}


def test_documents(student):
  found = measure(student, documents=-1, stride=4)
  assert found["scored_documents"] == 5 and found["document_stride"] == 4
  low, high = found["document_ci95"]
  assert low < found["document_loss"] < high
  assert found["document_ppl"] == pytest.approx(math.exp(found["document_loss"]))
  _, _, documents = student
  size = sum(len(document.text.encode()) for document in documents)
  tokens = found["document_bits_per_byte"] * size * math.log(2) / found["document_loss"]
  assert tokens == pytest.approx(round(tokens), abs=1e-3)  # every token of every byte, and no end of text
  disjoint = measure(student, documents=-1)
  assert disjoint["document_stride"] == LENGTH and disjoint["document_loss"] != found["document_loss"]
  assert measure(student, documents=2)["scored_documents"] == 2


def test_last_words(student, tmp_path):
  found = measure(student, last_words=6, passage_words=5)
  assert found["last_word_passages"] == 6
  low, high = found["last_word_ci95"]
  assert 0 <= low <= found["last_word_accuracy"] <= high <= 1 and found["last_word_ppl"] > 1
  path = tmp_path / "lambada.jsonl"
  path.write_text('{"text": "the sea is blue"}\n{"text": "people sing of ships"}\n')
  given = measure(student, last_words=6, last_word_file=str(path))
  assert given["last_word_passages"] == 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(documents=-2), "evaluate.documents=-2: give a number, 0 for none or -1 for all"),
    (dict(stride=33), "evaluate.stride=33: give 1 to window.length=32"),
    (dict(last_words=-1), "evaluate.last_words=-1"),
    (dict(last_word_file="lambada.jsonl"), "is not read while evaluate.last_words=0"),
    (dict(last_words=5, passage_words=1), "evaluate.passage_words=1: give at least 2 words"),
  ],
)
def test_mistakes_are_named_first(changes, message):
  config = get_config("miniature")
  config.evaluate.update(changes)
  with pytest.raises(ValueError, match=message):
    checks.validate(config)
