"""Stage `heads`: a head for every experiment, variant of the loss and seed, trained by the common loop.

The language model is frozen, so what the losses read of it is computed once (`heads.cache_hidden`); with
the cache off the model runs in every step, and the numbers are the same.
"""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nr.models import parameters
from nr.objectives.latent_preference import lpo_loss
from nr.recipes.adaptive_decoding import families, language_model, pairs, settings
from nr.recipes.adaptive_decoding.features import (
  PairRows,
  Reader,
  ordered_batches,
  read_features,
  training_batches,
)
from nr.recipes.adaptive_decoding.method import latent_preference_method, score_pairs
from nr.recipes.adaptive_decoding.tasks.prompts import bucket_lengths
from nr.recipes.sections import training_config
from nr.recipes.stages import Artifact, StageContext, write_json
from nr.training import sharding
from nr.training.loop import TrainResult, train
from nr.training.method import Evaluator
from nr.training.model_files import axes_of, graphdef_of, save_model

RESULT, EPOCHS = "result.json", "epochs.json"


class Lengths(NamedTuple):
  """Lengths that rows may be padded to, growing.

  Attributes:
    prompts: without responses; (): prompts are never read alone.
    pairs: with them.
  """

  prompts: tuple[int, ...]
  pairs: tuple[int, ...]


def run(context: StageContext) -> Artifact:
  """Trains the heads; those that finished earlier are not trained again."""
  config, artifact = context.config, {}
  for key, made in context.inputs["pairs"].items():
    name, seed = key.split("/")
    experiment = config.experiments[name]
    opened = language_model.open_model(context, int(seed))
    length = families.LENGTH if settings.is_toy(config) else None
    arrays = {split: pairs.read_arrays(context.path(made[split]), length) for split in pairs.SPLITS}
    shared = baseline_accuracies(arrays["held_out"], made["settings"], experiment)
    artifact[key] = {"baseline_accuracies": shared, "heads": {}}
    work = _Work(context, name, experiment, int(seed), opened, arrays)
    for variant in config.heads.variants:
      artifact[key]["heads"][variant] = work.finished(variant) or work.train(variant)
    work.forget_features()
  return artifact


def lengths_of(config: Any, arrays: Mapping[str, pairs.PairArrays], most: int | None) -> Lengths:
  """Returns the lengths of rows.

  Args:
    config: the whole config.
    arrays: the pairs of all splits.
    most: positions of the model; None: no limit.
  """
  if settings.is_toy(config):
    return Lengths((), (families.LENGTH,))  # so short that nothing is gained by leaving responses out
  longest = max(each.tokens.shape[-1] for each in arrays.values())
  found = [length for length in bucket_lengths(longest) if most is None or length < most]
  lengths = tuple(found) if found and found[-1] >= longest else (*found, most)
  return Lengths(lengths, lengths)


class _Work:
  """The heads of one experiment and seed: they share pairs and what the model made of them."""

  def __init__(
    self,
    context: StageContext,
    name: str,
    experiment: Any,
    seed: int,
    opened: language_model.Opened,
    arrays: Mapping[str, pairs.PairArrays],
  ):
    self.context, self.config, self.experiment, self.seed = context, context.config, experiment, seed
    self.name, self.opened, self.arrays = name, opened, arrays
    self.temperatures = tuple(experiment["values"])
    self.lengths = lengths_of(context.config, arrays, opened.network.max_length)
    self._rows: dict[bool, dict[str, PairRows]] = {}

  def directory(self, variant: str) -> pathlib.Path:
    """Returns the folder of a variant's training."""
    return self.context.directory / f"{self.name}_{variant}_seed{self.seed}"

  def finished(self, variant: str) -> Artifact | None:
    """Returns what an earlier attempt has come to, if it came to an end."""
    path = self.directory(variant) / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

  def train(self, variant: str) -> Artifact:
    """Trains one head and returns where it is and how well it ranks held-out pairs."""
    config, directory = self.config, self.directory(variant)
    spec = settings.loss_spec(config, self.experiment, variant)
    head = settings.head_spec(config, self.experiment, self.opened.network.spec.model_dim)
    cached, frozen = self._cached(spec), None
    if not config.heads.cache_hidden:
      network = self.opened.network
      frozen = (network.graphdef, network.params, axes_of(network.spec))
    method = latent_preference_method(
      head, spec, self.temperatures, language_model=frozen, loss_chunk=config.devices.loss_chunk or None
    )
    training = training_config(config.heads.train, config.seed + self.seed)
    training.batch_size = fitting_rows(training, len(self.arrays["train"].tokens))
    rows = cached["train"] if frozen is None else PairRows(self.arrays["train"], None, self.lengths.pairs)
    per_call = config.devices.pairs_per_call
    evaluator = held_out_evaluator(
      head, spec, lambda: ordered_batches(cached["held_out"], per_call), self.temperatures
    )

    def go_on(training: Any) -> TrainResult:
      data = training_batches(rows, training.batch_size, training.seed)
      return train(training, method, data, [evaluator], directory)

    def save(result: TrainResult) -> str:
      return save_model(
        directory / "model", head, result.state.params, self.opened.language.tokenizer.fingerprint
      )

    if config.heads.epochs:
      per_epoch = max(1, len(rows) // training.batch_size)
      trained = train_epochs(training, config.heads, per_epoch, go_on, save, directory)
    else:
      result = go_on(training)
      trained = {"fingerprint": save(result), "loss": result.summary["loss"], "held_out": held_out_of(result)}
    artifact = {
      "model": self.context.relative(directory / "model"),
      "directory": self.context.relative(directory),
      **trained,
    }
    write_json(directory / RESULT, artifact)
    return artifact

  def _cached(self, spec: Any) -> dict[str, PairRows]:
    """Returns the rows of all splits with features, which losses that read the same share."""
    if spec.needs_words not in self._rows:
      devices = self.config.devices
      reader = Reader(
        self.opened.network,
        self.temperatures,
        self.opened.mesh,
        devices.pairs_per_call,
        devices.loss_chunk or None,
      )
      folder = self._features_folder() / ("words" if spec.needs_words else "hidden")
      self._rows[spec.needs_words] = {
        split: PairRows(
          arrays, read_features(reader, arrays, spec, folder / split, *self.lengths), self.lengths.pairs
        )
        for split, arrays in self.arrays.items()
      }
    return self._rows[spec.needs_words]

  def _features_folder(self) -> pathlib.Path:
    return self.context.directory / f"features_{self.name}_seed{self.seed}"

  def forget_features(self) -> None:
    """Removes what was kept of the language model: it can be computed again."""
    self._rows.clear()
    shutil.rmtree(self._features_folder(), ignore_errors=True)


def fitting_rows(training: Any, pairs: int) -> int:
  """Returns the rows of a batch: as the section says, or as many of too few pairs as divide over its devices."""
  sizes = sharding.mesh_sizes(training.mesh, jax.device_count())
  ways = sizes["data"] * sizes["fsdp"] * training.accumulation
  return min(training.batch_size, pairs // ways * ways or pairs)


def held_out_of(result: TrainResult) -> dict[str, float]:
  """Returns the measurements on held-out pairs by name."""
  return {name.partition("/")[2]: value for name, value in result.summary["evaluations"].items()}


def train_epochs(
  training: Any,
  section: Any,
  per_epoch: int,
  go_on: Callable[[Any], TrainResult],
  save: Callable[[TrainResult], str],
  directory: pathlib.Path,
) -> dict[str, Any]:
  """Trains epoch by epoch until the accuracy on held-out pairs rises no more; the best head is kept.

  Each epoch goes on from the checkpoint of the one before, so an interrupted training does too. The schedule
  is as long as all epochs, unless the config says otherwise.

  Args:
    training: section of the loop; its steps are set here.
    section: with `epochs`, the most there may be, and `patience`, epochs without a better one after which
      training ends.
    per_epoch: steps of an epoch.
    go_on: trains to the section's steps.
    save: keeps a head, returns its fingerprint.
    directory: gets epochs.json.

  Returns:
    fingerprint, loss and held_out of the best epoch, `epoch`, its number from 1, and `epochs`, the
    accuracies of all.
  """
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / EPOCHS
  history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
  training.schedule.steps = training.schedule.steps or section.epochs * per_epoch
  while len(history) < section.epochs and not is_over(history, section.patience):
    training.steps = (len(history) + 1) * per_epoch
    result = go_on(training)
    held_out = held_out_of(result)
    is_best = all(held_out["accuracy"] > each["held_out"]["accuracy"] for each in history)
    entry = {"loss": result.summary["loss"], "held_out": held_out}
    entry["fingerprint"] = save(result) if is_best else ""
    history.append(entry)
    write_json(path, history)
  best = best_epoch(history)
  return {
    **history[best],
    "epoch": best + 1,
    "epochs": [each["held_out"]["accuracy"] for each in history],
  }


def best_epoch(history: list[dict[str, Any]]) -> int:
  """Returns the first of the epochs with the highest accuracy."""
  accuracies = [each["held_out"]["accuracy"] for each in history]
  return accuracies.index(max(accuracies))


def is_over(history: list[dict[str, Any]], patience: int) -> bool:
  """Whether the last `patience` epochs were no better than the best before them."""
  return bool(history) and len(history) - 1 - best_epoch(history) >= patience


def held_out_evaluator(
  head: Any,
  spec: Any,
  batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
  temperatures: tuple[float, ...],
) -> Evaluator:
  """Returns the measurement on held-out pairs: accuracy, entropy and mean setting of the head.

  The accuracy is that of ranking by log P of the drawn settings, whatever the loss.

  Args:
    head: settings of the head.
    spec: of the loss.
    batches: gives all held-out pairs once.
    temperatures: the settings.
  """
  graphdef, values_K = graphdef_of(head), jnp.asarray(temperatures)

  @jax.jit
  def measure(params: Any, batch: Any) -> dict[str, jax.Array]:
    log_pi = parameters.merge(graphdef, params)(batch["hidden"])
    sides = score_pairs(spec, log_pi, batch, batch.get("words"))
    if spec.level == "token":  # By the mean, or the shorter response would win.
      sides = [side._replace(choices=side.choices / jnp.maximum(side.count, 1)) for side in sides]
    ranked = lpo_loss(type(spec)(level=spec.level), *sides)[1]
    weights = jnp.ones(log_pi.shape[:-1]) if spec.level == "sequence" else batch["weights"]
    pi, total = jnp.exp(log_pi), jnp.maximum(weights.sum(), 1)
    return {
      "accuracy": ranked["accuracy"].mean(),
      "entropy": (-(pi * log_pi).sum(-1) * weights).sum() / total,
      "mean_setting": ((pi @ values_K) * weights).sum() / total,
      "choices": weights.sum(),
    }

  def run(params: Any, frozen: Any, extra: Any) -> dict[str, float]:
    del frozen, extra
    found: dict[str, list[float]] = {}
    for batch in batches():
      measured = {name: float(value) for name, value in measure(params, dict(batch)).items()}
      for name, value in {**measured, "pairs": float(len(batch["choices"]))}.items():
        found.setdefault(name, []).append(value)
    weight = {"accuracy": "pairs", "entropy": "choices", "mean_setting": "choices"}
    return {
      name: sum(np.multiply(found[name], found[count])) / max(sum(found[count]), 1)
      for name, count in weight.items()
    }

  return Evaluator("held_out", run)


def baseline_accuracies(held_out: pairs.PairArrays, counts: Any, experiment: Any) -> dict[str, float]:
  """Returns how often rules that never look at the prompt rank held-out pairs right (ties count half).

  `always_lower` prefers the response with the lower (mean) setting; `constant` ranks settings by how often
  they were chosen and rejected in the training pairs.
  """
  scores = {
    "always_lower": -np.asarray(experiment["values"], np.float64),
    "constant": pairs.setting_scores(counts),
  }
  weights = pairs.token_shares(held_out)
  accuracies = {}
  for name, scores_K in scores.items():
    of_sides = (scores_K[held_out.choices] * weights).sum(-1)
    difference = of_sides[:, 0] - of_sides[:, 1]
    # Equal settings summed in another order differ in the last digit.
    difference = np.where(np.abs(difference) < 1e-9, 0, difference)
    accuracies[name] = float((0.5 * (1 + np.sign(difference))).mean())
  return accuracies
