"""One measurement of benchmarks/preference_step.py, in a process of its own; prints JSON on the last line."""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import types

from measuring import peak_memory, timed_steps, versions

LEARNING_RATE, BETAS, WEIGHT_DECAY, BETA = 1e-4, (0.9, 0.95), 0.1, 0.1
ARRAYS = "pairs.npz"
PACKAGES = ("jax", "flax", "torch", "transformers", "trl")


# Weights and batches that all sides read.


def export(arguments: argparse.Namespace) -> dict:
  """Writes random weights in Hugging Face's format, and pairs of uneven lengths, padded and packed."""
  import jax
  import numpy as np

  from nr.data.example_batches import packed_batches, padded_batches
  from nr.data.examples import EncodedExample
  from nr.interchange.huggingface import save_huggingface
  from nr.models import parameters
  from nr.models.transformer import TransformerSpec
  from nr.training.model_files import build_model

  sizes = json.loads(arguments.sizes)
  pairs, length, prompt = sizes.pop("pairs"), sizes.pop("length"), sizes.pop("prompt")
  spec = TransformerSpec.llama(**sizes, max_length=2 * length, tied_head=True)
  params = parameters.split(build_model(spec, jax.random.key(0)))[1]
  save_huggingface(arguments.folder, spec, params)
  random = np.random.default_rng(0)
  examples = []
  for number in range(pairs):
    start = random.integers(1, spec.vocab_size, random.integers(prompt // 2, prompt + 1))
    # The first pair is as long as a pair may be, so that every side pads to the same length.
    sizes = [
      length - len(start) if number == 0 else random.integers(16, length - prompt + 1) for _ in range(2)
    ]
    tokens = tuple(
      np.concatenate([start, random.integers(1, spec.vocab_size, size)]).astype(np.int32) for size in sizes
    )
    masks = tuple(np.arange(len(ids)) >= len(start) for ids in tokens)
    examples.append(EncodedExample(str(number), tokens, masks))
  (padded,) = padded_batches(examples, pairs, (length,), None, 1)
  rows = len(list(packed_batches(examples, 1, 2 * length, None, 1, slots=4)))
  (packed,) = packed_batches(examples, rows, 2 * length, None, 1, slots=4)
  lengths = np.array([[len(ids) for ids in example.tokens] for example in examples], np.int32)
  prompts = np.array([int((~example.is_response[0]).sum()) for example in examples], np.int32)
  arrays = {f"padded_{name}": value for name, value in padded.items()}
  arrays |= {f"packed_{name}": value for name, value in packed.items()}
  np.savez(os.path.join(arguments.folder, ARRAYS), lengths=lengths, prompts=prompts, **arrays)
  return {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "pairs": pairs,
    "tokens": int(lengths.sum()),
    "padded_positions": int(padded["tokens"].size),
    "packed_positions": int(packed["tokens"].size),
    "packed_rows": rows,
  }


def read_arrays(folder: str, prefix: str) -> dict:
  """One kind of batch from the file."""
  import numpy as np

  with np.load(os.path.join(folder, ARRAYS), allow_pickle=False) as stored:
    return {name.removeprefix(prefix): stored[name] for name in stored.files if name.startswith(prefix)}


# Our side.


def jax_step(arguments: argparse.Namespace, batch: dict):
  """Returns (compiled step, its state in a list, frozen arrays, policy, seconds of compilation)."""
  import jax

  from nr.interchange.huggingface import load_huggingface
  from nr.models.lora import LoraSpec
  from nr.objectives.preference import PreferenceSpec
  from nr.training.defaults import get_training_config
  from nr.training.optimizers import make_optimizer
  from nr.training.policy import full_policy, lora_policy
  from nr.training.preference import preference_method
  from nr.training.state import create_state, place_frozen
  from nr.training.step import make_train_step

  spec, params = load_huggingface(arguments.folder, layers="unroll", attention="blocked")
  if arguments.side == "jax_lora":
    policy = lora_policy(spec, params, LoraSpec(rank=16, alpha=32.0), jax.random.key(0))
  else:
    policy = full_policy(spec, params)
  del params
  method = preference_method(
    policy,
    PreferenceSpec(loss="dpo", beta=BETA),
    reference="base" if arguments.side == "jax_lora" else "frozen",
    loss_chunk=arguments.loss_chunk or None,
  )
  config = get_training_config()
  config.clip, config.schedule.name = 0.0, "constant"
  config.optimizer.learning_rate, config.optimizer.weight_decay = LEARNING_RATE, WEIGHT_DECAY
  optimizer = make_optimizer(config, method)
  state, frozen = create_state(method, optimizer, 0), place_frozen(method, None)
  start = time.perf_counter()
  step = make_train_step(method, optimizer).lower(state, frozen, batch).compile()
  return step, [state], frozen, policy, time.perf_counter() - start


def measure_jax(arguments: argparse.Namespace) -> dict:
  """Compiles and times our DPO step."""
  import jax

  batch = jax.device_put(
    read_arrays(arguments.folder, "packed_" if arguments.side == "jax_packed" else "padded_")
  )
  step, held, frozen, _, compile_seconds = jax_step(arguments, batch)

  def run() -> float:
    held[0], metrics = step(held[0], frozen, batch)
    jax.block_until_ready(held[0])
    return float(metrics["preference_loss"].mean())

  return {**timed_steps(run, arguments.warmup, arguments.steps), "compile_seconds": compile_seconds}


def measure_online(arguments: argparse.Namespace) -> dict:
  """Times what a step of online training is made of: two samples a prompt, and the update."""
  import jax
  import numpy as np

  from nr.generation.decoding import pad_prompts
  from nr.generation.language_models import Network
  from nr.generation.sample import sample

  batch = jax.device_put(read_arrays(arguments.folder, "padded_"))
  step, held, frozen, policy, compile_seconds = jax_step(arguments, batch)
  prompts = read_arrays(arguments.folder, "prompts")[""]
  tokens, length = np.asarray(batch["tokens"]), batch["tokens"].shape[-1]
  prompts_BP, valid_BP = pad_prompts([tokens[row, 0, :size].tolist() for row, size in enumerate(prompts)])
  new = length - int(prompts.max())
  sampling, training = [], []
  for turn in range(arguments.warmup + arguments.steps):
    start = time.perf_counter()
    network = Network(policy.graphdef, held[0].params)
    key = jax.random.key(turn)
    drawn = sample(network, prompts_BP, valid_BP, key, max_new_tokens=new, num_samples=2)
    jax.block_until_ready(drawn.tokens_RN)
    middle = time.perf_counter()
    held[0], _ = step(held[0], frozen, batch)
    jax.block_until_ready(held[0])
    if turn >= arguments.warmup:
      sampling.append(middle - start)
      training.append(time.perf_counter() - middle)
  return {
    "seconds": [a + b for a, b in zip(sampling, training)],
    "sampling_seconds": statistics.median(sampling),
    "training_seconds": statistics.median(training),
    "sampled_tokens": 2 * len(prompts) * new,
    "compile_seconds": compile_seconds,
    "losses": [],
  }


# The other sides.


def torch_inputs(folder: str) -> dict:
  """The padded batch as TRL's collator gives it: all chosen rows, then all rejected ones."""
  import torch

  batch = read_arrays(folder, "padded_")
  lengths, prompts = read_arrays(folder, "lengths")[""], read_arrays(folder, "prompts")[""]
  ids = torch.from_numpy(batch["tokens"]).long().transpose(0, 1).flatten(0, 1)
  places = torch.arange(ids.shape[1])
  ends = torch.from_numpy(lengths).transpose(0, 1).flatten()[:, None]
  starts = torch.from_numpy(prompts).repeat(2)[:, None]
  is_token = places < ends
  return {
    "input_ids": ids,
    "attention_mask": is_token.long(),
    "completion_mask": (is_token & (places >= starts)).long(),
  }


def eager_loss(model, reference, inputs: dict):
  """DPO in plain PyTorch: whole logits, two forward passes."""
  import torch

  targets, mask = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:]

  def sums(network):
    logits = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    log_probs = torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]
    return (log_probs * mask).sum(dim=1)

  with torch.no_grad():
    fixed = sums(reference)
  chosen, rejected = (sums(model) - fixed).chunk(2)
  return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def trl_loss(model, reference, folder: str):
  """Returns inputs -> loss of TRL's own DPOTrainer around the two models."""
  import tokenizers
  import transformers
  from datasets import Dataset
  from trl import DPOConfig, DPOTrainer

  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", eos_token="<unk>"
  )
  settings = DPOConfig(
    output_dir=os.path.join(folder, "trl"),
    beta=BETA,
    loss_type=["sigmoid"],
    bf16=False,
    gradient_checkpointing=False,
    use_cpu=True,
    report_to=[],
    max_length=None,
    disable_dropout=True,
  )
  # The trainer wants a data set; its loss is given our batch.
  data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}] * 2)
  trainer = DPOTrainer(
    model=model, ref_model=reference, args=settings, train_dataset=data, processing_class=tokenizer
  )
  return lambda inputs: trainer.compute_loss(trainer.model, dict(inputs))


def measure_torch(arguments: argparse.Namespace) -> dict:
  """Times the same step of PyTorch: TRL's loss, or one written out."""
  import torch
  import transformers

  torch.set_num_threads(arguments.threads)
  torch.set_flush_denormal(True)
  load = transformers.AutoModelForCausalLM.from_pretrained
  model = load(arguments.folder, dtype=torch.float32).train()
  reference = load(arguments.folder, dtype=torch.float32).eval()
  model.config.use_cache = reference.config.use_cache = False
  inputs = torch_inputs(arguments.folder)
  loss_of = lambda inputs: eager_loss(model, reference, inputs)  # noqa: E731
  if arguments.side == "trl":
    loss_of = trl_loss(model, reference, arguments.folder)
    model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
  )

  def run() -> float:
    loss = loss_of(inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return timed_steps(run, arguments.warmup, arguments.steps)


MEASURES = types.MappingProxyType(
  {
    "export": export,
    "jax": measure_jax,
    "jax_packed": measure_jax,
    "jax_lora": measure_jax,
    "jax_online": measure_online,
    "torch_eager": measure_torch,
    "trl": measure_torch,
  }
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--side", required=True, choices=tuple(MEASURES))
  parser.add_argument("--folder", required=True)
  parser.add_argument("--sizes", default="{}")
  for name in ("steps", "warmup", "threads", "loss_chunk"):
    parser.add_argument(f"--{name}", type=int, default=1)
  arguments = parser.parse_args()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
  with contextlib.redirect_stdout(sys.stderr):
    result = MEASURES[arguments.side](arguments)
    result |= {"peak_memory": peak_memory(), "versions": versions(PACKAGES)}
  print(json.dumps(result))


if __name__ == "__main__":
  main()
