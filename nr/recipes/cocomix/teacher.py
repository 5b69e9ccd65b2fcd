"""Stage `teacher`: the language model whose activations the concepts are read from."""

from nr.recipes.cocomix import language_model, settings
from nr.recipes.sections import training_config, transformer_spec
from nr.recipes.stages import Artifact, StageContext
from nr.training.next_token import next_token_method


def run(context: StageContext) -> Artifact:
  """Trains the teacher by the common loop and scores it on the validation split."""
  config, vocab_size = context.config, context.inputs["tokenizer"]["vocab_size"]
  spec = transformer_spec(config.teacher.model, vocab_size, config.window.length)
  training = training_config(config.teacher.train, config.seed)
  method = next_token_method(spec, name="teacher", loss_chunk=settings.loss_chunk(config))
  artifact = language_model.train_language_model(context, context.directory, method, spec, training)
  scores = language_model.score_split(context, artifact, "validation", training.batch_size)
  artifact.update(val_loss=scores.loss(), val_ppl=scores.perplexity(), bits_per_byte=scores.bits_per_byte())
  return artifact
