"""Writes tests/golden/huggingface_<family>: tiny random models of `transformers` with their logits.

Run: python tests/golden/make_huggingface_goldens.py   (needs torch and transformers)

Remake them only when a family is added or its settings change; the numbers come
from `transformers`, never from our own model. Each folder is a checkpoint as
`save_pretrained` writes it (the Llama one in shards) and `expected.npz` with
`tokens` int32 [2, 11] and `logits` float32 [2, 11, 19].
"""

import pathlib
import shutil

import numpy as np

FOLDER = pathlib.Path(__file__).parent
FAMILIES = (
  "gpt2",
  "llama",
  "llama_tied",
  "llama_scaled",
  "llama_biased",
  "mistral",
  "qwen2",
  "qwen3",
  "gemma",
)
VOCAB_SIZE = 19


def make_config(family: str, width: int):
  """A `transformers` config with sizes that cannot be confused, and grouped queries where possible."""
  import transformers

  ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
  if family == "gpt2":
    return transformers.GPT2Config(
      vocab_size=VOCAB_SIZE, n_embd=width, n_layer=3, n_head=2, n_positions=24, **ids
    )
  classes = {
    "llama": transformers.LlamaConfig,
    "llama_tied": transformers.LlamaConfig,
    "llama_scaled": transformers.LlamaConfig,
    "llama_biased": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma": transformers.GemmaConfig,
  }
  settings = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": width,
    "intermediate_size": 3 * width // 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
  }
  if family in ("qwen3", "gemma"):
    settings["head_dim"] = 6
  if family == "llama_tied":
    settings["tie_word_embeddings"] = True
  if family == "llama_biased":
    settings |= {"attention_bias": True, "mlp_bias": True}
  if family == "llama_scaled":
    # Three frequencies: one is interpolated, two are stretched.
    settings["head_dim"] = 6
    settings["rope_parameters"] = {
      "rope_type": "llama3",
      "rope_theta": 500.0,
      "factor": 4.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 16,
    }
  if family == "mistral":
    settings["sliding_window"] = None
  return classes[family](**settings, **ids)


def make_model(family: str, width: int = 8, seed: int = 0):
  """A random model with every parameter perturbed, so that no bias or norm is trivial."""
  import torch
  import transformers

  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(
    make_config(family, width), attn_implementation="eager"
  )
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model.eval()


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
  """The model's logits, float32 [B, L, V]."""
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


def main() -> None:
  tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 11)).astype(np.int32)
  for family in FAMILIES:
    folder = FOLDER / f"huggingface_{family}"
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(family)
    model.save_pretrained(folder, max_shard_size="4KB" if family == "llama" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "expected.npz", tokens=tokens, logits=logits_of(model, tokens))


if __name__ == "__main__":
  main()
