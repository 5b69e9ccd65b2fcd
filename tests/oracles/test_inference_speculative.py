"""Greedy speculative decoding against `transformers`: an assistant model, and prompt lookup."""

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="needs torch (extra [oracles])")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra [oracles])")
pytest.importorskip("safetensors", reason="needs safetensors (extra [hub])")

from nr.generation.drafters import NgramDrafter  # noqa: E402
from nr.generation.language_models import Network  # noqa: E402
from nr.generation.model_drafters import ModelDrafter  # noqa: E402
from nr.generation.speculative import speculative  # noqa: E402
from nr.generation.stopping import Stop  # noqa: E402
from nr.interchange.huggingface import save_huggingface  # noqa: E402
from nr.models import parameters  # noqa: E402
from nr.models.transformer import Transformer, TransformerSpec  # noqa: E402

pytestmark = pytest.mark.oracle

VOCAB_SIZE, MAX_NEW, LENGTH, END = 19, 40, 5, 0
# The text repeats itself, so that there is something to look up.
PROMPTS = np.random.default_rng(2).integers(1, VOCAB_SIZE, (6, 5)).repeat(2, axis=0).reshape(6, 10)
PROMPTS = np.concatenate([PROMPTS, PROMPTS[:, :3]], axis=1)


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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_texts_are_theirs(family, tmp_path):
  network, model = born_here(family, tmp_path / "model", 3, 2)
  small, assistant = born_here(family, tmp_path / "assistant", 4, 1)
  assistant.generation_config.num_assistant_tokens = LENGTH
  assistant.generation_config.num_assistant_tokens_schedule = "constant"
  assistant.generation_config.assistant_confidence_threshold = 0.0
  settings = dict(max_new_tokens=MAX_NEW, stop=Stop([END]), draft_length=LENGTH)
  ours = {
    "assistant": speculative(network, ModelDrafter(small), PROMPTS, **settings),
    "lookup": speculative(network, NgramDrafter(longest=2), PROMPTS, **settings),
  }
  theirs = {
    "assistant": dict(assistant_model=assistant),
    "lookup": dict(prompt_lookup_num_tokens=LENGTH, max_matching_ngram_size=2),
  }
  for method, found in jax.device_get(ours).items():
    for row, prompt in enumerate(PROMPTS):
      text, calls = their_text(model, prompt, **theirs[method])
      assert found.tokens_RN[row, : found.lengths_R[row]].tolist() == text, (method, row)
      if method == "lookup":
        # The same drafts are accepted, not only the same text found.
        assert found.row_calls_R[row] == calls, row
  assert ours["lookup"].accepted_R.sum() > 0
