"""Law 17: eight devices compute the concept model's loss and gradients as one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cocomix_models import concept_spec, gpt2_spec, llama_spec
from flax import nnx

from nr.models.concept_mixing import ConceptMixingTransformer
from nr.models.parameters import logical_axes, merge, split
from nr.objectives.concept_prediction import concept_prediction_loss
from nr.training import sharding

BATCH, LENGTH, VOCAB, CONCEPTS = 8, 8, 96, 64

MESHES = {
  "data": dict(data=8, fsdp=1, tensor=1, sequence=1),
  "fsdp": dict(data=1, fsdp=8, tensor=1, sequence=1),
  "all": dict(data=2, fsdp=2, tensor=2, sequence=1),
  "tensor": dict(data=2, fsdp=1, tensor=4, sequence=1),
  "sequence": dict(data=2, fsdp=1, tensor=2, sequence=2),
}


def _inputs():
  keys = jax.random.split(jax.random.key(0), 2)
  tokens = jax.random.randint(keys[0], (BATCH, LENGTH), 0, VOCAB)
  labels = jax.lax.top_k(jax.random.uniform(keys[1], (BATCH, LENGTH, CONCEPTS)), 4)[1]
  return dict(tokens=tokens, labels=labels.at[:, -1].set(65535))


def _loss(graphdef):
  def loss(params, batch):
    model = merge(graphdef, params)
    output = model.forward(batch["tokens"], labels_BLA=batch["labels"])
    concepts = output.concepts
    scored = concept_prediction_loss(
      concepts.log_normalizer_BL, concepts.label_logits_BLA, batch["labels"], concepts.indices_BLK
    )
    log_probs = jax.nn.log_softmax(model.logits(output.hidden_BLD))
    nll = -jnp.take_along_axis(log_probs[:, :-1], batch["tokens"][:, 1:, None], axis=-1).mean()
    return nll + 0.1 * scored.loss.mean(), scored.recall.mean()

  return jax.value_and_grad(loss, has_aux=True)


SETTINGS = {
  "fused": (gpt2_spec, dict(head_impl="fused", concept_chunk=6, compression_impl="gather")),
  "dense": (llama_spec, dict(head_impl="dense", compression_impl="dense")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, mesh_name", [*(("fused", mesh) for mesh in MESHES), ("dense", "all"), ("dense", "tensor")]
)
def test_17_sharded_loss_and_gradients_equal_one_device(name, mesh_name):
  make_spec, settings = SETTINGS[name]
  spec = make_spec(vocab_size=VOCAB, num_heads=4, num_kv_heads=4)
  concepts = concept_spec(num_concepts=CONCEPTS, **settings)

  def build():
    return ConceptMixingTransformer(spec, concepts, rngs=nnx.Rngs(0))

  graphdef, params = split(build())
  batch = _inputs()
  (loss, recall), gradient = jax.jit(_loss(graphdef))(params, batch)

  mesh = sharding.make_mesh(MESHES[mesh_name])
  placed = sharding.shardings(logical_axes(build), mesh, params)
  with sharding.context(mesh):
    step = jax.jit(_loss(graphdef), out_shardings=(None, placed))
    arguments = jax.device_put(params, placed), sharding.put_batch(jax.device_get(batch), mesh)
    (sharded_loss, sharded_recall), sharded_gradient = step(*arguments)
    program = step.lower(*arguments).compile().as_text()

  np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
  np.testing.assert_allclose(sharded_recall, recall, rtol=1e-6)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), sharded_gradient, gradient
  )
  # A program without collectives would have been tested on one device.
  assert "all-reduce" in program
  assert ("all-gather" in program) or mesh_name == "data"
