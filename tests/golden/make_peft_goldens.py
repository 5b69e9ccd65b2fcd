"""Writes tests/golden/peft_<name>: random adapters made by PEFT, with the logits of the adapted model.

Run: python tests/golden/make_peft_goldens.py [NAME ...]   (needs torch, transformers and peft)

The base models are the committed checkpoints huggingface_<family>. Remake them only
when an adapter is added; the numbers come from PEFT, never from our own model. Each
folder is an adapter as `save_pretrained` writes it, and `expected.npz` with `tokens`
int32 [2, 11] and `logits` float32 [2, 11, 19].
"""

import json
import pathlib
import shutil
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).parent
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> (family, settings of LoraConfig)
ADAPTERS = {
  "llama": ("llama", dict(r=3, lora_alpha=5, target_modules=LINEAR)),
  "llama_head": ("llama", dict(r=2, lora_alpha=3, target_modules=["lm_head", "v_proj"])),
  "qwen2": ("qwen2", dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj"], use_rslora=True)),
  "gpt2": ("gpt2", dict(r=2, lora_alpha=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
  "llama_dora": (
    "llama",
    dict(r=3, lora_alpha=5, target_modules=[*LINEAR, "lm_head"], use_dora=True, use_rslora=True),
  ),
  "gpt2_dora": (
    "gpt2",
    dict(r=2, lora_alpha=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True),
  ),
}


def make_adapted(base, settings: dict, seed: int = 0):
  """The base model with a random adapter whose b is not zero, and whose magnitudes are not the norms."""
  import peft
  import torch

  torch.manual_seed(seed)
  model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_magnitude_vector" in name:
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
      elif "lora_" in name:
        parameter.copy_(0.4 * torch.randn_like(parameter))
  return model.eval()


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
  """The model's logits, float32 [B, L, V]."""
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


def load_base(folder: pathlib.Path):
  """A checkpoint as a model of `transformers`."""
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def main(chosen: list[str]) -> None:
  tokens = np.random.default_rng(0).integers(0, 19, (2, 11)).astype(np.int32)
  for name in chosen or ADAPTERS:
    family, settings = ADAPTERS[name]
    folder = FOLDER / f"peft_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model = make_adapted(load_base(FOLDER / f"huggingface_{family}"), settings)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {
      "base_model_name_or_path": f"huggingface_{family}",
      "target_modules": sorted(config["target_modules"]),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    np.savez(folder / "expected.npz", tokens=tokens, logits=logits_of(model, tokens))


if __name__ == "__main__":
  main(sys.argv[1:])
