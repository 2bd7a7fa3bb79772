"""Refresh: records whose template changed are measured again without a search, and nothing else is touched."""

from __future__ import annotations

import dataclasses

import pytest

from dsa_codegen.gpu import resolve
from dsa_codegen.kernels.render import render, template_name, template_sha
from dsa_codegen.problem.op import Config, exceeds
from dsa_codegen.proof.measure import Measured
from dsa_codegen.proof.timing import COLD, Timing
from dsa_codegen.records import files as records
from dsa_codegen.records.default import default_sha
from dsa_codegen.records.lookup import lookup
from dsa_codegen.records.record import GpuKey, Record
from dsa_codegen.tune import refresh as room
from dsa_codegen.tune import standing
from dsa_codegen.tune.check import check
from dsa_codegen.tune.lock import StudyBusy
from dsa_codegen.tune.on_gpu import GpuEvaluator
from dsa_codegen.tune.pool import CompilePool
from dsa_codegen.tune.refresh import Wish, refresh

import tune_jobs
from support import H200
from toy import OP
from tune_jobs import landscape
from tune_support import CASE, DEFAULT, FAKE, PROBLEM, SPACE, SPEC, InstantGpu, config

GOOD, BAD = config(block_q=2), config(num_stages=2, splits=8)  # faster than the default, and slower
CHANGED = {"source_sha": "0" * 64, "template": "0" * 12}


def make(choice: Config = GOOD, gpu=H200, **changes) -> Record:
    """A record that holds, with some fields changed."""
    fields = {
        "op": OP.name,
        "gpu": GpuKey.of(gpu),
        "backend": choice.backend,
        "spec": SPEC.to_dict(),
        "bucket": CASE.sizes.bucket(),
        "config": choice.to_dict(),
        "evidence": "measured",
        "time_us": Timing(50.0, 49.0, 51.0, 10),
        "default_time_us": 60.0,
        "limit_us": 40.0,
        "sizes": CASE.sizes.to_dict(),
        "distribution": CASE.distribution,
        "template": template_sha(template_name(OP, "triton")),
        "source_sha": render(OP, SPEC, choice).sha,
        "toolchain": {"triton": "3.6.0"},
        "policy": COLD,
        "accuracy": {"max_abs": 0.0, "similarity": 0.0},
        "search": {"trials": 412, "seed": 7},
        "default_sha": default_sha(OP, SPEC, DEFAULT),
    }
    return Record(**{**fields, **changes})


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Refresh what was put in a folder, with an evaluator that needs no GPU."""
    for module in (room, standing):
        monkeypatch.setattr(module, "all_ops", lambda: {OP.name: OP})

    def run(evaluator=None, wish=None, here=H200, **options):
        evaluator = evaluator or InstantGpu(folder=tmp_path / "builds")
        monkeypatch.setattr(room, "GpuEvaluator", lambda pool, **how: evaluator)
        return refresh(tmp_path / "tuned", here, wish, state=tmp_path / ".tune", **options)

    return run


def put(tmp_path, *found: Record) -> None:
    records.merge(tmp_path / "tuned", found)


def stored(tmp_path, gpu="h200") -> tuple[Record, ...]:
    return records.read(tmp_path / "tuned" / gpu / "indexer.json")


def near(choice: Config):
    """The landscape's time, in as many digits as a file keeps."""
    return pytest.approx(landscape(choice), rel=1e-5)


def fates(report) -> list[str]:
    return [fate.what for fate in report.fates]


def test_a_changed_template_is_measured_again(go, tmp_path):
    put(tmp_path, make(**CHANGED))
    assert lookup(OP, SPEC, CASE.sizes, H200, {"tuned": tmp_path / "tuned"}).origin == "default"
    report = go()
    (record,) = stored(tmp_path)
    assert fates(report) == ["refreshed"] and report.complete
    assert record.config_for(OP) == GOOD
    assert (record.source_sha, record.template) == (make().source_sha, make().template)
    assert record.time_us.median == near(GOOD)
    assert record.default_time_us == near(DEFAULT)
    assert record.accuracy == {"max_abs": 1e-6, "similarity": 1e-9}
    assert record.toolchain.keys() > {"torch"} and record.measured_at
    assert record.search == {"trials": 412, "seed": 7, "refreshed": 1}
    found = lookup(OP, SPEC, CASE.sizes, H200, {"tuned": tmp_path / "tuned"})
    assert (found.origin, found.stale) == ("tuned", False)


WIDE = (("queries", 0, None), ("context", 0, None))


def test_a_record_of_a_wider_bucket_holds_and_keeps_it(go, tmp_path):
    """Buckets that got finer cost no record, nor any of what it serves."""
    put(tmp_path, make(bucket=WIDE))
    assert (go().holding, stored(tmp_path)[0].bucket) == (1, WIDE)
    put(tmp_path, make(bucket=WIDE, **CHANGED))
    assert fates(go()) == ["refreshed"]
    (record,) = stored(tmp_path)
    assert record.bucket == WIDE
    assert record.time_us.median == near(GOOD)


def test_what_does_not_reach_the_wider_bucket_gets_its_own(go, tmp_path, monkeypatch):
    monkeypatch.setattr(type(OP), "reach", lambda self, spec, config, bucket: exceeds("queries", -bucket[0][1], -1025))
    put(tmp_path, make(bucket=WIDE, **CHANGED))
    assert fates(go()) == ["refreshed"]
    assert [record.bucket for record in stored(tmp_path)] == [CASE.sizes.bucket()]


def test_a_bucket_that_is_only_a_part_of_todays_serves_nothing(go, tmp_path):
    put(tmp_path, make(bucket=(("queries", 4096, None), ("context", 16385, None))))
    assert "divided otherwise" in standing.standing(stored(tmp_path)[0]).reason


def test_only_the_shipped_config_and_the_default_are_timed(go, tmp_path):
    put(tmp_path, make(**CHANGED))
    evaluator = InstantGpu(folder=tmp_path / "builds")
    go(evaluator)
    assert evaluator.finals == [[GOOD, DEFAULT]]
    assert not evaluator.judged


def test_a_config_that_is_slower_now_gives_way_to_the_default(go, tmp_path):
    put(tmp_path, make(BAD, **CHANGED))
    (fate,) = go().fates
    assert fate.what == "default" and "against the default's" in fate.why
    assert stored(tmp_path)[0].config_for(OP) == DEFAULT


@pytest.mark.parametrize(
    ("change", "words"),
    [({"num_warps": 8}, "warpgroup rows"), ({"block_q": 3}, "block_q"), ({"block_k": 1}, "exactly the parameters")],
    ids=["violation", "value", "parameters"],
)
def test_a_config_that_is_no_longer_possible_gives_way_too(go, tmp_path, change, words):
    put(tmp_path, make(**{**CHANGED, "config": {**GOOD.to_dict(), **change}}))
    (fate,) = go().fates
    assert fate.what == "default" and words in fate.why
    assert stored(tmp_path)[0].config_for(OP) == DEFAULT


def test_a_wrong_config_never_stays(go, tmp_path):
    put(tmp_path, make(**CHANGED))
    evaluator = InstantGpu(folder=tmp_path / "builds")
    evaluator.wrong = {GOOD}
    (fate,) = go(evaluator).fates
    assert (fate.what, fate.why) == ("default", "mismatch: 3 values outside tolerance")
    assert stored(tmp_path)[0].config_for(OP) == DEFAULT


def test_where_the_default_is_wrong_too_the_record_goes(go, tmp_path):
    put(tmp_path, make(**CHANGED))
    evaluator = InstantGpu(folder=tmp_path / "builds")
    evaluator.wrong = {GOOD, DEFAULT}
    assert fates(go(evaluator)) == ["dropped"]
    assert not (tmp_path / "tuned" / "h200" / "indexer.json").exists()


def test_a_winner_that_fails_its_last_check_gives_way(go, tmp_path):
    put(tmp_path, make(**CHANGED))
    evaluator = InstantGpu(folder=tmp_path / "builds")
    evaluator.refusals = 1
    (fate,) = go(evaluator).fates
    assert fate.what == "default" and "a repeat differs" in fate.why


@pytest.mark.parametrize("here", [None, H200], ids=["no GPU", "another GPU"])
def test_records_of_a_gpu_that_is_not_here(go, tmp_path, here):
    put(tmp_path, make(gpu=resolve("H20"), **CHANGED))
    before = stored(tmp_path, "h20")
    report = go(here=here)
    assert fates(report) == ["left"] and not report.complete
    assert "h20" in report.fates[0].why and stored(tmp_path, "h20") == before
    assert fates(go(here=here, wish=Wish(drop=True))) == ["dropped"]
    assert stored(tmp_path, "h20") == ()


def test_a_slice_of_the_gpu_does_not_measure_its_records(go, tmp_path):
    put(tmp_path, make(**CHANGED))
    assert fates(go(here=dataclasses.replace(H200, sms=16))) == ["left"]


def test_what_holds_is_left_alone(go, tmp_path):
    put(tmp_path, make(), make(gpu=resolve("H20")))
    before = [path.read_bytes() for path in sorted(tmp_path.glob("tuned/*/*.json"))]
    report = go(wish=Wish(drop=True))
    assert (report.holding, report.fates, report.complete) == (2, [], True)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("tuned/*/*.json"))] == before


def test_every_record_where_that_is_wished(go, tmp_path):
    put(tmp_path, make(), make(gpu=resolve("H20")))
    report = go(wish=Wish(every=True, gpu_id="h200"))
    assert fates(report) == ["refreshed"]
    assert stored(tmp_path)[0].time_us.median == near(GOOD)
    assert stored(tmp_path, "h20")[0].time_us.median == 50.0


def test_a_template_that_changed_without_its_code_needs_no_gpu(go, tmp_path):
    put(tmp_path, make(template="0" * 12))
    assert fates(go(here=None)) == ["carried"]
    (record,) = stored(tmp_path)
    assert record == dataclasses.replace(record, template=make().template, time_us=make().time_us)


@pytest.mark.parametrize("change", [{}, {"template": "0" * 12}])
@pytest.mark.parametrize("known", ["", "0" * 64])
def test_another_default_is_a_new_rival(go, tmp_path, change, known):
    """The record's code is as it was, but it was never compared with what serves untuned now, or does not say with what."""
    put(tmp_path, make(default_sha=known, default_time_us=99.0, **change))
    evaluator = InstantGpu(folder=tmp_path / "builds")
    assert fates(go(evaluator)) == ["refreshed"] and evaluator.finals == [[GOOD, DEFAULT]]
    (record,) = stored(tmp_path)
    assert record.default_sha == default_sha(OP, SPEC, DEFAULT) and record.default_time_us == near(DEFAULT)
    assert go().holding == 1


def test_a_faster_default_takes_the_place_of_a_record_that_holds(go, tmp_path, monkeypatch):
    put(tmp_path, make(BAD))
    assert go().holding == 1
    monkeypatch.setattr(type(OP), "default_config", lambda self, *_: GOOD)
    assert fates(go()) == ["default"]
    (record,) = stored(tmp_path)
    assert record.config_for(OP) == GOOD and record.default_sha == default_sha(OP, SPEC, GOOD)


def test_defaults_that_differ_in_their_launch_alone_are_two():
    assert default_sha(OP, SPEC, GOOD) != default_sha(OP, SPEC, GOOD.replace(splits=2 * GOOD["splits"]))
    assert render(OP, SPEC, GOOD).sha == render(OP, SPEC, GOOD.replace(splits=2 * GOOD["splits"])).sha


def test_a_default_that_cannot_be_built_here_is_no_rival(go, tmp_path, monkeypatch):
    put(tmp_path, make(default_sha=""))
    monkeypatch.setattr(room, "missing_tool", lambda backend: "no compiler")
    assert go().holding == 1


def test_another_default_elsewhere_leaves_a_record(go, tmp_path):
    put(tmp_path, make(default_sha="", gpu=resolve("H20")))
    assert go(here=H200).holding == 1 and go(here=None).holding == 1


def test_another_triton_alone_changes_no_record(go, tmp_path):
    """Its text is compared with the one for the Triton that it was measured with."""
    old = render(OP, SPEC, GOOD, "3.7.0").sha
    put(tmp_path, make(toolchain={"triton": "3.7.0"}, source_sha=old))
    assert go().holding == 1


def test_a_machine_in_trouble_costs_no_record(go, tmp_path):
    put(tmp_path, make(**CHANGED))
    before = stored(tmp_path)
    evaluator = InstantGpu(folder=tmp_path / "builds")
    evaluator.trouble = "CUDA error: out of memory"
    (fate,) = go(evaluator).fates
    assert fate.what == "left" and "out of memory" in fate.why
    assert stored(tmp_path) == before
    evaluator.trouble, evaluator.final = "", lambda problem, candidates, limit_s: None
    assert fates(go(evaluator)) == ["left"]
    assert stored(tmp_path) == before


def test_a_spent_budget_leaves_the_rest(go, tmp_path):
    put(tmp_path, make(**CHANGED))
    (fate,) = go(budget_s=1e-9).fates
    assert (fate.what, fate.why) == ("left", "the budget was spent")


def test_a_backend_that_is_gone_makes_room_for_the_default(go, tmp_path):
    put(tmp_path, make(backend="tilelang", **CHANGED))
    report = go()
    assert fates(report) == ["dropped", "added"]
    (record,) = stored(tmp_path)
    assert (record.backend, record.config_for(OP)) == ("triton", DEFAULT)


def test_one_refresh_at_a_time(go, tmp_path):
    put(tmp_path, make(**CHANGED))
    evaluator = InstantGpu(folder=tmp_path / "builds")

    def again(problem, candidates, limit_s):
        with pytest.raises(StudyBusy, match="nothing was changed"):
            go(evaluator)
        return InstantGpu.final(evaluator, problem, candidates, limit_s)

    evaluator.final = again
    assert fates(go(evaluator)) == ["refreshed"]


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Check what was put in a folder, with times as ``us`` says; nothing there may change."""
    for module in (room, standing):
        monkeypatch.setattr(module, "all_ops", lambda: {OP.name: OP})

    def run(us=landscape, evaluator=None, here=H200, **options):
        evaluator = evaluator or InstantGpu(folder=tmp_path / "builds")
        evaluator.final = lambda problem, candidates, limit_s: [
            Measured(Timing(us(each.config), us(each.config), us(each.config), 10), COLD, 1) for each in candidates
        ]
        monkeypatch.setattr(room, "GpuEvaluator", lambda pool, **how: evaluator)
        before = [path.read_bytes() for path in sorted(tmp_path.glob("tuned/*/*.json"))]
        report = check(tmp_path / "tuned", here, state=tmp_path / ".tune", **options)
        assert [path.read_bytes() for path in sorted(tmp_path.glob("tuned/*/*.json"))] == before
        return report

    return run


@pytest.mark.parametrize(
    ("good", "default", "what"),
    [(50.0, 60.0, "holds"), (52.4, 60.0, "holds"), (52.6, 60.0, "slower"), (47.0, 60.0, "faster"), (50.0, 49.0, "overtaken")],
)
def test_a_check_tells_how_far_a_record_has_drifted(look, tmp_path, good, default, what):
    put(tmp_path, make(time_us=Timing(50.0, 50.0, 50.0, 10)))
    report = look({GOOD: good, DEFAULT: default}.__getitem__)
    (drift,) = report.drifts
    assert (drift.what, drift.now.median, drift.default_us) == (what, good, default)
    assert bool(report.drifted) is (what in ("slower", "overtaken"))


@pytest.mark.parametrize(("recorded", "what"), [(None, "overtaken"), (60.0, "overtaken"), (40.0, "holds")])
def test_another_backends_record_that_never_led_is_not_overtaken(look, tmp_path, recorded, what):
    put(tmp_path, make(time_us=Timing(50.0, 50.0, 50.0, 10), default_time_us=recorded))
    assert [drift.what for drift in look({GOOD: 50.0, DEFAULT: 40.0}.__getitem__).drifts] == [what]


def test_a_spread_is_no_drift(look, tmp_path):
    put(tmp_path, make(time_us=Timing(50.0, 45.0, 55.0, 10)))
    assert [drift.what for drift in look({GOOD: 57.0, DEFAULT: 90.0}.__getitem__).drifts] == ["holds"]


def test_a_check_finds_what_is_wrong_void_or_elsewhere(look, tmp_path):
    put(tmp_path, make(), make(gpu=resolve("H20")))
    evaluator = InstantGpu(folder=tmp_path / "builds")
    evaluator.wrong = {GOOD}
    report = look(evaluator=evaluator)
    assert [(drift.what, drift.why) for drift in report.drifted] == [("wrong", "mismatch: 3 values outside tolerance")]
    assert report.elsewhere == 1
    put(tmp_path, make(config={**GOOD.to_dict(), "block_q": 3}))
    assert [drift.what for drift in look().drifted] == ["void"]
    assert [fate.why for fate in look(budget_s=1e-9).unreached] == ["the budget was spent"]


def test_a_process_of_its_own_gates_and_times(tmp_path):
    """The jobs cross to the GPU's process; what dies there is an outcome, and compilers go on meanwhile."""
    unruly = SPACE.candidate(config(block_q=1, block_n=128, splits=4))
    good = SPACE.candidate(GOOD)
    with CompilePool(H200, tmp_path, 1, compile=tune_jobs.compile_quickly) as pool, GpuEvaluator(pool, FAKE) as evaluator:
        for candidate in (unruly, good):
            pool.request(candidate.rendered)
        while not evaluator.compiled(unruly):
            pool.poll()
        assert evaluator.set_up(PROBLEM, "triton") == ""
        assert evaluator.gate(PROBLEM, unruly).kind.value == "worker_died"
        while not evaluator.compiled(good):
            pool.poll()
        assert evaluator.gate(PROBLEM, good).ok
        (measured,) = evaluator.final(PROBLEM, [good], 1.0)
    assert measured.timing.median == landscape(GOOD)
