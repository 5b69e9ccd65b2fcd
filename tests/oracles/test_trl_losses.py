"""Preference losses against TRL, live: its numbers are still the committed ones, and ours are the same."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch (extra [oracles])")
pytest.importorskip("trl", reason="needs trl (extra [oracles])")

from tests.golden import make_trl_goldens  # noqa: E402
from tests.objectives import trl_cases  # noqa: E402

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def theirs():
  return make_trl_goldens.compute(make_trl_goldens.inputs())


@pytest.mark.parametrize("name", trl_cases.NAMES)
def test_ours_is_theirs(theirs, name):
  trl_cases.check(name, theirs[name])


def test_the_committed_numbers_are_theirs(theirs):
  for name, case in trl_cases.GOLDEN["cases"].items():
    np.testing.assert_allclose(case["loss"], theirs[name]["loss"], rtol=1e-6)
    np.testing.assert_allclose(case["gradient"], theirs[name]["gradient"], atol=1e-6)
