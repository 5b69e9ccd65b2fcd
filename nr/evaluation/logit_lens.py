"""The logit lens: which tokens a direction of the residual stream speaks for.

Source: the direct reading of a stream by the output head (known as the logit lens; for autoencoder rows e.g.
arXiv 2309.08600, 2406.04093), here with the final norm's scale and centring folded in.
"""

import jax
import jax.numpy as jnp

from nr.models.transformer import Transformer


def logit_lens(transformer: Transformer, directions_CD: jax.Array) -> jax.Array:
  """Returns float32 [C, V]: what each direction of the stream adds to the logits, blocks in between left out.

  A direction d that is small next to the stream, and orthogonal to it, moves the logits by a positive multiple
  of U (norm(d) - norm(0)): the derivative of the final norm there is its centring and its scale. Values are
  those of a stream that is the direction alone; within a row their order is that of the effect.

  Args:
    transformer: whose final norm and output head are read.
    directions_CD: directions of its stream; a zero row gives zeros.
  """
  wide_CD = directions_CD.astype(jnp.float32)
  moved_CD = transformer.final_norm(wide_CD) - transformer.final_norm(jnp.zeros_like(wide_CD))
  return transformer.logits(moved_CD)
