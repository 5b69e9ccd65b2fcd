"""Text from any server with OpenAI's interface: vLLM, SGLang, llama.cpp, TGI, OpenAI itself.

    generator = OpenAICompatible("http://localhost:8000", model="llama", cache="answers.jsonl")
    for sample in generator.generate(requests): ...

Many requests are under way at once. What a server refuses for now (429, 5xx, a broken
connection, silence, an answer that is no answer) is asked again, later and later; what it
refuses for good, or answers with another number of texts, comes back as a failed sample.
With a cache, a run that was killed goes on where it was: nothing is asked twice, nothing is lost.

Our own on the standard library: the package `openai` would replace the forty lines of `_post`
(one POST of JSON), not what this file is for: the cache, the bound on what is under way, each
sample exactly once. It retries by rules of its own (twice by default), under ours, and brings
httpx and pydantic into the core's tests.
"""

import concurrent.futures
import contextlib
import email.utils
import http.client
import json
import os
import pathlib
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from nr.data.bad_records import DataError
from nr.generators.openai_wire import AnswerError, Wire
from nr.generators.protocol import Cost, Request, Sample, check_requests, failed
from nr.generators.sample_cache import SampleCache

_LATER = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_MOST_BYTES = 256 * 2**20


class _Refused(Exception):
  """What the server did not answer; `is_final` where asking again would not help."""

  def __init__(self, message: str, *, is_final: bool = False, wait: float | None = None):
    super().__init__(message)
    self.is_final, self.wait = is_final, wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  """Follows no redirect: it would carry the key to another host."""

  def redirect_request(self, *arguments: Any) -> None:
    return None


class OpenAICompatible:
  """A generator over HTTP.

  Args:
    url: of the server, without "/v1".
    model: name by which the server knows its model.
    name: for reports; None: the model's.
    cache: JSON lines file of samples (see `SampleCache`); None: none.
    concurrency: requests under way at once.
    samples_per_call: most samples asked for in one call; None: all of a request.
    timeout: seconds that one call may take, from connecting to its last byte.
    max_attempts: calls made for the same samples before they fail.
    base_wait: seconds before the second attempt, doubled each time, times a random
      0.5 to 1 so that many do not come back together. The server's Retry-After, where
      longer, is waited for.
    max_wait: most seconds between two attempts, Retry-After's included.
    api_key_variable: environment variable that holds the key; None: no key. The key is
      neither logged nor kept in the cache, and follows no redirect.
    use_chat, use_log_probs, body, max_tokens_field: see `nr.generators.openai_wire.Wire`.

  Raises:
    ValueError: a number below 1, an address that is none, a variable that is not set.
  """

  def __init__(
    self,
    url: str,
    model: str,
    *,
    name: str | None = None,
    cache: str | pathlib.Path | None = None,
    concurrency: int = 16,
    samples_per_call: int | None = None,
    timeout: float = 600.0,
    max_attempts: int = 8,
    base_wait: float = 0.5,
    max_wait: float = 120.0,
    api_key_variable: str | None = None,
    use_chat: bool = False,
    use_log_probs: bool = False,
    body: Mapping[str, Any] | None = None,
    max_tokens_field: str = "max_tokens",
  ):
    for field, value in dict(concurrency=concurrency, max_attempts=max_attempts).items():
      if value < 1:
        raise ValueError(f"{field}={value}: give at least 1")
    if samples_per_call is not None and samples_per_call < 1:
      raise ValueError(f"samples_per_call={samples_per_call}: give at least 1, or None for all")
    if not url.startswith(("http://", "https://")):
      raise ValueError(f"url={url!r}: give the server's address, such as http://localhost:8000")
    self._key = os.environ.get(api_key_variable, "") if api_key_variable else ""
    if api_key_variable and not self._key:
      raise ValueError(
        f"api_key_variable={api_key_variable!r}: no such environment variable is set; set it, or None"
      )
    self.url = url.rstrip("/").removesuffix("/v1")
    self.name = name or model
    self.wire = Wire(model, use_chat, use_log_probs, dict(body or {}), max_tokens_field)
    self.concurrency, self.samples_per_call = concurrency, samples_per_call
    self.timeout, self.max_attempts, self.base_wait, self.max_wait = (
      timeout,
      max_attempts,
      base_wait,
      max_wait,
    )
    self._cache_path = cache
    self._random = random.Random()
    self._opener = urllib.request.build_opener(_NoRedirect)

  def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
    """Yields every sample of every request; see `Generator`. Cached ones come with the cost they once had.

    Raises:
      ValueError: two requests with one id, or a chain that servers do not know, before any is sent.
      DataError: a damaged cache.
    """
    requests = check_requests(requests)
    for request in requests:
      self.wire.body_of(request, range(request.num_samples))
    source = json.dumps(
      [self.url, self.wire.model, self.wire.use_chat, self.wire.use_log_probs, self.wire.body]
    )
    cache = SampleCache(self._cache_path, source) if self._cache_path is not None else None
    with contextlib.closing(cache) if cache is not None else contextlib.nullcontext():
      calls = []
      for request in requests:
        known = cache.get(request) if cache is not None else {}
        yield from known.values()
        missing = [index for index in range(request.num_samples) if index not in known]
        size = self.samples_per_call or len(missing)
        calls += [(request, missing[start : start + size]) for start in range(0, len(missing), size or 1)]
      yield from self._all(calls, cache)

  def _all(self, calls: list[tuple[Request, list[int]]], cache: SampleCache | None) -> Iterator[Sample]:
    """Keeps calls under way and yields what they give; leaving early gives up those that wait."""
    is_left = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(self.concurrency, thread_name_prefix="openai_compatible")
    waiting, running = iter(calls), set()
    try:
      while True:
        while len(running) < 2 * self.concurrency and (following := next(waiting, None)) is not None:
          running.add(pool.submit(self._call, *following, cache, is_left))
        if not running:
          return
        done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
          yield from future.result()
    finally:
      is_left.set()
      pool.shutdown(wait=True, cancel_futures=True)

  def _call(
    self, request: Request, indices: list[int], cache: SampleCache | None, is_left: threading.Event
  ) -> list[Sample]:
    """Returns the samples of one call, asked for until they come or there is no hope."""
    began, problem = time.monotonic(), ""
    path, body = self.wire.path_of(request), self.wire.body_of(request, indices)
    for attempt in range(1, self.max_attempts + 1):
      try:
        answer = self._post(path, body)
        cost = Cost(calls=attempt, seconds=time.monotonic() - began)
        samples = self.wire.samples_of(request, indices, answer, cost, {"attempts": attempt})
        _keep(cache, request, samples)
        return samples
      except (_Refused, AnswerError) as error:
        problem = self._without_key(str(error))
        if getattr(error, "is_final", False) or attempt == self.max_attempts:
          break
        wait = self.base_wait * 2 ** (attempt - 1) * self._random.uniform(0.5, 1.0)
        wait = min(self.max_wait, max(wait, getattr(error, "wait", None) or 0.0))
        logging.info("%s, request %r: %s; asking again in %.1f s", self.name, request.id, problem, wait)
        if is_left.wait(wait):
          problem = "given up: nobody waits for it any more"
          break
    cost = Cost(calls=attempt / len(indices), seconds=(time.monotonic() - began) / len(indices))
    problem = f"{problem} (attempt {attempt} of {self.max_attempts})"
    return [failed(request, index, self.wire.model, problem, cost) for index in indices]

  def _without_key(self, text: str) -> str:
    return text.replace(self._key, "[key]") if self._key else text

  def _post(self, path: str, body: dict) -> Any:
    """Sends one body and returns the JSON that comes back. Raises _Refused."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    sent = urllib.request.Request(self.url + path, json.dumps(body).encode("ascii"), headers, method="POST")
    deadline = time.monotonic() + self.timeout
    try:
      with self._opener.open(sent, timeout=self.timeout) as response:
        raw = _read_until(response, deadline)
    except urllib.error.HTTPError as error:
      raise _of_status(error) from None
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
      raise _Refused(f"no answer from {self.url}{path} ({type(error).__name__}: {error})") from None
    try:
      return json.loads(raw)
    except (ValueError, RecursionError):
      raise _Refused(f"an answer that is no JSON: {raw[:200]!r}") from None


def _keep(cache: SampleCache | None, request: Request, samples: list[Sample]) -> None:
  """Puts samples into the cache; what JSON cannot write is not kept, and no reason to lose the others."""
  if cache is None:
    return
  try:
    cache.put(request, samples)
  except DataError as error:
    logging.warning("request %r is not kept in the cache: %s", request.id, error)


def _read_until(response: Any, deadline: float) -> bytes:
  """Reads a body, however slowly it drips, but not beyond the deadline."""
  pieces, size = [], 0
  while piece := response.read1(65536):
    pieces.append(piece)
    size += len(piece)
    if time.monotonic() > deadline:
      raise TimeoutError("the answer took too long")
    if size > _MOST_BYTES:
      raise OSError(f"the answer has more than {_MOST_BYTES} bytes")
  raw = b"".join(pieces)
  expected = response.headers.get("Content-Length")
  if expected is not None and len(raw) != int(expected):
    raise OSError(f"the answer ended after {len(raw)} of {expected} bytes")
  return raw


def _of_status(error: urllib.error.HTTPError) -> _Refused:
  """Returns what a status says: whether to ask again, and when."""
  with contextlib.closing(error):
    try:
      told = error.read(2000).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
      told = ""
  message = f"HTTP {error.code} {error.reason}: {told[:300]}"
  return _Refused(
    message, is_final=error.code not in _LATER, wait=seconds_of(error.headers.get("Retry-After"))
  )


def seconds_of(retry_after: str | None) -> float | None:
  """Returns the seconds that a Retry-After header asks for, a number or a date; None for none.

  >>> seconds_of("2.5"), seconds_of("soon")
  (2.5, None)
  """
  if retry_after is None:
    return None
  try:
    return max(0.0, float(retry_after))
  except ValueError:
    pass
  try:
    return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
  except (TypeError, ValueError):
    return None
