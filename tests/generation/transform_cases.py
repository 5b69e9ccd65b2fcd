"""Contexts, one-step laws and settings that the tests of transforms share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.transforms.algebra import Context


def context_of(histories, prompts=0, capacity=None) -> Context:
  """Returns the context of given token lists; `prompts` says how many tokens of each are prompt."""
  lengths = np.array([len(history) for history in histories], np.int32)
  tokens = np.zeros((len(histories), capacity or max(1, lengths.max())), np.int32)
  for row, history in enumerate(histories):
    tokens[row, : len(history)] = history
  prompts = np.broadcast_to(np.asarray(prompts, np.int32), lengths.shape)
  # Numbers of its own, which no program has to be compiled for.
  keys = jax.random.wrap_key_data(np.random.default_rng(0).integers(0, 2**32, (len(lengths), 2), np.uint32))
  return Context(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(prompts), keys)


def empty(batch: int) -> Context:
  """Returns the context of `batch` rows of which nothing was said."""
  return context_of([[]] * batch)


@jax.jit
def transformed(transform, logits_BV, context) -> jax.Array:
  """Returns what a transform makes of logits behind a history."""
  return transform.apply(logits_BV, transform.init(context, logits_BV.shape[1]), context)


@jax.jit
def each_transformed(transforms, logits, contexts) -> list[jax.Array]:
  """Returns `transformed` of several cases, all in one program."""
  return [transformed(*case) for case in zip(transforms, logits, contexts, strict=True)]


@jax.jit
def applied(transform, logits_BV, state, context) -> jax.Array:
  """Returns what a transform makes of logits in a state."""
  return transform.apply(logits_BV, state, context)


@jax.jit
def committed(transform, state, tokens_B, context, logits_BV) -> tuple:
  """Returns state and context after tokens were drawn from the transformed logits."""
  log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  transformed_BV = jax.nn.log_softmax(transform.apply(logits_BV, state, context), axis=-1)
  seen = context._replace(log_probs_BV=log_probs_BV, transformed_BV=transformed_BV)
  return transform.commit(state, tokens_B, seen), context.append(tokens_B)


def by(transform, implementation: str):
  """Returns the transform, prepared, with its threshold found in one way."""
  has_way = any(field.name == "implementation" for field in dataclasses.fields(transform))
  return (dataclasses.replace(transform, implementation=implementation) if has_way else transform).prepared()


def keep_sets(logits_BV) -> list[list[int]]:
  """Returns the ids of the tokens that are not banned, a list a row."""
  return [np.flatnonzero(row > -np.inf).tolist() for row in np.asarray(logits_BV)]
