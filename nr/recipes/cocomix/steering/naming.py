"""What a concept is: where it fires, what follows, what its directions speak for, how the student uses it.

Four readings, none of which needs a judge, side by side in one record for each concept:

    contexts             the strongest activations of the teacher's latent in held-out text
    fires_on             tokens that carry its activation
    followed_by          tokens that follow its firings more than they follow others (log odds, z-scores)
    teacher_lens         its decoder row, student_lens: its row of the compression, both through the model's own
                         output head (`nr.evaluation.logit_lens`)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from nr.data.token_dataset import TokenDataset
from nr.data.tokenizers import Tokenizer
from nr.data.windows import ordered_batches
from nr.evaluation.contrast_sets import distinctive
from nr.evaluation.logit_lens import logit_lens
from nr.models import parameters
from nr.models.concept_head import ConceptPrediction
from nr.recipes.cocomix import contexts, language_model
from nr.recipes.cocomix.contexts import Firings
from nr.recipes.stages import StageContext
from nr.training.model_files import Model

SHOWN = 8
"""Tokens listed in each reading."""

SURE = 2.0
"""z-score from which a following token counts as distinctive."""

NEAR_ZERO = 1e-2
"""Norm below which the paper calls a row of the compression unused (section 3.3)."""


class StudentUse(NamedTuple):
  """What a student makes of its concepts on held-out text.

  Attributes:
    frequency_C: share of tokens at which it selects each.
    largest_C: largest coefficient that each was mixed with; 0 where it was never selected.
  """

  frequency_C: np.ndarray
  largest_C: np.ndarray


def find_use(context: StageContext, student: Model, batch_size: int, max_windows: int) -> StudentUse:
  """Runs the student's concept path over the first `max_windows` validation windows (0: all)."""
  source = contexts.first_windows(language_model.window_source(context, "validation"), max_windows)
  batches = ordered_batches(source, batch_size)

  @jax.jit
  def predict(params: Any, batch: Any) -> ConceptPrediction:
    model = parameters.merge(student.graphdef, params)
    return model.concepts.predict(stream_at_insertion(model, batch))

  num_concepts = student.spec.concepts.num_concepts
  counts_C, largest_C, left = np.zeros(num_concepts), np.zeros(num_concepts), len(source)
  for batch in tqdm(batches, total=len(batches), desc="student's concepts", unit="batch", leave=False):
    found = predict(student.params, batch)
    rows = min(left, len(found.values_BLK))  # the last batch is filled up
    indices, values = (np.asarray(each)[:rows].reshape(-1) for each in (found.indices_BLK, found.values_BLK))
    counts_C += np.bincount(indices, minlength=num_concepts)
    np.maximum.at(largest_C, indices, values)
    left -= rows
  return StudentUse(counts_C / (len(source) * source.length), largest_C)


def stream_at_insertion(model: Any, batch: Any) -> jax.Array:
  """Returns the stream [B, L, D] that a student predicts concepts from, without running what follows."""
  x_BLD, attention = model.transformer.enter(
    batch["tokens"], batch.get("positions"), batch.get("segment_ids")
  )
  return model.transformer.run_blocks(x_BLD, 0, model.concept_spec.insert_at, attention=attention)[0]


class Names(NamedTuple):
  """What names are read from.

  Attributes:
    dataset: the validation split.
    tokenizer: its tokenizer.
    firings: every activation of every latent on its first windows.
    use: what the student makes of its concepts there.
    label_counts_C: how often each latent is a label.
    teacher_lens_CV: logits of the teacher's decoder rows.
    student_lens_CV: logits of the student's compression rows.
    concepts: the concepts [C] whose rows the two lenses hold, in their order.
  """

  dataset: TokenDataset
  tokenizer: Tokenizer
  firings: Firings
  use: StudentUse
  label_counts_C: np.ndarray
  teacher_lens_CV: np.ndarray
  student_lens_CV: np.ndarray
  concepts: list[int]

  def describe(self, concept: int, num_contexts: int, context_tokens: int) -> dict[str, Any]:
    """Returns the record of one concept."""
    row = self.concepts.index(concept)
    places = self.firings.strongest(concept, num_contexts, apart=context_tokens)
    show = lambda place: contexts.context_text(self.dataset, self.tokenizer, place, context_tokens)  # noqa: E731
    return {
      "concept": concept,
      "label_count": int(self.label_counts_C[concept]),
      "firing_frequency": float(self.firings.frequency()[concept]),
      "selected_frequency": float(self.use.frequency_C[concept]),
      "largest_activation": self.firings.largest(concept),
      "largest_coefficient": float(self.use.largest_C[concept]),
      "contexts": [{"value": value, "text": show(place)} for place, value in places],
      "fires_on": fires_on(self.firings, concept, self.dataset, self.tokenizer),
      "followed_by": followed_by(self.firings, concept, self.dataset, self.tokenizer),
      "teacher_lens": top_tokens(self.teacher_lens_CV[row], self.tokenizer),
      "student_lens": top_tokens(self.student_lens_CV[row], self.tokenizer),
    }


def lenses(
  teacher: Model, autoencoder: Model, student: Model, concepts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the logits [C, V] of some concepts' directions: the teacher's decoder rows, the student's rows of W."""
  teacher_module = parameters.merge(teacher.graphdef, teacher.params)
  student_module = parameters.merge(student.graphdef, student.params)
  rows = np.asarray(concepts)
  decoder_CD = parameters.merge(autoencoder.graphdef, autoencoder.params).decoder_rows()[rows]
  compression_CD = student_module.concepts.compression.kernel[...][rows]
  return (
    np.asarray(logit_lens(teacher_module, decoder_CD)),
    np.asarray(logit_lens(student_module.transformer, compression_CD)),
  )


def top_tokens(scores_V: np.ndarray, tokenizer: Tokenizer, count: int = SHOWN) -> list[dict[str, Any]]:
  """Returns the tokens with the highest scores."""
  order = np.argsort(-scores_V, kind="stable")[:count]
  return [{"token": tokenizer.decode([int(token)]), "score": float(scores_V[token])} for token in order]


def fires_on(
  firings: Firings, concept: int, dataset: TokenDataset, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
  """Returns the tokens on which a latent fires, by the share of its activation that falls on each."""
  places, values = firings.of(concept)
  mass_V = np.bincount(dataset.tokens[places], weights=values, minlength=tokenizer.vocab_size)
  found = top_tokens(mass_V / max(mass_V.sum(), 1e-30), tokenizer)
  return [row for row in found if row["score"] > 0]


def followed_by(
  firings: Firings, concept: int, dataset: TokenDataset, tokenizer: Tokenizer, count: int = SHOWN
) -> list[dict[str, Any]]:
  """Returns the tokens that most distinctively follow a latent's firings, with z-scores above `SURE`."""
  stop = min(firings.tokens, dataset.num_tokens - 1)
  places = firings.of(concept)[0]
  after_V = np.bincount(dataset.tokens[places[places < stop] + 1], minlength=tokenizer.vocab_size)
  all_V = np.bincount(dataset.tokens[1 : stop + 1], minlength=tokenizer.vocab_size)
  found = top_tokens(distinctive(after_V, all_V - after_V), tokenizer, count)
  return [row for row in found if row["score"] > SURE]


def keywords_of(
  firings: Firings, concept: int, dataset: TokenDataset, tokenizer: Tokenizer, count: int
) -> list[str]:
  """Returns up to `count` texts that a judge of the concept looks for: what distinctively follows its firings.

  A concept is predicted for the sake of the next token, so what follows its firings is what steering it should
  bring about. Left out are tokens that are no part of a word (spaces, incomplete characters), and one or two letters
  from inside a word, which very many words hold.
  """
  found = followed_by(firings, concept, dataset, tokenizer, 4 * count)
  return [row["token"] for row in found if _is_telling(row["token"])][:count]


def _is_telling(token: str) -> bool:
  is_word = len(token.split()) == 1 and "\ufffd" not in token
  return is_word and (token[0].isspace() or len(token) > 2 or not token.isalpha())


def compression_norms(student: Model, use: StudentUse, decay_left: float) -> dict[str, float]:
  """Returns how long the rows of the student's compression are.

  The paper finds 5.8 % of the rows of its 386M model near zero and reads them as ignored concepts. A row that is
  never selected has no gradient and shrinks by weight decay alone, which is reported beside it.

  Args:
    student: the model.
    use: how often it selects each concept.
    decay_left: what weight decay alone leaves of a row, as a factor.
  """
  kernel_CD = parameters.merge(student.graphdef, student.params).concepts.compression.kernel[...]
  norms_C = np.linalg.norm(np.asarray(kernel_CD, np.float32), axis=-1)
  start = student.spec.transformer.init_std * student.spec.transformer.model_dim**0.5
  return {
    "median_norm": float(np.median(norms_C)),
    "near_zero": float((norms_C < NEAR_ZERO).mean()),
    "never_selected": float((use.frequency_C == 0).mean()),
    "initial_norm": float(start),
    "norm_left_by_decay_alone": float(start * decay_left),
  }
