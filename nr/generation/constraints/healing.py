"""Token healing: prompts that end inside what the model knows as one token."""

from collections.abc import Sequence

import numpy as np

from nr.generation.constraints.automaton import MAX_BYTES, Automaton
from nr.generation.constraints.lifting import ByteAutomaton, lift
from nr.generation.constraints.vocabulary import Bytes


def heal(
  prompt_ids: Sequence[int], spelled: Sequence[Bytes], *, max_tokens: int = 1
) -> tuple[list[int], bytes]:
  """Takes the end off a prompt where a longer token could have stood.

  "http:" ends with the token ":", and so the model is asked what follows ":" where
  no "://" stood, which it has never seen. Without that last token, and with the
  text bound to begin with ":" (`prefix`, or `after` of the other constraints), it
  may write "://".

  Args:
    prompt_ids: the prompt.
    spelled: what each id spells, from `token_bytes`.
    max_tokens: the most tokens taken off.

  Returns:
    The shortened prompt and the bytes taken off: of the most last tokens, at most
    `max_tokens`, whose bytes together begin some longer token; b"" where there are
    none. One token stays, and control ids are never taken off.
  """
  kept, removed = len(prompt_ids), b""
  tail = b""
  for place in range(len(prompt_ids) - 1, max(0, len(prompt_ids) - 1 - max_tokens), -1):
    piece = spelled[prompt_ids[place]] if 0 <= prompt_ids[place] < len(spelled) else None
    if piece is None:
      break
    tail = piece + tail
    if any(other is not None and len(other) > len(tail) and other.startswith(tail) for other in spelled):
      kept, removed = place, tail
  return list(prompt_ids[:kept]), removed


def prefix(begin: bytes, spelled: Sequence[Bytes], *, max_bytes: int = MAX_BYTES) -> Automaton:
  """Builds the automaton of texts that begin with given bytes and go on freely.

  The first tokens spell the beginning, the last of them possibly more than that;
  afterwards every id is allowed, control ids too. For `begin` b"" that is at once.

  Args:
    begin: what `heal` took off.
    spelled: what each id spells, from `token_bytes`.
    max_bytes: the largest table.

  Raises:
    ValueError: the tokens cannot spell it.
  """
  free = ByteAutomaton(np.zeros((1, 256), np.int32), np.ones(1, bool), 0, np.zeros(1, np.int32))
  return lift(free.behind(begin), spelled, f"the beginning {begin!r}", max_bytes=max_bytes)
