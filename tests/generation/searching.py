"""What tests of searches share: prompts, a chain whose state must follow the beams, and a replay of texts."""

import jax.numpy as jnp
import numpy as np

from nr.generation.decoding import pad_prompts
from nr.generation.sample import sample
from nr.generation.samplers import Replay
from nr.generation.stopping import Stop
from nr.generation.transforms.algebra import Transform, chain, column, row, transform
from tests.generation import toy

MAX_NEW, WIDTH, END = 6, 3, 11
PROMPTS = toy.random_prompts([3, 7, 5])
# Networks are slow to compile: their tests share one program a kind, with the chain's strength by row.
STRENGTH = jnp.array([0.0, 1.0, 3.0])


@transform("test_tally")
class Tally(Transform):
  """Takes `by` from the logit of a token for each time it was generated: needs its state to follow the beams."""

  by: object = row(0.0)

  def init(self, context, vocab_size):
    slots_S = jnp.arange(context.tokens_BS.shape[1])
    is_new_BS = (slots_S >= context.prompt_lengths_B[:, None]) & (slots_S < context.lengths_B[:, None])
    counts_BV = jnp.zeros((context.lengths_B.shape[0], vocab_size))
    rows_B1 = jnp.arange(counts_BV.shape[0])[:, None]
    return counts_BV.at[rows_B1, context.tokens_BS].add(is_new_BS, mode="drop")

  def apply(self, logits_BV, state, context):
    return logits_BV - column(self.by) * state

  def commit(self, state, tokens_B, context):
    return state.at[jnp.arange(tokens_B.shape[0]), tokens_B].add(1.0)


def replayed(network, tokens_BKN):
  """Returns what the sample driver says of given texts, [B, K, ...]; their prompts are padded otherwise."""
  told = sample(
    network,
    *pad_prompts([prompt for prompt in PROMPTS for _ in range(WIDTH)], 16),
    chain=chain(Tally(jnp.repeat(STRENGTH, WIDTH))),
    sampler=Replay(tokens_BKN.reshape(len(PROMPTS) * WIDTH, MAX_NEW)),
    max_new_tokens=MAX_NEW,
    stop=Stop(ids_E=[END]),
  )
  return {
    "lengths": told.lengths_R.reshape(-1, WIDTH),
    "finish": told.finish_R.reshape(-1, WIDTH),
    "log_probs": told.log_probs_RN.sum(axis=1).reshape(-1, WIDTH),
    "transformed": told.transformed_log_probs_RN.sum(axis=1).reshape(-1, WIDTH),
  }


def assert_told_alike(network, tokens_BKN, lengths_BK, finish_BK, log_probs_BK, transformed_BK):
  """A driver says of its texts what one says that is given them: states and caches were theirs."""
  told = replayed(network, tokens_BKN)
  np.testing.assert_array_equal(lengths_BK, told["lengths"])
  np.testing.assert_array_equal(finish_BK, told["finish"])
  np.testing.assert_allclose(log_probs_BK, told["log_probs"], atol=2e-5)
  np.testing.assert_allclose(transformed_BK, told["transformed"], atol=2e-5)
