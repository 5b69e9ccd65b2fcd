"""The report's pages on concepts and on steering: plots, tables, words."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nr.evaluation import plots
from nr.evaluation.reports import inline, interval_cell, number, table
from nr.evaluation.statistics import Interval

SHOWN = 6
"""Tokens listed in a cell."""


def draw(folder: pathlib.Path, steering: Mapping[str, Any]) -> None:
  """Draws effect, cost, side effects and agreement against strength."""
  overall = steering["overall"]
  for score, title, label in (
    ("keywords", "Words with a keyword of the concept", "share gained"),
    ("latent", "Tokens on which the teacher's latent fires", "share gained"),
  ):
    lines = {
      "student, this concept": f"{score}_gain",
      "student, a concept as frequent": f"control_{score}_gain",
      "teacher, the same latent": f"teacher_{score}_gain",
    }
    draw_overall(folder / f"steering_{score}.png", overall, lines, title=title, y_label=label)
  draw_overall(
    folder / "steering_side_effects.png",
    overall,
    {"text without the concept": "neutral_loss_change", "text with it": "related_loss_change"},
    title="What the edit does to held-out text",
    y_label="loss, nats a token",
  )
  draw_overall(
    folder / "steering_agreement.png",
    overall,
    {"the same latent": "rank_correlation", "a concept as frequent": "control_rank_correlation"},
    title="Student and teacher, steered alike",
    y_label="rank correlation of shifts",
  )
  for field, title, label in (
    ("kl", "Steering moves the next-token distribution", "KL from unsteered, nats"),
    ("continuation_ppl", "Continuations under the baseline", "perplexity"),
  ):
    lines = {f"concept {swept['concept']}": bands(swept["points"], field) for swept in steering["sweeps"]}
    plots.plot_bands(folder / f"steering_{field}.png", lines, title=title, x_label="strength", y_label=label)


def draw_overall(
  path: pathlib.Path,
  overall: Sequence[Mapping[str, Any]],
  fields: Mapping[str, str],
  *,
  title: str,
  y_label: str,
) -> None:
  """Draws means over concepts; lines of which nothing was measured are left out."""
  lines = {name: bands(overall, field) for name, field in fields.items()}
  plots.plot_bands(path, lines, title=title, x_label="strength", y_label=y_label)


def bands(rows: Sequence[Mapping[str, Any]], field: str) -> tuple[list[float], list[Interval]]:
  """Returns strengths and intervals of a field, where it was measured."""
  known = [row for row in rows if row["strength"] is not None and row[field] is not None]
  return [row["strength"] for row in known], [Interval(**row[field]) for row in known]


def concepts(steering: Mapping[str, Any]) -> str:
  """Returns what names the most used concepts, their strongest contexts, and what became of the rest."""
  named, seen = [], []
  for row in steering["concepts"]:
    named.append(
      [
        str(row["concept"]),
        row["label_count"],
        f"{row['firing_frequency']:.2%}",
        f"{row['selected_frequency']:.2%}",
        *(tokens(row[field]) for field in ("fires_on", "followed_by", "teacher_lens", "student_lens")),
      ]
    )
    texts = " <br> ".join(f"`{inline(context['text'])}`" for context in row["contexts"])
    seen.append([str(row["concept"]), texts])
  header = [
    "concept",
    "times a label",
    "fires on",
    "student selects it on",
    "tokens it fires on",
    "tokens that follow",
    "lens: teacher",
    "lens: student",
  ]
  notes = (
    "Tokens that follow: more often than elsewhere, by log odds (z above 2). Lens: tokens that the teacher's decoder "
    "row, and the student's row of the compression, speak for when the output head reads them directly."
  )
  rows = steering["compression"]
  unused = (
    f"Rows of the student's compression: median norm {number(rows['median_norm'])}, {rows['near_zero']:.1%} below "
    f"0.01; {rows['never_selected']:.1%} of the concepts are selected nowhere in the text that was searched. Weight "
    f"decay alone takes a row from {number(rows['initial_norm'])} to {number(rows['norm_left_by_decay_alone'])}."
  )
  contexts = table(["concept", "strongest validation contexts (token in « »)"], seen)
  return f"{table(header, named)}\n\n{notes}\n\n{contexts}\n\n{unused}"


def tokens(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns tokens as a cell, spaces shown."""
  shown = [row["token"].replace(" ", "␣").replace("\n", "⏎") for row in rows[:SHOWN]]
  return ", ".join(f"`{inline(text)}`" for text in shown) or "-"


def steering(result: Mapping[str, Any]) -> str:
  """Returns the measurements: over all swept concepts, then one by one."""
  parts = [
    f"Arm `{result['arm']}`, mode `{result['mode']}`: {len(result['sweeps'])} concepts, each beside a random concept "
    "that fires as often (steered alike, judged for the first one), and beside the same edit of the same latent of "
    f"the teacher. {len(result['prompts'])} prompts of held-out text.",
    verdict(result["overall"]),
    effects(result["overall"]),
    "![keywords](plots/steering_keywords.png)\n\n![latent](plots/steering_latent.png)",
    "Means over concepts with Student's 95 % intervals over concepts, of shares of words (keywords) and of tokens "
    "(latent), each minus that of the unedited texts of the same prompts.",
    costs(result["overall"]),
    "![side effects](plots/steering_side_effects.png)\n\n![agreement](plots/steering_agreement.png)",
    "Perplexity of the continuations under the unsteered student (geometric mean of ratios). Loss: change in nats a "
    "token of the true next tokens when every position is edited. Agreement: Spearman's correlation, over all tokens, "
    "of the changes of log-probability in the student and in the teacher.",
    "![KL](plots/steering_kl.png)\n\n![perplexity](plots/steering_continuation_ppl.png)",
    *(one_concept(swept, result["prompts"][0]) for swept in result["sweeps"]),
  ]
  return "\n\n".join(parts)


def effects(overall: Sequence[Mapping[str, Any]]) -> str:
  """Returns the table of what steering gained, by strength."""
  fields = [f"{who}{score}_gain" for score in ("keywords", "latent") for who in ("", "control_", "teacher_")]
  header = [
    "strength",
    "keywords gained: student",
    "random concept",
    "teacher",
    "latent gained: student",
    "random concept",
    "teacher",
  ]
  rows = [[row["strength"], *(interval_cell(row[field], 3) for field in fields)] for row in overall]
  return table(header, rows)


def costs(overall: Sequence[Mapping[str, Any]]) -> str:
  """Returns the table of what steering cost, and of its agreement with the teacher, by strength."""
  columns = {
    "KL, nats": ("kl", 3),
    "perplexity, ratio to unedited": ("ppl_ratio", 2),
    "loss of text without the concept": ("neutral_loss_change", 3),
    "of text with it": ("related_loss_change", 3),
    "rank correlation with the teacher": ("rank_correlation", 2),
    "of the random concept": ("control_rank_correlation", 2),
  }
  rows = [
    [row["strength"], *(interval_cell(row[field], digits) for field, digits in columns.values())]
    for row in overall
  ]
  return table(["strength", *columns], rows)


def verdict(overall: Sequence[Mapping[str, Any]]) -> str:
  """Says plainly whether steering did what it should, at the strength that did most of it."""
  if overall[0]["concepts"] < 2:
    return "One concept alone says nothing of others: there is no interval over concepts."
  sentences = []
  for field, what in (
    ("keywords_over_control", "words with a keyword of the concept"),
    ("latent_over_control", "tokens on which the concept's latent fires"),
  ):
    known = [row for row in overall if row[field] is not None]
    if not known:
      continue
    best = max(known, key=lambda row: row[field]["estimate"])
    estimate, low, high = (100 * best[field][name] for name in ("estimate", "low", "high"))
    sure = "excludes" if low > 0 or high < 0 else "includes"
    sentences.append(
      f"Share of {what}: **{estimate:+.1f} percentage points** over text steered by a random concept (95 % interval "
      f"over {best['concepts']} concepts {low:+.1f} to {high:+.1f}, which {sure} 0), at strength "
      f"{number(best['strength'])}, chosen among {len(overall)}; perplexity there is "
      f"{interval_cell(best['ppl_ratio'])} times that of unedited text."
    )
  return "\n".join(f"- {sentence}" for sentence in sentences)


def one_concept(swept: Mapping[str, Any], prompt: str) -> str:
  """Returns the tables and samples of one concept."""
  rows = [
    [
      "none" if point["strength"] is None else point["strength"],
      interval_cell(point["kl"], 3),
      interval_cell(point["unsteered_ppl"], 1),
      interval_cell(point["continuation_ppl"], 1),
      interval_cell(point["keywords"], 3),
      interval_cell(point["latent"], 3),
      interval_cell(control["latent"], 3),
    ]
    for point, control in zip(swept["points"], swept["control_points"])
  ]
  header = [
    "strength",
    "KL, nats",
    "perplexity, unsteered student",
    "perplexity, baseline",
    "words with a keyword",
    "tokens the latent fires on",
    f"the same, steered by concept {swept['control']}",
  ]
  keywords = ", ".join(f"`{inline(word)}`" for word in swept["keywords"]) or "none found"
  samples = "\n".join(
    f"- strength {'none' if sample['strength'] is None else number(sample['strength'])}: `{inline(sample['text'])}`"
    for sample in swept["samples"]
  )
  return "\n\n".join(
    [
      f"### Concept {swept['concept']}",
      f"Keywords: {keywords}. Promoted most at the largest strength: {tokens(swept['promoted'])}. Means over prompts "
      "with 95 % bootstrap intervals.",
      table(header, rows),
      f"Prompt `{inline(prompt)}` continues as\n\n{samples}",
    ]
  )
