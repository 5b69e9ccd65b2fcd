"""Weighted sums on the host, through `clu.metrics`, at the edge of the loop.

The step returns sums; here they are merged over the steps of a logging window and
divided once. clu is imported when first used, so that the step needs JAX alone.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from nr.objectives.weighted import Weighted


def host_mean(value: Weighted) -> float:
  """Returns the mean of a scalar weighted sum that is on the host; 0 for weight 0."""
  total, weight = float(value.total), float(value.weight)
  return total / weight if weight else 0.0


@functools.cache
def weighted_mean() -> type:
  """Returns the clu metric that holds a weighted sum and divides it in `compute`."""
  import flax
  from clu import metrics as clu_metrics

  @flax.struct.dataclass
  class WeightedMean(clu_metrics.Metric):
    """Sum of weight times value, and sum of the weights."""

    total: Any
    weight: Any

    @classmethod
    def empty(cls) -> "WeightedMean":
      return cls(total=np.float64(0), weight=np.float64(0))

    @classmethod
    def from_weighted(cls, value: Weighted) -> "WeightedMean":
      # Python's doubles: float32 loses whole tokens after 2**24 of them.
      return cls(np.asarray(value.total, np.float64), np.asarray(value.weight, np.float64))

    def merge(self, other: "WeightedMean") -> "WeightedMean":
      return type(self)(self.total + other.total, self.weight + other.weight)

    def compute(self) -> np.ndarray:
      safe = np.where(self.weight == 0, 1.0, self.weight)
      return np.where(self.weight == 0, 0.0, self.total / safe)

  return WeightedMean


class MetricWindow:
  """Merges the metrics of consecutive steps until they are computed."""

  def __init__(self):
    self._metrics: dict[str, Any] = {}

  def add(self, values: Mapping[str, Weighted]) -> None:
    """Merges one step's sums (host arrays)."""
    mean = weighted_mean()
    for name, value in values.items():
      metric = mean.from_weighted(value)
      self._metrics[name] = self._metrics[name].merge(metric) if name in self._metrics else metric

  def compute(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns (scalar means, vector means) by name since the last call, and starts afresh."""
    from clu import metrics as clu_metrics

    means = clu_metrics.Collection.create_collection(**self._metrics).compute()
    self._metrics = {}
    scalars = {name: float(mean) for name, mean in means.items() if np.ndim(mean) == 0}
    return scalars, {name: mean for name, mean in means.items() if np.ndim(mean)}
