"""How other projects lay out sparse autoencoders: their tensors' names, and what they call our settings.

Sources: openai/sparse_autoencoder model.py, EleutherAI/sparsify sparse_coder.py, SAELens saes/*.py and
loading/pretrained_sae_loaders.py. Arrays: D model, C latents.
"""

from typing import NamedTuple

import jax
from flax import nnx

from nr.interchange import names
from nr.models import parameters
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec

CONFIG = "cfg.json"
SPARSIFY_TENSORS, SAELENS_TENSORS = "sae.safetensors", "sae_weights.safetensors"
EPSILON = 1e-5
"""What all of them add to the deviation."""


class Row(NamedTuple):
  """One line of a name map.

  Attributes:
    theirs: name of their tensor.
    ours: path in our tree.
    is_transposed: whether their matrix is ours transposed.
  """

  theirs: str
  ours: str
  is_transposed: bool = False


OPENAI = (
  Row("encoder.weight", "encoder/kernel", True),
  Row("decoder.weight", "decoder/kernel", True),
  Row("pre_bias", "pre_bias"),
  Row("latent_bias", "latent_bias"),
)
OPENAI_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
SPARSIFY = (
  Row("encoder.weight", "encoder/kernel", True),
  Row("encoder.bias", "latent_bias"),
  Row("W_dec", "decoder/kernel"),
  Row("b_dec", "pre_bias"),
)
_SAELENS_BASE = (Row("W_enc", "encoder/kernel"), Row("W_dec", "decoder/kernel"), Row("b_dec", "pre_bias"))
_SAELENS_BIAS = (*_SAELENS_BASE, Row("b_enc", "latent_bias"))
SAELENS = {
  "standard": _SAELENS_BIAS,
  "topk": _SAELENS_BIAS,
  "jumprelu": (*_SAELENS_BIAS, Row("threshold", "threshold")),
  "gated": (
    *_SAELENS_BASE,
    Row("b_gate", "gate_bias"),
    Row("b_mag", "magnitude_bias"),
    Row("r_mag", "magnitude_scale"),
  ),
}
SAELENS_NAMES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
SAELENS_NORMALISATIONS = {
  "none": "none",
  "layer_norm": "layer_norm_unbiased",
  "constant_norm_rescale": "constant_norm",
}


def shapes_of(spec: SparseAutoencoderSpec) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of our parameters by path, without making them."""

  def build(key: jax.Array) -> dict:
    return parameters.split(SparseAutoencoder(spec, rngs=nnx.Rngs(key)))[1]

  return {path: leaf.shape for path, leaf in names.flatten(jax.eval_shape(build, jax.random.key(0))).items()}
