"""A request for texts made ready: prompts as tokens, constraints in the chain, a driver chosen."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from nr.generation.decoding import pad_prompts
from nr.generation.language_models import Network
from nr.generation.stopping import DEAD_END, FINISH_REASONS, Stop
from nr.generation.transforms.algebra import Transform, chain
from nr.generators.checkpoints import Checkpoint, open_checkpoint
from nr.models.cache import CacheSpec
from nr.names import unknown


@dataclasses.dataclass(frozen=True)
class JobSettings:
  """What to generate, and how.

  Attributes:
    num_samples: samples (or beams) of each prompt.
    max_new_tokens: most tokens to add.
    seed: of the random key.
    greedy: always the most probable token.
    stop: texts that end a row.
    ignore_end: go on after the end of text.
    chat: prompts are a user's turns in the model's chat template.
    heal: let the first token rewrite the end of the prompt.
    regex: only texts that match it.
    json_schema: only JSON that this schema (text, or path of a file) allows.
    choice: only one of these texts.
    quantize: "int8", "int4" or None: bits of the weights.
    cache: "static", "int8" (quantised), "shared_prefix" (samples read one copy of the
      prompt) or "ring:W" (the last W tokens only): how keys and values are kept.
    beam_width: beam search with so many beams; 0: sampling.
    length_penalty: of beam search, power of the length.
    draft: "ngram", "layers:K", a checkpoint, or None: speculative decoding.
    draft_length: tokens drafted at a time.
    dtype: of the draft checkpoint's parameters.
    stream: call back after every token.
  """

  num_samples: int = 1
  max_new_tokens: int = 128
  seed: int = 0
  greedy: bool = False
  stop: tuple[str, ...] = ()
  ignore_end: bool = False
  chat: bool = False
  heal: bool = False
  regex: str | None = None
  json_schema: str | None = None
  choice: tuple[str, ...] = ()
  quantize: str | None = None
  cache: str = "static"
  beam_width: int = 0
  length_penalty: float = 0.0
  draft: str | None = None
  draft_length: int = 4
  dtype: str = "float32"
  stream: bool = False

  def __post_init__(self):
    if self.beam_width and self.draft:
      raise ValueError("beam_width and draft: choose one")
    if self.beam_width and self.num_samples > self.beam_width:
      raise ValueError(
        f"num_samples={self.num_samples}: beam search returns at most beam_width={self.beam_width} texts"
      )
    if sum(map(bool, (self.regex, self.json_schema, self.choice))) > 1:
      raise ValueError("regex, json_schema and choice constrain the same text: choose one")


class Text(NamedTuple):
  """One generated text.

  Attributes:
    prompt: number of the prompt.
    sample: number of the sample.
    tokens: new token ids, the stop id included.
    log_probs: nats under the model, one a token.
    transformed_log_probs: nats under the law drawn from, one a token; None for beams.
    finish_reason: why it ended.
    score: of a beam, else None.
  """

  prompt: int
  sample: int
  tokens: list[int]
  log_probs: list[float]
  transformed_log_probs: list[float] | None
  finish_reason: str
  score: float | None = None


class Job:
  """A request made ready: prompts as tokens, constraints in the chain, a driver."""

  def __init__(self, settings: JobSettings, checkpoint: Checkpoint, prompts: list[str], law: Transform):
    """Encodes the prompts and builds the constraints.

    Args:
      settings: what to generate.
      checkpoint: the model.
      prompts: texts to continue.
      law: transforms of the logits.

    Raises:
      ValueError: a chat without a template, a constraint that no text meets.
    """
    self.settings, self.checkpoint, self.prompts = settings, checkpoint, prompts
    self.ids = [self._encode(prompt) for prompt in self.prompts]
    end_ids = [] if settings.ignore_end else list(checkpoint.end_ids)
    # Constraints first: a truncation before them could drop all that they allow.
    self.law = chain(*self._constraints(), law)
    strings = None
    if settings.stop:
      from nr.generation.constraints.stop_strings import stop_strings

      strings = stop_strings(settings.stop, self._token_bytes())
    self.stop = Stop(ids_E=end_ids or None, strings=strings)
    self.key = None if settings.greedy else jax.random.key(settings.seed)
    network = dataclasses.replace(checkpoint.network, cache=parse_cache(settings.cache))
    self.network = self._quantized(network)

  def _encode(self, prompt: str) -> list[int]:
    tokenizer = self.checkpoint.tokenizer
    if self.settings.chat:
      if not hasattr(tokenizer, "render_chat"):
        raise ValueError("chat: this checkpoint carries no chat template; leave it out")
      text = tokenizer.render_chat([{"role": "user", "content": prompt}])
      return tokenizer.encode(text, use_special_tokens=True)
    ids = [*self.checkpoint.begin_ids, *tokenizer.encode(prompt)]
    return ids or [tokenizer.end_of_text_id]

  def _token_bytes(self) -> list:
    from nr.generation.constraints.vocabulary import token_bytes

    spelled = token_bytes(self.checkpoint.tokenizer)
    # Models may have more rows than their tokenizer has ids.
    return spelled + [None] * (self.checkpoint.network.vocab_size - len(spelled))

  def _constraints(self) -> list[Transform]:
    """Returns the constraint of each prompt as one transform; takes healed tokens off the prompts."""
    settings = self.settings
    is_constrained = settings.regex or settings.json_schema or settings.choice
    if not (is_constrained or settings.heal):
      return []
    from nr.generation.constraints import automaton, healing

    spelled = self._token_bytes()
    removed = [b""] * len(self.ids)
    if settings.heal:
      healed = [healing.heal(ids, spelled) for ids in self.ids]
      self.ids, removed = [list(ids) for ids, _ in healed], [begin for _, begin in healed]
    build = self._build if is_constrained else healing.prefix
    built = {begin: build(begin, spelled) for begin in removed}
    joined = automaton.join(list(built.values()))
    which_B = np.array([list(built).index(begin) for begin in removed])
    ends = list(self.checkpoint.end_ids)
    return [automaton.Constrain(joined, ends, start=joined.start[which_B])]

  def _build(self, begin: bytes, spelled: list) -> Any:
    """Returns the automaton of the texts that are asked for, after bytes taken off the prompt."""
    from nr.generation.constraints import choices, regular

    settings = self.settings
    if settings.regex:
      return regular.regex(settings.regex, spelled, after=begin)
    if settings.choice:
      return choices.choices(settings.choice, spelled, after=begin)
    schema = settings.json_schema
    # A schema's text is no path; file names end before a brace could stand in them.
    if "{" not in schema:
      schema = pathlib.Path(schema).read_text(encoding="utf-8")
    return regular.json_schema(schema, spelled, after=begin)

  def _quantized(self, network: Network) -> Network:
    if self.settings.quantize is None:
      return network
    from nr.models.weight_quantization import quantize_weights

    return dataclasses.replace(
      network, params=quantize_weights(network.params, bits=int(self.settings.quantize[3:]))
    )

  def generate(self, on_tokens: Callable[[Any], None]) -> list[Text]:
    """Returns the texts; `on_tokens` is called after the first token and, streaming, after every one."""
    prompts = pad_prompts(self.ids)
    if self.settings.beam_width:
      return self._beams(prompts)
    if self.settings.draft:
      return self._speculate(prompts)
    from nr.generation.sample import sample

    settings = self.settings
    every = 1 if settings.stream else settings.max_new_tokens
    generation = sample(
      self.network,
      *prompts,
      self.key,
      chain=self.law,
      max_new_tokens=settings.max_new_tokens,
      num_samples=settings.num_samples,
      stop=self.stop,
      on_tokens=on_tokens,
      stream_every=every,
    )
    return self._texts(generation)

  def _texts(self, generation: Any) -> list[Text]:
    host = [np.asarray(leaf) for leaf in generation[:5]]
    texts = []
    for row, (tokens, length, log_probs, transformed, finish) in enumerate(zip(*host)):
      place = divmod(row, self.settings.num_samples)
      values = (tokens[:length].tolist(), log_probs[:length].tolist(), transformed[:length].tolist())
      texts.append(Text(*place, *values, FINISH_REASONS[int(finish)]))
    return texts

  def _beams(self, prompts: tuple) -> list[Text]:
    from nr.generation.beams.beam_search import beam_search

    settings = self.settings
    beams = beam_search(
      self.network,
      *prompts,
      chain=self.law,
      beam_width=settings.beam_width,
      max_new_tokens=settings.max_new_tokens,
      length_penalty=settings.length_penalty,
      stop=self.stop,
    )
    tokens_BKN, lengths_BK, finish_BK = map(np.asarray, (beams.tokens_BKN, beams.lengths_BK, beams.finish_BK))
    texts = []
    for row in range(len(self.ids)):
      for beam in range(settings.num_samples):
        # Fewer texts than beams may exist: the slots behind them are empty.
        if finish_BK[row, beam] == DEAD_END:
          continue
        tokens = tokens_BKN[row, beam, : lengths_BK[row, beam]].tolist()
        total = [float(beams.log_probs_BK[row, beam])]
        reason, score = FINISH_REASONS[int(finish_BK[row, beam])], float(beams.scores_BK[row, beam])
        texts.append(Text(row, beam, tokens, total, None, reason, score))
    return texts

  def _speculate(self, prompts: tuple) -> list[Text]:
    from nr.generation.speculation.speculative import speculative

    settings = self.settings
    generation = speculative(
      self.network,
      self._drafter(),
      *prompts,
      self.key,
      chain=self.law,
      max_new_tokens=settings.max_new_tokens,
      num_samples=settings.num_samples,
      stop=self.stop,
      draft_length=settings.draft_length,
    )
    return self._texts(generation)

  def _drafter(self) -> Any:
    from nr.generation.speculation.drafters import NgramDrafter
    from nr.generation.speculation.model_drafters import ModelDrafter, early_exit

    kind, _, layers = self.settings.draft.partition(":")
    if kind == "ngram":
      return NgramDrafter()
    if kind == "layers":
      return ModelDrafter(early_exit(self.network, int(layers)))
    if not pathlib.Path(self.settings.draft).exists():
      raise ValueError(
        unknown("draft", self.settings.draft, ["ngram", "layers:K", "a checkpoint that exists"])
      )
    draft = open_checkpoint(self.settings.draft, dtype=self.settings.dtype)
    if draft.tokenizer.fingerprint != self.checkpoint.tokenizer.fingerprint:
      raise ValueError(
        f"draft={self.settings.draft} reads another tokenizer than the model; choose a draft with the same"
      )
    return ModelDrafter(draft.network)


def parse_cache(text: str) -> CacheSpec:
  """Returns the cache layout that "static", "int8", "shared_prefix" or "ring:W" names.

  Raises:
    ValueError: none of them.
  """
  kind, _, window = text.partition(":")
  if kind == "int8" and not window:
    return CacheSpec(quantization="int8")
  if kind == "ring" and window.isdigit():
    return CacheSpec(layout="ring", window=int(window))
  if text not in ("static", "shared_prefix"):
    raise ValueError(unknown("cache", text, ["static", "int8", "shared_prefix", "ring:W"]))
  return CacheSpec(layout=text)


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
  """Returns the prompts of the command line and of a file.

  Raises:
    ValueError: a line that is no JSON object with a text "prompt"; names it.
  """
  found = list(prompts)
  if file is None:
    return found
  for number, line in enumerate(pathlib.Path(file).read_text(encoding="utf-8").splitlines(), start=1):
    if not line.strip():
      continue
    if not file.endswith(".jsonl"):
      found.append(line)
      continue
    try:
      prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{file}, line {number}: give a JSON object with a field 'prompt'") from error
    if not isinstance(prompt, str):
      raise ValueError(f"{file}, line {number}, field 'prompt': {prompt!r} is no text")
    found.append(prompt)
  if not found:
    raise ValueError(f"{file} holds no prompt; give one a line")
  return found
