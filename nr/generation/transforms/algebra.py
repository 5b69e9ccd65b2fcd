"""The algebra of logit transforms: what one is, what it sees, and how they compose.

A transform is a frozen dataclass and a pytree. Its parameters are leaves, so that
sweeping them never recompiles; its structure is static. `apply` changes logits and
nothing else, state changes only in `commit`, and every leaf of a state leads with
the batch axis, so that beams, particles and drafts gather it with one `tree.map`.

    law = chain(Temperature(0.7), TopP(0.9))
    state = law.init(context, vocab_size)
    logits_BV = law.apply(logits_BV, state, context)

A transform of one's own:

    @transform("shift")
    class Shift(Transform):
      by: Parameter = row(0.0)

      def apply(self, logits_BV, state, context):
        return logits_BV + column(self.by)
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from nr.names import unknown

# A scalar for all rows, or [B].
Parameter = Any
State = Any

STREAM, HIDDEN = "streams:", "hidden:"


class Context(NamedTuple):
  """What a transform knows besides the logits. All arrays lead with the batch axis.

  Attributes:
    tokens_BS: int32 history: the prompt without padding, then what was generated,
      from slot 0 on; what is behind `lengths_B` is meaningless.
    lengths_B: int32, tokens in the history.
    prompt_lengths_B: int32, how many of them are prompt.
    keys_B: random key of each row, the same at every step.
    streams: float32 logits [B, V] of other distributions over the next token, by name.
    hidden: hidden states [B, D] that the next token is read from, by name; "last" is
      the final-normed one.
    log_probs_BV: float32, the model's log-probabilities before the chain; None in `apply`.
    transformed_BV: float32, the log-probabilities after the chain; None in `apply`.
  """

  tokens_BS: jax.Array
  lengths_B: jax.Array
  prompt_lengths_B: jax.Array
  keys_B: jax.Array
  streams: dict[str, jax.Array] = {}
  hidden: dict[str, jax.Array] = {}
  log_probs_BV: jax.Array | None = None
  transformed_BV: jax.Array | None = None

  @property
  def generated_B(self) -> jax.Array:
    """Returns int32 [B], tokens generated so far."""
    return self.lengths_B - self.prompt_lengths_B

  def step_keys(self, purpose: int = 0) -> jax.Array:
    """Returns a random key for each row: of its position, so that no driver and no batch changes it.

    Args:
      purpose: a number that keeps independent draws at one position apart; the
        sampler's is 0.
    """
    keys_B = jax.vmap(jax.random.fold_in)(self.keys_B, self.generated_B)
    return keys_B if purpose == 0 else jax.vmap(jax.random.fold_in, (0, None))(keys_B, purpose)

  def append(self, tokens_B: jax.Array, is_kept_B: jax.Array | bool = True) -> "Context":
    """Returns the context after one more token, in the rows where `is_kept_B`; streams stay as they are."""
    rows_B = jnp.arange(self.tokens_BS.shape[0])
    slots_B = jnp.where(is_kept_B, self.lengths_B, self.tokens_BS.shape[1])
    tokens_BS = self.tokens_BS.at[rows_B, slots_B].set(tokens_B.astype(jnp.int32), mode="drop")
    return self._replace(tokens_BS=tokens_BS, lengths_B=self.lengths_B + jnp.asarray(is_kept_B, jnp.int32))

  def take(self, rows_B: jax.Array) -> "Context":
    """Returns the context of the given rows; any number of them."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=0), self)


def row(default: Any = dataclasses.MISSING, dtype: Any = jnp.float32, **bounds: float) -> Any:
  """Declares a numeric parameter of a transform: a scalar, or [B] with a value for each row.

  Args:
    default: value when left out.
    dtype: what the value is converted to.
    **bounds: any of `least`, `most` (inclusive), `above`, `below` (exclusive).
  """
  return dataclasses.field(default=default, metadata=dict(kind="row", dtype=dtype, bounds=bounds))


def table(default: Any = dataclasses.MISSING) -> Any:
  """Declares arrays (any pytree) that all rows share: a list of tokens, an automaton, a datastore."""
  return dataclasses.field(default=default, metadata=dict(kind="table"))


def static(default: Any = dataclasses.MISSING, choices: tuple = ()) -> Any:
  """Declares a setting that is part of the program: hashable, one compilation a value."""
  return dataclasses.field(default=default, metadata=dict(kind="static", choices=choices))


REGISTRY: dict[str, type["Transform"]] = {}


class Transform:
  """A change of next-token logits. Subclasses declare fields with `row`, `table` and `static`.

  Attributes:
    name: what it is called in text and configs.
    needs: "streams:<name>" and "hidden:<name>" that the model must offer.
    is_argmax_invariant: whether it never changes which token is the most probable.
    is_rebuilt_by_init: whether `init` finds the state of any history in its tokens. Where
      the state holds probabilities of the past, it cannot, and starts anew.
  """

  name: ClassVar[str] = ""
  is_rebuilt_by_init: ClassVar[bool] = True
  is_argmax_invariant: ClassVar[bool] = False

  @property
  def needs(self) -> frozenset[str]:
    """Streams and hidden states that it reads from the context."""
    return frozenset()

  def init(self, context: Context, vocab_size: int) -> State:
    """Returns the state after the history in `context`; every leaf leads with B."""
    return ()

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns transformed float32 logits; -inf is the only mask."""
    return logits_BV

  def commit(self, state: State, tokens_B: jax.Array, context: Context) -> State:
    """Returns the state after `tokens_B` were chosen in `context` (the history before them)."""
    return state

  def is_off(self) -> bool:
    """Whether its (concrete) parameters make it the identity in every row."""
    return False

  def take(self, rows_B: jax.Array) -> Self:
    """Returns the transform with its per-row parameters gathered; scalars and tables stay."""
    return self.map_rows(lambda value: jnp.take(value, rows_B, axis=0) if jnp.ndim(value) else value)

  def tables(self) -> dict[str, Any]:
    """Returns what all rows share, by name."""
    names = [field.name for field in dataclasses.fields(self) if field.metadata["kind"] == "table"]
    return {name: getattr(self, name) for name in names}

  def map_rows(self, change: Callable[..., jax.Array], *others: Self) -> Self:
    """Returns it with `change` applied to each numeric parameter, and to those of `others` beside it."""
    changed = {
      name: change(value, *(getattr(other, name) for other in others))
      for name, value in self.row_parameters().items()
    }
    return dataclasses.replace(self, **changed)

  def spread(self, batch: int) -> Self:
    """Returns it with every numeric parameter as [B]."""
    return self.map_rows(lambda value: jnp.broadcast_to(value, (batch,)))

  def row_parameters(self) -> dict[str, Parameter]:
    """Returns the numeric parameters by name, those set to None left out."""
    names = [field.name for field in dataclasses.fields(self) if field.metadata["kind"] == "row"]
    return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

  def prepared(self) -> Self:
    """Returns it with parameters as arrays of their types. Run outside `jit`.

    Raises:
      ValueError: a value outside its bounds, or none of its choices.
    """
    fields = {field.name: field for field in dataclasses.fields(self)}
    for name, field in fields.items():
      choices = field.metadata.get("choices")
      if choices and getattr(self, name) not in choices:
        raise ValueError(unknown(f"{self.name}.{name}", str(getattr(self, name)), map(str, choices)))
    converted = {}
    for name, value in self.row_parameters().items():
      converted[name] = checked_value(f"{self.name}.{name}", value, fields[name].metadata)
    return dataclasses.replace(self, **converted)


def checked_value(label: str, value: Any, metadata: Any) -> jax.Array:
  """Returns a parameter as an array of its declared type.

  Args:
    label: its name, for the message.
    value: a number, or one a row.
    metadata: of a field declared with `row`.

  Raises:
    ValueError: not a number, of another rank, or outside the bounds.
  """
  if isinstance(value, jax.core.Tracer):
    return value
  try:
    array = np.asarray(value, metadata["dtype"])
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f"{label}={value!r}: give a number that fits, or one a row") from error
  if np.issubdtype(array.dtype, np.integer) and not np.array_equal(array, np.asarray(value)):
    raise ValueError(f"{label}={value!r}: give a whole number, or one a row")
  if array.ndim > 1:
    raise ValueError(f"{label} has shape {array.shape}: give a scalar or one value a row, [B]")
  tests: dict[str, tuple[Callable, str]] = {
    "least": (np.greater_equal, "at least"),
    "most": (np.less_equal, "at most"),
    "above": (np.greater, "above"),
    "below": (np.less, "below"),
  }
  for kind, bound in metadata["bounds"].items():
    is_within, words = tests[kind]
    if not is_within(array, bound).all():
      raise ValueError(f"{label}={value}: give a value {words} {bound}")
  return jnp.asarray(array)


def transform(name: str) -> Callable[[type], type]:
  """Makes a subclass of `Transform` a frozen dataclass, a pytree, and known by `name`."""

  def register(cls: type) -> type:
    cls.name = name
    # Compared by identity: values may be arrays. jit compares structures through the pytree.
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    kinds = {field.name: field.metadata.get("kind") for field in dataclasses.fields(cls)}
    for field, kind in kinds.items():
      if kind is None:
        raise TypeError(f"{cls.__name__}.{field}: declare it with row(), table() or static()")
    data = [field for field, kind in kinds.items() if kind != "static"]
    jax.tree_util.register_dataclass(cls, data, [field for field, kind in kinds.items() if kind == "static"])
    REGISTRY[name] = cls
    return cls

  return register


def column(parameter: Parameter) -> jax.Array:
  """Returns a parameter as [B, 1] or [1, 1], to meet [B, V]."""
  return jnp.reshape(jnp.asarray(parameter), (-1, 1))


def keep(logits_BV: jax.Array, is_kept_BV: jax.Array) -> jax.Array:
  """Bans what is not kept."""
  return jnp.where(is_kept_BV, logits_BV, -jnp.inf)


def all_equal(parameter: Parameter, value: float) -> bool:
  """Says whether a concrete parameter has this value in every row (False for a traced one)."""
  return not isinstance(parameter, jax.core.Tracer) and bool(np.all(np.asarray(parameter) == value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Chain(Transform):
  """Transforms applied from left to right; itself a transform. Made by `chain`."""

  transforms: tuple[Transform, ...] = ()
  name: ClassVar[str] = "chain"

  @property
  def needs(self) -> frozenset[str]:
    """Union of what its transforms need."""
    return frozenset().union(*(each.needs for each in self.transforms))

  @property
  def is_argmax_invariant(self) -> bool:
    """Whether all of its transforms are."""
    return all(each.is_argmax_invariant for each in self.transforms)

  def init(self, context: Context, vocab_size: int) -> State:
    """Returns a tuple of states."""
    return tuple(each.init(context, vocab_size) for each in self.transforms)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Applies all, the first one first."""
    for each, its_state in zip(self.transforms, state, strict=True):
      logits_BV = each.apply(logits_BV, its_state, context)
    return logits_BV

  def commit(self, state: State, tokens_B: jax.Array, context: Context) -> State:
    """Commits all."""
    return tuple(each.commit(its_state, tokens_B, context) for each, its_state in zip(self.transforms, state))

  def is_off(self) -> bool:
    """Whether nothing is left of it."""
    return all(each.is_off() for each in self.transforms)

  def take(self, rows_B: jax.Array) -> Self:
    """Gathers the per-row parameters of all."""
    return Chain(tuple(each.take(rows_B) for each in self.transforms))

  def tables(self) -> dict[str, Any]:
    """Returns the tables of all, by position and name."""
    return {f"{index}.{each.name}": each.tables() for index, each in enumerate(self.transforms)}

  def map_rows(self, change: Callable[..., jax.Array], *others: Self) -> Self:
    """Applies `change` to the numeric parameters of all."""
    beside = zip(*(other.transforms for other in others)) if others else ((),) * len(self.transforms)
    return Chain(
      tuple(each.map_rows(change, *rest) for each, rest in zip(self.transforms, beside, strict=True))
    )

  def spread(self, batch: int) -> Self:
    """Returns it with every numeric parameter of all for each row."""
    return Chain(tuple(each.spread(batch) for each in self.transforms))

  def row_parameters(self) -> dict[str, Parameter]:
    """Returns the parameters of all, as "position.transform.parameter"."""
    return {
      f"{index}.{each.name}.{name}": value
      for index, each in enumerate(self.transforms)
      for name, value in each.row_parameters().items()
    }

  def prepared(self) -> Self:
    """Returns it flat, checked, and without transforms that are off in every row."""
    return Chain(tuple(each.prepared() for each in _flatten(self.transforms) if not each.is_off()))


IDENTITY = Chain()


def chain(*transforms: Transform) -> Chain:
  """Composes transforms, the first one applied first. `chain()` is the identity."""
  for each in transforms:
    if not isinstance(each, Transform):
      raise TypeError(f"chain: {each!r} is no Transform; parse text with nr.generation.transforms.parse")
  return Chain(tuple(_flatten(transforms)))


def _flatten(transforms: Iterable[Transform]) -> Iterable[Transform]:
  for each in transforms:
    if isinstance(each, Chain):
      yield from _flatten(each.transforms)
    else:
      yield each


def check_needs(needs: Iterable[str], offered: Iterable[str], what: str) -> None:
  """Refuses a chain that reads what the model does not offer.

  Raises:
    ValueError: names the transform's need, and what there is.
  """
  offered = sorted(offered)
  for need in sorted(needs):
    if need not in offered:
      raise ValueError(
        f"{what} needs {need!r}, which this model does not offer; it offers "
        f"{', '.join(offered) or 'no streams or hidden states'}. Add streams with "
        "nr.generation.streams.WithStreams, layers with Network(taps=...)"
      )


def guarded(logits_BV: jax.Array, raw_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Repairs rows from which nothing can be drawn.

  A row without a finite logit, or with a NaN, becomes certain of the most probable
  token before the chain (id 0 when that is NaN throughout).

  Returns:
    Logits [B, V] and bool [B], which rows were repaired.
  """
  top_B = logits_BV.max(axis=-1)
  is_broken_B = ~jnp.isfinite(top_B)
  fallback_B = jnp.argmax(jnp.where(jnp.isnan(raw_BV), -jnp.inf, raw_BV), axis=-1)
  certain_BV = jnp.where(jnp.arange(raw_BV.shape[-1]) == fallback_B[:, None], 0.0, -jnp.inf)
  return jnp.where(is_broken_B[:, None], certain_BV, logits_BV), is_broken_B
