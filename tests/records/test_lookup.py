"""Lookup: the order of origins, what is passed over and why, and what `explain` says about a miss."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
from test_records import CASE, CONFIG, SPEC, make

from dsa_codegen import ops
from dsa_codegen.errors import InputError, RecordError
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels.render import installed_triton, render
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.op import Case, exceeds
from dsa_codegen.problem.values import upper
from dsa_codegen.records import files as records
from dsa_codegen.records import lookup as rooms
from dsa_codegen.records.explain import Difference, distance, explain, nearest
from dsa_codegen.records.lookup import lookup, search_path
from dsa_codegen.records.record import MODELLED, GpuKey

from support import H200
from toy import OP

H100 = resolve("H100")
SIZES = CASE.sizes
STAGES = {"user": 2, "tuned": 4, "borrowed": 5, "modelled": 3}  # one config per origin, told apart by its num_stages


@pytest.fixture
def folders(tmp_path):
    return {"user": tmp_path / "user", "tuned": tmp_path / "tuned"}


def put(folder, stages, **changes):
    records.merge(folder, [make(CONFIG.replace(block_q=2, num_stages=stages), **changes)])


def found(folders, spec=SPEC, sizes=SIZES, gpu=H200):
    return lookup(OP, spec, sizes, gpu, folders)


PUT = {
    "user": lambda folders: put(folders["user"], STAGES["user"]),
    "tuned": lambda folders: put(folders["tuned"], STAGES["tuned"]),
    "borrowed": lambda folders: put(folders["tuned"], STAGES["borrowed"], gpu=H100),
    "modelled": lambda folders: put(folders["user"], STAGES["modelled"], evidence=MODELLED, template="x"),
}


@pytest.mark.parametrize("first", range(5), ids=[*PUT, "default"])
def test_order(folders, first):
    """With the first ``first`` origins absent, the next one serves."""
    origins = list(PUT)[first:]
    for origin in origins:
        PUT[origin](folders)
    result = found(folders)
    assert result.origin == (origins[0] if origins else "default")
    if origins:
        assert result.config["num_stages"] == STAGES[origins[0]]
    else:
        assert result.config == OP.default_config(SPEC, SIZES, H200)
        assert result.record is None


def test_the_fastest_backend_serves(folders, monkeypatch):
    monkeypatch.setattr(type(OP), "backends", ("triton", "tilelang"))
    monkeypatch.setattr(rooms, "_source_sha", lambda *of: "same")
    monkeypatch.setattr(rooms, "missing_tool", lambda backend: None)
    monkeypatch.setattr(rooms, "toolchain_difference", lambda record: "")
    put(folders["tuned"], 2, source_sha="same", time_us=10.0)
    put(folders["tuned"], 3, source_sha="same", time_us=9.0, backend="tilelang")
    assert found(folders).config.backend == "tilelang"
    monkeypatch.setattr(rooms, "missing_tool", lambda backend: "no nvcc" if backend == "tilelang" else None)
    result = found(folders)
    assert result.config.backend == "triton"
    assert "no nvcc" in result.notes[0]


@pytest.mark.parametrize(("tilelang_us", "serves"), [(9.95, "triton"), (9.85, "tilelang")])
def test_of_tied_backends_the_preferred_one_serves(folders, monkeypatch, tilelang_us, serves):
    monkeypatch.setattr(type(OP), "backends", ("triton", "tilelang"))
    monkeypatch.setattr(rooms, "unusable", lambda *of: None)
    monkeypatch.setattr(rooms, "toolchain_difference", lambda record: "")
    put(folders["tuned"], 3, time_us=tilelang_us, backend="tilelang")
    put(folders["tuned"], 2, time_us=10.0)
    assert found(folders).config.backend == serves


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"source_sha": "0" * 64}, "renders to another source"),
        ({"config": {**CONFIG.to_dict(), "block_q": 3}}, "block_q"),
        ({"config": {**CONFIG.to_dict(), "splits": True}}, "splits"),
        ({"config": {"block_q": 2}}, "exactly the parameters"),
        ({"config": {**CONFIG.to_dict(), "num_warps": 8}}, "warpgroup rows"),
        ({"backend": "cuda"}, "backend"),
    ],
    ids=["source", "value", "type", "parameters", "violation", "backend"],
)
def test_what_is_passed_over_is_said(folders, change, note):
    records.merge(folders["tuned"], [dataclasses.replace(make(), **change)])
    result = found(folders)
    assert result.origin == "default"
    assert note in result.notes[0]


def test_another_bucket_spec_or_architecture_is_a_miss(folders):
    put(folders["tuned"], 2)
    assert found(folders).origin == "tuned"
    assert found(folders, sizes=IndexerSizes(4096, 8192)).origin == "default"
    assert found(folders, spec=IndexerSpec(32, 128)).origin == "default"
    assert found(folders, gpu=resolve("L40S")).origin == "default"
    assert found(folders, gpu=dataclasses.replace(H200, capability=100)).origin == "default"


WIDE = (("queries", 1025, None), ("context", 0, None))
ALL = (("queries", 0, None), ("context", 0, None))
ELSEWHERE = {"queries": 4096, "context": 8192}


def test_a_record_serves_every_bucket_that_its_own_contains(folders):
    put(folders["tuned"], 2, bucket=WIDE)
    assert found(folders).origin == found(folders, sizes=IndexerSizes(4096, 8192)).origin == "tuned"
    assert found(folders, sizes=IndexerSizes(1024, 8192)).origin == "default"
    ((_, differing),) = explain(OP, SPEC, IndexerSizes(1024, 8192), H200, folders)
    assert differing == [Difference("bucket.queries", "[65, 1025]", "[1025, None]")]
    assert explain(OP, SPEC, SIZES, H200, folders)[0][1] == []


def test_a_part_of_the_bucket_is_not_enough(folders):
    put(folders["tuned"], 2, bucket=(("queries", 1025, None), ("context", 16385, 65537)))
    assert found(folders).origin == "default"


def test_the_tightest_bucket_serves(folders):
    put(folders["tuned"], 2, bucket=ALL, time_us=1.0, sizes=ELSEWHERE)
    assert found(folders).config["num_stages"] == 2
    put(folders["tuned"], 3, bucket=WIDE, time_us=2.0, sizes=ELSEWHERE)
    assert found(folders).config["num_stages"] == 3
    put(folders["tuned"], 4, time_us=3.0)
    assert found(folders).config["num_stages"] == 4
    assert found(folders, sizes=IndexerSizes(**ELSEWHERE)).config["num_stages"] == 2  # timed there, and faster than 3


def test_times_compare_where_a_wider_record_was_timed_in_the_bucket(folders):
    """Of two buckets the exact one, unless the other's record is known to be faster there."""
    put(folders["tuned"], 4, time_us=3.0)
    put(folders["tuned"], 2, bucket=ALL, time_us=2.0)
    assert found(folders).config["num_stages"] == 2
    put(folders["tuned"], 2, bucket=ALL, time_us=2.99)  # noise cannot tell them apart
    assert found(folders).config["num_stages"] == 4


def test_the_next_bucket_serves_where_a_record_cannot_be_used(folders):
    put(folders["tuned"], 2, bucket=ALL, sizes=ELSEWHERE)
    put(folders["tuned"], 4, source_sha="0" * 64)
    result = found(folders)
    assert result.config["num_stages"] == 2
    assert "another source" in result.notes[0]


@pytest.fixture
def short(monkeypatch):
    """Configs with less than 4 stages reach contexts of 16384 tokens."""

    def reach(self, spec, config, bucket):
        return exceeds("context", upper(bucket, "context"), 16384 if config["num_stages"] < 4 else math.inf)

    monkeypatch.setattr(type(OP), "reach", reach)


def test_a_record_out_of_reach_is_passed_over(folders, short):
    put(folders["tuned"], 2, bucket=WIDE)
    assert found(folders, sizes=IndexerSizes(4096, 8192)).config["num_stages"] == 2
    result = found(folders)
    assert (result.origin, result.config["num_stages"]) == ("default", 4)
    assert "context: inf needed, 16384 allowed" in result.notes[0]
    (_, (difference,)) = explain(OP, SPEC, SIZES, H200, folders)[0]
    assert difference.field == "config"


def test_neither_a_default_nor_a_stand_in_is_out_of_reach(short):
    """The guess has 3 stages."""
    near = IndexerSizes(4096, 8192)
    assert [OP.default_config(SPEC, sizes, H200)["num_stages"] for sizes in (SIZES, near)] == [4, 3]
    assert {config["num_stages"] for config in rooms.stand_ins(OP, SPEC, SIZES, H200)} == {4}
    assert OP.violations(SPEC, CONFIG, H200) == OP.violations(SPEC, CONFIG, H200, near.bucket()) == []
    assert [each.name for each in OP.violations(SPEC, CONFIG, H200, SIZES.bucket())] == ["context"]


@pytest.mark.parametrize("gpu", ["h200", "b200"])
@pytest.mark.parametrize("preset", ["tiny-gqa", "ax-k2", "deepseek-v4-pro", "deepseek-v3.2"])
def test_a_default_is_the_same_throughout_its_bucket(preset, gpu):
    """What is loaded serves the bucket, whichever call came first."""
    chance, model, gpu = random.Random(1), presets.preset(preset), resolve(gpu)
    for op, spec in [(each, spec) for each in ops.all_ops().values() for spec in each.specs(model)]:
        first, found = op.workloads(spec)[0].sizes, {}
        for _ in range(400):
            drawn = {name: int(2 ** chance.uniform(0, 21 if name == "tokens" else 13)) for name in op.sizes_type.EDGES}
            sizes = dataclasses.replace(first, **drawn)
            assert sizes.typical(first).bucket() == sizes.bucket()
            found.setdefault(sizes.bucket(), set()).add(lookup(op, spec, sizes, gpu, {}).config)
        several = {bucket: configs for bucket, configs in found.items() if len(configs) > 1}
        assert not several, (op.name, spec.id)


def test_borrowed_only_where_nothing_is_violated(folders):
    PUT["borrowed"](folders)
    assert found(folders).notes == ("borrowed from h100: no record for h200",)
    records.merge(folders["tuned"], [make(CONFIG.replace(block_q=2, block_n=128, num_stages=5), gpu=H100)])
    assert found(folders).origin == "borrowed"
    small = dataclasses.replace(H200, smem_per_block=64 * 1024)
    result = found(folders, gpu=small)
    assert result.origin == "default"
    assert "smem" in result.notes[0]


SLICE = dataclasses.replace(H200, sms=16)


def test_a_slice_that_is_named_as_the_whole_borrows(folders):
    """Records are of a board: its SMs and shared memory, not its name alone."""
    put(folders["tuned"], 2)
    result = found(folders, gpu=SLICE)
    assert (result.origin, result.notes) == ("borrowed", ("borrowed from h200 of 132 SMs: no record for h200",))
    ((_, (difference,)),) = explain(OP, SPEC, SIZES, SLICE, folders)
    assert difference == Difference("gpu.sms", "16", "132")


def test_what_a_slice_finds_replaces_nothing_of_the_whole(folders):
    put(folders["tuned"], 2)
    path = records.path_of(folders["tuned"], "h200", "indexer")
    before = path.read_bytes()
    for attempt in (lambda: put(folders["tuned"], 3, gpu=SLICE), lambda: records.require_readable(path, GpuKey.of(SLICE))):
        with pytest.raises(RecordError, match=r"h200 \(sm_90a\) of 132 SMs .* not of a h200 \(sm_90a\) of 16 SMs"):
            attempt()
    assert path.read_bytes() == before
    records.require_readable(path, GpuKey.of(H200))


def test_a_borrowed_record_is_of_the_most_similar_gpu(folders):
    put(folders["tuned"], 2, gpu=resolve("H20"), time_us=1.0)
    put(folders["tuned"], 3, gpu=H100, time_us=2.0)
    assert found(folders).config["num_stages"] == 3


@pytest.mark.parametrize(("measured", "other"), [("3.6.0", "3.9.0"), ("3.9.0", "3.6.0")])
def test_a_record_is_compared_with_the_text_for_the_triton_it_was_measured_with(measured, other):
    op = ops.get("indexer")
    config = op.default_config(SPEC, SIZES, H200, "gluon")
    text = {"source_sha": render(op, SPEC, config, measured).sha, "toolchain": {"triton": measured}}
    record = dataclasses.replace(make(), backend="gluon", config=config.to_dict(), **text)
    assert rooms.unusable(op, SPEC, H200, record, SIZES.bucket()) is None
    record = dataclasses.replace(record, toolchain={"triton": other})
    assert "another source" in rooms.unusable(op, SPEC, H200, record, SIZES.bucket())


def test_another_toolchain_is_stale_but_used(folders):
    put(folders["tuned"], 2, toolchain={"triton": "3.5.0", "driver": "550.1"})
    result = found(folders)
    assert (result.origin, result.stale) == ("tuned", True)
    assert f"triton 3.5.0 (installed: {installed_triton()}" in result.notes[-1]
    put(folders["tuned"], 2, toolchain={"triton": installed_triton(), "driver": "550.1"})
    assert not found(folders).stale


def test_what_is_stale_is_ignored_on_demand(folders, monkeypatch):
    put(folders["tuned"], 2, toolchain={"triton": "3.5.0"})
    monkeypatch.setenv("DSA_STALE", "ignore")
    result = found(folders)
    assert result.origin == "default" and "triton 3.5.0" in result.notes[0] and "DSA_STALE" in result.notes[0]
    put(folders["tuned"], 2, toolchain={"triton": installed_triton()})
    assert found(folders).origin == "tuned"
    monkeypatch.setenv("DSA_STALE", "use")
    put(folders["tuned"], 2, toolchain={"triton": "3.5.0"})
    assert found(folders).stale
    monkeypatch.setenv("DSA_STALE", "never")
    with pytest.raises(InputError, match="DSA_STALE"):
        found(folders)


def test_a_corrupt_file_is_a_miss_with_a_warning(folders):
    PUT["tuned"](folders)
    user = records.path_of(folders["user"], "h200", "indexer")
    user.parent.mkdir(parents=True)
    user.write_text("{")
    with pytest.warns(records.RecordWarning, match="indexer.json"):
        assert found(folders).origin == "tuned"


def test_search_path_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DSA_TUNED_DIR", raising=False)
    assert list(search_path()) == ["tuned"]
    monkeypatch.setenv("DSA_TUNED_DIR", str(tmp_path))
    assert next(iter(search_path().items())) == ("user", tmp_path)


def test_explain_names_the_fields_that_differ(folders):
    put(folders["tuned"], 2, spec=IndexerSpec(32, 128))
    put(folders["tuned"], 2, gpu=H100, case=Case(IndexerSizes(4096, 8192), "causal"))
    (first, one), (_, two) = explain(OP, SPEC, SIZES, H200, folders)
    assert one == [Difference("spec.heads", "64", "32")]
    assert first.gpu.id == "h200"
    assert [difference.field for difference in two] == ["gpu", "bucket.context"]


def test_explain_an_exact_hit_and_a_changed_template(folders):
    PUT["tuned"](folders)
    assert explain(OP, SPEC, SIZES, H200, folders)[0][1] == []
    path = records.path_of(folders["tuned"], "h200", "indexer")
    content = json.loads(path.read_text())
    content["records"][0]["source_sha"] = "0"
    path.write_text(json.dumps(content))
    ((_, (difference,)),) = explain(OP, SPEC, SIZES, H200, folders)
    assert "another source" in difference.there


def test_nearest_in_octaves():
    exact = make()
    double = make(case=Case(IndexerSizes(4096, 65536), "causal"))
    heads = make(spec=IndexerSpec(8, 128))
    other_gpu = make(gpu=H100)
    assert distance(exact, SPEC, SIZES, H200) == 0
    assert distance(double, SPEC, SIZES, H200) == pytest.approx(1, abs=1e-3)
    assert nearest([heads, other_gpu, double, exact], SPEC, SIZES, H200) == [exact, double, other_gpu]


def test_kin_serves_where_only_minor_fields_differ(folders, monkeypatch):
    monkeypatch.setattr(type(OP), "minor", frozenset({"clean"}))
    PUT["borrowed"](folders)
    PUT["tuned"](folders)
    cousin = dataclasses.replace(SPEC, clean=not SPEC.clean)
    result = found(folders, spec=cousin)
    assert (result.origin, result.config["num_stages"]) == ("kin", STAGES["tuned"])
    assert found(folders, spec=dataclasses.replace(SPEC, heads=16)).origin == "default"
    assert found(folders).origin == "tuned"


def test_the_default_is_one_for_the_whole_bucket(tmp_path):
    op = ops.get("attention_paged")
    (spec,) = op.specs(presets.preset("glm-5"))
    sizes = [op.sizes_type(batch=57, next_n=1, tokens=5000), op.sizes_type(batch=64, next_n=1, tokens=1 << 20)]
    assert sizes[0].bucket() == sizes[1].bucket()
    first, second = (lookup(op, spec, each, H200, {"tuned": tmp_path}) for each in sizes)
    assert first.config == second.config


def test_a_new_field_loses_no_record(folders, monkeypatch):
    """A field that a spec got after the record was measured, with a default that leaves the code as it was."""

    @dataclasses.dataclass(frozen=True)
    class Grown(IndexerSpec):
        newer: str = "as_before"

    put(folders["tuned"], 4)
    monkeypatch.setattr(type(OP), "spec_type", Grown)
    plain = Grown(SPEC.heads, SPEC.head_dim)
    assert found(folders, plain).origin == "tuned"
    assert not explain(OP, plain, SIZES, H200, folders)[0][1]
    assert found(folders, dataclasses.replace(plain, clean=True)).origin == "kin"
    assert found(folders, dataclasses.replace(plain, newer="otherwise")).origin == "default"


def test_a_record_is_replaced_though_its_spec_lacks_a_new_field(folders):
    """The key is what a record serves, whether or not it states a field that has its default."""
    put(folders["tuned"], 4, spec=SPEC)
    lacking = {name: value for name, value in SPEC.to_dict().items() if name != "compressed"}
    records.merge(folders["tuned"], [dataclasses.replace(make(), spec=lacking)])
    (record,) = records.read_all(folders["tuned"], OP.name)
    assert record.spec == lacking


def test_what_was_slower_than_another_backends_default_does_not_serve(folders, monkeypatch):
    """Of two backends the faster one's records may be gone: the slower one's never served, and must not now."""
    monkeypatch.setattr(type(OP), "backends", ("triton", "tilelang"))
    monkeypatch.setattr(rooms, "unusable", lambda *of: None)
    monkeypatch.setattr(rooms, "toolchain_difference", lambda record: "")
    put(folders["tuned"], 2, time_us=4000.0, default_time_us=2000.0, backend="tilelang")
    result = found(folders)
    assert (result.origin, result.config.backend) == ("default", "triton")
    assert "slower than the default" in result.notes[0]
    monkeypatch.setattr(rooms, "missing_tool", lambda backend: "no compiler" if backend == "triton" else None)
    assert found(folders).config.backend == "tilelang"
