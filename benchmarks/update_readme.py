"""Writes the README's tables from the committed result files, so that no figure is typed by hand.

  python benchmarks/update_readme.py          # rewrite README.md
  python benchmarks/update_readme.py --check  # exit 1 if it is out of date

A result of a recipe is the `report.json` of a run, copied to benchmarks/results/.
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

PAPERS = (
  (
    "CoCoMix: pretraining with continuous concepts ([2502.08524](https://arxiv.org/abs/2502.08524))",
    "cocomix",
  ),
  ("Adaptive Decoding via Latent Preference Optimization", None),
  ("Diverse Preference Optimization", None),
  ("Length-instruction fine-tuning", None),
  ("NaturalReasoning", None),
  ("Self-Taught Evaluators", None),
  ("System 2 distillation", None),
  (
    "From Decoding to Meta-Generation, survey of inference algorithms "
    "([2406.16838](https://arxiv.org/abs/2406.16838)): the token level",
    "decoding",
  ),
  ("Decoder-only speech translation", None),
  ("Noise-robust expressive speech-to-speech translation", None),
)


def paper_table() -> str:
  rows = ["| paper | command | measured | result file |", "| --- | --- | --- | --- |"]
  for paper, recipe in PAPERS:
    writer = {"cocomix": cocomix_row, "decoding": decoding_row}.get(recipe)
    rows.append(writer(paper) if writer else f"| {paper} | not built yet | | |")
  return "\n".join(rows)


def cocomix_row(paper: str) -> str:
  report = json.loads((RESULTS / "cocomix_seeds.json").read_text())
  difference = report["comparison"]["over_seeds"]
  low, high = difference["low"], difference["high"]
  seeds = len(report["comparison"]["seeds"])
  measured = (
    f"validation loss, CoCoMix minus matched next-token baseline, {seeds} seeds at equal tokens: "
    f"{difference['estimate']:+.4f} nats a token (95 % interval {low:+.4f} to {high:+.4f}), "
    f"at {report['comparison']['flops_ratio']:.2f} times the FLOPs a token"
  )
  command = "`python -m nr.main --config=configs/cocomix.py:seeds --workdir=runs/seeds`"
  return f"| {paper} | {command} | {measured} | [cocomix_seeds.json](benchmarks/results/cocomix_seeds.json) |"


def decoding_row(paper: str) -> str:
  sections = json.loads((RESULTS / "decode_cpu.json").read_text())["sections"]
  shape = sections["generate"]["result"]["124M"]
  ratios = shape["cases"]["batch 1"]["over_torch_eager_per_round"]
  measured = (
    f"tokens/s over `transformers` `generate` (eager) on the same 124M weights, batch 1, same tokens: "
    f"{shape['cases']['batch 1']['over_torch_eager']:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f}, "
    f"{len(ratios)} rounds taking turns)"
  )
  command = (
    "`python -m nr.generate --checkpoint=PATH --prompt='Once' -n 4 --chain='temperature(0.7)\\|top_p(0.9)'`"
  )
  return f"| {paper} | {command} | {measured} | [decode_cpu.json](benchmarks/results/decode_cpu.json) |"


def tiny_table() -> str:
  report = json.loads((RESULTS / "cocomix_tiny.json").read_text())
  rows = [
    "| student | parameters | activated | validation loss, nats (95 % interval) | perplexity | bits/byte |"
    " training tokens/s |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for name, kind in (("next-token baseline", "ntp"), ("CoCoMix", "cocomix")):
    entry = report["students"][kind]
    rows.append(
      f"| {name} | {entry['params']:,} | {entry['activated_params']:,} | {entry['val_loss']:.4f} "
      f"({entry['ci95'][0]:.4f} to {entry['ci95'][1]:.4f}) | {entry['val_ppl']:.2f} | {entry['bits_per_byte']:.4f} | "
      f"{entry['tokens_per_second']:,.0f} |"
    )
  sae, cocomix = report["sae"], report["students"]["cocomix"]
  minutes = sum(report["seconds"].values()) / 60
  rows.append("")
  rows.append(
    f"The autoencoder leaves {sae['fvu']:.1%} of the variance unexplained and recovers {sae['loss_recovered']:.1%} of "
    f"the teacher's loss; the student selects {cocomix['label_recall']:.1%} of the label concepts. The run took "
    f"{minutes:.1f} minutes on two CPU cores ([cocomix_tiny.json](benchmarks/results/cocomix_tiny.json)). "
    "One small run decides nothing about the method; the table above has the seeds."
  )
  return "\n".join(rows)


def speed_table() -> str:
  text = (RESULTS / "train_step_cpu.md").read_text().strip()
  return text.replace("# ", "### ", 1).replace("\n## ", "\n#### ")


def decode_table() -> str:
  text = (RESULTS / "decode_cpu.md").read_text().strip()
  return text.replace("# ", "### ", 1).replace("\n## ", "\n#### ")


SECTIONS = {"papers": paper_table, "tiny": tiny_table, "speed": speed_table, "decode": decode_table}


def updated(text: str) -> str:
  for name, make in SECTIONS.items():
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    text = f"{before}{begin}{make()}\n{end}{after}"
  return text


def main() -> int:
  readme = ROOT / "README.md"
  text = readme.read_text()
  if "--check" in sys.argv[1:]:
    return int(updated(text) != text)
  readme.write_text(updated(text))
  return 0


if __name__ == "__main__":
  sys.exit(main())
