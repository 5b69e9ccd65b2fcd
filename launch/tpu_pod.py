"""Runs a command on Cloud TPU VMs: asks for them, installs nr, runs, fetches the results, deletes.

  python launch/tpu_pod.py create  --name=nr --type=v5litepod-8 --zone=us-west4-a --count=4
  python launch/tpu_pod.py install --name=nr --zone=us-west4-a --count=4
  python launch/tpu_pod.py run     --name=nr --zone=us-west4-a --count=4 -- -m nr.sweep ... --shard={index}/{count}
  python launch/tpu_pod.py collect --name=nr --zone=us-west4-a --count=4 --path=runs/beta
  python launch/tpu_pod.py delete  --name=nr --zone=us-west4-a --count=4

--count slices are called NAME-0, NAME-1 and so on (one is called NAME); in the command {index} and {count}
stand for which one it is of how many. `run` starts the command on every host of every slice at the same
time, in the folder of the code, with its Python; for one run over the hosts of a slice give nr.main
--distributed=auto and a --workdir that all of them see. A command that is run again goes on where it
stopped. --dry_run prints the gcloud commands and runs none; it needs no gcloud.
"""

import argparse
import concurrent.futures
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

REMOTE = "nr"
"""Folder of the code in the home of a TPU VM."""
RUNTIMES = {
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
  "v4": "tpu-ubuntu2204-base",
}
"""Usual runtime version by kind of TPU; `gcloud compute tpus tpu-vm versions list` has those of a zone."""
ARCHIVE = "nr.tar.gz"
# uv brings a Python that is new enough whatever the image has.
INSTALL = f"""set -e
mkdir -p {REMOTE} && tar -xzf {ARCHIVE} -C {REMOTE} && cd {REMOTE}
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
export PATH="$HOME/.local/bin:$PATH"
uv venv --allow-existing --python 3.12 .venv
uv pip install --python .venv/bin/python -e '.[tpu]'"""
_POLL_SECONDS = 30


def slices(name: str, count: int) -> list[str]:
  """Returns the names of the slices."""
  return [name] if count == 1 else [f"{name}-{index}" for index in range(count)]


def runtime_of(accelerator: str) -> str:
  """Returns the runtime version of an accelerator type such as v5litepod-16.

  Raises:
    ValueError: a kind that is not known; names the flag that says it.
  """
  kind = accelerator.rpartition("-")[0]
  if kind not in RUNTIMES:
    raise ValueError(
      f"--type={accelerator}: known are {', '.join(f'{known}-CORES' for known in RUNTIMES)}; for others give --runtime"
    )
  return RUNTIMES[kind]


def gcloud(arguments: argparse.Namespace, *words: str) -> list[str]:
  """Returns a gcloud command on TPUs, with zone and project."""
  where = [f"--zone={arguments.zone}", *([f"--project={arguments.project}"] if arguments.project else [])]
  return ["gcloud", "compute", "tpus", *words, *where]


def create_commands(arguments: argparse.Namespace) -> list[list[str]]:
  """Returns the commands that ask for the slices."""
  found = []
  for name in slices(arguments.name, arguments.count):
    command = gcloud(arguments, "queued-resources", "create", name)
    command += [f"--node-id={name}", f"--accelerator-type={arguments.type}"]
    command += [f"--runtime-version={arguments.runtime or runtime_of(arguments.type)}"]
    found.append(command + (["--spot"] if arguments.spot else []))
  return found


def state_commands(arguments: argparse.Namespace) -> list[list[str]]:
  """Returns the commands that print the state of each slice's request."""
  return [
    [*gcloud(arguments, "queued-resources", "describe", name), "--format=value(state.state)"]
    for name in slices(arguments.name, arguments.count)
  ]


def ssh(arguments: argparse.Namespace, name: str, command: str) -> list[str]:
  """Returns the command that runs a shell command on all hosts of a slice."""
  return [*gcloud(arguments, "tpu-vm", "ssh", name), "--worker=all", f"--command={command}"]


def install_commands(arguments: argparse.Namespace, archive: str) -> list[list[list[str]]]:
  """Returns, for each slice, the commands that bring the code and install it."""
  return [
    [
      [*gcloud(arguments, "tpu-vm", "scp", archive, f"{name}:{ARCHIVE}"), "--worker=all"],
      ssh(arguments, name, INSTALL),
    ]
    for name in slices(arguments.name, arguments.count)
  ]


def run_commands(arguments: argparse.Namespace) -> list[list[str]]:
  """Returns, for each slice, the command that runs what was asked for."""
  found = []
  for index, name in enumerate(slices(arguments.name, arguments.count)):
    words = [
      word.replace("{index}", str(index)).replace("{count}", str(arguments.count))
      for word in arguments.command
    ]
    found.append(ssh(arguments, name, f"cd {REMOTE} && {shlex.join(['.venv/bin/python', *words])}"))
  return found


def collect_commands(arguments: argparse.Namespace) -> list[list[str]]:
  """Returns the commands that copy a folder from the first host of each slice into ours of the same name."""
  target = str(pathlib.PurePosixPath(arguments.path).parent)
  return [
    [
      *gcloud(arguments, "tpu-vm", "scp", f"{name}:{REMOTE}/{arguments.path}", target),
      "--recurse",
      "--worker=0",
    ]
    for name in slices(arguments.name, arguments.count)
  ]


def delete_commands(arguments: argparse.Namespace) -> list[list[str]]:
  """Returns the commands that give the slices back."""
  return [
    [*gcloud(arguments, "queued-resources", "delete", name), "--force", "--quiet"]
    for name in slices(arguments.name, arguments.count)
  ]


def run_all(chains: list[list[list[str]]], is_dry: bool) -> int:
  """Runs chains of commands at the same time; a chain ends at its first failure.

  Returns:
    The exit status: 0, or 1 where a command failed.
  """
  if is_dry:
    for chain in chains:
      for command in chain:
        print(shlex.join(command))
    return 0

  def run_chain(chain: list[list[str]]) -> list[str] | None:
    return next((command for command in chain if subprocess.run(command, check=False).returncode), None)

  with concurrent.futures.ThreadPoolExecutor(len(chains)) as pool:
    failed = [command for command in pool.map(run_chain, chains) if command]
  for command in failed:
    print(f"error: failed: {shlex.join(command)}", file=sys.stderr)
  return 1 if failed else 0


def wait_until_active(arguments: argparse.Namespace) -> int:
  """Waits until all slices are there; returns the exit status."""
  while True:
    states = [
      subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "UNKNOWN"
      for command in state_commands(arguments)
    ]
    print(" ".join(states), flush=True)
    if any(state in ("FAILED", "SUSPENDED") for state in states):
      print("error: a request failed; delete it and ask again", file=sys.stderr)
      return 1
    if all(state == "ACTIVE" for state in states):
      return 0
    time.sleep(_POLL_SECONDS)


def create(arguments: argparse.Namespace) -> int:
  """Asks for the slices and waits for them."""
  if status := run_all([[command] for command in create_commands(arguments)], arguments.dry_run):
    return status
  if arguments.dry_run:
    return run_all([[command] for command in state_commands(arguments)], True)
  return wait_until_active(arguments)


def install(arguments: argparse.Namespace) -> int:
  """Packs the committed code and installs it on every host."""
  with tempfile.TemporaryDirectory() as folder:
    archive = str(pathlib.Path(folder) / ARCHIVE) if not arguments.dry_run else ARCHIVE
    pack = ["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]
    if status := run_all([[pack]], arguments.dry_run):
      return status
    return run_all(install_commands(arguments, archive), arguments.dry_run)


def collect(arguments: argparse.Namespace) -> int:
  """Fetches a folder from every slice, one after another: they are merged."""
  if not arguments.dry_run:
    pathlib.Path(arguments.path).parent.mkdir(parents=True, exist_ok=True)
  return run_all([collect_commands(arguments)], arguments.dry_run)


ACTIONS = {
  "create": create,
  "install": install,
  "run": lambda arguments: run_all([[each] for each in run_commands(arguments)], arguments.dry_run),
  "collect": collect,
  "delete": lambda arguments: run_all([[each] for each in delete_commands(arguments)], arguments.dry_run),
}


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("action", choices=ACTIONS)
  parser.add_argument("--name", required=True, help="of the slices")
  parser.add_argument("--zone", required=True)
  parser.add_argument("--project", default="", help="empty: gcloud's own")
  parser.add_argument("--count", type=int, default=1, help="slices")
  parser.add_argument("--type", default="", help="create: accelerator type, such as v5litepod-16")
  parser.add_argument("--runtime", default="", help="create: runtime version; empty: that of the type")
  parser.add_argument("--spot", action="store_true", help="create: cheaper, may be taken away")
  parser.add_argument("--path", default="", help="collect: a folder in the code's, such as runs/beta")
  parser.add_argument("--dry_run", action="store_true", help="print the commands")
  parser.add_argument("command", nargs="*", help="run: arguments of python, after --")
  return parser


def parse(argv: list[str]) -> argparse.Namespace:
  """Returns the arguments, checked for what the action needs."""
  parser = make_parser()
  ours, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
  arguments = parser.parse_args(ours)
  arguments.command = theirs
  for action, needed in (("create", "type"), ("collect", "path"), ("run", "command")):
    if arguments.action == action and not getattr(arguments, needed):
      parser.error(f"{action} needs {'a command after --' if needed == 'command' else f'--{needed}'}")
  if arguments.count < 1:
    parser.error(f"--count={arguments.count}: give at least 1")
  return arguments


def main(argv: list[str]) -> int:
  """Entry point; returns the exit status."""
  arguments = parse(argv)
  try:
    return ACTIONS[arguments.action](arguments)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
