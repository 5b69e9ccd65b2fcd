"""The logit lens against the derivative of a model whose later blocks do nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.evaluation.logit_lens import logit_lens
from nr.models.transformer import Transformer
from tests.laws.cocomix_models import gpt2_spec, llama_spec


@pytest.mark.parametrize("spec", [gpt2_spec(num_layers=1), llama_spec(num_layers=1)], ids=["gpt2", "llama"])
def test_the_lens_is_the_direction_s_effect_on_an_orthogonal_stream(spec):
  model = Transformer(spec, rngs=nnx.Rngs(0))
  random = np.random.default_rng(0)
  model.final_norm.scale[...] = jnp.asarray(random.normal(1.0, 0.3, spec.model_dim), jnp.float32)
  directions = random.normal(size=(3, spec.model_dim)).astype(np.float32)
  found = np.asarray(logit_lens(model, jnp.asarray(directions)))
  assert found.shape == (3, spec.vocab_size)
  for direction, row in zip(directions, found):
    centred = direction - direction.mean() if spec.norm == "layer_norm" else direction
    stream = random.normal(size=spec.model_dim)
    if spec.norm == "layer_norm":
      stream -= stream.mean()
    stream -= centred * (stream @ centred) / (centred @ centred)
    read = lambda x: model.logits(model.final_norm(x))  # noqa: E731
    _, effect = jax.jvp(read, (jnp.asarray(stream, jnp.float32),), (jnp.asarray(direction),))
    scale = (row @ np.asarray(effect)) / (np.asarray(effect) @ np.asarray(effect))
    assert scale > 0
    np.testing.assert_allclose(row, scale * np.asarray(effect), rtol=1e-3, atol=1e-4 * np.abs(row).max())


def test_no_direction_speaks_for_no_token():
  model = Transformer(gpt2_spec(num_layers=1), rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(logit_lens(model, jnp.zeros((2, 16))), 0.0)
