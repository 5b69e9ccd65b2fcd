"""Stage `language_model`: the tiny model that writes, pre-trained on all tasks; a model a seed."""

from nr.data.windows import shuffled_batches
from nr.generation.language_models import Network
from nr.recipes.adaptive_decoding import families, settings
from nr.recipes.sections import training_config
from nr.recipes.stages import Artifact, StageContext
from nr.training import trees
from nr.training.loop import train
from nr.training.model_files import load_model, save_model
from nr.training.next_token import next_token_method


def run(context: StageContext) -> Artifact:
  """Trains a model for every seed on texts that it sees once or more."""
  config, section = context.config, context.config.language_model
  spec = settings.transformer_spec(config)
  runs = {}
  for seed in config.seeds:
    directory = context.directory / f"seed{seed}"
    training = training_config(section.train, config.seed + seed)
    number = settings.number_of(config.seed, seed, "texts")
    texts = families.training_texts(tuple(section.families), section.num_texts, number)
    data = shuffled_batches(texts, training.batch_size, seed=training.seed)
    result = train(training, next_token_method(spec), data, workdir=directory)
    fingerprint = save_model(directory / "model", spec, result.state.params, families.TOKENIZER.fingerprint)
    runs[str(seed)] = {
      "model": context.relative(directory / "model"),
      "fingerprint": fingerprint,
      "params": trees.count(result.state.params),
      "loss": result.summary["loss"],
    }
  return {"runs": runs, "families": list(section.families)}


def open_network(context: StageContext, seed: int) -> Network:
  """Reads the language model of a seed."""
  entry = context.inputs["language_model"]["runs"][str(seed)]
  model = load_model(context.path(entry["model"]), families.TOKENIZER.fingerprint)
  return Network(model.graphdef, model.params)
