"""Adaptive decoding: a head picks the setting that each token, or each text, is sampled with.

    model = AdaptiveNetwork(graphdef, params, head_graphdef=..., head_params=...)
    found = sample_adaptively(model, prompts_BP, key=key, law=DrawnSetting(TAUS, level="token"), max_new_tokens=32)
    found.generation.tokens_RN, found.choices_RN

The picked index is part of the chain's state, so it comes back aligned with the tokens. The third law
of the paper, the mixture, needs no index: `adaptive_temperature()` reads the same head.
Source: arXiv 2411.09661.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation import decoding
from nr.generation.language_models import LanguageModel, Network
from nr.generation.rows import advance, open_rows
from nr.generation.sample import Generation, read
from nr.generation.samplers import Gumbel, Sampler
from nr.generation.stopping import Stop
from nr.generation.transforms.algebra import (
  HIDDEN,
  IDENTITY,
  Context,
  State,
  Transform,
  chain,
  static,
  table,
  transform,
)
from nr.generation.transforms.temperature import Temperature
from nr.generation.transforms.truncation import MinP, TopK, TopP
from nr.models import parameters
from nr.names import unknown

LEVELS = ("sequence", "token")
SELECTIONS = ("sample", "greedy")
# Keeps the draw of a setting apart from the sampler's of the token at the same position.
_PURPOSE = 7


def _truncation(make: Callable[[jax.Array], Transform]) -> Callable[[jax.Array, jax.Array], jax.Array]:
  def act(logits_BV: jax.Array, values_B: jax.Array) -> jax.Array:
    return make(values_B).apply(logits_BV, (), None)

  return act


ACTIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "temperature": _truncation(Temperature),
  "top_k": _truncation(lambda values_B: TopK(values_B.astype(jnp.int32))),
  "top_p": _truncation(TopP),
  "min_p": _truncation(MinP),
}
"""What a setting may be: name -> function of float32 logits [B, V] and one value a row."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptiveNetwork(Network):
  """A network with a head on its final-normed state, which it offers as hidden "adaptive" [.., K].

  Attributes:
    head_graphdef: definition of an `AdaptiveDecoder`.
    head_params: its parameters; None: K = `num_settings` settings, equally likely.
    num_settings: K, where there is no head.
  """

  head_graphdef: Any = dataclasses.field(default=None, metadata=dict(static=True))
  head_params: Any = None
  num_settings: int = dataclasses.field(default=0, metadata=dict(static=True))

  @property
  def offers(self) -> frozenset[str]:
    """What a network offers, and the probabilities of the settings."""
    return super().offers | {HIDDEN + "adaptive"}

  def check(self) -> None:
    """Raises ValueError for settings that this model has no use for."""
    super().check()
    if (self.head_params is None) == (self.num_settings < 1):
      raise ValueError(
        f"num_settings={self.num_settings}: give a head, or the number of settings that are equally likely"
      )

  def extend(self, tokens_BL, cache, valid_BL=None, *, visible_BLL=None, read_B=None, is_prompt=False):
    """Reads new tokens; see `LanguageModel`."""
    base = dataclasses.replace(self, offers_hidden=True)
    outputs, cache = super(AdaptiveNetwork, base).extend(
      tokens_BL, cache, valid_BL, visible_BLL=visible_BLL, read_B=read_B, is_prompt=is_prompt
    )
    last = outputs.hidden["last"]
    if self.head_params is None:
      share = jnp.full((*last.shape[:-1], self.num_settings), 1 / self.num_settings)
    else:
      share = jnp.exp(parameters.merge(self.head_graphdef, self.head_params)(last))
    hidden = {"adaptive": share, **({"last": last} if self.offers_hidden else {})}
    return outputs._replace(hidden=hidden), cache


class Drawn(NamedTuple):
  """State of `DrawnSetting`.

  Attributes:
    choice_B: int32, the last index that was picked; -1 before the first.
    choices_BN: int8 by generated position; -1 where nothing was.
    log_probs_BN: float32 nats, log pi of each pick that was made there; 0 elsewhere.
  """

  choice_B: jax.Array
  choices_BN: jax.Array
  log_probs_BN: jax.Array


@transform("drawn_setting")
class DrawnSetting(Transform):
  """Samples with a setting that the head has picked, and remembers which.

  Attributes:
    values: the settings [K], temperatures for one; at most 127.
    action: a name of `ACTIONS`.
    level: "token" picks at every token; "sequence" once, at the last token of the prompt.
    selection: "sample" (Eq. 5) or "greedy" (Eq. 4, the first of equals).
    length: most new tokens that are remembered; a driver's max_new_tokens.
  """

  values: Any = table()
  action: str = static("temperature", tuple(ACTIONS))
  level: str = static("token", LEVELS)
  selection: str = static("sample", SELECTIONS)
  length: int = static(1)

  # The picks of the past depend on the head's probabilities, which no history holds.
  is_rebuilt_by_init = False

  @property
  def needs(self) -> frozenset[str]:
    """The head's probabilities."""
    return frozenset([HIDDEN + "adaptive"])

  def init(self, context: Context, vocab_size: int) -> Drawn:
    """Returns a state without picks."""
    rows = context.lengths_B.shape[0]
    shape = (rows, self.length)
    return Drawn(jnp.full(rows, -1, jnp.int32), jnp.full(shape, -1, jnp.int8), jnp.zeros(shape))

  def _pick(self, state: Drawn, context: Context) -> tuple[jax.Array, jax.Array]:
    """Returns the index of this step and log pi of it; the same in `apply` and `commit`."""
    log_pi_BK = jnp.log(context.hidden["adaptive"].astype(jnp.float32))
    if self.selection == "greedy":
      fresh_B = jnp.argmax(log_pi_BK, axis=-1).astype(jnp.int32)
    else:
      keys_B = context.step_keys(_PURPOSE)
      fresh_B = jax.vmap(jax.random.categorical)(keys_B, log_pi_BK).astype(jnp.int32)
    log_prob_B = jnp.take_along_axis(log_pi_BK, fresh_B[:, None], axis=-1)[:, 0]
    if self.level == "token":
      return fresh_B, log_prob_B
    is_first_B = state.choice_B < 0
    return jnp.where(is_first_B, fresh_B, state.choice_B), jnp.where(is_first_B, log_prob_B, 0.0)

  def apply(self, logits_BV: jax.Array, state: State, context: Context) -> jax.Array:
    """Returns what the action makes of the logits with the picked setting."""
    choice_B, _ = self._pick(state, context)
    return ACTIONS[self.action](logits_BV, jnp.asarray(self.values, jnp.float32)[choice_B])

  def commit(self, state: Drawn, tokens_B: jax.Array, context: Context) -> Drawn:
    """Returns the state with the pick of this position."""
    choice_B, log_prob_B = self._pick(state, context)
    rows_B, place_B = jnp.arange(tokens_B.shape[0]), context.generated_B
    return Drawn(
      choice_B,
      state.choices_BN.at[rows_B, place_B].set(choice_B.astype(jnp.int8), mode="drop"),
      state.log_probs_BN.at[rows_B, place_B].set(log_prob_B, mode="drop"),
    )

  def prepared(self) -> "DrawnSetting":
    """Returns it with arrays.

    Raises:
      ValueError: no value or too many, a value that the action refuses, or no room to remember.
    """
    checked = Transform.prepared(self)
    values_K = np.atleast_1d(np.asarray(self.values, np.float32))
    if values_K.ndim != 1 or not 0 < len(values_K) <= 127:
      raise ValueError(f"drawn_setting.values has shape {values_K.shape}: give 1 to 127 values")
    if self.length < 1:
      raise ValueError(f"drawn_setting.length={self.length}: give the driver's max_new_tokens")
    check_values(self.action, values_K)
    return dataclasses.replace(checked, values=jnp.asarray(values_K))


def check_values(action: str, values: Any) -> None:
  """Raises ValueError for an unknown action, or settings that it refuses."""
  makes = dict(temperature=Temperature, top_k=TopK, top_p=TopP, min_p=MinP)
  if action not in makes:
    raise ValueError(unknown("action", action, makes))
  values_K = np.asarray(values)
  if action == "top_k" and np.array_equal(values_K, np.round(values_K)):
    values_K = values_K.astype(np.int32)
  makes[action](values_K).prepared()


class AdaptiveGeneration(NamedTuple):
  """What prompts were continued with, and which settings were picked on the way.

  Attributes:
    generation: tokens and their log-probabilities, of `sample`.
    choices_RN: int8, the index that each token was drawn with; -1 after the end.
    choice_log_probs_RN: float32 nats, log pi of each pick (of the first alone with level "sequence").
  """

  generation: Generation
  choices_RN: jax.Array
  choice_log_probs_RN: jax.Array


def sample_adaptively(
  model: LanguageModel,
  prompts_BP: jax.Array,
  valid_BP: jax.Array | None = None,
  *,
  key: jax.Array,
  law: DrawnSetting,
  after: Transform = IDENTITY,
  sampler: Sampler | None = None,
  max_new_tokens: int,
  num_samples: int = 1,
  stop: Stop | None = None,
  row_ids_B: jax.Array | None = None,
) -> AdaptiveGeneration:
  """As `nr.generation.sample`, with a picked setting a token or text; the picks come back.

  Args:
    model: one that offers hidden "adaptive".
    prompts_BP: int32 token ids, padded on the left.
    valid_BP: bool, False at padding.
    key: random key, of settings and tokens.
    law: which settings, and how they are picked.
    after: further transforms, applied behind it.
    sampler: how tokens are drawn; None: `Gumbel`.
    max_new_tokens: most tokens to add; static.
    num_samples: samples of each prompt; each picks for itself.
    stop: what ends a row before that.
    row_ids_B: int32 identity of each prompt for its random keys.

  Raises:
    ValueError: what `sample` refuses.
  """
  law = dataclasses.replace(law, length=max_new_tokens)
  checked, prompts_BP, valid_BP = decoding.check_request(
    model, chain(law, after), prompts_BP, valid_BP, max_new_tokens, num_samples
  )
  batch = prompts_BP.shape[0]
  stop = (stop or Stop()).prepared(batch, max_new_tokens, model.vocab_size)
  keys_R = decoding.row_keys(key, row_ids_B, batch, num_samples)
  rows_R = jnp.repeat(jnp.arange(batch), num_samples)
  sampler = Gumbel() if sampler is None else sampler
  rows = _start(model, checked, sampler, stop, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples)
  model, checked, stop = (each.take(rows_R) for each in (model, checked, stop))
  rows = advance(model, checked, sampler, stop, rows, max_new_tokens)
  drawn = rows.state[0]
  is_token_RN = jnp.arange(max_new_tokens) < rows.context.generated_B[:, None]
  return AdaptiveGeneration(
    read(rows, stop),
    jnp.where(is_token_RN, drawn.choices_BN, -1),
    jnp.where(is_token_RN, drawn.log_probs_BN, 0.0),
  )


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "num_samples"))
def _start(model, law, sampler, stop, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples):
  """Reads the prompts and draws the first token of every row."""
  begun = decoding.begin(model, law, prompts_BP, valid_BP, keys_R, max_new_tokens, num_samples=num_samples)
  rows_R = jnp.repeat(jnp.arange(prompts_BP.shape[0]), num_samples)
  return open_rows(law.take(rows_R), sampler, stop.take(rows_R), begun, max_new_tokens)
