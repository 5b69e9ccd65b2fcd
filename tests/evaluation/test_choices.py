"""Files of multiple-choice questions: what is read, what is refused, and that every task file names one that exists."""

import gzip
import json
import pathlib
import re

import pytest

from nr.data.bad_records import DataError
from nr.evaluation.choices import choice_file, filled_in, read_choices

TASKS = pathlib.Path(__file__).parents[2] / "configs" / "harness" / "choice"
GOOD = {"task": "t", "context": "Plants use sunlight to make", "choices": ["soil.", "food."], "label": 1}


def write(folder, *records):
  (folder / "choice").mkdir(exist_ok=True)
  path = folder / "choice" / "some.jsonl.gz"
  with gzip.open(path, "wt", encoding="utf-8") as stream:
    stream.writelines(json.dumps(record) + "\n" for record in records)
  return path


def test_questions_are_read(tmp_path, monkeypatch):
  path = write(tmp_path, GOOD, {**GOOD, "label": 0})
  monkeypatch.setenv("NR_DATA", str(tmp_path))
  assert choice_file("some") == path
  assert read_choices(path) == [GOOD, {**GOOD, "label": 0}]
  with pytest.raises(
    DataError, match="other.jsonl.gz: no such file; put it there, or let NR_DATA name another"
  ):
    choice_file("other")
  monkeypatch.delenv("NR_DATA")
  with pytest.raises(DataError, match="NR_DATA is not set; let it name the folder"):
    choice_file("some")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"label": 2}, "line 2, field 'label': is 2, there are 2 choices"),
    ({"label": "1"}, "line 2, field 'label': holds a str, the schema says int"),
    ({"choices": ["one"]}, "line 2, field 'choices': holds .'one'.; there must be at least two"),
    ({"choices": ["one", " "]}, "none of them blank"),
    ({"context": None}, "line 2, field 'context': is null"),
  ],
)
def test_bad_questions_are_named(tmp_path, change, message):
  with pytest.raises(DataError, match=message):
    read_choices(write(tmp_path, GOOD, {**GOOD, **change}))


def test_empty_files_are_refused(tmp_path):
  with pytest.raises(DataError, match="holds no question"):
    read_choices(write(tmp_path))
  with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
    read_choices(tmp_path / "nowhere.jsonl")


def test_gaps_are_filled():
  question = {**GOOD, "context": "The trophy beat the _ since it was big ."}
  assert filled_in(question) == (
    ["The trophy beat the soil.", "The trophy beat the food."],
    "since it was big .",
  )
  for context in ("no gap", "two _ gaps _"):
    with pytest.raises(DataError, match="must have one gap"):
      filled_in({**GOOD, "context": context})


def test_every_task_has_its_questions(nr_data):
  pages = [path for path in sorted(TASKS.glob("*.yaml")) if path.name not in ("_shared.yaml", "all.yaml")]
  names = [re.search(r"^  questions: (\S+)$", path.read_text(), re.MULTILINE).group(1) for path in pages]
  assert sorted(names) == sorted(path.name.split(".")[0] for path in (nr_data / "choice").glob("*.jsonl.gz"))
  for path, name in zip(pages, names):
    questions = read_choices(choice_file(name, str(nr_data)))
    assert len(questions) in (250, 500)
    if path.stem == "winogrande":
      assert all(len(filled_in(each)[0]) == 2 for each in questions)
  group = (TASKS / "all.yaml").read_text()
  assert re.findall(r"^  - choice_(\S+)$", group, re.MULTILINE) and all(
    f"choice_{path.stem}" in group for path in pages
  )
