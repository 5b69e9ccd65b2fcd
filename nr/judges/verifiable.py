"""Answers that a program can check: exact ones, mathematics, and forms."""

import concurrent.futures
import json
import logging
import multiprocessing
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from nr.judges.protocol import Item, Judgement, judgement
from nr.names import unknown

NORMALIZATIONS: dict[str, Callable[[str], str]] = {
  "none": lambda text: text,
  "strip": str.strip,
  "words": lambda text: " ".join(text.split()),
  "casefold": lambda text: " ".join(text.casefold().split()),
}


class ExactMatch:
  """1 where the response is the reference, or one of a list of them, else 0.

  Args:
    normalization: of both: "none", "strip", "words" (single spaces) or "casefold".
    extract: finds the answer in a response; None where there is none, which is wrong.
  """

  def __init__(self, normalization: str = "strip", extract: Callable[[str], str | None] | None = None):
    if normalization not in NORMALIZATIONS:
      raise ValueError(unknown("normalization", normalization, NORMALIZATIONS))
    self._normalize, self._extract = NORMALIZATIONS[normalization], extract
    self.name = "exact match"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item; None without a reference."""
    return [self._judged(item) for item in items]

  def _judged(self, item: Item) -> Judgement:
    references = _references(item)
    if not references:
      return Judgement(None, "there is no reference")
    answer = item.response if self._extract is None else self._extract(item.response)
    if answer is None:
      return Judgement(0.0, "no answer found")
    accepted = {self._normalize(str(each)) for each in references}
    return judgement(self._normalize(answer) in accepted, answer=answer)


def _references(item: Item) -> list:
  """Returns the references of an item as a list."""
  if item.reference is None:
    return []
  return list(item.reference) if isinstance(item.reference, list | tuple) else [item.reference]


def last_line(text: str) -> str | None:
  """Returns the last line that is not empty, or None."""
  return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)


def after(marker: str) -> Callable[[str], str | None]:
  """Returns a function that finds what stands behind the last `marker`, to the end of its line."""

  def extract(text: str) -> str | None:
    head, found, tail = text.rpartition(marker)
    return tail.splitlines()[0].strip() if found and tail.strip() else None

  return extract


class MathAnswer:
  """1 where the response's last answer equals the reference mathematically, else 0.

  Each comparison runs in a process of a pool and is killed at its time limit: some
  expressions keep computer algebra busy for ever, beyond the reach of signals.
  Close it, or use it in a `with` block, to end the processes.

  Args:
    timeout: seconds for one comparison.
    processes: compared at once.

  Raises:
    ImportError: math-verify or pebble is not installed (extra [synthesis]).

  Source: the package math-verify parses and compares; pebble kills.
  """

  def __init__(self, timeout: float = 10.0, processes: int = 2):
    try:
      import math_verify  # noqa: F401
      import pebble
    except ImportError as error:
      raise ImportError(
        "checking mathematics needs math-verify and pebble: pip install 'nr[synthesis]'"
      ) from error
    self.name, self.timeout = "math answer", timeout
    # Forking a process that runs JAX may deadlock.
    context = multiprocessing.get_context("spawn")
    self._pool = pebble.ProcessPool(max_workers=processes, context=context, initializer=_warm_up)

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item; None without a reference that can be read, or out of time."""
    waiting = [
      self._pool.schedule(
        _compare, args=(list(map(str, _references(item))), item.response), timeout=self.timeout
      )
      for item in items
    ]
    return [self._judged(future) for future in waiting]

  def _judged(self, future: concurrent.futures.Future) -> Judgement:
    try:
      score, reason, answer = future.result()
    except concurrent.futures.TimeoutError:
      return Judgement(None, f"the comparison took more than {self.timeout:g} s")
    except Exception as error:  # whatever computer algebra raises, or a process that died
      return Judgement(None, f"the comparison failed: {type(error).__name__}: {error}")
    return Judgement(score, reason, {"answer": answer})

  def close(self) -> None:
    """Ends the processes."""
    self._pool.stop()
    self._pool.join()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()


def _warm_up() -> None:
  """Imports what takes seconds, outside of the time limit."""
  import math_verify

  # It warns at every call that its own time limit is off.
  logging.getLogger("math_verify").setLevel(logging.ERROR)
  math_verify.parse("$1$", parsing_timeout=None)


def _compare(references: list[str], response: str) -> tuple[float | None, str, str]:
  """Returns (score, reason, answer as text). Runs in a process of its own."""
  import math_verify

  golden = []
  for reference in references:
    golden += math_verify.parse(reference, parsing_timeout=None) or math_verify.parse(
      f"${reference}$", parsing_timeout=None
    )
  if not golden:
    return None, f"no reference that can be read: {references}", ""
  answer = math_verify.parse(response, parsing_timeout=None)
  if not answer:
    return 0.0, "no answer found", ""
  is_right = math_verify.verify(golden, answer, timeout_seconds=None, raise_on_error=True)
  return float(is_right), "", str(answer[-1])


class JsonObject:
  """1 where the response is a JSON object with the wanted keys, else 0; its details hold the object.

  Args:
    keys: names that must be there, or name -> type of the value.
    is_closed: whether other keys make it wrong.
    is_embedded: whether text around the object is allowed (the first "{" to the last "}" counts).
  """

  def __init__(
    self, keys: Sequence[str] | Mapping[str, type], *, is_closed: bool = True, is_embedded: bool = False
  ):
    self._types = dict(keys) if isinstance(keys, Mapping) else dict.fromkeys(keys, object)
    self._is_closed, self._is_embedded = is_closed, is_embedded
    self.name = "JSON object"

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item."""
    return [self._judged(item.response) for item in items]

  def _judged(self, text: str) -> Judgement:
    if self._is_embedded:
      text = text[text.find("{") : text.rfind("}") + 1]
    try:
      found = json.loads(text)
    except (ValueError, RecursionError) as error:
      return Judgement(0.0, f"no JSON: {error}")
    if not isinstance(found, dict):
      return Judgement(0.0, f"a {type(found).__name__}, not an object")
    for key, kind in self._types.items():
      if key not in found:
        return Judgement(0.0, f"key {key!r} is missing", {"object": found})
      if not isinstance(found[key], kind) or (isinstance(found[key], bool) and kind in (int, float)):
        return Judgement(0.0, f"key {key!r} holds a {type(found[key]).__name__}", {"object": found})
    others = [key for key in found if key not in self._types]
    if others and self._is_closed:
      return Judgement(0.0, f"key {others[0]!r} is too much", {"object": found})
    return Judgement(1.0, "", {"object": found})


class Matches:
  """1 where the whole response matches a regular expression, else 0; its details hold the named groups."""

  def __init__(self, pattern: str, name: str = "pattern"):
    self._pattern, self.name = re.compile(pattern), name

  def judge(self, items: Sequence[Item]) -> list[Judgement]:
    """Returns a judgement for each item."""
    found = [self._pattern.fullmatch(item.response) for item in items]
    return [
      Judgement(0.0, f"does not match {self._pattern.pattern!r}")
      if each is None
      else Judgement(1.0, "", each.groupdict())
      for each in found
    ]
