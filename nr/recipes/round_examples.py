"""From the pools of a round to what is learnt: pairs, labelled responses, groups, or accepted responses."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nr.data.example_batches import ExampleBatches, padded_batches
from nr.data.examples import EncodedExample, EncodingReport, LeftOut, LengthLimits, join
from nr.data.labelled_responses import ONE_KIND, has_both_kinds, join_group
from nr.data.pools import Pool, PoolSample
from nr.data.preferences import PreferencePair
from nr.data.unpaired_batches import unpaired_batches
from nr.objectives.group_relative import GroupRelativeSpec, group_advantages

Batch = dict[str, np.ndarray]


class Prepared(NamedTuple):
  """Pools made ready to be learnt from.

  Attributes:
    examples: pairs, or single responses.
    report: what was left out, and why.
    num_sequences: of an example: 2 for pairs, 1 for single responses, as many as a pool has
      for groups.
    columns: further fields of the batches, [examples, ...]: row i belongs to example i;
      with an axis of tokens they are aligned with the targets and padded with 0.
    num_labels: of an example: 1 for labelled responses, as many as sequences for groups.
    make_batches: (examples, batch size, lengths, seed, epochs) -> batches.
  """

  examples: list[EncodedExample]
  report: EncodingReport
  num_sequences: int = 2
  columns: Mapping[str, np.ndarray] = {}
  num_labels: int = 0
  make_batches: Callable[..., ExampleBatches] = padded_batches


class _SampledText:
  """The format of examples that come as tokens: nothing is encoded and nothing shortened."""

  begin_ids: tuple[int, ...] = ()
  end_id = -1


def sampled_example(
  id: str,
  prompt: Sequence[int],
  responses: Sequence[Sequence[int]],
  weight: float,
  limits: LengthLimits,
  report: EncodingReport,
) -> EncodedExample | None:
  """Returns sampled responses with their prompt; None, and why in the report, of what cannot be used.

  Nothing is cut: a response to half a prompt is not what was sampled.
  """
  report.total += 1
  try:
    if len(responses) == 2 and list(responses[0]) == list(responses[1]):
      raise LeftOut("identical responses")
    sides = [list(response) for response in responses]
    if not all(sides):
      raise LeftOut("empty response")
    example = join(id, list(prompt), sides, weight, _SampledText(), limits, report)
  except LeftOut as reason:
    report.dropped[str(reason)].append(id)
    return None
  report.kept += 1
  return example


def pairs_of(
  make_pairs: Callable[[list[Pool]], list[PreferencePair]],
) -> Callable[[list[Pool], int], Prepared]:
  """Returns how pools become pairs.

  Args:
    make_pairs: pools -> pairs with prompt_tokens, chosen_tokens and rejected_tokens.
  """

  def prepare(pools: list[Pool], max_length: int) -> Prepared:
    report, limits = EncodingReport(), LengthLimits(max_length, when_long="drop")
    found = [
      sampled_example(
        pair.id, pair.prompt_tokens, (pair.chosen_tokens, pair.rejected_tokens), pair.weight, limits, report
      )
      for pair in make_pairs(pools)
    ]
    return Prepared([example for example in found if example is not None], report)

  return prepare


def groups_of(
  spec: GroupRelativeSpec, make_rewards: Callable[[list[Pool]], np.ndarray] | None = None
) -> Callable[[list[Pool], int], Prepared]:
  """Returns how pools become single responses with advantages, for GRPO and its variants.

  Args:
    spec: how rewards become advantages.
    make_rewards: pools -> rewards [B, G], NaN for what has none; None: the judge's scores.
  """
  make_rewards = make_rewards or scores_of

  def prepare(pools: list[Pool], max_length: int) -> Prepared:
    report, limits = EncodingReport(), LengthLimits(max_length, when_long="drop")
    rewards_BG = make_rewards(pools)
    advantages_BG = np.asarray(group_advantages(spec, np.nan_to_num(rewards_BG), np.isfinite(rewards_BG)))
    examples, advantages, log_probs = [], [], []
    for pool, rewards_G, advantages_G in zip(pools, rewards_BG, advantages_BG):
      for sample, reward, advantage in zip(pool.samples, rewards_G, advantages_G):
        if not np.isfinite(reward):
          continue
        id = f"{pool.id}/{sample.index}"
        example = sampled_example(id, pool.prompt_tokens, (sample.tokens,), 1.0, limits, report)
        if example is not None:
          row = np.zeros(max_length, np.float32)
          first = len(example.tokens[0]) - len(sample.tokens) - 1  # the last prompt token predicts the first
          row[first : first + len(sample.tokens)] = sample.log_probs
          examples.append(example)
          advantages.append(advantage)
          log_probs.append(row)
    columns = {
      "advantages": np.array(advantages, np.float32).reshape(len(examples)),
      "sampled_log_probs": np.array(log_probs, np.float32).reshape(len(examples), max_length),
    }
    return Prepared(examples, report, 1, columns)

  return prepare


def accepted_of(
  threshold: float,
  *,
  per_prompt: int = 0,
  is_distinct: bool = True,
  seed: int = 0,
) -> Callable[[list[Pool], int], Prepared]:
  """Returns how pools become responses to imitate: rejection-sampling fine-tuning.

  The batches are for `nr.training.next_token.next_token_method`. With one round this is RFT, with
  several STaR and ReST: what differs between them are these settings and the rounds.

  Args:
    threshold: responses with a score of at least this are kept; -inf and `per_prompt=1` keep
      the best of every pool (RAFT).
    per_prompt: most responses kept of a prompt, the best first, equals in random order; 0: all.
    is_distinct: whether a text is kept once a prompt.
    seed: of the order among equals.
  """

  def prepare(pools: list[Pool], max_length: int) -> Prepared:
    report, limits, examples = EncodingReport(), LengthLimits(max_length, when_long="drop"), []
    for pool in pools:
      for sample in _accepted(pool, threshold, per_prompt, is_distinct, seed):
        id = f"{pool.id}/{sample.index}"
        example = sampled_example(id, pool.prompt_tokens, (sample.tokens,), 1.0, limits, report)
        if example is not None:
          examples.append(example)
    return Prepared(examples, report, 1)

  return prepare


def _accepted(
  pool: Pool, threshold: float, per_prompt: int, is_distinct: bool, seed: int
) -> list[PoolSample]:
  draws = np.random.default_rng([seed, pool.round, *pool.id.encode()])
  scored = [sample for sample in pool.samples if sample.score is not None and sample.score >= threshold]
  order = draws.permutation(len(scored))
  ranked = sorted((scored[place] for place in order), key=lambda sample: -sample.score)
  if is_distinct:
    best: dict[str, PoolSample] = {}
    for sample in ranked:
      best.setdefault(sample.text, sample)
    ranked = list(best.values())
  return ranked[: per_prompt or None]


def labelled_of(threshold: float) -> Callable[[list[Pool], int], Prepared]:
  """Returns how pools become labelled responses, for `nr.training.unpaired.unpaired_preference_method` (KTO).

  Every response with a score is one. They come in turns, the first of every pool before the
  second of any: a batch then holds many prompts, which its mismatched sequences need.

  Args:
    threshold: responses with a score of at least this are desirable, the others are not.
  """

  def prepare(pools: list[Pool], max_length: int) -> Prepared:
    report = EncodingReport()
    labelled = [_labelled(pool, threshold, max_length, report) for pool in pools]
    turns = range(max(map(len, labelled), default=0))
    examples = [of_pool[turn] for turn in turns for of_pool in labelled if turn < len(of_pool)]
    return Prepared(examples, report, 1, num_labels=1, make_batches=unpaired_batches)

  return prepare


def contrasts_of(threshold: float) -> Callable[[list[Pool], int], Prepared]:
  """Returns how pools become groups, for `nr.training.unpaired.group_preference_method`.

  All good responses of a pool against all bad ones; pools of one kind teach nothing and are left out.

  Args:
    threshold: responses with a score of at least this are good, the others bad.
  """

  def prepare(pools: list[Pool], max_length: int) -> Prepared:
    report, examples = EncodingReport(), []
    size = max(len(pool.samples) for pool in pools)
    for pool in pools:
      members = _labelled(pool, threshold, max_length, report)
      if has_both_kinds(members):
        examples.append(join_group(pool.id, members, size))
      else:
        report.dropped[ONE_KIND] += [example.id for example in members]
    report.kept = len(examples)
    return Prepared(examples, report, size, num_labels=size)

  return prepare


def _labelled(pool: Pool, threshold: float, max_length: int, report: EncodingReport) -> list[EncodedExample]:
  """Returns the responses of a pool that have a score, each with its label."""
  limits, found = LengthLimits(max_length, when_long="drop"), []
  for sample in pool.samples:
    if sample.score is None:
      continue
    id = f"{pool.id}/{sample.index}"
    example = sampled_example(id, pool.prompt_tokens, (sample.tokens,), 1.0, limits, report)
    if example is not None:
      found.append(example._replace(labels=(sample.score >= threshold,)))
  return found


def scores_of(pools: list[Pool]) -> np.ndarray:
  """Returns the scores of pools [B, G] float32, NaN where there is none."""
  size = max(len(pool.samples) for pool in pools)
  scores_BG = np.full((len(pools), size), np.nan, np.float32)
  for row, pool in enumerate(pools):
    for place, sample in enumerate(pool.samples):
      if sample.score is not None:
        scores_BG[row, place] = sample.score
  return scores_BG


def with_columns(batch: Batch, columns: Mapping[str, np.ndarray]) -> Batch:
  """Returns a batch of single responses with the rows of columns that belong to its examples, 0 elsewhere."""
  found = dict(batch)
  for name, values in columns.items():
    indices_R = batch["indices"][:, 0]
    rows = np.zeros((len(indices_R), *values.shape[1:]), values.dtype)
    rows[indices_R >= 0] = values[indices_R[indices_R >= 0]]
    found[name] = rows[:, : batch["tokens"].shape[-1]] if values.ndim > 1 else rows
  return found
