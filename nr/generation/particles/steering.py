"""Steering: particles that branch into several next tokens each, of which the best and some others stay.

No text is kept twice, so a few particles cover more than independent draws would; with
at least as many particles as there are texts the result is an enumeration.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Outputs
from nr.generation.particles import resampling
from nr.generation.particles.potentials import Potential, add_twist
from nr.generation.particles.weighted_texts import Goal, Particles, Rows, prepare, read, result, settle, start
from nr.generation.stopping import DEAD_END, RUNNING, Stop
from nr.generation.transforms.algebra import IDENTITY, Transform

# Keep the draws of expansion and of selection apart from those of transforms.
# Far from positions and row ids, which fold into the same keys.
EXPANSION, SELECTION = 2**31 + 7927, 2**31 + 7933


class _Loop(NamedTuple):
  step: jax.Array
  cache: Any
  rows: Rows
  log_weights_BK: jax.Array
  sizes_BN: jax.Array
  is_resampled_BN: jax.Array


def steer(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None,
  key: jax.Array,
  *,
  potential: Potential,
  chain: Transform = IDENTITY,
  num_particles: int,
  num_branches: int | None = None,
  max_new_tokens: int,
  stop: Stop | None = None,
  row_ids_B: jax.Array | None = None,
) -> Particles:
  """Draws weighted texts of p * phi without replacement, by branching and optimal resampling.

  Each running particle branches into next tokens weighted by p * psi, each finished one
  into itself; of all branches of a prompt `num_particles` stay by
  `resampling.optimal`, which keeps the heavy ones for certain. Weights stay proper:
  the estimate of Z is unbiased, as that of `particle_filter`, of which the arguments
  not named here are.

  Args:
    potential: phi.
    num_particles: K texts of each prompt; static.
    num_branches: tokens that each particle branches into, chosen by
      `resampling.optimal` too; static. None: all of the vocabulary, at the cost of
      sorting K * V weights a step.

  Returns:
    Particles. `is_resampled_BN` says when branches were dropped. Slots that no branch
    was left for have weight 0 and finish DEAD_END.

  Raises:
    ValueError: what `particle_filter` refuses, or fewer than one branch.

  Source: SMC steering, arXiv:2306.03081, with the resampling of Fearnhead and Clifford
  (2003); that branches of a particle are distinct tokens is our choice.
  """
  if num_branches is not None and num_branches < 1:
    raise ValueError(f"num_branches={num_branches}: give at least 1, or None for the whole vocabulary")
  goal, prompts_BP, valid_BP = prepare(
    model, prompts_BP, valid_BP, potential, chain, IDENTITY, num_particles, max_new_tokens, stop
  )
  keys_R = decoding.row_keys(key, row_ids_B, prompts_BP.shape[0], num_particles)
  branches = min(num_branches or model.vocab_size, model.vocab_size)
  settings = dict(size=num_particles, branches=branches, max_new_tokens=max_new_tokens)
  return _run(model, goal, prompts_BP, valid_BP, keys_R, **settings)


@functools.partial(jax.jit, static_argnames=("size", "branches", "max_new_tokens"))
def _run(model, goal, prompts_BP, valid_BP, keys_R, *, size, branches, max_new_tokens):
  """Reads the prompts and branches until every particle has ended."""
  batch = prompts_BP.shape[0]
  cache, outputs, rows, log_final_R = start(model, goal, prompts_BP, valid_BP, keys_R, max_new_tokens, size)
  rows_R = jnp.repeat(jnp.arange(batch), size)
  model, goal = model.take(rows_R), goal.take(rows_R)
  # One particle with all of the weight: copies of it would branch into the same texts.
  is_first_BK = jnp.broadcast_to(jnp.arange(size) == 0, (batch, size))
  log_weights_BK = jnp.where(is_first_BK, log_final_R.reshape(batch, size) + jnp.log(size), -jnp.inf)
  rows = rows._replace(finish_R=jnp.where(is_first_BK.reshape(-1), rows.finish_R, DEAD_END))
  empty_BN = jnp.zeros((batch, max_new_tokens))
  loop = _Loop(jnp.int32(0), cache, rows, log_weights_BK, empty_BN, empty_BN > 0)

  def advance(loop: _Loop) -> _Loop:
    outputs, cache = read(model, loop.rows, loop.cache)
    return _branch(model, goal, branches, loop._replace(cache=cache), outputs)

  loop = jax.lax.while_loop(
    lambda loop: (loop.step < max_new_tokens) & (loop.rows.finish_R == RUNNING).any(),
    advance,
    _branch(model, goal, branches, loop, outputs),
  )
  history = (loop.sizes_BN, loop.is_resampled_BN, loop.step - 1)
  return result(loop.rows, loop.log_weights_BK, goal.stop, max_new_tokens, *history)


def _branch(model: LanguageModel, goal: Goal, branches: int, loop: _Loop, outputs: Outputs) -> _Loop:
  """Branches every particle and keeps as many branches as there were particles."""
  rows, (batch, size) = loop.rows, loop.log_weights_BK.shape
  is_running_R = rows.finish_R == RUNNING
  was_open_B = is_running_R.reshape(batch, size).any(axis=1)
  formed = decoding.form_law(goal.law, rows.law, outputs, rows.context)
  twist_RV = goal.potential.log_twist(formed.transformed_BV, rows.potential, formed.context)
  target_RV = add_twist(formed.transformed_BV, twist_RV)
  is_broken_R = formed.is_broken_B | ~(target_RV < jnp.inf).all(axis=1)
  target_RV = jnp.where(is_broken_R[:, None], -jnp.inf, target_RV)

  tokens_RJ, branch_RJ = _children(target_RV, branches, rows.context.step_keys(EXPANSION))
  is_first_J = jnp.arange(branches) == 0
  branch_RJ = jnp.where(is_running_R[:, None], branch_RJ, jnp.where(is_first_J, 0.0, -jnp.inf))
  candidates_BM = (loop.log_weights_BK.reshape(-1, 1) + branch_RJ).reshape(batch, size * branches)
  fold = jax.vmap(jax.random.fold_in, (0, None))
  keys_B = fold(fold(rows.context.keys_B.reshape(batch, size)[:, 0], loop.step), SELECTION)
  chosen_BK, log_weights_BK = resampling.optimal(candidates_BM, size, jax.vmap(jax.random.uniform)(keys_B))

  rows_R = (jnp.arange(batch)[:, None] * size + chosen_BK // branches).reshape(-1)
  tokens_R = tokens_RJ[rows_R, (chosen_BK % branches).reshape(-1)]
  taken, cache = rows.take(rows_R), model.fork(loop.cache, rows_R)
  formed = decoding.take(formed, rows_R)
  formed = formed._replace(context=formed.context._replace(keys_B=rows.context.keys_B))
  # The weights are those of the branches already; slots without one end here.
  left_R = jnp.where((log_weights_BK == -jnp.inf).reshape(-1), -jnp.inf, 0.0)
  moved, changes_R = settle(goal, taken, formed, None, tokens_R, left_R, is_broken_R[rows_R])
  is_empty_R = (left_R == -jnp.inf) & (moved.finish_R != RUNNING) & ~is_broken_R[rows_R]
  moved = moved._replace(finish_R=jnp.where(is_empty_R, DEAD_END, moved.finish_R))
  log_weights_BK = log_weights_BK + changes_R.reshape(batch, size)
  sizes_B = jnp.where(was_open_B, resampling.effective_sample_size(log_weights_BK), 0.0)
  is_cut_B = (candidates_BM > -jnp.inf).sum(axis=1) > size
  return _Loop(
    step=loop.step + 1,
    cache=cache,
    rows=moved,
    log_weights_BK=log_weights_BK,
    sizes_BN=loop.sizes_BN.at[:, loop.step].set(sizes_B),
    is_resampled_BN=loop.is_resampled_BN.at[:, loop.step].set(is_cut_B),
  )


def _children(target_RV: jax.Array, branches: int, keys_R: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the next tokens [R, J] that each particle branches into, and their log-weights."""
  if branches == target_RV.shape[1]:
    tokens_V = jnp.arange(branches, dtype=jnp.int32)
    return jnp.broadcast_to(tokens_V, target_RV.shape), target_RV
  return resampling.optimal(target_RV, branches, jax.vmap(jax.random.uniform)(keys_R))
