"""Stage `tokenizer`: raw text to a tokenizer and two streams of tokens."""

import pathlib
from typing import Any

from nr.data.sources import CorpusSpec
from nr.data.splits import documents_of_split
from nr.data.token_dataset import TokenDataset, write_token_dataset
from nr.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from nr.generators.checkpoints import open_checkpoint
from nr.recipes.cocomix import settings
from nr.recipes.stages import Artifact, StageContext

SPLITS = ("train", "validation")


def run(context: StageContext) -> Artifact:
  """Splits documents by hash, trains (or takes) a tokenizer, writes both splits as tokens."""
  corpus = CorpusSpec.of(context.config.corpus.to_dict())
  tokenizer = make_tokenizer(context.config, corpus)
  directory = context.directory / "tokenizer"
  tokenizer.save(directory)
  artifact: Artifact = {
    "tokenizer": context.relative(directory),
    "fingerprint": tokenizer.fingerprint,
    "vocab_size": tokenizer.vocab_size,
    "corpus": {"name": corpus.name, "documents": {}, "tokens": {}, "bytes": {}},
  }
  for split in SPLITS:
    dataset = write_token_dataset(
      context.directory / split,
      documents_of_split(corpus, split),
      tokenizer,
      provenance={"corpus": context.config.corpus.to_dict(), "split": split},
      overwrite=True,
      progress=True,
    )
    artifact[split] = context.relative(context.directory / split)
    artifact["corpus"]["documents"][split] = dataset.num_documents
    artifact["corpus"]["tokens"][split] = dataset.num_tokens
    artifact["corpus"]["bytes"][split] = dataset.num_bytes
  check_sizes(context.config, artifact["corpus"]["tokens"])
  return artifact


def check_sizes(config: Any, tokens: dict[str, int]) -> None:
  """Refuses splits that later stages could not use, before any model is trained.

  Raises:
    ValueError: names the split, its size and what it must hold.
  """
  window, steer = config.window.length, config.steer
  rows = config.students.train.batch_size
  if not config.teacher.checkpoint:
    rows = max(rows, config.teacher.train.batch_size)
  is_steered = settings.steered_arm(config) is not None
  prompts = steer.prompts * steer.prompt_tokens if is_steered else 0
  needed = {"train": rows * window, "validation": max(window, prompts)}
  for split, least in needed.items():
    if tokens[split] < least:
      raise ValueError(
        f"corpus.name={config.corpus.name!r}: the {split} split has {tokens[split]} tokens and needs {least} (a batch "
        f"of windows to train on, one window and the steering prompts to validate); give more text, or lower "
        "window.length, train.batch_size or steer.prompts"
      )


def make_tokenizer(config: Any, corpus: CorpusSpec) -> Tokenizer:
  """Returns the tokenizer that the config names, a given teacher's own, or one trained on the training split alone."""
  given = given_tokenizer(config)
  if given is not None:
    return given
  texts = (document.text for document in documents_of_split(corpus, "train"))
  return train_sentencepiece(texts, config.tokenizer.vocab_size, model_type=config.tokenizer.model_type)


def given_tokenizer(config: Any) -> Tokenizer | None:
  """Returns the tokenizer of `tokenizer.path`, or of a given teacher; None where one is to be trained."""
  if config.tokenizer.path:
    return load_tokenizer(pathlib.Path(config.tokenizer.path))
  if config.teacher.checkpoint:
    return open_checkpoint(config.teacher.checkpoint).tokenizer
  return None


def open_split(context: StageContext, split: str) -> TokenDataset:
  """Opens a split that the stage wrote, refusing one made with another tokenizer."""
  artifact = context.inputs["tokenizer"]
  return TokenDataset.open(context.path(artifact[split]), expected_tokenizer=artifact["fingerprint"])
