"""Trees of parameters: names of axes, and layers stacked and taken apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nr.models import parameters
from nr.models.transformer import Transformer, TransformerSpec

SPEC = TransformerSpec.gpt2(
  vocab_size=11, num_layers=3, model_dim=8, num_heads=2, max_length=8, layers="unroll"
)


def make_params():
  return parameters.split(Transformer(SPEC, rngs=nnx.Rngs(0)))[1]


def assert_equal(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_split_and_merge_are_inverse():
  model = Transformer(SPEC, rngs=nnx.Rngs(0))
  graphdef, params = parameters.split(model)
  assert list(params["blocks"]) == [0, 1, 2]
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
  assert_equal(parameters.split(parameters.merge(graphdef, params))[1], params)


def test_stacking_round_trip_keeps_values_and_layer_order():
  params = make_params()
  stacked = parameters.stack_layers(params)
  assert stacked["blocks"]["mlp"]["up"]["kernel"].shape == (3, 8, 32)
  for layer in range(3):
    np.testing.assert_array_equal(
      stacked["blocks"]["mlp"]["up"]["kernel"][layer], params["blocks"][layer]["mlp"]["up"]["kernel"]
    )
  assert_equal(parameters.unstack_layers(stacked), params)
  assert_equal(parameters.stack_layers(stacked), stacked)


def test_stacking_reaches_into_a_masked_adamw_state():
  params = {"transformer": make_params(), "concepts": {"bias": jnp.ones(2)}}
  is_trained = jax.tree.map_with_path(lambda path, _: "mlp" in str(path), params)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.adamw(1e-3, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)), is_trained),
  )
  state = optimizer.init(params)
  gradients = jax.tree.map(jnp.ones_like, params)
  _, state = optimizer.update(gradients, state, params)
  stacked = parameters.stack_layers(state)
  shapes = {leaf.shape for leaf in jax.tree.leaves(stacked)}
  assert (3, 8, 32) in shapes and (8, 32) not in shapes
  leaves = jax.tree.leaves(stacked, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
  assert any(isinstance(leaf, optax.MaskedNode) for leaf in leaves)
  assert_equal(parameters.unstack_layers(stacked), state)


def test_stacking_works_on_shapes_numpy_arrays_and_names():
  params = make_params()
  shapes = jax.eval_shape(lambda: params)
  assert parameters.stack_layers(shapes)["blocks"]["mlp"]["up"]["kernel"].shape == (3, 8, 32)
  again = parameters.unstack_layers(parameters.stack_layers(shapes))
  assert jax.tree.structure(again) == jax.tree.structure(params)
  arrays = jax.tree.map(np.asarray, params)
  assert isinstance(parameters.stack_layers(arrays)["blocks"]["mlp"]["up"]["kernel"], np.ndarray)
  names = parameters.logical_axes(lambda: Transformer(SPEC, rngs=nnx.Rngs(0)))
  stacked = parameters.stack_layers(names)
  assert stacked["blocks"]["mlp"]["up"]["kernel"] == ("layers", "embed", "mlp")
  assert parameters.unstack_layers(stacked, 3) == names


def test_unstacking_refuses_what_it_cannot_count():
  with pytest.raises(ValueError, match=r"leading axes \[2, 3\]"):
    parameters.unstack_layers({"blocks": {"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}})
  with pytest.raises(ValueError, match="num_layers=None"):
    parameters.unstack_layers({"blocks": {"a": optax.MaskedNode()}})
  assert parameters.unstack_layers({"other": 1}) == {"other": 1}


def test_a_parameter_without_names_is_an_error():
  class Nameless(nnx.Module):
    def __init__(self):
      self.weight = nnx.Param(jnp.ones(2))

  with pytest.raises(ValueError, match="parameter 'weight' has no logical axes"):
    parameters.logical_axes(Nameless)
  with pytest.raises(ValueError, match="give one name for each of the 2 axes"):
    parameters.parameter(jax.random.key(0), jax.nn.initializers.zeros, (2, 3), ("embed",))


def test_naming_axes_makes_no_arrays():
  huge = TransformerSpec.llama(vocab_size=128256, num_layers=80, model_dim=8192, num_heads=64, num_kv_heads=8)
  axes = parameters.logical_axes(lambda: Transformer(huge, rngs=nnx.Rngs(0)))
  assert axes["blocks"]["attention"]["key"]["kernel"] == ("layers", "embed", "kv_heads", "head_dim")
  assert axes["unembedding"] == ("vocab", "embed")
