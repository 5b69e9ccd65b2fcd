"""Random PEFT adapters against ours, both directions, live."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch", reason="needs torch (extra [oracles])")
pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
peft = pytest.importorskip("peft", reason="needs peft (extra [oracles])")
pytest.importorskip("safetensors", reason="needs safetensors (extra [hub])")

from nr.interchange.huggingface import load_huggingface  # noqa: E402
from nr.interchange.peft import load_peft, save_peft  # noqa: E402
from nr.models import parameters  # noqa: E402
from nr.models.lora import attach, merge  # noqa: E402
from nr.models.transformer import Transformer  # noqa: E402

pytestmark = pytest.mark.oracle

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
_module = importlib.util.spec_from_file_location("make_peft_goldens", GOLDEN / "make_peft_goldens.py")
goldens = importlib.util.module_from_spec(_module)
_module.loader.exec_module(goldens)

TOKENS = np.random.default_rng(1).integers(0, 19, (3, 17)).astype(np.int32)


def our_logits(spec, params):
  graphdef = nnx.split(jax.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0))))[0]
  return np.asarray(jax.jit(lambda p, t: parameters.merge(graphdef, p)(t))(params, TOKENS))


@pytest.mark.parametrize("name", goldens.ADAPTERS)
def test_their_adapter_gives_their_logits_and_ours_saved_gives_ours(name, tmp_path):
  family, settings = goldens.ADAPTERS[name]
  base = GOLDEN / f"huggingface_{family}"
  theirs = goldens.make_adapted(goldens.load_base(base), settings, seed=7)
  theirs.save_pretrained(tmp_path / "theirs")
  spec, params = load_huggingface(base)
  lora, adapter = load_peft(tmp_path / "theirs", spec)
  found = our_logits(spec, attach(params, adapter, lora))
  np.testing.assert_allclose(found, goldens.logits_of(theirs, TOKENS), atol=1e-5, rtol=0)

  # Merged there is merged here: PEFT's own weights give the logits of its adapter.
  merged = our_logits(spec, merge(params, adapter, lora))
  np.testing.assert_allclose(merged, goldens.logits_of(theirs.merge_and_unload(), TOKENS), atol=1e-5, rtol=0)
  changed = jax.tree.map(lambda leaf: leaf * 0.75, adapter)
  save_peft(tmp_path / "ours", spec, lora, changed)
  loaded = peft.PeftModel.from_pretrained(goldens.load_base(base), tmp_path / "ours").eval()
  expected = our_logits(spec, attach(params, changed, lora))
  np.testing.assert_allclose(goldens.logits_of(loaded, TOKENS), expected, atol=1e-5, rtol=0)
  assert np.abs(expected - found).max() > 1e-2
