"""Contrastive search and DoLa against committed results of transformers 4.46.3, which was the last to have them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.generation.contrastive_search import contrastive_search
from nr.generation.decoding import pad_prompts
from nr.generation.language_models import Network
from nr.generation.transforms.layer_contrast import LayerContrast
from nr.interchange.huggingface import load_huggingface
from nr.models.transformer import Transformer
from tests.generation.transform_cases import context_of

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FOUND = json.loads((GOLDEN / "transformers_4_46.json").read_text())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_contrastive_search_gives_the_texts_of_transformers(family):
  pytest.importorskip("safetensors.numpy", reason="needs safetensors (extra [hub])")
  spec, params = load_huggingface(GOLDEN / f"huggingface_{family}")[:2]
  graphdef = nnx.split(jax.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0))))[0]
  model = Network(graphdef, params, offers_hidden=True)
  runs = [run for run in FOUND["contrastive_search"] if run["family"] == family]
  for k in sorted({run["k"] for run in runs}):
    same = [run for run in runs if run["k"] == k]
    prompts, valid = pad_prompts([run["prompt"] for run in same])
    alphas = [run["alpha"] for run in same]
    out = contrastive_search(model, prompts, valid, alpha=alphas, k=k, max_new_tokens=12)
    np.testing.assert_array_equal(out.tokens_RN, [run["text"] for run in same])


def test_layer_contrast_is_that_of_transformers():
  """Rows together in one batch here; transformers ran them one by one."""
  runs = FOUND["layer_contrast"]
  last_BV, layers_BLV = (jnp.array([run[name] for run in runs]) for name in ("last", "layers"))
  streams = {f"layer_{index}": layers_BLV[:, index] for index in range(3)}
  context = context_of([[1, 2]] * len(runs))._replace(streams=streams)
  found_BV = LayerContrast((0, 1, 2), variant="hf").prepared().apply(last_BV, (), context)
  expected_BV = np.array(
    [[-np.inf if value is None else value for value in run["contrast"]] for run in runs]
  )
  np.testing.assert_allclose(found_BV, expected_BV, atol=1e-5)
