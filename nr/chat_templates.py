"""Chat templates: programs by strangers that write a conversation as text (needs the extra [text]).

They run in jinja2's immutable sandbox, with what `transformers` gives them: `tojson`,
`raise_exception`, loop controls, and `{% generation %}` blocks, which change nothing here.
`strftime_now` is not given: templates that ask whether it is defined then write a fixed
date, and a prompt does not depend on the day.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

# Our wording of two formats in wide use: template, what a text begins with, what ends a turn.
BUILT_IN = {
  "chatml": (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "",
    "<|im_end|>",
  ),
  "llama3": (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "<|begin_of_text|>",
    "<|eot_id|>",
  ),
}


@functools.cache
def _environment() -> Any:
  """Returns the sandbox that templates are compiled in."""
  try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
  except ImportError as error:
    raise ImportError("chat templates need jinja2: pip install nr[text]") from error

  class Generation(jinja2.ext.Extension):
    """Passes over {% generation %} and {% endgeneration %}."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
      """Returns what stands between the two tags."""
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def raise_exception(message: str):
    raise jinja2.exceptions.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
  )
  environment.globals["raise_exception"] = raise_exception
  environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
  return environment


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
  return _environment().from_string(template)


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
  """Runs a chat template, as `transformers` does.

  Args:
    template: jinja2 source.
    messages: dictionaries with "role" and "content".
    **variables: what else the template knows (bos_token, add_generation_prompt, tools).

  Raises:
    ImportError: jinja2 is not installed.
    ValueError: the template raised, is malformed, or tried what the sandbox forbids.
  """
  _environment()  # names the extra where jinja2 is missing
  import jinja2

  try:
    return _compiled(template).render(messages=[dict(message) for message in messages], **variables)
  except (jinja2.exceptions.TemplateError, TypeError) as error:
    raise ValueError(f"the chat template refused the messages: {error}") from error
