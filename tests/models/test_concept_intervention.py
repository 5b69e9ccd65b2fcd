"""Every mode of concept intervention against what its name promises, on numbers one can check by eye."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nr.models.concept_intervention import (
  InterventionMode,
  concept_intervention,
  edit_logits,
  edit_selection,
)
from nr.models.top_k import top_k

#                 0    1    2     3    4
Z = jnp.array([[[5.0, 4.0, -1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]]])


def _selected(*arguments, k=3, **settings):
  edit = concept_intervention(*arguments, num_concepts=5, **settings)
  values, indices = top_k(edit_logits(Z, edit), k)
  values, indices = jax.jit(edit_selection)(values, indices, edit)
  return [dict(zip(np.asarray(i).tolist(), np.asarray(v).tolist())) for i, v in zip(indices[0], values[0])]


@pytest.mark.parametrize(
  "mode, concept, value, expected",
  [
    ("scale_pre", 4, 2.0, {0: 5, 1: 4, 4: 4}),  # 4 enters, 3 leaves
    ("scale_pre", 2, 10.0, {0: 5, 1: 4, 3: 3}),  # a negative logit is scaled down
    ("scale_post", 0, -2.0, {0: -10, 1: 4, 3: 3}),
    ("scale_post", 4, 9.0, {0: 5, 1: 4, 3: 3}),  # not selected: nothing
    ("force", 2, 2.0, {0: 5, 1: 4, 2: 10}),  # evicts 3, the smallest
    ("force", 3, 0.5, {0: 5, 1: 4, 3: 2.5}),  # selected already: nobody leaves
    ("force_value", 2, -7.0, {0: 5, 1: 4, 2: -7}),
    ("set", 2, 4.5, {0: 5, 1: 4, 2: 4.5}),
    ("add", 0, -4.5, {1: 4, 3: 3, 4: 2}),
    ("ablate_pre", 1, 0.0, {0: 5, 3: 3, 4: 2}),
    ("ablate_post", 1, 0.0, {0: 5, -1: 0, 3: 3}),
  ],
)
def test_modes(mode, concept, value, expected):
  assert _selected([concept], mode, value)[0] == expected


def test_position_mask_limits_the_edit():
  first, second = _selected([0], "force", 2.0, active_BL=jnp.array([[False, True]]))
  assert first == {0: 5, 1: 4, 3: 3}
  assert second == {0: 10, 3: 4, 4: 5}


def test_several_edits_at_once_and_a_row_each():
  modes = ["force", "scale_post", "force_value"]
  assert _selected([2, 1, 4], modes, [2.0, 10.0, 6.0])[0] == {1: 40, 2: 10, 4: 6}
  edits = [concept_intervention([concept], "ablate_pre", num_concepts=5) for concept in (0, 1)]
  both = jax.tree.map(lambda *rows: jnp.stack(rows), *edits)._replace(active_BL=jnp.array(True))
  indices = top_k(edit_logits(jnp.concatenate([Z, Z]), both), 2)[1]
  assert indices[:, 0].tolist() == [[1, 3], [0, 3]]


def test_ablating_more_than_is_left_empties_places():
  assert _selected([0, 1, 3], "ablate_pre", k=4)[0] == {4: 2, 2: -1, -1: 0}


@pytest.mark.parametrize(
  "arguments, message",
  [
    (([5], "set"), r"concepts \[5\] are outside 0..4"),
    (([1, 1], "set"), "name one concept twice"),
    (([1], "boost"), "mode='boost' is unknown: Valid: scale_pre, scale_post"),
    (([1, 2], "set", [1.0]), "2 concepts, 2 modes and 1 values must match"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    concept_intervention(*arguments, num_concepts=5)


def _by_definition(z_C, k, mode, concept, value):
  """The selection that a mode's definition asks for, as {concept: coefficient}, written without arrays."""
  z = dict(enumerate(map(float, z_C)))
  before = {
    "scale_pre": z[concept] * value,
    "set": value,
    "add": z[concept] + value,
    "ablate_pre": -np.inf,
  }
  z[concept] = before.get(mode, z[concept])
  chosen = sorted(z, key=lambda each: (-z[each], each))[:k]
  selected = {each: z[each] for each in chosen}
  if mode == "scale_post" and concept in selected:
    selected[concept] *= value
  if mode == "ablate_post":
    selected.pop(concept, None)
  if mode in ("force", "force_value"):
    forced = value * max(selected.values()) if mode == "force" else value
    if concept not in selected:
      del selected[chosen[-1]]
    selected[concept] = forced
  return selected


@pytest.mark.parametrize("mode", [mode.name.lower() for mode in InterventionMode])
def test_27_every_mode_is_its_definition_on_random_logits(mode):
  """All modes, selected and unselected concepts, strengths of both signs; the order is that of definition."""
  random, k, num_concepts = np.random.default_rng(0), 4, 12
  z_NC = random.normal(size=(40, num_concepts)).astype(np.float32)
  concept_N, value_N = random.integers(0, num_concepts, 40), random.choice([-3.0, -0.5, 0.0, 1.0, 2.5], 40)
  edit = concept_intervention([0], mode, num_concepts=num_concepts)
  edit = edit._replace(
    concepts_S=jnp.asarray(concept_N)[:, None],
    modes_S=jnp.full((40, 1), edit.modes_S[0]),
    values_S=jnp.asarray(value_N, jnp.float32)[:, None],
  )
  values, indices = edit_selection(*top_k(edit_logits(z_NC[:, None], edit), k), edit)
  for row, (z_C, concept, value) in enumerate(zip(z_NC, concept_N, value_N)):
    expected = _by_definition(z_C, k, mode, int(concept), float(value))
    found = {int(i): float(v) for i, v in zip(indices[row, 0], values[row, 0]) if i >= 0}
    assert found.keys() == expected.keys()
    for each in expected:
      assert found[each] == pytest.approx(expected[each], rel=1e-6)
