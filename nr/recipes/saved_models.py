"""What a stage leaves of a model: its folder, its hash, its size and how training went."""

import json
import pathlib
from typing import Any

from nr.recipes.stages import Artifact, StageContext
from nr.training import trees
from nr.training.model_files import save_model


def keep_model(
  context: StageContext,
  directory: pathlib.Path,
  spec: Any,
  params: Any,
  tokenizer: str,
  summary: dict[str, Any] | None = None,
) -> Artifact:
  """Saves a model in `directory`/model and returns what the stage's artifact says of it.

  Args:
    context: of the stage.
    directory: of this model, where its training wrote.
    spec: its settings.
    params: its parameters, in either layout.
    tokenizer: fingerprint of the tokenizer that it reads.
    summary: of the training loop; None where it was not trained here.

  Returns:
    model and directory (paths in the run), fingerprint, params (their number) and summary.
  """
  fingerprint = save_model(directory / "model", spec, params, tokenizer)
  return {
    "model": context.relative(directory / "model"),
    "directory": context.relative(directory),
    "fingerprint": fingerprint,
    "params": trees.count(params),
    "summary": json.loads(json.dumps(summary or {}, default=float)),
  }
