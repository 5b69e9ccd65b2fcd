"""The TPU slices that configs of the paper's sizes name can hold their batches and their arrays."""

import math

import pytest

from configs.cocomix import PAPERS, get_config
from nr.training import defaults, sharding


@pytest.mark.parametrize("variant", PAPERS)
def test_batches_and_widths_divide_over_the_chips_of_the_slice(variant):
  config = get_config(variant)
  kind, _, grid = config.tpu.topology.partition(":")
  chips = math.prod(map(int, grid.split("x")))
  assert kind == "v5e" and chips >= 8
  training = config.students.train
  sizes = sharding.mesh_sizes(training.mesh, chips)
  assert math.prod(sizes.values()) == chips
  defaults.validate(training, sizes)  # microbatches have rows for every chip
  for arm in config.students.arms.values():
    assert arm.model.model_dim % sizes["fsdp"] == 0
    assert arm.model.num_heads % sizes["tensor"] == 0


def test_collectives_are_counted_by_kind():
  from nr.evaluation.collectives import count_collectives

  text = """
%all-reduce-scatter.3 (input: f32[8]) -> f32[1] {
  %fusion = f32[8] all-reduce(%input)
}
ENTRY %main {
  %a = f32[64]{0} all-gather(%p), dimensions={0}
  %b = (f32[8], f32[64]) all-gather-start(%q)
  %c = f32[64] all-gather-done(%b)
  %d = f32[8] collective-permute(%a)
}
"""
  counts = count_collectives(text)
  assert counts == {
    "all-gather": 2,
    "all-reduce": 1,
    "reduce-scatter": 1,
    "all-to-all": 0,
    "collective-permute": 1,
  }
