"""Cutting a transformer in two and joining it again changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.models import parameters
from nr.models.residual_tap import TapInputs, activations_at, hidden_from
from nr.models.transformer import Transformer, TransformerSpec

FAMILIES = {
  "gpt2": TransformerSpec.gpt2,
  "llama": TransformerSpec.llama,
}


def build(family, layers):
  sizes = {"vocab_size": 23, "num_layers": 3, "model_dim": 16, "num_heads": 2, "max_length": 10}
  return Transformer(FAMILIES[family](**sizes, layers=layers), rngs=nnx.Rngs(0))


def inputs(packed):
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 10)))
  segments = jnp.asarray([[1] * 4 + [2] * 6, [1] * 7 + [0] * 3]) if packed else None
  return TapInputs(tokens, segment_ids_BL=segments)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family, layers", [("gpt2", "scan"), ("llama", "unroll")])
def test_both_halves_give_the_whole(family, layers, packed):
  model, given = build(family, layers), inputs(packed)
  whole = model.hidden(given.tokens_BL, segment_ids_BL=given.segment_ids_BL)
  for layer in range(3):
    found = hidden_from(model, activations_at(model, given, layer), given, layer)
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_gradient_at_the_tap_needs_no_gradient_of_parameters():
  # 21 and the cost of labels: one backward pass from the top down to the tap, and no further.
  model, given = build("gpt2", "unroll"), inputs(False)
  graphdef, params = parameters.split(model)
  weights_BL = jnp.ones((2, 10)).at[:, -1].set(0)

  def loss(params, x_BLD, layer):
    model = parameters.merge(graphdef, params)
    final_BLD = hidden_from(model, x_BLD, given, layer)
    return ((final_BLD @ jnp.arange(16.0)) * weights_BL).sum()

  def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]

  costs = {}
  for layer in (0, 1):
    x_BLD = activations_at(model, given, layer)
    only_tap = lambda p, x, layer=layer: jax.grad(loss, 1)(p, x, layer)  # noqa: E731
    with_parameters = lambda p, x, layer=layer: jax.grad(loss, (0, 1))(p, x, layer)  # noqa: E731
    costs[layer] = flops(only_tap, params, x_BLD)
    assert costs[layer] < 0.8 * flops(with_parameters, params, x_BLD)
  assert costs[1] < 0.6 * costs[0]
  gradient_BLD = jax.jit(only_tap)(params, x_BLD)
  np.testing.assert_array_equal(gradient_BLD[:, -1], 0)
  assert (jnp.abs(gradient_BLD[:, :-1]).max(-1) > 1e-3).all()


def test_layer_outside_the_model_is_refused():
  with pytest.raises(ValueError, match="layer=3 is outside the model: choose 0..2"):
    activations_at(build("gpt2", "scan"), inputs(False), 3)
