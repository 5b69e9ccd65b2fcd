"""Sequence classifiers of `transformers` as reward models, against committed numbers."""

import pathlib

import jax
import numpy as np
import pytest

from nr.interchange.huggingface import load_huggingface_reward_model, save_huggingface_reward_model
from nr.models import parameters
from nr.models.reward import RewardModelSpec, from_language_model
from nr.models.transformer import TransformerSpec
from nr.training.model_files import build_model, graphdef_of

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors (extra [hub])")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def rewards_of(spec, params, tokens, lengths):
  graphdef = graphdef_of(spec)
  return np.asarray(jax.jit(lambda p: parameters.merge(graphdef, p)(tokens, lengths))(params))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_rewards_are_those_of_transformers_and_saving_gives_the_same_tensors(family, layers, tmp_path):
  folder = GOLDEN / f"huggingface_{family}_reward"
  spec, params = load_huggingface_reward_model(folder, layers=layers)
  params = parameters.unstack_layers(params) if layers == "unroll" else params
  expected = np.load(folder / "expected.npz", allow_pickle=False)
  found = rewards_of(spec, params, expected["tokens"], expected["lengths"])
  assert np.ptp(expected["rewards"]) > 0.1
  np.testing.assert_allclose(found, expected["rewards"], atol=1e-5, rtol=0)

  save_huggingface_reward_model(tmp_path, spec, params)
  stored = safetensors_numpy.load_file(folder / "model.safetensors")
  written = safetensors_numpy.load_file(tmp_path / "model.safetensors")
  assert sorted(written) == sorted(stored)
  for name, tensor in stored.items():
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)
  assert load_huggingface_reward_model(tmp_path, layers=layers)[0] == spec


def test_a_head_on_an_untied_language_model_is_saved_without_its_output_head(tmp_path):
  trunk = TransformerSpec.llama(vocab_size=19, num_layers=2, model_dim=8, num_heads=2, mlp_dim=12)
  language_model = parameters.split(build_model(trunk, jax.random.key(0)))[1]
  spec = RewardModelSpec(trunk)
  params = from_language_model(spec, language_model, jax.random.key(1))
  save_huggingface_reward_model(tmp_path, spec, params, pad_token_id=0)
  again, loaded = load_huggingface_reward_model(tmp_path)
  assert again.transformer.tied_head and "unembedding" in params["transformer"]
  tokens = np.random.default_rng(0).integers(0, 19, (2, 5)).astype(np.int32)
  expected = rewards_of(spec, params, tokens, np.array([5, 3]))
  np.testing.assert_array_equal(rewards_of(again, loaded, tokens, np.array([5, 3])), expected)
