"""Greedy speculative decoding against `transformers`: an assistant model, and prompt lookup."""

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="needs torch (extra [oracles])")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
pytest.importorskip("safetensors", reason="needs safetensors (extra [hub])")

from nr.generation.language_models import Network  # noqa: E402
from nr.generation.speculation.drafters import NgramDrafter  # noqa: E402
from nr.generation.speculation.model_drafters import ModelDrafter  # noqa: E402
from nr.generation.speculation.speculative import speculative  # noqa: E402
from nr.generation.stopping import Stop  # noqa: E402
from nr.interchange.huggingface import save_huggingface  # noqa: E402
from nr.models import parameters  # noqa: E402
from nr.models.transformer import Transformer, TransformerSpec  # noqa: E402

pytestmark = pytest.mark.oracle

VOCAB_SIZE, MAX_NEW, LENGTH, END = 19, 24, 5, 0
# The text repeats itself, so that there is something to look up.
PROMPTS = np.random.default_rng(2).integers(1, VOCAB_SIZE, (3, 5))
PROMPTS = np.concatenate([PROMPTS, PROMPTS, PROMPTS[:, :3]], axis=1)

SETTINGS = dict(max_new_tokens=MAX_NEW, stop=Stop([END]), draft_length=LENGTH)


def born_here(family, folder, seed, num_layers):
  """Returns a random model, ours and theirs."""
  spec = getattr(TransformerSpec, family)(
    vocab_size=VOCAB_SIZE,
    num_layers=num_layers,
    model_dim=16,
    num_heads=4,
    max_length=64,
    init_std=0.3,
    layers="unroll",
  )
  network = Network(*parameters.split(Transformer(spec, rngs=nnx.Rngs(seed))))
  save_huggingface(folder, spec, network.params)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
  return network, theirs


def their_text(model, prompt, **settings):
  """Returns the new tokens, and how often the model was called."""
  calls = []
  handle = model.register_forward_hook(lambda *_: calls.append(1))
  with torch.no_grad():
    tokens = model.generate(
      torch.tensor(prompt[None]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      do_sample=False,
      max_new_tokens=MAX_NEW,
      eos_token_id=END,
      pad_token_id=END,
      **settings,
    )
  handle.remove()
  return tokens[0, len(prompt) :].tolist(), len(calls)


def assert_same_texts(found, model, **settings):
  """Compares all rows, and returns the calls of both."""
  torch.set_num_threads(1)
  found, calls = jax.device_get(found), []
  for row, prompt in enumerate(PROMPTS):
    text, count = their_text(model, prompt, **settings)
    assert found.tokens_RN[row, : found.lengths_R[row]].tolist() == text, row
    calls.append(count)
  return found.row_calls_R.tolist(), calls


def test_texts_with_an_assistant_are_theirs(tmp_path):
  network, model = born_here("llama", tmp_path / "model", 3, 2)
  small, assistant = born_here("llama", tmp_path / "assistant", 4, 1)
  found = speculative(network, ModelDrafter(small), PROMPTS, **SETTINGS)
  assert_same_texts(found, model, assistant_model=assistant, num_assistant_tokens=LENGTH)


def test_texts_and_calls_of_prompt_lookup_are_theirs(tmp_path):
  network, model = born_here("gpt2", tmp_path / "model", 3, 2)
  found = speculative(network, NgramDrafter(longest=2), PROMPTS, **SETTINGS)
  settings = dict(prompt_lookup_num_tokens=LENGTH, max_matching_ngram_size=2)
  # The same drafts are accepted, not only the same text found.
  ours, theirs = assert_same_texts(found, model, **settings)
  assert ours == theirs
  assert found.accepted_R.sum() > 0
