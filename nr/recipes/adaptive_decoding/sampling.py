"""Writing responses: prompts in pieces of one size, so that one program serves all."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.generation.adaptive_decoding import AdaptiveNetwork, DrawnSetting, sample_adaptively
from nr.generation.language_models import Network
from nr.generation.sample import Generation, sample
from nr.generation.stopping import Stop
from nr.generation.transforms import parse
from nr.recipes.adaptive_decoding import families
from nr.training.model_files import Model

PIECE = 250
"""Prompts sampled at once."""


class Written(NamedTuple):
  """Responses on the host, rows R prompt-major.

  Attributes:
    tokens_RN: int32, the end of text included where it was reached.
    lengths_R: int32.
    log_probs_RN: nats a token under the model.
    transformed_log_probs_RN: nats a token under what it was drawn from.
    choices_RN: int, the setting that each token was drawn with; -1 behind the end; None without settings.
  """

  tokens_RN: np.ndarray
  lengths_R: np.ndarray
  log_probs_RN: np.ndarray
  transformed_log_probs_RN: np.ndarray
  choices_RN: np.ndarray | None = None


def with_head(network: Network, head: Model | None, num_settings: int) -> AdaptiveNetwork:
  """Returns the network with a trained head, or with settings that are equally likely."""
  fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(Network)}
  if head is None:
    return AdaptiveNetwork(**fields, num_settings=num_settings)
  return AdaptiveNetwork(**fields, head_graphdef=head.graphdef, head_params=head.params)


def write(
  model: Network,
  prompts_PT: np.ndarray,
  *,
  key: jax.Array,
  num_samples: int,
  law: DrawnSetting | None = None,
  chain: str = "",
) -> Written:
  """Samples responses with settings that a head picks, or with a chain of transforms.

  All have room for the longest response of any family, so that one program serves all; rows end by themselves.

  Args:
    model: a network, adaptive if `law` is given.
    prompts_PT: int32, all of one length.
    key: random key; the prompt's number decides the rest.
    num_samples: responses a prompt.
    law: how settings are picked.
    chain: transforms in text form, where no setting is picked.
  """
  stop = Stop(ids_E=jnp.asarray([families.END]))
  count, pieces = len(prompts_PT), []
  for start in range(0, count, PIECE):
    # The last piece is filled up with the last prompt, whose further answers are thrown away.
    rows = np.minimum(np.arange(start, start + min(PIECE, count)), count - 1)
    shared: dict[str, Any] = dict(
      key=key,
      max_new_tokens=families.MAX_RESPONSE,
      num_samples=num_samples,
      stop=stop,
      row_ids_B=jnp.asarray(rows),
    )
    prompts = jnp.asarray(prompts_PT[rows])
    kept = min(PIECE, count - start) * num_samples
    if law is None:
      found = _host(sample(model, prompts, chain=parse(chain), **shared))
    else:
      adaptive = sample_adaptively(model, prompts, law=law, **shared)
      found = _host(adaptive.generation)._replace(choices_RN=np.asarray(adaptive.choices_RN, np.int32))
    pieces.append(Written(*(None if leaf is None else leaf[:kept] for leaf in found)))
  return Written(*(None if leaves[0] is None else np.concatenate(leaves) for leaves in zip(*pieces)))


def _host(generation: Generation) -> Written:
  fields = ("tokens_RN", "lengths_R", "log_probs_RN", "transformed_log_probs_RN")
  return Written(*(np.asarray(getattr(generation, field)) for field in fields))
