"""Loss, perplexity and bits per byte of a language model, document by document.

Two ways to read a split: as one stream cut into windows, as training reads it (`score_documents`),
or each document by itself in windows that slide, as evaluation harnesses do (`score_separately`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nr.evaluation.log_likelihoods import TextScorer
from nr.evaluation.statistics import Interval, bootstrap_ratio


class DocumentScores(NamedTuple):
  """Negative log-likelihood of each document of a split.

  Attributes:
    nll: [documents] float64, nats summed over the scored tokens.
    tokens: [documents] number of scored tokens.
    bytes: [documents] UTF-8 bytes of the text.
  """

  nll: np.ndarray
  tokens: np.ndarray
  bytes: np.ndarray

  def loss(self) -> float:
    """Nats a token."""
    return float(self.nll.sum() / self.tokens.sum())

  def perplexity(self) -> float:
    """exp of the loss: depends on the tokenizer, unlike bits per byte."""
    return math.exp(self.loss())

  def bits_per_byte(self) -> float:
    """Bits a UTF-8 byte of text, comparable between tokenizers."""
    return float(self.nll.sum() / math.log(2) / self.bytes.sum())

  def loss_interval(self, seed: int) -> Interval:
    """Loss with its 95 % document-bootstrap interval, nats a token."""
    return bootstrap_ratio(self.nll, self.tokens, seed=seed)


def score_documents(
  token_nll: Callable[[Mapping[str, Any]], Any],
  batches: Iterable[Mapping[str, np.ndarray]],
  document_bytes: np.ndarray,
  *,
  total: int | None = None,
  description: str = "scoring",
) -> DocumentScores:
  """Adds up negative log-likelihoods by document.

  Args:
    token_nll: batch -> [B, L] float32 nats of each target.
    batches: dictionaries with `weights` [B, L] (0 = not scored) and `documents`
      [B, L], the index of the document that each target belongs to.
    document_bytes: [documents] UTF-8 bytes of each document.
    total: number of batches, for the progress bar.
    description: its title.

  Returns:
    Scores of every document; zero tokens where nothing was scored.
  """
  count = len(document_bytes)
  nll, tokens = np.zeros(count), np.zeros(count)
  for batch in tqdm(batches, total=total, desc=description, unit="batch", leave=False):
    scored = np.asarray(batch["weights"]) > 0
    values = np.asarray(token_nll(batch), np.float64)[scored]
    documents = np.asarray(batch["documents"])[scored]
    nll += np.bincount(documents, values, minlength=count)
    tokens += np.bincount(documents, minlength=count)
  return DocumentScores(nll, tokens, np.asarray(document_bytes, np.int64))


def score_separately(
  scorer: TextScorer,
  documents: Sequence[Sequence[int]],
  document_bytes: np.ndarray,
  *,
  stride: int | None = None,
  description: str = "scoring documents",
) -> DocumentScores:
  """Scores every token of each document, which begins behind the scorer's prefix and sees no other.

  Args:
    scorer: of the model.
    documents: token ids, without the end of text; those without any are not scored.
    document_bytes: [documents] UTF-8 bytes of each.
    stride: tokens scored by each window but the first, the others are context; None: disjoint windows.
    description: title of the progress bar.
  """
  scores = scorer.token_lists(documents, stride, description)
  nll = np.array([-each.total() for each in scores], np.float64)
  tokens = np.array([len(each.log_probs_M) for each in scores], np.float64)
  return DocumentScores(nll, tokens, np.asarray(document_bytes, np.int64))


def loss_difference_interval(first: DocumentScores, second: DocumentScores, seed: int) -> Interval:
  """Interval of loss(first) - loss(second) on the same documents, nats a token.

  Pairing by document removes the variance between documents, which is far
  larger than the difference between two models.

  Raises:
    ValueError: the two did not score the same tokens.
  """
  if not np.array_equal(first.tokens, second.tokens):
    raise ValueError("loss_difference_interval: the two models were scored on different tokens")
  return bootstrap_ratio(first.nll - second.nll, first.tokens, seed=seed)
