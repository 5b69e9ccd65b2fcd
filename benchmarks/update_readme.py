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
  (
    "Adaptive Decoding via Latent Preference Optimization ([2411.09661](https://arxiv.org/abs/2411.09661))",
    "adaptive_decoding",
  ),
  ("Diverse Preference Optimization ([2501.18101](https://arxiv.org/abs/2501.18101))", "divpo"),
  (
    "Following Length Constraints in Instructions ([2406.17744](https://arxiv.org/abs/2406.17744))",
    "length_instruct",
  ),
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
    rows.append(ROWS[recipe](paper) if recipe else f"| {paper} | not built yet | | |")
  return "\n".join(rows)


def cocomix_row(paper: str) -> str:
  study = json.loads((RESULTS / "sample_efficiency.json").read_text())
  found, seeds = study["compared"]["cocomix"], len(study["seeds"])

  def nats(kind: str) -> str:
    difference = found[kind]
    low, high = difference["low"], difference["high"]
    return f"{difference['estimate']:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"

  measured = (
    f"validation loss, CoCoMix minus next-token baseline of as many activated parameters, {seeds} seeds, nats a token: "
    f"at equal tokens {nats('equal_tokens')}; at equal FLOPs {nats('equal_flops')}"
  )
  command = "`python benchmarks/sample_efficiency.py --workdir=runs/sample_efficiency`"
  file = "[sample_efficiency.json](benchmarks/results/sample_efficiency.json)"
  return f"| {paper} | {command} | {measured} | {file} |"


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


def recipe_row(paper: str, recipe: str, measured: str) -> str:
  """Returns the row of a recipe whose variant `seeds` was run."""
  command = f"`python -m nr.main --config=configs/{recipe}.py:seeds --workdir=runs/{recipe}`"
  file = f"{recipe}_seeds.json"
  return f"| {paper} | {command} | {measured} | [{file}](benchmarks/results/{file}) |"


def spread(interval: dict, digits: int = 2, scale: float = 1.0) -> str:
  """Returns a number with its interval."""
  estimate, low, high = (scale * interval[name] for name in ("estimate", "low", "high"))
  return f"{estimate:.{digits}f} (95 % interval {low:.{digits}f} to {high:.{digits}f})"


def adaptive_decoding_row(paper: str) -> str:
  report = json.loads((RESULTS / "adaptive_decoding_seeds.json").read_text())
  rates = report["evaluation"]["mini"]["winrates"]["separate"]
  best = min((name for name in rates if name.startswith("fixed")), key=lambda name: rates[name]["estimate"])
  hidden = report["evaluation"]["hidden"]["winrates"]["separate"]
  worst = min(
    (name for name in hidden if name.startswith("fixed")), key=lambda name: hidden[name]["estimate"]
  )
  measured = (
    f"two toy tasks, {len(report['seeds'])} seeds: winrate of the learned temperature (Eq. 10) over the best fixed one "
    f"({best.removeprefix('fixed ')}), percent: {spread(rates[best], 1, 100)}; where the prompt does not tell, over "
    f"the best fixed one ({worst.removeprefix('fixed ')}): {spread(hidden[worst], 1, 100)}"
  )
  return recipe_row(paper, "adaptive_decoding", measured)


def divpo_row(paper: str) -> str:
  report = json.loads((RESULTS / "divpo_seeds.json").read_text())
  over, table = report["entropy_over_base"], report["table"]
  measured = (
    f"toy personas, {len(report['seeds'])} seeds: attribute entropy minus that of the base, nats: online DPO "
    f"{spread(over['dpo_online'])}, online DivPO {spread(over['divpo_online'])}; valid texts of DivPO: "
    f"{spread(table['divpo_online']['validity'], 3)}. SmolLM2-135M-Instruct with an adapter, first names for people "
    f"that were held out ([divpo_smollm.json](benchmarks/results/divpo_smollm.json)): share of different valid "
    f"answers {smollm_answers('distinct_valid')}"
  )
  return recipe_row(paper, "divpo", measured)


def smollm_answers(measure: str) -> str:
  """Returns a measure of the run on a real model, before and after, with intervals over prompts."""
  report = json.loads((RESULTS / "divpo_smollm.json").read_text())
  arms = report["over_prompts"]["measures"][measure]["arms"]
  titles = {"base": "before", "dpo_online": "online DPO", "divpo_online": "online DivPO"}
  return ", ".join(f"{title} {spread(arms[arm])}" for arm, title in titles.items())


def length_instruct_row(paper: str) -> str:
  report = json.loads((RESULTS / "length_instruct_seeds.json").read_text())
  table = report["table"]
  measured = (
    f"toy world, {len(report['seeds'])} seeds: share of answers over their limit: before "
    f"{spread(table['sft']['violation'])}, DPO {spread(table['dpo']['violation'])}, LIFT "
    f"{spread(table['lift']['violation'])}, LIFT without NLL {spread(table['lift_no_nll']['violation'])}"
  )
  return recipe_row(paper, "length_instruct", measured)


ROWS = {
  "cocomix": cocomix_row,
  "decoding": decoding_row,
  "adaptive_decoding": adaptive_decoding_row,
  "divpo": divpo_row,
  "length_instruct": length_instruct_row,
}


def preference_tables() -> str:
  """Returns a table for each recipe that learns from preferences, from its result file."""
  parts = [adaptive_decoding_table(), divpo_table(), divpo_smollm_table(), length_instruct_table()]
  return "\n\n".join(parts)


def short(interval: dict | None, digits: int = 2) -> str:
  """Returns a number with its interval for a cell."""
  if interval is None:
    return "-"
  if interval["low"] is None:  # one seed
    return f"{interval['estimate']:.{digits}f}"
  return f"{interval['estimate']:.{digits}f} ({interval['low']:.{digits}f} to {interval['high']:.{digits}f})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def adaptive_decoding_table() -> str:
  report = json.loads((RESULTS / "adaptive_decoding_seeds.json").read_text())
  parts = ["#### Adaptive decoding: winrates of the heads, percent"]
  titles = {
    "mini": "Two tasks that the prompt tells apart",
    "hidden": "Counter-experiment: what decides is not in the prompt",
    "sentences": "A temperature for every token",
  }
  for name, title in titles.items():
    rates = report["evaluation"][name]["winrates"]
    arms = [arm for arm in rates if not arm.endswith("_sample")]
    rows = [
      [
        other,
        *(short({key: 100 * value for key, value in rates[arm][other].items()}, 1) for arm in arms),
      ]
      for other in rates[arms[0]]
    ]
    parts += [f"{title}:", markdown(["against", *arms], rows)]
  return "\n\n".join(parts)


def divpo_table() -> str:
  report = json.loads((RESULTS / "divpo_seeds.json").read_text())
  fields = {
    "validity": "valid",
    "attribute_entropy": "attribute entropy, nats",
    "top_share": "most frequent value",
    "values": "values seen, of 40",
  }
  rows = [
    [arm, *(short(report["table"][arm][field], 3 if field == "validity" else 2) for field in fields)]
    for arm in report["arms"]
  ]
  return "#### DivPO: what the models write\n\n" + markdown(["model", *fields.values()], rows)


def divpo_smollm_table() -> str:
  report = json.loads((RESULTS / "divpo_smollm.json").read_text())
  found = report["over_prompts"]
  fields = {"validity": "valid", "distinct_valid": "different valid answers over answers"}
  rows = [
    [arm, *(short(found["measures"][field]["arms"][arm]) for field in fields)] for arm in report["arms"]
  ]
  entropy = [short(report["table"][arm]["attribute_entropy"]) for arm in report["arms"]]
  rows = [[*row, value] for row, value in zip(rows, entropy)]
  return (
    f"#### DivPO on a real model: SmolLM2-135M-Instruct, {report['steps']} steps of an adapter, one seed, "
    f"{found['prompts']} held-out prompts\n\n"
    + markdown(["model", *fields.values(), "entropy of names, nats"], rows)
  )


def length_instruct_table() -> str:
  report = json.loads((RESULTS / "length_instruct_seeds.json").read_text())
  fields = {
    "violation": "violations",
    "words": "words",
    "quality": "quality",
    "free_words": "words without limit",
    "free_quality": "quality without limit",
  }
  rows = [[arm, *(short(report["table"][arm][field]) for field in fields)] for arm in report["arms"]]
  return "#### Length instructions: with limits and without\n\n" + markdown(["arm", *fields.values()], rows)


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


def embedded(file: str) -> str:
  """Returns a Markdown result file with its headings two levels lower."""
  text = (RESULTS / file).read_text().strip()
  return text.replace("# ", "### ", 1).replace("\n## ", "\n#### ")


def speed_table() -> str:
  return embedded("train_step_cpu.md")


def sample_efficiency_table() -> str:
  return embedded("sample_efficiency.md")


def cocomix_speed_table() -> str:
  return embedded("against_reference_cpu.md")


def preference_speed_table() -> str:
  return embedded("preference_step_cpu.md")


def decode_table() -> str:
  return embedded("decode_cpu.md")


SECTIONS = {
  "papers": paper_table,
  "tiny": tiny_table,
  "sample_efficiency": sample_efficiency_table,
  "preferences": preference_tables,
  "speed": speed_table,
  "cocomix_speed": cocomix_speed_table,
  "preference_speed": preference_speed_table,
  "decode": decode_table,
}


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
