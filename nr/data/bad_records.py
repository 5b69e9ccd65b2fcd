"""What happens to a record that cannot be used: refused by name, or set aside and counted.

Every reader of this package reports a bad record through one `Quarantine`, so
that a user's mistake is always answered with the file, the line or index, the
field, the problem and the remedy, and so that nothing is ever lost silently.
"""

import base64
import json
import pathlib
from typing import Any

from absl import logging

from nr.names import unknown

POLICIES = ("raise", "quarantine")


class DataError(ValueError):
  """A user's mistake in data or in its settings, told in one line."""


class Quarantine:
  """Takes bad records: raises on the first, or writes each aside and counts it.

  Args:
    policy: "raise" or "quarantine" (the setting `on_bad_record`).
    path: JSON lines file for the bad records; required by "quarantine". A line
      holds file, line (or index), field, problem, and the record itself, as text
      where it is UTF-8 and as base64 where it is not. Begun afresh by every pass.

  Raises:
    DataError: unknown policy, or "quarantine" without a path.
  """

  def __init__(self, policy: str = "raise", path: str | pathlib.Path | None = None):
    if policy not in POLICIES:
      raise DataError(unknown("on_bad_record", policy, POLICIES))
    if policy == "quarantine" and not path:
      raise DataError(
        "quarantine_path is empty: on_bad_record='quarantine' needs a file to set bad records aside in"
      )
    self.policy = policy
    self.path = pathlib.Path(path) if path else None
    self.count = 0

  def reject(self, file: Any, where: str, field: str | None, problem: str, remedy: str, raw: Any = None):
    """Reports one bad record.

    Args:
      file: the file or source that holds it.
      where: its place, such as "line 12" or "record 3".
      field: the offending field, or None when the record as a whole is bad.
      problem: what is wrong with it.
      remedy: what the user can do.
      raw: the record, bytes or text or any JSON value; kept in the quarantine file.

    Raises:
      DataError: when the policy is "raise".
    """
    at_field = f", field {field!r}" if field else ""
    message = f"{file}, {where}{at_field}: {problem}; {remedy}"
    if self.policy == "raise":
      raise DataError(message + ", or set on_bad_record='quarantine' to set such records aside")
    entry = {"file": str(file), "where": where, "field": field, "problem": problem, **_as_json(raw)}
    if self.count == 0:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      logging.warning("first bad record, set aside in %s: %s", self.path, message)
    with open(self.path, "a" if self.count else "w", encoding="utf-8") as stream:
      stream.write(json.dumps(entry) + "\n")  # ASCII, so that lone surrogates survive
    self.count += 1

  def report(self, source: Any) -> None:
    """Logs how many records of `source` were set aside, when any were."""
    if self.count:
      logging.warning("%s: %d bad records set aside in %s", source, self.count, self.path)


def _as_json(raw: Any) -> dict[str, Any]:
  """Returns the record as {"text"}, {"base64"} or {"record"}, whichever is faithful."""
  if isinstance(raw, bytes):
    try:
      return {"text": raw.decode("utf-8")}
    except UnicodeDecodeError:
      return {"base64": base64.b64encode(raw).decode("ascii")}
  if raw is None or isinstance(raw, str):
    return {"text": raw}
  try:
    json.dumps(raw)
    return {"record": raw}
  except (TypeError, ValueError):
    return {"text": repr(raw)}
