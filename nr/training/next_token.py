"""Next-token prediction: the method of every plain language model in the house."""

from typing import Any

import jax

from nr.models import parameters
from nr.models.transformer import TransformerSpec
from nr.objectives.language_modeling import next_token_loss
from nr.objectives.weighted import LossOutput
from nr.training.method import Method
from nr.training.policy import Policy, new_policy


def next_token_method(
  model: TransformerSpec | Policy, *, name: str = "next_token", loss_chunk: int | None = None
) -> Method:
  """Returns the method that trains a transformer on the next token, from scratch or from given parameters.

  Args:
    model: settings of a new model; or a policy, to fine-tune it or an adapter on it.
    name: used in logs and errors.
    loss_chunk: tokens whose logits are held at a time; None holds all of them.

  Returns:
    A `Method` whose batches hold `tokens`, `targets` and `weights` [B, L] and,
    where attention stays within documents, `segment_ids` and `positions`.
    Weight decay covers every parameter, as in GPT-2 and CoCoMix's code.
  """

  policy = model if isinstance(model, Policy) else new_policy(model)

  def loss(params: Any, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> LossOutput:
    del extra
    model = parameters.merge(policy.graphdef, policy.assemble(params, frozen, policy.adapter_key(key)))
    hidden_BLD = model.hidden(
      batch["tokens"],
      segment_ids_BL=batch.get("segment_ids"),
      positions_BL=batch.get("positions"),
      key=key if policy.spec.dropout else None,
    )
    total = next_token_loss(
      hidden_BLD, model.unembedding_VD, batch["targets"], batch["weights"], chunk_size=loss_chunk
    )
    return LossOutput(total, {"next_token_loss": total})

  return Method(
    name=name,
    init=policy.init,
    start=policy.start,
    loss=loss,
    axes=policy.axes,
    frozen=policy.fixed,
    frozen_axes=policy.fixed_axes,
  )
