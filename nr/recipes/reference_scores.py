"""Log-probabilities of pairs under a frozen reference, computed once before training.

    scores = reference_scores(policy, encoded.examples, batch_size=16, lengths=(128, 256))
    write_reference_scores(path, scores)
    batches = packed_batches(encoded.examples, 16, 512, seed=0, reference=read_reference_scores(path))
    method = preference_method(policy, PreferenceSpec(), reference="precomputed")

Training then holds one copy of the model and runs one forward pass less a step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nr.data.example_batches import padded_batches
from nr.data.examples import EncodedExample
from nr.data.preferences import ReferenceScore
from nr.models import parameters
from nr.training import sharding
from nr.training.policy import Policy
from nr.training.preference import score_responses


def reference_scores(
  policy: Policy,
  examples: Sequence[EncodedExample],
  *,
  batch_size: int,
  lengths: Sequence[int],
  params: Any = None,
  loss_chunk: int | None = None,
) -> dict[str, ReferenceScore]:
  """Scores the responses of pairs under the model that training begins from.

  Args:
    policy: what will be trained.
    examples: encoded pairs.
    batch_size: pairs scored at a time.
    lengths: lengths of rows, growing; see `nr.data.example_batches.padded_batches`.
    params: the policy's trained tree to score with; where it begins when None.
    loss_chunk: tokens whose logits are held at a time; None holds all of them.

  Returns:
    id -> sums of log-probabilities in nats, (chosen, rejected), with the digest of the
    tokens that they belong to.

  Raises:
    ValueError: a policy that begins from nothing.
    DataError: a pair longer than the longest row, or no pairs.
  """
  trained = policy.start if params is None else params
  if trained is None:
    raise ValueError("policy.start is None: give params, or a policy that begins from given parameters")

  @jax.jit
  def score(trained: Any, fixed: Any, batch: dict[str, jax.Array]) -> jax.Array:
    model = parameters.merge(policy.graphdef, policy.assemble(trained, fixed))
    sides = score_responses(model, batch, loss_chunk=loss_chunk)
    return jax.numpy.stack([side.policy for side in sides], axis=-1)

  found: dict[str, ReferenceScore] = {}
  for batch in padded_batches(examples, batch_size, lengths, seed=None, epochs=1):
    log_probs_BP2 = np.asarray(score(trained, policy.fixed, sharding.put_batch(batch, None)))
    for index, log_probs_2 in zip(batch["indices"][:, 0], log_probs_BP2[:, 0]):
      if index >= 0:
        example = examples[index]
        found[example.id] = ReferenceScore(example.digest, tuple(map(float, log_probs_2)))
  return found
