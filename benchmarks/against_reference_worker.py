"""One measurement of benchmarks/against_reference.py, in a process of its own; prints JSON on the last line.

All sides read the same files: weights under the names of Hugging Face and of the reference, an
autoencoder, tokens and labels. `dense_torch` and `dense_jax` are our own writing of the step as the
reference computes it; `reference` runs the files of a checkout, given by its path.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import time
import types

from measuring import peak_memory, timed_steps, versions

LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
LABELS, LAMBDA = 4, 0.1
ARRAYS, STUDENT, TEACHER, AUTOENCODER = "arrays.npz", "student", "teacher", "autoencoder.npz"
PACKAGES = ("jax", "flax", "torch", "transformers", "numpy")

# Each saving switched off by itself; the first two are the whole.
CACHED = dict(head_impl="fused", compression_impl="gather", top_k_impl="chunked", last_block="readout_rows")
OURS = {
  "ours": CACHED,
  "ours_online": CACHED,
  "online_whole_teacher": CACHED,
  "dense_head": {**CACHED, "head_impl": "dense"},
  "dense_compression": {**CACHED, "compression_impl": "dense"},
  "full_sort": {**CACHED, "top_k_impl": "lax"},
  "all_rows_in_last_block": {**CACHED, "last_block": "all_rows"},
  "next_token": None,
}


def read_arrays(folder: str, file: str = ARRAYS) -> dict:
  """Arrays of a file by name."""
  import numpy as np

  with np.load(os.path.join(folder, file), allow_pickle=False) as stored:
    return {name: stored[name] for name in stored.files}


# What all sides read.


def jax_specs(arguments: argparse.Namespace, concept_settings: dict | None = None):
  """Returns the settings of (student's transformer, its concepts, teacher, autoencoder)."""
  from nr.models.concept_mixing import ConceptMixingSpec
  from nr.models.sparse_autoencoder_spec import SparseAutoencoderSpec
  from nr.models.transformer import TransformerSpec

  sizes = arguments.sizes
  is_cpu = arguments.device == "cpu"
  shared = dict(
    vocab_size=sizes["vocab_size"],
    max_length=sizes["length"],
    dtype=arguments.dtype,
    layers="unroll" if is_cpu else "scan",
    attention="blocked" if is_cpu else "dot_product",
  )
  student = TransformerSpec.gpt2(**shared, **sizes["student"])
  teacher = TransformerSpec.gpt2(**shared, **sizes["teacher"])
  concepts = ConceptMixingSpec(
    insert_at=sizes["insert_at"],
    num_concepts=sizes["num_concepts"],
    top_k=sizes["top_k"],
    **(concept_settings or {}),
  )
  autoencoder = SparseAutoencoderSpec(
    model_dim=teacher.model_dim,
    num_latents=sizes["num_concepts"],
    k=sizes["top_k"],
    decoding="gather",
    dtype=arguments.dtype,
  )
  return student, concepts, teacher, autoencoder


def labelling(arguments: argparse.Namespace):
  """Labels as the reference makes them, arbitrary ones included."""
  from nr.objectives.attribution import AttributionSpec
  from nr.recipes.cocomix.label_corpus import Labelling

  return Labelling(arguments.sizes["tap_layer"], AttributionSpec.parity(k_attr=LABELS), loss_chunk=None)


def teachers(arguments: argparse.Namespace):
  """Returns the frozen teacher and autoencoder from their files."""
  import jax.numpy as jnp

  from nr.interchange.huggingface import load_huggingface
  from nr.models import parameters
  from nr.training.model_files import Model, graphdef_of

  _, _, spec, autoencoder = jax_specs(arguments)
  _, params = load_huggingface(
    os.path.join(arguments.folder, TEACHER), layers=spec.layers, attention=spec.attention, dtype=spec.dtype
  )
  if spec.layers == "unroll":
    params = parameters.unstack_layers(params)
  stored = {name: jnp.asarray(array) for name, array in read_arrays(arguments.folder, AUTOENCODER).items()}
  kernels = {name: {"kernel": stored.pop(name)} for name in ("encoder", "decoder")}
  return (
    Model(spec, graphdef_of(spec), params, "", {}),
    Model(autoencoder, graphdef_of(autoencoder), {**kernels, **stored}, "", {}),
  )


def export(arguments: argparse.Namespace) -> dict:
  """Writes random weights, tokens, and the labels that the teacher gives them."""
  import jax
  import numpy as np

  from nr.interchange.cocomix_reference import save_cocomix_reference
  from nr.interchange.huggingface import save_huggingface
  from nr.models import parameters
  from nr.models.sparse_autoencoder_start import initialise
  from nr.recipes.cocomix.label_corpus import make_label_step
  from nr.training.model_files import ConceptMixingModelSpec, build_model

  folder, sizes = pathlib.Path(arguments.folder), arguments.sizes
  student, concepts, teacher, autoencoder = jax_specs(arguments)
  params = parameters.split(build_model(ConceptMixingModelSpec(student, concepts), jax.random.key(0)))[1]
  save_cocomix_reference(folder / STUDENT, student, concepts, params)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  params = parameters.split(build_model(teacher, jax.random.key(1)))[1]
  save_huggingface(folder / TEACHER, teacher, params)
  params = initialise(autoencoder, jax.numpy.zeros(autoencoder.model_dim), jax.random.key(2))
  stored = {name: leaf["kernel"] if isinstance(leaf, dict) else leaf for name, leaf in params.items()}
  np.savez(folder / AUTOENCODER, **stored)

  tokens = np.random.default_rng(0).integers(0, sizes["vocab_size"], (sizes["rows"], sizes["length"]))
  weights = np.ones(tokens.shape, np.float32)
  weights[:, -1] = 0
  batch = {"tokens": tokens.astype(np.int32), "targets": np.roll(tokens, -1, axis=1).astype(np.int32)}
  batch["weights"] = weights
  models = teachers(arguments)
  label = make_label_step(models[0].graphdef, models[1].graphdef, labelling(arguments))
  labels = label(models[0].params, models[1].params, batch).labels_BLA
  np.savez(folder / ARRAYS, labels=np.asarray(labels), **batch)
  return {"parameters": count, "tokens": tokens.size}


# Our side.


def tap_and_gradients(teacher, layer: int, params, batch):
  """Returns the teacher's stream at the tap, the gradient there, and that to every parameter: one backward pass."""
  import jax
  import jax.numpy as jnp
  import optax

  from nr.models import parameters
  from nr.models.residual_tap import TapInputs

  def loss(params, shift_BLD):
    model = parameters.merge(teacher.graphdef, params)
    x_BLD, attention = model.enter(*TapInputs.of(batch))
    x_BLD, _ = model.run_blocks(x_BLD, 0, layer + 1, attention=attention)
    tapped_BLD = x_BLD + shift_BLD
    x_BLD, _ = model.run_blocks(tapped_BLD, layer + 1, None, attention=attention)
    logits_BLV = model.logits(model.final_norm(x_BLD))
    losses_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch["targets"])
    return (losses_BL * batch["weights"]).sum(), tapped_BLD

  zeros_BLD = jnp.zeros((*batch["tokens"].shape, teacher.spec.model_dim), teacher.spec.dtype)
  (of_params, of_tap_BLD), tapped_BLD = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, zeros_BLD)
  return tapped_BLD, of_tap_BLD, of_params


def norm_of(gradient):
  """A metric of a gradient; without a use, the compiler would leave it out."""
  import jax
  import jax.numpy as jnp

  from nr.objectives.weighted import Weighted

  return Weighted(jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient))), jnp.ones(()))


def whole_backward(method, teacher, autoencoder, arguments):
  """The method with labels made in its step by a backward pass to all of the teacher, as in the reference."""
  import jax

  from nr.models import parameters
  from nr.objectives import attribution
  from nr.objectives.weighted import LossOutput
  from nr.recipes.cocomix.label_corpus import read_latents

  spec = labelling(arguments).spec

  def loss(params, frozen, extra, batch, key):
    fixed = jax.lax.stop_gradient((frozen["teacher"], frozen["autoencoder"]))
    tapped_BLD, gradient_BLD, of_params = tap_and_gradients(
      teacher, arguments.sizes["tap_layer"], fixed[0], batch
    )
    module = parameters.merge(autoencoder.graphdef, fixed[1])
    u_BLD = module.normalise(tapped_BLD).values_TD
    latents = read_latents(module, u_BLD, module.encode(u_BLD), spec.act)
    scored_BL = attribution.labelled_positions(batch["weights"], mask_last=spec.mask_last)
    labels = attribution.select_labels(attribution.rank(latents, gradient_BLD, spec), scored_BL, spec)
    output = method.loss(params, frozen, extra, {**batch, "labels": labels.labels_BLA}, key)
    return LossOutput(output.loss, {**output.metrics, "teacher_gradient_norm": norm_of(of_params)})

  frozen = {"teacher": teacher.params, "autoencoder": autoencoder.params}
  return method._replace(loss=loss, frozen=frozen)


def dense_method(arguments: argparse.Namespace, teacher, autoencoder):
  """The reference's step written in JAX as it stands there: every array whole, nothing saved."""
  import jax
  import jax.numpy as jnp
  import optax

  from nr.models import parameters
  from nr.models.concept_paths import at_scale_of
  from nr.objectives.weighted import LossOutput, Weighted
  from nr.recipes.cocomix.method import cocomix_method
  from nr.training.model_files import ConceptMixingModelSpec, graphdef_of

  student, concepts, _, _ = jax_specs(arguments)
  spec = ConceptMixingModelSpec(student, concepts)
  graphdef, layer = graphdef_of(spec), arguments.sizes["tap_layer"]
  insert_at, dtype = concepts.insert_at, student.dtype
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels

  def attributions(frozen, batch):
    """Every latent's activation times gradient [B, L, C]."""
    tapped_BLD, gradient_BLD, of_params = tap_and_gradients(teacher, layer, frozen["teacher"], batch)
    module = parameters.merge(autoencoder.graphdef, frozen["autoencoder"])
    scores_BLC = module.pre_activations(module.normalise(tapped_BLD).values_TD)
    values_BLK, indices_BLK = jax.lax.top_k(scores_BLC, concepts.top_k)
    active_BLC = jnp.put_along_axis(
      jnp.zeros_like(scores_BLC), indices_BLK, jax.nn.relu(values_BLK), axis=-1, inplace=False
    )
    return active_BLC * (gradient_BLD.astype(jnp.float32) @ module.decoder.kernel[...].T), of_params

  def loss(params, frozen, extra, batch, key):
    del extra, key
    frozen = jax.lax.stop_gradient(frozen)
    attribution_BLC, teacher_gradient = attributions(frozen, batch)
    labels_BLA = jax.lax.top_k(attribution_BLC, LABELS)[1]
    model = parameters.merge(graphdef, params)
    path, trunk = model.concepts, model.transformer
    h_BLD, attention = trunk.enter(batch["tokens"], None, None)
    h_BLD, _ = trunk.run_blocks(h_BLD, 0, insert_at, attention=attention)
    z_BLC = path.logits(h_BLD)
    chosen_BLK = jax.lax.top_k(jax.lax.stop_gradient(z_BLC), concepts.top_k)[1]
    mask_BLC = jnp.put_along_axis(jnp.zeros_like(z_BLC), chosen_BLK, 1.0, axis=-1, inplace=False)
    kernel_CD = path.compression.kernel[...].astype(dtype)
    e_BLD = ((mask_BLC * z_BLC).astype(dtype) @ kernel_CD).astype(jnp.float32)
    e_BLD = e_BLD + path.compression.bias[...] + path.pre_bias[...]
    c_BLD = at_scale_of(h_BLD, e_BLD, concepts.norm)
    B, L, D = h_BLD.shape
    rows_BRD = jnp.stack([h_BLD, c_BLD], axis=2).reshape(B, 2 * L, D)
    double = attention._replace(positions_BL=jnp.repeat(attention.positions_BL, 2, axis=1))
    rows_BRD, _ = trunk.run_blocks(rows_BRD, insert_at, None, attention=double)
    logits_BLV = trunk.logits(trunk.final_norm(rows_BRD[:, 1::2]))
    next_token = cross_entropy(logits_BLV[:, :-1], batch["targets"][:, :-1]).mean()
    concept = sum(cross_entropy(z_BLC, labels_BLA[..., a]).mean() for a in range(LABELS)) / LABELS
    one = jnp.ones(())
    metrics = {
      "next_token_loss": Weighted(next_token, one),
      "concept_loss": Weighted(concept, one),
      "teacher_gradient_norm": norm_of(teacher_gradient),
    }
    return LossOutput(Weighted(next_token + LAMBDA * concept, one), metrics)

  frozen = {"teacher": teacher.params, "autoencoder": autoencoder.params}
  method = cocomix_method(spec, loss_weight=LAMBDA)
  return method._replace(name="dense", loss=loss, frozen=frozen, frozen_axes=None)


def jax_method(arguments: argparse.Namespace):
  """Returns the method of a side, and whether its batches hold labels."""
  from nr.recipes.cocomix.method import cocomix_method
  from nr.recipes.cocomix.online_labels import with_online_labels
  from nr.training.model_files import ConceptMixingModelSpec
  from nr.training.next_token import next_token_method

  side, length = arguments.side, arguments.sizes["length"]
  chunk = arguments.loss_chunk or None
  if side == "dense_jax":
    return dense_method(arguments, *teachers(arguments)), False
  student, concepts, _, _ = jax_specs(arguments, OURS[side])
  if side == "next_token":
    return next_token_method(student, loss_chunk=chunk), False
  # Ours divides the concept loss by the L - 1 scored tokens, the reference by all L.
  weight = LAMBDA * (length - 1) / length
  method = cocomix_method(ConceptMixingModelSpec(student, concepts), loss_weight=weight, loss_chunk=chunk)
  if side not in ("ours_online", "online_whole_teacher"):
    return method, True
  models = teachers(arguments)
  if side == "online_whole_teacher":
    return whole_backward(method, *models, arguments), False
  return with_online_labels(method, *models, labelling(arguments)), False


def student_weights(arguments: argparse.Namespace):
  """Returns the exported student's parameters, without the concept path for the next-token side."""
  from nr.interchange.cocomix_reference import load_cocomix_reference

  student, concepts, _, _ = jax_specs(arguments)
  _, _, params = load_cocomix_reference(
    os.path.join(arguments.folder, STUDENT), layers=student.layers, attention=student.attention
  )
  return params["transformer"] if arguments.side == "next_token" else params


def measure_jax(arguments: argparse.Namespace) -> dict:
  """Compiles and times one of the steps that run in JAX."""
  import jax

  from nr.evaluation.flops import count_flops
  from nr.models import parameters
  from nr.training.defaults import get_training_config
  from nr.training.optimizers import make_optimizer
  from nr.training.state import abstract_state, create_state, place_frozen
  from nr.training.step import make_train_step

  method, has_labels = jax_method(arguments)
  params = student_weights(arguments)
  if jax_specs(arguments)[0].layers == "unroll":
    params = parameters.unstack_layers(params)
  method = method._replace(start=jax.tree.map(jax.numpy.asarray, params))
  config = get_training_config()
  config.clip, config.schedule.name = CLIP, "constant"
  config.optimizer.update(
    dict(
      learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON, weight_decay=WEIGHT_DECAY
    )
  )
  optimizer = make_optimizer(config, method)
  batch = read_arrays(arguments.folder)
  if not has_labels:
    del batch["labels"]
  frozen = place_frozen(method, None)
  step, abstract = make_train_step(method, optimizer), abstract_state(method, optimizer)
  key = jax.random.key(0)
  forward_flops = count_flops(
    lambda p, f, b: method.loss(p, f, (), b, key).loss.total, abstract.params, frozen, batch
  )
  step_flops = count_flops(step, abstract, frozen, batch)
  start = time.perf_counter()
  compiled = step.lower(abstract, frozen, batch).compile()
  compile_seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  batch = jax.device_put(batch)
  held = [create_state(method, optimizer, 0)]
  method = method._replace(start=None)

  def run() -> list[float]:
    held[0], metrics = compiled(held[0], frozen, batch)
    jax.block_until_ready(held[0])
    names = ("next_token_loss", "concept_loss")
    return [float(metrics[name].mean()) for name in names if name in metrics]

  return {
    **timed_steps(run, arguments.warmup, arguments.steps),
    "compile_seconds": compile_seconds,
    "forward_flops": forward_flops,
    "step_flops": step_flops,
    "temporary": memory.temp_size_in_bytes,
    "arguments": memory.argument_size_in_bytes,
  }


# The other sides, in PyTorch.


def torch_block(x, weights: dict, name: str, heads: int):
  """A block of GPT-2 by the names of its weights."""
  from torch.nn import functional

  batch, length, width = x.shape

  def norm(x, part):
    return functional.layer_norm(
      x, (width,), weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"]
    )

  def linear(x, part):
    return x @ weights[f"{name}.{part}.weight"] + weights[f"{name}.{part}.bias"]

  parts = linear(norm(x, "ln_1"), "attn.c_attn").view(batch, length, 3, heads, width // heads)
  query, key, value = parts.permute(2, 0, 3, 1, 4)
  mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
  x = x + linear(mixed.transpose(1, 2).reshape(batch, length, width), "attn.c_proj")
  hidden = functional.gelu(linear(norm(x, "ln_2"), "mlp.c_fc"), approximate="tanh")
  return x + linear(hidden, "mlp.c_proj")


def torch_embed(tokens, weights: dict):
  import torch

  places = torch.arange(tokens.shape[1], device=tokens.device)
  return weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][places]


def torch_logits(x, weights: dict):
  from torch.nn import functional

  final = weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]
  return functional.layer_norm(x, x.shape[-1:], *final) @ weights["transformer.wte.weight"].T


def torch_weights(folder: str, part: str, device: str) -> dict:
  """Parameters of a folder by name."""
  import torch
  from safetensors.torch import load_file

  tensors = load_file(os.path.join(folder, part, "model.safetensors"))
  return {
    (name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"): torch.nn.Parameter(
      tensor.to(device)
    )
    for name, tensor in tensors.items()
  }


def torch_autoencoder(folder: str, device: str) -> dict:
  """The autoencoder under OpenAI's names."""
  import torch

  stored = {
    name: torch.from_numpy(array).to(device) for name, array in read_arrays(folder, AUTOENCODER).items()
  }
  return {
    "encoder.weight": stored["encoder"].T.contiguous(),
    "decoder.weight": stored["decoder"].T.contiguous(),
    "latent_bias": stored["latent_bias"],
    "pre_bias": stored["pre_bias"],
  }


def normalised_torch(h):
  """Returns (u, mean, deviation) with the unbiased deviation and the epsilon of the released code."""
  mean = h.mean(-1, keepdim=True)
  deviation = (h - mean).std(-1, keepdim=True)
  return (h - mean) / (deviation + 1e-5), mean, deviation


def torch_setup(arguments: argparse.Namespace):
  """Threads, tokens, and the context of mixed precision."""
  import torch

  torch.set_num_threads(arguments.threads)
  torch.set_flush_denormal(True)
  device = "cuda" if arguments.device == "gpu" else "cpu"
  tokens = torch.from_numpy(read_arrays(arguments.folder)["tokens"]).long().to(device)
  mixed = contextlib.nullcontext
  if arguments.dtype == "bfloat16":
    mixed = functools.partial(torch.autocast, device, dtype=torch.bfloat16)
  return tokens, device, mixed


def synchronise(device: str) -> None:
  """Waits for the device."""
  if device == "cuda":
    import torch

    torch.cuda.synchronize()


def torch_optimizer(parameters):
  """The reference's optimizer: decay on everything."""
  import torch

  return torch.optim.AdamW(
    parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
  )


def measure_dense_torch(arguments: argparse.Namespace) -> dict:
  """Our own writing of the reference's step in PyTorch: dense compression, four cross-entropies, online labels."""
  import torch
  from torch.nn import functional

  tokens, device, mixed = torch_setup(arguments)
  sizes, folder = arguments.sizes, arguments.folder
  student, teacher = torch_weights(folder, STUDENT, device), torch_weights(folder, TEACHER, device)
  autoencoder = torch_autoencoder(folder, device)
  optimizer = torch_optimizer(student.values())

  def token_loss(logits):
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

  def attributions():
    x, settings = torch_embed(tokens, teacher), sizes["teacher"]
    for index in range(settings["num_layers"]):
      x = torch_block(x, teacher, f"transformer.h.{index}", settings["num_heads"])
      if index == sizes["tap_layer"]:
        tapped = x
        tapped.retain_grad()
    token_loss(torch_logits(x, teacher)).backward()  # to all of its parameters, as in the reference
    with torch.no_grad():
      u, _, _ = normalised_torch(tapped)
      scores = (u - autoencoder["pre_bias"]) @ autoencoder["encoder.weight"].T + autoencoder["latent_bias"]
      best = scores.topk(sizes["top_k"], dim=-1)
      active = torch.zeros_like(scores).scatter_(-1, best.indices, best.values.relu())
      return active * (tapped.grad @ autoencoder["decoder.weight"])

  def forward():
    h, settings = torch_embed(tokens, student), sizes["student"]
    for index in range(settings["num_layers"]):
      if index == sizes["insert_at"]:
        u, mean, deviation = normalised_torch(h)
        bias = student["transformer.pre_bias"]
        z = functional.linear(
          u - bias,
          student["transformer.concept_predictor.weight"],
          student["transformer.concept_predictor.bias"],
        )
        mask = torch.zeros_like(z, dtype=torch.bool).scatter_(
          -1, z.topk(sizes["top_k"], dim=-1).indices, True
        )
        mixture = functional.linear(
          mask * z, student["transformer.compress_layer.weight"], student["transformer.compress_layer.bias"]
        )
        c = (mixture + bias) * deviation + mean
        h = torch.stack([h, c], dim=2).flatten(1, 2)
      h = torch_block(h, student, f"transformer.h.{index}", settings["num_heads"])
    return torch_logits(h[:, 1::2], student), z

  def run() -> list[float]:
    with mixed():
      labels = attributions().topk(LABELS, dim=-1).indices
      logits, z = forward()
      next_token = token_loss(logits)
      concept = sum(
        functional.cross_entropy(z.flatten(0, 1), labels[..., a].flatten()) / LABELS for a in range(LABELS)
      )
    (next_token + LAMBDA * concept).backward()
    torch.nn.utils.clip_grad_norm_(student.values(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    synchronise(device)
    return [next_token.item(), concept.item()]

  return timed_steps(run, arguments.warmup, arguments.steps)


def stand_in_modules(arguments: argparse.Namespace, device: str) -> None:
  """Gives the checkout what it would otherwise download, with our teacher and autoencoder in it.

  Its concept extractor reads GPT-2 through transformer_lens and the autoencoder through blobfile, both from
  the network. Here hooks sit on a plain GPT-2 of the exported weights (which saves it the extra work of
  transformer_lens, in its favour), and the file is the exported autoencoder.
  """
  import torch

  sizes, folder = arguments.sizes, arguments.folder

  class HookedTransformer(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, *_, **__):
      return cls()

    def __init__(self):
      super().__init__()
      self.tensors = torch_weights(folder, TEACHER, device)
      self.stored = torch.nn.ParameterList(self.tensors.values())
      self.hooks: dict = {"fwd": {}, "bwd": {}}

    def add_hook(self, name, function, dir="fwd"):
      self.hooks[dir][name] = function

    def reset_hooks(self, *_, **__):
      self.hooks = {"fwd": {}, "bwd": {}}

    def forward(self, tokens):
      x = torch_embed(tokens, self.tensors)
      for index in range(sizes["teacher"]["num_layers"]):
        x = torch_block(x, self.tensors, f"transformer.h.{index}", sizes["teacher"]["num_heads"])
        hook = types.SimpleNamespace(name=f"blocks.{index}.hook_resid_post")
        if hook.name in self.hooks["fwd"]:
          changed = self.hooks["fwd"][hook.name](x, hook=hook)
          x = x if changed is None else changed
        if hook.name in self.hooks["bwd"]:
          function = self.hooks["bwd"][hook.name]
          x.register_hook(functools.partial(function, hook=hook))
      return torch_logits(x, self.tensors)

  path = os.path.join(folder, "autoencoder.pt")
  width, latents = torch_autoencoder(folder, "cpu")["decoder.weight"].shape
  statistics = {
    "stats_last_nonzero": torch.zeros(latents, dtype=torch.long),
    "latents_activation_frequency": torch.ones(latents),
    "latents_mean_square": torch.zeros(latents),
  }
  activation = {"activation": "TopK", "activation_state_dict": {"k": sizes["top_k"], "postact_fn": "ReLU"}}
  torch.save({**torch_autoencoder(folder, "cpu"), **statistics, **activation}, path)
  lens, blobs, helpers = (types.ModuleType(name) for name in ("transformer_lens", "blobfile", "utils"))
  lens.HookedTransformer = HookedTransformer
  lens.ActivationCache = lambda cache, model: cache
  blobs.BlobFile = lambda *_, **__: open(path, "rb")  # noqa: SIM115
  helpers.metric_synchronize_between_processes = lambda *_: None
  sys.modules |= {"transformer_lens": lens, "blobfile": blobs, "utils": helpers}


def measure_reference(arguments: argparse.Namespace) -> dict:
  """Times the train step of a checkout: its model, its concept extractor, its train function."""
  import collections

  import torch
  import transformers

  tokens, device, mixed = torch_setup(arguments)
  checkout, sizes = pathlib.Path(arguments.reference), arguments.sizes
  if not (checkout / "models" / "modeling_gpt2_cocomix.py").is_file():
    raise FileNotFoundError(
      f"{checkout}: no models/modeling_gpt2_cocomix.py; give the folder projects/cocomix"
    )
  stand_in_modules(arguments, device)
  sys.path.insert(0, str(checkout))
  modeling = importlib.import_module("models.modeling_gpt2_cocomix")
  extractor_module = importlib.import_module("models.concept_extractor")
  found = importlib.util.spec_from_file_location(
    "train_function", checkout / "train" / "train_func" / "cocomix.py"
  )
  train_function = importlib.util.module_from_spec(found)
  found.loader.exec_module(train_function)

  settings = sizes["student"]
  config = transformers.GPT2Config(
    vocab_size=sizes["vocab_size"],
    n_embd=settings["model_dim"],
    n_layer=settings["num_layers"],
    n_head=settings["num_heads"],
    n_positions=sizes["length"],
    resid_pdrop=0.0,  # ours has none either
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    use_cache=False,
    bos_token_id=0,
    eos_token_id=0,
  )
  config._attn_implementation = arguments.reference_attention
  model = modeling.GPT2CoCoMixLMHeadModel(config, sizes["num_concepts"], sizes["insert_at"], sizes["top_k"])
  weights = {name: tensor.data for name, tensor in torch_weights(arguments.folder, STUDENT, "cpu").items()}
  missing, unexpected = model.load_state_dict(weights, strict=False)
  if set(missing) - {"lm_head.weight"} or unexpected:
    raise ValueError(f"the checkout's model has other weights: missing {missing}, unknown {unexpected}")
  model.lm_head.weight = model.transformer.wte.weight
  model = model.to(device)
  extractor = extractor_module.TransformerLensSAE(layer_index=sizes["tap_layer"], location="resid_post_mlp")
  extractor = extractor.to(device)
  if arguments.torch_compile:
    model, extractor = torch.compile(model), torch.compile(extractor)
  accelerator = types.SimpleNamespace(
    accumulate=lambda _: mixed(),
    sync_gradients=True,
    backward=lambda loss: loss.backward(),
    clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
    device=device,
  )
  step_config = types.SimpleNamespace(
    topK_attri=LABELS, lam_concept=LAMBDA, grad_clip_thresh=CLIP, global_step=1, log_step_freq=10**9
  )
  optimizer = torch_optimizer(model.parameters())
  scheduler, metrics = types.SimpleNamespace(step=lambda: None), collections.defaultdict(list)

  def run() -> list[float]:
    batch = {"input_ids": tokens}
    train_function.train_step(
      step_config, model, optimizer, scheduler, accelerator, batch, None, metrics, concept_extractor=extractor
    )
    synchronise(device)
    return [metrics["loss"][-1], metrics["loss_concept"][-1]]

  return timed_steps(run, arguments.warmup, arguments.steps)


MEASURES = types.MappingProxyType(
  {
    "export": export,
    **dict.fromkeys(OURS, measure_jax),
    "dense_jax": measure_jax,
    "dense_torch": measure_dense_torch,
    "reference": measure_reference,
  }
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--side", required=True, choices=tuple(MEASURES))
  parser.add_argument("--folder", required=True)
  parser.add_argument("--sizes", required=True, type=json.loads)
  parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--reference", default="")
  parser.add_argument("--reference_attention", default="sdpa")
  parser.add_argument("--torch_compile", type=int, default=0)
  for name in ("steps", "warmup", "threads", "loss_chunk"):
    parser.add_argument(f"--{name}", type=int, default=1)
  arguments = parser.parse_args()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
  with contextlib.redirect_stdout(sys.stderr):
    result = MEASURES[arguments.side](arguments)
    result |= {"peak_memory": peak_memory(arguments.device), "versions": versions(PACKAGES)}
  print(json.dumps(result))


if __name__ == "__main__":
  main()
