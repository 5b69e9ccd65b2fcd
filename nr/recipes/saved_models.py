"""What a stage leaves of a model: its folder, its hash, its size and how training went."""

import json
import pathlib
from typing import Any

from nr.models.lora import LoraSpec
from nr.recipes.stages import Artifact, StageContext
from nr.training import trees
from nr.training.adapter_files import save_adapter
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


def keep_adapter(
  context: StageContext, directory: pathlib.Path, lora: LoraSpec | None, trained: Any, base: str | None
) -> Artifact:
  """Saves an adapter in `directory`/adapter, for `python -m nr.generate --adapter`.

  Args:
    context: of the stage.
    directory: of the model, where its training wrote.
    lora: settings of the adapter; None: all of the model was trained, and nothing is saved.
    trained: what was trained.
    base: hash of the parameters under it.

  Returns:
    adapter (path in the run), or nothing.
  """
  if lora is None:
    return {}
  save_adapter(directory / "adapter", lora, trained, base)
  return {"adapter": context.relative(directory / "adapter")}
