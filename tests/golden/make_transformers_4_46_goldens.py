"""Writes tests/golden/transformers_4_46.json: what transformers 4.46.3 does where later versions do it no more.

Run: python tests/golden/make_transformers_4_46_goldens.py   (needs torch and transformers==4.46.3)

Contrastive search and DoLa left transformers after that version. Texts of the first are of
the committed models huggingface_gpt2 and huggingface_llama; DoLa is its choice of a layer
and its contrast, on random logits, one row at a time (it chooses one layer for a batch).
"""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
PROMPTS = ([3, 7, 1, 7], [5, 2, 2, 9, 11, 4])
NEW_TOKENS = 12


def contrastive_texts() -> list[dict]:
  """Returns prompt, settings and text of each run."""
  import torch
  import transformers

  runs = []
  # This version reads the base of rotary embeddings from another field.
  for family, settings in (("gpt2", {}), ("llama", {"rope_theta": 500.0})):
    folder = FOLDER / f"huggingface_{family}"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    expected = np.load(folder / "expected.npz")
    logits = model(torch.tensor(expected["tokens"])).logits.detach().numpy()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    for prompt in PROMPTS:
      for alpha, k in ((0.3, 3), (0.6, 4), (0.9, 5), (0.6, 19)):
        text = model.generate(
          torch.tensor([prompt]),
          attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
          penalty_alpha=alpha,
          top_k=k,
          max_new_tokens=NEW_TOKENS,
          eos_token_id=None,
          pad_token_id=0,
        )[0, len(prompt) :]
        runs.append(dict(family=family, prompt=prompt, alpha=alpha, k=k, text=text.tolist()))
  return runs


def layer_contrasts() -> list[dict]:
  """Returns the logits of the last layer and of three candidates, and the contrast; None where banned."""
  import torch
  from transformers.generation.utils import _dola_select_contrast

  draws = np.random.default_rng(0)
  runs = []
  for _ in range(24):
    last_V = draws.normal(0, 2, 12).round(3)
    layers_LV = draws.normal(0, 2, (3, 12)).round(3)
    candidates = {index: torch.tensor(layers_LV[index, None]) for index in range(3)}
    contrast_V = _dola_select_contrast([0, 1, 2], candidates, torch.tensor(last_V[None]))[0].tolist()
    contrast_V = [None if value == -np.inf else value for value in contrast_V]
    runs.append(dict(last=last_V.tolist(), layers=layers_LV.tolist(), contrast=contrast_V))
  return runs


if __name__ == "__main__":
  found = {"contrastive_search": contrastive_texts(), "layer_contrast": layer_contrasts()}
  (FOLDER / "transformers_4_46.json").write_text(json.dumps(found) + "\n")
