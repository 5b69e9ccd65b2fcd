"""What CoCoMix gains a token and a FLOP: baselines and signs of the labels, five seeds each.

    python benchmarks/sample_efficiency.py --workdir=runs/sample_efficiency     # about an hour on 2 quiet cores

Runs the config variant `sample_efficiency` (a stopped run goes on where it was), reads what it left, and writes
benchmarks/results/sample_efficiency.{json,md}, and curves as a plot into the run directory.

Compared with the next-token baseline `ntp`, whose parameters match what CoCoMix activates, seed by seed:

  equal tokens  final losses of runs of the same length, on the same batches in the same order.
  equal FLOPs   the baseline's loss at the FLOPs that the arm's training spent, from baselines of three lengths,
                each with a learning rate that decays to its own end; between them straight in log FLOPs.
  tokens to equal loss
                tokens at which an arm's curve, measured while training on a sample of the validation split, reaches
                the loss that the baseline ends with there, and the other way round.

FLOPs are counted from the program, forward and backward of a student; teacher of a distilled arm included. Not
included is what is made once for all arms: teacher, autoencoder, and labels. Intervals are Student's t over seeds,
95 %. Seeds change the students' initial parameters and the order of the batches; text, teacher, autoencoder and
labels are the same for all.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
from machine import hardware

from nr.evaluation import plots
from nr.evaluation.learning_curves import loss_at_flops, tokens_to_loss
from nr.evaluation.statistics import mean_interval, paired_difference
from nr.recipes.cocomix.students import run_name
from nr.recipes.stages import read_manifest
from nr.training.writers import read_metrics

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = HERE.parent / "configs" / "cocomix.py"
BASELINE = "ntp"


def interval(values: list[float]) -> dict[str, float]:
  """Returns mean and 95 % t interval over seeds."""
  return mean_interval(np.asarray(values))._asdict()


def read_runs(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what each arm spent and reached, lists over seeds."""
  manifest = read_manifest(workdir)
  students, scored = (manifest[name]["artifact"] for name in ("students", "evaluate"))
  arms = {}
  for arm in students["arms"]:
    names = [run_name(arm, seed) for seed in students["seeds"]]
    trained = [students["runs"][name] for name in names]
    first = trained[0]
    curves = [curve(workdir / run["directory"], run["train_tokens"]) for run in trained]
    arms[arm] = {
      "params": first["params"],
      "activated_params": first["activated_params"],
      "train_tokens": first["train_tokens"],
      "train_flops_per_token": first["train_flops_per_token"],
      "train_flops": first["train_flops_per_token"] * first["train_tokens"],
      "val_loss": [scored["runs"][name]["val_loss"] for name in names],
      "curve_tokens": curves[0][0],
      "curve_loss": [losses for _, losses in curves],
    }
    for field in ("concept_loss", "label_recall", "label_recall_first"):
      if field in scored["runs"][names[0]]:
        arms[arm][field] = [scored["runs"][name][field] for name in names]
  return {"seeds": students["seeds"], "arms": arms}


def curve(directory: pathlib.Path, train_tokens: int) -> tuple[list[float], list[float]]:
  """Returns tokens seen and loss of the validation sample there."""
  rows = [row for row in read_metrics(directory) if "validation/loss" in row]
  tokens_a_step = train_tokens / rows[-1]["step"]
  return [row["step"] * tokens_a_step for row in rows], [row["validation/loss"] for row in rows]


def compare(arms: dict[str, Any]) -> dict[str, Any]:
  """Returns each arm against the baseline, in the three ways of the module's docstring."""
  baseline = arms[BASELINE]
  lengths = sorted(
    (arm for arm in arms if arm.startswith(BASELINE) and arms[arm]["params"] == baseline["params"]),
    key=lambda arm: arms[arm]["train_flops"],
  )
  found = {}
  for arm, entry in arms.items():
    if arm in lengths:
      continue
    found[arm] = {
      "flops_ratio": entry["train_flops"] / baseline["train_flops"],
      "equal_tokens": paired_difference(entry["val_loss"], baseline["val_loss"])._asdict(),
      "equal_flops": at_equal_flops(entry, [arms[length] for length in lengths]),
      "tokens_to_equal_loss": share_of_tokens(entry, baseline),
      "baseline_tokens_to_equal_loss": share_of_tokens(baseline, entry),
    }
  return found


def at_equal_flops(entry: dict[str, Any], lengths: list[dict[str, Any]]) -> dict[str, float] | None:
  """Returns an arm's loss minus the baseline's at equal FLOPs; None where no baseline was as short."""
  flops = [length["train_flops"] for length in lengths]
  if entry["train_flops"] < 0.995 * flops[0]:
    return None
  by_seed = zip(*(length["val_loss"] for length in lengths))
  matched = [loss_at_flops(flops, losses, entry["train_flops"]) for losses in by_seed]
  return paired_difference(np.asarray(entry["val_loss"]), np.asarray(matched))._asdict()


def share_of_tokens(entry: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
  """Returns the share of its tokens that a run needs for the final loss of the other, by seed."""
  reached = [
    tokens_to_loss(entry["curve_tokens"], losses, others[-1])
    for losses, others in zip(entry["curve_loss"], other["curve_loss"])
  ]
  shares = [None if tokens is None else tokens / entry["train_tokens"] for tokens in reached]
  return {"by_seed": shares, "mean": None if None in shares else interval(shares)}


def spread(value: dict[str, float] | None) -> str:
  return "-" if value is None else f"{value['estimate']:+.4f} ({value['low']:+.4f} to {value['high']:+.4f})"


def share(found: dict[str, Any]) -> str:
  if found["mean"] is not None:
    mean = found["mean"]
    return f"{mean['estimate']:.2f} ({mean['low']:.2f} to {mean['high']:.2f})"
  reached = sum(value is not None for value in found["by_seed"])
  return f"reached by {reached} of {len(found['by_seed'])} seeds"


def render(result: dict[str, Any]) -> str:
  """Returns the Markdown table of the result."""
  arms, seeds = result["arms"], len(result["seeds"])
  head = ("arm", "parameters", "FLOPs over ntp", "validation loss, nats", "minus ntp, equal tokens")
  head += ("minus ntp, equal FLOPs", "share of its tokens to ntp's loss", "share of ntp's tokens to its loss")
  rows = [head, ("---",) * len(head)]
  for arm, entry in arms.items():
    loss = interval(entry["val_loss"])
    compared = result["compared"].get(arm)
    ratio = entry["train_flops"] / arms[BASELINE]["train_flops"]
    cells = [arm, f"{entry['params']:,}", f"{ratio:.3f}", f"{loss['estimate']:.4f}"]
    if compared is None:
      cells += ["-"] * 4
    else:
      cells += [spread(compared["equal_tokens"]), spread(compared["equal_flops"])]
      cells += [share(compared["tokens_to_equal_loss"]), share(compared["baseline_tokens_to_equal_loss"])]
    rows.append(tuple(cells))
  table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
  tokens = arms[BASELINE]["train_tokens"]
  return (
    f"# CoCoMix: sample efficiency at {tokens:,} tokens, {seeds} seeds\n\n"
    f"Losses of the whole validation split; negative differences favour the arm; means over {seeds} seeds with 95 % "
    "intervals over seeds, paired. `negated` is CoCoMix with labels of the opposite sign, at equal tokens "
    f"{spread(result['negated_minus_cocomix'])} against CoCoMix. Equal FLOPs: against baselines that trained for "
    f"longer; what is made once for all arms (teacher, autoencoder, labels) is not counted.\n\n{table}\n"
  )


def draw(path: pathlib.Path, arms: dict[str, Any]) -> None:
  """Draws the mean curves over seeds."""
  lines = {
    arm: (entry["curve_tokens"], np.mean(entry["curve_loss"], axis=0).tolist()) for arm, entry in arms.items()
  }
  plots.plot_curves(
    path,
    lines,
    title="Loss of a validation sample while training, mean over seeds",
    x_label="tokens",
    y_label="nats a token",
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=pathlib.Path, default=HERE.parent / "runs" / "sample_efficiency")
  parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
  parser.add_argument("--read_only", action="store_true", help="read a finished run directory, train nothing")
  arguments = parser.parse_args()
  if not arguments.read_only:
    flags = [f"--config={CONFIG}:sample_efficiency", f"--workdir={arguments.workdir.absolute()}"]
    subprocess.run([sys.executable, "-m", "nr.main", *flags], check=True, cwd=HERE.parent)
  result = read_runs(arguments.workdir)
  ran_in = json.loads((arguments.workdir / "report.json").read_text())["environment"]
  sign = paired_difference(*(result["arms"][arm]["val_loss"] for arm in ("negated", "cocomix")))
  result.update(compared=compare(result["arms"]), negated_minus_cocomix=sign._asdict())
  result.update(environment=ran_in, hardware=hardware())
  draw(arguments.workdir / "plots" / "sample_efficiency.png", result["arms"])
  arguments.results.mkdir(parents=True, exist_ok=True)
  (arguments.results / "sample_efficiency.json").write_text(json.dumps(result, indent=1) + "\n")
  (arguments.results / "sample_efficiency.md").write_text(render(result))
  print(render(result))


if __name__ == "__main__":
  main()
