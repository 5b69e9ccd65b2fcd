"""Labels made in the train step from the frozen teacher and autoencoder, instead of a cache of them.

What the reference does. Every batch costs the teacher's forward pass, its backward pass down to the tap
and the autoencoder's encoder; labels are those of the very windows that the student sees, shifted
ones included.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nr.models import parameters
from nr.objectives.weighted import LossOutput
from nr.recipes.cocomix.label_corpus import Labelling, label_batch
from nr.training.method import Method
from nr.training.model_files import Model, axes_of

TEACHER, AUTOENCODER = "teacher", "autoencoder"
"""Names of the two in `Method.frozen`."""


def with_online_labels(method: Method, teacher: Model, autoencoder: Model, labelling: Labelling) -> Method:
  """Returns the method, given batches without labels, which it makes itself.

  Args:
    method: reads `labels` [B, L, A] of its batches and, where the variant weighs labels,
      `label_weights`. Where its frozen arrays have a "teacher" already, it must be this one.
    teacher: the language model that labels.
    autoencoder: of its residual stream.
    labelling: the variant, and how much is held at a time.
  """
  frozen = {**method.frozen, TEACHER: teacher.params, AUTOENCODER: autoencoder.params}
  axes = {TEACHER: axes_of(teacher.spec), AUTOENCODER: axes_of(autoencoder.spec)}
  # Without axes of its own, the method keeps a copy of its frozen arrays on every device; so do these then.
  is_sharded = method.frozen_axes is not None or not method.frozen

  def loss(params: Any, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> LossOutput:
    fixed = jax.lax.stop_gradient((frozen[TEACHER], frozen[AUTOENCODER]))
    teacher_module = parameters.merge(teacher.graphdef, fixed[0])
    autoencoder_module = parameters.merge(autoencoder.graphdef, fixed[1])
    labels = label_batch(teacher_module, autoencoder_module, batch, labelling)
    labelled = {**batch, "labels": labels.labels_BLA}
    if labels.weights_BLA is not None:
      labelled["label_weights"] = labels.weights_BLA.astype(jnp.float32)
    return method.loss(params, frozen, extra, labelled, key)

  return method._replace(
    loss=loss, frozen=frozen, frozen_axes={**(method.frozen_axes or {}), **axes} if is_sharded else None
  )
