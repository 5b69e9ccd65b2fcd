"""The method that trains a head on pairs; the language model is frozen, or not there at all.

A batch holds pairs, chosen first. Of a language model that is frozen everything the loss reads can be
computed once: with `hidden` in the batch the model is never run.

Arrays in this file: B pairs, T positions (prompt, response, padding), D model, K settings.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nr.models import parameters
from nr.models.adaptive_decoder import AdaptiveDecoderSpec
from nr.objectives.latent_preference import (
  LatentPreferenceSpec,
  LatentScores,
  lpo_loss,
  sequence_scores,
  tempered_log_probs,
  token_scores,
)
from nr.objectives.weighted import LossOutput, Weighted
from nr.training.method import Method
from nr.training.model_files import axes_of, build_model, graphdef_of


class Features(NamedTuple):
  """What a loss reads of the language model.

  Attributes:
    hidden: final-normed states, [B, D] at the prompt's last token, or [B, 2, T, D].
    words: log p(target | temperature) [B, 2, T, K]; None for losses that read no words.
  """

  hidden: jax.Array
  words: jax.Array | None = None


def read_language_model(
  graphdef: Any,
  params: Any,
  batch: Any,
  spec: LatentPreferenceSpec,
  temperatures: tuple[float, ...],
  *,
  loss_chunk: int | None = None,
) -> Features:
  """Runs the language model on pairs; no gradient reaches it.

  Args:
    graphdef: of the transformer.
    params: of the transformer.
    batch: `tokens`, `targets` and `weights` [B, 2, T].
    spec: which features are needed.
    temperatures: of the words.
    loss_chunk: tokens whose logits are held at a time; None: all.
  """
  model = parameters.merge(graphdef, params)
  tokens_RT = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
  hidden_RTD = jax.lax.stop_gradient(model.hidden(tokens_RT))
  words = None
  if spec.needs_words:
    unembedding_VD = jax.lax.stop_gradient(model.unembedding_VD)
    targets_RT = batch["targets"].reshape(tokens_RT.shape)
    temperatures_K = jnp.asarray(temperatures)
    words = tempered_log_probs(hidden_RTD, unembedding_VD, targets_RT, temperatures_K, chunk_size=loss_chunk)
    words = words.reshape(*batch["tokens"].shape, -1)
  hidden = hidden_RTD.reshape(*batch["tokens"].shape, -1)
  if spec.level == "sequence":
    # The first position whose target is a response token is the prompt's last token; both sides share it.
    last_B = jnp.argmax(batch["weights"][:, 0] > 0, axis=-1)
    hidden = jnp.take_along_axis(hidden[:, 0], last_B[:, None, None], axis=1)[:, 0]
  return Features(hidden, words)


def score_pairs(
  spec: LatentPreferenceSpec, log_pi: jax.Array, batch: Any, words: jax.Array | None
) -> tuple[LatentScores, LatentScores]:
  """Returns the scores of chosen and rejected.

  Args:
    spec: which loss.
    log_pi: of the head, [B, K] or [B, 2, T, K].
    batch: `choices` and `weights` [B, 2, T].
    words: of `Features`.
  """
  sides = []
  for side in (0, 1):
    choices_BT, weights_BT = batch["choices"][:, side], batch["weights"][:, side]
    of_words = None if words is None else words[:, side]
    if spec.level == "token":
      sides.append(token_scores(spec, log_pi[:, side], choices_BT, weights_BT, of_words))
    else:
      first_B1 = jnp.argmax(weights_BT > 0, axis=-1)[:, None]
      choices_B = jnp.take_along_axis(choices_BT, first_B1, axis=1)[:, 0]
      sides.append(sequence_scores(spec, log_pi, choices_B, weights_BT, of_words))
  return sides[0], sides[1]


def latent_preference_method(
  head: AdaptiveDecoderSpec,
  spec: LatentPreferenceSpec,
  temperatures: tuple[float, ...],
  *,
  language_model: tuple[Any, Any, Any] | None = None,
  loss_chunk: int | None = None,
) -> Method:
  """Returns the method that trains a head by latent preference optimisation (arXiv 2411.09661 section 3.3).

  Args:
    head: settings of the head.
    spec: which loss.
    temperatures: the settings that are chosen from; for losses that read words.
    language_model: (definition, parameters, logical axes) of the frozen transformer, which is then run in
      every step; None: batches hold `hidden` and, where the loss reads words, `words`.
    loss_chunk: tokens whose logits are held at a time; None: all.

  Returns:
    A `Method` whose batches hold `choices` and `weights` [B, 2, T], `pair_weights` [B], and either the
    features or `tokens` and `targets` [B, 2, T].

  Raises:
    ValueError: temperatures that the loss cannot be trained with.
  """
  spec.check_temperatures(temperatures)
  graphdef = graphdef_of(head)
  model_graphdef, model_params, model_axes = language_model or (None, {}, None)

  def loss(params: Any, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> LossOutput:
    del extra, key
    if language_model is None:
      features = Features(batch["hidden"], batch["words"] if spec.needs_words else None)
    else:
      features = read_language_model(model_graphdef, frozen, batch, spec, temperatures, loss_chunk=loss_chunk)
    log_pi = parameters.merge(graphdef, params)(features.hidden)
    losses_B, metrics = lpo_loss(spec, *score_pairs(spec, log_pi, batch, features.words))
    weights_B = batch["pair_weights"]
    metrics = {name: Weighted.of(values_B, weights_B) for name, values_B in metrics.items()}
    entropy = -(jnp.exp(log_pi) * log_pi).sum(axis=-1)
    at = weights_B if spec.level == "sequence" else batch["weights"] * weights_B[:, None, None]
    metrics["head_entropy"] = Weighted.of(entropy, at)
    return LossOutput(Weighted.of(losses_B, weights_B), metrics)

  return Method(
    name=f"lpo_{spec.variant}",
    init=lambda key: parameters.split(build_model(head, key))[1],
    loss=loss,
    axes=axes_of(head),
    frozen=model_params,
    frozen_axes=model_axes,
  )
