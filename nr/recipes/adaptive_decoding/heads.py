"""Stage `heads`: a head for every experiment, variant of the loss and seed, trained by the common loop.

The language model is frozen, so what the loss reads of it is computed once (`heads.cache_hidden`); with
the cache off the model runs in every step, and the numbers are the same.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nr.data.windows import shuffled_batches
from nr.generation.language_models import Network
from nr.models import parameters
from nr.objectives.latent_preference import lpo_loss
from nr.recipes.adaptive_decoding import families, language_model, pairs, settings
from nr.recipes.adaptive_decoding.method import latent_preference_method, read_language_model, score_pairs
from nr.recipes.sections import training_config
from nr.recipes.stages import Artifact, StageContext
from nr.training.loop import train
from nr.training.method import Evaluator
from nr.training.model_files import axes_of, graphdef_of, save_model

PIECE = 256
"""Pairs that the language model reads at once."""


def run(context: StageContext) -> Artifact:
  """Trains the heads; those that finished earlier are not trained again."""
  config, artifact = context.config, {}
  for key, made in context.inputs["pairs"].items():
    name, seed = key.split("/")
    experiment = config.experiments[name]
    network = language_model.open_network(context, int(seed))
    arrays = {split: pairs.read_arrays(context.path(made[split])) for split in pairs.SPLITS}
    shared = baseline_accuracies(arrays["held_out"], made["settings"], experiment)
    artifact[key] = {"baseline_accuracies": shared, "heads": {}}
    for variant in config.heads.variants:
      directory = context.directory / f"{name}_{variant}_seed{seed}"
      artifact[key]["heads"][variant] = train_head(
        context, experiment, variant, seed, network, arrays, directory
      )
  return artifact


def train_head(
  context: StageContext,
  experiment: Any,
  variant: str,
  seed: str,
  network: Network,
  arrays: Mapping[str, pairs.PairArrays],
  directory: Any,
) -> dict[str, Any]:
  """Trains one head and returns where it is and how well it ranks held-out pairs."""
  config = context.config
  spec, head = settings.loss_spec(config, experiment, variant), settings.head_spec(config, experiment)
  temperatures = tuple(experiment["values"])
  cached = {split: pair_features(network, arrays[split], spec, temperatures) for split in arrays}
  frozen = None
  if not config.heads.cache_hidden:
    frozen = (network.graphdef, network.params, axes_of(network.spec))
  method = latent_preference_method(head, spec, temperatures, language_model=frozen)
  training = training_config(config.heads.train, config.seed + int(seed))
  training.batch_size = min(training.batch_size, len(arrays["train"].tokens))
  source = Rows(cached["train"] if frozen is None else without_features(arrays["train"]))
  data = shuffled_batches(source, training.batch_size, seed=training.seed)
  evaluators = [held_out_evaluator(head, spec, cached["held_out"], temperatures)]
  result = train(training, method, data, evaluators, directory)
  fingerprint = save_model(directory / "model", head, result.state.params, families.TOKENIZER.fingerprint)
  return {
    "model": context.relative(directory / "model"),
    "directory": context.relative(directory),
    "fingerprint": fingerprint,
    "loss": result.summary["loss"],
    "held_out": {name.partition("/")[2]: value for name, value in result.summary["evaluations"].items()},
  }


class Rows:
  """Arrays that lead with the same axis, read row by row."""

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    self._arrays = dict(arrays)

  def __len__(self) -> int:
    return len(next(iter(self._arrays.values())))

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {name: values[index] for name, values in self._arrays.items()}


def without_features(arrays: pairs.PairArrays) -> dict[str, np.ndarray]:
  """Returns the fields of batches for a method that runs the language model itself."""
  return {**arrays._asdict(), "pair_weights": np.ones(len(arrays.tokens), np.float32)}


def pair_features(
  network: Network, arrays: pairs.PairArrays, spec: Any, temperatures: tuple[float, ...]
) -> dict[str, np.ndarray]:
  """Returns the fields of batches for a method that never sees the language model.

  Args:
    network: the frozen language model.
    arrays: the pairs.
    spec: of the loss, which decides what is computed.
    temperatures: of the words.
  """
  found = []
  for start in range(0, len(arrays.tokens), PIECE):
    batch = {name: jnp.asarray(values[start : start + PIECE]) for name, values in arrays._asdict().items()}
    found.append(jax.device_get(_read(network.graphdef, network.params, batch, spec, temperatures)))
  fields = {
    "choices": arrays.choices,
    "weights": arrays.weights,
    "pair_weights": np.ones(len(arrays.tokens), np.float32),
    "hidden": np.concatenate([features.hidden for features in found]).astype(np.float32),
  }
  if spec.needs_words:
    fields["words"] = np.concatenate([features.words for features in found])
  return fields


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _read(graphdef: Any, params: Any, batch: Any, spec: Any, temperatures: tuple[float, ...]) -> Any:
  return read_language_model(graphdef, params, batch, spec, temperatures)


def held_out_evaluator(
  head: Any, spec: Any, cached: dict[str, np.ndarray], temperatures: tuple[float, ...]
) -> Evaluator:
  """Returns the measurement on held-out pairs: accuracy, entropy and mean setting of the head.

  The accuracy is that of ranking by log P of the drawn settings, whatever the loss.
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
    }

  def run(params: Any, frozen: Any, extra: Any) -> dict[str, float]:
    del frozen, extra
    return {name: float(value) for name, value in measure(params, cached).items()}

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
