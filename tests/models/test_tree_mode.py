"""The models also run with the flags of Flax's announced tree mode."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from flax import nnx
from nr.models import lora, parameters
from nr.models.transformer import Transformer, TransformerSpec
from nr.objectives.language_modeling import next_token_loss

assert not nnx.using_graph_mode() if hasattr(nnx, "using_graph_mode") else True
sizes = dict(vocab_size=13, num_layers=2, model_dim=8, num_heads=2)
tokens = jnp.zeros((1, 5), jnp.int32)
for spec in (TransformerSpec.gpt2(**sizes, max_length=8), TransformerSpec.llama(**sizes, layers="unroll")):
  build = lambda: Transformer(spec, rngs=nnx.Rngs(0))
  graphdef, params = parameters.split(build())
  parameters.logical_axes(build)
  def loss(params):
    model = parameters.merge(graphdef, params)
    hidden = model.hidden(tokens)
    return next_token_loss(hidden, model.unembedding_VD, tokens, jnp.ones((1, 5)), 2).mean()
  jax.jit(jax.value_and_grad(loss))(params)
  model = parameters.merge(graphdef, params)
  logits, cache = jax.jit(lambda params, cache: parameters.merge(graphdef, params).extend(tokens, cache))(
    params, model.init_cache(1, 6))
  assert float(jnp.abs(logits - model(tokens)).max()) < 1e-5
  low = lora.LoraSpec(rank=2)
  adapter = lora.init_adapter(low, params, jax.random.key(0))
  gradients = jax.jit(jax.grad(lambda adapter: loss(lora.attach(params, adapter, low))))(adapter)
  assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 0
print("tree mode works")
"""


def test_tree_mode_flags():
  flags = {"FLAX_NNX_GRAPH_MODE": "false", "FLAX_NNX_GRAPH_UPDATES": "false", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], env=os.environ | flags, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "tree mode works" in done.stdout
