"""Stage `base`: the model that every arm begins from; in the toy one a seed, pre-trained on personas."""

import json

from nr.data.example_batches import padded_batches
from nr.data.examples import LengthLimits, encode_responses
from nr.recipes.divpo import settings
from nr.recipes.sections import training_config, transformer_spec
from nr.recipes.stages import Artifact, StageContext
from nr.training import trees
from nr.training.loop import train
from nr.training.model_files import save_model
from nr.training.next_token import next_token_method


def run(context: StageContext) -> Artifact:
  """Trains the toy's model for every seed, or copies the checkpoint into the run."""
  config = context.config
  language = settings.language_of(config)
  language.tokenizer.save(context.directory / "tokenizer")
  one = _pre_trained if settings.is_toy(config) else _copied
  return {
    "tokenizer": language.tokenizer.fingerprint,
    "models": {str(seed): one(context, language, seed) for seed in config.seeds},
  }


def _pre_trained(context: StageContext, language: settings.Language, seed: int) -> Artifact:
  config, directory = context.config, context.directory / f"seed{seed}"
  task, length = settings.task_of(config), config.base.max_length
  spec = transformer_spec(config.base.model, language.tokenizer.vocab_size, length)
  training = training_config(config.base.train, config.seed + seed)
  responses = task.corpus(config.base.examples, config.seed + seed)
  encoded = encode_responses(
    responses, settings.text_format(language), LengthLimits(length, when_long="raise")
  )
  batches = padded_batches(encoded.examples, training.batch_size, (length,), seed=training.seed)
  result = train(training, next_token_method(spec, name="base"), batches, workdir=directory)
  return _saved(context, directory, spec, result.state.params, language, result.summary)


def _copied(context: StageContext, language: settings.Language, seed: int) -> Artifact:
  checkpoint = settings.open_base_checkpoint(context.config)
  directory = context.directory / f"seed{seed}"
  return _saved(context, directory, checkpoint.spec, checkpoint.network.params, language, {})


def _saved(context, directory, spec, params, language, summary) -> Artifact:
  fingerprint = save_model(directory / "model", spec, params, language.tokenizer.fingerprint)
  return {
    "model": context.relative(directory / "model"),
    "fingerprint": fingerprint,
    "params": trees.count(params),
    "summary": json.loads(json.dumps(summary, default=float)),
  }
