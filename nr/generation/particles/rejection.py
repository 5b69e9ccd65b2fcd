"""Rejection sampling: exact independent texts of p * phi, at the price of the drafts that are thrown away.

The host draws batches of weighted texts and accepts each with probability weight /
bound. Nothing is approximate, and nothing is promised: how many drafts a text costs
is the inverse of Z / bound.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import LanguageModel
from nr.generation.particles.particle_filter import MODEL, particle_filter
from nr.generation.particles.potentials import Potential, product
from nr.generation.stopping import Stop
from nr.generation.transforms.algebra import IDENTITY, Transform

# Rounding of a weight that is as large as its bound; nats.
TOLERANCE = 1e-4
# Keeps the draws of acceptance apart from those of tokens.
# Far from positions and row ids, which fold into the same keys.
ACCEPTANCE = 2**31 + 7937

# (tokens [R, N], lengths [R], prompt of each text [R]) -> log phi [R]; NumPy arrays.
HostPotential = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Accepted(NamedTuple):
  """Independent texts of each prompt. NumPy arrays.

  Attributes:
    tokens_BGN: int32; filler behind the end, and in slots that were not filled.
    lengths_BG: int32, new tokens, the stop id included; 0 in slots that were not filled.
    log_probs_BG: float32 nats, log p of each text; 0 in slots that were not filled.
    found_B: int32, how many of the G slots were filled.
    accepted_B: int32, drafts that were accepted, those beyond G included.
    attempts_B: int32, drafts.
  """

  tokens_BGN: np.ndarray
  lengths_BG: np.ndarray
  log_probs_BG: np.ndarray
  found_B: np.ndarray
  accepted_B: np.ndarray
  attempts_B: np.ndarray

  @property
  def acceptance_rates_B(self) -> np.ndarray:
    """Returns accepted drafts over drafts: an estimate of Z / bound."""
    return self.accepted_B / self.attempts_B


def rejection_sample(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None,
  key: jax.Array,
  *,
  potential: Potential | None = None,
  log_potential: HostPotential | None = None,
  log_bound: float = 0.0,
  chain: Transform = IDENTITY,
  proposal: str | Transform = MODEL,
  num_samples: int = 1,
  drafts_per_round: int = 16,
  max_attempts: int = 256,
  max_new_tokens: int,
  stop: Stop | None = None,
  row_ids_B: jax.Array | None = None,
) -> Accepted:
  """Draws independent texts of p * phi exactly.

  Args:
    model, prompts_BP, valid_BP, key, chain, proposal, stop, row_ids_B: those of
      `particle_filter`; p is the law of the chain.
    potential: phi, or a factor of it; None: 1. Drafts end as soon as it is 0.
    log_potential: a further factor, by the host: a parser, a compiler, another program.
    log_bound: nats, at least the largest log-weight p * phi / q of any text; with the
      proposal "model", the largest log phi.
    num_samples: G texts of each prompt.
    drafts_per_round: drafts of each prompt in one call.
    max_attempts: drafts of each prompt after which to give up.
    max_new_tokens: most tokens to add.

  Raises:
    ValueError: what `particle_filter` refuses, sizes below 1, or a weight above the bound.
  """
  for field, value in dict(num_samples=num_samples, drafts_per_round=drafts_per_round).items():
    if value < 1:
      raise ValueError(f"{field}={value}: give at least 1")
  if max_attempts < num_samples:
    raise ValueError(f"max_attempts={max_attempts}: give at least num_samples={num_samples}")
  batch = np.shape(prompts_BP)[0]
  settings = dict(
    potential=product() if potential is None else potential,
    chain=chain,
    proposal=proposal,
    num_particles=drafts_per_round,
    max_new_tokens=max_new_tokens,
    stop=stop,
    threshold=0.0,
    row_ids_B=row_ids_B,
  )
  slots = (batch, num_samples)
  kept = (
    np.zeros((*slots, max_new_tokens), np.int32),
    np.zeros(slots, np.int32),
    np.zeros(slots, np.float32),
  )
  found_B, accepted_B, attempts_B = (np.zeros(batch, np.int32) for _ in range(3))
  for number in range(-(-max_attempts // drafts_per_round)):
    key_of_round = jax.random.fold_in(key, number)
    drafts = particle_filter(model, prompts_BP, valid_BP, key_of_round, **settings)
    tokens_BKN, lengths_BK = np.asarray(drafts.tokens_BKN), np.asarray(drafts.lengths_BK)
    log_weights_BK = _log_weights(drafts, tokens_BKN, lengths_BK, log_potential)
    is_accepted_BK = _accept(log_weights_BK, log_bound, key_of_round, row_ids_B)
    is_accepted_BK &= np.arange(drafts_per_round) < max_attempts - attempts_B[:, None]
    accepted_B += is_accepted_BK.sum(axis=1, dtype=np.int32)
    attempts_B += min(drafts_per_round, max_attempts - number * drafts_per_round)
    arrays = (tokens_BKN, lengths_BK, np.asarray(drafts.log_probs_BK))
    for row, which in zip(*np.nonzero(is_accepted_BK)):
      if found_B[row] < num_samples:
        for stored, new in zip(kept, arrays):
          stored[row, found_B[row]] = new[row, which]
        found_B[row] += 1
    if (found_B == num_samples).all():
      break
  return Accepted(*kept, found_B, accepted_B, attempts_B)


def _log_weights(drafts, tokens_BKN, lengths_BK, log_potential: HostPotential | None) -> np.ndarray:
  """Returns the log-weights [B, K] of drafts, the host's factor included where there is any weight."""
  log_weights_BK = np.asarray(drafts.log_weights_BK, np.float64)
  if log_potential is None:
    return log_weights_BK
  rows, which = np.nonzero(log_weights_BK > -np.inf)
  total_BK = np.full_like(log_weights_BK, -np.inf)
  if rows.size:
    factors = np.asarray(log_potential(tokens_BKN[rows, which], lengths_BK[rows, which], rows), np.float64)
    if factors.shape != rows.shape or np.isnan(factors).any():
      raise ValueError(
        f"log_potential returned shape {factors.shape}, NaN in {int(np.isnan(factors).sum())} places: "
        f"give one number for each of the {rows.size} texts, -inf for weight 0"
      )
    total_BK[rows, which] = log_weights_BK[rows, which] + factors
  return total_BK


def _accept(log_weights_BK: np.ndarray, log_bound: float, key: jax.Array, row_ids_B) -> np.ndarray:
  """Says which drafts are accepted [B, K]."""
  largest = log_weights_BK.max()
  if not largest <= log_bound + TOLERANCE:
    raise ValueError(
      f"log_bound={log_bound}: a text has log-weight {largest:.6g}; give the largest that any text can have"
    )
  batch, size = log_weights_BK.shape
  keys_B = decoding.row_keys(jax.random.fold_in(key, ACCEPTANCE), row_ids_B, batch)
  uniforms_BK = np.asarray(jax.vmap(lambda each: jax.random.uniform(each, (size,)))(keys_B), np.float64)
  return uniforms_BK < np.exp(log_weights_BK - log_bound)
