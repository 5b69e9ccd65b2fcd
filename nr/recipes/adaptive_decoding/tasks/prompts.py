"""Tasks of a checkpoint: prompts from files, or written here, and the judges of what is answered."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from nr.data.examples import LeftOut
from nr.data.instructions import Instruction, InstructionFields, read_instructions
from nr.data.preferences import Prompt
from nr.data.sources import CorpusSpec, documents
from nr.judges.protocol import Item, Judge, Judgement
from nr.judges.verifiable import after
from nr.names import unknown
from nr.recipes.adaptive_decoding.sampling import Written
from nr.recipes.adaptive_decoding.tasks.judging import JudgeSpec, make_judge, opened
from nr.recipes.adaptive_decoding.tasks.problems import WRITTEN
from nr.recipes.adaptive_decoding.tasks.protocol import PARTS, Prompts, Scored, TaskPrompt
from nr.recipes.languages import Language
from nr.spec import Spec

SOURCES = ("file", *WRITTEN)
SLOT = "{prompt}"
SMALLEST_LENGTH = 32


@dataclasses.dataclass(frozen=True)
class PromptTaskSpec(Spec):
  """A task.

  Attributes:
    source: "file", or prompts that are written here: "arithmetic", "titles".
    train: file of the training prompts: JSON lines, a JSON list or Parquet with records, or text (.txt) with
      blank lines between documents; may be gzipped.
    test: file of the test prompts; "": a share of the training file, by hash.
    test_share: that share.
    prompt_field, reference_field, id_field: where a record holds what, as paths like "turns.0"; "": nowhere.
    reference_marker: only what stands behind the last of it is the reference; "": all.
    template: what the model is asked, with a slot {prompt}.
    judged_template: what judges see of it, with a slot {prompt}; "": what the model is asked.
    is_chat: whether the prompt is a user's turn of a chat; else the model goes on with it as text.
    first_tokens: only so many tokens of a prompt that is no chat are given, and shorter ones are left out; 0: all.
    max_prompt_tokens: longer prompts are left out.
    max_new_tokens: most tokens of a response, its end included.
    num_prompts, num_test_prompts: prompts of this task, where experiments are not to decide; 0: they do.
    judge: scores responses (fields of JudgeSpec).
    quality: scores that decide where the judge's tie; kind "": the judge's own.
  """

  source: str = "file"
  train: str = ""
  test: str = ""
  test_share: float = 0.2
  prompt_field: str = "prompt"
  reference_field: str = ""
  id_field: str = "id"
  reference_marker: str = ""
  template: str = SLOT
  judged_template: str = ""
  is_chat: bool = True
  first_tokens: int = 0
  max_prompt_tokens: int = 512
  max_new_tokens: int = 128
  num_prompts: int = 0
  num_test_prompts: int = 0
  judge: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  quality: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.source not in SOURCES:
      raise ValueError(unknown("source", self.source, SOURCES))
    for field in ("template", "judged_template"):
      text = getattr(self, field)
      if text.count(SLOT) != 1 and (text or field == "template"):
        raise ValueError(f"{field}={text!r}: it holds {SLOT} {text.count(SLOT)} times, give it once")
    if not 0 < self.test_share < 1:
      raise ValueError(f"test_share={self.test_share}: give a share in (0, 1)")
    for field in ("max_prompt_tokens", "max_new_tokens"):
      if getattr(self, field) < 1:
        raise ValueError(f"{field}={getattr(self, field)}: give at least 1")
    for field in ("num_prompts", "num_test_prompts", "first_tokens"):
      if getattr(self, field) < 0:
        raise ValueError(f"{field}={getattr(self, field)}: give 0 or more")
    if self.first_tokens and self.is_chat:
      raise ValueError(
        f"first_tokens={self.first_tokens} with is_chat=True: a chat is given whole; set one to 0"
      )
    if self.source != "file" and (self.train or self.test):
      raise ValueError(f"train={self.train!r}, test={self.test!r}: source={self.source!r} reads no file")
    if not self.judge_spec.kind:
      raise ValueError("judge.kind='': give a judge, such as 'number' or 'reward_model'")
    self.quality_spec  # noqa: B018  Unknown settings are refused here.

  @property
  def judge_spec(self) -> JudgeSpec:
    """Settings of the judge."""
    return JudgeSpec.from_dict(self.judge)

  @property
  def quality_spec(self) -> JudgeSpec:
    """Settings of the judge of quality."""
    return JudgeSpec.from_dict(self.quality)

  @property
  def is_given(self) -> bool:
    """Whether it can be run: the files of its prompts and the models of its judges are named."""
    return not self.missing

  @property
  def missing(self) -> list[str]:
    """Fields that have to be filled in before it can be run."""
    found = ["train"] if self.source == "file" and not self.train else []
    for name, spec in (("judge", self.judge_spec), ("quality", self.quality_spec)):
      found += [] if spec.is_given else [f"{name}.path"]
    return found

  def check(self) -> None:
    """Refuses what would fail later.

    Raises:
      ValueError: names the field.
    """
    for field in ("train", "test"):
      path = getattr(self, field)
      if path and not pathlib.Path(path).expanduser().is_file():
        raise ValueError(f"{field}={path!r}: there is no such file")
    for name, spec in (("judge", self.judge_spec), ("quality", self.quality_spec)):
      try:
        spec.check()
      except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def read_prompts(spec: PromptTaskSpec, part: str) -> list[Instruction]:
  """Returns all prompts of a part, in the order of their file; training ones that are test ones too are left out.

  Args:
    spec: of the task.
    part: "train" or "test".

  Raises:
    DataError: a file that cannot be read, by line and field.
    ValueError: no prompt in a part.
  """
  if part not in PARTS:
    raise ValueError(unknown("part", part, PARTS))
  everything = _read(spec, spec.train)
  if spec.test:
    test = _read(spec, spec.test)
    known = {each.text for each in test}
    found = test if part == "test" else [each for each in everything if each.text not in known]
  else:
    found = [each for each in everything if _is_test(each.text, spec.test_share) == (part == "test")]
  if not found:
    raise ValueError(
      f"{spec.train or spec.source}: there is no prompt for {part!r}; give more, or change test_share"
    )
  return found


def _is_test(text: str, share: float) -> bool:
  digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:8], "big") < share * 2**64


def _read(spec: PromptTaskSpec, path: str) -> list[Instruction]:
  if spec.source != "file":
    return WRITTEN[spec.source]()
  if path.lower().endswith((".txt", ".txt.gz")):
    corpus = CorpusSpec(name=str(pathlib.Path(path).expanduser()), text_unit="blank_line")
    return [Instruction(document.id, document.text.strip()) for document in documents(corpus)]
  fields = InstructionFields(instruction=spec.prompt_field, reference=spec.reference_field, id=spec.id_field)
  return read_instructions(path, fields)


class PromptTask:
  """A task of a checkpoint.

  Args:
    name: unique in the run.
    spec: of the task.
    language: how the model's texts become tokens.
    judge: scores responses.
    quality: scores that decide where they tie; None: the judge's own.
    most: tokens that the model has positions for, response included; None: no limit.
    system: content of a system message in front of chats; "": none.
  """

  def __init__(
    self,
    name: str,
    spec: PromptTaskSpec,
    language: Language,
    judge: Judge,
    quality: Judge | None = None,
    *,
    most: int | None = None,
    system: str = "",
  ):
    self.name, self.spec, self._language, self._system = name, spec, language, system
    self._judge, self._quality = judge, quality
    self.max_new_tokens = spec.max_new_tokens
    self.num_prompts, self.num_test_prompts = spec.num_prompts, spec.num_test_prompts
    room = (
      spec.max_prompt_tokens if most is None else min(spec.max_prompt_tokens, most - spec.max_new_tokens + 1)
    )
    if room < 1:
      raise ValueError(
        f"tasks.{name}.max_new_tokens={spec.max_new_tokens}: the model has {most} positions; lower it"
      )
    self._room, self.lengths = room, bucket_lengths(room)

  def prompts(self, part: str, count: int, random: np.random.Generator) -> Prompts:
    """Returns `count` prompts of a part, drawn without repeats; 0: all, in random order too."""
    everything = read_prompts(self.spec, part)
    wanted, found, left_out = count or len(everything), [], {}
    for place in random.permutation(len(everything)):
      if len(found) == wanted:
        break
      try:
        found.append(self._prompt(everything[int(place)]))
      except LeftOut as reason:
        left_out[str(reason)] = left_out.get(str(reason), 0) + 1
    if len(found) < wanted and (count or not found):
      raise ValueError(
        f"tasks.{self.name}: {len(found)} prompts for {part!r} where {wanted} are asked for (left out: "
        f"{left_out or 'none'}); lower the number, or give more (0: all there are)"
      )
    if left_out:
      logging.warning("tasks.%s, %s: prompts were left out: %s", self.name, part, left_out)
    return Prompts(found, left_out)

  def _prompt(self, instruction: Instruction) -> TaskPrompt:
    """Returns a prompt as tokens. Raises LeftOut for one that is too long, too short, or refused."""
    spec, text = self.spec, self.spec.template.replace(SLOT, instruction.text)
    if spec.is_chat:
      system = ({"role": "system", "content": self._system},) if self._system else ()
      prompt: Prompt = (*system, {"role": "user", "content": text})
      tokens = self._language.format.encode_prompt(prompt)
    else:
      ids = self._language.tokenizer.encode(text)
      if spec.first_tokens and len(ids) < spec.first_tokens:
        raise LeftOut("too short")
      ids = ids[: spec.first_tokens or None]
      prompt = self._language.tokenizer.decode(ids) if spec.first_tokens else text
      tokens = [*self._language.begin_ids, *ids] or [self._language.tokenizer.end_of_text_id]
    if len(tokens) > self._room:
      raise LeftOut("too long")
    asked = spec.judged_template.replace(SLOT, instruction.text) if spec.judged_template else ""
    asked = asked or (prompt if isinstance(prompt, str) else text)
    return TaskPrompt(instruction.id, prompt, tuple(tokens), _reference(instruction, spec), asked)

  def score(self, prompts: Sequence[TaskPrompt], texts: Sequence[str | None], written: Written) -> Scored:
    """Judges the responses; one that was not written has no score."""
    del written
    per_prompt = len(texts) // len(prompts)
    items = {
      row: Item(f"{prompts[row // per_prompt].id}/{row % per_prompt}", prompts[row // per_prompt].asked, text,
                prompts[row // per_prompt].reference)
      for row, text in enumerate(texts)
      if text is not None
    }  # fmt: skip
    rewards = self._judged(self._judge, items, len(texts))
    qualities = rewards if self._quality is None else self._judged(self._quality, items, len(texts))
    scores = [[_number(reward), _number(quality)] for reward, quality in zip(rewards, qualities)]
    return Scored(
      np.asarray(scores, np.float64).reshape(-1, 2),
      [each.details.get("answer") for each in rewards],
      [_reason(*both) for both in zip(rewards, qualities)],
    )

  def _judged(self, judge: Judge, items: Mapping[int, Item], count: int) -> list[Judgement]:
    found = dict(zip(items, judge.judge(list(items.values())), strict=True))
    return [found.get(row, Judgement(None, "nothing was written")) for row in range(count)]


def _reference(instruction: Instruction, spec: PromptTaskSpec) -> str | None:
  """Returns the reference of a record. Raises LeftOut where the marker is missing."""
  if instruction.reference is None or not spec.reference_marker:
    return instruction.reference
  found = after(spec.reference_marker)(instruction.reference)
  if found is None:
    raise LeftOut(f"its reference has nothing behind {spec.reference_marker!r}")
  return found


def _number(judgement: Judgement) -> float:
  return np.nan if judgement.score is None else judgement.score


def _reason(reward: Judgement, quality: Judgement) -> str:
  return next((each.reason for each in (reward, quality) if each.score is None), "")


def bucket_lengths(longest: int, smallest: int = SMALLEST_LENGTH) -> tuple[int, ...]:
  """Returns powers of two from `smallest`, the last of them at least `longest`.

  >>> bucket_lengths(100), bucket_lengths(20)
  ((32, 64, 128), (32,))
  """
  found = [smallest]
  while found[-1] < longest:
    found.append(2 * found[-1])
  return tuple(found)


@contextlib.contextmanager
def opened_tasks(
  specs: Mapping[str, PromptTaskSpec], language: Language, *, most: int | None, system: str, mesh: Any
) -> Iterator[dict[str, PromptTask]]:
  """Gives tasks with their judges, equal ones shared, and ends the judges' processes.

  Args:
    specs: by name.
    language: of the model.
    most: positions of the model; None: no limit.
    system: see `PromptTask`.
    mesh: devices for judges that are models; None: the first.
  """
  with contextlib.ExitStack() as stack:
    judges: dict[JudgeSpec, Judge] = {}
    for spec in _judge_specs(specs.values()):
      judges[spec] = stack.enter_context(opened(make_judge(spec, mesh)))
    yield {
      name: PromptTask(
        name, spec, language, judges[spec.judge_spec], judges.get(spec.quality_spec), most=most, system=system
      )
      for name, spec in specs.items()
    }


def _judge_specs(specs: Iterable[PromptTaskSpec]) -> list[JudgeSpec]:
  every = [each for spec in specs for each in (spec.judge_spec, spec.quality_spec) if each.kind]
  return list(dict.fromkeys(every))
