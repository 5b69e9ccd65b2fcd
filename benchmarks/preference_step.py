"""Steps of preference learning side by side: our DPO step, and TRL's loss on the same weights and pairs.

    python benchmarks/preference_step.py                     # all of it, about half an hour on 2 quiet cores
    python benchmarks/preference_step.py --quick             # tiny shapes; shows that it runs
    python benchmarks/preference_step.py --trl_python=PATH   # TRL in an environment of its own

Every measurement is a fresh process (peak memory is its own), and the processes take
turns, round after round, so that a change in the load of the machine touches all.
Reported are medians over rounds of the median step of a process, and ratios between them.

Variants
  jax          DPO on padded pairs, all parameters trained, a frozen copy as the reference.
  jax_packed   the same pairs, several in a row: what our batches do with uneven lengths.
  jax_lora     a low-rank adapter (rank 16) on fixed weights, which are the reference.
  jax_online   two samples of every prompt, then the step: seconds of each.
  trl          the loss of TRL's DPOTrainer, checkpointing of activations off, fused AdamW.
  torch_eager  DPO written out in PyTorch, two forward passes, fused AdamW.

A step runs the reference and the policy forward, the policy backward, and AdamW; float32,
no clipping. Losses of `jax`, `trl` and `torch_eager` are compared step by step: the same
weights, pairs and settings must give the same numbers. Needs torch, transformers and, for
`trl`, trl and datasets.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from machine import hardware

HERE = pathlib.Path(__file__).resolve().parent
# Settings of a model, pairs of a batch, tokens of a sequence and of its prompt at most.
_SMOLLM2 = dict(
  vocab_size=49152, num_layers=30, model_dim=576, num_heads=9, num_kv_heads=3, mlp_dim=1536, rotary_base=1e5
)
SHAPES = {
  "10M": dict(
    vocab_size=65, num_layers=6, model_dim=384, num_heads=6, mlp_dim=1024, pairs=8, length=256, prompt=64
  ),
  "135M": dict(**_SMOLLM2, pairs=4, length=128, prompt=32),
}
QUICK_SHAPES = {
  "quick": dict(
    vocab_size=65, num_layers=2, model_dim=32, num_heads=4, mlp_dim=48, pairs=4, length=64, prompt=16
  )
}
VARIANTS = ("jax", "jax_packed", "jax_lora", "jax_online", "trl", "torch_eager")
SAME = ("jax", "trl", "torch_eager")


def measure_once(side: str, folder: str, cache: str, arguments: argparse.Namespace, sizes: dict) -> dict:
  """Starts one measurement and waits for it."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(arguments.threads)}
  environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
  environment.pop("XLA_FLAGS", None)
  environment.pop("GLIBC_TUNABLES", None)
  # Compiled programs are kept for the rounds of this invocation, and no longer.
  environment["JAX_COMPILATION_CACHE_DIR"] = cache
  if side.startswith("jax"):
    environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  python = arguments.trl_python if side == "trl" else sys.executable
  command = [python, str(HERE / "preference_worker.py"), f"--side={side}", f"--folder={folder}"]
  command.append(f"--sizes={json.dumps(sizes)}")
  for name in ("steps", "warmup", "threads", "loss_chunk"):
    command.append(f"--{name}={getattr(arguments, name)}")
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if done.returncode != 0:
    raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def summarise(rounds: list[dict], pairs: int) -> dict:
  """Medians over rounds of one variant."""
  per_round = [statistics.median(result["seconds"]) for result in rounds]
  seconds = statistics.median(per_round)
  summary = {
    "step_seconds": seconds,
    "step_seconds_per_round": per_round,
    "pairs_per_second": pairs / seconds,
    "peak_memory": max(result["peak_memory"] for result in rounds),
    "losses": rounds[0]["losses"],
    "versions": rounds[0]["versions"],
  }
  if "compile_seconds" in rounds[0]:  # the first round compiles; later ones read the program back
    summary["compile_seconds"] = rounds[0]["compile_seconds"]
  if "sampling_seconds" in rounds[0]:
    for name in ("sampling_seconds", "training_seconds"):
      summary[name] = statistics.median(result[name] for result in rounds)
    summary["sampled_tokens_per_second"] = rounds[0]["sampled_tokens"] / summary["sampling_seconds"]
  return summary


def compare(variants: dict) -> dict:
  """The ratios that the benchmark is for; those whose sides were not measured are left out."""
  ratios = {}
  for name in ("jax", "jax_packed", "jax_lora"):
    for other in ("trl", "torch_eager"):
      if name not in variants or other not in variants:
        continue
      ours, theirs = variants[name], variants[other]
      ratios[f"{name}_over_{other}_pairs_per_second"] = theirs["step_seconds"] / ours["step_seconds"]
      ratios[f"{name}_over_{other}_per_round"] = [
        their / our for our, their in zip(ours["step_seconds_per_round"], theirs["step_seconds_per_round"])
      ]
      ratios[f"{name}_over_{other}_peak_memory"] = ours["peak_memory"] / theirs["peak_memory"]
  if "jax" in variants and "jax_packed" in variants:
    ratios["packed_over_padded"] = variants["jax"]["step_seconds"] / variants["jax_packed"]["step_seconds"]
  if "jax_online" in variants:
    online = variants["jax_online"]
    ratios["share_of_sampling_online"] = online["sampling_seconds"] / online["step_seconds"]
  losses = [variants[name]["losses"] for name in SAME if name in variants]
  if len(losses) > 1:
    ratios["largest_difference_of_losses"] = max(max(step) - min(step) for step in zip(*losses))
  return ratios


def table(report: dict) -> str:
  """The report as Markdown."""
  machine, settings = report["machine"], report["settings"]
  loads = ", ".join(f"{load:.2f}" for load in report["load_average"])
  found = {}
  for entry in report["shapes"].values():
    for variant in entry["variants"].values():
      found |= variant["versions"]
  lines = [
    "# Step of preference learning on CPU",
    "",
    f"{report['date']}; {machine['cpu']}, {settings['threads']} of {machine['cores']} cores, "
    f"{machine['memory'] / 2**30:.0f} GiB. "
    + ", ".join(f"{name} {version}" for name, version in {**machine["versions"], **found}.items())
    + ".",
    f"{settings['rounds']} rounds of {settings['steps']} steps a process, variants taking turns; medians. "
    f"Load average (1 minute) at the start of each round: {loads}.",
    f"Written by `{report['command']}`.",
  ]
  for shape, entry in report["shapes"].items():
    sizes = entry["sizes"]
    lines += [
      "",
      f"## {shape}: {sizes['num_layers']} layers x {sizes['model_dim']}, vocabulary {sizes['vocab_size']}, "
      f"{entry['parameters']:,} parameters",
      "",
      f"{entry['pairs']} pairs of {entry['tokens']} tokens in all: {entry['padded_positions']} positions padded, "
      f"{entry['packed_positions']} packed.",
      "",
      "| variant | s/step | pairs/s | peak RSS, GiB |",
      "| --- | --- | --- | --- |",
    ]
    for name, variant in entry["variants"].items():
      lines.append(
        f"| {name} | {variant['step_seconds']:.3f} | {variant['pairs_per_second']:.2f} "
        f"| {variant['peak_memory'] / 2**30:.2f} |"
      )
    online = entry["variants"].get("jax_online")
    if online:
      lines += [
        "",
        f"Online: {online['sampling_seconds']:.3f} s of sampling ({online['sampled_tokens_per_second']:.0f} tokens/s) "
        f"and {online['training_seconds']:.3f} s of training.",
      ]
    lines.append("")
    for name, value in entry["ratios"].items():
      shown = ", ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:.3g}"
      lines.append(f"- {name.replace('_', ' ')}: {shown}")
  return "\n".join(lines) + "\n"


def benchmark(arguments: argparse.Namespace) -> None:
  """Lets the variants take turns and writes the results."""
  shapes = QUICK_SHAPES if arguments.quick else SHAPES
  chosen = [shape for shape in shapes if not arguments.shapes or shape in arguments.shapes.split(",")]
  loads, entries = [], {}
  for shape in chosen:
    with tempfile.TemporaryDirectory() as scratch:
      folder, cache = os.path.join(scratch, "model"), os.path.join(scratch, "cache")
      written = measure_once("export", folder, cache, arguments, shapes[shape])
      rounds: dict[str, list[dict]] = {}
      for turn in range(arguments.rounds):
        loads.append(os.getloadavg()[0])
        for variant in arguments.variants.split(","):
          result = measure_once(variant, folder, cache, arguments, shapes[shape])
          rounds.setdefault(variant, []).append(result)
          seconds = statistics.median(result["seconds"])
          print(f"{shape} round {turn + 1} {variant}: {seconds:.3f} s/step", flush=True)
    variants = {name: summarise(results, written["pairs"]) for name, results in rounds.items()}
    kept = {name: value for name, value in written.items() if name not in ("peak_memory", "versions")}
    entries[shape] = {"sizes": shapes[shape], **kept, "variants": variants, "ratios": compare(variants)}
  report = {
    "date": datetime.date.today().isoformat(),
    # Without the place of TRL's interpreter, which is this machine's affair.
    "command": " ".join(
      ["python benchmarks/preference_step.py", *(a for a in sys.argv[1:] if not a.startswith("--trl_python"))]
    ),
    "machine": hardware(),
    "load_average": loads,
    "settings": {
      name: getattr(arguments, name) for name in ("rounds", "steps", "warmup", "threads", "loss_chunk")
    },
    "shapes": entries,
  }
  output = pathlib.Path(arguments.output or (tempfile.gettempdir() if arguments.quick else HERE / "results"))
  output.mkdir(parents=True, exist_ok=True)
  (output / "preference_step_cpu.json").write_text(json.dumps(report, indent=2) + "\n")
  (output / "preference_step_cpu.md").write_text(table(report))
  print(table(report))
  print(f"written: {output}/preference_step_cpu.json and .md")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
  parser.add_argument("--rounds", type=int, default=None, help="turns a variant takes (default 5, quick 1)")
  parser.add_argument("--steps", type=int, default=3, help="timed steps a process")
  parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
  parser.add_argument("--threads", type=int, default=2, help="cores a process may use")
  parser.add_argument("--loss_chunk", type=int, default=0, help="tokens whose logits JAX holds; 0: all")
  parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
  parser.add_argument("--shapes", default="", help=f"comma-separated, of {', '.join(SHAPES)} (default all)")
  parser.add_argument("--output", default="", help="folder (default benchmarks/results, quick: temporary)")
  parser.add_argument("--trl_python", default=sys.executable, help="interpreter that has trl")
  arguments = parser.parse_args()
  if unknown := set(arguments.variants.split(",")) - set(VARIANTS):
    parser.error(f"--variants: {', '.join(sorted(unknown))} unknown; choose from {', '.join(VARIANTS)}")
  arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
  benchmark(arguments)


if __name__ == "__main__":
  main()
