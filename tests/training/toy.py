"""A linear regression with a frozen input map: the smallest Method that uses every part of the record."""

import jax
import jax.numpy as jnp
import numpy as np

from nr.objectives.weighted import LossOutput, Weighted
from nr.training.defaults import get_training_config
from nr.training.method import Method

DIM, OUT = 16, 8


def init(key):
  first, second = jax.random.split(key)
  return {
    "inner": {"kernel": jax.random.normal(first, (DIM, DIM)) / 4, "bias": jnp.zeros(DIM)},
    "outer": {"kernel": jax.random.normal(second, (DIM, OUT)) / 4, "bias": jnp.zeros(OUT)},
  }


def loss(params, frozen, extra, batch, key):
  del key
  x_BD = batch["inputs"] * frozen["scale"]
  hidden_BD = jnp.tanh(x_BD @ params["inner"]["kernel"] + params["inner"]["bias"])
  out_BO = hidden_BD @ params["outer"]["kernel"] + params["outer"]["bias"]
  error_B = jnp.square(out_BO - batch["targets"]).sum(-1)
  used_D = (jnp.abs(hidden_BD) > 0.5).astype(jnp.float32)
  return LossOutput(
    Weighted.of(error_B, batch["weights"]),
    {"per_output": Weighted((jnp.square(out_BO) * batch["weights"][:, None]).sum(0), batch["weights"].sum())},
    {"active": (used_D * batch["weights"][:, None]).sum(0)},
  )


def make(**changes) -> Method:
  """The method, with an average of the parameters and activity counts as its extra state."""
  method = Method(
    name="toy",
    init=init,
    loss=loss,
    axes={
      "inner": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
      "outer": {"kernel": ("embed", None), "bias": (None,)},
    },
    frozen={"scale": jnp.full((DIM,), 0.5)},
    init_extra=lambda params: {"average": params, "active": jnp.zeros(DIM)},
    update_extra=lambda extra, params, statistics, step: {
      "average": jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, extra["average"], params),
      "active": extra["active"] + statistics["active"],
    },
    decay=(".*/kernel",),
  )
  return method._replace(**changes)


def batch(rows=16, seed=0):
  """Rows with uneven weights, some of them 0."""
  rng = np.random.default_rng(seed)
  weights = rng.integers(0, 4, rows).astype(np.float32)
  weights[0] = 3.0
  return {
    "inputs": rng.normal(size=(rows, DIM)).astype(np.float32),
    "targets": rng.normal(size=(rows, OUT)).astype(np.float32),
    "weights": weights,
  }


class Rows:
  """A map source of single rows, for Grain; `index` says which row it is."""

  def __init__(self, count=64):
    self.rows = batch(count, seed=7)
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    row = {name: value[index] for name, value in self.rows.items()}
    return row | {"index": np.int32(index)}


def data(batch_size=16, seed=0, count=64):
  """Shuffled endless batches of the rows."""
  import grain

  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  rows = grain.MapDataset.source(Rows(count)).seed(seed).shuffle().repeat()
  return rows.to_iter_dataset(options).batch(batch_size, drop_remainder=True)


def config(**changes):
  """A short training section; dotted names change fields inside sections."""
  section = get_training_config()
  section.update(dict(steps=8, batch_size=16, log_every=2, progress=False))
  section.optimizer.weight_decay = 0.1
  section.optimizer.learning_rate = 1e-2
  section.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return section
