"""The commands of docs/launching.md are understood by what they call."""

import importlib
import pathlib
import re
import shlex
import subprocess

import pytest
from absl import flags

from nr import sweep as nr_sweep
from nr.sweeps.points import expand, flat_fields, load_sweep, sweeps_of
from tests.launch.programs import load

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "launching.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = [
  line
  for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
  for line in block.splitlines()
]


def assert_flags_are_known(words):
  """Holds flags of our programs against what they define, configs against their fields, sweeps against both."""
  given = {}
  for word in words:
    assert word.startswith("--"), word
    name, _, value = word[2:].partition("=")
    given[name] = value
  path, _, variant = given.pop("config").partition(":")
  config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config(variant)
  fields = {
    name.removeprefix("config."): given.pop(name) for name in list(given) if name.startswith("config.")
  }
  assert fields.keys() <= flat_fields(config).keys()
  if "sweep" in given:
    points = expand(load_sweep(given["sweep"]), config, fields)
    nr_sweep.choose(points, [given["only"]] if "only" in given else [], given.get("shard", ""))
  for name, value in given.items():
    assert name in flags.FLAGS, name
    flags.FLAGS[name].parser.parse(value or "true")


def parts(command):
  """Splits a command into what is called and the arguments of ours."""
  words = shlex.split(command)
  if words[:2] == ["python", "-m"]:
    return words[2], words[3:]
  if words[0] in ("sbatch", "bash"):
    return "slurm", words[words.index("launch/slurm.sbatch") + 1 :]
  if words[:3] == ["xmanager", "launch", "launch/xm.py"]:
    return "launch/xm.py", words[4:]
  return (words[1], words[2:]) if words[0] == "python" else (words[0], words[1:])


def test_every_kind_of_command_is_there():
  assert {parts(command)[0] for command in COMMANDS} == {
    "nr.sweep", "nr.main", "slurm", "launch/tpu_pod.py", "launch/xm.py", "pip",
  }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  subprocess.run(["bash", "-n", "-c", command], check=True)
  program, words = parts(command)
  if program == "pip":
    extra = re.fullmatch(r"nr\[(\w+)\]", words[-1]).group(1)
    assert f'"{extra}": [' in (ROOT / "setup.py").read_text()
  elif program == "launch/tpu_pod.py":
    arguments = load("tpu_pod").parse(words)
    if arguments.command:
      [*_, run] = load("tpu_pod").run_commands(arguments)
      inner = shlex.split(run[-1].removeprefix("--command="))
      assert_flags_are_known(inner[inner.index("nr.sweep") + 1 :])
  elif program == "slurm":
    kind, *words = [word for word in words if word != "--dry-run"]
    assert kind in ("main", "sweep")
    assert_flags_are_known(words)
  else:
    if program == "launch/xm.py":
      load("xm")  # defines its flags
    assert_flags_are_known(words)


def test_the_table_names_sweeps_that_there_are():
  rows = dict(re.findall(r"^\| `(\w+)\.py` \| (.*) \|$", TEXT, re.MULTILINE))
  for path in sorted((ROOT / "configs" / "sweeps").glob("*.py")):
    named = set(re.findall(r"`(\w+)`", rows.pop(path.stem)))
    assert named and named <= set(sweeps_of(path))
  assert not rows


def test_the_example_of_a_sweep_fits_its_config(tmp_path):
  [code] = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
  (tmp_path / "example.py").write_text(code)
  from configs.divpo import get_config

  assert len(expand(load_sweep(f"{tmp_path / 'example.py'}:rate"), get_config())) == 6
