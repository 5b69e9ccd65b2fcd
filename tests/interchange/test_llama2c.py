"""A really trained small model, continued greedily exactly as llama2.c prints it."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.interchange.llama2c import load_llama2c
from nr.models import parameters
from nr.models.transformer import Transformer


@pytest.fixture(scope="module")
def stories(nr_data):
  folder = nr_data / "models" / "stories260k"
  if not folder.is_dir():
    pytest.skip(f"needs {folder}")
  return folder


def layout(params, spec):
  return parameters.unstack_layers(params) if spec.layers == "unroll" else params


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_the_greedy_continuation_is_exact(stories, layers):
  expected = json.loads((stories / "expected.json").read_text())["greedy_from_bos_tokens"]
  spec, params = load_llama2c(stories / "stories260K.bin", layers=layers)
  assert (spec.model_dim, spec.num_kv_heads, spec.mlp_dim, spec.tied_head) == (64, 4, 172, True)
  graphdef = nnx.split(jax.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0))))[0]

  @jax.jit
  def continue_greedily(params):
    model = parameters.merge(graphdef, params)

    def step(carry, _):
      token, cache = carry
      logits_BLV, cache = model.extend(token, cache)
      token = jnp.argmax(logits_BLV[:, -1:], axis=-1).astype(jnp.int32)
      return (token, cache), token[0, 0]

    start = (jnp.full((1, 1), 1, jnp.int32), model.init_cache(1, len(expected)))
    return jax.lax.scan(step, start, length=len(expected) - 1)[1]

  assert [1, *continue_greedily(layout(params, spec)).tolist()] == expected
  assert len(expected) == 1 + 256


def test_the_first_logits_are_those_of_the_file(stories):
  with np.load(stories / "expected_logits.npz", allow_pickle=False) as expected:
    tokens, logits = expected["tokens"], expected["logits"]
  spec, params = load_llama2c(stories / "stories260K.bin")
  graphdef = nnx.split(jax.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0))))[0]
  ours = jax.jit(lambda p, t: parameters.merge(graphdef, p)(t))(params, np.asarray(tokens[None], np.int32))
  assert logits.shape == (32, 512)
  np.testing.assert_allclose(ours[0], logits, atol=2e-5, rtol=0)


def test_the_tokenizer_beside_it_spells_the_continuation(stories):
  from nr.data.tokenizers import load_tokenizer

  expected = json.loads((stories / "expected.json").read_text())
  tokenizer = load_tokenizer(stories / "tok512.bin")
  text = expected["greedy_from_bos_text"].removeprefix(" ")
  assert tokenizer.decode(expected["greedy_from_bos_tokens"]) == text
  assert tokenizer.encode(text) == expected["greedy_from_bos_tokens"][1:]


def write_model(path, vocab_size, extra=0):
  """A file of 1 layer, width 4, 2 heads, MLP 6, 3 positions, whose numbers count up."""
  vocab = abs(vocab_size)
  count = vocab * 4 + 4 + 4 * 16 + 4 + 3 * 24 + 4 + 3 * 2 + (vocab * 4 if vocab_size < 0 else 0) + extra
  path.write_bytes(struct.pack("<7i", 4, 6, 1, 2, 2, vocab_size, 3) + np.arange(count, dtype="<f4").tobytes())


def test_a_negative_vocabulary_size_means_a_head_of_its_own(tmp_path):
  write_model(tmp_path / "m.bin", -5)
  spec, params = load_llama2c(tmp_path / "m.bin")
  assert spec.vocab_size == 5 and not spec.tied_head
  assert params["token_embedding"][0, 0] == 0
  # The last 20 numbers of 194, after six of rotary tables.
  np.testing.assert_array_equal(params["unembedding"].ravel(), np.arange(174, 194))


def test_rotary_pairs_move_from_neighbours_to_halves(tmp_path):
  path = tmp_path / "m.bin"
  count = 5 * 4 + 4 + 4 * 16 + 4 + 3 * 24 + 4 + 3 * 4
  path.write_bytes(struct.pack("<7i", 4, 6, 1, 1, 1, 5, 3) + np.arange(count, dtype="<f4").tobytes())
  _, params = load_llama2c(path)
  query_DHK = params["blocks"]["attention"]["query"]["kernel"][0]
  first_row = 5 * 4 + 4
  # Rows 0, 1, 2, 3 of the file's [out, in] matrix become 0, 2, 1, 3.
  np.testing.assert_array_equal(query_DHK[0, 0], first_row + np.array([0, 8, 4, 12]))
  value_DHK = params["blocks"]["attention"]["value"]["kernel"][0]
  np.testing.assert_array_equal(value_DHK[0, 0], first_row + 32 + np.array([0, 4, 8, 12]))


@pytest.mark.parametrize(
  "content, message",
  [
    (b"short", "shorter than the header"),
    (struct.pack("<7i", 4, 6, 1, 3, 2, 5, 3), "is not that of a llama2.c"),
    (struct.pack("<7i", 4, 6, 1, 2, 2, 5, 3) + b"\0" * 16, "16 bytes after the header, not"),
  ],
)
def test_other_files_are_refused(content, message, tmp_path):
  (tmp_path / "m.bin").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    load_llama2c(tmp_path / "m.bin")
