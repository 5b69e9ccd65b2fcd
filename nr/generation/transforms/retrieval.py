"""Nearest-neighbour language modelling: what followed the most similar states seen before."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.language_models import LanguageModel
from nr.generation.transforms.algebra import (
  HIDDEN,
  Context,
  Parameter,
  State,
  Transform,
  all_equal,
  column,
  row,
  static,
  table,
  transform,
)
from nr.generation.transforms.thresholds import over_vocabulary, scattered


class Datastore(NamedTuple):
  """States and the tokens that followed them, on device.

  Attributes:
    keys_MD: states.
    values_M: int32, the token behind each.
  """

  keys_MD: jax.Array
  values_M: jax.Array


def build_datastore(
  model: LanguageModel,
  tokens_NL: np.ndarray,
  valid_NL: np.ndarray | None = None,
  *,
  hidden: str = "last",
  context: int = 0,
  batch: int = 8,
) -> Datastore:
  """Reads windows of tokens and keeps every state with the token that follows it.

  The key is the state that the head reads. arXiv:1911.00172 takes one from inside the
  last block instead (recalled); ours is the state that every model here offers.

  Args:
    model: one that offers `hidden`, such as `Network(..., offers_hidden=True)`.
    tokens_NL: int32 windows, of text that the model continues from their first token on.
    valid_NL: bool, False at padding, which is on the right; None: no padding.
    hidden: name of the states.
    context: first tokens of each window that only serve as context (windows that
      overlap by as many record each position once).
    batch: windows read at once.

  Raises:
    ValueError: the model does not offer the states, windows of fewer than two tokens,
      or nothing to keep.
  """
  if HIDDEN + hidden not in model.offers:
    raise ValueError(f"hidden={hidden!r}: the model does not offer it; make it with offers_hidden=True")
  tokens_NL = np.asarray(tokens_NL, np.int32)
  if tokens_NL.ndim != 2 or tokens_NL.shape[1] < 2 or batch < 1:
    raise ValueError(
      f"tokens_NL has shape {tokens_NL.shape}, batch={batch}: give windows of two tokens or more"
    )
  valid_NL = np.ones(tokens_NL.shape, bool) if valid_NL is None else np.asarray(valid_NL, bool)
  is_kept_NL = valid_NL[:, :-1] & valid_NL[:, 1:] & (np.arange(tokens_NL.shape[1] - 1) >= context)
  if not is_kept_NL.any():
    raise ValueError(f"context={context}: no window of {tokens_NL.shape[1]} tokens holds a position to keep")
  keys = []
  for start in range(0, len(tokens_NL), batch):
    read_BL = tokens_NL[start : start + batch]
    short = batch - len(read_BL)
    states_BLD = _states(model, np.pad(read_BL, ((0, short), (0, 0))), hidden)
    is_kept_BL = np.pad(is_kept_NL[start : start + batch], ((0, short), (0, 0)))
    keys.append(np.asarray(states_BLD)[:, :-1][is_kept_BL])
  return Datastore(jnp.asarray(np.concatenate(keys)), jnp.asarray(tokens_NL[:, 1:][is_kept_NL]))


@functools.partial(jax.jit, static_argnames="hidden")
def _states(model: LanguageModel, tokens_BL: jax.Array, hidden: str) -> jax.Array:
  """Returns the states [B, L, D]; the logits, which nobody reads, are not computed."""
  cache = model.init_cache(*tokens_BL.shape)
  return model.extend(tokens_BL, cache, is_prompt=True)[0].hidden[hidden]


def nearest(queries_BD: jax.Array, keys_MD: jax.Array, count: int, chunk: int) -> tuple[jax.Array, jax.Array]:
  """Finds the nearest keys, exactly, without [B, M] distances or [B, M, D] differences.

  Args:
    queries_BD: what is looked up.
    keys_MD: what is searched.
    count: how many, at most M.
    chunk: keys compared at once.

  Returns:
    float32 [B, count] squared Euclidean distances, ascending, and int32 [B, count]
    rows of the keys.
  """
  size, batch = keys_MD.shape[0], queries_BD.shape[0]
  chunk = min(chunk, size)
  queries_BD = queries_BD.astype(jnp.float32)
  squares_B1 = (queries_BD**2).sum(axis=-1, keepdims=True)

  def visit(best: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    # The last chunk starts early rather than reaching beyond the end; what it repeats is skipped.
    start = jnp.minimum(number * chunk, size - chunk)
    rows_C = start + jnp.arange(chunk)
    keys_CD = jax.lax.dynamic_slice_in_dim(keys_MD, start, chunk).astype(jnp.float32)
    products_BC = jnp.einsum("bd,cd->bc", queries_BD, keys_CD, precision=jax.lax.Precision.HIGHEST)
    distances_BC = jnp.maximum(squares_B1 - 2 * products_BC + (keys_CD**2).sum(axis=-1), 0.0)
    distances_BC = jnp.where(rows_C >= number * chunk, distances_BC, jnp.inf)
    both_B = jnp.concatenate([best[0], distances_BC], axis=1)
    rows_B = jnp.concatenate([best[1], jnp.broadcast_to(rows_C, distances_BC.shape)], axis=1)
    negated_BK, picked_BK = jax.lax.top_k(-both_B, count)
    return (-negated_BK, jnp.take_along_axis(rows_B, picked_BK, axis=1)), None

  empty = (jnp.full((batch, count), jnp.inf), jnp.zeros((batch, count), jnp.int32))
  best, _ = jax.lax.scan(visit, empty, jnp.arange(-(-size // chunk)))
  return best


def interpolate(log_p_BV: jax.Array, log_q_BV: jax.Array, weight: Parameter) -> jax.Array:
  """Returns log((1 - weight) p + weight q); weights 0 and 1 give p and q."""
  weight_B1 = column(weight)
  return jnp.logaddexp(jnp.log1p(-weight_B1) + log_p_BV, jnp.log(weight_B1) + log_q_BV)


@transform("knn")
class KnnMix(Transform):
  """(1 - weight) p + weight p_knn, p_knn(v) ~ sum of exp(-d / temperature) over neighbours followed by v.

  The neighbours are the `neighbours` entries of the datastore nearest to the state, d
  their squared distances. Tokens that earlier transforms banned stay banned.

  Source: arXiv:1911.00172. The defaults are recalled, not re-read.

  Attributes:
    datastore: keys and values; see `build_datastore`.
    weight: 0 is off.
    temperature: of the distances.
    neighbours: how many; all entries when there are fewer.
    chunk: entries compared at once.
    hidden: name of the states.
  """

  datastore: Datastore = table()
  weight: Parameter = row(0.25, least=0.0, most=1.0)
  temperature: Parameter = row(1.0, above=0.0)
  neighbours: int = static(1024)
  chunk: int = static(8192)
  hidden: str = static("last")

  @property
  def needs(self) -> frozenset[str]:
    """The states."""
    return frozenset({HIDDEN + self.hidden})

  def is_off(self) -> bool:
    """Whether neighbours have no weight."""
    return all_equal(self.weight, 0)

  def prepared(self) -> "KnnMix":
    """Checks the datastore too.

    Raises:
      ValueError: no datastore, keys and values of different numbers, or a parameter
        out of bounds.
    """
    if not isinstance(self.datastore, Datastore):
      raise ValueError(f"knn.datastore={self.datastore!r}: give one, of build_datastore")
    keys, values = (jnp.shape(each) for each in self.datastore)
    if len(keys) != 2 or values != keys[:1] or keys[0] == 0:
      raise ValueError(
        f"knn.datastore: keys_MD has shape {keys}, values_M {values}; give [M, D] and [M], M > 0"
      )
    if self.neighbours < 1 or self.chunk < 1:
      raise ValueError(f"knn.neighbours={self.neighbours}, chunk={self.chunk}: give at least 1")
    return super().prepared()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Looks up and interpolates."""
    log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    mixed_BV = interpolate(log_p_BV, self.log_neighbours(logits_BV.shape[-1], context), self.weight)
    mixed_BV = jnp.where(logits_BV > -jnp.inf, mixed_BV, -jnp.inf)
    return jnp.where(column(self.weight) == 0, logits_BV, mixed_BV)

  def log_neighbours(self, vocab_size: int, context: Context) -> jax.Array:
    """Returns log p_knn, float32 [B, V]."""
    count = min(self.neighbours, self.datastore.values_M.shape[0])
    distances_BK, rows_BK = nearest(context.hidden[self.hidden], self.datastore.keys_MD, count, self.chunk)
    shares_BK = jax.nn.softmax(-distances_BK / column(self.temperature), axis=-1)
    nothing_BV = over_vocabulary(jnp.zeros((shares_BK.shape[0], vocab_size)))
    return jnp.log(scattered(nothing_BV, self.datastore.values_M[rows_BK], shares_BK, "add"))
