"""Small concept models and inputs that the law tests share."""

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models.concept_mixing import ConceptMixingSpec, ConceptMixingTransformer
from nr.models.parameters import merge, split
from nr.models.transformer import AttentionInputs, TransformerSpec

VOCAB, LENGTH, CONCEPTS = 97, 10, 48


def gpt2_spec(**settings):
  sizes = dict(vocab_size=VOCAB, num_layers=3, model_dim=16, num_heads=2, max_length=32)
  return TransformerSpec.gpt2(**(sizes | settings))


def llama_spec(**settings):
  sizes = dict(vocab_size=VOCAB, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, max_length=32)
  return TransformerSpec.llama(**(sizes | settings))


def concept_spec(**settings):
  return ConceptMixingSpec(**(dict(insert_at=1, num_concepts=CONCEPTS, top_k=6, concept_chunk=20) | settings))


def make_model(spec=None, concepts=None, seed=0):
  """A model whose zero-initialised parameters are random too, so that none is untested."""
  model = ConceptMixingTransformer(spec or gpt2_spec(), concepts or concept_spec(), rngs=nnx.Rngs(seed))
  graphdef, params = split(model)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
  return merge(graphdef, jax.tree.unflatten(tree, noisy))


def make_tokens(batch=2, length=LENGTH, seed=3):
  return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


def make_labels(batch=2, length=LENGTH, num_labels=4, seed=4):
  """Distinct labels at every position; none at the last, one missing at the first."""
  scores = jax.random.uniform(jax.random.key(seed), (batch, length, CONCEPTS))
  labels = jax.lax.top_k(scores, num_labels)[1]
  return labels.at[:, -1].set(65535).at[:, 0, 0].set(65535)


def attention_inputs(tokens, segment_ids=None):
  batch, length = tokens.shape
  return AttentionInputs(jnp.broadcast_to(jnp.arange(length), (batch, length)), segment_ids)


def stream_at_insertion(model, tokens):
  """h: the stream that enters block `insert_at` before concepts are inserted."""
  x = model.transformer.embed(tokens)
  insert_at = model.concept_spec.insert_at
  return model.transformer.run_blocks(x, 0, insert_at, attention=attention_inputs(tokens))[0]
