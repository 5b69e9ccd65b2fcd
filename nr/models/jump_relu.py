"""JumpReLU and the Heaviside step with straight-through gradients for the threshold.

arXiv 2407.14435 section 4, with the rectangular kernel of width epsilon: for z = pre-activation,

    jump_relu(z) = z [z > theta]     d/d theta = -(theta / epsilon) [|z - theta| < epsilon / 2]
    heaviside(z) = [z > theta]       d/d theta = -(1 / epsilon)     [|z - theta| < epsilon / 2]

The gradient to z is [z > theta] for the first and 0 for the second.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def jump_relu(scores: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
  """Returns scores above the threshold as they are, 0 elsewhere.

  Args:
    scores: [..., C] pre-activations.
    threshold: [C], not negative.
    bandwidth: width of the kernel of the straight-through gradient.
  """
  del bandwidth
  return jnp.where(scores > threshold, scores, 0)


@jump_relu.defjvp
def _jump_relu_jvp(bandwidth: float, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  scores, threshold = primals
  scores_dot, threshold_dot = tangents
  pulled = -(threshold / bandwidth) * _kernel(scores, threshold, bandwidth) * threshold_dot
  return jump_relu(scores, threshold, bandwidth), (scores > threshold) * scores_dot + pulled


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def heaviside(scores: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
  """Returns 1 where the score is above the threshold, 0 elsewhere; summed over latents it is L0."""
  del bandwidth
  return (scores > threshold).astype(scores.dtype)


@heaviside.defjvp
def _heaviside_jvp(bandwidth: float, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  scores, threshold = primals
  pulled = -(1 / bandwidth) * _kernel(scores, threshold, bandwidth) * tangents[1]
  return heaviside(scores, threshold, bandwidth), pulled


def _kernel(scores: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
  return (jnp.abs(scores - threshold) < bandwidth / 2).astype(scores.dtype)
