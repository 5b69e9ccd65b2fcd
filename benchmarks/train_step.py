"""Training steps side by side: our next-token and CoCoMix steps, and the same GPT-2 in PyTorch.

    python benchmarks/train_step.py                  # all of it, about half an hour on 2 quiet cores
    python benchmarks/train_step.py --quick          # tiny shapes, a minute; shows that it runs

Every measurement is a fresh process (peak memory is its own), and the processes
take turns, round after round (A B C A B C ...), so that a change in the load of
the machine touches all. Reported are medians over rounds of the median step of a
process, and ratios between them. Every process is bound to the same `--threads` cores.

Each side runs at its best on CPU. JAX: unrolled layers, blocked attention, huge pages
for its process alone (they make PyTorch slower). PyTorch: fused AdamW, denormals
flushed, eager and compiled. float32, dropout 0, no clipping, batches of random tokens.

Needs torch and transformers (extra [oracles]) for the PyTorch variants.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from machine import hardware
from measuring import peak_memory, timed_steps

HERE = pathlib.Path(__file__).resolve().parent

# num_layers, model_dim, num_heads, vocab_size, rows, length; CoCoMix: insert_at, num_concepts, top_k.
SHAPES = {
  "10M": ((6, 384, 6, 65, 8, 512), None),
  "69M": ((8, 512, 8, 50257, 8, 512), (3, 32768, 32)),
}
QUICK_SHAPES = {"quick": ((2, 32, 4, 65, 2, 32), (1, 64, 8))}
ALL_SHAPES = {**SHAPES, **QUICK_SHAPES}
VARIANTS = ("jax_next_token", "jax_cocomix", "torch_eager", "torch_compile")


# One measurement, in a process of its own.


def make_jax_method(variant: str, shape: str, loss_chunk: int):
  """The method of a variant, at its fastest settings for CPU."""
  from nr.models.concept_mixing import ConceptMixingSpec
  from nr.models.transformer import TransformerSpec
  from nr.recipes.cocomix.method import cocomix_method
  from nr.training.model_files import ConceptMixingModelSpec
  from nr.training.next_token import next_token_method

  (layers, dim, heads, vocab, _, length), concepts = ALL_SHAPES[shape]
  spec = TransformerSpec.gpt2(
    vocab_size=vocab,
    num_layers=layers,
    model_dim=dim,
    num_heads=heads,
    max_length=length,
    layers="unroll",
    attention="blocked",
  )
  if variant == "jax_next_token":
    return next_token_method(spec, loss_chunk=loss_chunk or None)
  insert_at, num_concepts, top_k = concepts
  concept_spec = ConceptMixingSpec(insert_at=insert_at, num_concepts=num_concepts, top_k=top_k)
  model = ConceptMixingModelSpec(spec, concept_spec)
  return cocomix_method(model, loss_weight=0.1, loss_chunk=loss_chunk or None)


def make_jax_batch(variant: str, shape: str) -> dict:
  """Random tokens, and random labels in the place of a label cache."""
  import numpy as np

  (*_, vocab, rows, length), concepts = ALL_SHAPES[shape]
  random = np.random.default_rng(0)
  tokens = random.integers(0, vocab, (rows, length)).astype(np.int32)
  weights = np.ones((rows, length), np.float32)
  weights[:, -1] = 0
  batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights}
  if variant == "jax_cocomix":
    batch["labels"] = random.integers(0, concepts[1], (rows, length, 4)).astype(np.int32)
  return batch


def measure_jax(variant: str, shape: str, arguments: argparse.Namespace) -> dict:
  """Compiles and times our train step."""
  import jax

  from nr.evaluation.flops import count_flops
  from nr.training.defaults import get_training_config
  from nr.training.optimizers import make_optimizer
  from nr.training.state import abstract_state, create_state
  from nr.training.step import make_train_step

  method = make_jax_method(variant, shape, arguments.loss_chunk)
  batch = make_jax_batch(variant, shape)
  config = get_training_config()
  config.clip = 0.0
  config.optimizer.weight_decay = 0.1
  optimizer = make_optimizer(config, method)
  step = make_train_step(method, optimizer)
  abstract = abstract_state(method, optimizer)
  key = jax.random.key(0)
  forward_flops = count_flops(lambda p, b: method.loss(p, {}, (), b, key).loss.total, abstract.params, batch)
  step_flops = count_flops(step, abstract, {}, batch)
  start = time.perf_counter()
  compiled = step.lower(abstract, {}, batch).compile()
  compile_seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  batch = jax.device_put(batch)
  held = [create_state(method, optimizer, 0)]
  parameters = sum(leaf.size for leaf in jax.tree.leaves(held[0].params))

  def run() -> float:
    held[0], metrics = compiled(held[0], {}, batch)
    jax.block_until_ready(held[0])
    return float(metrics["next_token_loss"].mean())

  timed = timed_steps(run, arguments.warmup, arguments.steps)
  return {
    "seconds": timed["seconds"],
    "first_loss": timed["losses"][0],
    "compile_seconds": compile_seconds,
    "parameters": parameters,
    "forward_flops": forward_flops,
    "step_flops": step_flops,
    "compiled_memory": {
      "arguments": memory.argument_size_in_bytes,
      "outputs": memory.output_size_in_bytes,
      "temporary": memory.temp_size_in_bytes,
      "aliased": memory.alias_size_in_bytes,
    },
  }


def measure_torch(variant: str, shape: str, arguments: argparse.Namespace) -> dict:
  """Times the same GPT-2 of `transformers`."""
  import torch
  import transformers

  torch.set_num_threads(arguments.threads)
  torch.set_flush_denormal(True)
  torch.manual_seed(0)
  (layers, dim, heads, vocab, rows, length), _ = ALL_SHAPES[shape]
  config = transformers.GPT2Config(
    vocab_size=vocab,
    n_embd=dim,
    n_layer=layers,
    n_head=heads,
    n_positions=length,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    initializer_range=0.02,
    use_cache=False,
    bos_token_id=0,
    eos_token_id=0,
  )
  model = transformers.GPT2LMHeadModel(config).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
  forward = torch.compile(model) if variant == "torch_compile" else model
  tokens = torch.from_numpy(make_jax_batch(variant, shape)["tokens"]).long()

  def run() -> float:
    loss = forward(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  start = time.perf_counter()
  first_loss = run()
  compile_seconds = time.perf_counter() - start
  timed = timed_steps(run, max(0, arguments.warmup - 1), arguments.steps)
  return {
    "seconds": timed["seconds"],
    "first_loss": first_loss,
    "compile_seconds": compile_seconds,
    "parameters": sum(p.numel() for p in model.parameters()),
  }


def work(arguments: argparse.Namespace) -> None:
  """Runs one measurement and prints it as JSON on the last line."""
  cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
  os.sched_setaffinity(0, cores)
  with contextlib.redirect_stdout(sys.stderr):
    measure = measure_jax if arguments.worker.startswith("jax") else measure_torch
    result = measure(arguments.worker, arguments.shape, arguments)
    result["peak_memory"] = peak_memory()
  print(json.dumps(result))


# Taking turns, and the report.


def measure_once(variant: str, shape: str, arguments: argparse.Namespace, cache: str) -> dict:
  """Starts one measurement and waits for it."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
  environment.pop("XLA_FLAGS", None)
  environment.pop("GLIBC_TUNABLES", None)
  # Compiled programs are kept for the rounds of this invocation, and no longer.
  environment["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(cache, "torch")
  environment["JAX_COMPILATION_CACHE_DIR"] = os.path.join(cache, "jax")
  if variant.startswith("jax"):
    environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  command = [sys.executable, str(HERE / "train_step.py"), f"--worker={variant}", f"--shape={shape}"]
  for name in ("steps", "warmup", "threads", "loss_chunk"):
    command.append(f"--{name}={getattr(arguments, name)}")
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if done.returncode != 0:
    raise RuntimeError(f"{variant} at {shape} failed:\n{done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def summarise(shape: str, rounds: list[dict]) -> dict:
  """Medians over rounds of one variant."""
  (*_, rows, length), _ = ALL_SHAPES[shape]
  per_round = [statistics.median(result["seconds"]) for result in rounds]
  seconds = statistics.median(per_round)
  kept = ("parameters", "first_loss", "forward_flops", "step_flops", "compiled_memory")
  return {
    "step_seconds": seconds,
    "step_seconds_per_round": per_round,
    "tokens_per_second": rows * length / seconds,
    "peak_memory": max(result["peak_memory"] for result in rounds),
    # The first round compiles; later ones read the program back.
    "compile_seconds": rounds[0]["compile_seconds"],
    **{name: rounds[0][name] for name in kept if name in rounds[0]},
  }


def compare(variants: dict) -> dict:
  """The ratios that the benchmark is for; those whose sides were not measured are left out."""
  ratios = {}
  ntp, cocomix = variants.get("jax_next_token"), variants.get("jax_cocomix")
  torch = [variants[name] for name in ("torch_eager", "torch_compile") if name in variants]
  if ntp and torch:
    best = min(torch, key=lambda variant: variant["step_seconds"])
    ratios["next_token_over_best_torch"] = ntp["step_seconds"] / best["step_seconds"]
    pairs = zip(ntp["step_seconds_per_round"], best["step_seconds_per_round"])
    ratios["next_token_over_best_torch_per_round"] = [ours / theirs for ours, theirs in pairs]
  if ntp and cocomix:
    time_ratio = cocomix["step_seconds"] / ntp["step_seconds"]
    flops_ratio = cocomix["forward_flops"] / ntp["forward_flops"]
    ratios["cocomix_over_next_token"] = time_ratio
    # Forward, as the cost table of the specification counts; a gather is no product.
    ratios["cocomix_over_next_token_flops"] = flops_ratio
    ratios["cocomix_over_next_token_step_flops"] = cocomix["step_flops"] / ntp["step_flops"]
    ratios["cocomix_time_over_flops"] = time_ratio / flops_ratio
  return ratios


def table(report: dict) -> str:
  """The report as Markdown."""
  machine = report["machine"]
  loads = ", ".join(f"{load:.2f}" for load in report["load_average"])
  settings = report["settings"]
  lines = [
    "# Training step on CPU",
    "",
    f"{report['date']}; {machine['cpu']}, {settings['threads']} of {machine['cores']} cores, "
    f"{machine['memory'] / 2**30:.0f} GiB. "
    + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    + ".",
    f"{settings['rounds']} rounds of {settings['steps']} steps a process, variants taking turns; medians. "
    f"Load average (1 minute) at the start of each round: {loads}.",
    f"Written by `{report['command']}`.",
  ]
  for shape, entry in report["shapes"].items():
    layers, dim, heads, vocab, rows, length = entry["sizes"]
    lines += [
      "",
      f"## {shape}: {layers} layers x {dim}, {heads} heads, vocabulary {vocab}, batch {rows} x {length}",
      "",
      "| variant | parameters | s/step | tokens/s | peak RSS, GiB | temporary (compiler), GiB | GFLOP/step |",
      "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, variant in entry["variants"].items():
      temporary = variant.get("compiled_memory", {}).get("temporary")
      flops = variant.get("step_flops")
      lines.append(
        f"| {name} | {variant['parameters']:,} | {variant['step_seconds']:.3f} "
        f"| {variant['tokens_per_second']:.0f} | {variant['peak_memory'] / 2**30:.2f} "
        f"| {'' if temporary is None else f'{temporary / 2**30:.2f}'} "
        f"| {'' if flops is None else f'{flops / 1e9:.1f}'} |"
      )
    lines.append("")
    for name, value in entry["ratios"].items():
      shown = ", ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:.3f}"
      lines.append(f"- {name.replace('_', ' ')}: {shown}")
  return "\n".join(lines) + "\n"


def benchmark(arguments: argparse.Namespace) -> None:
  """Lets the variants take turns and writes the results."""
  shapes = QUICK_SHAPES if arguments.quick else SHAPES
  results: dict = {shape: {} for shape in shapes}
  loads = []
  with tempfile.TemporaryDirectory() as cache:
    for shape, (_, concepts) in shapes.items():
      variants = [v for v in arguments.variants.split(",") if concepts or v != "jax_cocomix"]
      for turn in range(arguments.rounds):
        loads.append(os.getloadavg()[0])
        for variant in variants:
          result = measure_once(variant, shape, arguments, cache)
          results[shape].setdefault(variant, []).append(result)
          seconds = statistics.median(result["seconds"])
          print(f"{shape} round {turn + 1} {variant}: {seconds:.3f} s/step", flush=True)
  report = {
    "date": datetime.date.today().isoformat(),
    "command": " ".join(["python benchmarks/train_step.py", *sys.argv[1:]]),
    "machine": hardware(),
    "load_average": loads,
    "settings": {
      name: getattr(arguments, name) for name in ("rounds", "steps", "warmup", "threads", "loss_chunk")
    },
    "shapes": {},
  }
  for shape, variants in results.items():
    summaries = {name: summarise(shape, rounds) for name, rounds in variants.items()}
    sizes, concepts = ALL_SHAPES[shape]
    entry = {"sizes": sizes, "concepts": concepts, "variants": summaries, "ratios": compare(summaries)}
    report["shapes"][shape] = entry
  output = pathlib.Path(arguments.output or (tempfile.gettempdir() if arguments.quick else HERE / "results"))
  output.mkdir(parents=True, exist_ok=True)
  (output / "train_step_cpu.json").write_text(json.dumps(report, indent=2) + "\n")
  (output / "train_step_cpu.md").write_text(table(report))
  print(table(report))
  print(f"written: {output}/train_step_cpu.json and .md")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
  parser.add_argument("--rounds", type=int, default=None, help="turns a variant takes (default 5, quick 1)")
  parser.add_argument("--steps", type=int, default=4, help="timed steps a process")
  parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
  parser.add_argument("--threads", type=int, default=2, help="cores a process may use")
  parser.add_argument("--loss_chunk", type=int, default=0, help="tokens whose logits JAX holds; 0: all")
  parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
  parser.add_argument("--output", default="", help="folder (default benchmarks/results, quick: temporary)")
  parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
  parser.add_argument("--shape", choices=tuple(ALL_SHAPES), help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if unknown := set(arguments.variants.split(",")) - set(VARIANTS):
    parser.error(f"--variants: {', '.join(sorted(unknown))} unknown; choose from {', '.join(VARIANTS)}")
  if arguments.worker:
    work(arguments)
    return
  arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
  benchmark(arguments)


if __name__ == "__main__":
  main()
