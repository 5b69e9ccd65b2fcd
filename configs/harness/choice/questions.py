"""What the task files of this folder call: questions from the folder of data sets, and WinoGrande's form of them."""

from nr.evaluation.choices import choice_file, filled_in, read_choices


def load(questions: str, **metadata):
  """Returns the questions of NR_DATA/choice/<questions>.jsonl.gz as lm-evaluation-harness wants a data set."""
  import datasets

  del metadata  # of the task and of the model
  records = [
    {"context": each["context"], "choices": each["choices"], "label": each["label"]}
    for each in read_choices(choice_file(questions))
  ]
  return {"test": datasets.Dataset.from_list(records)}


def label(question) -> int:
  """Returns the place of the right context."""
  return question["label"]


def contexts(question) -> list[str]:
  """Returns a question with a gap once for each choice."""
  return filled_in(question)[0]


def behind_gap(question) -> str:
  """Returns the text behind the gap, which is scored."""
  return filled_in(question)[1]
