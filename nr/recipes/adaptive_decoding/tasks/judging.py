"""From the config to the judges of a task: rules, answers, reward models, language models."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from nr.data.chat import ChatFormat, ChatTemplate, ChatTokenizer, load_chat_template
from nr.data.examples import PlainText, TextFormat
from nr.data.tokenizers import load_tokenizer
from nr.generators.checkpoints import open_checkpoint
from nr.generators.in_process import InProcess
from nr.generators.openai_compatible import OpenAICompatible
from nr.interchange.huggingface import load_huggingface_reward_model
from nr.judges.language_model import SCORE_TEMPLATE, LanguageModelScore
from nr.judges.protocol import Item, Judge, Judgement
from nr.judges.reward_model import RewardModelJudge
from nr.judges.verifiable import NORMALIZATIONS, ExactMatch, Matches, MathAnswer, after
from nr.models.reward import RewardModelSpec
from nr.names import unknown
from nr.recipes.adaptive_decoding.tasks.rules import FewRepeats, NumberAnswer, SentenceBeginnings, Variety
from nr.recipes.languages import OWN_TEMPLATE, checkpoint_language
from nr.spec import Spec
from nr.training import model_files, sharding

_MODEL = ("path", "chat_template", "dtype", "batch_size")
USED = {
  "exact": ("marker", "normalization"),
  "number": ("marker",),
  "math": ("seconds",),
  "pattern": ("pattern",),
  "sentences": ("beginning",),
  "variety": ("words",),
  "repeats": ("ngram",),
  "reward_model": (*_MODEL, "tokenizer", "max_length"),
  "language_model": (*_MODEL, "url", "model", "api_key_variable", "template", "lowest", "highest", "max_new_tokens"),
}  # fmt: skip
"""The kinds of judges, and the settings of `JudgeSpec` that each reads."""
MODELS = ("reward_model", "language_model")
"""Kinds that are models."""
ANSWERING = ("exact", "number", "math")
"""Kinds that find a final answer, right or wrong, so that responses can vote."""


@dataclasses.dataclass(frozen=True)
class JudgeSpec(Spec):
  """A judge; settings that its kind does not read are refused.

  Attributes:
    kind: of `USED`; "": none.
    marker: of "exact" and "number": the answer stands behind the last of it, to the end of its line; "": the
      whole response, or the last number in it.
    normalization: of "exact": see `nr.judges.verifiable.NORMALIZATIONS`.
    seconds: of "math": for one comparison.
    pattern: of "pattern": a regular expression that the whole response matches.
    beginning: of "sentences": what every sentence begins with.
    words: of "variety": different words that are wanted.
    ngram: of "repeats": words of a gram.
    path: of models: a folder (reward model: Hugging Face or ours) or any checkpoint (language model).
    tokenizer: of a reward model, where it does not lie in its folder.
    chat_template: of models: "own", a built-in name, or "" for plain text.
    dtype: of a model's parameters.
    batch_size: texts that a model reads at once.
    max_length: of a reward model: tokens; longer texts have no score. 0: the model's limit.
    url, model, api_key_variable: of a language model behind a server, in place of `path`.
    template: of the question to a language model; "": the house's.
    lowest, highest: of the numbers that it may give.
    max_new_tokens: of its answer.
  """

  kind: str = ""
  marker: str = ""
  normalization: str = "strip"
  seconds: float = 10.0
  pattern: str = ""
  beginning: str = "Ab"
  words: int = 40
  ngram: int = 3
  path: str = ""
  tokenizer: str = ""
  chat_template: str = OWN_TEMPLATE
  dtype: str = "float32"
  batch_size: int = 16
  max_length: int = 0
  url: str = ""
  model: str = ""
  api_key_variable: str = ""
  template: str = ""
  lowest: float = 1.0
  highest: float = 10.0
  max_new_tokens: int = 1024

  def __post_init__(self):
    if self.kind and self.kind not in USED:
      raise ValueError(unknown("kind", self.kind, USED))
    for field in dataclasses.fields(self):
      is_read = field.name == "kind" or (self.kind and field.name in USED[self.kind])
      if not is_read and getattr(self, field.name) != field.default:
        raise ValueError(
          f"{field.name}={getattr(self, field.name)!r}: kind={self.kind!r} does not read it; "
          f"leave it at {field.default!r}"
        )

  @property
  def finds_answers(self) -> bool:
    """Whether responses can vote on its answers."""
    return self.kind in ANSWERING

  @property
  def is_given(self) -> bool:
    """Whether it can judge: a model that it reads is named."""
    return self.kind not in MODELS or bool(self.path or self.url)

  def check(self) -> None:
    """Refuses what would fail later: files that are not there, settings that are none.

    Raises:
      ValueError: names the field.
    """
    if self.kind == "exact" and self.normalization not in NORMALIZATIONS:
      raise ValueError(unknown("normalization", self.normalization, NORMALIZATIONS))
    if self.kind == "math" and importlib.util.find_spec("math_verify") is None:
      raise ValueError("kind='math': needs math-verify (pip install 'nr[synthesis]'); or take 'number'")
    if self.kind == "pattern":
      try:
        re.compile(self.pattern)
      except re.error as error:
        raise ValueError(f"pattern={self.pattern!r}: {error}") from error
    if self.kind in ("sentences", "variety", "repeats"):
      make_judge(self)
    if self.kind in MODELS:
      self._check_model()

  def _check_model(self) -> None:
    if bool(self.path) == bool(self.url):
      raise ValueError(f"path={self.path!r}: name the model that kind={self.kind!r} reads" + (
        ", or the url of a server, not both" if self.kind == "language_model" else ""
      ))  # fmt: skip
    for field in ("path", "tokenizer"):
      path = getattr(self, field)
      if path and not pathlib.Path(path).expanduser().exists():
        raise ValueError(f"{field}={path!r}: there is no such file or folder")
    if self.url and not self.model:
      raise ValueError(f"model='': give the name by which the server {self.url} knows its model")
    if self.api_key_variable and not os.environ.get(self.api_key_variable):
      raise ValueError(f"api_key_variable={self.api_key_variable!r}: no such environment variable is set")


def make_judge(spec: JudgeSpec, mesh: jax.sharding.Mesh | None = None) -> Judge:
  """Returns a judge.

  Args:
    spec: of a kind that is not "".
    mesh: devices that a model is split over; None: it lies on the first.

  Raises:
    ValueError: a model that is none.
    ImportError: a package that the judge needs is not installed.
  """
  return _MAKERS[spec.kind](spec, mesh)


def _exact(spec: JudgeSpec, mesh: Any) -> Judge:
  return ExactMatch(spec.normalization, after(spec.marker) if spec.marker else None)


def _reward_model(spec: JudgeSpec, mesh: jax.sharding.Mesh | None) -> Judge:
  folder, layers = pathlib.Path(spec.path).expanduser(), _layers()
  if (folder / "config.json").is_file():
    settings = dict(layers=layers, dtype=spec.dtype, param_dtype=spec.dtype)
    model, params = load_huggingface_reward_model(folder, **settings)
  else:
    saved = model_files.load_model(folder, mesh=mesh)
    model, params = saved.spec, saved.params
    if not isinstance(model, RewardModelSpec):
      raise ValueError(f"path={spec.path!r} holds a {saved.metadata['kind']}, not a reward model")
  if mesh is not None:
    params = jax.device_put(params, sharding.shardings(model_files.axes_of(model), mesh, params))
  judge = RewardModelJudge(
    model,
    params,
    _format(load_tokenizer(spec.tokenizer or folder), folder, spec.chat_template),
    max_length=spec.max_length or None,
    batch_size=spec.batch_size,
    name=folder.name,
  )
  return judge if mesh is None else _OnMesh(judge, mesh)


def _layers() -> str:
  return "unroll" if jax.default_backend() == "cpu" else "scan"


def _format(tokenizer: Any, folder: pathlib.Path, chat_template: str) -> TextFormat:
  """Returns how a reward model's texts become tokens."""
  if not chat_template:
    return PlainText(tokenizer)
  is_own = chat_template == OWN_TEMPLATE
  template = load_chat_template(folder) if is_own else ChatTemplate.named(chat_template)
  return ChatFormat(ChatTokenizer(tokenizer, template))


class _OnMesh:
  """A judge whose model is split over devices."""

  def __init__(self, judge: Judge, mesh: jax.sharding.Mesh):
    self._judge, self._mesh, self.name = judge, mesh, judge.name

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns the judgements."""
    with sharding.context(self._mesh):
      return self._judge.judge(items)


def _language_model(spec: JudgeSpec, mesh: jax.sharding.Mesh | None) -> Judge:
  if spec.url:
    key = spec.api_key_variable or None
    generator: Any = OpenAICompatible(spec.url, spec.model, api_key_variable=key, use_chat=True)
  else:
    checkpoint = open_checkpoint(spec.path, dtype=spec.dtype)
    language = checkpoint_language(checkpoint, spec.chat_template)
    generator = InProcess.of_checkpoint(
      checkpoint, format=language.format, end_ids=language.end_ids, batch_size=spec.batch_size
    )
  return LanguageModelScore(
    generator,
    template=spec.template or SCORE_TEMPLATE,
    lowest=spec.lowest,
    highest=spec.highest,
    use_chat=bool(spec.url or spec.chat_template),
    max_new_tokens=spec.max_new_tokens,
  )


_MAKERS: dict[str, Callable[[JudgeSpec, Any], Judge]] = {
  "exact": _exact,
  "number": lambda spec, mesh: NumberAnswer(spec.marker),
  "math": lambda spec, mesh: MathAnswer(spec.seconds),
  "pattern": lambda spec, mesh: Matches(spec.pattern),
  "sentences": lambda spec, mesh: SentenceBeginnings(spec.beginning),
  "variety": lambda spec, mesh: Variety(spec.words),
  "repeats": lambda spec, mesh: FewRepeats(spec.ngram),
  "reward_model": _reward_model,
  "language_model": _language_model,
}


@contextlib.contextmanager
def opened(judge: Judge) -> Iterator[Judge]:
  """Gives a judge and ends its processes, where it has any."""
  try:
    yield judge
  finally:
    if hasattr(judge, "close"):
      judge.close()
