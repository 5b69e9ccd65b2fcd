"""A teacher steered by its own latents: exact where nothing is edited, and otherwise what the edit says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.generation.language_models import Network
from nr.generation.sample import sample
from nr.models.concept_intervention import InterventionMode, concept_intervention
from nr.models.parameters import split
from nr.models.residual_tap import TapInputs, activations_at
from nr.models.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderSpec, densify
from nr.models.steered_transformer import SteeredTransformer
from nr.models.transformer import Transformer
from tests.laws.cocomix_models import LENGTH, gpt2_spec, make_tokens

LATENTS, LAYER = 40, 0
TEACHER = Transformer(gpt2_spec(init_std=0.3), rngs=nnx.Rngs(0))
TOKENS = make_tokens()
CODES = dict(topk={}, jumprelu=dict(initial_threshold=0.2, max_active=LATENTS))


def make(arch="topk", layer=LAYER, width=16):
  spec = SparseAutoencoderSpec(model_dim=width, num_latents=LATENTS, k=6, arch=arch, **CODES[arch])
  autoencoder = SparseAutoencoder(spec, rngs=nnx.Rngs(1))
  return SteeredTransformer(TEACHER, autoencoder, layer)


def edit(mode, value=1.0, concept=3, **settings):
  return concept_intervention([concept], mode, value, num_concepts=LATENTS, **settings)


@jax.jit
def logits(tokens, intervention):
  return MODEL(tokens, intervention=intervention)


@jax.jit
def added(intervention):
  """What an edit adds to the stream."""
  return MODEL.concepts.mix(*_stream(MODEL, intervention))


MODEL = make()


def test_without_an_effective_edit_it_is_the_transformer_itself():
  plain = jax.jit(TEACHER.__call__)(TOKENS)
  np.testing.assert_allclose(logits(TOKENS, None), plain, atol=2e-6)
  np.testing.assert_array_equal(added(None), 0.0)
  for mode in InterventionMode:
    nowhere = edit(mode.name, 5.0, active_BL=jnp.array([[False]]))
    np.testing.assert_allclose(logits(TOKENS, nowhere), plain, atol=2e-6)
    np.testing.assert_array_equal(added(nowhere), 0.0)
  for mode, value in (("scale_pre", 1.0), ("scale_post", 1.0), ("add", 0.0)):
    np.testing.assert_array_equal(added(edit(mode, value)), 0.0)
  assert not np.allclose(logits(TOKENS, edit("force", 4.0)), plain, atol=1e-2)


def _stream(model, intervention):
  x = activations_at(model.transformer, TapInputs(TOKENS), model.concept_spec.insert_at - 1)
  return x, model.concepts.predict(x, intervention=intervention)


@pytest.mark.parametrize("arch", ["topk", "jumprelu"])
def test_the_stream_moves_by_the_scaled_rows_of_the_changed_latents(arch):
  model = make(arch)
  rows = np.asarray(model.concepts.autoencoder.decoder_rows())
  for mode, value in (("force_value", 2.5), ("set", 4.0), ("ablate_post", 0.0), ("scale_post", 3.0)):
    x, found = _stream(model, edit(mode, value))
    before, after = (np.asarray(densify(code, LATENTS)) for code in (found.before, found.after))
    changed = (before != after).sum(-1)
    assert changed.max() <= 2 and changed.any()  # the latent, and one that it may have evicted
    scale = np.asarray(x).std(-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(model.concepts.mix(x, found), scale * ((after - before) @ rows), atol=2e-5)
    if mode in ("force_value", "set"):
      np.testing.assert_allclose(after[..., 3], value, rtol=1e-6)
    if mode == "ablate_post":
      assert (before[..., 3] > 0).any() and (after[..., 3] == 0).all()


def test_a_cache_gives_the_full_forward_and_only_generated_tokens_are_edited():
  pushed = edit("force", 3.0)
  network = Network(*split(MODEL), intervention=pushed, intervene_on="generation")
  drawn = sample(network, TOKENS, max_new_tokens=3)
  text = jnp.concatenate([TOKENS, drawn.tokens_RN], axis=1)
  late = pushed._replace(active_BL=jnp.arange(LENGTH + 3)[None] >= LENGTH - 1)
  greedy = jnp.argmax(logits(text, late), axis=-1)
  np.testing.assert_array_equal(drawn.tokens_RN, greedy[:, LENGTH - 1 : -1])
  clean = jnp.argmax(jax.jit(TEACHER.__call__)(text), axis=-1)
  assert (clean[:, LENGTH - 1 : -1] != drawn.tokens_RN).any()  # the edit mattered


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="layer=2 is the last block"):
    make(layer=2)
  with pytest.raises(ValueError, match="layer=3 is outside the model"):
    make(layer=3)
  with pytest.raises(ValueError, match="reads streams of width 8, the transformer's has 16"):
    make(width=8)
