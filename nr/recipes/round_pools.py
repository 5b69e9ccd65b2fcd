"""The pools of a round on disk: which prompts it asks, what is drawn and scored, what an earlier attempt left."""

import dataclasses
import hashlib
import itertools
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nr.data.pools import Pool, PoolSample, PoolWriter, read_pools
from nr.data.preferences import freeze_prompt
from nr.generators.protocol import Generator, Request, Sample, samples_by_request
from nr.judges.protocol import Item, Judge


class PoolPrompt(NamedTuple):
  """A prompt to draw pools for.

  Attributes:
    id: unique among the prompts.
    prompt: text, or messages.
    reference: what the judge compares with; any JSON value.
  """

  id: str
  prompt: Any
  reference: Any = None


@dataclasses.dataclass(frozen=True)
class RoundSpec:
  """How rounds go.

  Attributes:
    steps_per_round: training steps on the pools of a round.
    prompts_per_round: prompts whose pools a round draws.
    num_samples: responses of a prompt.
    max_new_tokens: most tokens of a response.
    chain: transforms of the logits while sampling, as text; "" is the policy's own law.
    seed: of the prompts' order, the samples and the pairs' order.
    is_repeated: whether the pairs of a round are gone through again, shuffled anew, until
      its steps are done (offline and iterative); else once, in order, and slots without a
      pair count nothing (online).
    prompts_per_write: prompts that are drawn and scored together and then written; a kill
      loses at most these.

  Raises:
    ValueError: a number below 1.
  """

  steps_per_round: int
  prompts_per_round: int
  num_samples: int
  max_new_tokens: int
  chain: str = ""
  seed: int = 0
  is_repeated: bool = False
  prompts_per_write: int = 64

  def __post_init__(self):
    for field in (
      "steps_per_round", "prompts_per_round", "num_samples", "max_new_tokens", "prompts_per_write",
    ):  # fmt: skip
      if getattr(self, field) < 1:
        raise ValueError(f"{field}={getattr(self, field)}: give at least 1")


def prompts_of_round(prompts: Sequence[PoolPrompt], spec: RoundSpec, round: int) -> list[PoolPrompt]:
  """Returns the prompts of a round: all of them in shuffled order, again and again.

  Each gets an id of its own, "<id>/<pass>", for a prompt may come more than once.
  """
  found, first = [], round * spec.prompts_per_round
  for place in range(first, first + spec.prompts_per_round):
    epoch, index = divmod(place, len(prompts))
    order = np.random.default_rng([spec.seed, epoch]).permutation(len(prompts))
    prompt = prompts[int(order[index])]
    found.append(prompt._replace(id=f"{prompt.id}/{epoch}"))
  return found


class Drawn(NamedTuple):
  """The pools of a round.

  Attributes:
    pools: one a prompt, in the order of the prompts.
    num_found: how many of them stood in the file already.
  """

  pools: list[Pool]
  num_found: int


def draw_pools(
  path: pathlib.Path,
  prompts: Sequence[PoolPrompt],
  generator: Generator,
  judge: Judge,
  spec: RoundSpec,
  round: int,
  model: str,
) -> list[Pool]:
  """Draws and scores the pools of a round; those that the file holds already are not drawn again.

  A file that other parameters wrote, or for other prompts, is moved aside, never mixed in.

  Args:
    path: JSON lines file of the round.
    prompts: of this round.
    generator: draws the responses.
    judge: scores them; what cannot be judged keeps the score None.
    spec: how many, how long, by which law.
    round: number of the round.
    model: fingerprint of the parameters.

  Returns:
    One pool a prompt, in the order of the prompts.
  """
  return draw_missing_pools(path, prompts, generator, judge, spec, round, model).pools


def draw_missing_pools(
  path: pathlib.Path,
  prompts: Sequence[PoolPrompt],
  generator: Generator,
  judge: Judge,
  spec: RoundSpec,
  round: int,
  model: str,
) -> Drawn:
  """Does what `draw_pools` does, and says how many pools it found."""
  _set_aside_if_other(path, prompts, spec, round, model)
  with PoolWriter(path) as writer:
    num_found = sum(not writer.missing(prompt.id, spec.num_samples, round) for prompt in prompts)
    for start in range(0, len(prompts), spec.prompts_per_write):
      together = prompts[start : start + spec.prompts_per_write]
      owed = {prompt.id for prompt in together if writer.missing(prompt.id, spec.num_samples, round)}
      # Drawn together again even if a few are owed: batches of another shape round differently.
      for pool in _draw(together, generator, judge, spec, round, model) if owed else ():
        if pool.id in owed:
          writer.append(pool)
  by_id = {pool.id: pool for pool in read_pools(path)}
  return Drawn([by_id[prompt.id] for prompt in prompts], num_found)


def _set_aside_if_other(
  path: pathlib.Path, prompts: Sequence[PoolPrompt], spec: RoundSpec, round: int, model: str
) -> None:
  if not path.exists():
    return
  pools = read_pools(path)
  asked = drawn_as_asked(pools, prompts, spec, round)
  if len(asked) == len(pools) and all(pool.model == model for pool in pools):
    return
  # The first free name: counting the files would write over one where another was removed.
  names = (path.with_name(f"{path.stem}.other{number}.jsonl") for number in itertools.count())
  aside = next(name for name in names if not name.exists())
  path.rename(aside)
  logging.warning("%s was drawn by other parameters or in another way: kept as %s", path, aside.name)


def drawn_as_asked(
  pools: Sequence[Pool], prompts: Sequence[PoolPrompt], spec: RoundSpec, round: int
) -> dict[str, Pool]:
  """Returns by id the pools of these very prompts that were drawn whole, by this law and with this seed."""
  asked = {prompt.id: freeze_prompt(prompt.prompt) for prompt in prompts}
  wanted = spec.chain, _seed_of(spec, round), spec.num_samples
  return {
    pool.id: pool
    for pool in pools
    if asked.get(pool.id) == pool.prompt and (pool.chain, pool.seed, len(pool.samples)) == wanted
  }


def _seed_of(spec: RoundSpec, round: int) -> int:
  """Returns the seed of a round's samples: the same prompt is answered with other noise in the next."""
  return int.from_bytes(hashlib.sha256(f"{spec.seed}/{round}".encode()).digest()[:4], "big") >> 1


def _draw(
  prompts: Sequence[PoolPrompt], generator: Generator, judge: Judge, spec: RoundSpec, round: int, model: str
) -> Iterator[Pool]:
  seed = _seed_of(spec, round)
  requests = [
    Request(
      prompt.id,
      prompt.prompt,
      num_samples=spec.num_samples,
      max_new_tokens=spec.max_new_tokens,
      chain=spec.chain,
      seed=seed,
    )
    for prompt in prompts
  ]
  drawn = samples_by_request(requests, generator.generate(requests))
  scored = _scores(prompts, drawn, judge)
  for prompt, request, samples in zip(prompts, requests, drawn):
    yield Pool(
      id=prompt.id,
      prompt=prompt.prompt,
      samples=tuple(_record(sample, *scored[prompt.id, sample.index]) for sample in samples),
      reference=prompt.reference,
      prompt_tokens=tuple(generator.encode(request.prompt)) if hasattr(generator, "encode") else None,
      round=round,
      chain=spec.chain,
      model=model,
      seed=seed,
    )


def _scores(prompts: Sequence[PoolPrompt], drawn: list[list[Sample]], judge: Judge) -> dict:
  """Returns (score or None, details) by (prompt id, index); a sample that failed was never judged."""
  keys, items, found = [], [], {}
  for prompt, samples in zip(prompts, drawn):
    asked = prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1]["content"]
    for sample in samples:
      found[prompt.id, sample.index] = None, {"reason": sample.error}
      if sample.error is None:
        keys.append((prompt.id, sample.index))
        items.append(Item(f"{prompt.id}/{sample.index}", asked, sample.text, prompt.reference))
  for key, judged in zip(keys, judge.judge(items), strict=True):
    details = dict(judged.details)
    found[key] = judged.score, {**details, "reason": judged.reason} if judged.reason else details
  return found


def _record(sample: Sample, score: float | None, details: Mapping[str, Any]) -> PoolSample:
  return PoolSample(
    index=sample.index,
    text=sample.text,
    tokens=sample.tokens,
    log_probs=sample.log_probs,
    transformed_log_probs=sample.transformed_log_probs,
    finish_reason=sample.finish_reason,
    score=score,
    details=details,
    extras=dict(sample.extras),
  )
