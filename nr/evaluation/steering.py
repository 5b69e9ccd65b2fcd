"""What steering a concept does, in numbers: how far it moves distributions, what texts become, what it costs.

All functions take a steerable model as (definition, parameters): a concept model, or a
teacher with its autoencoder (`nr.models.steered_transformer`). Edits are arrays
(`nr.models.concept_intervention`), so sweeps of strengths compile once. Arrays here:
P prompts, S strengths, L tokens of a prompt, N new tokens, V token ids.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.language_models import Network
from nr.generation.sample import sample
from nr.generation.stopping import Stop
from nr.generation.transforms.algebra import chain
from nr.generation.transforms.temperature import Temperature
from nr.models import parameters
from nr.models.concept_intervention import ConceptIntervention, InterventionMode
from nr.models.residual_tap import TapInputs, activations_at
from nr.objectives.language_modeling import token_nll

LOSS_CHUNK = 512
"""Tokens whose logits are held at a time when texts are scored."""


class Shift(NamedTuple):
  """How an edit moves next-token distributions, a row for each prompt and strength.

  Attributes:
    kl_SP: KL(edited || unedited), nats, mean over the prompt's positions.
    flips_SP: share of positions whose most likely token is another.
    loss_change_SP: what the true next tokens lose, nats a token: edited minus unedited loss.
    log_ratio_SPV: change of every token's log-probability, nats, mean over positions.
  """

  kl_SP: np.ndarray
  flips_SP: np.ndarray
  loss_change_SP: np.ndarray
  log_ratio_SPV: np.ndarray


class Sweep(NamedTuple):
  """Continuations of every prompt at every strength.

  Attributes:
    tokens_SPN: int32; what follows a text's end is filling.
    lengths_SP: int32, tokens of each text, its end included.
  """

  tokens_SPN: np.ndarray
  lengths_SP: np.ndarray

  @property
  def is_own_SPN(self) -> np.ndarray:
    """Which tokens belong to the texts."""
    return np.arange(self.tokens_SPN.shape[-1]) < self.lengths_SP[..., None]


def edits(
  concept: int, mode: str, strengths: Sequence[float | None], *, rows: int = 1
) -> ConceptIntervention:
  """Returns edits of one concept, `rows` rows for each strength, in that order; None: edited nowhere."""
  values_S = [0.0 if value is None else float(value) for value in strengths]
  is_edited_S = [value is not None for value in strengths]
  shape = (len(values_S) * rows, 1)
  return ConceptIntervention(
    jnp.full(shape, concept, jnp.int32),
    jnp.full(shape, int(InterventionMode[mode.upper()]), jnp.int32),
    jnp.repeat(jnp.asarray(values_S, jnp.float32), rows)[:, None],
    jnp.repeat(jnp.asarray(is_edited_S), rows)[:, None],
  )


def shift(
  model: tuple[Any, Any], tokens_PL: np.ndarray, concept: int, mode: str, strengths: Sequence[float | None]
) -> Shift:
  """Compares next-token distributions with and without an edit of every position, at every strength.

  A strength of None is edited nowhere: its row measures by how much the editing program differs from the plain
  one, and should be 0.
  """
  found = _shift(*model, jnp.asarray(tokens_PL), edits(concept, mode, strengths))
  return Shift(*map(np.asarray, found))


@functools.partial(jax.jit, static_argnums=0)
def _shift(graphdef: Any, params: Any, tokens_PL: jax.Array, edits_S: ConceptIntervention) -> Shift:
  model = parameters.merge(graphdef, params)
  clean_PLV = jax.nn.log_softmax(model(tokens_PL))
  best_PL, targets_PL1 = clean_PLV.argmax(-1), tokens_PL[:, 1:, None]

  def one(edit: ConceptIntervention) -> Shift:
    edit = jax.tree.map(lambda leaf: leaf[None], edit)  # one row, shared by the prompts
    edited_PLV = jax.nn.log_softmax(model(tokens_PL, intervention=edit))
    change_PLV = edited_PLV - clean_PLV
    # sum p (log p/q - 1 + q/p): as sum p log p/q, but no term is negative and small ones do not cancel.
    kl_P = (jnp.exp(edited_PLV) * (change_PLV + jnp.expm1(-change_PLV))).sum(-1).mean(-1)
    flips_P = (edited_PLV.argmax(-1) != best_PL).mean(-1)
    loss_P = -jnp.take_along_axis(change_PLV[:, :-1], targets_PL1, axis=-1)[..., 0].mean(-1)
    return Shift(kl_P, flips_P, loss_P, change_PLV.mean(1))

  return jax.lax.map(one, edits_S)


def continue_prompts(
  model: tuple[Any, Any],
  prompts_PL: np.ndarray,
  concept: int,
  mode: str,
  strengths: Sequence[float | None],
  *,
  key: jax.Array,
  temperature: float,
  max_new_tokens: int,
  stop_id: int,
) -> Sweep:
  """Continues every prompt at every strength, all in one batch.

  Edited are the tokens from which another is drawn: the last of the prompt and all new ones. A prompt draws the
  same random numbers at every strength, so that strengths differ by their effect alone.
  """
  strengths = list(strengths)
  count, copies = len(prompts_PL), len(strengths)
  network = Network(
    *model, intervention=edits(concept, mode, strengths, rows=count), intervene_on="generation"
  )
  drawn = sample(
    network,
    np.tile(prompts_PL, (copies, 1)),
    key=key,
    chain=chain(Temperature(temperature)),
    max_new_tokens=max_new_tokens,
    stop=Stop(ids_E=[stop_id]),
    row_ids_B=jnp.tile(jnp.arange(count), copies),
  )
  tokens_RN, lengths_R = np.asarray(drawn.tokens_RN), np.asarray(drawn.lengths_R)
  return Sweep(tokens_RN.reshape(copies, count, -1), lengths_R.reshape(copies, count))


def continuation_nll(model: tuple[Any, Any], prompts_PL: np.ndarray, swept: Sweep) -> np.ndarray:
  """Returns the nats [S, P] of each text under a model, summed over its own tokens."""
  whole_RT = _whole(prompts_PL, swept)
  nll_RN = np.asarray(_nll(*model, whole_RT, first=prompts_PL.shape[1]))
  return np.where(swept.is_own_SPN, nll_RN.reshape(swept.tokens_SPN.shape), 0.0).sum(-1)


def _whole(prompts_PL: np.ndarray, swept: Sweep) -> np.ndarray:
  """Returns prompts and texts as rows [S P, L + N]."""
  copies, _, size = swept.tokens_SPN.shape
  return np.concatenate([np.tile(prompts_PL, (copies, 1)), swept.tokens_SPN.reshape(-1, size)], axis=1)


@functools.partial(jax.jit, static_argnums=0, static_argnames="first")
def _nll(graphdef: Any, params: Any, whole_RT: jax.Array, *, first: int) -> jax.Array:
  model = parameters.merge(graphdef, params)
  hidden_RTD = model.hidden(whole_RT[:, :-1])
  return token_nll(
    hidden_RTD[:, first - 1 :], model.unembedding_VD, whole_RT[:, first:], chunk_size=LOSS_CHUNK
  )


def latent_rate(
  teacher: Any, autoencoder: Any, layer: int, prompts_PL: np.ndarray, swept: Sweep, latent: int
) -> np.ndarray:
  """Returns how many tokens [S, P] of each text a teacher's latent fires on, as the teacher reads prompt and text.

  A latent is a classifier of tokens that nobody had to label; it has not seen the steered model.

  Args:
    teacher: model (definition and parameters) whose latents are read.
    autoencoder: of its stream.
    layer: after which block, from 0.
    prompts_PL: what the texts continue.
    swept: the texts.
    latent: which one.
  """
  definitions = (teacher.graphdef, autoencoder.graphdef, layer)
  values = (teacher.params, autoencoder.params)
  fires_RT = np.asarray(_fires(definitions, values, _whole(prompts_PL, swept), jnp.int32(latent)))
  fires_SPN = fires_RT[:, prompts_PL.shape[1] :].reshape(swept.tokens_SPN.shape)
  return (fires_SPN & swept.is_own_SPN).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _fires(definitions: Any, values: Any, tokens_RT: jax.Array, latent: jax.Array) -> jax.Array:
  teacher, autoencoder, layer = definitions
  stream_RTD = activations_at(parameters.merge(teacher, values[0]), TapInputs(tokens_RT), layer)
  module = parameters.merge(autoencoder, values[1])
  code = module.encode(module.normalise(stream_RTD).values_TD)
  return ((code.indices_TK == latent) & (code.values_TK > 0)).any(-1)


def rank_correlation(first_PV: np.ndarray, second_PV: np.ndarray) -> np.ndarray:
  """Returns Spearman's correlation [P] of each pair of rows; NaN where a row is constant."""
  from scipy import stats

  ranks = [stats.rankdata(rows, axis=-1) for rows in (first_PV, second_PV)]
  first_PV, second_PV = (each - each.mean(-1, keepdims=True) for each in ranks)
  scale_P = np.sqrt((first_PV**2).sum(-1) * (second_PV**2).sum(-1))
  with np.errstate(invalid="ignore"):
    return (first_PV * second_PV).sum(-1) / scale_P


def top_overlap(first_PV: np.ndarray, second_PV: np.ndarray, count: int) -> np.ndarray:
  """Returns the share [P] of the `count` largest entries of one row that are among those of the other."""
  tops = [np.argsort(-rows, axis=-1, kind="stable")[:, :count] for rows in (first_PV, second_PV)]
  return np.array([len(np.intersect1d(*pair)) / count for pair in zip(*tops)])
