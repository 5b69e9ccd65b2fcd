"""The temperature head: its size, its uniform start, selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.models import parameters
from nr.models.adaptive_decoder import AdaptiveDecoder, AdaptiveDecoderSpec, select
from nr.training import trees


def test_the_paper_s_head_has_12_599_302_parameters():
  def count(**more):
    build = lambda: AdaptiveDecoder(AdaptiveDecoderSpec(4096, 6, **more), rngs=nnx.Rngs(0))  # noqa: E731
    return trees.count(jax.eval_shape(lambda: parameters.split(build())[1]))

  assert count() == 8_390_656 + 4_196_352 + 12_294 == 12_599_302
  # The other reading of "3-layer": three hidden layers and an output layer.
  assert count(num_hidden_layers=3) == 12_599_302 + 4_196_352


def test_the_first_law_is_uniform_and_hidden_layers_are_not_dead():
  head = AdaptiveDecoder(AdaptiveDecoderSpec(8, 5, hidden_dim=16), rngs=nnx.Rngs(0))
  hidden = jax.random.normal(jax.random.key(0), (3, 7, 8))
  np.testing.assert_allclose(head(hidden), -np.log(5), rtol=1e-6)
  graphdef, params = parameters.split(head)

  def loss(params):
    return parameters.merge(graphdef, params)(hidden)[..., 0].sum()

  slopes = jax.grad(loss)(params)
  assert float(jnp.abs(slopes["layer_2"]["kernel"]).max()) > 0


def test_the_forward_pass_is_three_affine_maps_with_silu():
  spec = AdaptiveDecoderSpec(8, 5, hidden_dim=16)
  graphdef, params = parameters.split(AdaptiveDecoder(spec, rngs=nnx.Rngs(0)))
  params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  hidden = np.random.default_rng(0).normal(size=(4, 8))
  x = hidden
  for index in range(3):
    kernel, bias = (np.asarray(params[f"layer_{index}"][name], np.float64) for name in ("kernel", "bias"))
    x = x @ kernel + bias
    x = x / (1 + np.exp(-x)) if index < 2 else x
  found = parameters.merge(graphdef, params)(jnp.asarray(hidden, jnp.float32))
  expected = x - np.log(np.exp(x).sum(-1, keepdims=True))
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_selection():
  log_pi = jnp.log(jnp.asarray([[0.2, 0.4, 0.4], [0.7, 0.2, 0.1]]))
  assert select(log_pi).tolist() == [1, 0]
  drawn = select(jnp.broadcast_to(log_pi[1], (20_000, 3)), jax.random.key(0), selection="sample")
  np.testing.assert_allclose(np.bincount(drawn) / 20_000, [0.7, 0.2, 0.1], atol=0.015)
  with pytest.raises(ValueError, match="key=None"):
    select(log_pi, selection="sample")
  with pytest.raises(ValueError, match="selection='gready'"):
    select(log_pi, selection="gready")


def test_invalid_settings_are_refused():
  for settings, message in (
    (dict(model_dim=0, num_settings=2), "model_dim=0"),
    (dict(model_dim=4, num_settings=1), "num_settings=1"),
    (dict(model_dim=4, num_settings=2, num_hidden_layers=-1), "num_hidden_layers=-1"),
  ):
    with pytest.raises(ValueError, match=message):
      AdaptiveDecoderSpec(**settings)
