"""Loss and gradients on every mesh equal those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.models import parameters
from nr.models.transformer import Transformer, TransformerSpec
from nr.objectives.language_modeling import next_token_loss
from nr.training import sharding

# Every size is divided by 8, so that each axis can be the one that splits.
SIZES = dict(vocab_size=64, num_layers=2, model_dim=32, num_heads=8, mlp_dim=64, init_std=0.2)
SPECS = {
  "gpt2": TransformerSpec.gpt2(**SIZES, max_length=16),
  "llama": TransformerSpec.llama(**SIZES, attention="dot_product", remat="full"),
}
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 2, 4)]
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
SEGMENTS = np.where(np.arange(12) < np.arange(8)[:, None], 1, 2).astype(np.int32)


def build(family):
  return Transformer(SPECS[family], rngs=nnx.Rngs(0))


def make_step(family):
  graphdef, params = parameters.split(build(family))

  def loss(params, tokens, segments):
    model = parameters.merge(graphdef, params)
    hidden = model.hidden(tokens, segment_ids_BL=segments)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)
    targets = jnp.roll(tokens, -1, axis=1)
    return next_token_loss(hidden, model.unembedding_VD, targets, weights, chunk_size=32).mean()

  return params, jax.value_and_grad(loss)


@functools.cache
def on_one_device(family):
  params, step = make_step(family)
  return jax.device_get(jax.jit(step)(params, TOKENS, SEGMENTS))


@pytest.mark.parametrize("family", list(SPECS))
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_loss_and_gradients_equal_one_device(family, shape):
  mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), shape), sequence=1))
  params, step = make_step(family)
  placed = sharding.shardings(parameters.logical_axes(lambda: build(family)), mesh, params)
  params = jax.device_put(params, placed)
  batch = sharding.put_batch({"tokens": TOKENS, "segments": SEGMENTS}, mesh)
  with sharding.context(mesh):
    compiled = jax.jit(step, out_shardings=(None, placed))
    loss, gradient = compiled(params, batch["tokens"], batch["segments"])
  expected_loss, expected = on_one_device(family)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  for actual, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
    np.testing.assert_allclose(actual, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))
  if shape[1] * shape[2] == 8:
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
