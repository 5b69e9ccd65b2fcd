"""A finished run, opened for looking: its models, its text, and what they make of any other text.

run = open_run("runs/cocomix")
seen = run.read("The war in the Pacific has ended.")      # tokens, latents, the student's concepts
found, measured = run.find(texts_about_war, other_texts)  # concepts that tell the two apart
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nr.data.tokenizers import Tokenizer
from nr.data.windows import ordered_batches
from nr.evaluation.contrast_sets import Contrast, find_features
from nr.models import parameters
from nr.models.residual_tap import TapInputs, activations_at
from nr.models.sparse_autoencoder import SparseCode, densify
from nr.recipes import cocomix
from nr.recipes.cocomix import corpus, steer
from nr.recipes.cocomix.steering import naming
from nr.recipes.cocomix.steering.naming import Names
from nr.recipes.cocomix.steering.protocol import Models, Protocol
from nr.recipes.stages import Artifact, StageContext, StageError, read_manifest

SIDES = ("teacher", "student")


class Reading(NamedTuple):
  """What teacher and student make of a text, token by token.

  Attributes:
    tokens_L: its tokens as text.
    latents_LC: activations of the teacher's latents, 0 where one does not fire.
    logits_LC: the student's logits of the same concepts.
    is_selected_LC: whether the student mixes a concept at a token.
  """

  tokens_L: list[str]
  latents_LC: np.ndarray
  logits_LC: np.ndarray
  is_selected_LC: np.ndarray


class OpenedRun(NamedTuple):
  """A finished run directory; make it with `open_run`.

  Attributes:
    context: the run as stage `steer` saw it.
    models: who takes part.
    tokenizer: of all of them.
    measured: artifact of stage `steer`.
  """

  context: StageContext
  models: Models
  tokenizer: Tokenizer
  measured: Artifact

  @property
  def length(self) -> int:
    """Tokens that the models read at once."""
    return self.context.config.window.length

  @property
  def num_concepts(self) -> int:
    """Number of concepts."""
    return self.models.autoencoder.spec.num_latents

  def names(self) -> Names:
    """Returns what concepts are named from; reads the validation windows again."""
    return steer.name_concepts(self.context, self.models)[0]

  def protocol(self, prompts: Sequence[str]) -> Protocol:
    """Returns the protocol on prompts of one's own, cut at their left to the shortest of them.

    Raises:
      ValueError: no prompt, or an empty one.
    """
    encoded = [self.tokenizer.encode(prompt) for prompt in prompts]
    shortest = min((len(each) for each in encoded), default=0)
    if not shortest:
      raise ValueError(f"prompts={list(prompts)!r}: give at least one, and none that is empty")
    config, seed = self.context.config.steer, self.context.config.seed
    prompts_PL = np.array([each[-shortest:] for each in encoded], np.int32)
    return Protocol(config, seed, self.models, self.tokenizer, prompts_PL)

  def read(self, text: str) -> Reading:
    """Returns what both sides make of a text of at most `length` tokens.

    Raises:
      ValueError: an empty text, or a longer one.
    """
    ids = self.tokenizer.encode(text)
    if not 0 < len(ids) <= self.length:
      raise ValueError(f"the text has {len(ids)} tokens; give 1 to {self.length}")
    padded_1L = np.zeros((1, self.length), np.int32)
    padded_1L[0, : len(ids)] = ids
    seen = [np.asarray(each)[0, : len(ids)] for each in self._read(padded_1L)]
    return Reading([self.tokenizer.decode([each]) for each in ids], *seen)

  def features(self, texts: Sequence[str], side: str = "teacher", batch_size: int = 32) -> np.ndarray:
    """Returns a number [N, C] for each text and concept: its largest activation (teacher) or logit (student).

    Texts of more than `length` tokens are cut at their end.

    Raises:
      ValueError: an unknown side, or an empty text.
    """
    encoded = [self.tokenizer.encode(text)[: self.length] for text in texts]
    if side not in SIDES or not all(encoded):
      raise ValueError(f"side={side!r}: choose one of {', '.join(SIDES)}, and give no empty text")
    rows = [
      {"tokens": np.pad(np.array(ids, np.int32), (0, self.length - len(ids))), "size": np.int32(len(ids))}
      for ids in encoded
    ]
    found = []
    for batch in ordered_batches(rows, min(batch_size, len(rows))):
      values_BLC = np.asarray(self._read(batch["tokens"])[SIDES.index(side)])
      is_own_BL1 = (np.arange(self.length) < batch["size"][:, None])[..., None]
      found.append(np.where(is_own_BL1, values_BLC, -np.inf).max(axis=1))
    return np.concatenate(found)[: len(rows)]

  def find(
    self, first: Sequence[str], second: Sequence[str], count: int = 8, side: str = "teacher"
  ) -> tuple[np.ndarray, Contrast]:
    """Finds the concepts that most tell texts with a property from texts without it; see `find_features`."""
    return find_features(self.features(first, side), self.features(second, side), count)

  def validation_texts(self, tokens: int, count: int = 0) -> list[str]:
    """Returns the validation split in pieces of so many tokens, the first `count` (0: all)."""
    dataset = corpus.open_split(self.context, "validation")
    whole = dataset.num_tokens // tokens
    starts = range(0, tokens * (min(count, whole) if count else whole), tokens)
    return [self.tokenizer.decode(dataset.tokens[start : start + tokens].tolist()) for start in starts]

  def _read(self, tokens_BL: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    models = self.models
    definitions = (
      models.teacher.graphdef,
      models.autoencoder.graphdef,
      models.student.graphdef,
      models.layer,
    )
    values = (models.teacher.params, models.autoencoder.params, models.student.params)
    return _read_both(definitions, values, tokens_BL)


@functools.partial(jax.jit, static_argnums=0)
def _read_both(definitions: Any, values: Any, tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the teacher's activations, the student's logits and what it selects, each [B, L, C]."""
  teacher, autoencoder, student = (parameters.merge(*pair) for pair in zip(definitions, values))
  stream_BLD = activations_at(teacher, TapInputs(tokens_BL), definitions[-1])
  latents_BLC = autoencoder.dense(autoencoder.encode(autoencoder.normalise(stream_BLD).values_TD))
  x_BLD = naming.stream_at_insertion(student, {"tokens": tokens_BL})
  selected = student.concepts.predict(x_BLD)
  ones_BLK = jnp.ones_like(selected.values_BLK)
  is_selected_BLC = densify(SparseCode(ones_BLK, selected.indices_BLK), latents_BLC.shape[-1]) > 0
  return latents_BLC, student.concepts.logits(x_BLD), is_selected_BLC


def open_run(workdir: str | pathlib.Path) -> OpenedRun:
  """Opens a run directory of the recipe whose stage `steer` is finished.

  Raises:
    StageError: no run of this recipe, or one that has not come so far.
  """
  workdir = pathlib.Path(workdir)
  manifest, path = read_manifest(workdir), workdir / "config.json"
  if not path.is_file() or manifest.get("steer", {}).get("status") != "finished":
    raise StageError(
      f"{workdir} holds no run with a finished stage 'steer'; make one with "
      f"python -m nr.main --config=configs/cocomix.py:tiny --workdir={workdir}"
    )
  config = ConfigDict(json.loads(path.read_text()))
  if config.recipe != cocomix.__name__:
    raise StageError(f"{workdir} is a run of {config.recipe}, not of {cocomix.__name__}")
  inputs = {name: entry["artifact"] for name, entry in manifest.items() if entry["status"] == "finished"}
  context = StageContext(config, workdir, workdir / "steer", inputs)
  models = steer.open_models(context)
  return OpenedRun(context, models, steer.open_tokenizer(context), inputs["steer"])
