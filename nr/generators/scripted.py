"""Canned answers, for tests and for trying out what is built on generators."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from nr.generators.protocol import Cost, Request, Sample, check_requests, failed

Answer = str | None


class Scripted:
  """A generator that says what it was told to.

  Args:
    answers: by prompt (text, or the content of a chat's last turn) the texts of its
      samples, in turn and over again where there are fewer than samples; or a function
      of the request and the index. None fails.
    name: for reports.

  Attributes:
    requests: all that it was asked, for tests to look at.
  """

  def __init__(
    self, answers: Mapping[str, Sequence[Answer]] | Callable[[Request, int], Answer], name: str = "scripted"
  ):
    self.answers, self.name = answers, name
    self.requests: list[Request] = []

  def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
    """Yields every sample of every request; those without an answer fail. See `Generator`."""
    for request in check_requests(requests):
      self.requests.append(request)
      for index in range(request.num_samples):
        text = self._answer(request, index)
        if text is None:
          yield failed(request, index, self.name, "the script has no answer", Cost(calls=1))
        else:
          cost = Cost(calls=1, generated_tokens=len(text.split()))
          yield Sample(request.id, index, text, finish_reason="stop", model=self.name, cost=cost)

  def _answer(self, request: Request, index: int) -> Answer:
    if callable(self.answers):
      return self.answers(request, index)
    prompt = request.prompt if isinstance(request.prompt, str) else request.prompt[-1].content
    texts = self.answers.get(prompt, ())
    return texts[index % len(texts)] if texts else None
