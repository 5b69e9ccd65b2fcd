"""Tokens to equal loss and losses at equal FLOPs, against numbers worked out by hand."""

import math

import pytest

from nr.evaluation.learning_curves import loss_at_flops, tokens_to_loss


def test_tokens_to_a_loss_between_two_measurements():
  tokens, losses = [100, 200, 300], [5.0, 4.0, 3.5]
  assert tokens_to_loss(tokens, losses, 4.25) == 175
  assert tokens_to_loss(tokens, losses, 4.0) == 200
  assert tokens_to_loss(tokens, losses, 3.6) == pytest.approx(280)
  assert tokens_to_loss(tokens, losses, 6.0) == 100
  assert tokens_to_loss(tokens, losses, 3.4) is None
  assert tokens_to_loss([1, 2, 3, 4], [3.0, 2.0, 2.5, 1.0], 2.0) == 2  # the first time counts


def test_the_loss_at_equal_flops_is_straight_in_their_logarithm():
  assert loss_at_flops([1e6, 4e6], [5.0, 4.0], 2e6) == pytest.approx(4.5)
  assert loss_at_flops([1e6, 2e6, 4e6], [5.0, 4.6, 4.0], 4e6) == 4.0
  middle = loss_at_flops([1e6, 2e6, 4e6], [5.0, 4.6, 4.0], 3e6)
  assert middle == pytest.approx(4.6 - 0.6 * math.log(1.5) / math.log(2))
  assert loss_at_flops([1e6, 2e6], [5.0, 4.0], 2.004e6) == 4.0


@pytest.mark.parametrize(
  ("flops", "at", "message"),
  [((1e6, 2e6), 2.1e6, "outside of the runs"), ((2e6, 1e6), 1e6, "must increase"), ((1e6,), 1e6, "one each")],
)
def test_nothing_is_extrapolated(flops, at, message):
  with pytest.raises(ValueError, match=message):
    loss_at_flops(flops, [5.0, 4.0], at)
