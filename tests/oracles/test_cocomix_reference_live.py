"""Our CoCoMix models under the reference's names, against its computation written in torch, live."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch (extra [oracles])")
pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors (extra [hub])")

from nr.interchange.cocomix_reference import save_cocomix_reference  # noqa: E402
from nr.models import parameters  # noqa: E402
from nr.models.concept_mixing import ConceptMixingSpec  # noqa: E402
from nr.models.transformer import TransformerSpec  # noqa: E402
from nr.training.model_files import ConceptMixingModelSpec, build_model, graphdef_of  # noqa: E402
from tests.golden import make_cocomix_reference_goldens as goldens  # noqa: E402

pytestmark = pytest.mark.oracle

SPEC = TransformerSpec.gpt2(vocab_size=97, num_layers=4, model_dim=64, num_heads=4, max_length=64)


def test_what_we_write_computes_what_we_compute(tmp_path):
  concepts = ConceptMixingSpec(insert_at=0, num_concepts=goldens.NUM_CONCEPTS, top_k=5)
  spec = ConceptMixingModelSpec(SPEC, concepts)
  params = jax.jit(lambda: parameters.split(build_model(spec, jax.random.key(5)))[1])()
  leaves, tree = jax.tree.flatten(params)
  generator = np.random.default_rng(5)
  params = jax.tree.unflatten(
    tree, [leaf + 0.1 * generator.standard_normal(leaf.shape, "f") for leaf in leaves]
  )
  tokens, _ = goldens.make_inputs(seed=7, length=17)
  ours = jax.jit(lambda params: parameters.merge(graphdef_of(spec), params)(tokens))(params)
  save_cocomix_reference(tmp_path, SPEC, concepts, params)
  weights = safetensors_numpy.load_file(tmp_path / "model.safetensors")
  assert {name: tensor.shape for name, tensor in weights.items()} == goldens.tensor_shapes()
  theirs, _ = goldens.forward(weights, tokens, insert_at=0, top_k=5)
  np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5, rtol=0)
