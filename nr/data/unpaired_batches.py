"""Batches of labelled responses, each beside its own prompt with another prompt's response (KTO).

    batches = unpaired_batches(encode_labelled(...).examples, 16, (128, 256), seed=0)

KTO compares every reward with z, the mean of d = log pi - log pi_ref over prompts with responses
to *other* prompts (arXiv 2402.01306, section 4.1). Those are formed within each global batch, as
TRL does, from the very responses that are in it: response i goes to the prompt of the row behind
it. A batch holds
  tokens, targets [B, 2, L] int32, weights [B, 2, L] float32: sequence 0 is the prompt with its
    response, sequence 1 the prompt with another's; no weight where there is no other prompt,
  is_desirable [B, 1, 1] bool, pair_weights [B, 1] float32 (0 where there is no example),
  indices [B, 1] int32.

Rows of one prompt (a pool, or both sides of a pair) are never matched with each other: the step
is as wide as the batch's largest prompt has rows. Where more than half of a batch is one prompt's,
some of its rows stay without a partner, and so does an example that is alone in its batch.
"""

from collections.abc import Sequence

import numpy as np
from absl import logging

from nr.data.bad_records import DataError
from nr.data.example_batches import ExampleBatches, PlannedBatch
from nr.data.examples import EncodedExample
from nr.data.windows import Batch


def partners(prompts: Sequence[object]) -> list[int | None]:
  """Says whose response each row of a batch is given.

  Args:
    prompts: of each row; equal ones are one prompt.

  Returns:
    A row with another prompt for each row, every row at most once, or None. Where all prompts
    differ it is the row before: (x_1, y_B), (x_2, y_1), ..., as in TRL.
  """
  groups: dict[object, list[int]] = {}
  for row, prompt in enumerate(prompts):
    groups.setdefault(prompt, []).append(row)
  order = [row for rows in groups.values() for row in rows]
  step = max(map(len, groups.values()))
  found: list[int | None] = [None] * len(order)
  for place, row in enumerate(order):
    other = order[(place - step) % len(order)]
    found[row] = None if prompts[other] == prompts[row] else other
  return found


class UnpairedBatches(ExampleBatches):
  """A stream of batches with mismatched sequences; made by `unpaired_batches`."""

  def __init__(
    self,
    examples: Sequence[EncodedExample],
    batch_size: int,
    seed: int | None,
    epochs: int | None,
    process_index: int,
    process_count: int,
    *,
    lengths: tuple[int, ...],
  ):
    super().__init__(
      examples, batch_size, seed, epochs, None, process_index, process_count,
      lengths=lengths, slots=1, num_open=1, is_packed=False,
    )  # fmt: skip
    if self.num_sequences != 1 or self.num_labels != 1:
      raise DataError(
        f"examples have {self.num_sequences} sequences and {self.num_labels} labels; give single labelled "
        "responses, as encode_labelled makes them"
      )
    if batch_size < 2:
      raise DataError(
        f"batch_size={batch_size}: KTO's reference point needs other prompts; give at least 2 rows"
      )
    self.num_sequences = 2
    starts = [_response_start(example) for example in examples]
    longest = max(starts) + max(len(each.tokens[0]) - start for each, start in zip(examples, starts))
    if longest > lengths[-1]:
      logging.info(
        "unpaired batches: a prompt with another's response can have %d tokens and rows have %d; such prompts "
        "lose their oldest tokens, there only",
        longest,
        lengths[-1],
      )

  def make(self, planned: PlannedBatch) -> Batch:
    """Returns this process's rows of a planned batch; the partners are those of the global batch."""
    indices = [index for (index,) in planned.rows]
    own = [self.examples[index] for index in indices]
    prompts = [example.tokens[0][: _response_start(example)].tobytes() for example in own]
    joined = [
      self._beside(example, None if partner is None else own[partner])
      for example, partner in zip(own, partners(prompts))
    ]
    longest = max(len(ids) for example in joined for ids in example.tokens)
    length = next(length for length in self.lengths if length >= longest)
    return self._fill(planned._replace(length=length), dict(zip(indices, joined)))

  def _beside(self, own: EncodedExample, other: EncodedExample | None) -> EncodedExample:
    """Returns an example of two sequences: its own, and its prompt with another's response."""
    if other is None:
      nothing = np.zeros(1, np.int32), np.zeros(1, bool)
      return own._replace(tokens=(*own.tokens, nothing[0]), is_response=(*own.is_response, nothing[1]))
    start = _response_start(other)
    response, mask = other.tokens[0][start:], other.is_response[0][start:]
    prompt = own.tokens[0][: _response_start(own)][-(self.lengths[-1] - len(response)) :]
    return own._replace(
      tokens=(*own.tokens, np.concatenate([prompt, response])),
      is_response=(*own.is_response, np.concatenate([np.zeros(len(prompt), bool), mask])),
    )


def _response_start(example: EncodedExample) -> int:
  mask = example.is_response[0]
  return int(mask.argmax()) if mask.any() else len(mask)


def unpaired_batches(
  examples: Sequence[EncodedExample],
  batch_size: int,
  lengths: Sequence[int],
  seed: int | None,
  epochs: int | None = None,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> UnpairedBatches:
  """Returns batches with one labelled response a row, each sequence padded on the right.

  Args:
    examples: of one sequence and one label, from `nr.data.labelled_responses.encode_labelled`.
    batch_size: rows of the global batch, over all processes; at least 2.
    lengths: the lengths that a batch may have, growing; see `padded_batches`. A batch is as long
      as its mismatched sequences ask for too.
    seed: decides the order; None for the order of the records (evaluation).
    epochs: None to go on forever.
    process_index: which share to read, jax.process_index().
    process_count: number of shares, jax.process_count().

  Raises:
    DataError: other examples, a batch of one row, or as `padded_batches`.
  """
  return UnpairedBatches(
    examples, batch_size, seed, epochs, process_index, process_count, lengths=tuple(lengths)
  )
