"""Prompts that are written here, so that a real model can be tried without a download.

    arithmetic  word problems with one step, sums and differences of numbers from 2 on
    titles      titles of stories, "The Quiet Harbour"; answers have no reference

Source: ours.
"""

import itertools
from collections.abc import Callable

from nr.data.instructions import Instruction

LARGEST = 12
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
THINGS = ("apples", "books", "coins", "pencils", "stamps", "shells", "marbles", "cards")
SUMS = (
  "{name} has {first} {things} and gets {second} more. How many {things} does {name} have now?",
  "There are {first} {things} in a box and {second} {things} on a table. How many {things} are there in all?",
)
DIFFERENCES = (
  "{name} has {total} {things} and gives {second} of them away. How many {things} does {name} have left?",
  "There were {total} {things} in a box. {name} took {second} of them out. How many {things} are left in the box?",
)
ADJECTIVES = (
  "Quiet", "Broken", "Golden", "Hidden", "Last", "Wandering", "Frozen", "Paper", "Silver", "Forgotten", "Burning",
  "Crooked", "Distant", "Empty", "Gentle", "Hollow", "Iron", "Lonely", "Northern", "Secret",
)  # fmt: skip
NOUNS = (
  "Harbour", "Garden", "Lantern", "Bridge", "Violin", "River", "Orchard", "Letter", "Mountain", "Clock", "Island",
  "Market", "Mirror", "Train", "Winter", "Library", "Compass", "Tower", "Kite", "Bakery",
)  # fmt: skip


def arithmetic() -> list[Instruction]:
  """Returns word problems; names and things change with the numbers, the reference is the number."""
  found = []
  for first, second in itertools.product(range(2, LARGEST + 1), repeat=2):
    for kind, text in enumerate((*SUMS, *DIFFERENCES)):
      words = dict(
        name=NAMES[(3 * first + second + kind) % len(NAMES)],
        things=THINGS[(first + 5 * second + kind) % len(THINGS)],
        first=first,
        second=second,
        total=first + second,
      )
      answer = first + second if kind < len(SUMS) else first
      found.append(Instruction(f"{kind}-{first}-{second}", text.format(**words), str(answer)))
  return found


def titles() -> list[Instruction]:
  """Returns titles of stories."""
  pairs = itertools.product(ADJECTIVES, NOUNS)
  return [Instruction(f"{first}-{second}".lower(), f"The {first} {second}") for first, second in pairs]


WRITTEN: dict[str, Callable[[], list[Instruction]]] = {"arithmetic": arithmetic, "titles": titles}
"""Prompts by the name of what they are."""
