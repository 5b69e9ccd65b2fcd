"""Writes tests/golden/huggingface_<family>_reward: tiny classifiers of one label, with their rewards.

Run: python tests/golden/make_reward_goldens.py   (needs torch and transformers)

Remake them only when a family is added; the numbers come from `transformers`, never from
our own model. Each folder is a checkpoint as `save_pretrained` writes it and `expected.npz`
with `tokens` int32 [4, 11], padded on the right, `lengths` int32 [4] and `rewards` float32 [4].
"""

import pathlib
import shutil

import numpy as np

FOLDER = pathlib.Path(__file__).parent
FAMILIES = ("llama", "qwen2")
VOCAB_SIZE, PAD = 19, 18


def make_classifier(family: str, width: int = 8, seed: int = 0):
  """A random classifier of one label with every parameter perturbed."""
  import torch
  import transformers

  name = {"llama": "Llama", "qwen2": "Qwen2"}[family]
  torch.manual_seed(seed)
  config = getattr(transformers, f"{name}Config")(
    vocab_size=VOCAB_SIZE,
    hidden_size=width,
    intermediate_size=3 * width // 2,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=24,
    num_labels=1,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=PAD,
  )
  model = getattr(transformers, f"{name}ForSequenceClassification")(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model.eval()


def rewards_of(model, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """The model's rewards, float32 [B], of rows padded on the right."""
  import torch

  mask = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
  padded = np.where(mask, tokens, PAD)
  with torch.no_grad():
    found = model(
      torch.from_numpy(padded.astype(np.int64)), attention_mask=torch.from_numpy(mask.astype(np.int64))
    )
  return found.logits[:, 0].numpy()


def random_texts(seed: int, rows: int = 4, length: int = 11) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [rows, length] without the padding's id, and lengths of which one is whole."""
  random = np.random.default_rng(seed)
  lengths = random.integers(1, length, rows).astype(np.int32)
  lengths[0] = length
  return random.integers(0, PAD, (rows, length)).astype(np.int32), lengths


def main() -> None:
  tokens, lengths = random_texts(0)
  for family in FAMILIES:
    folder = FOLDER / f"huggingface_{family}_reward"
    shutil.rmtree(folder, ignore_errors=True)
    model = make_classifier(family)
    model.save_pretrained(folder)
    np.savez(
      folder / "expected.npz", tokens=tokens, lengths=lengths, rewards=rewards_of(model, tokens, lengths)
    )


if __name__ == "__main__":
  main()
