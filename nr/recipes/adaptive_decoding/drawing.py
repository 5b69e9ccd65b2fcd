"""Drawing pools: N scored responses to every prompt, on disk as they come.

Prompts are answered and scored in pieces. A run that was killed draws again only the pieces that are not
whole in the file; what it draws is the same, for a prompt's number decides its random numbers.
"""

import logging
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nr.data.pools import Pool, PoolSample, PoolWriter, read_pools
from nr.generation.adaptive_decoding import DrawnSetting
from nr.generation.language_models import Network
from nr.generation.stopping import BROKEN, FINISH_REASONS
from nr.recipes.adaptive_decoding.sampling import Room, Written, pieces_of, write_piece
from nr.recipes.adaptive_decoding.tasks.protocol import Scored, Task, TaskPrompt

TELL_SECONDS = 30.0
"""Between two lines of the log while responses are drawn."""


class Draw(NamedTuple):
  """How responses are drawn.

  Attributes:
    key: random key.
    num_samples: responses a prompt.
    law: how settings are picked; None: none are.
    chain: transforms in text form, where no setting is picked.
    model: fingerprint of the language model, recorded with every pool.
    seed: recorded with every pool.
  """

  key: jax.Array
  num_samples: int
  law: DrawnSetting | None = None
  chain: str = ""
  model: str = ""
  seed: int = 0


def draw_pools(
  path: pathlib.Path,
  network: Network,
  task: Task,
  prompts: Sequence[TaskPrompt],
  room: Room,
  draw: Draw,
  tokenizer: Any,
) -> list[Pool]:
  """Returns a pool for each prompt, in their order; those that the file holds are not drawn again.

  Args:
    path: JSON lines; may hold pools of other tasks too.
    network: adaptive where `draw.law` is given.
    task: scores the responses.
    prompts: to answer.
    room: for responses.
    draw: how they are drawn.
    tokenizer: from ids to text.

  Raises:
    ValueError: the file holds a pool that another model drew.
  """
  found = {pool.id: pool for pool in read_pools(path)} if path.exists() else {}
  ids = [f"{task.name}-{prompt.id}" for prompt in prompts]
  for id in ids:
    if id in found and (found[id].model, len(found[id].samples)) != (draw.model, draw.num_samples):
      raise ValueError(
        f"{path}, pool {id!r}: was drawn by another model or in another number; remove the file"
      )
  path.parent.mkdir(parents=True, exist_ok=True)
  told = time.monotonic()
  with PoolWriter(path) as writer:
    for done, pools in _drawn(network, task, prompts, room, draw, tokenizer, set(found)):
      writer.extend([pool for pool in pools if pool.id not in found])
      found.update((pool.id, pool) for pool in pools)
      if time.monotonic() - told > TELL_SECONDS:
        logging.info("%s, %s: %d of %d prompts answered", path.stem, task.name, done, len(prompts))
        told = time.monotonic()
  return [found[id] for id in ids]


def _drawn(
  network: Network,
  task: Task,
  prompts: Sequence[TaskPrompt],
  room: Room,
  draw: Draw,
  tokenizer: Any,
  known: set[str],
) -> Iterator[tuple[int, list[Pool]]]:
  """Yields how many prompts are answered, and the pools of every piece that is not known as a whole."""
  tokens, done = [prompt.tokens for prompt in prompts], 0
  for piece in pieces_of([len(ids) for ids in tokens], room.lengths, room.prompts_per_call):
    members = [prompts[place] for place in piece.places]
    done += len(members)
    if all(f"{task.name}-{prompt.id}" in known for prompt in members):
      continue
    how = dict(key=draw.key, num_samples=draw.num_samples, law=draw.law, chain=draw.chain)
    written = write_piece(network, tokens, piece, room, **how)
    texts = texts_of(written, room.end_ids, tokenizer)
    yield done, make_pools(task, members, texts, written, task.score(members, texts, written), draw)


def texts_of(written: Written, end_ids: Sequence[int], tokenizer: Any) -> list[str | None]:
  """Returns the text of each response without its end; None where the model's law broke (NaN)."""
  texts: list[str | None] = []
  for tokens_N, length, finish in zip(written.tokens_RN, written.lengths_R, written.finish_R):
    tokens = tokens_N[:length].tolist()
    tokens = tokens[:-1] if tokens and tokens[-1] in end_ids else tokens
    texts.append(None if finish == BROKEN else tokenizer.decode(tokens))
  return texts


def make_pools(
  task: Task,
  prompts: Sequence[TaskPrompt],
  texts: Sequence[str | None],
  written: Written,
  scored: Scored,
  draw: Draw,
) -> list[Pool]:
  """Returns the pools of prompts; `extras` of a sample hold the setting of every token."""
  pools = []
  for place, prompt in enumerate(prompts):
    rows = range(place * draw.num_samples, (place + 1) * draw.num_samples)
    samples = tuple(_sample(index, row, texts[row], written, scored) for index, row in enumerate(rows))
    pools.append(
      Pool(
        id=f"{task.name}-{prompt.id}",
        prompt=prompt.prompt,
        samples=samples,
        reference=prompt.reference,
        prompt_tokens=prompt.tokens,
        chain=draw.chain,
        model=draw.model,
        seed=draw.seed,
      )
    )
  return pools


def _sample(index: int, row: int, text: str | None, written: Written, scored: Scored) -> PoolSample:
  length = int(written.lengths_R[row])
  score, quality = map(float, scored.scores_R2[row])
  details: dict[str, Any] = {} if np.isnan(quality) else {"quality": quality}
  if scored.answers_R[row] is not None:
    details["answer"] = scored.answers_R[row]
  if scored.reasons_R[row]:
    details["reason"] = scored.reasons_R[row]
  choices = () if written.choices_RN is None else written.choices_RN[row, :length].tolist()
  return PoolSample(
    index,
    text=text,
    tokens=tuple(written.tokens_RN[row, :length].tolist()),
    log_probs=None if text is None else tuple(written.log_probs_RN[row, :length].tolist()),
    transformed_log_probs=None
    if text is None
    else tuple(written.transformed_log_probs_RN[row, :length].tolist()),
    finish_reason=FINISH_REASONS[int(written.finish_R[row])],
    score=None if np.isnan(score) else score,
    details=details,
    extras={"choices": choices} if choices else {},
  )


def scores_of(pools: Sequence[Pool]) -> np.ndarray:
  """Returns float64 [P, N, 2], reward and quality; NaN where there is none."""
  return np.asarray(
    [
      [(_or_nan(sample.score), _or_nan(sample.details.get("quality"))) for sample in pool.samples]
      for pool in pools
    ],
    np.float64,
  )


def _or_nan(value: float | None) -> float:
  return np.nan if value is None else value


def choices_of(pools: Sequence[Pool], length: int) -> np.ndarray:
  """Returns int32 [P * N, length], the setting that each token was drawn with; -1 behind the end."""
  rows = [sample.extras.get("choices", ()) for pool in pools for sample in pool.samples]
  choices_RN = np.full((len(rows), length), -1, np.int32)
  for row, choices in enumerate(rows):
    choices_RN[row, : len(choices)] = choices
  return choices_RN


def answers_of(pools: Sequence[Pool]) -> list[list[str | None]]:
  """Returns the final answers that were found, by prompt and response; None where there is none."""
  return [[sample.details.get("answer") for sample in pool.samples] for pool in pools]
