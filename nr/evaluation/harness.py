"""Any checkpoint of the house as a model of lm-evaluation-harness (extra [harness]).

    NR_DATA=data python -m nr.evaluation.harness --model nr --model_args checkpoint=runs/cocomix,model=students/... \
        --tasks choice --include_path configs/harness --batch_size 16

The command is `lm_eval` itself, with the model "nr" added; all of its options hold. Versions of lm_eval that find
models by entry points (group `lm_eval.models`) know "nr" without it, where nr is installed.

What is ours: contexts begin with what the model wants there (a begin of text, or the end of the document before),
and a text is scored behind it; the rest of tokenizing, windows and stops follows `lm_eval.models.huggingface`.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from nr import names
from nr.evaluation.log_likelihoods import TextScorer, prefix_id_of
from nr.generation.constraints.vocabulary import token_bytes
from nr.generators.checkpoints import Checkpoint, open_checkpoint
from nr.generators.in_process import InProcess
from nr.generators.protocol import Request, samples_by_request

try:
  from lm_eval.api.model import LM
except ModuleNotFoundError as error:
  if error.name != "lm_eval":
    raise
  LM = object

NAME = "nr"
DEFAULT_NEW_TOKENS = 256
"""Most new tokens where a task does not say; lm_eval's own default."""

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_TRANSFORMS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
"""Arguments of generation that are transforms of ours, by the same names, in transformers' order."""


class HarnessModel(LM):
  """The model "nr" of lm-evaluation-harness.

  Args (of `--model_args`):
    checkpoint: run directory, model folder, Hugging Face folder, .gguf or llama2.c's .bin.
    tokenizer, model, adapter, dtype, layers: as of `nr.generators.checkpoints.open_checkpoint`.
    batch_size: rows read together.
    max_length: most tokens read at a time; None: the model's.
    stride: of rolling windows, tokens scored by each but the first; None: disjoint, as in lm_eval.
    prefix_token_id: stands before texts that are scored from their first token on; None: the begin of
      text, or else the end of text.
    seed: of tasks that sample.
    max_batch_size, device: lm_eval hands them to every model; JAX has chosen the device.

  Raises:
    ImportError: lm_eval is not installed.
    ValueError: an unknown argument, no such checkpoint, sizes out of bounds.
  """

  def __init__(
    self,
    checkpoint: str | Checkpoint | None = None,
    *,
    tokenizer: str | None = None,
    model: str | None = None,
    adapter: str | None = None,
    dtype: str = "float32",
    layers: str | None = None,
    batch_size: int | str = 16,
    max_length: int | None = None,
    stride: int | None = None,
    prefix_token_id: int | None = None,
    seed: int = 0,
    max_batch_size: int | None = None,
    device: str | None = None,
    **others: Any,
  ):
    require_lm_eval()
    super().__init__()
    del max_batch_size, device
    _check_arguments(checkpoint, batch_size, others)
    if not isinstance(checkpoint, Checkpoint):
      settings = dict(tokenizer=tokenizer, model=model, adapter=adapter, dtype=dtype, layers=layers)
      checkpoint = open_checkpoint(checkpoint, **settings)
    self.checkpoint, self.batch_size, self.stride, self.seed = checkpoint, int(batch_size), stride, seed
    own = prefix_id_of(checkpoint.tokenizer, checkpoint.begin_ids)
    self.scorer = TextScorer(
      checkpoint.network,
      checkpoint.tokenizer,
      prefix_id=own if prefix_token_id is None else prefix_token_id,
      begin_ids=checkpoint.begin_ids,
      batch_size=self.batch_size,
      max_length=max_length,
    )

  @property
  def max_length(self) -> int:
    """Most tokens read at a time."""
    return self.scorer.tokens.max_length

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Returns (nats, is greedy) of each request's continuation; `args` are (context, continuation)."""
    scores = self.scorer.continuations([request.args for request in requests], "loglikelihood")
    return self._answered("loglikelihood", requests, [(each.total(), each.is_greedy()) for each in scores])

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """Returns the nats of each request's whole text, read in windows; `args` are (text,)."""
    texts = [request.args[0] for request in requests]
    scores = self.scorer.texts(texts, self.stride, "loglikelihood_rolling")
    return self._answered("loglikelihood_rolling", requests, [each.total() for each in scores])

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Returns the text that follows each request's context; `args` are (context, arguments of generation).

    Raises:
      ValueError: an argument of generation that is unknown here, or a text that could not be generated.
    """
    asked = [
      self._without_impossible_stops(generation_request(str(place), *request.args, seed=self.seed))
      for place, request in enumerate(requests)
    ]
    by_room: dict[int, list[Request]] = {}
    for request in asked:
      by_room.setdefault(self._room(request), []).append(request)
    texts: dict[str, str] = {}
    for room, group in by_room.items():
      contexts = _Contexts(self.scorer, room)
      generator = InProcess.of_checkpoint(self.checkpoint, format=contexts, batch_size=self.batch_size)
      for request, (sample,) in zip(group, samples_by_request(group, generator.generate(group))):
        if sample.error is not None:
          raise ValueError(f"context {request.prompt[-60:]!r}: no text was generated: {sample.error}")
        texts[request.id] = sample.text
    return self._answered("generate_until", requests, [texts[request.id] for request in asked])

  @functools.cached_property
  def _alphabet(self) -> frozenset[int]:
    """Bytes that the tokens spell."""
    return frozenset(
      byte for spelled in token_bytes(self.checkpoint.tokenizer) if spelled for byte in spelled
    )

  def _without_impossible_stops(self, request: Request) -> Request:
    """Leaves out stops with characters that no token spells: they never come, and decoding refuses them."""
    if not request.stop:
      return request
    stop = tuple(text for text in request.stop if self._alphabet.issuperset(text.encode("utf-8")))
    return dataclasses.replace(request, stop=stop)

  def _room(self, request: Request) -> int:
    room = self.max_length - request.max_new_tokens
    if room < 1:
      raise ValueError(
        f"max_gen_toks={request.max_new_tokens}: the model has {self.max_length} positions and the context needs one; "
        f"give at most {self.max_length - 1}"
      )
    return room

  def _answered(self, kind: str, requests: Sequence[Any], answers: list) -> list:
    for request, answer in zip(requests, answers):
      self.cache_hook.add_partial(kind, request.args, answer)
    return answers

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns a conversation as the text that the model was trained on; from then on special tokens are read.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    tokenizer = self.checkpoint.tokenizer
    if not hasattr(tokenizer, "render_chat"):
      raise ValueError(
        f"{self.checkpoint.name}: its tokenizer has no chat template; leave --apply_chat_template out"
      )
    self.scorer.use_special_tokens = True
    return tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

  def chat_template(self, chat_template: bool | str = False) -> str:
    """Returns the source of the chat template, for the record; "" where it is not used or there is none."""
    if not chat_template:
      return ""
    tokenizer = self.checkpoint.tokenizer
    source = getattr(tokenizer, "chat_template", None) or getattr(
      getattr(tokenizer, "template", None), "source", None
    )
    return source or ""

  @property
  def tokenizer_name(self) -> str:
    """What tells tokenizers apart in lm_eval's caches."""
    return self.checkpoint.tokenizer.fingerprint

  def get_model_info(self) -> dict[str, Any]:
    """Returns what lm_eval records of the model."""
    params = jax.tree.leaves(self.checkpoint.network.params)
    return {
      "model_num_parameters": sum(leaf.size for leaf in params),
      "model_dtype": self.checkpoint.network.spec.dtype,
      "model_sha": self.checkpoint.fingerprint or "",
      "prefix_token_id": self.scorer.prefix_id,
      "max_length": self.max_length,
    }


class _Contexts:
  """How contexts become prompts: their last `room` tokens, since text is to follow; see `TextFormat`."""

  def __init__(self, scorer: TextScorer, room: int):
    self.scorer, self.room = scorer, room

  def encode_prompt(self, context: str) -> list[int]:
    """Returns the ids of a context."""
    return self.scorer.encode_context(context)[-self.room :]


def _check_arguments(checkpoint: Any, batch_size: int | str, others: Mapping[str, Any]) -> None:
  known = (
    "checkpoint",
    "tokenizer",
    "model",
    "adapter",
    "dtype",
    "layers",
    "batch_size",
    "max_length",
    "stride",
  )
  for name in others:
    raise ValueError(names.unknown("--model_args", name, (*known, "prefix_token_id", "seed")))
  if checkpoint is None:
    raise ValueError("--model_args: checkpoint is missing; give checkpoint=PATH")
  if not str(batch_size).isdigit():
    raise ValueError(f"batch_size={batch_size!r}: give a number; it is not found by trying")


def generation_request(id: str, context: str, arguments: Mapping[str, Any], seed: int = 0) -> Request:
  """Returns what the generators of the house are asked for.

  Args:
    id: names the request.
    context: text to be continued.
    arguments: of generation, as tasks give them: `until` (a text or several), `max_gen_toks` or one of its
      other names, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`. Without
      `do_sample` a temperature above 0 asks for it; without either, decoding is greedy.
    seed: of the draws.

  Raises:
    ValueError: an argument that is not among these; names it.

  >>> generation_request("a", "The", {"until": ["."], "do_sample": True, "temperature": 0.7, "top_p": 0.9}).chain
  'temperature(0.7)|top_p(0.9)'
  """
  arguments = {name: value for name, value in arguments.items() if value is not None}
  known = ("until", "do_sample", *_LIMITS, *_TRANSFORMS)
  for name in arguments:
    if name not in known:
      raise ValueError(names.unknown("argument of generation", name, known))
  until = arguments.get("until", ())
  until = (until,) if isinstance(until, str) else tuple(until)
  limit = next((int(arguments[name]) for name in _LIMITS if name in arguments), DEFAULT_NEW_TOKENS)
  temperature = float(arguments.get("temperature", 1.0 if arguments.get("do_sample") else 0.0))
  if not arguments.get("do_sample", temperature > 0):
    temperature = 0.0
  values = {**arguments, "temperature": temperature}
  chain = [f"{name}({values[name]})" for name in _TRANSFORMS if name in values]
  return Request(
    id,
    context,
    max_new_tokens=limit,
    chain="|".join(chain),
    stop=tuple(text for text in until if text),
    seed=seed,
  )


def require_lm_eval() -> None:
  """Raises ImportError, naming the extra, where lm_eval is not installed."""
  if LM is object:
    raise ImportError("nr.evaluation.harness needs lm_eval: pip install 'nr[harness]'")


def register() -> None:
  """Adds the model "nr" to lm_eval's; once is enough."""
  require_lm_eval()
  import lm_eval.models  # noqa: F401  the others, which it adds only while there are none
  from lm_eval.api.registry import model_registry

  if NAME not in model_registry:
    model_registry.register(NAME, target="nr.evaluation.harness:HarnessModel")


def main() -> None:
  """Runs `lm_eval` with the arguments of the command line."""
  try:
    register()
  except ImportError as error:
    sys.exit(f"error: {error}")
  from lm_eval.__main__ import cli_evaluate

  cli_evaluate()


if __name__ == "__main__":
  main()
