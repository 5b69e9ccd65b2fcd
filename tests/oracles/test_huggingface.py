"""Random `transformers` models against ours, both directions, live."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch", reason="needs torch (extra [oracles])")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
pytest.importorskip("safetensors", reason="needs safetensors (extra [hub])")

from nr.interchange.huggingface import load_huggingface, save_huggingface  # noqa: E402
from nr.models import parameters  # noqa: E402
from nr.models.transformer import Transformer, TransformerSpec  # noqa: E402

pytestmark = pytest.mark.oracle

_path = pathlib.Path(__file__).parents[1] / "golden" / "make_huggingface_goldens.py"
_module = importlib.util.spec_from_file_location("make_huggingface_goldens", _path)
goldens = importlib.util.module_from_spec(_module)
_module.loader.exec_module(goldens)

TOKENS = np.random.default_rng(1).integers(0, goldens.VOCAB_SIZE, (3, 17)).astype(np.int32)


def our_logits(spec, params):
  graphdef = nnx.split(jax.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0))))[0]
  return np.asarray(jax.jit(lambda p, t: parameters.merge(graphdef, p)(t))(params, TOKENS))


def their_logits(folder):
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="eager", output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  return goldens.logits_of(model.eval(), TOKENS)


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_their_checkpoint_gives_their_logits_and_ours_saved_gives_ours(family, tmp_path):
  model = goldens.make_model(family, width=32, seed=7)
  model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
  assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
  spec, params = load_huggingface(tmp_path / "theirs")
  logits = our_logits(spec, params)
  np.testing.assert_allclose(logits, goldens.logits_of(model, TOKENS), atol=1e-5, rtol=0)

  changed = jax.tree.map(lambda leaf: leaf * 0.75, params)  # other numbers, of order 1 still
  save_huggingface(tmp_path / "ours", spec, changed)
  np.testing.assert_allclose(their_logits(tmp_path / "ours"), our_logits(spec, changed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_born_here_are_read_by_transformers(family, layers, tmp_path):
  sizes = {
    "vocab_size": 19,
    "num_layers": 2,
    "model_dim": 16,
    "num_heads": 4,
    "max_length": 20,
    "layers": layers,
  }
  spec = getattr(TransformerSpec, family)(**sizes)
  _, params = parameters.split(Transformer(spec, rngs=nnx.Rngs(3)))
  save_huggingface(tmp_path, spec, params)
  np.testing.assert_allclose(their_logits(tmp_path), our_logits(spec, params), atol=1e-5, rtol=0)
