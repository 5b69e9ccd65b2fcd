"""A real transformer in training: a mesh with all axes, and one checkpoint for both layouts of its layers."""

import dataclasses

import numpy as np
import pytest

from nr.models.transformer import TransformerSpec
from nr.training.checkpoints import tree_hash
from nr.training.loop import train
from nr.training.next_token import next_token_method
from tests.training import method_suite

SPEC = TransformerSpec.llama(
  vocab_size=32, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=32, max_length=8
)


def batch(rows=8, length=8):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 32, (rows, length)).astype(np.int32)
  weights = (rng.random((rows, length)) < 0.7).astype(np.float32)
  weights[:, -1] = 0
  weights[1] = 0
  return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights}


@pytest.mark.slow
def test_tensor_parallel_gradients_are_those_of_one_device():
  mixed = dict(data=2, fsdp=2, tensor=2, sequence=1)
  method_suite.check_devices_agree(next_token_method(SPEC), batch(), meshes=(mixed,))


def test_a_run_saved_with_stacked_layers_goes_on_with_layers_kept_apart(tmp_path):
  apart = dataclasses.replace(SPEC, layers="unroll")
  config = method_suite.tiny_config(batch(), steps=2, schedule__steps=4)
  longer = method_suite.tiny_config(batch(), steps=4, schedule__steps=4)
  first = train(config, next_token_method(SPEC), method_suite.Batches(batch()), workdir=tmp_path)
  on = train(longer, next_token_method(apart), method_suite.Batches(batch()), workdir=tmp_path)
  assert isinstance(on.state.params["blocks"], dict) and set(on.state.params["blocks"]) == {0, 1}
  restored = train(longer, next_token_method(SPEC), method_suite.Batches(batch()), workdir=tmp_path)
  assert tree_hash(restored.state) == tree_hash(on.state)
  assert int(restored.state.step) == 4 and int(first.state.step) == 2
