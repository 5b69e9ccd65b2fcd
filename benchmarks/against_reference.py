"""Our CoCoMix train step against the reference's, and what each saving is worth.

    python benchmarks/against_reference.py                             # without the reference's files
    python benchmarks/against_reference.py --reference=RAM/projects/cocomix [--reference_python=PYTHON]
    python benchmarks/against_reference.py --size=paper_69m --device=gpu --dtype=bfloat16
    python benchmarks/against_reference.py --quick                     # tiny shapes; shows that it runs

Every measurement is a fresh process (peak memory is its own), and the processes take turns,
round after round, so that a change in the load of the machine touches all. Reported are
medians over rounds of the median step of a process, and ratios of the same round.

Sides
  reference     the model, concept extractor and train function of a checkout of facebookresearch/RAM,
                projects/cocomix, which never becomes part of this repository; teacher and
                autoencoder are given to it from here instead of the network (see the worker)
  dense_torch   our own writing of that step in PyTorch: four cross-entropies on whole logits, dense
                compression, labels made in the step by a backward pass to all of the teacher
  dense_jax     the same in JAX
  ours          our step, labels from a cache
  next_token    our next-token step, same width
and ours with one saving switched off (specification 11.2):
  ours_online            labels made in the step; the teacher's backward pass ends at the tap
  online_whole_teacher   as ours_online, the backward pass going to all of the teacher
  dense_head             all concept logits at once, in the forward and the backward pass
  dense_compression      a product with all rows of the compression instead of a gather
  full_sort              lax.top_k over the concepts instead of the exact chunked one
  all_rows_in_last_block queries and MLP of the last block for rows that nobody reads

All start from the same weights and tokens; losses are compared step by step. Labels tie at
the last position of a window (no loss depends on it) and are arbitrary there, in the reference
too: concept losses then differ by about a part in the window's length of their spread.
Besides the time on the clock there is that of the processor, which does not count what other programs
did meanwhile: with --threads=1 it is what the clock would show on a quiet machine, and the one to
read where the load average is above the cores.

A step is forward, backward, clipping and AdamW; dropout is 0. On CPU PyTorch runs in float32 with
fused kernels for attention; --torch_compile=1 compiles the reference's modules as its config asks.
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

from machine import hardware

HERE = pathlib.Path(__file__).resolve().parent


def _sizes(student, teacher, **others) -> dict:
  names = ("num_layers", "model_dim", "num_heads")
  return {"student": dict(zip(names, student)), "teacher": dict(zip(names, teacher)), **others}


SIZES = {
  # The paper's proportions: 3.4 times as many products a token in the teacher's blocks as in the student's.
  "small": _sizes(
    (4, 256, 4), (6, 384, 6), insert_at=2, tap_layer=2,
    num_concepts=8192, top_k=32, vocab_size=8192, length=256, rows=8,
  ),
  "paper_69m": _sizes(
    (8, 512, 8), (12, 768, 12), insert_at=3, tap_layer=5,
    num_concepts=32_768, top_k=32, vocab_size=50_257, length=1024, rows=16,
  ),
  "paper_386m": _sizes(
    (24, 1024, 16), (12, 768, 12), insert_at=5, tap_layer=5,
    num_concepts=32_768, top_k=32, vocab_size=50_257, length=1024, rows=8,
  ),
}  # fmt: skip
QUICK = _sizes(
  (3, 32, 2), (3, 48, 2), insert_at=1, tap_layer=1,
  num_concepts=256, top_k=8, vocab_size=97, length=32, rows=2,
)  # fmt: skip

ABLATIONS = {  # saving: (side without it, side with it)
  "label cache": ("ours_online", "ours"),
  "teacher's backward pass ends at the tap": ("online_whole_teacher", "ours_online"),
  "fused concept head": ("dense_head", "ours"),
  "gathered compression": ("dense_compression", "ours"),
  "top-k without a full sort": ("full_sort", "ours"),
  "last block at the rows that are read": ("all_rows_in_last_block", "ours"),
}
WHOLE = ("reference", "dense_torch", "dense_jax")
SIDES = (*WHOLE, "ours", *(side for side, _ in ABLATIONS.values()), "next_token")


def measure_once(side: str, folder: str, cache: str, arguments: argparse.Namespace, sizes: dict) -> dict:
  """Starts one measurement and waits for it."""
  environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
  environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
  for name in ("XLA_FLAGS", "GLIBC_TUNABLES"):
    environment.pop(name, None)
  # Compiled programs are kept for the rounds of this invocation, and no longer.
  environment["JAX_COMPILATION_CACHE_DIR"] = cache
  if arguments.device == "cpu":
    environment["JAX_PLATFORMS"] = "cpu"
  else:
    environment.pop("JAX_PLATFORMS", None)
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  is_torch = side in ("reference", "dense_torch")
  if arguments.device == "cpu" and not is_torch:
    environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # makes PyTorch slower
  python = arguments.reference_python if side == "reference" else sys.executable
  command = [python, str(HERE / "against_reference_worker.py"), f"--side={side}", f"--folder={folder}"]
  command.append(f"--sizes={json.dumps(sizes)}")
  passed = ("device", "dtype", "steps", "warmup", "threads", "loss_chunk")
  for name in (*passed, "reference", "reference_attention", "torch_compile"):
    command.append(f"--{name}={getattr(arguments, name)}")
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if done.returncode != 0:
    raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def summarise(rounds: list[dict], tokens: int) -> dict:
  """Medians over rounds of one side."""
  clocks = ("seconds", "processor_seconds")
  medians = {clock: [statistics.median(result[clock]) for result in rounds] for clock in clocks}
  seconds = statistics.median(medians["seconds"])
  kept = ("compile_seconds", "forward_flops", "step_flops", "temporary", "arguments", "losses", "versions")
  return {
    "step_seconds": seconds,
    "step_seconds_per_round": medians["seconds"],
    "tokens_per_second": tokens / seconds,
    "processor_seconds": statistics.median(medians["processor_seconds"]),
    "processor_seconds_per_round": medians["processor_seconds"],
    # The first round compiles, which takes memory of its own; later ones read the program back.
    "peak_memory": min(result["peak_memory"] for result in rounds),
    **{name: rounds[0][name] for name in kept if name in rounds[0]},
  }


def ratio(above: dict, below: dict) -> dict:
  """Time and memory of a side over another's; times by rounds, as both were measured in each."""
  found = {}
  for name, field in (("time", "step_seconds"), ("processor_time", "processor_seconds")):
    pairs = zip(above[f"{field}_per_round"], below[f"{field}_per_round"])
    found[f"{name}_per_round"] = [a / b for a, b in pairs]
    found[name] = statistics.median(found[f"{name}_per_round"])
  found["peak_memory"] = above["peak_memory"] / below["peak_memory"]
  if "temporary" in above and "temporary" in below:
    found["temporary"] = above["temporary"] / below["temporary"]
  return found


def compare(sides: dict) -> dict:
  """What the benchmark is for; comparisons whose sides were not measured are left out."""
  compared: dict = {"over_ours": {}, "ablations": {}}
  ours = sides.get("ours")
  for name in WHOLE:
    if name in sides:
      for mine in ("ours", "ours_online"):
        if mine in sides:
          compared["over_ours"][f"{name} over {mine}"] = ratio(sides[name], sides[mine])
  for saving, (without, with_it) in ABLATIONS.items():
    if without in sides and with_it in sides:
      compared["ablations"][saving] = ratio(sides[without], sides[with_it])
  if ours and "next_token" in sides:
    over = ratio(ours, sides["next_token"])
    flops = {
      name: ours[f"{name}_flops"] / sides["next_token"][f"{name}_flops"] for name in ("forward", "step")
    }
    compared["over_next_token"] = {
      **over,
      "forward_flops": flops["forward"],
      "step_flops": flops["step"],
      **{
        f"{clock}_over_{name}_flops": over[clock] / flops[name]
        for clock in ("time", "processor_time")
        for name in flops
      },
    }
  if ours:
    compared["losses"] = {}
    for name, side in sides.items():
      if name in ("ours", "next_token"):
        continue
      steps = list(zip(side["losses"], ours["losses"]))
      compared["losses"][name] = {
        "next_token": max(abs(theirs[0] - mine[0]) for theirs, mine in steps),
        "concept": max(abs(theirs[1] - mine[1]) for theirs, mine in steps),
      }
  return compared


def spread(values: list[float]) -> str:
  """The smallest and the largest."""
  return f"{min(values):.2f} to {max(values):.2f}"


def table(report: dict) -> str:
  """The report as Markdown."""
  machine, settings, sizes = report["machine"], report["settings"], report["sizes"]
  found = {}
  for side in report["sides"].values():
    found |= side["versions"]
  loads = ", ".join(f"{load:.2f}" for load in report["load_average"])
  student, teacher = sizes["student"], sizes["teacher"]
  lines = [
    "# CoCoMix train step against the reference's",
    "",
    f"{report['date']}; {machine['cpu']}, {settings['threads']} of {machine['cores']} cores, "
    f"{machine['memory'] / 2**30:.0f} GiB, device {settings['device']}, {settings['dtype']}. "
    + ", ".join(f"{name} {version}" for name, version in {**machine["versions"], **found}.items())
    + ".",
    f"Student {student['num_layers']} layers x {student['model_dim']}, insertion at {sizes['insert_at']}, "
    f"{sizes['num_concepts']} concepts, {sizes['top_k']} mixed; teacher {teacher['num_layers']} x "
    f"{teacher['model_dim']}; vocabulary {sizes['vocab_size']}, batch {sizes['rows']} x {sizes['length']}; "
    f"{report['parameters']:,} parameters.",
    f"{settings['rounds']} rounds of {settings['steps']} steps a process, sides taking turns; medians. "
    f"Load average (1 minute) at the start of each round: {loads}.",
    f"Written by `{report['command']}`."
    + ("" if "reference" in report["sides"] else " No checkout of the reference was there."),
    *([f"Note: {report['note']}"] if report["note"] else []),
    "",
    "| side | s/step | tokens/s | processor s/step | peak memory, GiB | temporary (compiler), GiB | GFLOP/step |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for name, side in report["sides"].items():
    temporary, flops = side.get("temporary"), side.get("step_flops")
    lines.append(
      f"| {name} | {side['step_seconds']:.3f} | {side['tokens_per_second']:.0f} | {side['processor_seconds']:.3f} "
      f"| {side['peak_memory'] / 2**30:.2f} | {'' if temporary is None else f'{temporary / 2**30:.3f}'} "
      f"| {'' if flops is None else f'{flops / 1e9:.1f}'} |"
    )
  compared = report["compared"]
  for title, key in (("The whole", "over_ours"), ("Without one saving, over with it", "ablations")):
    lines += [
      "",
      f"## {title}",
      "",
      "| | time | rounds | processor time | rounds | peak memory | temporary |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, entry in compared[key].items():
      temporary = f"{entry['temporary']:.2f}" if "temporary" in entry else ""
      lines.append(
        f"| {name} | {entry['time']:.2f} | {spread(entry['time_per_round'])} | {entry['processor_time']:.2f} "
        f"| {spread(entry['processor_time_per_round'])} | {entry['peak_memory']:.2f} | {temporary} |"
      )
  if "over_next_token" in compared:
    over = compared["over_next_token"]
    lines += [
      "",
      "## Ours over our next-token step",
      "",
      f"Time {over['time']:.3f} (rounds {spread(over['time_per_round'])}), processor time "
      f"{over['processor_time']:.3f} ({spread(over['processor_time_per_round'])}); counted FLOPs forward "
      f"{over['forward_flops']:.3f}, of the step with what is computed again {over['step_flops']:.3f}. Processor time "
      f"over FLOPs: {over['processor_time_over_forward_flops']:.3f} forward, "
      f"{over['processor_time_over_step_flops']:.3f} of the step.",
    ]
  lines += ["", "## Largest difference of losses from ours, over all steps", ""]
  lines += ["| side | next token | concepts |", "| --- | --- | --- |"]
  for name, entry in compared.get("losses", {}).items():
    lines.append(f"| {name} | {entry['next_token']:.1e} | {entry['concept']:.1e} |")
  return "\n".join(lines) + "\n"


def benchmark(arguments: argparse.Namespace) -> None:
  """Lets the sides take turns and writes the results."""
  sizes = QUICK if arguments.quick else SIZES[arguments.size]
  if arguments.rows:
    sizes = {**sizes, "rows": arguments.rows}
  sides = [side for side in arguments.sides.split(",") if side != "reference" or arguments.reference]
  loads: list[float] = []
  rounds: dict[str, list[dict]] = {}
  with contextlib.ExitStack() as stack:
    scratch = arguments.scratch or stack.enter_context(tempfile.TemporaryDirectory())
    folder, cache = os.path.join(scratch, "files"), os.path.join(scratch, "cache")
    os.makedirs(folder, exist_ok=True)

    def measured(name: str, side: str) -> dict:
      """What an earlier invocation measured, or a new measurement."""
      path = pathlib.Path(scratch) / f"{name}.json"
      if not path.exists():
        result = {"load": os.getloadavg()[0], **measure_once(side, folder, cache, arguments, sizes)}
        path.write_text(json.dumps(result))
      return json.loads(path.read_text())

    written = measured("export", "export")
    for turn in range(arguments.rounds):
      for side in sides:
        result = measured(f"round_{turn + 1}_{side}", side)
        rounds.setdefault(side, []).append(result)
        seconds = statistics.median(result["seconds"])
        print(f"round {turn + 1} {side}: {seconds:.3f} s/step, losses {result['losses'][-1]}", flush=True)
      loads.append(rounds[sides[0]][-1]["load"])
      write(arguments, sizes, written, rounds, loads)  # what is done is kept if the next round is stopped


def write(arguments: argparse.Namespace, sizes: dict, written: dict, rounds: dict, loads: list) -> None:
  """Writes the results of the rounds so far."""
  summaries = {side: summarise(results, written["tokens"]) for side, results in rounds.items()}
  names = ("steps", "warmup", "threads", "loss_chunk", "device", "dtype", "torch_compile")
  report = {
    "date": datetime.date.today().isoformat(),
    # Without places of this machine.
    "command": " ".join(
      ["python benchmarks/against_reference.py"]
      + [a for a in sys.argv[1:] if not a.startswith(("--reference", "--output", "--scratch", "--note"))]
    ),
    "note": arguments.note,
    "machine": hardware(),
    "load_average": loads,
    "settings": {"rounds": len(loads), **{name: getattr(arguments, name) for name in names}},
    "sizes": sizes,
    "parameters": written["parameters"],
    "sides": summaries,
    "compared": compare(summaries),
  }
  output = pathlib.Path(arguments.output or (tempfile.gettempdir() if arguments.quick else HERE / "results"))
  output.mkdir(parents=True, exist_ok=True)
  name = f"against_reference_{arguments.device}"
  if arguments.size != "small":
    name += f"_{arguments.size}"
  (output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
  (output / f"{name}.md").write_text(table(report))
  print(table(report))
  print(f"written: {output / name}.json and .md", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--reference", default="", help="folder projects/cocomix of a checkout")
  parser.add_argument("--reference_python", default=sys.executable, help="interpreter with what it needs")
  parser.add_argument("--reference_attention", default="sdpa", help="flash_attention_2 is its own, on GPUs")
  parser.add_argument("--torch_compile", type=int, default=0, help="1: compile the reference's modules")
  parser.add_argument("--size", default="small", choices=tuple(SIZES))
  parser.add_argument("--rows", type=int, default=0, help="windows a batch (default the size's)")
  parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
  parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--rounds", type=int, default=None, help="turns a side takes (default 3, quick 1)")
  parser.add_argument("--steps", type=int, default=3, help="timed steps a process")
  parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts")
  parser.add_argument("--threads", type=int, default=2, help="cores a process may use")
  parser.add_argument("--loss_chunk", type=int, default=512, help="tokens whose logits we hold; 0: all")
  parser.add_argument("--sides", default=",".join(SIDES), help="comma-separated")
  parser.add_argument(
    "--scratch", default="", help="folder that keeps measurements; a stopped run goes on there"
  )
  parser.add_argument(
    "--note", default="", help="a sentence for the report, such as what else the machine did"
  )
  parser.add_argument("--output", default="", help="folder (default benchmarks/results, quick: temporary)")
  arguments = parser.parse_args()
  if unknown := set(arguments.sides.split(",")) - set(SIDES):
    parser.error(f"--sides: {', '.join(sorted(unknown))} unknown; choose from {', '.join(SIDES)}")
  arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
  benchmark(arguments)


if __name__ == "__main__":
  main()
