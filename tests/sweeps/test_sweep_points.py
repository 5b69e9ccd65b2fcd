"""Sweeps become points: combined, checked against the config, named."""

import pathlib

import pytest
from absl import flags
from ml_collections import config_flags

from nr.sweeps import combinators, points
from nr.sweeps.combinators import axis, chain, fixed, product, together
from nr.sweeps.points import SweepError, applied, argument, expand, flat_fields, load_sweep, sweeps_of
from tests.sweeps.toy_config import get_config

TOY = str(pathlib.Path(__file__).with_name("toy_sweeps.py"))


def names_of(overrides, config=None):
  sweep = points.Sweep("file.py", "", lambda config: overrides, lambda config: {})
  return [point.name for point in expand(sweep, config or get_config())]


def test_combinators_are_pure_and_ordered():
  first, second = axis("a", (1, 2)), axis("b", (3, 4))
  assert product(first, second) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
  assert together(first, second) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
  assert chain(first, second) == [{"a": 1}, {"a": 2}, {"b": 3}, {"b": 4}]
  assert fixed(first, {"c": 5}) == [{"a": 1, "c": 5}, {"a": 2, "c": 5}]
  assert axis(("a", "b"), (1,)) == [{"a": 1, "b": 1}]
  assert (first, second) == (axis("a", (1, 2)), axis("b", (3, 4))), "an input was changed"
  chain(first)[0]["a"] = 9
  assert first[0]["a"] == 1, "a result shares its points with an input"


@pytest.mark.parametrize(
  "combine, words",
  [
    (lambda: product(axis("a", (1,)), axis("a", (2,))), "a: two sweeps that are combined both set it"),
    (lambda: together(axis("a", (1, 2)), axis("b", (1,))), r"\[2, 1\] points"),
    (lambda: fixed(axis("a", (1,)), {"a": 2}), "both set it"),
    (lambda: axis("a", ()), "at least one field and one value"),
  ],
)
def test_combinations_that_make_no_sense_are_refused(combine, words):
  with pytest.raises(ValueError, match=words):
    combine()


@pytest.mark.parametrize(
  "overrides, words",
  [
    ({"train.rat": 0.5}, "train.rat: the config has no such field; did you mean 'train.rate'"),
    ({"train": {}}, "train: it is a section; set a field in it, such as train.is_fast"),
    (
      {"train.rate": "fast"},
      "train.rate='fast': the config holds 0.1 there, so it takes a value of type float",
    ),
    ({"base.size": 2.5}, "base.size=2.5: .*type int"),
    ({"base.size": True}, "base.size=True: .*type int"),
    ({"train.is_fast": 1}, "train.is_fast=1: .*type bool"),
    ({"seeds": [0, 1]}, r"seeds=\[0, 1\]: .*type tuple"),
    ({"base.name": None}, "base.name=None: .*type str"),
    ({"base.width": 0.5}, "base.width=0.5: .*type int"),
    ({"base.other": 1}, "base.other=1: .*fields of type NoneType cannot be swept"),
  ],
)
def test_a_point_that_does_not_fit_is_refused(overrides, words):
  with pytest.raises(SweepError, match=words):
    applied(get_config(), overrides)


def test_a_number_for_a_float_is_one():
  config = applied(get_config(), {"train.rate": 1, "seeds": ()})
  assert isinstance(config.train.rate, float) and config.seeds == ()


def test_applying_leaves_the_config_alone():
  config = get_config()
  applied(config, {"base.size": 3, "arms.first.beta": 0.5})
  assert flat_fields(config) == flat_fields(get_config())


def test_errors_name_file_and_point():
  with pytest.raises(SweepError, match=r"toy_sweeps.py:misspelt, point 0: train.rat: "):
    expand(load_sweep(f"{TOY}:misspelt"), get_config())


@pytest.mark.parametrize(
  "overrides, expected",
  [
    ([{"train.rate": 3e-5}, {"train.rate": 0.1}], ["rate=3e-05", "rate=0.1"]),
    # What all points share is in no name; fields that go together are one axis.
    (
      [{"arms.first.beta": b, "arms.second.beta": b, "seed": 1} for b in (0.1, 1.0)],
      ["beta=0.1", "beta=1.0"],
    ),
    # A field that follows from another is in no name.
    ([{"base.size": 1, "base.name": "a"}, {"base.size": 2, "base.name": "b"}], ["size=1", "size=2"]),
    (
      [{"arms.first.beta": 0.2}, {"arms.second.beta": 0.2}, {}],
      ["first.beta=0.2", "second.beta=0.2", "default"],
    ),
    ([{"base.name": "top_k(5)|x"}, {"base.name": ""}], ["name=top_k_5_x", "name=empty"]),
    ([{"seeds": (0, 1)}, {"seeds": ()}], ["seeds=0-1", "seeds=empty"]),
  ],
)
def test_names_say_what_differs(overrides, expected):
  assert names_of(overrides) == expected


def test_names_are_unique_and_short():
  alike = names_of([{"base.name": "a/b"}, {"base.name": "a b"}])
  assert len(set(alike)) == 2 and all(name.startswith("name=a_b-") for name in alike)
  [long, _] = names_of([{"base.name": "x" * 400}, {"base.name": "y"}])
  assert len(long) == 120


def test_points_twice_are_refused():
  with pytest.raises(SweepError, match="points 0 and 2 are the same setting"):
    names_of([{"train.rate": 0.1}, {"train.rate": 0.2}, {}])


def test_a_swept_field_may_not_be_set_for_all():
  with pytest.raises(
    SweepError, match="--config.train.rate is set on the command line, and swept by point 0"
  ):
    expand(load_sweep(TOY), get_config(), given=["train.rate"])


def test_values_of_axes_come_from_the_whole_config():
  first, second = expand(points.Sweep("f", "", lambda c: [{"base.size": 3}, {}], dict), get_config())
  assert first.values == {"size": 3} and second.values == {"size": 8}


def test_generators_and_lists_are_sweeps_and_see_the_config():
  assert [point.overrides for point in expand(load_sweep(f"{TOY}:arms"), get_config())] == [
    {"arms.first.beta": 0.1, "arms.second.beta": 0.1},
    {"arms.first.beta": 1.0, "arms.second.beta": 1.0},
  ]
  assert sweeps_of(TOY) == ["", "grid", "arms", "refused", "misspelt"]


@pytest.mark.parametrize(
  "text, words",
  [
    (f"{TOY}:gird", "sweep='gird' is unknown: did you mean 'grid'"),
    ("nothing.py:grid", "there is no file 'nothing.py'"),
    (combinators.__file__, "has no function 'sweep'"),
  ],
)
def test_sweeps_that_are_not_there_are_named(text, words):
  with pytest.raises(SweepError, match=words):
    load_sweep(text)


def test_flags_of_the_command_line_say_the_same():
  overrides = {
    "train.rate": 3e-5,
    "train.is_fast": True,
    "seeds": (3,),
    "base.name": "a b|c='d'",
    "base.size": -2,
    "base.width": 3,
    "arms.first.mode": "",
  }
  path = pathlib.Path(__file__).with_name("toy_config.py")
  argv = ["nr.main", f"--config={path}:tiny", *(argument(*item) for item in overrides.items())]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  values(argv)
  assert flat_fields(values.config) == flat_fields(applied(get_config(), overrides))
