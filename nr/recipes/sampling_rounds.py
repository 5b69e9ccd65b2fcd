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

import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nr.data.examples import EncodedExample, EncodingReport
from nr.data.json_lines import LineAppender, json_line
from nr.data.pools import Pool, read_pools
from nr.judges.protocol import Judge
from nr.recipes.round_examples import Prepared, with_columns
from nr.recipes.round_pools import (
  PoolPrompt,
  RoundSpec,
  draw_missing_pools,
  draw_pools,
  drawn_as_asked,
  prompts_of_round,
)
from nr.training.fingerprint import fingerprint
from nr.training.policy import Policy

__all__ = [
  "PoolPrompt",
  "RoundBatches",
  "RoundIterator",
  "RoundSpec",
  "draw_pools",
  "prompts_of_round",
  "read_notes",
]

PyTree = Any
Batch = dict[str, np.ndarray]


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
    # The step before may still run: its time is training's, and sampling has to wait for it anyway.
    jax.block_until_ready(params)
    began = time.monotonic()
    prompts = prompts_of_round(self.prompts, self.spec, round)
    if params is None:
      pools = self._complete_pools(round, prompts)
    else:
      name = fingerprint(params)
      generator = self.generator.with_params(self._assemble(params, self.policy.fixed), model=name)
      pools, num_found = draw_missing_pools(
        self.path(round), prompts, generator, self.judge, self.spec, round, name
      )
    _require_some_text(round, pools)
    prepared = self.prepare(pools, self.lengths[-1])
    if params is not None:
      self._note(round, pools, prepared.report, None if num_found else time.monotonic() - began)
    return self._batches(round, prepared)

  def _complete_pools(self, round: int, prompts: list[PoolPrompt]) -> list[Pool]:
    path = self.path(round)
    pools = read_pools(path) if path.exists() else []
    found = drawn_as_asked(pools, prompts, self.spec, round)
    if any(prompt.id not in found for prompt in prompts):
      raise ValueError(
        f"{path}: the run goes on in the middle of round {round} and its pools are not all there, or were drawn in "
        f"another way; restore the file and the settings, or go back to a checkpoint of step "
        f"{round * self.spec.steps_per_round} or earlier"
      )
    return [found[prompt.id] for prompt in prompts]

  def _batches(self, round: int, prepared: Prepared) -> Iterator[Batch]:
    given, steps, examples = 0, self.spec.steps_per_round, prepared.examples
    if examples:
      epochs = None if self.spec.is_repeated else 1
      batches = prepared.make_batches(examples, self.batch_size, self.lengths, self._seed(round), epochs)
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
    sides, labels = prepared.num_sequences, (False,) * prepared.num_labels
    example = EncodedExample("none", (nothing[0],) * sides, (nothing[1],) * sides, 0.0, labels)
    batch = next(iter(prepared.make_batches([example], self.batch_size, self.lengths[-1:], None, 1)))
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
      "model": pools[0].model,
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
  """Returns what every round came to: of several notes the latest, with the seconds in which its pools were drawn.

  A run that begins again in front of a round notes it again. The seconds are None where the
  pools were drawn in more than one attempt.
  """
  found: dict[int, dict[str, Any]] = {}
  for line in (directory / "rounds.jsonl").read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    earlier = found.get(row["round"])
    if row["seconds"] is None and earlier is not None and earlier.get("model") == row.get("model"):
      row["seconds"] = earlier["seconds"]
    found[row["round"]] = row
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
    """Returns the number of batches given out, and how many a round has."""
    return {"step": self._step, "steps_per_round": self._rounds.spec.steps_per_round}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a place that `get_state` returned; the round is opened by `receive`.

    Raises:
      ValueError: rounds were of another length: the place would lie in another round.
    """
    now = self._rounds.spec.steps_per_round
    before = int(state.get("steps_per_round", now))
    if before != now:
      raise ValueError(
        f"steps_per_round={now}: the checkpoint was made with {before}; restore the old value, or begin in "
        "another workdir"
      )
    self._step, self._left = int(state["step"]), None
