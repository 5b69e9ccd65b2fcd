"""The words and tables of report.md."""

from typing import Any

from nr.evaluation.reports import table
from nr.objectives.attribution import AttributionSpec
from nr.recipes.cocomix.steering import page

NAMES = {"ntp": "next-token baseline", "cocomix": "CoCoMix"}
"""Of arms that have a name of their own in the text."""


def render(report: dict[str, Any]) -> str:
  """Returns the text of report.md; what did not run is left out."""
  has_concepts = any("concept_loss" in entry for entry in report["students"].values())
  sections = [
    f"# CoCoMix, variant `{report['variant']}`",
    verdict(report),
    "## Students",
    students(report),
    "![perplexity](plots/perplexity.png)\n\n![losses](plots/language_models.png)"
    + "\n\n![concept loss](plots/concept_loss.png)" * has_concepts,
    *texts(report),
    "## Corpus",
    corpus(report),
  ]
  if len(report["comparisons"]) > 1:
    sections[2:2] = [comparisons(report)]
  if "teacher" in report:
    sections += ["## Teacher and sparse autoencoder", upstream(report)]
  if "sae" in report:
    sections += [] if "checkpoint" in report["sae"] else ["![autoencoder](plots/sae.png)"]
    sections += ["![density](plots/sae_density.png)"]
  if "labels" in report:
    sections += ["## Labels", labels(report)]
  if "steering" in report:
    sections += ["## Concepts", page.concepts(report["steering"])]
    sections += ["## Steering", page.steering(report["steering"])]
  return "\n\n".join([*sections, "## Run", run(report)]) + "\n"


def name_of(arm: str) -> str:
  """Returns what the text calls an arm."""
  return NAMES.get(arm, arm.replace("_", " "))


def verdict(report: dict[str, Any]) -> str:
  """Says plainly who won, by how much, and what one small run is worth."""
  if not report["comparisons"]:
    return f"One arm only, {name_of(report['baseline'])}: nothing to compare it with."
  comparison, arm = report["comparison"], next(iter(report["comparisons"]))
  this, first = name_of(arm), name_of(report["baseline"])
  difference = comparison["difference"]
  low, high = difference["low"], difference["high"]
  winner = this if difference["estimate"] < 0 else f"the {first}"
  sure = "excludes" if low > 0 or high < 0 else "includes"
  tokens = [report["students"][name]["train_tokens"] for name in (arm, report["baseline"])]
  at_tokens = (
    "equal training tokens" if tokens[0] == tokens[1] else f"{tokens[0]:,} training tokens to {tokens[1]:,}"
  )
  lines = [
    f"On the validation split **{winner} has the lower loss**: {this} minus {first} is "
    f"{difference['estimate']:+.4f} nats a token (95 % interval over documents {low:+.4f} to {high:+.4f}, which "
    f"{sure} zero), at {at_tokens} and {comparison['flops_ratio']:.2f} times its counted FLOPs a token."
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


def comparisons(report: dict[str, Any]) -> str:
  """Returns the table of every arm against the baseline."""
  first = name_of(report["baseline"])
  rows = []
  for arm, found in report["comparisons"].items():
    difference, over_seeds = found["difference"], found["over_seeds"]
    is_repeated = len(found["seeds"]) > 1
    rows.append(
      [
        name_of(arm),
        f"{difference['estimate']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})",
        f"{over_seeds['estimate']:+.4f} ({over_seeds['low']:+.4f} to {over_seeds['high']:+.4f})"
        if is_repeated
        else "one seed",
        f"{found['flops_ratio']:.2f}",
      ]
    )
  header = [
    f"minus {first}, validation loss in nats a token",
    "first seed (95 % interval over documents)",
    "over seeds (95 % Student interval)",
    "training FLOPs/token, ratio",
  ]
  return table(header, rows)


def students(report: dict[str, Any]) -> str:
  """Returns the table of all students, of the first seed."""
  rows = []
  for arm, entry in report["students"].items():
    low, high = entry["ci95"]
    rows.append(
      [
        name_of(arm),
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
  notes = [
    f"{name_of(arm)}: concept loss on validation {entry['concept_loss']:.4f} nats, {entry['concept_excess']:.4f} above "
    f"the entropy of its labels' weights, below which it cannot fall; {entry['label_recall']:.1%} of its labels are "
    f"among the concepts it selects, {entry['label_recall_first']:.1%} among as many of the largest as labels."
    for arm, entry in report["students"].items()
    if "concept_loss" in entry
  ]
  notes.append(
    "FLOPs are those of matrix products, counted from the traced program; training is forward and backward, and "
    "what runs of the teacher in the train step. What a cache of labels costs, once, is in the table of labels."
  )
  return f"{table(header, rows)}\n\n{' '.join(notes)}"


def texts(report: dict[str, Any]) -> list[str]:
  """Returns the tables of documents scored by themselves and of last words; those that were asked for."""
  students = report["students"]
  sections = []
  if any("document_loss" in entry for entry in students.values()):
    rows = [
      [
        name_of(arm),
        entry["scored_documents"],
        _with_interval(entry["document_loss"], entry["document_ci95"], ".4f"),
        f"{entry['document_ppl']:.2f}",
        f"{entry['document_bits_per_byte']:.4f}",
      ]
      for arm, entry in students.items()
    ]
    stride = next(iter(students.values()))["document_stride"]
    header = ["student", "documents", "loss, nats (95 % interval)", "perplexity", "bits/byte"]
    sections.append(
      f"Documents by themselves, windows that score {stride:,} tokens each:\n\n{table(header, rows)}"
    )
  if any("last_word_accuracy" in entry for entry in students.values()):
    rows = [
      [
        name_of(arm),
        entry["last_word_passages"],
        _with_interval(entry["last_word_accuracy"], entry["last_word_ci95"], ".1%"),
        f"{entry['last_word_ppl']:.2f}",
      ]
      for arm, entry in students.items()
    ]
    header = ["student", "passages", "last words guessed (95 % interval)", "perplexity of a word"]
    sections.append(f"Last words of passages:\n\n{table(header, rows)}")
  return sections


def _with_interval(value: float, bounds: list[float], form: str) -> str:
  return f"{value:{form}} ({bounds[0]:{form}} to {bounds[1]:{form}})"


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
  teacher = report["teacher"]
  rows = [
    ["teacher: parameters", teacher["params"]],
    ["teacher: validation perplexity", teacher["val_ppl"]],
    ["teacher: bits/byte", teacher["bits_per_byte"]],
  ]
  if "sae" in report:
    sae = report["sae"]
    rows += [
      ["autoencoder: fraction of variance unexplained", sae["fvu"]],
      ["autoencoder: active latents a token (L0)", sae["l0"]],
      [
        "autoencoder: dead latents",
        "trained elsewhere" if "checkpoint" in sae else f"{sae['dead_fraction']:.1%}",
      ],
      ["autoencoder: loss added by its reconstruction, nats", sae["delta_ce"]],
      ["autoencoder: loss recovered against zero ablation", f"{sae['loss_recovered']:.1%}"],
    ]
  return table(["quantity", "value"], rows)


def labels(report: dict[str, Any]) -> str:
  """Returns the table of the kinds of labels."""
  rows = []
  for kind, said in report["label_kinds"].items():
    found = report["labels"]
    if said["variant"] != found["variant"]:
      found = found["variants"][said["variant"]]
    splits = found["splits"]
    spec = splits.get("train", splits["validation"])["header"]["attribution"]
    rows.append(
      [
        f"{kind}: {settings_of(spec)}",
        ", ".join(name_of(arm) for arm in said["arms"]) or "none",
        f"{found['mean_positive']:.2f} of the {candidates(spec)}",
        f"{found['fewer_than_labels']:.1%}",
        f"{found['coverage']:.1%}",
        f"{found['label_entropy']:.3f}",
        f"{found['flops_per_token'] / 1e6:.2f} M",
      ]
    )
  header = [
    "kind: what differs from the recommended settings",
    "read by",
    "candidates with a positive score, mean",
    "positions with fewer of them than labels",
    "latents ever a label",
    "entropy of labels, nats",
    "FLOPs to make a token's, once",
  ]
  return table(header, rows)


def settings_of(attribution: dict[str, Any]) -> str:
  """Returns in words how labels differ from the recommended ones."""
  usual = AttributionSpec().to_dict()
  changes = [f"{name}={value}" for name, value in attribution.items() if usual[name] != value]
  return ", ".join(f"`{change}`" for change in changes) or "nothing"


def candidates(attribution: dict[str, Any]) -> str:
  """Returns which latents have scores: after its activation function a latent that is not active has none."""
  is_all = attribution["act"] == "pre" and not attribution["restrict_active"]
  return "latents" if is_all else "active latents"


def run(report: dict[str, Any]) -> str:
  """Returns where and how long it ran."""
  place = report["environment"]
  seconds = table(["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in report["seconds"].items()])
  packages = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
  commit = f", commit `{place['commit'][:12]}`" if place["commit"] else ""
  return f"{place['devices']} x {place['device']}, Python {place['python']}, {packages}{commit}.\n\n{seconds}"
