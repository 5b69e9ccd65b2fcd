"""Generates text from a checkpoint.

  python -m nr.generate --checkpoint=PATH --prompt='Once upon a time' -n 4 \\
      --chain='temperature(0.7)|top_p(0.9)'

A checkpoint is a run directory of nr.main, a model folder inside one, a Hugging
Face folder, a .gguf file, or llama2.c's .bin. Text goes to stdout; token rates
and the time to the first token go to stderr.
"""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

EXAMPLES = """
chains: transforms from left to right, such as
  temperature(0.7)|top_p(0.9)
  repetition_penalty(1.2)|no_repeat_ngram(3)|min_p(0.05)|temperature(1.2)
  (--list-transforms shows all with their parameters)

examples:
  # four samples of one prompt, from one reading of it
  python -m nr.generate --checkpoint=smollm2.gguf --prompt='The sea' -n 4 --chain='temperature(0.8)'
  # beam search
  python -m nr.generate --checkpoint=hf_folder --prompt='The sea' --beam-width=4
  # the same law, faster on repetitive text: drafts looked up in the text itself
  python -m nr.generate --checkpoint=hf_folder --prompt-file=prompts.txt --draft=ngram
  # with a low-rank adapter that PEFT, or a run here, has trained
  python -m nr.generate --checkpoint=hf_folder --adapter=adapter_folder --prompt='The sea'
  # only texts that match a pattern
  python -m nr.generate --checkpoint=hf_folder --prompt='Date: ' --regex='[0-9]{4}-[0-9]{2}-[0-9]{2}'
"""


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m nr.generate",
    description=__doc__.split("\n\n")[0] + " " + __doc__.split("\n\n")[2].replace("\n", " "),
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--list-transforms", action="store_true", help="list the transforms of --chain and leave"
  )
  source = parser.add_argument_group("model")
  source.add_argument("--checkpoint", help="run directory, model folder, Hugging Face folder, .gguf or .bin")
  source.add_argument("--model", help="which model of a run directory, such as students/runs/ntp_seed0/model")
  source.add_argument(
    "--adapter", help="low-rank adapter to add into the weights: a folder in PEFT's format, or one of a run"
  )
  source.add_argument("--tokenizer", help="file or folder, where it does not lie beside the model")
  source.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the parameters")
  source.add_argument("--quantize", choices=("int8", "int4"), help="store the weights in fewer bits")
  prompts = parser.add_argument_group("prompts")
  prompts.add_argument("--prompt", action="append", default=[], help="text to continue; may be repeated")
  prompts.add_argument("--prompt-file", help="one prompt a line, or .jsonl with a field 'prompt'")
  prompts.add_argument(
    "--chat", action="store_true", help="prompts are a user's turns in the model's chat template"
  )
  prompts.add_argument(
    "--heal", action="store_true", help="let the first token rewrite the end of the prompt"
  )
  law = parser.add_argument_group("what is generated")
  law.add_argument(
    "--chain", default="", help="transforms of the logits, see below; empty: the model's own law"
  )
  law.add_argument("-n", "--num-samples", type=int, default=1, help="samples (or beams) of each prompt")
  law.add_argument("--max-new-tokens", type=int, default=128, help="most tokens to add (default 128)")
  law.add_argument("--seed", type=int, default=0, help="of the random key; the same seed gives the same text")
  law.add_argument("--greedy", action="store_true", help="always the most probable token")
  law.add_argument("--stop", action="append", default=[], help="end when this text appears; may be repeated")
  law.add_argument("--ignore-end", action="store_true", help="go on after the end of text")
  constraint = law.add_mutually_exclusive_group()
  constraint.add_argument("--regex", help="only texts that match this regular expression")
  constraint.add_argument(
    "--json-schema", help="only JSON that this schema (text or file) allows, finite ones"
  )
  constraint.add_argument(
    "--choice", action="append", default=[], help="only one of these texts; may be repeated"
  )
  driver = parser.add_argument_group("how")
  driver.add_argument(
    "--cache",
    default="static",
    help="keys and values: static, int8, shared_prefix (for -n), ring:W (last W tokens)",
  )
  driver.add_argument("--beam-width", type=int, default=0, help="beam search with so many beams")
  driver.add_argument("--length-penalty", type=float, default=0.0, help="of beam search, power of the length")
  driver.add_argument("--draft", help="speculate: 'ngram', 'layers:K' (early exit), or a checkpoint")
  driver.add_argument("--draft-length", type=int, default=4, help="tokens drafted at a time (default 4)")
  output = parser.add_argument_group("output")
  output.add_argument("--json", action="store_true", help="one JSON object a text")
  output.add_argument("--stream", action="store_true", help="print the text while it grows (one text)")
  output.add_argument("--logprobs", action="store_true", help="with each token and its log-probabilities")
  output.add_argument(
    "--warm-up", action="store_true", help="generate once before, so that times leave out compilation"
  )
  return parser


def main(argv: list[str] | None = None) -> int:
  """Entry point of `python -m nr.generate`: one line on error."""
  arguments = make_parser().parse_args(argv)
  try:
    if arguments.list_transforms:
      print(list_transforms())
      return 0
    run(arguments)
  except KeyboardInterrupt:
    print("\nStopped.", file=sys.stderr)
    return 130
  except BrokenPipeError:
    return 0
  except (ValueError, OSError, ImportError, RuntimeError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1
  return 0


def list_transforms() -> str:
  """Returns a line for each transform: its call with parameters, and what it does."""
  import nr.generation.transforms  # noqa: F401  registers them
  from nr.generation.transforms.algebra import REGISTRY

  lines = []
  for name, cls in sorted(REGISTRY.items()):
    fields = [
      field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default}"
      for field in dataclasses.fields(cls)
    ]
    lines.append(f"{name}({', '.join(fields)})\n    {(cls.__doc__ or '').strip().splitlines()[0]}")
  return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
  """Checks the request, generates, prints."""
  _check(arguments)
  from nr.generation.transforms import parse
  from nr.generators import jobs
  from nr.generators.checkpoints import open_checkpoint

  # Mistakes are answered before the model is read.
  law = parse(arguments.chain)
  prompts = jobs.read_prompts(arguments.prompt, arguments.prompt_file)
  chosen = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(jobs.JobSettings)}
  settings = jobs.JobSettings(**{**chosen, "stop": tuple(arguments.stop), "choice": tuple(arguments.choice)})
  started = time.perf_counter()
  checkpoint = open_checkpoint(
    arguments.checkpoint,
    tokenizer=arguments.tokenizer,
    model=arguments.model,
    dtype=arguments.dtype,
    adapter=arguments.adapter,
  )
  print(f"model read in {time.perf_counter() - started:.1f} s", file=sys.stderr)
  job = jobs.Job(settings, checkpoint, prompts, law)
  if arguments.warm_up:
    job.generate(lambda generation: None)
  printer = Printer(arguments, checkpoint, job)
  started = time.perf_counter()
  texts = job.generate(printer.on_tokens)
  printer.finish(texts, time.perf_counter() - started)


def _check(arguments: argparse.Namespace) -> None:
  if arguments.logprobs and arguments.beam_width:
    raise ValueError("--logprobs: beams keep the sum of a text only; leave it out, or --beam-width")
  if arguments.checkpoint is None:
    raise ValueError("--checkpoint is missing: give a run directory, model folder or file")
  if not arguments.prompt and not arguments.prompt_file:
    raise ValueError("--prompt is missing: give text to continue, or --prompt-file")
  many = arguments.num_samples > 1 or len(arguments.prompt) > 1 or arguments.prompt_file
  if arguments.stream and (many or arguments.json or arguments.beam_width or arguments.draft):
    raise ValueError(
      "--stream prints one text of plain sampling: give one --prompt, no -n, --json, --beam-width or --draft"
    )


class Printer:
  """Writes texts to stdout, and times to stderr."""

  def __init__(self, arguments: argparse.Namespace, checkpoint: Any, job: Any):
    self.arguments, self.checkpoint, self.job = arguments, checkpoint, job
    self.started, self.first, self.printed = time.perf_counter(), None, ""

  def on_tokens(self, generation: Any) -> None:
    """Notes when the first token was there; streaming, prints what is new."""
    generation.finish_R.block_until_ready()
    if self.first is None:
      self.first = time.perf_counter() - self.started
    if self.arguments.stream:
      tokens = generation.tokens_RN[0, : int(generation.lengths_R[0])].tolist()
      text = self._decode(tokens)
      if generation.finish_R[0] == 0 and self.arguments.stop:
        # What may become a stop string is not printed yet.
        text = text[: len(text) - max(map(len, self.arguments.stop)) + 1]
      # A character may need more tokens: wait until it is whole.
      if not text.endswith("\ufffd") and len(text) > len(self.printed):
        print(text[len(self.printed) :], end="", flush=True)
        self.printed = text

  def _decode(self, tokens: list[int]) -> str:
    ends = self.checkpoint.end_ids
    text = self.checkpoint.tokenizer.decode([token for token in tokens if token not in ends])
    if not self.arguments.stop:
      return text
    from nr.generation.constraints.stop_strings import cut_text

    return text[: cut_text(text, self.arguments.stop)]

  def finish(self, texts: list[Any], seconds: float) -> None:
    """Prints the texts that are not printed yet, and the rates."""
    for text in texts:
      if self.arguments.json:
        print(json.dumps(self._record(text), ensure_ascii=False))
      elif self.arguments.stream:
        print(self._decode(text.tokens)[len(self.printed) :])
      else:
        self._print_plain(text, len(texts) > 1)
      if self.arguments.logprobs and not self.arguments.json:
        self._print_tokens(text)
    sys.stdout.flush()
    count, read = sum(len(text.tokens) for text in texts), sum(map(len, self.job.ids))
    first = "" if self.first is None else f"first token after {self.first:.3f} s, "
    note = "" if self.arguments.warm_up else "; times include compilation, --warm-up leaves it out"
    print(
      f"{len(texts)} texts, {read} prompt tokens, {count} new tokens: {first}{seconds:.3f} s in all, "
      f"{count / seconds:.1f} tokens/s{note}",
      file=sys.stderr,
    )

  def _print_plain(self, text: Any, has_head: bool) -> None:
    if has_head:
      score = "" if text.score is None else f", score {text.score:.4f}"
      print(f"--- prompt {text.prompt}, sample {text.sample}, ended by {text.finish_reason}{score}")
    print(self._decode(text.tokens))

  def _print_tokens(self, text: Any) -> None:
    print("token\tlog p (model)\tlog p (drawn from)\ttext")
    for token, log_prob, transformed in zip(
      text.tokens, text.log_probs, text.transformed_log_probs or text.log_probs
    ):
      print(f"{token}\t{log_prob:.4f}\t{transformed:.4f}\t{self.checkpoint.tokenizer.decode([token])!r}")

  def _record(self, text: Any) -> dict[str, Any]:
    record = {
      "prompt": self.job.prompts[text.prompt],
      "sample": text.sample,
      "text": self._decode(text.tokens),
      "finish_reason": text.finish_reason,
      "num_tokens": len(text.tokens),
      "log_prob": sum(text.log_probs),
    }
    if text.score is not None:
      record["score"] = text.score
    if self.arguments.logprobs:
      record["tokens"] = text.tokens
      record["log_probs"] = text.log_probs
      record["transformed_log_probs"] = text.transformed_log_probs
    return record


if __name__ == "__main__":
  sys.exit(main())
