"""Writes tests/golden/cocomix_reference.npz: what a small CoCoMix of the reference computes.

Run: python tests/golden/make_cocomix_reference_goldens.py   (needs torch and transformers)

The oracle is our own writing of arXiv 2502.08524 section 2.2 in torch, with the normalisation that the
released code adds, around GPT-2 blocks of `transformers`; nothing is copied from that code. It knows
nothing of our model: it reads tensors by the names of the reference's state dict. Weights come from a seed and
are made anew by the test; the file holds their hash, tokens, labels, and, computed in double precision, the logits
[B, L, V], the concept logits [B, L, C] and both losses.
"""

import hashlib
import pathlib

import numpy as np

PATH = pathlib.Path(__file__).parent / "cocomix_reference.npz"
SIZES = dict(vocab_size=97, n_embd=64, n_layer=4, n_head=4, n_positions=64)
NUM_CONCEPTS, TOP_K, INSERT_AT = 256, 8, 2
NUM_PARAMETERS = 243_520  # counted from the reference's class


def tensor_shapes() -> dict[str, tuple[int, ...]]:
  """Names and shapes of the reference's state dict; GPT-2's Conv1D is [in, out], Linear [out, in]."""
  d, shapes = SIZES["n_embd"], {}
  shapes["transformer.wte.weight"] = (SIZES["vocab_size"], d)
  shapes["transformer.wpe.weight"] = (SIZES["n_positions"], d)
  for layer in range(SIZES["n_layer"]):
    block = f"transformer.h.{layer}."
    for norm in ("ln_1", "ln_2"):
      shapes |= {f"{block}{norm}.weight": (d,), f"{block}{norm}.bias": (d,)}
    for name, inputs, outputs in (
      ("attn.c_attn", d, 3 * d),
      ("attn.c_proj", d, d),
      ("mlp.c_fc", d, 4 * d),
      ("mlp.c_proj", 4 * d, d),
    ):
      shapes |= {f"{block}{name}.weight": (inputs, outputs), f"{block}{name}.bias": (outputs,)}
  shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
  shapes["transformer.pre_bias"] = (d,)
  shapes["transformer.concept_predictor.weight"] = (NUM_CONCEPTS, d)
  shapes["transformer.concept_predictor.bias"] = (NUM_CONCEPTS,)
  shapes["transformer.compress_layer.weight"] = (d, NUM_CONCEPTS)
  shapes["transformer.compress_layer.bias"] = (d,)
  return shapes


def make_weights(seed: int = 0) -> dict[str, np.ndarray]:
  """Random float32 tensors, none of them trivial: biases are not 0, norms not 1."""
  generator = np.random.default_rng(seed)
  weights = {}
  for name, shape in tensor_shapes().items():
    is_norm = ".ln_" in name and name.endswith("weight")
    weights[name] = (is_norm + 0.1 * generator.standard_normal(shape)).astype(np.float32)
  return weights


def hash_of(weights: dict[str, np.ndarray]) -> str:
  """Hash of names and bytes."""
  digest = hashlib.sha256()
  for name in sorted(weights):
    digest.update(name.encode() + weights[name].tobytes())
  return digest.hexdigest()


def make_inputs(seed: int = 1, rows: int = 2, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [B, L] and four distinct labels [B, L, 4] at every position, the last one included."""
  generator = np.random.default_rng(seed)
  tokens = generator.integers(0, SIZES["vocab_size"], (rows, length))
  labels = np.argsort(generator.random((rows, length, NUM_CONCEPTS)), axis=-1)[..., :4]
  return tokens.astype(np.int32), labels.astype(np.int32)


def forward(
  weights: dict[str, np.ndarray], tokens: np.ndarray, insert_at: int = INSERT_AT, top_k: int = TOP_K
):
  """Logits [B, L, V] and concept logits [B, L, C] of the model in evaluation mode, float64 tensors."""
  import torch
  import transformers

  weights = {name: torch.from_numpy(np.asarray(tensor)).double() for name, tensor in weights.items()}
  own = ("transformer.pre_bias", "transformer.concept_predictor.", "transformer.compress_layer.")
  config = transformers.GPT2Config(**SIZES, attn_implementation="eager")
  gpt2 = transformers.GPT2LMHeadModel(config).double().eval()
  plain = {name: tensor for name, tensor in weights.items() if not name.startswith(own)}
  missing, unexpected = gpt2.load_state_dict(plain, strict=False)
  assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
  trunk = gpt2.transformer
  with torch.no_grad():
    tokens = torch.from_numpy(np.asarray(tokens, np.int64))
    x = trunk.wte(tokens) + trunk.wpe(torch.arange(tokens.shape[1]))
    for index, block in enumerate(trunk.h):
      if index == insert_at:
        x, concept_logits = insert_concepts(x, weights, top_k)
      rows = x.shape[1]
      mask = torch.full((rows, rows), float("-inf"), dtype=x.dtype).triu(1)[None, None]
      x = block(x, attention_mask=mask)
    return gpt2.lm_head(trunk.ln_f(x[:, 1::2])), concept_logits


def insert_concepts(h, weights, top_k: int):
  """Section 2.2 of the paper with the released normalisation: rows h_1, c_1, h_2, c_2, ..., and z."""
  import torch

  mean = h.mean(-1, keepdim=True)
  deviation = (h - mean).square().sum(-1, keepdim=True).div(h.shape[-1] - 1).sqrt()
  bias = weights["transformer.pre_bias"]
  u = (h - mean) / (deviation + 1e-5) - bias
  z = u @ weights["transformer.concept_predictor.weight"].T + weights["transformer.concept_predictor.bias"]
  values, indices = z.topk(top_k, dim=-1)
  columns = weights["transformer.compress_layer.weight"].T[indices]  # [B, L, K, D]
  mixed = (values[..., None] * columns).sum(-2) + weights["transformer.compress_layer.bias"] + bias
  c = mixed * deviation + mean
  rows = torch.stack([h, c], dim=2)
  return rows.reshape(h.shape[0], 2 * h.shape[1], h.shape[2]), z


def losses(logits, concept_logits, tokens: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
  """Next-token loss over the L - 1 shifted positions and concept loss over all L, means in nats."""
  import torch
  from torch.nn.functional import cross_entropy

  targets = torch.from_numpy(np.asarray(tokens[:, 1:], np.int64))
  next_token = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
  labels = torch.from_numpy(np.asarray(labels, np.int64))
  each = [
    cross_entropy(concept_logits.flatten(0, 1), labels[..., k].flatten()) for k in range(labels.shape[-1])
  ]
  return float(next_token), float(sum(each) / len(each))


def main() -> None:
  weights, (tokens, labels) = make_weights(), make_inputs()
  assert sum(tensor.size for tensor in weights.values()) == NUM_PARAMETERS
  logits, concept_logits = forward(weights, tokens)
  ranked = concept_logits.sort(-1, descending=True).values
  # The choice of concepts must not hang on rounding.
  assert float((ranked[..., TOP_K - 1] - ranked[..., TOP_K]).min()) > 1e-3
  next_token_loss, concept_loss = losses(logits, concept_logits, tokens, labels)
  np.savez_compressed(
    PATH,
    weights_sha256=hash_of(weights),
    tokens=tokens,
    labels=labels,
    logits=logits.float().numpy(),
    concept_logits=concept_logits.float().numpy(),
    next_token_loss=next_token_loss,
    concept_loss=concept_loss,
  )


if __name__ == "__main__":
  main()
