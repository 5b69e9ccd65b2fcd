"""What stage `evaluate` may measure besides the loss of packed windows: documents by themselves, and last words.

Both are off unless the section `evaluate` of the config asks for them.
"""

from typing import Any

import numpy as np

from nr.data.sources import documents
from nr.data.token_dataset import TokenDataset
from nr.data.tokenizers import load_tokenizer
from nr.evaluation.last_words import cut_passages, score_last_words
from nr.evaluation.log_likelihoods import TextScorer
from nr.evaluation.perplexity import score_separately
from nr.generation.language_models import Network
from nr.recipes.cocomix import corpus
from nr.recipes.stages import Artifact, StageContext
from nr.training.model_files import load_model


def check(config: Any) -> None:
  """Refuses settings that cannot be used, before anything is trained.

  Raises:
    ValueError: names the field of `evaluate`, its value and what would be right.
  """
  evaluate, length = config.evaluate, config.window.length
  if evaluate.documents < -1:
    raise ValueError(f"evaluate.documents={evaluate.documents}: give a number, 0 for none or -1 for all")
  if not 0 <= evaluate.stride <= length:
    raise ValueError(
      f"evaluate.stride={evaluate.stride}: give 1 to window.length={length} tokens, or 0 for disjoint windows"
    )
  if evaluate.last_words < 0:
    raise ValueError(f"evaluate.last_words={evaluate.last_words}: give a number of passages, or 0 for none")
  if evaluate.last_word_file and not evaluate.last_words:
    raise ValueError(
      f"evaluate.last_word_file={evaluate.last_word_file!r} is not read while evaluate.last_words=0: give a number"
    )
  if evaluate.last_words and evaluate.passage_words < 2:
    raise ValueError(f"evaluate.passage_words={evaluate.passage_words}: give at least 2 words")


def measure(context: StageContext, trained: Artifact) -> dict[str, Any]:
  """Returns what the config asks for of one student; {} where it asks for nothing.

  Returns:
    document_loss (nats a token), document_ppl, document_bits_per_byte, document_ci95 (of the loss, by document
      bootstrap), scored_documents, document_stride; last_word_accuracy, last_word_ci95 (by bootstrap over passages),
      last_word_ppl (of a word), last_word_passages.
  """
  config = context.config.evaluate
  if not config.documents and not config.last_words:
    return {}
  names = context.inputs["tokenizer"]
  tokenizer = load_tokenizer(context.path(names["tokenizer"]))
  model = load_model(context.path(trained["model"]), names["fingerprint"])
  end = tokenizer.end_of_text_id
  scorer = TextScorer(
    Network(model.graphdef, model.params),
    tokenizer,
    prefix_id=end,  # as in training, where a document follows the end of the one before it
    begin_ids=(end,),
    batch_size=config.batch_size,
    max_length=context.config.window.length,
  )
  dataset = corpus.open_split(context, "validation")
  found: dict[str, Any] = {}
  if config.documents:
    found.update(measure_documents(scorer, dataset, config.documents, config.stride, context.config.seed))
  if config.last_words:
    passages = last_word_passages(config, dataset, tokenizer)
    found.update(measure_last_words(scorer, passages, context.config.seed))
  return found


def measure_documents(
  scorer: TextScorer, dataset: TokenDataset, count: int, stride: int, seed: int
) -> dict[str, Any]:
  """Scores documents one by one; `count` of them at even distances, -1: all. See `measure`."""
  chosen = _spread(dataset.num_documents, count)
  bodies = [dataset.document_tokens(place)[:-1].tolist() for place in chosen]  # without the end of text
  stride = stride or scorer.tokens.max_length
  scores = score_separately(scorer, bodies, dataset.document_bytes[chosen], stride=stride)
  loss = scores.loss_interval(seed)
  return {
    "document_loss": loss.estimate,
    "document_ppl": scores.perplexity(),
    "document_bits_per_byte": scores.bits_per_byte(),
    "document_ci95": [loss.low, loss.high],
    "scored_documents": int((scores.tokens > 0).sum()),
    "document_stride": stride,
  }


def _spread(available: int, count: int) -> np.ndarray:
  count = available if count == -1 else min(count, available)
  return np.linspace(0, available - 1, count).round().astype(int)


def last_word_passages(config: Any, dataset: TokenDataset, tokenizer: Any) -> list[str]:
  """Returns the passages of the file that the config names, or passages cut from validation documents."""
  if config.last_word_file:
    return [document.text.strip() for document in documents(config.last_word_file)][: config.last_words]
  texts = (
    tokenizer.decode(dataset.document_tokens(place)[:-1].tolist()) for place in range(dataset.num_documents)
  )
  return cut_passages(texts, config.last_words, config.passage_words)


def measure_last_words(scorer: TextScorer, passages: list[str], seed: int) -> dict[str, Any]:
  """Scores the last words of passages; see `measure`."""
  scores = score_last_words(scorer, passages)
  accuracy = scores.accuracy(seed)
  return {
    "last_word_accuracy": accuracy.estimate,
    "last_word_ci95": [accuracy.low, accuracy.high],
    "last_word_ppl": scores.perplexity(),
    "last_word_passages": len(passages),
  }
