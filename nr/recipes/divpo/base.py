"""Stage `base`: the model that every arm begins from; in the toy one a seed, pre-trained on personas."""

from nr.data.example_batches import padded_batches
from nr.data.examples import LengthLimits, encode_responses
from nr.recipes.divpo import settings
from nr.recipes.languages import Language, checkpoint_language, keep_language
from nr.recipes.policies import open_base
from nr.recipes.saved_models import keep_model
from nr.recipes.sections import training_config, transformer_spec
from nr.recipes.stages import Artifact, StageContext
from nr.training.loop import train
from nr.training.next_token import next_token_method


def run(context: StageContext) -> Artifact:
  """Trains the toy's model for every seed, or copies the checkpoint into the run."""
  config = context.config
  if settings.is_toy(config):
    language = settings.toy_language(config)
    models = {str(seed): _pre_trained(context, language, seed) for seed in config.seeds}
  else:
    checkpoint = open_base(config.base)
    language = checkpoint_language(checkpoint, config.base.chat_template)
    spec, params, tokenizer = checkpoint.spec, checkpoint.network.params, language.tokenizer.fingerprint
    models = {
      str(seed): keep_model(context, context.directory / f"seed{seed}", spec, params, tokenizer)
      for seed in config.seeds
    }
  return {**keep_language(context, language), "models": models}


def _pre_trained(context: StageContext, language: Language, seed: int) -> Artifact:
  config, directory = context.config, context.directory / f"seed{seed}"
  task, length = settings.task_of(config), config.base.max_length
  spec = transformer_spec(config.base.model, language.tokenizer.vocab_size, length)
  training = training_config(config.base.train, config.seed + seed)
  responses = task.corpus(config.base.examples, config.seed + seed)
  encoded = encode_responses(responses, language.format, LengthLimits(length, when_long="raise"))
  batches = padded_batches(encoded.examples, training.batch_size, (length,), seed=training.seed)
  result = train(training, next_token_method(spec, name="base"), batches, workdir=directory)
  return keep_model(
    context, directory, spec, result.state.params, language.tokenizer.fingerprint, result.summary
  )
