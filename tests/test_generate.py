"""The command: texts, JSON, streams, constraints and beams from a real model; one line for each mistake."""

import json
import re

import jax
import pytest

from nr import generate
from nr.generators.checkpoints import open_checkpoint
from nr.models.lora import LoraSpec, init_adapter
from nr.training.adapter_files import save_adapter


@pytest.fixture
def run(nr_data, capsys):
  """Runs the command on the real small model and returns (exit code, stdout, stderr)."""

  def call(*arguments, checkpoint=True):
    path = nr_data / "models" / "stories260k" / "stories260K.bin"
    given = [f"--checkpoint={path}"] if checkpoint else []
    code = generate.main([*given, "--max-new-tokens=16", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return call


GREEDY = ("--prompt=Once upon a time", "--greedy")


def test_greedy_text_streams_and_is_told_with_rates(run):
  code, text, rates = run(*GREEDY)
  assert code == 0 and text.startswith(", there was a little girl named Lily.")
  assert re.search(r"1 texts, 5 prompt tokens, 16 new tokens: first token after [\d.]+ s, .* tokens/s", rates)
  assert run(*GREEDY, "--stream")[1] == text
  drafted = run(*GREEDY, "--draft=ngram")[1]
  assert drafted == text and run(*GREEDY, "--draft=layers:3")[1] == text
  assert run(*GREEDY, "--cache=ring:64")[1] == text
  # Eight bits leave the first words of this text as they are.
  assert run(*GREEDY, "--quantize=int8", "--cache=int8")[1][:20] == text[:20]


def test_an_adapter_changes_what_is_said(run, nr_data, tmp_path):
  checkpoint = open_checkpoint(nr_data / "models" / "stories260k" / "stories260K.bin", layers="scan")
  spec = LoraSpec(rank=2, targets=("blocks/mlp/down/kernel",))
  adapter = init_adapter(spec, checkpoint.network.params, jax.random.key(0))
  save_adapter(tmp_path / "new", spec, adapter)
  save_adapter(tmp_path / "trained", spec, jax.tree.map(lambda leaf: leaf + 0.2, adapter))
  text = run(*GREEDY)[1]
  assert run(*GREEDY, f"--adapter={tmp_path / 'new'}")[1] == text
  code, other, _ = run(*GREEDY, f"--adapter={tmp_path / 'trained'}")
  assert code == 0 and other != text
  code, out, error = run(*GREEDY, "--adapter=nowhere")
  assert code == 1 and "adapter='nowhere': no such folder" in error.splitlines()[-1] and not out


def test_samples_as_json_with_log_probabilities(run):
  settings = (
    "--prompt=Once upon a time",
    "-n",
    "3",
    "--chain=temperature(1.5)|top_p(0.95)",
    "--json",
    "--logprobs",
  )
  code, out, _ = run(*settings, "--seed=1")
  records = [json.loads(line) for line in out.splitlines()]
  assert code == 0 and [record["sample"] for record in records] == [0, 1, 2]
  assert len({record["text"] for record in records}) == 3
  for record in records:
    assert len(record["tokens"]) == record["num_tokens"] == len(record["log_probs"])
    assert (
      record["log_prob"] == pytest.approx(sum(record["log_probs"])) and record["finish_reason"] == "length"
    )
  assert run(*settings, "--seed=1")[1] == out != run(*settings, "--seed=2")[1]


def test_prompts_from_files_stop_strings_and_beams(run, tmp_path):
  (tmp_path / "prompts.jsonl").write_text('{"prompt": "One day"}\n\n{"prompt": "The dog"}\n')
  code, out, _ = run(f"--prompt-file={tmp_path / 'prompts.jsonl'}", "--greedy", "--json", "--stop=.")
  records = [json.loads(line) for line in out.splitlines()]
  assert code == 0 and [record["prompt"] for record in records] == ["One day", "The dog"]
  assert any(record["finish_reason"] == "stop_string" for record in records)
  code, out, _ = run("--prompt=One day", "--beam-width=3", "-n", "2", "--json")
  scores = [json.loads(line)["score"] for line in out.splitlines()]
  assert code == 0 and len(scores) == 2 and scores[0] >= scores[1]


def test_constraints_hold(run):
  pytest.importorskip("outlines_core")
  _, text, _ = run("--prompt=The number is ", "--regex=[0-9]{2}", "--seed=3")
  assert re.fullmatch(r"[0-9]{2}\n", text)
  _, text, _ = run("--prompt=The answer is", "--choice= yes", "--choice= no")
  assert text.strip() in ("yes", "no")
  # A truncation cannot drop what the constraint allows.
  _, text, _ = run("--prompt=The number is ", "--regex=[0-9]{2}", "--seed=3", "--chain=top_k(1)")
  assert re.fullmatch(r"[0-9]{2}\n", text)
  # "Onc" ends inside a word; healing takes its last token back and goes on with one that begins like it.
  code, text, _ = run("--prompt=Onc", "--greedy", "--heal")
  assert code == 0 and text[0] in "Onc"
  _, out, _ = run("--prompt=a", "--prompt=Once", "--json", '--json-schema={"type": "boolean"}')
  assert all(json.loads(json.loads(line)["text"]) in (True, False) for line in out.splitlines())
  assert len(out.splitlines()) == 2
  _, text, _ = run(*GREEDY, "--stop=little")
  assert text == ", there was a \n"
  assert run(*GREEDY, "--stop=little", "--stream")[1] == text


def test_help_and_the_list_of_transforms_say_what_there_is(capsys):
  assert generate.main(["--list-transforms"]) == 0
  listed = capsys.readouterr().out
  assert all(f"{name}(" in listed for name in ("temperature", "top_p", "min_p", "dry", "mirostat_v2"))
  with pytest.raises(SystemExit):
    generate.main(["--help"])
  assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("--greedy",), "--prompt is missing"),
    ((*GREEDY, "--chain=temprature(0.7)"), "did you mean 'temperature'"),
    ((*GREEDY, "--chain=top_p(0.9, q=3)"), "q"),
    ((*GREEDY, "--stream", "-n", "2"), "--stream prints one text"),
    ((*GREEDY, "--beam-width=2", "--draft=ngram"), "choose one"),
    ((*GREEDY, "--beam-width=2", "-n", "3"), "at most beam_width=2"),
    ((*GREEDY, "--chat"), "carries no chat template"),
    ((*GREEDY, "--cache=ringg:3"), "cache='ringg:3' is unknown"),
    ((*GREEDY, "--draft=ngrm"), "did you mean 'ngram'"),
    ((*GREEDY, "--max-new-tokens=0"), "max_new_tokens=0: give at least 1"),
    (("--prompt-file=/nowhere.txt",), "nowhere.txt"),
  ],
)
def test_mistakes_are_answered_in_one_line(run, arguments, message):
  code, out, error = run(*arguments)
  last = error.strip().splitlines()[-1]
  assert code == 1 and out == "" and last.startswith("error: ") and message in last


def test_bad_lines_of_a_prompt_file_are_named(run, tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "One"}\n{"text": "two"}\n')
  assert "line 2: give a JSON object with a field 'prompt'" in run(f"--prompt-file={path}")[2]
  path.write_text('{"prompt": 3}\n')
  assert "line 1, field 'prompt': 3 is no text" in run(f"--prompt-file={path}")[2]
  assert "--checkpoint is missing" in run(*GREEDY, checkpoint=False)[2]
