"""Sample efficiency: how many tokens or FLOPs one way of training needs to get as far as another."""

from collections.abc import Sequence

import numpy as np


def tokens_to_loss(tokens: Sequence[float], losses: Sequence[float], target: float) -> float | None:
  """Returns the tokens after which a curve first reaches a loss.

  Between two measurements the curve is taken as straight. Curves of a decaying learning rate flatter their end:
  a run that was meant to be shorter would have been further by then.

  Args:
    tokens: [points] tokens seen, increasing.
    losses: [points] loss measured there, nats a token.
    target: the loss to reach, nats a token.

  Returns:
    None if the curve never gets there.

  Raises:
    ValueError: another number of losses than of tokens, or tokens that do not increase.
  """
  tokens, losses = _curve("tokens", tokens, losses)
  reached = np.flatnonzero(losses <= target)
  if not len(reached):
    return None
  last = int(reached[0])
  if last == 0:
    return float(tokens[0])
  share = (losses[last - 1] - target) / (losses[last - 1] - losses[last])
  return float(tokens[last - 1] + share * (tokens[last] - tokens[last - 1]))


def loss_at_flops(flops: Sequence[float], losses: Sequence[float], at: float) -> float:
  """Returns the loss of complete runs of different lengths at a number of FLOPs between theirs.

  Straight in the logarithm of the FLOPs, which is how losses fall over short stretches.

  Args:
    flops: [runs] spent by each run, increasing.
    losses: [runs] final loss of each, nats a token.
    at: FLOPs asked for.

  Raises:
    ValueError: `at` lies outside of the runs by more than 0.5 %: nothing is extrapolated.
  """
  flops, losses = _curve("flops", flops, losses)
  if not flops[0] * 0.995 <= at <= flops[-1] * 1.005:
    raise ValueError(
      f"at={at:.4g} FLOPs lies outside of the runs, {flops[0]:.4g} to {flops[-1]:.4g}: add a longer or shorter run"
    )
  return float(np.interp(np.log(at), np.log(flops), losses))


def _curve(name: str, x: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
  x, losses = np.asarray(x, np.float64), np.asarray(losses, np.float64)
  if x.shape != losses.shape or x.ndim != 1 or not len(x):
    raise ValueError(f"{name}: {x.shape} values for losses of shape {losses.shape}; give one each")
  if (np.diff(x) <= 0).any():
    raise ValueError(f"{name}: {x.tolist()} must increase")
  return x, losses
