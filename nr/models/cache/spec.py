"""Settings of a key-value cache: one frozen record for every layout."""

import dataclasses

from nr.names import unknown
from nr.spec import Spec

LAYOUTS = ("static", "ring", "shared_prefix", "paged")
QUANTIZATIONS = ("int8",)
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class CacheSpec(Spec):
  """How keys and values of earlier tokens are kept.

  Attributes:
    layout: "static" (a slot a token), "ring" (the last `window` tokens only),
      "shared_prefix" (static until `share_prefix` makes several samples of each
      prompt read one copy of it) or "paged" (pages of tokens that rows share).
    window: tokens that a token sees, itself included; ring only.
    slack: tokens beyond the window that a ring keeps, so that as many of the newest
      may be taken back: drafts of speculative decoding, trees of drafts less one.
    page_size: tokens of a page; paged only.
    num_pages: pages of all rows together; paged only.
    quantization: None, or "int8": one scale for each token and head.
    dtype: storage type of what is not quantised; the compute type when None.
  """

  layout: str = "static"
  window: int | None = None
  slack: int = 0
  page_size: int = 16
  num_pages: int | None = None
  quantization: str | None = None
  dtype: str | None = None

  def __post_init__(self):
    for name, choices in dict(layout=LAYOUTS, quantization=QUANTIZATIONS, dtype=DTYPES).items():
      value = getattr(self, name)
      if value not in choices and (value is not None or name == "layout"):
        raise ValueError(unknown(f"CacheSpec.{name}", value, choices))
    self._require_size("window", 1, "ring")
    self._require_size("num_pages", 1, "paged")
    if not isinstance(self.slack, int) or self.slack < 0 or (self.slack and self.layout != "ring"):
      raise ValueError(f"CacheSpec.slack={self.slack!r}: give a number of tokens, and layout='ring'")
    if not isinstance(self.page_size, int) or self.page_size < 1:
      raise ValueError(f"CacheSpec.page_size={self.page_size!r}: give a positive number of tokens")

  def _require_size(self, name: str, least: int, layout: str) -> None:
    value = getattr(self, name)
    if self.layout != layout:
      if value is not None:
        raise ValueError(
          f"CacheSpec.{name}={value!r}: layout={self.layout!r} has no use for it; leave it out"
        )
    elif not isinstance(value, int) or value < least:
      raise ValueError(f"CacheSpec.{name}={value!r}: layout={layout!r} needs a number, at least {least}")

  @property
  def is_always_uneven(self) -> bool:
    """Whether rows always have free ends of their own."""
    return self.layout == "paged"
