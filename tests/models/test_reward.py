"""The reward model: read at the last token, on disk, and trained from comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.models import parameters
from nr.models.adaptive_decoder import AdaptiveDecoderSpec
from nr.models.reward import RewardModel, RewardModelSpec, from_language_model
from nr.models.transformer import Transformer
from nr.objectives.reward_modeling import bradley_terry_loss
from nr.training.model_files import axes_of, build_model, load_model, save_model
from tests.generation.toy import tiny_spec


def reward_model(**settings):
  spec = RewardModelSpec(tiny_spec(**settings))
  return spec, RewardModel(spec, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("layers", ("scan", "unroll"))
def test_padding_changes_nothing_and_texts_are_apart(layers):
  _, model = reward_model(layers=layers)
  tokens_BL = jax.random.randint(jax.random.key(0), (3, 9), 0, 32)
  lengths_B = jnp.asarray([9, 4, 1])
  rewards_B = model(tokens_BL, lengths_B)
  for row, length in enumerate(lengths_B.tolist()):
    alone = model(tokens_BL[row : row + 1, :length])
    assert float(alone[0]) == pytest.approx(float(rewards_B[row]), abs=1e-5)
  other = jnp.where(jnp.arange(9) < lengths_B[:, None], tokens_BL, 7)
  np.testing.assert_array_equal(model(other, lengths_B), rewards_B)
  assert rewards_B.dtype == jnp.float32 and len(set(rewards_B.tolist())) == 3


def test_pairs_are_read_in_one_call():
  _, model = reward_model()
  tokens_B2L = jax.random.randint(jax.random.key(0), (2, 2, 5), 0, 32)
  lengths_B2 = jnp.asarray([[5, 3], [2, 5]])
  rewards_B2 = model(tokens_B2L, lengths_B2)
  assert rewards_B2.shape == (2, 2)
  np.testing.assert_allclose(rewards_B2[:, 1], model(tokens_B2L[:, 1], lengths_B2[:, 1]), atol=1e-6)


def test_the_reward_is_one_linear_map_of_the_last_hidden_state():
  spec, model = reward_model()
  _, params = parameters.split(model)
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 6), 0, 32)
  trunk, _ = parameters.split(Transformer(spec.transformer, rngs=nnx.Rngs(0)))
  hidden_BLD = parameters.merge(trunk, params["transformer"]).hidden(tokens_BL)
  np.testing.assert_allclose(
    model(tokens_BL), hidden_BLD[:, -1] @ params["reward"]["kernel"][:, 0], atol=1e-6
  )


@pytest.mark.parametrize("layers", ("scan", "unroll"))
def test_saved_and_loaded(tmp_path, layers):
  spec, model = reward_model(layers=layers)
  _, params = parameters.split(model)
  save_model(tmp_path / "reward", spec, params, "none")
  loaded = load_model(tmp_path / "reward")
  assert loaded.spec == spec
  tokens_BL = jnp.arange(6)[None]
  again = parameters.merge(loaded.graphdef, loaded.params)(tokens_BL)
  np.testing.assert_array_equal(again, model(tokens_BL))
  assert jax.tree.structure(
    axes_of(spec), is_leaf=lambda node: isinstance(node, tuple)
  ) == jax.tree.structure(params)


def test_a_temperature_head_is_saved_and_loaded(tmp_path):
  spec = AdaptiveDecoderSpec(8, 3, hidden_dim=4)
  graphdef, params = parameters.split(build_model(spec, jax.random.key(0)))
  save_model(tmp_path / "head", spec, params, "none")
  loaded = load_model(tmp_path / "head")
  assert loaded.spec == spec and loaded.graphdef == graphdef
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_the_trunk_of_a_language_model_is_taken_over():
  spec, _ = reward_model()
  _, language_model = parameters.split(Transformer(spec.transformer, rngs=nnx.Rngs(5)))
  params = from_language_model(spec, language_model, jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, params["transformer"], language_model)
  with pytest.raises(ValueError, match="is not that of spec.transformer"):
    from_language_model(spec, {"blocks": {}}, jax.random.key(1))


def test_it_learns_which_token_is_preferred():
  spec, model = reward_model()
  graphdef, params = parameters.split(model)
  tokens_B2L = jax.random.randint(jax.random.key(0), (32, 2, 6), 4, 32)
  places_B = jax.random.randint(jax.random.key(1), (32,), 0, 6)
  tokens_B2L = tokens_B2L.at[jnp.arange(32), 0, places_B].set(3)  # Chosen texts hold a 3 somewhere.

  def loss(params):
    rewards_B2 = parameters.merge(graphdef, params)(tokens_B2L)
    losses, metrics = bradley_terry_loss(rewards_B2[:, 0], rewards_B2[:, 1], centring=0.01)
    return losses.mean(), metrics["accuracy"].mean()

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (before, _), _ = step(params)
  for _ in range(60):
    _, slopes = step(params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g / (jnp.linalg.norm(g) + 1e-6), params, slopes)
  (after, accuracy), _ = step(params)
  assert float(after) < 0.3 < float(before) and float(accuracy) > 0.9
