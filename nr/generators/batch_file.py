"""Text from batch files: requests written as OpenAI's batch JSON lines, results read back in any order.

generator = BatchFile("in.jsonl", "out.jsonl", model="llama")
generator.write(requests)
# vllm run-batch -i in.jsonl -o out.jsonl --model llama     (or OpenAI's batch interface)
samples = list(generator.generate(requests))
"""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from nr.data.bad_records import DataError
from nr.files import replace_text
from nr.generators.openai_wire import AnswerError, Wire
from nr.generators.protocol import Cost, Request, Sample, check_requests, failed, request_hash
from nr.names import unknown

BAD_LINES = ("raise", "skip")
_HASH_DIGITS = 12


class BatchFile:
  """A generator over two files.

  Args:
    requests_path: JSON lines that `write` makes.
    results_path: JSON lines that the batch makes of them.
    model: name by which the server knows its model.
    name: for reports; None: the model's.
    samples_per_call: most samples a line asks for; None: all of a request.
    on_bad_line: "raise", or "skip": lines of the results that are damaged, unknown or
      doubled are logged and passed over; of doubled ones the first counts.
    use_chat, use_log_probs, body, max_tokens_field: see `nr.generators.openai_wire.Wire`.
  """

  def __init__(
    self,
    requests_path: str | pathlib.Path,
    results_path: str | pathlib.Path,
    model: str,
    *,
    name: str | None = None,
    samples_per_call: int | None = None,
    on_bad_line: str = "raise",
    use_chat: bool = False,
    use_log_probs: bool = False,
    body: Mapping[str, Any] | None = None,
    max_tokens_field: str = "max_tokens",
  ):
    if on_bad_line not in BAD_LINES:
      raise ValueError(unknown("on_bad_line", on_bad_line, BAD_LINES))
    self.requests_path, self.results_path = pathlib.Path(requests_path), pathlib.Path(results_path)
    self.name, self.samples_per_call, self.on_bad_line = name or model, samples_per_call, on_bad_line
    self.wire = Wire(model, use_chat, use_log_probs, dict(body or {}), max_tokens_field)

  def _lines(self, requests: Iterable[Request]) -> dict[str, tuple[Request, list[int]]]:
    """Returns what each line asks for, by its custom_id.

    It holds a hash of the request and of the settings, so that results of another prompt are not taken for this one's.
    """
    settings = json.dumps([self.wire.model, self.wire.use_chat, self.wire.use_log_probs, self.wire.body])
    found = {}
    for request in check_requests(requests):
      size = self.samples_per_call or request.num_samples
      told = request_hash(request, settings)[:_HASH_DIGITS]
      for start in range(0, request.num_samples, size):
        indices = list(range(start, min(start + size, request.num_samples)))
        found[f"{request.id}#{start}#{told}"] = (request, indices)
    return found

  def write(self, requests: Iterable[Request]) -> int:
    """Writes the file of requests, whole or not at all. Returns the number of lines.

    Raises:
      ValueError: two requests with one id, or a chain that servers do not know.
    """
    lines = []
    for custom_id, (request, indices) in self._lines(requests).items():
      path, body = self.wire.path_of(request), self.wire.body_of(request, indices)
      lines.append(json.dumps({"custom_id": custom_id, "method": "POST", "url": path, "body": body}) + "\n")
    self.requests_path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(self.requests_path, "".join(lines))
    return len(lines)

  def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
    """Yields every sample of every request from the results; see `Generator`.

    What the batch refused, and what is missing, comes as failed samples.

    Raises:
      DataError: no results yet (the requests are then written, and it says how to run them);
        with on_bad_line="raise" a line that is damaged, unknown or doubled, by file and line.
    """
    asked = self._lines(requests := list(requests))
    if not self.results_path.is_file():
      count = self.write(requests)
      raise DataError(
        f"{self.results_path}: no results yet; {count} requests are in {self.requests_path}: run "
        f"vllm run-batch -i {self.requests_path} -o {self.results_path} --model {self.wire.model}, then come back"
      )
    seen: dict[str, int] = {}
    with open(self.results_path, "rb") as stream:
      for number, line in enumerate(stream, start=1):
        if not line.strip():
          continue
        try:
          custom_id, samples = self._read(line, asked, seen)
        except (ValueError, TypeError, AttributeError) as error:
          self._reject(f"{self.results_path}, line {number}: {error}")
          continue
        seen[custom_id] = number
        yield from samples
    for custom_id in asked.keys() - seen.keys():
      request, indices = asked[custom_id]
      problem = f"{self.results_path} has no line for custom_id {custom_id!r}"
      yield from (failed(request, index, self.wire.model, problem) for index in indices)

  def _reject(self, problem: str) -> None:
    if self.on_bad_line == "raise":
      raise DataError(problem + "; correct the file, or set on_bad_line='skip'")
    logging.warning("%s; passed over", problem)

  def _read(self, line: bytes, asked: Mapping, seen: Mapping[str, int]) -> tuple[str, list[Sample]]:
    """Returns what one line answers. Raises ValueError where it is damaged, unknown or doubled."""
    try:
      entry = json.loads(line)
      custom_id = entry["custom_id"]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"no result ({error!r}), it reads {line[:80]!r}") from error
    if custom_id not in asked:
      raise ValueError(f"custom_id {custom_id!r} was not asked for")
    if custom_id in seen:
      raise ValueError(f"custom_id {custom_id!r} came in line {seen[custom_id]} already")
    request, indices = asked[custom_id]
    response = entry.get("response") or {}
    problem = entry.get("error")
    if not problem and response.get("status_code", 200) != 200:
      problem = f"HTTP {response['status_code']}: {json.dumps(response.get('body'))[:300]}"
    if not problem:
      try:
        return custom_id, self.wire.samples_of(request, indices, response.get("body"), Cost(calls=1))
      except AnswerError as error:
        problem = str(error)
    problem = problem if isinstance(problem, str) else json.dumps(problem)
    return custom_id, [failed(request, index, self.wire.model, problem) for index in indices]
