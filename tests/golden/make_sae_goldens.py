"""Writes tests/golden/sae_<name>: small random sparse autoencoders of other projects, with what they compute.

Run: python tests/golden/make_sae_goldens.py   (needs torch, sae-lens and eai-sparsify)

Remake them only when a layout is added; the numbers come from the other projects, never from our own
model. Folders `sae_saelens_<name>` are as SAELens saves them, `sae_sparsify` as sparsify does; `sae_openai` holds
the state dictionary of OpenAI's Autoencoder as torch.save writes it, with the numbers of its equations in
float64 (their class is no package). Each has `expected.npz` with `x` [7, 6], `latents` [7, 10] and
`reconstruction` [7, 6], float32.
"""

import pathlib
import shutil
import tempfile

import numpy as np

FOLDER = pathlib.Path(__file__).parent
WIDTH, LATENTS, TOKENS = 6, 10, 7
# name -> fields of their config
SAELENS = {
  "standard": {"architecture": "standard", "apply_b_dec_to_input": False},
  "topk": {"architecture": "topk", "k": 3, "normalize_activations": "layer_norm"},
  "topk_rescaled": {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True},
  "jumprelu": {"architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"},
  "gated": {"architecture": "gated", "normalize_activations": "layer_norm"},
}


def inputs() -> np.ndarray:
  """Activations [tokens, width] whose mean and scale are not those of a normal distribution."""
  return (np.random.default_rng(0).normal(size=(TOKENS, WIDTH)) * 2 + 1).astype(np.float32)


def saelens_config(fields: dict) -> dict:
  """The config of an autoencoder in SAELens' words."""
  plain = {
    "d_in": WIDTH,
    "d_sae": LATENTS,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"model_name": "gpt2", "hook_name": "blocks.5.hook_resid_post"},
  }
  return {**plain, **fields}


def run_saelens(autoencoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Latents and reconstruction of an autoencoder of SAELens."""
  import torch

  with torch.no_grad():
    latents = autoencoder.encode(torch.from_numpy(x))
    # Normalisation leaves its statistics in the module, and decoding takes them away.
    return latents.numpy(), autoencoder.decode(latents).numpy()


def make_saelens(fields: dict, seed: int):
  """A random autoencoder of SAELens."""
  import torch
  from sae_lens import SAE

  torch.manual_seed(seed)
  autoencoder = SAE.from_dict(saelens_config(fields))
  with torch.no_grad():
    for name, parameter in autoencoder.named_parameters():
      parameter.copy_(0.5 * torch.randn_like(parameter))
      if name == "threshold":
        parameter.sub_(0.1)  # some negative: SAELens passes them through a ReLU
  return autoencoder


def make_saelens_trained(seed: int = 5):
  """A BatchTopK autoencoder in the form that SAELens saves for use."""
  import torch
  from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

  torch.manual_seed(seed)
  autoencoder = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=3))
  with torch.no_grad():
    for name, parameter in autoencoder.named_parameters():
      if name != "topk_threshold":
        parameter.copy_(0.5 * torch.randn_like(parameter))
  autoencoder.topk_threshold.fill_(0.3)
  autoencoder.fold_W_dec_norm()  # as their trainer does before it saves
  return autoencoder


def make_sparsify(seed: int = 7):
  """A random autoencoder of sparsify."""
  import torch
  from sparsify import SaeConfig, SparseCoder

  torch.manual_seed(seed)
  autoencoder = SparseCoder(WIDTH, SaeConfig(num_latents=LATENTS, k=3))
  with torch.no_grad():
    for parameter in autoencoder.parameters():
      parameter.copy_(0.5 * torch.randn_like(parameter))
  return autoencoder


def run_sparsify(autoencoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Latents and reconstruction of an autoencoder of sparsify."""
  import torch

  with torch.no_grad():
    found = autoencoder(torch.from_numpy(x))
    latents = torch.zeros(len(x), autoencoder.num_latents)
    latents.scatter_(-1, found.latent_indices, found.latent_acts)
  return latents.numpy(), found.sae_out.numpy()


def make_openai(k: int = 3, seed: int = 9) -> tuple[dict, np.ndarray, np.ndarray]:
  """A state dictionary in OpenAI's layout, with the latents and reconstruction that its equations give."""
  import collections

  import torch

  rng = np.random.default_rng(seed)
  encoder, decoder = rng.normal(size=(LATENTS, WIDTH)), rng.normal(size=(WIDTH, LATENTS))
  pre_bias, latent_bias = rng.normal(size=WIDTH) * 0.3, rng.normal(size=LATENTS) * 0.3
  encoder, decoder, pre_bias, latent_bias = (
    a.astype(np.float32) for a in (encoder, decoder, pre_bias, latent_bias)
  )
  state = collections.OrderedDict(
    pre_bias=torch.from_numpy(pre_bias),
    latent_bias=torch.from_numpy(latent_bias),
    stats_last_nonzero=torch.zeros(LATENTS, dtype=torch.long),
    latents_activation_frequency=torch.ones(LATENTS),
    latents_mean_square=torch.zeros(LATENTS),
  )
  state["encoder.weight"] = torch.from_numpy(encoder)
  state["decoder.weight"] = torch.from_numpy(
    np.ascontiguousarray(decoder.T)
  ).T  # strides as after a transpose
  state["activation"] = "TopK"
  state["activation_state_dict"] = collections.OrderedDict(k=k, postact_fn="ReLU")
  x = inputs().astype(np.float64)
  mean = x.mean(-1, keepdims=True)
  deviation = (x - mean).std(-1, ddof=1, keepdims=True)
  u = (x - mean) / (deviation + 1e-5)
  scores = (u - pre_bias) @ encoder.T.astype(np.float64) + latent_bias
  kept = np.argsort(-scores, -1, kind="stable")[:, :k]
  latents = np.zeros_like(scores)
  np.put_along_axis(latents, kept, np.maximum(np.take_along_axis(scores, kept, -1), 0), -1)
  reconstruction = (latents @ decoder.T.astype(np.float64) + pre_bias) * deviation + mean
  return state, latents, reconstruction


def write(name: str, save, latents: np.ndarray, reconstruction: np.ndarray) -> None:
  """Writes one folder: what `save` puts there, and what the autoencoder computes."""
  folder = FOLDER / f"sae_{name}"
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  save(folder)
  expected = {"latents": latents, "reconstruction": reconstruction}
  arrays = {key: np.asarray(value, np.float32) for key, value in expected.items()}
  np.savez(folder / "expected.npz", x=inputs(), **arrays)


def main() -> None:
  import torch
  from sae_lens import SAE

  state, *expected = make_openai()
  write("openai", lambda folder: torch.save(state, folder / "autoencoder.pt"), *expected)
  for seed, (name, fields) in enumerate(SAELENS.items()):
    autoencoder = make_saelens(fields, seed)
    write(f"saelens_{name}", autoencoder.save_model, *run_saelens(autoencoder, inputs()))
  trained = make_saelens_trained()
  with tempfile.TemporaryDirectory() as folder:
    trained.save_inference_model(folder)
    expected = run_saelens(SAE.load_from_disk(folder), inputs())
  write("saelens_batchtopk", trained.save_inference_model, *expected)
  autoencoder = make_sparsify()
  write("sparsify", autoencoder.save_to_disk, *run_sparsify(autoencoder, inputs()))


if __name__ == "__main__":
  main()
