"""Sampling, scoring and training in turns: the one driver of offline, iterative and online learning.

A round draws pools of responses from the policy as it is at that moment, scores them,
makes pairs, and trains on these for some steps. What is called

- offline is one round as long as the run,
- iterative is a few long rounds (arXiv 2404.19733),
- online is a round a step, semi-online one every few steps (arXiv 2402.04792),

so one number, `steps_per_round`, chooses. The loop trains as ever: `RoundBatches` is
data that asks the loop for the parameters at the beginning of a round. They go to the
sampler on the devices where they lie. Pools are records on disk with their
log-probabilities, chain and the fingerprint of the parameters that drew them; a run
that was killed finds them again.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nr.data.example_batches import padded_batches
from nr.data.examples import EncodedExample, EncodingReport
from nr.data.json_lines import LineAppender, json_line
from nr.data.pools import Pool, PoolSample, PoolWriter, read_pools
from nr.generators.protocol import Generator, Request, Sample, samples_by_request
from nr.judges.protocol import Item, Judge
from nr.recipes.round_examples import Prepared, with_columns
from nr.training.fingerprint import fingerprint
from nr.training.policy import Policy

PyTree = Any
Batch = dict[str, np.ndarray]


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

  A file that other parameters wrote is moved aside, never mixed in.

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
  _set_aside_if_other(path, model, spec, {prompt.id for prompt in prompts})
  with PoolWriter(path) as writer:
    for start in range(0, len(prompts), spec.prompts_per_write):
      together = prompts[start : start + spec.prompts_per_write]
      owed = {prompt.id for prompt in together if writer.missing(prompt.id, spec.num_samples, round)}
      # Drawn together again even if a few are owed: batches of another shape round differently.
      for pool in _draw(together, generator, judge, spec, round, model) if owed else ():
        if pool.id in owed:
          writer.append(pool)
  by_id = {pool.id: pool for pool in read_pools(path)}
  return [by_id[prompt.id] for prompt in prompts]


def _set_aside_if_other(path: pathlib.Path, model: str, spec: RoundSpec, ids: set[str]) -> None:
  if not path.exists():
    return
  pools = read_pools(path)
  wanted = model, spec.chain, spec.num_samples
  if all(pool.id in ids and (pool.model, pool.chain, len(pool.samples)) == wanted for pool in pools):
    return
  number = len(list(path.parent.glob(f"{path.stem}.other*.jsonl")))
  aside = path.with_name(f"{path.stem}.other{number}.jsonl")
  path.rename(aside)
  logging.warning("%s was drawn by other parameters or in another way: kept as %s", path, aside.name)


def _draw(
  prompts: Sequence[PoolPrompt], generator: Generator, judge: Judge, spec: RoundSpec, round: int, model: str
) -> Iterator[Pool]:
  # The round is part of the seed: the same prompt is answered with other noise in the next.
  seed = int.from_bytes(hashlib.sha256(f"{spec.seed}/{round}".encode()).digest()[:4], "big") >> 1
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


class RoundBatches:
  """Batches of examples that the policy under training makes for itself; data for `nr.training.loop.train`.

  Args:
    directory: gets a file of pools a round, and rounds.jsonl with what each came to.
    policy: what is trained.
    generator: the policy's sampler: with `with_params(params, model=...)`, such as
      `nr.generators.in_process.InProcess`.
    judge: scores responses.
    prompts: to draw pools for.
    prepare: (pools, most tokens of an example) -> examples; see `nr.recipes.round_examples`.
    spec: how rounds go.
    batch_size: examples a batch.
    lengths: lengths that a batch may have, growing; an example that fits none is left out
      and counted. One length keeps the order of the examples.

  Raises:
    ValueError: no prompts, or several processes (which are not supported).
  """

  def __init__(
    self,
    directory: pathlib.Path,
    policy: Policy,
    generator: Any,
    judge: Judge,
    prompts: Sequence[PoolPrompt],
    prepare: Callable[[list[Pool], int], Prepared],
    spec: RoundSpec,
    batch_size: int,
    lengths: Sequence[int],
  ):
    if not prompts:
      raise ValueError("prompts: there are none; give at least one")
    if jax.process_count() > 1:
      raise ValueError(
        f"{jax.process_count()} processes: rounds drive one process (with all its devices); draw the pools "
        "in a run of their own and train on the pairs, or use one host"
      )
    self.directory, self.policy, self.generator, self.judge = directory, policy, generator, judge
    self.prompts, self.prepare, self.spec = list(prompts), prepare, spec
    self.batch_size, self.lengths = batch_size, tuple(lengths)
    self._assemble = jax.jit(policy.assemble)
    directory.mkdir(parents=True, exist_ok=True)

  def __iter__(self) -> "RoundIterator":
    return RoundIterator(self)

  def path(self, round: int) -> pathlib.Path:
    """Returns the file of a round's pools."""
    return self.directory / f"round_{round:05d}.jsonl"

  def open_round(self, round: int, params: PyTree | None) -> Iterator[Batch]:
    """Draws the pools of a round (or finds them) and returns its batches.

    Args:
      round: its number.
      params: the trained tree at its beginning; None where the run goes on in the middle
        of a round, whose pools must then be there.

    Raises:
      ValueError: pools that must be there are not complete.
    """
    began = time.monotonic()
    prompts = prompts_of_round(self.prompts, self.spec, round)
    if params is None:
      pools = self._complete_pools(round, prompts)
    else:
      name, is_new = fingerprint(params), not self.path(round).exists()
      generator = self.generator.with_params(self._assemble(params, self.policy.fixed), model=name)
      pools = draw_pools(self.path(round), prompts, generator, self.judge, self.spec, round, name)
    _require_some_text(round, pools)
    prepared = self.prepare(pools, self.lengths[-1])
    if params is not None:
      self._note(round, pools, prepared.report, time.monotonic() - began if is_new else None)
    return self._batches(round, prepared)

  def _complete_pools(self, round: int, prompts: list[PoolPrompt]) -> list[Pool]:
    path = self.path(round)
    found = {pool.id: pool for pool in read_pools(path)} if path.exists() else {}
    if any(len(found.get(prompt.id, Pool("", "")).samples) < self.spec.num_samples for prompt in prompts):
      raise ValueError(
        f"{path}: the run goes on in the middle of round {round} and its pools are not all there; restore the "
        f"file, or go back to a checkpoint of step {round * self.spec.steps_per_round} or earlier"
      )
    return [found[prompt.id] for prompt in prompts]

  def _batches(self, round: int, prepared: Prepared) -> Iterator[Batch]:
    given, steps, examples = 0, self.spec.steps_per_round, prepared.examples
    if examples:
      epochs = None if self.spec.is_repeated else 1
      batches = padded_batches(examples, self.batch_size, self.lengths, self._seed(round), epochs)
      for batch in itertools.islice(batches, steps):
        given += 1
        yield with_columns(batch, prepared.columns)
    for _ in range(given, steps):
      yield with_columns(self._empty(prepared), prepared.columns)

  def _empty(self, prepared: Prepared) -> Batch:
    """Returns a batch without an example.

    A step on it has no gradient; momentum and weight decay act as ever, as they do in the
    authors' code of DivPO, which multiplies the loss of such a step by 0.
    """
    nothing = np.zeros(2, np.int32), np.zeros(2, bool)
    sides = prepared.num_sequences
    example = EncodedExample("none", (nothing[0],) * sides, (nothing[1],) * sides, 0.0)
    batch = next(iter(padded_batches([example], self.batch_size, self.lengths[-1:], None, 1)))
    return {**batch, "indices": np.full_like(batch["indices"], -1)}

  def _seed(self, round: int) -> int | None:
    if not self.spec.is_repeated:
      return None
    return int(np.random.SeedSequence([self.spec.seed, round]).generate_state(1)[0])

  def _note(self, round: int, pools: list[Pool], report: EncodingReport, seconds: float | None) -> None:
    """Appends what a round came to; seconds are None where pools of an earlier attempt were there."""
    samples = [sample for pool in pools for sample in pool.samples]
    scores = [sample.score for sample in samples if sample.score is not None]
    lengths = [len(sample.tokens) for sample in samples if sample.tokens is not None]
    row = {
      "round": round,
      "pools": len(pools),
      "samples": len(samples),
      "unscored": len(samples) - len(scores),
      "mean_score": float(np.mean(scores)) if scores else None,
      "mean_tokens": float(np.mean(lengths)) if lengths else None,
      "examples": report.kept,
      "left_out": {reason: len(ids) for reason, ids in report.dropped.items()},
      "empty_steps": self._empty_steps(report.kept),
      "seconds": None if seconds is None else float(np.round(seconds, 3)),
    }
    notes = LineAppender(self.directory / "rounds.jsonl")  # takes off what a kill left of a line
    notes.append(json_line(row, "rounds.jsonl"))
    notes.close()

  def _empty_steps(self, examples: int) -> int:
    """Returns how many steps of a round find no example left."""
    if examples and self.spec.is_repeated:
      return 0
    return max(0, self.spec.steps_per_round - -(-examples // self.batch_size))


def _require_some_text(round: int, pools: list[Pool]) -> None:
  """Raises ValueError where every sample of a round failed: nothing could ever be learnt."""
  samples = [sample for pool in pools for sample in pool.samples]
  if samples and all(sample.text is None for sample in samples):
    reason = samples[0].details.get("reason", "no reason was given")
    raise ValueError(f"round {round}: all {len(samples)} samples failed; the first: {reason}")


def read_notes(directory: pathlib.Path) -> list[dict[str, Any]]:
  """Returns what every round came to: of several notes the latest, with the seconds of the first."""
  found: dict[int, dict[str, Any]] = {}
  for line in (directory / "rounds.jsonl").read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    earlier = found.get(row["round"], row)
    found[row["round"]] = {
      **row,
      "seconds": row["seconds"] if row["seconds"] is not None else earlier["seconds"],
    }
  return [found[number] for number in sorted(found)]


class RoundIterator(Iterator[Batch]):
  """Goes through the rounds; `train` shows it the parameters before every batch."""

  def __init__(self, batches: RoundBatches):
    self._rounds, self._step, self._left = batches, 0, None

  def receive(self, step: int, params: PyTree) -> None:
    """Opens a round where one begins; in the middle of one (after a resume) finds its batches again."""
    per_round = self._rounds.spec.steps_per_round
    round, done = divmod(step, per_round)
    if done == 0:
      self._left = self._rounds.open_round(round, params)
    elif self._left is None:
      self._left = self._rounds.open_round(round, None)
      for _ in range(done):
        next(self._left)
    self._step = step

  def __next__(self) -> Batch:
    if self._left is None:
      raise ValueError("no parameters were received: rounds are data for nr.training.loop.train")
    batch = next(self._left)
    self._step += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """Returns the number of batches given out."""
    return {"step": self._step}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a place that `get_state` returned; the round is opened by `receive`."""
    self._step, self._left = int(state["step"]), None
