"""The recipe's config, its refusals, the toy world, and the report's words."""

import gzip
import json
import math

import numpy as np
import pytest

from configs import length_instruct as configs
from nr import main
from nr.data.pools import Pool, PoolSample, read_pools
from nr.data.preferences import read_pairs
from nr.evaluation.reports import interval_cell
from nr.generators.checkpoints import open_checkpoint
from nr.recipes import length_instruct
from nr.recipes.length_instruct import report, sampled_pairs, settings
from nr.recipes.length_instruct.benchmarks import Outcome, by_case, intervals
from nr.recipes.length_instruct.toy import World
from nr.recipes.stages import StageError
from nr.training.model_files import load_model


def config_of(variant="tiny", **changes):
  config = configs.get_config(variant)
  with config.unlocked():
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return config


@pytest.mark.parametrize("variant", ["tiny", "seeds", "miniature"])
def test_variants_are_valid(variant):
  config = config_of(variant)
  length_instruct.validate(config)
  names = [stage.name for stage in length_instruct.stages(config)]
  assert names == ["base", "pairs", "augment", "arms", "evaluate", "report"]
  assert len(config.seeds) == (5 if variant == "seeds" else 1)


def test_the_paper_s_variant_asks_for_what_it_needs(tmp_path):
  assert settings.arm_names(config_of("benchmark")) == [] and len(settings.arm_names(config_of("paper"))) == 5
  config = config_of("paper")
  assert (
    config.lift.template == "Answer the following instruction using {limit} words or less.\n\n{instruction}"
  )
  assert (config.lift.min_difference, config.lift.margin, config.lift.counter) == (10, 10, "words")
  path = tmp_path / "file"
  path.write_text("")
  config.base.checkpoint = str(path)
  with pytest.raises(ValueError, match="data.pairs.*pools.instructions"):
    length_instruct.validate(config)
  config.data.pairs = str(path)
  with pytest.raises(ValueError, match="evaluate.alpaca_eval_li"):
    length_instruct.validate(config)
  config.evaluate.alpaca_eval_li = str(path)
  length_instruct.validate(config)
  config.evaluate.mt_bench_li = str(tmp_path / "none")
  with pytest.raises(ValueError, match="evaluate.mt_bench_li=.*no such file"):
    length_instruct.validate(config)


def test_what_is_asked_of_files_and_judges_is_checked_first(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("TEST_JUDGE_KEY", "secret")
  monkeypatch.delenv("NO_SUCH_KEY", raising=False)
  path = tmp_path / "file"
  path.write_text("")
  good = dict(base__checkpoint=str(path), evaluate__answered=str(path), evaluate__mt_bench_li=str(path),
              evaluate__mt_bench_li_baselines=str(path), evaluate__judge__url="http://localhost:1",
              evaluate__judge__api_key_variable="TEST_JUDGE_KEY")  # fmt: skip
  length_instruct.validate(config_of("benchmark", **good))
  for changes, named in (
    (dict(evaluate__answered=str(tmp_path / "none")), "evaluate.answered="),
    (dict(evaluate__chain="temprature(0.7)"), "evaluate.chain: .*did you mean 'temperature'"),
    (dict(evaluate__judge__api_key_variable="NO_SUCH_KEY"), "evaluate.judge.api_key_variable='NO_SUCH_KEY'"),
    (dict(evaluate__mt_bench_li_baselines=""), "evaluate.mt_bench_li_baselines=''"),
    # Nobody who reads the files later would expand it.
    (dict(base__checkpoint="~/file"), "base.checkpoint='~/file': no such file"),
  ):
    with pytest.raises(ValueError, match=named):
      length_instruct.validate(config_of("benchmark", **{**good, **changes}))
  without = dict(
    evaluate__judge__url="",
    evaluate__mt_bench_li_baselines="",
    evaluate__judge__api_key_variable="NO_SUCH_KEY",
  )
  length_instruct.validate(config_of("benchmark", **{**good, **without}))


@pytest.mark.parametrize("variant", ["smollm", "smollm_smoke", "llama"])
def test_checkpoints_that_make_their_own_pairs_are_checked_first(variant, tmp_path):
  path = tmp_path / "file"
  path.write_text("")
  good = dict(base__checkpoint=str(path), pools__instructions=str(path), evaluate__answered=str(path),
              train__batch_size=8, arms__r_dpo_small__mix="")  # fmt: skip
  config = config_of(variant, **good)
  length_instruct.validate(config)
  assert settings.arm_names(config) == ["dpo", "lift_augmented_only", "lift"]
  # The arms differ in their pairs alone.
  assert len({str(settings.train_section(config, arm)) for arm in settings.arm_names(config)}) == 1
  if variant == "llama":
    mesh = settings.mesh_of(config)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    assert (config.base.dtype, config.base.remat) == ("bfloat16", "full")
  for changes, named in (
    (dict(base__checkpoint="CHECKPOINT"), "base.checkpoint='CHECKPOINT': no such file"),
    (dict(pools__instructions="INSTRUCTIONS"), "pools.instructions='INSTRUCTIONS': no such file"),
    (dict(data__pairs=str(path)), "data.pairs=.* and pools.instructions=.*leave one of the two empty"),
    (dict(pools__judge__kind="wrods"), "pools.judge.kind='wrods' is unknown: did you mean 'words'"),
    (
      dict(pools__judge__kind="reward_model"),
      "pools.judge.path='': pools.judge.kind='reward_model' needs it",
    ),
    (dict(pools__judge__kind="language_model"), "pools.judge.url=''"),
    (dict(pools__fields__reference=""), "pools.fields.reference=''"),
    (dict(pools__judge__kind="words", pools__num_samples=1), "pools.num_samples=1: give at least 2"),
    (dict(pools__max_new_tokens=4000), "pools.max_new_tokens=4000: data.max_length="),
    (dict(pools__chain="temprature(1)"), "pools.chain: .*did you mean 'temperature'"),
    (dict(base__dtype="float8"), "base.dtype='float8'"),
    (dict(base__remat="some"), "base.remat='some'"),
    (dict(adapter__rank=-1), "LoraSpec.rank=-1"),
  ):
    with pytest.raises(ValueError, match=named):
      length_instruct.validate(config_of(variant, **{**good, **changes}))


def drawn(index, text, score=None, finish_reason="stop_id"):
  return PoolSample(index, text, score=score, finish_reason=finish_reason)


def test_pairs_of_pools_are_of_responses_that_ended():
  samples = (
    drawn(0, "b c", 2.0, "length"), drawn(1, "a", 1.0), drawn(2, "b", 3.0), drawn(3, " ", 9.0),
    drawn(4, "c", 3.0), drawn(5, "d", None), drawn(6, "e", 1.0), drawn(7, None, None, "error"),
  )  # fmt: skip
  pool, counts = Pool("p", "ask", samples, reference="c"), sampled_pairs.Counts()
  pairs = sampled_pairs.against_reference(pool, 3, counts)
  assert [(each.id, each.chosen, each.rejected) for each in pairs] == [
    ("p/1", "c", "a"), ("p/2", "c", "b"), ("p/5", "c", "d"),
  ]  # fmt: skip
  assert counts == {"samples": 8, "unfinished": 3}
  # Of equals the first.
  (pair,) = sampled_pairs.best_and_worst(pool, counts)
  assert (pair.id, pair.chosen, pair.rejected) == ("p", "b", "a")
  assert pair.provenance["scores"] == {"chosen": 3.0, "rejected": 1.0} and counts["unscored"] == 1
  tied = Pool("t", "ask", (drawn(0, "a", 1.0), drawn(1, "b", 1.0)))
  assert sampled_pairs.best_and_worst(tied, counts) == [] and counts["ties"] == 1
  assert sampled_pairs.best_and_worst(Pool("s", "ask", samples[:2]), counts) == []


def test_intervals_are_over_the_cases_that_were_answered():
  outcomes = [Outcome(10, True, 0.0), Outcome(4, False, None), Outcome(None, None, None, "failed")] * 50
  found = intervals(outcomes)
  # A share of one half over 100 cases: a standard error of 0.05.
  low, high = found["violation_ci95"]
  assert low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)
  assert found["words_ci95"] == [pytest.approx(4 + 6 * low), pytest.approx(4 + 6 * high)]
  assert by_case(outcomes[:3]) == {
    "violation": [1.0, 0.0, None], "words": [10.0, 4.0, None], "win": [0.0, None, None],
  }  # fmt: skip
  assert intervals(outcomes[2:3]) == {"violation_ci95": None, "words_ci95": None}


@pytest.mark.parametrize(
  "changes, named",
  [
    (dict(seeds=()), "seeds"),
    (dict(seeds=(0, 0)), "seeds"),
    (dict(lift__template="no slot"), "template"),
    (dict(arms__dpo__mix="both"), "arms.dpo.mix"),
    (dict(arms__dpo__loss__beta=0.0), "arms.dpo.loss: beta"),
    (dict(train__batch_size=0), "train: training.batch_size"),
    (dict(data__pairs="x.jsonl"), "data.pairs"),
    (dict(data__max_length=10), "data.max_length"),
    (dict(world__max_limit=15), "world.max_limit"),
    (dict(world__relevant=24), "world.relevant"),
    (dict(evaluate__limits=(0,)), "evaluate.limits"),
    (dict(lift__template="at most {limit} {instruction}"), "'at'"),
  ],
)
def test_mistakes_are_named(changes, named):
  with pytest.raises(ValueError, match=named):
    length_instruct.validate(config_of(**changes))


def test_arms_of_the_paper_s_variant_see_their_pairs_equally_often():
  config = config_of("paper", train__optimizer__learning_rate=1e-6)
  pairs = {"plain": 2977, "augmented_only": 5954, "union": 8931}
  for arm in settings.arm_names(config):
    section = settings.train_section(config, arm)
    assert section.steps * section.batch_size / pairs[config.arms[arm].mix] == pytest.approx(2, abs=0.01), arm
    assert section.schedule.warmup_steps == pytest.approx(section.steps / 10, abs=1)
    # What an arm does not set for itself is everybody's.
    assert section.optimizer.learning_rate == 1e-6 and section.schedule.name == "cosine"
  tiny = config_of()
  assert settings.train_section(tiny, "dpo").to_dict() == tiny.train.to_dict()


@pytest.mark.parametrize(
  "own, named", [({"stesp": 3}, "arms.dpo.train: .*stesp"), ({"steps": -1}, "arms.dpo.train: training.steps")]
)
def test_mistakes_in_an_arm_s_own_training_are_named(own, named):
  config = config_of()
  with config.unlocked():
    config.arms.dpo.train = own
  with pytest.raises(ValueError, match=named):
    length_instruct.validate(config)


def test_arms_can_be_left_out():
  config = config_of("miniature")
  assert settings.arm_names(config) == ["dpo", "r_dpo_large", "lift"]
  assert settings.encoded_lengths(config_of("paper")) == (32, 64, 128, 256, 512, 1024, 2048)
  assert settings.encoded_lengths(config) == (config.data.max_length,)


def test_the_world_s_answers_have_its_statistics():
  world, spec = World(), settings.lift_spec(config_of())
  corpus = list(world.corpus(3000, 0, spec))
  lengths = np.array([len(each.response.split(" ")) for each in corpus])
  assert abs(lengths.mean() - 8) < 0.25 and abs(lengths.std() - 3) < 0.25 and lengths.max() <= world.max_words
  limited = [each for each in corpus if each.prompt.startswith("limit_")]
  assert abs(len(limited) / 3000 - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 3000)
  limits = np.array([int(each.prompt.split(" ")[0].removeprefix("limit_")) for each in limited])
  # The limits mean nothing.
  own = np.array([len(each.response.split(" ")) for each in limited])
  assert abs(np.corrcoef(limits, own)[0, 1]) < 4 / math.sqrt(len(limited))
  tokenizer = world.tokenizer()
  assert all(tokenizer.decode(tokenizer.encode(each.response)) == each.response for each in corpus[:50])
  assert corpus[:5] == list(world.corpus(5, 0, spec)) and corpus[:5] != list(world.corpus(5, 1, spec))


def test_quality_counts_different_words_of_the_topic():
  world = World()
  own = world.relevant_words(2)
  others = [word for word in world.words if word not in own]
  response = " ".join([own[0], own[0], own[3], others[0]])
  assert world.quality("topic_2 :", response) == 2 and world.quality("limit_3 topic_2 :", response) == 2
  assert world.quality("topic_2 :", "") == 0
  assert world.qualities(["topic_2 :"], [response]) == [2.0]


def run_of(violation, words=5.0, quality=2.0):
  part = {
    "violation": violation,
    "words": words,
    "quality": quality,
    "violation_ci95": [0, 1],
    "mean_limit": 7.0,
  }
  return {
    "limited": part, "unlimited": part, "scaled": {"0.5": part}, "by_limit": {"3": part, "4": part},
    "benchmark": {"violation": violation, "win": 1 - violation, "words": words},
  }  # fmt: skip


def fake_report(seeds=(0, 1, 2)):
  violations = {"sft": 0.5, "dpo": 0.7, "r_dpo_small": 0.65, "r_dpo_large": 0.6, "lift": 0.01}
  words = {"sft": 8.0, "dpo": 9.0, "r_dpo_small": 8.5, "r_dpo_large": 8.1, "lift": 9.0}
  runs = {
    f"{arm}_seed{seed}": {"arm": arm, "seed": seed, **run_of(value + 0.01 * seed, words[arm])}
    for arm, value in violations.items()
    for seed in seeds
  }
  content = {"runs": runs, "seeds": list(seeds), "arms": list(violations)}
  content["table"] = {arm: report._row(content, arm) for arm in violations}
  content["curves"] = {arm: report._by_limit(content, arm) for arm in violations}
  return content


def test_findings_are_checked_and_intervals_are_over_seeds():
  content = fake_report()
  assert set(report.checks(content["table"]).values()) == {True}
  interval = content["table"]["dpo"]["violation"]
  assert interval["estimate"] == pytest.approx(0.71)
  assert 0.7 - 1e-9 <= interval["low"] < 0.71 < interval["high"] <= 0.72 + 1e-9
  for arm, change, finding in (
    ("lift", {"violation": 0.2}, "LIFT follows limits"),
    ("dpo", {"violation": 0.4}, "DPO makes it worse"),
    ("lift", {"free_quality": 1.8}, "LIFT loses no quality"),
    ("r_dpo_large", {"free_words": 9.5}, "R-DPO shortens"),
  ):
    table = {name: dict(row) for name, row in content["table"].items()}
    for name, value in change.items():
      table[arm][name] = {"estimate": value}
    broken = [name for name, held in report.checks(table).items() if held is False]
    assert any(name.startswith(finding) for name in broken), finding
  del content["table"]["r_dpo_small"]
  assert report.checks(content["table"])["R-DPO cannot follow limits (above 0.4)"] is None
  single = fake_report(seeds=(0,))["table"]["dpo"]["violation"]
  assert interval_cell(single) == "0.70" and interval_cell(None) == "-"
  assert interval_cell(interval) == "0.71 (0.70 to 0.72)"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("length_instruct")
  return workdir, main.run(config_of("miniature"), workdir)


@pytest.mark.slow
def test_a_miniature_from_pairs_to_report(finished):
  workdir, artifacts = finished
  content = json.loads((workdir / "report.json").read_text())
  assert set(content["table"]) == {"sft", "dpo", "r_dpo_large", "lift"}
  for row in content["table"].values():
    assert 0 <= row["violation"]["estimate"] <= 1 and row["free_quality"]["estimate"] >= 0
  pairs, limited = content["pairs"]["0"], content["limited_pairs"]["0"]
  assert limited["limited"] == pairs["limited"] == 2 * pairs["kept"] and limited["swaps"] == pairs["swaps"]
  text = (workdir / "report.md").read_text()
  assert "LIFT, D plus D'" in text and "words_by_limit.png" in text
  assert all((workdir / plot).is_file() for plot in content["plots"]) and len(content["plots"]) == 4
  answers = [json.loads(line) for line in (workdir / "evaluate/lift_seed0/limited.jsonl").open()]
  assert len(answers) == 3 * 2 * 2 and {"prompt", "limit", "answer", "words", "is_violation"} <= set(
    answers[0]
  )
  # A second call finds everything done.
  assert main.run(config_of("miniature"), workdir) == artifacts


@pytest.mark.slow
def test_a_given_checkpoint_on_files(finished, tmp_path):
  workdir, artifacts = finished
  spec = settings.lift_spec(config_of("miniature"))
  entries = [
    {
      "instruction": spec.render(f"topic_{topic} :", 2),
      "original_instruction": f"topic_{topic} :",
      "max_len": 2,
      "output": "w1 w2",
      "dataset": "toy",
    }
    for topic in range(3)
  ]
  (tmp_path / "alpaca.json").write_text(json.dumps(entries))
  config = config_of(
    "miniature",
    base__checkpoint=str(workdir / artifacts["base"]["models"]["0"]["model"]),
    data__pairs=str(workdir / artifacts["pairs"]["files"]["0"]["path"]),
    evaluate__alpaca_eval_li=str(tmp_path / "alpaca.json"),
    evaluate__max_new_tokens=6,
    evaluate__limits=(),
    evaluate__answers_without_limit=0,
    arms__r_dpo_large__mix="",
    arms__dpo__mix="",
    train__mesh__data=1,
  )
  length_instruct.validate(config)
  main.run(config, tmp_path / "run")
  content = json.loads((tmp_path / "run/report.json").read_text())
  found = content["runs"]["lift_seed0"]["alpaca_eval_li"]
  assert found["count"] == found["answered"] == 3 and found["counter"] == "spaces"
  # Without a judge nothing is won, and the report says so.
  assert found["win"] is None and found["judge"] is None and set(found["scales"]) == {"0.5"}
  text = (tmp_path / "run/report.md").read_text()
  assert "## alpaca_eval_li" in text and "judged by nobody" in text and "Vlt% x0.5" in text


@pytest.mark.slow
def test_a_checkpoint_is_measured_as_it_is(finished, tmp_path):
  workdir, artifacts = finished
  lines = [
    {"id": f"{n}", "instruction": "topic_1 :", "responses": {"a": "w1 w2 w3", "b": "w1 w4"}} for n in range(4)
  ]
  (tmp_path / "answered.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
  config = config_of(
    "benchmark",
    base__checkpoint=str(workdir / artifacts["base"]["models"]["0"]["model"]),
    data__chat_template="",
    evaluate__answered=str(tmp_path / "answered.jsonl.gz"),
    evaluate__most_cases=3,
    evaluate__max_new_tokens=6,
    evaluate__scales=(),
    lift__template=config_of().lift.template,
    lift__counter="spaces",
    train__mesh__data=1,
    train__mesh__fsdp=1,
  )
  main.run(config, tmp_path / "run")
  content = json.loads((tmp_path / "run/report.json").read_text())
  assert list(content["runs"]) == ["sft_seed0"] and content["runs"]["sft_seed0"]["answered"]["count"] == 3
  assert "## answered" in (tmp_path / "run/report.md").read_text()


@pytest.mark.slow
def test_a_checkpoint_makes_its_own_pairs_and_trains_an_adapter(finished, tmp_path):
  """Two of the eight simulated devices share the model, as several accelerators would."""
  workdir, artifacts = finished
  checkpoint = workdir / artifacts["base"]["models"]["0"]["model"]
  tasks = [
    {"id": f"q{n}", "instruction": f"topic_{n % 3} :", "more": {"answer": "w1 w2 w3 w4"}} for n in range(16)
  ]
  (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
  cases = [{"id": f"{n}", "instruction": f"topic_{n} :", "responses": ["w1 w2", "w3 w4 w5"]} for n in (1, 2)]
  cases.append({"id": "new", "instruction": ": topic_1 :", "responses": ["w1"]})
  (tmp_path / "answered.jsonl").write_text("\n".join(map(json.dumps, cases)))
  config = config_of(
    "smollm_smoke", base__checkpoint=str(checkpoint), lift__template=config_of().lift.template,
    lift__counter="spaces", lift__margin=2, lift__min_difference=1,
    data__chat_template="", data__max_length=13, pools__instructions=str(tmp_path / "tasks.jsonl"),
    pools__fields__input="", pools__fields__reference="more.answer", pools__most_prompts=0,
    pools__max_new_tokens=7, evaluate__answered=str(tmp_path / "answered.jsonl"), evaluate__limits=(2, 4),
    evaluate__max_new_tokens=8, adapter__rank=2, train__mesh__data=1, train__mesh__fsdp=2, train__progress=False,
    train__optimizer__learning_rate=0.1, arms__lift_augmented_only__mix="",
  )  # fmt: skip
  run = tmp_path / "run"
  artifacts = main.run(config, run)

  pools = read_pools(run / "pairs" / "pools_seed0.jsonl")
  ended = [each for pool in pools for each in pool.samples if each.finish_reason == "stop_id" and each.text]
  sampling = artifacts["pairs"]["files"]["0"]["sampling"]
  assert len(pools) == sampling["prompts"] == 16 and sampling["samples"] == 32
  assert sampling["unfinished"] == 32 - len(ended)
  pairs = read_pairs(run / artifacts["pairs"]["files"]["0"]["path"])
  assert {each.chosen for each in pairs} == {"w1 w2 w3 w4"}
  assert sorted(each.rejected for each in pairs) == sorted(e.text for e in ended if e.text != "w1 w2 w3 w4")
  assert len(pairs) > 8

  base, trained = load_model(checkpoint), load_model(run / artifacts["arms"]["runs"]["lift_seed0"]["model"])
  assert trained.spec == base.spec
  moved = {
    name: bool(np.any(np.asarray(before) != np.asarray(after)))
    for (name, before), after in zip(leaves(base.params), leaves(trained.params, names=False), strict=True)
  }
  assert {name for name, is_moved in moved.items() if is_moved} == {n for n in moved if "kernel" in n}
  own = run / artifacts["base"]["models"]["0"]["model"]
  adapter = run / artifacts["arms"]["runs"]["lift_seed0"]["adapter"]
  opened = open_checkpoint(own, adapter=adapter).network.params
  for (name, merged), kept in zip(leaves(opened), leaves(trained.params, names=False), strict=True):
    # One layer, stacked or not.
    np.testing.assert_allclose(np.reshape(merged, np.shape(kept)), kept, atol=1e-6, err_msg=name)

  content = json.loads((run / "report.json").read_text())
  assert content["arms"] == ["sft", "dpo", "lift"]
  found = content["runs"]["lift_seed0"]["answered"]
  assert found["count"] == 3 and found["seen"] == 2 and list(found["by_limit"]) == ["2", "4"]
  assert found["unlimited"]["count"] == 3 and len(found["by_case"]["violation"]) == 3
  assert set(content["differences"]["answered"]) == {"dpo minus sft", "lift minus sft", "lift minus dpo"}
  text = (run / "report.md").read_text()
  assert "2 of these prompts are among the pairs" in text and "words without limit" in text
  assert "sampled here: " in text and "lift minus dpo" in text
  answers = [json.loads(line) for line in (run / "evaluate/lift_seed0/answered/limit4.jsonl").open()]
  assert [each["limit"] for each in answers] == [4, 4, 4] and answers[0]["prompt"].startswith("limit_4 ")

  assert main.run(config, run) == artifacts
  (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks[:-1])))
  with pytest.raises(StageError, match="'pairs'.*content of pools.instructions"):
    main.run(config, run)


def leaves(tree, prefix="", names=True):
  """The leaves of nested dictionaries in the order of their names."""
  if not isinstance(tree, dict):
    return [(prefix, tree)] if names else [tree]
  return [leaf for name in sorted(tree) for leaf in leaves(tree[name], f"{prefix}/{name}", names)]


@pytest.mark.slow
def test_dpo_breaks_limits_and_lift_follows_them(tmp_path):
  """The signs of the paper's violations in a world that is trained in half a minute; wins need the variant tiny."""
  config = config_of(
    world__num_topics=3, world__num_words=12, world__relevant=5, world__mean_words=4.5, world__std_words=1.8,
    world__max_words=8, world__max_limit=10,
    base__examples=4000, base__model__num_layers=1, base__model__model_dim=24, base__train__steps=500,
    data__prompts_per_topic=160, data__max_length=12, train__steps=500, train__batch_size=32,
    arms__r_dpo_small__mix="", arms__r_dpo_large__mix="", arms__lift_no_nll__mix="", arms__lift_augmented_only__mix="",
    evaluate__limits=(2, 3, 4, 5, 6), evaluate__scales=(), evaluate__answers_per_limit=12,
    evaluate__answers_without_limit=200, evaluate__cases_per_topic=16,
  )  # fmt: skip
  main.run(config, tmp_path)
  table = json.loads((tmp_path / "report.json").read_text())["table"]
  violation = {arm: row["violation"]["estimate"] for arm, row in table.items()}
  # 180 answers an arm: two standard errors of a difference are about 0.1.
  assert violation["lift"] + 0.1 < violation["sft"] < violation["dpo"] - 0.05
  broken = {arm: row["benchmark_violation"]["estimate"] for arm, row in table.items()}
  assert broken["lift"] + 0.1 < broken["dpo"]
  # The bias towards length that DPO learns: of 600 answers an arm, two standard errors of a difference are 0.2.
  assert table["dpo"]["free_words"]["estimate"] > table["sft"]["free_words"]["estimate"] + 0.2
