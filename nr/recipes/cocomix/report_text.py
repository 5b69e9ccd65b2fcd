"""The words and tables of report.md."""

from typing import Any

from nr.evaluation.reports import number, table

NAMES = {"ntp": "next-token baseline", "cocomix": "CoCoMix"}


def render(report: dict[str, Any]) -> str:
  """Returns the text of report.md."""
  sections = [
    f"# CoCoMix, variant `{report['variant']}`",
    verdict(report),
    "## Students",
    students(report),
    "![perplexity](plots/perplexity.png)\n\n![losses](plots/language_models.png)\n\n"
    "![concept loss](plots/concept_loss.png)",
    "## Corpus",
    corpus(report),
    "## Teacher, sparse autoencoder, labels",
    upstream(report),
    "![autoencoder](plots/sae.png)\n\n![density](plots/sae_density.png)",
    "## Concepts",
    concepts(report["steering"]["concepts"]),
    "## Steering",
    steering(report["steering"]),
    "## Run",
    run(report),
  ]
  return "\n\n".join(sections) + "\n"


def verdict(report: dict[str, Any]) -> str:
  """Says plainly who won, by how much, and what one small run is worth."""
  comparison = report["comparison"]
  difference = comparison["difference"]
  low, high = difference["low"], difference["high"]
  winner = "CoCoMix" if difference["estimate"] < 0 else "the next-token baseline"
  sure = "excludes" if low > 0 or high < 0 else "includes"
  lines = [
    f"On the validation split **{winner} has the lower loss**: CoCoMix minus baseline is "
    f"{difference['estimate']:+.4f} nats a token (95 % interval over documents {low:+.4f} to {high:+.4f}, which "
    f"{sure} zero), at equal training tokens and {comparison['flops_ratio']:.2f} times the baseline's counted FLOPs "
    "a token."
  ]
  over_seeds = comparison["over_seeds"]
  if len(comparison["seeds"]) > 1:
    lines.append(
      f"Over {len(comparison['seeds'])} seeds the paired difference is {over_seeds['estimate']:+.4f} nats a token "
      f"(95 % Student interval {over_seeds['low']:+.4f} to {over_seeds['high']:+.4f})."
    )
  else:
    lines.append(
      "The interval covers the choice of documents, not of seed or data order: **one small run decides nothing** "
      "about the method. The variant `seeds` repeats it."
    )
  return "\n".join(lines)


def students(report: dict[str, Any]) -> str:
  """Returns the table of both students."""
  rows = []
  for kind, entry in report["students"].items():
    low, high = entry["ci95"]
    rows.append(
      [
        NAMES[kind],
        entry["params"],
        entry["activated_params"],
        entry["train_tokens"],
        f"{entry['val_loss']:.4f} ({low:.4f} to {high:.4f})",
        f"{entry['val_ppl']:.2f}",
        f"{entry['bits_per_byte']:.4f}",
        entry["tokens_per_second"],
        f"{entry['train_flops_per_token'] / 1e6:.2f} M",
        f"{entry['forward_flops_per_token'] / 1e6:.2f} M",
      ]
    )
  header = [
    "student",
    "parameters",
    "activated",
    "training tokens",
    "validation loss, nats (95 % interval)",
    "perplexity",
    "bits/byte",
    "training tokens/s",
    "training FLOPs/token",
    "forward FLOPs/token",
  ]
  cocomix = report["students"]["cocomix"]
  note = (
    f"Concept loss on validation {cocomix['concept_loss']:.4f} nats (four distinct labels allow no less than ln 4 = "
    f"1.3863); {cocomix['label_recall']:.1%} of the labels are among the concepts the student selects. FLOPs are "
    "those of matrix products, counted from the traced program; training is forward and backward, labels from the "
    "cache."
  )
  return f"{table(header, rows)}\n\n{note}"


def corpus(report: dict[str, Any]) -> str:
  """Returns the table of the splits."""
  sizes = report["corpus"]
  rows = [
    [split, sizes["documents"][split], sizes["tokens"][split], sizes["bytes"][split]]
    for split in sizes["documents"]
  ]
  text = (
    f"`{sizes['name']}`, split by a hash of each document; vocabulary {report['tokenizer']['vocab_size']:,}."
  )
  return f"{text}\n\n{table(['split', 'documents', 'tokens', 'bytes of text'], rows)}"


def upstream(report: dict[str, Any]) -> str:
  """Returns the numbers of everything before the students."""
  teacher, sae, labels = report["teacher"], report["sae"], report["labels"]
  rows = [
    ["teacher: parameters", teacher["params"]],
    ["teacher: validation perplexity", teacher["val_ppl"]],
    ["teacher: bits/byte", teacher["bits_per_byte"]],
    ["autoencoder: fraction of variance unexplained", sae["fvu"]],
    ["autoencoder: active latents a token (L0)", sae["l0"]],
    ["autoencoder: dead latents", f"{sae['dead_fraction']:.1%}"],
    ["autoencoder: loss added by its reconstruction, nats", sae["delta_ce"]],
    ["autoencoder: loss recovered against zero ablation", f"{sae['loss_recovered']:.1%}"],
    ["labels: active latents with a positive score, mean", labels["mean_positive"]],
    ["labels: latents ever used as a label", f"{labels['coverage']:.1%}"],
    ["labels: positions with fewer positive scores than labels", f"{labels['fewer_than_labels']:.1%}"],
  ]
  return table(["quantity", "value"], rows)


def concepts(rows: list[dict[str, Any]]) -> str:
  """Returns the table of the most used concepts with their strongest contexts."""
  cells = []
  for row in rows:
    texts = " <br> ".join(f"`{inline(context['text'])}`" for context in row["contexts"])
    cells.append([str(row["concept"]), row["label_count"], f"{row['firing_frequency']:.2%}", texts])
  return table(
    ["concept", "times a label", "fires on", "strongest validation contexts (token in « »)"], cells
  )


def steering(result: dict[str, Any]) -> str:
  """Returns the sweeps, what each concept promotes, and samples."""
  parts = [
    f"Mode `{result['mode']}`; KL of the next-token distribution from the unsteered one and perplexity of the "
    "continuation under the baseline, means over prompts with 95 % bootstrap intervals.",
    "![KL](plots/steering_kl.png)\n\n![perplexity](plots/steering_continuation_ppl.png)",
  ]
  for swept in result["sweeps"]:
    rows = [
      [
        "none" if point["strength"] is None else point["strength"],
        interval(point["kl"], point["kl_ci95"]),
        interval(point["continuation_ppl"], point["continuation_ppl_ci95"]),
      ]
      for point in swept["points"]
    ]
    tokens = ", ".join(f"`{inline(token)}`" for token in swept["promoted_tokens"])
    samples = "\n".join(
      f"- strength {'none' if sample['strength'] is None else number(sample['strength'])}: `{inline(sample['text'])}`"
      for sample in swept["samples"]
    )
    parts.append(f"### Concept {swept['concept']}\n\nPromotes most at the largest strength: {tokens}")
    parts.append(table(["strength", "KL, nats", "perplexity of the continuation"], rows))
    parts.append(f"Prompt `{inline(result['prompts'][0])}` continues as\n\n{samples}")
  return "\n\n".join(parts)


def run(report: dict[str, Any]) -> str:
  """Returns where and how long it ran."""
  place = report["environment"]
  seconds = table(["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in report["seconds"].items()])
  packages = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
  commit = f", commit `{place['commit'][:12]}`" if place["commit"] else ""
  return f"{place['devices']} x {place['device']}, Python {place['python']}, {packages}{commit}.\n\n{seconds}"


def interval(value: float, bounds: list[float]) -> str:
  """Formats a value with its interval."""
  return f"{number(value)} ({number(bounds[0])} to {number(bounds[1])})"


def inline(text: str) -> str:
  """Makes generated text safe inside a code span: one line, no back-ticks."""
  return " ".join(text.replace("`", "'").split())
