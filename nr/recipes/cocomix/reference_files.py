"""Students as checkpoints of the CoCoMix reference, and back.

from nr.recipes.cocomix.reference_files import export_student, import_student

export_student("runs/cocomix/students/cocomix_seed0/model", "reference/")
import_student("their_checkpoint/", "model/", tokenizer="gpt2", insert_at=3, top_k=32)
"""

import pathlib
from typing import Any

from nr.interchange.cocomix_reference import load_cocomix_reference, save_cocomix_reference
from nr.training.model_files import ConceptMixingModelSpec, load_model, save_model


def export_student(model: str | pathlib.Path, folder: str | pathlib.Path) -> None:
  """Writes a trained CoCoMix student as a checkpoint that the reference's class loads.

  Args:
    model: a model folder of this library, such as a student's `model`.
    folder: where `config.json` and `model.safetensors` go. The tokenizer is not among them: token ids
      are those of the run's own.

  Raises:
    ValueError: no CoCoMix model, or one that the reference cannot compute.
    CheckpointError: nothing at `model`, or damaged files.
  """
  found = load_model(pathlib.Path(model))
  if not isinstance(found.spec, ConceptMixingModelSpec):
    raise ValueError(f"{model} holds a {found.metadata['kind']!r}; give the folder of a CoCoMix student")
  save_cocomix_reference(folder, found.spec.transformer, found.spec.concepts, found.params)


def import_student(
  folder: str | pathlib.Path,
  model: str | pathlib.Path,
  *,
  tokenizer: str,
  insert_at: int | None = None,
  top_k: int | None = None,
  **settings: Any,
) -> str:
  """Writes a checkpoint of the reference as a model folder, which `nr.training.model_files.load_model` reads.

  Args:
    folder: what the reference's `save_pretrained` wrote, or `export_student`.
    model: where the model folder goes; replaced if it exists.
    tokenizer: fingerprint of the tokenizer whose ids the checkpoint reads.
    insert_at: see `load_cocomix_reference`.
    top_k: see `load_cocomix_reference`.
    **settings: fields of TransformerSpec to set otherwise than the config says.

  Returns:
    Hash of the parameters, hexadecimal.

  Raises:
    ImportError, FileNotFoundError, ValueError: as `load_cocomix_reference`.
  """
  spec, concepts, params = load_cocomix_reference(folder, insert_at=insert_at, top_k=top_k, **settings)
  return save_model(pathlib.Path(model), ConceptMixingModelSpec(spec, concepts), params, tokenizer)
