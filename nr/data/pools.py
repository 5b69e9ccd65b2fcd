"""Pools: many sampled responses to one prompt, with their scores, as JSON lines.

A file of pools is appended to while sampling goes on, so a pool may stand on several
lines, each with further samples; the reader joins them. After a kill the sampler asks
`PoolWriter.missing` what it still owes.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from nr.data.bad_records import DataError, Quarantine
from nr.data.json_lines import LineAppender, json_line, read_json_lines, write_json_lines
from nr.data.preferences import Prompt, as_tokens, freeze_prompt, prompt_problem, tokens_problem
from nr.data.records import problem_of

SCHEMA = {
  "id": "str",
  "prompt": "object",
  "reference": "object?",
  "prompt_tokens": "list[int]?",
  "round": "int?",
  "chain": "str?",
  "model": "str?",
  "seed": "int?",
  "samples": "list[object]",
}
SAMPLE_SCHEMA = {
  "index": "int",
  "text": "str?",
  "tokens": "list[int]?",
  "log_probs": "list[float]?",
  "transformed_log_probs": "list[float]?",
  "finish_reason": "str?",
  "score": "float?",
  "details": "object?",
  "extras": "object?",
}


class PoolSample(NamedTuple):
  """One response of a pool.

  Attributes:
    index: its number among the samples of the prompt, from 0.
    text: the response; None where sampling failed or only tokens are kept.
    tokens: ids as sampled, end of text included where it was sampled.
    log_probs: nats a token under the model itself, temperature 1.
    transformed_log_probs: nats a token under what was sampled from.
    finish_reason: why it ended; "" where unknown.
    score: by a judge; None: not judged, or could not be.
    details: what the judge says beyond the score.
    extras: anything else JSON holds.
  """

  index: int
  text: str | None = None
  tokens: tuple[int, ...] | None = None
  log_probs: tuple[float, ...] | None = None
  transformed_log_probs: tuple[float, ...] | None = None
  finish_reason: str = ""
  score: float | None = None
  details: Mapping[str, Any] = {}
  extras: Mapping[str, Any] = {}


class Pool(NamedTuple):
  """A prompt with its samples.

  Attributes:
    id: of the prompt.
    prompt: text or messages.
    samples: in the order of their indices.
    reference: what a judge compares with (an answer); any JSON value.
    prompt_tokens: ids of the prompt as the model read it.
    round: of iterated training; pools of other rounds are other pools.
    chain: transforms of the logits, in text form.
    model: fingerprint or name of the sampler.
    seed: of the sampling.
  """

  id: str
  prompt: Prompt
  samples: tuple[PoolSample, ...] = ()
  reference: Any = None
  prompt_tokens: tuple[int, ...] | None = None
  round: int = 0
  chain: str = ""
  model: str = ""
  seed: int = 0


def _sample_problem(sample: Any) -> tuple[str, str] | None:
  found = problem_of(sample, SAMPLE_SCHEMA)
  if found is None:
    found = tokens_problem(sample, "tokens")
  if found is None and sample["index"] < 0:
    found = "index", "is negative"
  if found is None:
    count = len(sample.get("tokens") or ())
    for name in ("log_probs", "transformed_log_probs"):
      values = sample.get(name)
      if values is not None and sample.get("tokens") is not None and len(values) != count:
        found = name, f"has {len(values)} entries for {count} tokens"
  return found


def _pool_problem(record: Mapping[str, Any]) -> tuple[str, str] | None:
  problem = prompt_problem(record["prompt"])
  if problem:
    return "prompt", problem
  indices = set()
  for place, sample in enumerate(record["samples"]):
    found = _sample_problem(sample)
    if found:
      field, problem = found
      return f"samples[{place}]" + (f".{field}" if field else ""), problem
    if sample["index"] in indices:
      return f"samples[{place}].index", f"{sample['index']} occurs twice"
    indices.add(sample["index"])
  return tokens_problem(record, "prompt_tokens")


def _clash(first: Pool, more: Pool) -> tuple[str, str] | None:
  """Says what keeps two lines from being one pool."""
  for name in Pool._fields:
    if name != "samples" and getattr(first, name) != getattr(more, name):
      return name, f"is not what an earlier line of pool {first.id!r}, round {first.round}, says"
  known = {sample.index for sample in first.samples}
  repeated = [sample.index for sample in more.samples if sample.index in known]
  return (
    ("samples", f"sample {repeated[0]} of pool {first.id!r} stands on an earlier line") if repeated else None
  )


def _pool_from(record: Mapping[str, Any]) -> Pool:
  values = {name: value for name, value in record.items() if value is not None}
  values["prompt"] = freeze_prompt(values["prompt"])
  values["prompt_tokens"] = as_tokens(values.get("prompt_tokens"))
  samples = []
  for sample in values["samples"]:
    fields = {name: value for name, value in sample.items() if value is not None}
    for name in ("tokens", "log_probs", "transformed_log_probs"):
      fields[name] = None if fields.get(name) is None else tuple(fields[name])
    samples.append(PoolSample(**fields))
  values["samples"] = tuple(samples)
  return Pool(**values)


def _record_of(pool: Pool, path: Any) -> dict[str, Any]:
  """Returns the JSON record of a pool, with what is empty left out. Raises DataError for a bad one."""
  record = {name: value for name, value in pool._asdict().items() if value is not None}
  if not isinstance(pool.prompt, str) and not prompt_problem(pool.prompt):
    record["prompt"] = [dict(message) for message in pool.prompt]
  if pool.prompt_tokens is not None:
    record["prompt_tokens"] = list(pool.prompt_tokens)
  samples = []
  for sample in pool.samples:
    fields = {name: value for name, value in sample._asdict().items() if value not in (None, {})}
    samples.append({name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()})
  record["samples"] = samples
  found = problem_of(record, SCHEMA) or _pool_problem(record)
  if found:
    raise DataError(f"{path}, pool {pool.id!r}, field {found[0]!r}: {found[1]}; correct the pool")
  return record


def read_pools(
  path: str | pathlib.Path, *, on_bad_record: str = "raise", quarantine_path: str | pathlib.Path | None = None
) -> list[Pool]:
  """Reads a file of pools; lines of one id and round are joined, in the order of the first of them.

  A last line that a kill cut in half is left out, with a warning that names it.

  Args:
    path: JSON lines.
    on_bad_record: "raise", or "quarantine": bad lines are written to `quarantine_path` and counted.
    quarantine_path: JSON lines file for the bad ones.

  Raises:
    DataError: no such file, or a bad line, named by file, line and field; also a line
      that contradicts an earlier one of its pool or repeats a sample.
  """
  pools: dict[tuple[str, int], Pool] = {}
  quarantine = Quarantine(on_bad_record, quarantine_path)

  def check(record: dict[str, Any]) -> tuple[str, str] | None:
    found = _pool_problem(record)
    if found:
      return found
    more = _pool_from(record)
    first = pools.get((more.id, more.round))
    return _clash(first, more) if first else None

  for _, record in read_json_lines(path, SCHEMA, quarantine, check, may_end_in_half_a_line=True):
    more = _pool_from(record)
    _join(pools, more)
  return list(pools.values())


def _join(pools: dict[tuple[str, int], Pool], more: Pool) -> None:
  """Adds the samples of `more` to its pool."""
  first = pools.get((more.id, more.round))
  samples = more.samples if first is None else first.samples + more.samples
  pools[more.id, more.round] = more._replace(samples=tuple(sorted(samples, key=lambda sample: sample.index)))


def write_pools(path: str | pathlib.Path, pools: Iterable[Pool]) -> None:
  """Writes pools one a line, whole or not at all (to add scores, for one).

  Raises:
    DataError: a pool that cannot be written, named by id and field.
  """
  write_json_lines(path, (json_line(_record_of(pool, path), f"{path}, pool {pool.id!r}") for pool in pools))


class PoolWriter:
  """Appends pools to a file, each line on disk before the next; one writer a file.

  Args:
    path: the file; made when missing, gone on with when there.

  Raises:
    DataError: a bad line in what is there already.
  """

  def __init__(self, path: str | pathlib.Path):
    self._appender = LineAppender(path)  # takes a cut last line off first
    self._pools: dict[tuple[str, int], Pool] = {}
    self._indices: dict[tuple[str, int], set[int]] = {}
    for pool in read_pools(path):
      self._note(pool)

  def _note(self, pool: Pool) -> None:
    key = pool.id, pool.round
    self._pools.setdefault(key, pool._replace(samples=()))
    self._indices.setdefault(key, set()).update(sample.index for sample in pool.samples)

  def has(self, id: str, index: int, round: int = 0) -> bool:
    """Says whether a sample is in the file."""
    return index in self._indices.get((id, round), ())

  def missing(self, id: str, count: int, round: int = 0) -> list[int]:
    """Returns which of the samples 0 .. count - 1 are not in the file."""
    return [index for index in range(count) if not self.has(id, index, round)]

  def append(self, pool: Pool) -> None:
    """Writes one line; it is on disk when this returns.

    Raises:
      DataError: a sample that is there already, or a line that contradicts an earlier
        one of its pool; nothing is written.
    """
    self.extend([pool])

  def extend(self, pools: Sequence[Pool]) -> None:
    """Writes a line a pool, different pools all; they are on disk when this returns. Errors as in `append`."""
    checked = [self._checked(pool) for pool in pools]
    self._appender.append("".join(line for line, _ in checked))
    for _, pool in checked:
      self._note(pool)

  def _checked(self, pool: Pool) -> tuple[str, Pool]:
    """Returns the line of a pool that the file can take, and what reading it would give."""
    record = _record_of(pool, self._appender.path)
    first, read = self._pools.get((pool.id, pool.round)), _pool_from(record)
    known = [PoolSample(index) for index in self._indices.get((pool.id, pool.round), ())]
    found = _clash(first._replace(samples=tuple(known)), read) if first else None
    if found:
      raise DataError(
        f"{self._appender.path}, pool {pool.id!r}, field {found[0]!r}: {found[1]}; give another id"
      )
    return json_line(record, f"{self._appender.path}, pool {pool.id!r}"), read

  def close(self) -> None:
    """Closes the file."""
    self._appender.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()
