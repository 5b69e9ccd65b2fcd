"""Drivers on a mesh of eight devices give the texts that one device gives."""

import dataclasses

import jax
import numpy as np
import pytest

from nr.generation.beams.beam_search import beam_search
from nr.generation.decoding import pad_prompts
from nr.generation.particles.particle_filter import particle_filter
from nr.generation.particles.potentials import TokenCount
from nr.generation.speculation.drafters import NgramDrafter
from nr.generation.speculation.speculative import speculative
from nr.generation.transforms import RepetitionPenalty, TopP
from nr.generation.transforms.algebra import chain
from nr.models.parameters import axes_of
from nr.training import sharding
from tests.generation import toy

PROMPTS = pad_prompts(toy.random_prompts([4, 6, 8, 3]))
LAW = chain(RepetitionPenalty(1.2), TopP(0.9))
KEY = jax.random.key(3)

DRIVERS = {
  "beams": lambda model: beam_search(model, *PROMPTS, chain=LAW, beam_width=2, max_new_tokens=4).tokens_BKN,
  "speculation": lambda model: (
    speculative(model, NgramDrafter(), *PROMPTS, KEY, chain=LAW, max_new_tokens=4, draft_length=2).tokens_RN
  ),
  "particles": lambda model: (
    particle_filter(
      model, *PROMPTS, KEY, potential=TokenCount(0.5, [3]), chain=LAW, num_particles=2, max_new_tokens=4
    ).tokens_BKN
  ),
}


@pytest.mark.parametrize("driver", DRIVERS)
def test_eight_devices_draw_what_one_draws(driver):
  network = toy.tiny_network(num_layers=1)
  alone = DRIVERS[driver](network)
  mesh = sharding.make_mesh(dict(data=4, fsdp=1, tensor=2, sequence=1))
  with sharding.context(mesh):
    axes = sharding.shardings(axes_of(network.model()), mesh, network.params)
    spread = DRIVERS[driver](dataclasses.replace(network, params=jax.device_put(network.params, axes)))
  assert len(spread.sharding.device_set) == 8
  np.testing.assert_array_equal(spread, alone)
