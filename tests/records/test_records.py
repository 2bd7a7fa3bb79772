"""Records: what is written is read back, evidence is ranked, damage is survived, and two writers lose nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing

import filelock
import pytest

from dsa_codegen.errors import RecordError
from dsa_codegen.kernels.render import installed_triton, render
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.timing import Policy, Timing
from dsa_codegen.records import files as records
from dsa_codegen.records import record
from dsa_codegen.records.record import MEASURED, MODELLED, GpuKey, Record, RunnerUp

from support import H200
from toy import OP

SPEC = IndexerSpec(64, 128)
CASE = Case(IndexerSizes(4096, 32768), "causal")
CONFIG = Config.of("triton", block_q=4, block_n=64, num_warps=4, num_stages=3, splits=1)


def make(config=CONFIG, spec=SPEC, case=CASE, gpu=H200, evidence=MEASURED, time_us=1899.0, **changes) -> Record:
    """A record as the tuner would write it, with some fields changed."""
    fields = {
        "op": OP.name,
        "gpu": GpuKey.of(gpu),
        "backend": config.backend,
        "spec": spec.to_dict(),
        "bucket": case.sizes.bucket(),
        "config": config.to_dict(),
        "evidence": evidence,
        "time_us": Timing(time_us, time_us - 5, time_us + 5, 10),
        "default_time_us": 2000.0,
        "limit_us": 1041.0,
        "sizes": case.sizes.to_dict(),
        "distribution": case.distribution,
        "template": "0123456789ab",
        "source_sha": render(OP, spec, config).sha,
        "toolchain": {"triton": installed_triton(), "torch": "2.11.0"},
        "policy": Policy(),
        "accuracy": {"max_abs": 1e-5, "similarity": 1e-9},
        "search": {"trials": 40, "ok": 31, "wall_s": 12.5, "seed": 0},
        "runners_up": (RunnerUp(config.to_dict(), time_us + 1),),
        "measured_at": "2026-01-01T00:00:00Z",
    }
    return Record(**{**fields, **changes})


def test_is_read_back_as_written(tmp_path):
    written = make()
    assert records.merge(tmp_path, [written]) == [tmp_path / "h200" / "indexer.json"]
    assert records.read(tmp_path / "h200" / "indexer.json") == (written,)
    assert written.config_for(OP) == CONFIG


def test_a_record_may_say_which_default_it_was_timed_beside(tmp_path):
    known, unknown = make(default_sha="5" * 64), make(spec=IndexerSpec(8, 64))
    (path,) = records.merge(tmp_path, [known, unknown])
    assert sorted(records.read(path), key=lambda record: record.default_sha) == [unknown, known]
    assert ["default_sha" in each for each in json.loads(path.read_text())["records"]].count(True) == 1


def test_a_modelled_record_is_read_back(tmp_path):
    written = make(evidence=MODELLED, time_us=5.0, policy=None, accuracy=None, default_time_us=None, runners_up=())
    (path,) = records.merge(tmp_path, [written])
    assert records.read(path) == (written,)


def test_the_file_is_the_same_for_any_order_of_writing(tmp_path):
    several = [make(spec=IndexerSpec(heads, 128), case=CASE) for heads in (64, 8, 32)]
    (one,) = records.merge(tmp_path / "one", several)
    for item in reversed(several):
        (other,) = records.merge(tmp_path / "other", [item])
    assert one.read_text() == other.read_text()
    assert max(map(len, one.read_text().splitlines())) <= 132, "a person should be able to read it"
    assert not list(one.parent.glob("*.tmp")) and {path.name for path in one.parent.iterdir()} == {
        "indexer.json",
        ".indexer.json.lock",
    }


@pytest.mark.parametrize(
    ("change", "distinct"),
    [
        ({"spec": IndexerSpec(32, 128)}, True),
        ({"case": Case(IndexerSizes(4096, 8192), "causal")}, True),
        ({"case": Case(IndexerSizes(2048, 65536), "causal")}, False),
        ({"config": CONFIG.replace(num_stages=2)}, False),
        ({"toolchain": {"triton": "3.7.0"}}, False),
        ({"measured_at": "2027-01-01T00:00:00Z"}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_changes_the_key(tmp_path, change, distinct):
    (path,) = records.merge(tmp_path, [make()])
    newer = make(**change)
    records.merge(tmp_path, [newer])
    assert len(records.read(path)) == (2 if distinct else 1)
    assert newer in records.read(path)


@pytest.mark.parametrize(
    ("there", "fresh", "kept"),
    [
        ((MEASURED, "a"), (MEASURED, "a"), [2]),
        ((MODELLED, "a"), (MEASURED, "a"), [2]),
        ((MODELLED, "a"), (MODELLED, "b"), [2]),
        ((MEASURED, "a"), (MODELLED, "a"), [1]),
        ((MEASURED, "a"), (MODELLED, "b"), [1, 2]),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_measured_beats_modelled(tmp_path, there, fresh, kept):
    (path,) = records.merge(tmp_path, [make(evidence=there[0], template=there[1], time_us=1.0)])
    records.merge(tmp_path, [make(evidence=fresh[0], template=fresh[1], time_us=2.0)])
    assert sorted(item.time_us.median for item in records.read(path)) == kept


DAMAGE = {
    "empty": "",
    "truncated": '{"schema": 1, "op": "indexer", "gpu"',
    "not an object": "[1, 2]",
    "nested without end": "[" * 100_000,
    "future schema": None,
    "another gpu": None,
    "another op": None,
}


def damaged(kind: str, whole: str) -> str:
    content = json.loads(whole)
    if kind == "future schema":
        content["schema"] = 99
    elif kind == "another gpu":
        content["gpu"]["id"] = "h100"
    elif kind == "another op":
        content["op"] = "select"
    return DAMAGE[kind] if DAMAGE[kind] is not None else json.dumps(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_miss_and_never_overwritten(tmp_path, kind):
    (path,) = records.merge(tmp_path, [make()])
    path.write_text(damaged(kind, path.read_text()))
    before = path.read_bytes()
    with pytest.warns(records.RecordWarning, match="left as it is"):
        assert records.read(path) == ()
    with pytest.raises(RecordError, match=r"indexer\.json"):
        records.merge(tmp_path, [make()])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("evidence", "guessed"),
        ("spec", {"heads": [64]}),
        ("config", {"block_q": 4.5}),
        ("time_us", {"median": "fast", "p20": 1, "p80": 1, "n": 1}),
        *(("time_us", {"median": median, "p20": 1, "p80": 1, "n": 1}) for median in (math.nan, math.inf, -1.5, 0, 10**400)),
        ("time_us", {"median": 1, "p20": math.nan, "p80": 1, "n": 1}),
        ("default_time_us", -3.0),
        ("limit_us", math.nan),
        ("accuracy", {"similarity": math.nan}),
        ("runners_up", [{"config": {"block_q": 4}, "time_us": -math.inf}]),
        ("bucket", {"queries": [0]}),
        ("invented", 1),
        ("source_sha", None),
        ("default_sha", None),
    ],
)
def test_one_bad_record_is_skipped_and_kept(tmp_path, field, value):
    (path,) = records.merge(tmp_path, [make(), make(spec=IndexerSpec(8, 64))])
    content = json.loads(path.read_text())
    content["records"][0][field] = value
    path.write_text(json.dumps(content))
    with pytest.warns(records.RecordWarning, match="record 0"):
        (good,) = records.read(path)
    records.merge(tmp_path, [dataclasses.replace(good, time_us=Timing(1.0, 1.0, 1.0, 5))])
    kept = json.loads(path.read_text())["records"]
    assert json.dumps(content["records"][0]) in map(json.dumps, kept)  # as text: NaN is not even equal to itself


@pytest.mark.parametrize("median", [math.nan, math.inf, -math.inf, -2.0, 0.0])
def test_a_time_that_is_none_is_not_written(tmp_path, median):
    with pytest.raises(RecordError, match=r"not a (time|finite number)"):
        records.merge(tmp_path, [make(), make(spec=IndexerSpec(8, 64), time_us=median)])
    assert not list(tmp_path.iterdir())


def _write(folder, start: int) -> None:
    for context in range(start, 20, 2):
        bucket = (("context", context, context + 1),)
        records.merge(folder, [make(bucket=bucket)])


def test_two_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")  # they only write: another start would import torch anew
    writers = [context.Process(target=_write, args=(tmp_path, start)) for start in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = {item.bucket[0][1] for item in records.read(tmp_path / "h200" / "indexer.json")}
    assert found == set(range(20))


def test_a_lock_that_another_process_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_LOCK_TIMEOUT_S", 0.1)
    (path,) = records.merge(tmp_path, [make()])
    before = path.read_text()
    with (
        filelock.FileLock(path.with_name(f".{path.name}.lock")),
        pytest.raises(RecordError, match=r"\.lock for 0\.1 s; end it"),
    ):
        records.merge(tmp_path, [make(time_us=1.0)])
    assert path.read_text() == before


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (path,) = records.merge(tmp_path, [make()])
    before = path.read_text()

    def broken(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        records.merge(tmp_path, [make(time_us=1.0)])
    assert path.read_text() == before
    assert sorted(item.name for item in path.parent.iterdir()) == [".indexer.json.lock", "indexer.json"]


def test_numbers_are_short():
    entry = record.entry(make(time_us=1899.123456789))
    assert entry["time_us"]["median"] == 1899.12


def test_a_modelled_choice_that_is_not_kept_names_what_serves_instead(tmp_path):
    measured, modelled = make(), make(evidence=MODELLED, time_us=3.3, policy=None, accuracy=None)
    (path,) = records.merge(tmp_path, [modelled])
    assert records.outranked(path, modelled) is None
    records.merge(tmp_path, [measured])
    records.merge(tmp_path, [modelled])
    assert records.outranked(path, modelled) == measured
    assert records.outranked(path, measured) is None
