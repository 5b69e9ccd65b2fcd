"""Small networks read from the start each time: what cached decoding is compared with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.generation import toy


@functools.cache
def network(kind: str, seed: int = 0):
  # One layer, but two where concepts come in between.
  return toy.tiny_network(kind, seed, network=dict(offers_hidden=True), num_layers=1 + (kind == "concepts"))


@functools.cache
def reader(kind: str, seed: int):
  """Returns a compiled function from a text to its states and logits, without a cache."""
  model = network(kind, seed).model()

  @jax.jit
  def read(tokens_1L):
    states = model.hidden(tokens_1L)
    return states[0], model.logits(states)[0]

  def padded(text):
    states, logits = read(jnp.asarray([[*text, *(0,) * (32 - len(text))]]))
    return np.asarray(states[: len(text)], np.float64), np.asarray(logits[: len(text)], np.float64)

  return padded


def log_softmax(logits):
  return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
