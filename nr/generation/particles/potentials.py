"""Potentials: targets p(y) phi(y) over whole texts, told token by token.

A potential is a transform with two more methods. `log_twist` says by which factor each
next token changes the weight of the text, so phi is the product of the factors of its
tokens; `final` is the factor of ending there. `particle_filter` draws from p * phi;
a potential in a chain edits the next-token law only, which is an approximation.

    ban = HardConstraint(no_such_words)                  # phi is 0 or 1
    target = product(ban, TokenCount(weight=1.0, ids_E=[7]), Final(score))

A potential of one's own is a subclass of `Potential` under the decorator `potential`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.transforms.algebra import Context, Parameter, State, Transform, column, row, static, table


class Potential(Transform):
  """A factor phi(y) >= 0 of texts. Subclasses declare fields like transforms."""

  def log_twist(self, log_probs_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns float32 [B, V] nats, the log-factor of each next token; -inf forbids it.

    Args:
      log_probs_BV: float32, the law p of the next token; -inf where it cannot come.
      state: of this potential.
      context: the history, with streams and hidden states.
    """
    return jnp.zeros_like(log_probs_BV)

  def final(self, state: State, context: Context) -> jax.Array:
    """Returns float32 [B] nats, the log-factor of ending after the history in `context`.

    It is asked once, when a row ends by a stop or by its limit.
    """
    return jnp.zeros(context.lengths_B.shape)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns the next-token law times the factors: the local approximation of the target."""
    return add_twist(logits_BV, self.log_twist(jax.nn.log_softmax(logits_BV, axis=-1), state, context))


def potential(name: str) -> Callable[[type], type]:
  """Makes a subclass of `Potential` a frozen dataclass and a pytree. Not known to chains in text."""

  def register(cls: type) -> type:
    cls.name = name
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    kinds = {field.name: field.metadata.get("kind") for field in dataclasses.fields(cls)}
    data = [field for field, kind in kinds.items() if kind != "static"]
    jax.tree_util.register_dataclass(cls, data, [field for field, kind in kinds.items() if kind == "static"])
    return cls

  return register


def add_twist(log_probs_BV: jax.Array, log_twist_BV: jax.Array) -> jax.Array:
  """Returns log(p * psi); -inf where either is 0, whatever the other."""
  is_open_BV = (log_probs_BV != -jnp.inf) & (log_twist_BV != -jnp.inf)
  # Selected before the sum, so that -inf + inf is never formed.
  return jnp.where(is_open_BV, log_probs_BV + jnp.where(is_open_BV, log_twist_BV, 0.0), -jnp.inf)


class _Wrapper(Potential):
  """Base of potentials made of transforms: their parameters are those of the parts."""

  def _parts(self) -> dict[str, Transform]:
    raise NotImplementedError

  def _with(self, parts: dict[str, Transform]) -> Self:
    return dataclasses.replace(self, **parts)

  @property
  def needs(self) -> frozenset[str]:
    """Union of what the parts need."""
    return frozenset().union(*(each.needs for each in self._parts().values()))

  def take(self, rows_B: jax.Array) -> Self:
    """Gathers the per-row parameters of the parts."""
    return self._with({name: each.take(rows_B) for name, each in self._parts().items()})

  def row_parameters(self) -> dict[str, Parameter]:
    """Returns the parameters of the parts, as "part.parameter"."""
    return {
      f"{part}.{name}": value
      for part, each in self._parts().items()
      for name, value in each.row_parameters().items()
    }

  def prepared(self) -> Self:
    """Returns it with prepared parts."""
    return self._with({name: each.prepared() for name, each in self._parts().items()})


@potential("hard_constraint")
class HardConstraint(_Wrapper):
  """phi = 1 for texts of which the transform bans no token, else 0.

  With the proposal "locally_optimal" the weight of a text is the product of the masses
  that the transform kept on its way: decoding under a mask, made exact. Whatever else
  the transform does to logits counts for nothing.

  Attributes:
    transform: one that bans; it is applied to log p. One with a method `is_complete(state)`
      returning bool [B] (`Constrain`, which must know the ids that end a text) also says
      whether a text may end.
  """

  transform: Transform = table()

  def _parts(self) -> dict[str, Transform]:
    return {"transform": self.transform}

  def init(self, context: Context, vocab_size: int) -> State:
    """Returns the state of the transform."""
    return self.transform.init(context, vocab_size)

  def log_twist(self, log_probs_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns 0 for what the transform keeps and -inf for what it bans."""
    kept_BV = self.transform.apply(log_probs_BV, state, context)
    return jnp.where(kept_BV == -jnp.inf, -jnp.inf, 0.0)

  def final(self, state: State, context: Context) -> jax.Array:
    """Returns -inf for texts that end where the transform says that they are not complete."""
    if not hasattr(self.transform, "is_complete"):
      return super().final(state, context)
    return jnp.where(self.transform.is_complete(state), 0.0, -jnp.inf)

  def commit(self, state: State, tokens_B: jax.Array, context: Context) -> State:
    """Commits the transform."""
    return self.transform.commit(state, tokens_B, context)


@potential("reweighting")
class Reweighting(_Wrapper):
  """phi = product over tokens of exp(transformed logit - log p): a transform, applied to whole texts.

  The transform's own result is the factor; it is not normalised. `Temperature(t)` makes
  the target p^(1/t), the global law that lower temperatures only resemble; a bias
  makes it p times exp(bias * count); a truncation restricts p to the texts it lets through.

  Attributes:
    transform: it is applied to log p.
  """

  transform: Transform = table()

  def _parts(self) -> dict[str, Transform]:
    return {"transform": self.transform}

  def init(self, context: Context, vocab_size: int) -> State:
    """Returns the state of the transform."""
    return self.transform.init(context, vocab_size)

  def log_twist(self, log_probs_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns the change that the transform makes; 0 where p has nothing to change."""
    changed_BV = self.transform.apply(log_probs_BV, state, context)
    is_possible_BV = log_probs_BV != -jnp.inf
    return jnp.where(is_possible_BV, changed_BV - jnp.where(is_possible_BV, log_probs_BV, 0.0), 0.0)

  def commit(self, state: State, tokens_B: jax.Array, context: Context) -> State:
    """Commits the transform."""
    return self.transform.commit(state, tokens_B, context)


@potential("token_count")
class TokenCount(Potential):
  """phi = exp(weight * how many generated tokens are in a list).

  Attributes:
    weight: nats a token, may be negative; a scalar or [B].
    ids_E: int32 token ids; a repeated one counts once. Ids outside the vocabulary count nothing.
  """

  weight: Parameter = row(1.0)
  ids_E: Any = table(())

  def prepared(self) -> Self:
    """Returns it with arrays."""
    ids_E = jnp.asarray(np.asarray(self.ids_E, np.int32).reshape(-1))
    return super(TokenCount, dataclasses.replace(self, ids_E=ids_E)).prepared()

  def log_twist(self, log_probs_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns the weight at the listed tokens, else 0."""
    ids_E = jnp.asarray(self.ids_E, jnp.int32)
    is_listed_V = jnp.zeros(log_probs_BV.shape[1], bool).at[ids_E].set(True, mode="drop")
    return jnp.where(is_listed_V, column(self.weight), 0.0) + jnp.zeros_like(log_probs_BV)


@potential("final")
class Final(Potential):
  """phi of the finished text, known at its end only.

  Attributes:
    function: (parameters, context) -> float32 [B] log phi, traceable; static, so
      give the same function object again, or it is compiled again. The text is
      `context.tokens_BS` from `prompt_lengths_B` to `lengths_B`, the stop id included.
    parameters: any pytree that the function needs; traced.
  """

  function: Callable[[Any, Context], jax.Array] = static()
  parameters: Any = table(())

  def final(self, state: State, context: Context) -> jax.Array:
    """Returns what the function says."""
    return self.function(self.parameters, context)


class LookaheadState(NamedTuple):
  """State of `Lookahead`: that of its base, and log h of the history."""

  base: State
  log_values_B: jax.Array


@potential("lookahead")
class Lookahead(_Wrapper):
  """A potential whose intermediate targets look ahead by h, its expected future factor (a twist).

  The factors telescope: h is divided out when the text ends, so the target and the
  unbiasedness of the evidence do not depend on h; its quality decides the variance.
  With h(prefix) = E_p[future factors | prefix], and 1 at the end, weights are constant.

  Attributes:
    base: the potential that defines the target.
    function: (parameters, context) -> float32 [B, V] log h after each next token,
      finite; static. It may read `context.hidden` (a value head) and streams.
    parameters: any pytree; traced.
    reads: "hidden:<name>" and "streams:<name>" that the function reads.

  Source: twisted sequential Monte Carlo, arXiv:2404.17546; division at the end is our
  choice: targets stay exact for any h.
  """

  base: Potential = table()
  function: Callable[[Any, Context], jax.Array] = static()
  parameters: Any = table(())
  reads: tuple[str, ...] = static(())

  def _parts(self) -> dict[str, Transform]:
    return {"base": self.base}

  @property
  def needs(self) -> frozenset[str]:
    """What the base and the function read."""
    return self.base.needs | frozenset(self.reads)

  def init(self, context: Context, vocab_size: int) -> LookaheadState:
    """Returns the base's state; h of the history in `context` counts as 1."""
    return LookaheadState(self.base.init(context, vocab_size), jnp.zeros(context.lengths_B.shape))

  def log_twist(self, log_probs_BV: jax.Array, state: LookaheadState, context: Context) -> jax.Array:
    """Returns the base's factors times h after the token over h before it."""
    change_BV = self.function(self.parameters, context) - state.log_values_B[:, None]
    return add_twist(self.base.log_twist(log_probs_BV, state.base, context), change_BV)

  def final(self, state: LookaheadState, context: Context) -> jax.Array:
    """Returns the base's last factor over h."""
    return self.base.final(state.base, context) - state.log_values_B

  def commit(self, state: LookaheadState, tokens_B: jax.Array, context: Context) -> LookaheadState:
    """Commits the base and remembers h."""
    values_BV = self.function(self.parameters, context)
    values_B = jnp.take_along_axis(values_BV, tokens_B[:, None], axis=1, mode="clip")[:, 0]
    return LookaheadState(self.base.commit(state.base, tokens_B, context), values_B)


def _look_up(table_TV: jax.Array, context: Context) -> jax.Array:
  return table_TV[jnp.minimum(context.generated_B, table_TV.shape[0] - 1)]


def twist_table(base: Potential, log_values_TV: Any) -> Lookahead:
  """Returns `base` looking ahead by a table.

  Args:
    base: the potential that defines the target.
    log_values_TV: float32 nats, log h of prefixes by their number of generated tokens
      minus 1 (the last row for longer ones) and their last token.
  """
  return Lookahead(base, _look_up, jnp.asarray(log_values_TV, jnp.float32))


@potential("product")
class Product(_Wrapper):
  """The product of potentials; 1 without any. Made by `product`."""

  factors: tuple[Potential, ...] = table(())

  def _parts(self) -> dict[str, Transform]:
    return {f"{index}.{each.name}": each for index, each in enumerate(self.factors)}

  def _with(self, parts: dict[str, Transform]) -> Self:
    return Product(tuple(parts.values()))

  def init(self, context: Context, vocab_size: int) -> State:
    """Returns a tuple of states."""
    return tuple(each.init(context, vocab_size) for each in self.factors)

  def log_twist(self, log_probs_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns the product of the factors; 0 wherever one is 0."""
    total_BV = jnp.zeros_like(log_probs_BV)
    for each, its_state in zip(self.factors, state, strict=True):
      total_BV = add_twist(total_BV, each.log_twist(log_probs_BV, its_state, context))
    return total_BV

  def final(self, state: State, context: Context) -> jax.Array:
    """Returns the product of the last factors."""
    total_B = jnp.zeros(context.lengths_B.shape)
    for each, its_state in zip(self.factors, state, strict=True):
      total_B = add_twist(total_B, each.final(its_state, context))
    return total_B

  def commit(self, state: State, tokens_B: jax.Array, context: Context) -> State:
    """Commits all."""
    return tuple(each.commit(its_state, tokens_B, context) for each, its_state in zip(self.factors, state))


def product(*factors: Potential) -> Product:
  """Multiplies potentials. `product()` is 1, whose target is the law itself."""
  for each in factors:
    if not isinstance(each, Potential):
      raise TypeError(
        f"product: {each!r} is no Potential; wrap a transform in HardConstraint (what it bans has weight 0) "
        "or Reweighting (its change of the logits is the weight)"
      )
  return Product(tuple(factors))
