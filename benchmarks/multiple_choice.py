"""Multiple choice by lm-evaluation-harness: a GGUF checkpoint by our model, and by transformers as the oracle.

    NR_DATA=data python benchmarks/multiple_choice.py --checkpoint=model.gguf --limit=50

Asks the first `--limit` questions of every task of configs/harness (0: all), the same prompts of both models, and
writes accuracies, and how far apart the log-likelihoods of the answers are. It measures answers, not time. Needs
lm_eval (extra [harness]) and, unless `--alone`, torch and transformers.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import pathlib

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from machine import hardware

from nr.evaluation.harness import HarnessModel
from nr.interchange.gguf_tokenizer import GgufTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = ROOT / "configs" / "harness"


def evaluate(model, arguments: argparse.Namespace) -> dict:
  """Returns what lm_eval says of a model."""
  return simple_evaluate(
    model=model,
    tasks=["choice"],
    task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
    limit=arguments.limit or None,
    bootstrap_iters=0,
    log_samples=True,
  )


def oracle(checkpoint: pathlib.Path, batch_size: int):
  """Returns lm_eval's own model around transformers, which reads the file itself; the tokenizer is ours."""
  import tempfile

  import torch
  import transformers
  from lm_eval.models.huggingface import HFLM

  load = transformers.AutoModelForCausalLM.from_pretrained
  network = load(str(checkpoint.parent), gguf_file=checkpoint.name, dtype=torch.float32)
  with tempfile.TemporaryDirectory() as folder:
    ours = GgufTokenizer(checkpoint)
    ours.save(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(pathlib.Path(folder) / "tokenizer.json"),
      eos_token=ours.decode([ours.end_of_text_id], use_special_tokens=True),
    )
  return HFLM(pretrained=network, tokenizer=tokenizer, device="cpu", batch_size=batch_size, max_length=2048)


def scores_of(results: dict) -> dict:
  """Returns accuracies by task, and how many questions it has."""
  kept = {}
  for task, found in results["results"].items():
    fields = {name.removesuffix(",none"): value for name, value in found.items() if name.endswith(",none")}
    numbers = {name: value for name, value in fields.items() if isinstance(value, int | float)}
    kept[task] = (
      {**numbers, "questions": results["n-samples"][task]["effective"]}
      if task in results["samples"]
      else numbers
    )
  return kept


def compare(ours: dict, theirs: dict) -> dict:
  """Returns the distance of log-likelihoods, and the share of questions that are answered alike."""
  differences, alike = [], []
  for task, samples in ours["samples"].items():
    for one, other in zip(samples, theirs["samples"][task], strict=True):
      assert one["arguments"] == other["arguments"]
      first, second = ([float(answer[0][0]) for answer in each["resps"]] for each in (one, other))
      differences += np.abs(np.subtract(first, second)).tolist()
      alike.append(int(np.argmax(first)) == int(np.argmax(second)))
  return {
    "answers": len(differences),
    "largest_difference_nats": max(differences),
    "mean_difference_nats": float(np.mean(differences)),
    "questions": len(alike),
    "answered_alike": float(np.mean(alike)),
  }


def percent(found: dict, name: str) -> str:
  """Returns a share of questions in percent, ± its standard error (of a mean of zeros and ones)."""
  if name not in found:  # Winogrande scores the same words after either choice
    return "-"
  share, count = found[name], found["questions"]
  return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / (count - 1)):.1f}"


def table(report: dict) -> str:
  """The report as Markdown."""
  sides = [side for side in ("nr", "transformers") if side in report]
  lines = [
    f"# Multiple choice: {report['checkpoint']}",
    "",
    f"{report['date']}; lm_eval {report['lm_eval']}, task files of `configs/harness`, no examples in the prompts. "
    "Accuracy in percent of the most likely choice, and of the most likely a character, ± a standard error.",
    "",
    "| task | questions | " + " | ".join(f"{side}: acc | {side}: acc_norm" for side in sides) + " |",
    "| " + " | ".join(["---"] * (2 + 2 * len(sides))) + " |",
  ]
  for task, found in report["nr"].items():
    if "questions" not in found:
      continue
    cells = [percent(report[side][task], name) for side in sides for name in ("acc", "acc_norm")]
    lines.append(f"| {task} | {found['questions']} | " + " | ".join(cells) + " |")
  if "difference" in report:
    found = report["difference"]
    lines += [
      "",
      f"Log-likelihoods of {found['answers']:,} answers differ by {found['largest_difference_nats']:.2g} nats at most, "
      f"{found['mean_difference_nats']:.2g} on average; of {found['questions']} questions "
      f"{100 * found['answered_alike']:.1f} % are answered alike.",
    ]
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a .gguf file")
  parser.add_argument("--limit", type=int, default=50, help="questions of each task; 0: all")
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--alone", action="store_true", help="without transformers")
  parser.add_argument(
    "--output", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "multiple_choice.json"
  )
  arguments = parser.parse_args()
  ours = evaluate(HarnessModel(str(arguments.checkpoint), batch_size=arguments.batch_size), arguments)
  report = {
    "checkpoint": arguments.checkpoint.name,
    "date": datetime.date.today().isoformat(),
    "limit": arguments.limit,
    "machine": hardware(),
    "lm_eval": importlib.metadata.version("lm_eval"),
    "nr": scores_of(ours),
  }
  if not arguments.alone:
    theirs = evaluate(oracle(arguments.checkpoint, arguments.batch_size), arguments)
    report["transformers"] = scores_of(theirs)
    report["difference"] = compare(ours, theirs)
  arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
  arguments.output.with_suffix(".md").write_text(table(report), encoding="utf-8")
  print(table(report))


if __name__ == "__main__":
  main()
