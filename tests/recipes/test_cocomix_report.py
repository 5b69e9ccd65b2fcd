"""What the report says of labels, and of its surroundings."""

import importlib

from nr.objectives.attribution import AttributionSpec
from nr.recipes import environment
from nr.recipes.cocomix import report, report_text, settings


def test_kinds_of_labels_are_told_apart_by_what_differs():
  """Candidates of Eq. 1 are all latents; of labels after the activation function, those that are active."""
  config = importlib.import_module("configs.cocomix").get_config("miniature")
  variants = {"eq_1": {"act": "pre", "restrict_active": False}, "online": {"source": "online"}}
  with config.unlocked():
    config.targets.variants = variants
  config.students.arms.cocomix.labels = "eq_1"
  kinds = report.label_kinds(config)
  assert [kind["arms"] for kind in kinds.values()] == [[], ["cocomix"], []]
  assert kinds["online"]["variant"] == kinds["targets"]["variant"] != kinds["eq_1"]["variant"]
  assert settings.attribution_id(AttributionSpec()) == kinds["targets"]["variant"]

  def counted(kind):
    header = {"attribution": settings.attribution_spec(config, kind).to_dict()}
    numbers = dict(fewer_than_labels=0.25, coverage=0.5, label_entropy=3.0, flops_per_token=2e6)
    return {"mean_positive": 7.0 + len(kind), "splits": {"validation": {"header": header}}, **numbers}

  labels = {**counted(""), "variant": kinds["targets"]["variant"]}
  labels["variants"] = {kinds["eq_1"]["variant"]: counted("eq_1")}
  rows = report_text.labels({"labels": labels, "label_kinds": kinds}).splitlines()[2:]
  shared = "25.0% | 50.0% | 3.000 | 2.00 M |"
  assert rows == [
    f"| targets: nothing | none | 7.00 of the active latents | {shared}",
    f"| eq_1: `act=pre`, `restrict_active=False` | CoCoMix | 11.00 of the latents | {shared}",
    f"| online: nothing | none | 7.00 of the active latents | {shared}",
  ]


def test_without_git_there_is_no_commit(monkeypatch):
  monkeypatch.setattr(environment.shutil, "which", lambda name: None)
  assert environment.commit() is None


def test_the_commit_is_that_of_the_package_not_of_where_one_stands(monkeypatch, tmp_path):
  here = environment.commit()
  monkeypatch.chdir(tmp_path)
  assert environment.commit() == here


def test_a_missing_speed_gives_no_ratio():
  assert report.ratio(6.0, 3.0) == 2.0
  assert report.ratio(None, 3.0) is None


def test_documents_and_last_words_have_tables_where_they_were_measured():
  documents = {
    "document_loss": 3.0,
    "document_ci95": [2.5, 3.5],
    "document_ppl": 20.09,
    "document_bits_per_byte": 1.25,
    "scored_documents": 40,
    "document_stride": 64,
  }
  words = {"last_word_accuracy": 0.25, "last_word_ci95": [0.2, 0.3], "last_word_ppl": 90.0, "last_word_passages": 200}
  assert report_text.texts({"students": {"ntp": {}, "cocomix": {}}}) == []
  by_document, by_word = report_text.texts({"students": {"ntp": documents | words, "cocomix": documents | words}})
  assert "windows that score 64 tokens each" in by_document
  assert by_document.splitlines()[-1] == "| CoCoMix | 40 | 3.0000 (2.5000 to 3.5000) | 20.09 | 1.2500 |"
  assert by_word.splitlines()[-1] == "| CoCoMix | 200 | 25.0% (20.0% to 30.0%) | 90.00 |"
