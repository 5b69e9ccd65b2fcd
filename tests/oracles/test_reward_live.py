"""Our reward models as classifiers of `transformers`, live."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch (extra [oracles])")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
pytest.importorskip("safetensors", reason="needs safetensors (extra [hub])")

from nr.interchange.huggingface import load_huggingface_reward_model, save_huggingface_reward_model  # noqa: E402
from nr.models import parameters  # noqa: E402
from nr.training.model_files import graphdef_of  # noqa: E402

pytestmark = pytest.mark.oracle

_path = pathlib.Path(__file__).parents[1] / "golden" / "make_reward_goldens.py"
_module = importlib.util.spec_from_file_location("make_reward_goldens", _path)
goldens = importlib.util.module_from_spec(_module)
_module.loader.exec_module(goldens)


@pytest.mark.parametrize("family", goldens.FAMILIES)
def test_rewards_agree_both_ways(family, tmp_path):
  model = goldens.make_classifier(family, width=32, seed=7)
  model.save_pretrained(tmp_path / "theirs")
  spec, params = load_huggingface_reward_model(tmp_path / "theirs")
  tokens, lengths = goldens.random_texts(1, rows=6, length=17)

  def ours(params):
    return np.asarray(parameters.merge(graphdef_of(spec), params)(tokens, lengths))

  np.testing.assert_allclose(ours(params), goldens.rewards_of(model, tokens, lengths), atol=1e-5, rtol=0)
  changed = jax.tree.map(lambda leaf: leaf * 0.75, params)
  save_huggingface_reward_model(tmp_path / "ours", spec, changed, pad_token_id=goldens.PAD)
  again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  found = goldens.rewards_of(again.eval(), tokens, lengths)
  np.testing.assert_allclose(found, ours(changed), atol=1e-5, rtol=0)
