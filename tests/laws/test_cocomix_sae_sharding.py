"""The sparse autoencoder on eight simulated devices equals one device (tests 17 and 34)."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nr.models import parameters
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec
from nr.models.top_k import IMPLEMENTATIONS, top_k
from nr.objectives import sparse_coding
from nr.objectives.sparse_coding_variants import sparse_coding_loss
from nr.training import sharding

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8), (2, 1, 4)]
WIDTH, LATENTS, TOKENS = 16, 64, 32


def make_mesh(data, fsdp, tensor):
  return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": 1})


def build(arch="topk"):
  options = {"k_aux": 8} if arch in ("topk", "batchtopk", "matryoshka") else {}
  options |= {"bandwidth": 0.5, "initial_threshold": 0.2} if arch == "jumprelu" else {}
  spec = SparseAutoencoderSpec(WIDTH, LATENTS, 4, dead_tokens=100, arch=arch, **options)

  def make():
    return SparseAutoencoder(spec, rngs=nnx.Rngs(0))

  graphdef, params = parameters.split(make())
  extra = sparse_coding.init_extra(spec, 1.3)
  # Counters that make most latents dead, so that the auxiliary loss takes part.
  extra["tokens_since_fired"] = extra["tokens_since_fired"].at[::2].set(5000)
  return graphdef, params, extra, (parameters.logical_axes(make), sparse_coding.extra_axes(spec))


def loss_and_gradients(graphdef):
  def run(params, extra, x, weights):
    def loss(params):
      output = sparse_coding_loss(parameters.merge(graphdef, params), extra, x, weights)
      return output.loss.mean(), output

    (_, output), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return output, gradients

  return run


def check_mesh(arch, sizes):
  graphdef, params, extra, (axes, extra_axes) = build(arch)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
  weights = (np.arange(TOKENS) < 29).astype(np.float32)
  run = loss_and_gradients(graphdef)
  expected = jax.jit(run)(params, extra, x, weights)
  mesh = make_mesh(*sizes)
  placed = jax.device_put(params, sharding.shardings(axes, mesh, params))
  counters = jax.device_put(extra, sharding.shardings(extra_axes, mesh, extra))
  batch = sharding.put_batch({"activations": x, "weights": weights}, mesh)
  with sharding.context(mesh):
    found = jax.jit(run)(placed, counters, batch["activations"], batch["weights"])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)
  np.testing.assert_array_equal(found[0].statistics.fired_C, expected[0].statistics.fired_C)
  return expected


@pytest.mark.parametrize("sizes", MESHES)
def test_17_sharded_loss_and_gradients_equal_one_device(sizes):
  assert check_mesh("topk", sizes)[0].metrics["auxiliary"].mean() > 0


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka", "jumprelu", "gated", "relu"])
def test_34_every_architecture_sharded_over_latents_equals_unsharded(arch):
  output, gradients = check_mesh(arch, (2, 1, 4))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
  if arch in ("batchtopk", "matryoshka"):
    assert output.metrics["auxiliary"].mean() > 0
    assert output.metrics["l0"].total == 4 * 29  # of the global batch, not of each device's


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_17_parameter_bytes_a_device_fall(sizes):
  _, params, _, (axes, _) = build()
  mesh = make_mesh(*sizes)
  placed = jax.device_put(params, sharding.shardings(axes, mesh, params))
  ways = sizes[1] * sizes[2]
  for name in ("encoder", "decoder"):
    kernel = placed[name]["kernel"]
    assert kernel.addressable_shards[0].data.nbytes * ways == kernel.nbytes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_34_top_k_sharded_over_latents_equals_unsharded(implementation):
  rng = np.random.default_rng(1)
  # Few different values: many ties, also across shards.
  scores = rng.integers(-5, 5, (TOKENS, 1024)).astype(np.float32)
  expected = jax.lax.top_k(scores, 16)
  mesh = make_mesh(2, 1, 4)
  placed = jax.device_put(scores, NamedSharding(mesh, PartitionSpec("data", "tensor")))
  with sharding.context(mesh):
    found = jax.jit(lambda scores: top_k(scores, 16, implementation=implementation))(placed)
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_array_equal(found[1], expected[1])
