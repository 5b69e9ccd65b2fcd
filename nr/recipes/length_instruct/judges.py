"""Who decides: which of a pool's responses is preferred, and who wins a benchmark's comparison."""

import pathlib
from typing import Any

from nr.data.chat import ChatFormat, ChatTemplate, ChatTokenizer, load_chat_template
from nr.data.tokenizers import load_tokenizer
from nr.generators.openai_compatible import OpenAICompatible
from nr.judges.language_model import LanguageModelPairs, LanguageModelScore
from nr.judges.length import count_words
from nr.judges.protocol import Judge, PairJudge, Rule
from nr.recipes.languages import OWN_TEMPLATE


def open_judge(config: Any, cache: pathlib.Path) -> PairJudge | None:
  """Returns the benchmarks' judge, a server's, or None where the config names none."""
  judge = config.evaluate.judge
  if not judge.url:
    return None
  return LanguageModelPairs(_open_server(judge, cache), max_new_tokens=judge.max_new_tokens)


def pool_judge(config: Any, directory: pathlib.Path) -> Judge | None:
  """Returns who scores the responses of pools; None: references are preferred, nothing is scored.

  Args:
    config: the whole; `pools.judge` says who.
    directory: gets the answers of a server.
  """
  judge = config.pools.judge
  if judge.kind == "reference":
    return None
  if judge.kind == "words":
    counter = config.lift.counter
    return Rule(lambda item: count_words(item.response, counter), f"words ({counter})")
  if judge.kind == "reward_model":
    from nr.judges.reward_model import RewardModelJudge

    return RewardModelJudge.of_folder(judge.path, _reward_format(judge))
  server = _open_server(judge, directory / "judge.jsonl")
  return LanguageModelScore(server, max_new_tokens=judge.max_new_tokens)


def _reward_format(judge: Any) -> ChatFormat | None:
  """Returns how the reward model's texts become tokens; None for plain text."""
  if not judge.chat_template:
    return None
  is_own = judge.chat_template == OWN_TEMPLATE
  template = load_chat_template(judge.path) if is_own else ChatTemplate.named(judge.chat_template)
  return ChatFormat(ChatTokenizer(load_tokenizer(judge.path), template))


def _open_server(judge: Any, cache: pathlib.Path) -> OpenAICompatible:
  return OpenAICompatible(
    judge.url,
    judge.model,
    cache=cache,
    api_key_variable=judge.api_key_variable or None,
    max_tokens_field=judge.max_tokens_field,
  )
