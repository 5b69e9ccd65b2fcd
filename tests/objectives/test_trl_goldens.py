"""Every loss that TRL has too, against the numbers it gave (tests/golden/make_trl_goldens.py)."""

import pytest

from nr.objectives.preference import LOSSES
from tests.objectives import trl_cases


@pytest.mark.parametrize("name", trl_cases.NAMES)
def test_loss_and_gradient_are_those_of_trl(name):
  trl_cases.check(name, trl_cases.GOLDEN["cases"][name])


def test_no_case_is_left_out():
  assert set(trl_cases.NAMES) == set(trl_cases.GOLDEN["cases"])
  # TRL has no DPO-positive.
  assert set(LOSSES) - {spec.loss for spec in trl_cases.PAIRS.values()} == {"dpo_positive"}
