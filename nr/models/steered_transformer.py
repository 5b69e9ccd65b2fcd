"""A transformer whose stream is edited in the basis of a sparse autoencoder: how a teacher's own concepts are steered.

    model = SteeredTransformer(transformer, autoencoder, layer)
    logits_BLV = model(tokens_BL, intervention=edit)

After block `layer` the latents of every token are edited, with the modes of
`nr.models.concept_intervention`, and the stream moves by what the edit changes in the
reconstruction, at the stream's own scale s:

    h' = h + s (decode(edited code) - decode(code))

What the autoencoder does not reconstruct stays in the stream, so that an edit that changes
no latent changes nothing at all. The paper (arXiv 2502.08524, section 3.2) raises a latent,
decodes and continues the teacher, and does not say what becomes of that error (ours).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nr.models.concept_intervention import ConceptIntervention, edit_logits, edit_selection
from nr.models.concept_mixing import ConceptMixingTransformer
from nr.models.concept_mixing_spec import ConceptMixingSpec
from nr.models.residual_tap import check_layer
from nr.models.sparse_autoencoder import Normalised, SparseAutoencoder, SparseCode
from nr.models.top_k import top_k
from nr.models.transformer import Transformer


class EditedCode(NamedTuple):
  """The latents of a stream, before and after an edit.

  Attributes:
    before: active latents of every token [B, L, K].
    after: the same, edited; an emptied place has value 0 and index -1.
    normalised: the stream in the autoencoder's space, and its scale.
  """

  before: SparseCode
  after: SparseCode
  normalised: Normalised


class AutoencoderPath(nnx.Module):
  """From the stream to edited latents, and to what the edit adds to the stream."""

  def __init__(self, autoencoder: SparseAutoencoder):
    self.autoencoder = autoencoder

  def predict(
    self, x_BLD: jax.Array, labels_BLA: None = None, intervention: ConceptIntervention | None = None
  ) -> EditedCode:
    """Encodes the stream and edits the code.

    Modes that act before a selection act on the scores from which a topk autoencoder selects, and on the
    activations of the other architectures, which select by a threshold.

    Args:
      x_BLD: the stream.
      labels_BLA: none: an autoencoder is not trained here.
      intervention: what to change; None: nothing.
    """
    del labels_BLA
    normalised = self.autoencoder.normalise(x_BLD)
    code = self.autoencoder.encode(normalised.values_TD)
    if intervention is None:
      return EditedCode(code, code, normalised)
    return EditedCode(code, self._edited(normalised.values_TD, intervention), normalised)

  def _edited(self, u_BLD: jax.Array, intervention: ConceptIntervention) -> SparseCode:
    spec = self.autoencoder.spec
    is_selecting = spec.arch == "topk"
    scores_BLC = (
      self.autoencoder.pre_activations(u_BLD) if is_selecting else self.autoencoder.activations(u_BLD)
    )
    scores_BLC = edit_logits(scores_BLC, intervention)
    values_BLK, indices_BLK = top_k(scores_BLC, spec.max_active, implementation=spec.top_k)
    # An ablated latent (-inf) that fills up a short selection stays marked as such.
    values_BLK = jnp.where(jnp.isneginf(values_BLK), values_BLK, jax.nn.relu(values_BLK))
    return SparseCode(*edit_selection(values_BLK, indices_BLK, intervention))

  def mix(self, x_BLD: jax.Array, edited: EditedCode) -> jax.Array:
    """Returns what the edit adds to the stream, in its type; exactly 0 where no latent has changed."""
    before, after = edited.before, edited.after
    is_changed_BL = ((before.values_TK != after.values_TK) | (before.indices_TK != after.indices_TK)).any(-1)
    decode, how = self.autoencoder.decode_latents, self.autoencoder.spec.decoding
    change_BLD = (decode(after, how) - decode(before, how)) * edited.normalised.deviation_T1
    return jnp.where(is_changed_BL[..., None], change_BLD, 0).astype(x_BLD.dtype)


class SteeredTransformer(ConceptMixingTransformer):
  """A transformer with an autoencoder in its stream, steered and decoded like a concept model.

  Takes every argument of `ConceptMixingTransformer` but labels, caches included; without an
  intervention it is the transformer itself.

  Args:
    transformer: the model.
    autoencoder: trained on its stream after block `layer`, in the form that is used (not batchtopk).
    layer: that block, from 0. Not the last one: nothing would follow that could be cached.

  Raises:
    ValueError: a layer outside the model or the last one, or an autoencoder of another width.
  """

  def __init__(self, transformer: Transformer, autoencoder: SparseAutoencoder, layer: int):
    spec, latents = transformer.spec, autoencoder.spec
    check_layer(spec.num_layers, layer)
    if layer == spec.num_layers - 1:
      raise ValueError(f"layer={layer} is the last block: steer a stream that later blocks read, below it")
    if latents.model_dim != spec.model_dim:
      raise ValueError(
        f"the autoencoder reads streams of width {latents.model_dim}, the transformer's has {spec.model_dim}; "
        "give the one that was trained on it"
      )
    self.spec = spec
    # Its only part that is read: mode "add" adds what the path returns to the stream before a block.
    self.concept_spec = ConceptMixingSpec(
      insert_at=layer + 1, num_concepts=latents.num_latents, top_k=latents.max_active, mode="add"
    )
    self.transformer = transformer
    self.concepts = AutoencoderPath(autoencoder)
