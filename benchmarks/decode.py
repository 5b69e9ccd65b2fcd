"""Decoding side by side: our drivers, and `generate` of `transformers` on the same weights.

    python benchmarks/decode.py                   # all of it, about half an hour on 2 quiet cores
    python benchmarks/decode.py --quick           # tiny shapes; shows that it runs
    python benchmarks/decode.py --only=truncation # one section; the others are kept from the file

Sections
  generate    tokens/s of `sample` against `generate` (eager, and compiled with a static
              cache), greedy, batch 1, 8, 32 and 16 samples of one prompt; both sides must
              give the same tokens. Processes of both sides stay open and take turns, round
              after round, so that a change in the load of the machine touches all.
  prefill     16 samples of one prompt, read once or 16 times.
  truncation  cost of each truncation at vocabularies of 32k and 128k, sort and search.
  speculative speed-up with drafts looked up in the text, on repetitive text, against the
              formula (1 - a^(g+1)) / ((1 - a)(g c + 1)) with measured acceptance a and cost c.
  continuous  continuous against static batching on a skewed mix of lengths.

float32, 2 threads. Needs torch and transformers (extra [oracles]) for `generate`.
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
SECTIONS = ("generate", "prefill", "truncation", "speculative", "continuous")
SIDES = ("jax", "torch_eager", "torch_static")
# num_layers, model_dim, num_heads, vocab_size; prompt tokens, new tokens.
SHAPES = {"10M": ((6, 384, 6, 65), 32, 64), "124M": ((12, 768, 12, 50257), 32, 32)}
QUICK_SHAPES = {"quick": ((2, 32, 2, 65), 8, 8)}
CASES = {"batch 1": (1, 1), "batch 8": (8, 1), "batch 32": (32, 1), "16 samples": (1, 16)}


class Worker:
  """One side in a process of its own, that answers measurements as JSON lines."""

  def __init__(self, side: str, threads: int, cache: str):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    environment["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(cache, "torch")
    environment.pop("XLA_FLAGS", None)
    environment.pop("GLIBC_TUNABLES", None)
    if side.startswith("jax"):
      environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    command = [sys.executable, str(HERE / "decode_worker.py"), f"--side={side}", f"--threads={threads}"]
    self.process = subprocess.Popen(
      command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.side = side

  def ask(self, task: str, **settings) -> dict:
    """Sends one task and waits for its answer."""
    self.process.stdin.write(json.dumps({"task": task, **settings}) + "\n")
    self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f"{self.side}: task {task} failed; its error is above")
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    self.process.stdin.close()
    self.process.wait()


def run_generate(arguments: argparse.Namespace, cache: str) -> dict:
  """Greedy decoding of both sides, taking turns."""
  result = {}
  for shape, (sizes, prompt, new) in (QUICK_SHAPES if arguments.quick else SHAPES).items():
    weights = os.path.join(cache, shape)
    sides = [side for side in SIDES if side in arguments.sides.split(",")]
    workers = {side: Worker(side, arguments.threads, cache) for side in sides}
    first = workers["jax"].ask("export", sizes=sizes, folder=weights, max_length=prompt + new + 1)
    for side in sides[1:]:
      workers[side].ask("load", folder=weights)
    entry = {"sizes": sizes, "prompt": prompt, "new": new, **first, "cases": {}}
    for case, (batch, samples) in CASES.items():
      rounds = {side: [] for side in sides}
      for turn in range(arguments.rounds):
        for side, worker in workers.items():
          answer = worker.ask("generate", batch=batch, samples=samples, prompt=prompt, new=new)
          rounds[side].append(answer)
          print(f"{shape} {case} round {turn + 1} {side}: {answer['whole']:.3f} s", flush=True)
      tokens = {side: answers[0]["tokens"] for side, answers in rounds.items()}
      entry["cases"][case] = summarise_generate(rounds, batch * samples, new, entry["parameter_bytes"])
      entry["cases"][case]["same_tokens"] = all(each == tokens["jax"] for each in tokens.values())
    result[shape] = entry
    for worker in workers.values():
      worker.close()
  return result


def summarise_generate(rounds: dict, rows: int, new: int, parameter_bytes: int) -> dict:
  """Medians over rounds, rates, and ratios."""
  sides = {}
  for side, answers in rounds.items():
    whole = statistics.median(answer["whole"] for answer in answers)
    decode = statistics.median(answer["whole"] - answer["first"] for answer in answers)
    sides[side] = {
      "whole_seconds": whole,
      "first_token_seconds": statistics.median(answer["first"] for answer in answers),
      "tokens_per_second": rows * (new + 1) / whole,
      "decode_tokens_per_second": rows * new / decode,
      "decode_step_seconds": decode / new,
    }
  cache_bytes = rounds["jax"][0]["cache_bytes"]
  step = sides["jax"]["decode_step_seconds"]
  summary = {
    "sides": sides,
    "bytes_per_step": parameter_bytes + cache_bytes,
    "bytes_per_token": (parameter_bytes + cache_bytes) / rows,
    "bytes_per_second": (parameter_bytes + cache_bytes) / step,
  }
  for side in sides:
    if side != "jax":
      pairs = zip(rounds["jax"], rounds[side])
      summary[f"over_{side}_per_round"] = [theirs["whole"] / ours["whole"] for ours, theirs in pairs]
      summary[f"over_{side}"] = sides["jax"]["tokens_per_second"] / sides[side]["tokens_per_second"]
      summary[f"decode_over_{side}"] = (
        sides["jax"]["decode_tokens_per_second"] / sides[side]["decode_tokens_per_second"]
      )
  return summary


def run_jax_section(section: str, arguments: argparse.Namespace, cache: str) -> dict:
  """One section whose variants all run in one JAX process, taking turns there."""
  worker = Worker("jax", arguments.threads, cache)
  result = worker.ask(section, rounds=arguments.rounds, quick=arguments.quick)
  worker.close()
  return result


def table(report: dict) -> str:
  """The report as Markdown."""
  machine, settings = report["machine"], report["settings"]
  lines = [
    "# Decoding on CPU",
    "",
    f"{machine['cpu']}, {settings['threads']} of {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB. "
    + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    + f". {settings['rounds']} rounds, variants taking turns; medians. float32.",
  ]
  sections = report["sections"]
  for name in SECTIONS:
    if name in sections:
      lines += ["", *WRITERS[name](sections[name]["result"]), ""]
      lines.append(f"({sections[name]['date']}, load average {sections[name]['load']:.2f} at the start)")
  return "\n".join(lines) + "\n"


def write_generate(result: dict) -> list[str]:
  lines = [
    "## Greedy decoding of the same weights",
    "",
    "The lead is largest where a step is bound by memory and by the overhead of a call (batch 1, small models). "
    "At batch 32 a smaller share of the bandwidth is used: there the lead is smaller.",
  ]
  for shape, entry in result.items():
    lines += [
      "",
      f"{shape} ({entry['parameters']:,} parameters, vocabulary {entry['sizes'][3]}), prompt {entry['prompt']}, "
      f"{entry['new'] + 1} new tokens. Decode steps leave out the prompt and the first token. Summing an array "
      f"reads {entry['read_bandwidth'] / 1e9:.1f} GB/s here; bytes are parameters and the keys and values that are "
      "allocated.",
      "",
      "| case | ours, tokens/s | over eager | over compiled static | decode steps: ours, tokens/s | over eager |"
      " over compiled static | MB read a token | of the bandwidth | same tokens |",
      "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, summary in entry["cases"].items():
      ours = summary["sides"]["jax"]

      def ratio(name, summary=summary):
        return f"{summary[name]:.2f}" if name in summary else ""

      share = summary["bytes_per_second"] / entry["read_bandwidth"]
      lines.append(
        f"| {case} | {ours['tokens_per_second']:.1f} | {ratio('over_torch_eager')} | {ratio('over_torch_static')} "
        f"| {ours['decode_tokens_per_second']:.1f} | {ratio('decode_over_torch_eager')} "
        f"| {ratio('decode_over_torch_static')} | {summary['bytes_per_token'] / 1e6:.1f} | {share:.0%} "
        f"| {'yes' if summary['same_tokens'] else 'no'} |"
      )
  return lines


def write_prefill(result: dict) -> list[str]:
  return [
    "## One reading of the prompt for 16 samples",
    "",
    f"{result['parameters']:,} parameters, prompt {result['prompt']}, {result['new']} new tokens: "
    f"{result['shared_seconds']:.2f} s with one reading, {result['separate_seconds']:.2f} s with 16; "
    f"**{result['speedup']:.2f}** times as fast.",
  ]


def write_truncation(result: dict) -> list[str]:
  lines = [
    "## Truncations",
    "",
    f"Milliseconds for {result['rows']} rows, the transform alone.",
    "",
    "| transform | "
    + " | ".join(f"V = {size:,}, {form}" for size in result["sizes"] for form in ("sort", "search"))
    + " |",
    "| --- |" + " --- |" * (2 * len(result["sizes"])),
  ]
  for name, times in result["milliseconds"].items():
    cells = [
      f"{times[f'{size} {form}']:.2f}" if f"{size} {form}" in times else ""
      for size in result["sizes"]
      for form in ("sort", "search")
    ]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return lines


def write_speculative(result: dict) -> list[str]:
  lines = [
    "## Speculation",
    "",
    result["what"],
    "",
    "| drafts | length | plain, s | speculative, s | speed-up | by the formula | acceptance | tokens a call "
    "| cost of a draft | same tokens |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for row in result["rows"]:
    lines.append(
      f"| {row['drafts']} | {row['length']} | {row['plain_seconds']:.2f} | {row['seconds']:.2f} | {row['speedup']:.2f} "
      f"| {row['formula']:.2f} | {row['acceptance']:.3f} | {row['tokens_per_call']:.2f} | {row['draft_cost']:.3f} "
      f"| {'yes' if row['same_tokens'] else 'no'} |"
    )
  return lines


def write_continuous(result: dict) -> list[str]:
  return [
    "## Continuous batching",
    "",
    f"{result['requests']} requests over {result['slots']} rows, {result['parameters']:,} parameters; "
    f"new tokens: {result['mix']}. Static batches {result['static_seconds']:.2f} s "
    f"({result['static_rate']:.0f} tokens/s, {result['static_calls']} calls of the model), continuous "
    f"{result['continuous_seconds']:.2f} s ({result['continuous_rate']:.0f} tokens/s): "
    f"**{result['speedup']:.2f}** times as fast.",
  ]


WRITERS = {
  "generate": write_generate,
  "prefill": write_prefill,
  "truncation": write_truncation,
  "speculative": write_speculative,
  "continuous": write_continuous,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="tiny shapes, one round, into a temporary folder")
  parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
  parser.add_argument("--sides", default=",".join(SIDES), help="of section generate, comma-separated")
  parser.add_argument("--rounds", type=int, default=None, help="turns of each variant (default 3, quick 1)")
  parser.add_argument("--threads", type=int, default=2, help="threads of each process")
  parser.add_argument("--output", default="", help="folder (default benchmarks/results)")
  arguments = parser.parse_args()
  arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
  if unknown := set(arguments.only.split(",")) - set(SECTIONS):
    parser.error(f"--only: {', '.join(sorted(unknown))} unknown; choose from {', '.join(SECTIONS)}")
  output = pathlib.Path(arguments.output or (tempfile.gettempdir() if arguments.quick else HERE / "results"))
  output.mkdir(parents=True, exist_ok=True)
  file = output / "decode_cpu.json"
  sections = json.loads(file.read_text())["sections"] if file.exists() and not arguments.quick else {}
  with tempfile.TemporaryDirectory() as cache:
    for section in arguments.only.split(","):
      load = os.getloadavg()[0]
      run = run_generate if section == "generate" else None
      result = run(arguments, cache) if run else run_jax_section(section, arguments, cache)
      sections[section] = {"date": datetime.date.today().isoformat(), "load": load, "result": result}
      settings = {name: getattr(arguments, name) for name in ("rounds", "threads")}
      report = {"machine": hardware(), "settings": settings, "sections": sections}
      file.write_text(json.dumps(report, indent=2) + "\n")
      (output / "decode_cpu.md").write_text(table(report))
  print(table(report))


if __name__ == "__main__":
  main()
