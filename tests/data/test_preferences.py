"""Pairs, pools and reference scores on disk."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nr.data.bad_records import DataError
from nr.data.pools import Pool, PoolSample, PoolWriter, read_pools, write_pools
from nr.data.preferences import (
  PreferencePair,
  ReferenceScore,
  read_pairs,
  read_reference_scores,
  write_pairs,
  write_reference_scores,
)

CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
GOOD = {"id": "a", "prompt": "p", "chosen": "x", "rejected": "y"}


def write_lines(path, *records):
  path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
  return path


def test_pairs_come_back(tmp_path):
  pairs = [
    PreferencePair("a", "Name a colour. \u2028é", "Teal.", "Colour."),
    PreferencePair("b", CHAT, "Hello", "No", weight=0.25, provenance={"round": 2, "by": ["x"]}),
    PreferencePair("c", "", None, "", (1, 2), (3, 0), (0,)),
  ]
  write_pairs(tmp_path / "new" / "pairs.jsonl", pairs)
  assert read_pairs(tmp_path / "new" / "pairs.jsonl") == pairs
  assert len((tmp_path / "new" / "pairs.jsonl").read_text().split("\n")) == 4


@pytest.mark.parametrize(
  "change,field",
  [
    ({"prompt": None}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [{"role": "user"}]}, "prompt"),
    ({"chosen": None}, "chosen"),
    ({"rejected": 4}, "rejected"),
    ({"weight": -1}, "weight"),
    ({"weight": float("nan")}, "weight"),
    ({"weight": True}, "weight"),
    ({"rejected_tokens": [1, -1]}, "rejected_tokens"),
    ({"rejected_tokens": [1.5]}, "rejected_tokens"),
    ({"provenance": 3}, "provenance"),
    ({"choosen": "z"}, "choosen"),
    ({}, "id"),
  ],
)
def test_bad_pairs_are_named_by_file_line_and_field(tmp_path, change, field):
  path = write_lines(tmp_path / "pairs.jsonl", GOOD, "\n", {**GOOD, "id": "b", **change} if change else GOOD)
  with pytest.raises(DataError, match=rf"pairs\.jsonl, line 3, field '{field}'"):
    read_pairs(path)
  kept = read_pairs(path, on_bad_record="quarantine", quarantine_path=tmp_path / "bad.jsonl")
  assert [pair.id for pair in kept] == ["a"]
  entry = json.loads((tmp_path / "bad.jsonl").read_text())
  assert (entry["where"], entry["field"]) == ("line 3", field)


@pytest.mark.parametrize("line", ["{", "3\n", '{"id": "\udcff"}\n'])
def test_lines_that_are_no_records(tmp_path, line):
  (tmp_path / "pairs.jsonl").write_bytes((json.dumps(GOOD) + "\n" + line).encode("utf-8", "surrogateescape"))
  with pytest.raises(DataError, match="line 2"):
    read_pairs(tmp_path / "pairs.jsonl")
  with pytest.raises(DataError, match="no such file"):
    read_pairs(tmp_path / "nothing.jsonl")


def test_bad_pairs_are_not_written(tmp_path):
  write_pairs(tmp_path / "p.jsonl", [PreferencePair("a", "p", "x", "y")])
  before = (tmp_path / "p.jsonl").read_bytes()
  for pair in (
    PreferencePair("a", "p", None, "y"),
    PreferencePair("a", "p", "x", "\udc80"),
    PreferencePair("a", "p", "x", "y", provenance={"loss": float("inf")}),
  ):
    with pytest.raises(DataError, match="pair 'a'"):
      write_pairs(tmp_path / "p.jsonl", [pair])
  with pytest.raises(DataError, match="stands on line 1 already"):
    write_pairs(tmp_path / "p.jsonl", [PreferencePair("a", "p", "x", "y")] * 2)
  assert (tmp_path / "p.jsonl").read_bytes() == before


def test_reference_scores_come_back(tmp_path):
  scores = {"a": ReferenceScore("00ff", (-1.5, -2.25)), "b": ReferenceScore("0011", (-0.1, -3.0))}
  write_reference_scores(tmp_path / "r.jsonl", scores)
  assert read_reference_scores(tmp_path / "r.jsonl") == scores
  write_lines(tmp_path / "r.jsonl", {"id": "a", "digest": "x", "log_probs": [1.0]}, {"id": "a"})
  with pytest.raises(DataError, match="line 2, field 'digest'"):
    read_reference_scores(tmp_path / "r.jsonl")


def sample(index, **fields):
  return PoolSample(index, f"text {index}", (5, index), (-0.5, -1.0), **fields)


FULL = sample(3, finish_reason="stop", score=0.0, details={"by": "rule"}, extras={"temperature": [0.5]})


def test_pools_come_back(tmp_path):
  pools = [
    Pool(
      "q1", CHAT, (sample(0), FULL), reference="42", prompt_tokens=(1, 2), round=1, chain="top_p:0.9", seed=7
    ),
    Pool("q1", "other round", (PoolSample(0, None), PoolSample(1, ""))),
  ]
  write_pools(tmp_path / "p.jsonl", pools)
  assert read_pools(tmp_path / "p.jsonl") == pools
  with PoolWriter(tmp_path / "q.jsonl") as writer:
    for pool in pools:
      for one in reversed(pool.samples):
        writer.append(pool._replace(samples=(one,)))
    assert writer.missing("q1", 5, 1) == [1, 2, 4] and writer.missing("q1", 2) == []
    assert writer.has("q1", 3, 1) and not writer.has("q1", 3) and writer.missing("q9", 1) == [0]
  assert read_pools(tmp_path / "q.jsonl") == pools
  with PoolWriter(tmp_path / "q.jsonl") as writer:
    assert writer.missing("q1", 5, 1) == [1, 2, 4]
    with pytest.raises(DataError, match="sample 3 of pool 'q1' stands on an earlier line"):
      writer.append(pools[0]._replace(samples=(sample(1), sample(3))))
    with pytest.raises(DataError, match="field 'seed': is not what an earlier line"):
      writer.append(pools[0]._replace(samples=(sample(1),), seed=8))
    with pytest.raises(DataError, match="JSON"):
      writer.append(pools[0]._replace(samples=(sample(1, score=float("nan")),)))
    with pytest.raises(DataError, match=r"samples\[0\].log_probs': has 1 entries for 2 tokens"):
      writer.append(pools[0]._replace(samples=(sample(1)._replace(log_probs=(0.0,)),)))
  assert read_pools(tmp_path / "q.jsonl") == pools, "nothing of a refused line is written"


def test_samples_are_given_in_the_order_of_their_indices(tmp_path):
  record = {"id": "a", "prompt": "p", "samples": [{"index": 2}, {"index": 0}]}
  path = write_lines(tmp_path / "p.jsonl", record, {**record, "samples": [{"index": 1}]})
  assert [one.index for one in read_pools(path)[0].samples] == [0, 1, 2]
  path = write_lines(tmp_path / "p.jsonl", record)
  assert [one.index for one in read_pools(path)[0].samples] == [0, 2]


@pytest.mark.parametrize(
  "change,field",
  [
    ({"samples": None}, "samples"),
    ({"samples": [3]}, r"samples\[0\]"),
    ({"samples": [{"index": -1}]}, r"samples\[0\].index"),
    ({"samples": [{"index": 1}, {"index": 1}]}, r"samples\[1\].index"),
    ({"samples": [{"index": 1, "score": "high"}]}, r"samples\[0\].score"),
    ({"prompt": {}}, "prompt"),
    ({"round": 1.5}, "round"),
    ({"prompt_tokens": [-2]}, "prompt_tokens"),
    ({"id": "a", "prompt": "another"}, "prompt"),
    ({"id": "a", "samples": [{"index": 0}]}, "samples"),
  ],
)
def test_bad_pools_are_named(tmp_path, change, field):
  good = {"id": "a", "prompt": "p", "samples": [{"index": 0, "text": "x"}]}
  path = write_lines(tmp_path / "pools.jsonl", good, {**good, "id": "b", **change})
  with pytest.raises(DataError, match=rf"line 2, field '{field}'"):
    read_pools(path)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_half_a_last_line_is_dropped_and_named(tmp_path, cut, caplog):
  path = tmp_path / "p.jsonl"
  with PoolWriter(path) as writer:
    writer.append(Pool("a", "p", (sample(0),)))
    writer.append(Pool("a", "p", (sample(1),)))
  path.write_bytes(path.read_bytes()[:-cut])
  kept = 2 if cut == 1 else 1  # only the line's end is missing: the record is whole
  assert len(read_pools(path)[0].samples) == kept
  with PoolWriter(path) as writer:
    assert writer.missing("a", 2) == [0, 1][kept:]
    if cut > 1:
      assert "p.jsonl, line 2: was cut off" in caplog.text
      writer.append(Pool("a", "p", (sample(1),)))
  assert [one.index for one in read_pools(path)[0].samples] == [0, 1]
  assert path.read_bytes().count(b"\n") == 2


WRITER = """
import sys
from nr.data.pools import Pool, PoolSample, PoolWriter
with PoolWriter(sys.argv[1]) as writer:
  for index in writer.missing("a", 100_000):
    writer.append(Pool("a", "p", (PoolSample(index, "x" * 5000),)))
    print(index, flush=True)
"""


def test_killed_writer_loses_nothing_that_it_reported(tmp_path):
  path, reported = tmp_path / "p.jsonl", -1
  for _ in range(2):
    process = subprocess.Popen(
      [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, env=dict(os.environ)
    )
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split(b"\n")[:-1]
    process.wait()
    reported = int(rest[-1]) if rest else reported + 1
    with PoolWriter(path) as writer:
      there = [index for index in range(reported + 2) if writer.has("a", index)]
    assert there in (list(range(reported + 1)), list(range(reported + 2)))
    reported = there[-1]
