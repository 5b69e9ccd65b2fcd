"""What the report says of its surroundings."""

from nr.recipes import environment
from nr.recipes.cocomix import report


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
