"""What a compiled program sends between devices, read from its text."""

import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def count_collectives(text: str) -> dict[str, int]:
  """Counts the collectives of a compiled program by kind.

  An instruction inside a loop counts once, however often the loop runs. On TPU a
  reduce-scatter is a fusion of a name of its own, and products of sharded arrays become
  loops of collective-permute.

  Args:
    text: optimised HLO, `compiled.as_text()`.

  >>> count_collectives("%a = f32[8] all-gather(%b)")["all-gather"]
  1
  """
  counts = {kind: len(re.findall(rf"\s{kind}(?:-start)?\(", text)) for kind in KINDS}
  counts["reduce-scatter"] += len(re.findall(r"^%all-reduce-scatter", text, re.M))
  return counts
