"""What sparse autoencoders are made of: selection over a batch, and JumpReLU with its gradients (test 33)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nr.models import batch_top_k
from nr.models.batch_top_k import keep_largest
from nr.models.jump_relu import heaviside, jump_relu
from nr.training import sharding

TOKENS, LATENTS = 24, 40
keep = jax.jit(keep_largest)


def expected_kept(values, count):
  """By sorting the flattened batch, ties to the first."""
  flat = np.where(values > 0, values, 0).ravel()
  order = np.argsort(-flat, kind="stable")[:count]
  kept = np.zeros_like(flat)
  kept[order] = flat[order]
  return kept.reshape(values.shape)


@pytest.mark.parametrize("values", ["normal", "ties", "few"])
@pytest.mark.parametrize("count", [0, 1, 96, TOKENS * LATENTS])
def test_33_the_largest_of_a_batch_are_kept_exactly(values, count):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(TOKENS, LATENTS)).astype(np.float32)
  x = {"normal": x, "ties": np.round(x), "few": np.where(x > 1.5, x, -x * x)}[values]
  kept, smallest = keep(x, count)
  np.testing.assert_array_equal(kept, expected_kept(x, count))
  assert (kept > 0).sum() == min(count, (x > 0).sum())
  assert smallest == (kept[kept > 0].min() if (kept > 0).any() else np.inf)


def test_33_gradients_reach_kept_entries_only():
  x = jax.random.normal(jax.random.key(0), (TOKENS, LATENTS))
  gradient = jax.grad(lambda x: (keep_largest(x, 30)[0] * 3).sum())(x)
  np.testing.assert_array_equal(gradient, np.where(keep(x, 30)[0] > 0, 3, 0))


def test_33_counts_beyond_32_bits_do_not_wrap():
  # 131,072 tokens of 32,768 latents are 2**32 entries; all marked, a 32-bit sum would be 0.
  full = jax.ShapeDtypeStruct((131_072, 32_768), jnp.bool_)
  jax.eval_shape(batch_top_k._reaches, full, jnp.int32(1))
  marked_N = np.full(131_072, 32_768, np.int64)
  low, high = (marked_N % 256).sum(), (marked_N // 256).sum()
  assert max(low, high) < 2**31 and high * 256 + low == 2**32
  some = np.random.default_rng(0).random((37, 700)) < 0.5
  count = int(some.sum())
  for wanted, reached in ((count - 1, True), (count, True), (count + 1, False), (count + 256, False)):
    assert bool(batch_top_k._reaches(jnp.asarray(some), jnp.int32(wanted))) == reached


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 1, 8), (4, 2, 1)])
def test_34_selection_over_a_mesh_is_that_of_one_device_and_moves_no_entries(shape):
  rng = np.random.default_rng(1)
  x = np.round(rng.normal(size=(TOKENS, LATENTS)), 1).astype(np.float32)  # ties across shards
  mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor", "sequence"), (*shape, 1))))
  placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")))
  with sharding.context(mesh):
    compiled = jax.jit(keep_largest, static_argnums=1).lower(placed, 96).compile()
    kept, smallest = compiled(placed)
  np.testing.assert_array_equal(kept, expected_kept(x, 96))
  assert smallest == kept[kept > 0].min()
  gathered = [
    line for line in compiled.as_text().splitlines() if " all-gather(" in line or " all-to-all(" in line
  ]
  # Counts of shards may travel (TOKENS x shards of them), entries never do.
  assert not any(f"[{TOKENS},{LATENTS}]" in line.split(" all-")[0] for line in gathered), gathered


def test_33_jump_relu_and_step_are_what_they_say():
  scores = jnp.asarray([[-1.0, 0.2, 0.5, 0.50001, 3.0]])
  threshold = jnp.full(5, 0.5)
  assert jump_relu(scores, threshold, 0.1).tolist() == jnp.where(scores > 0.5, scores, 0).tolist()
  assert heaviside(scores, threshold, 0.1).tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("bandwidth", [0.5, 0.2])
def test_33_straight_through_gradients_equal_the_formulas_inside_and_outside_the_band(bandwidth):
  rng = np.random.default_rng(2)
  threshold = rng.uniform(0.1, 1, LATENTS).astype(np.float32)
  offsets = np.linspace(-1, 1, TOKENS, dtype=np.float32)[:, None] * bandwidth  # half of them inside
  scores = (threshold + offsets).astype(np.float32)
  pulled = rng.normal(size=scores.shape).astype(np.float32)
  inside = np.abs(scores - threshold) < bandwidth / 2
  assert 0.3 < inside.mean() < 0.7
  for function, factor, to_scores in (
    (jump_relu, -threshold / bandwidth, scores > threshold),
    (heaviside, -1 / bandwidth, np.zeros_like(inside)),
  ):
    total = lambda scores, threshold, f=function: (f(scores, threshold, bandwidth) * pulled).sum()  # noqa: E731
    d_scores, d_threshold = jax.grad(total, argnums=(0, 1))(jnp.asarray(scores), jnp.asarray(threshold))
    np.testing.assert_array_equal(d_scores, to_scores * pulled)
    np.testing.assert_allclose(d_threshold, (factor * inside * pulled).sum(0), rtol=1e-4, atol=1e-5)
