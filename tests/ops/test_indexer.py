"""The prefill indexer: its kernels against the reference, what it refuses, what it compiles to."""

from __future__ import annotations

import math
import tempfile
import weakref
from pathlib import Path

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import detect, resolve
from dsa_codegen.kernels import build, render
from dsa_codegen.kernels.backends import triton
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.indexer import OP, IndexerSizes, IndexerSpec
from dsa_codegen.ops.logits import chunk_rows, row_bytes
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Accuracy, Case, Config, Inputs
from dsa_codegen.runtime import torch_ops
from dsa_codegen.tune.model import plan

from support import FURTHER, H200, assert_compiles, assert_matches_reference, completed

SPECS = [
    IndexerSpec(8, 64),
    IndexerSpec(64, 128, clean=True),
    IndexerSpec(16, 32, score="relu_bias", clean=True),
    IndexerSpec(32, 128, logits="bf16"),
    IndexerSpec(8, 64, compressed=True),
    IndexerSpec(16, 32, score="relu_bias", logits="bf16", clean=True, compressed=True),
    IndexerSpec(6, 80, clean=True),
]
SMALL = Config.of("triton", block_q=2, block_n=64, num_warps=4, num_stages=2, splits=2)
TILELANG = Config.of("tilelang", block_q=2, block_n=64, num_stages=3, splits=1, pipeline="plain", threads=128, blocks_per_sm=4)
PAIRED = TILELANG.replace(pipeline="paired", num_stages=4, blocks_per_sm=2)
GLUON = Config.of("gluon", accumulators=1, block_n=64, num_stages=4, blocks_per_sm=3, edges=False, unrolled=False)
WIDE = GLUON.replace(block_n=128, num_stages=2)
IN_TURN = GLUON.replace(accumulators=2, blocks_per_sm=2)
EDGES = WIDE.replace(edges=True)
HALVES = Config.of("cuda", relu="halves", block_n=128, num_stages=6, groups=3, blocks_per_sm=1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, SMALL, case)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_compiles_for_hopper(spec):
    assert_compiles(OP, spec, SMALL)


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (SPECS[0], TILELANG),
        pytest.param(SPECS[1], PAIRED, marks=FURTHER),
        pytest.param(SPECS[2], TILELANG.replace(block_q=4, threads=256), marks=FURTHER),
        pytest.param(SPECS[3], TILELANG.replace(block_n=128, threads=256, blocks_per_sm=2), marks=FURTHER),
        pytest.param(SPECS[4], TILELANG, marks=FURTHER),
        pytest.param(SPECS[5], PAIRED.replace(block_q=4), marks=FURTHER),
    ],
    ids=["plain", "paired-clean", "queries-shared-out", "tokens-shared-out-bf16", "compressed", "compressed-clean"],
)
def test_tilelang_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


def test_tilelang_is_for_hopper_only():
    for name in ("l40s", "b200"):
        assert "wgmma" in {violation.name for violation in OP.violations(SPECS[3], TILELANG, resolve(name))}


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (IndexerSpec(64, 128), WIDE),
        (SPECS[1], IN_TURN),
        (SPECS[2], GLUON),
        (IndexerSpec(16, 128, score="relu_bias", logits="bf16"), WIDE),
        (SPECS[3], GLUON.replace(num_stages=5)),
        (IndexerSpec(32, 128), IN_TURN.replace(block_n=128, num_stages=3)),
        (SPECS[0], IN_TURN),
        (IndexerSpec(8, 128, score="relu_bias", logits="bf16", clean=True), IN_TURN),
        (IndexerSpec(64, 128, compressed=True), WIDE),
        (SPECS[5], WIDE),
        (IndexerSpec(8, 128, clean=True, compressed=True), IN_TURN),
        (IndexerSpec(8, 128, clean=True), EDGES),
        (IndexerSpec(16, 128, score="relu_bias", logits="bf16"), EDGES.replace(unrolled=True)),
    ],
    ids=lambda value: value.id if isinstance(value, IndexerSpec) else "",
)
def test_gluon_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


@pytest.mark.parametrize(
    ("name", "heads", "changes", "gpu"),
    [
        ("wgmma", 64, {}, "b200"),
        ("registers", 8, {}, "h200"),
        ("registers", 64, {"accumulators": 2}, "h200"),
        ("smem", 64, {"num_stages": 6}, "h200"),
        ("smem", 64, {"block_n": 128, "num_stages": 3}, "h200"),
    ],
)
def test_gluon_refuses(name, heads, changes, gpu):
    found = OP.violations(IndexerSpec(heads, 128), GLUON.replace(**changes), resolve(gpu))
    assert name in {violation.name for violation in found}


@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_the_default_fills_the_gpu_with_few_queries(heads):
    spec, sizes = IndexerSpec(heads, 128), IndexerSizes(512, 8192)
    config = OP.default_config(spec, sizes, H200)
    (launch,) = plan(OP, spec, config, Case(sizes, "causal"), H200)
    assert config.backend == ("cuda" if heads == 64 else "gluon")
    assert launch.grid[0] >= 0.9 * config["blocks_per_sm"] * H200.sms


def test_few_queries_and_few_heads_stay_with_gluon():
    """A spec of one order stays with what many queries are served by."""

    def backend(heads, queries, context, **options):
        return OP.default_config(IndexerSpec(heads, 128, **options), IndexerSizes(queries, context), H200).backend

    assert [backend(64, queries, 8192) for queries in (1, 64, 65, 4096)] == ["gluon", "gluon", "cuda", "cuda"]
    assert [backend(32, *sizes) for sizes in ((1024, 32768), (4096, 8192), (4096, 32768))] == ["gluon", "gluon", "cuda"]
    assert backend(16, 4096, 32768) == backend(64, 4096, 32768, score="relu_bias") == "gluon"
    assert {backend(heads, 1, 77, batch_invariant=True) for heads in (32, 64)} == {"cuda"}


def test_nothing_is_launched_for_nothing():
    for sizes in (IndexerSizes(0, 40), IndexerSizes(3, 0)):
        assert not plan(OP, SPECS[0], IN_TURN, Case(sizes, "ragged"), H200)


def near_the_end(tokens: int, spec: IndexerSpec, queries: int, draw: Draw) -> tuple[Inputs, Inputs]:
    """Inputs whose windows lie in the last 100 of very many tokens, and the same of these tokens alone."""
    near = OP.inputs(spec, Case(IndexerSizes(queries, 100), "causal"), draw)
    far = {
        "k": torch.empty(tokens, spec.head_dim, dtype=torch.float8_e4m3fn, device=draw.device),
        "k_scale": torch.empty(tokens, device=draw.device),
    }
    for name, value in far.items():  # on the CPU, memory that nothing touches is never there
        value[-100:] = near[name]
    far |= {name: near[name] + (tokens - 100) for name in ("starts", "ends")}
    return {**near, **far}, near


def interpret_near_the_end(tokens: int, spec: IndexerSpec, config: Config) -> Accuracy:
    """A job for the interpreter's worker."""
    inputs, near = near_the_end(tokens, spec, 1, Draw(5))
    rendered = render.render(OP, spec, config)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{rendered.module_name}.py"
        source.write_text(rendered.text)
        outputs = OP.allocate(spec, inputs)
        Variant(OP, spec, config, H200, triton.interpreted(source)).run(inputs, outputs)
    return OP.check(spec, near, outputs, OP.reference(spec, near))


def test_keys_lie_beyond_two_gigabytes(interpreter):
    config = SMALL.replace(block_q=4, splits=1)
    spec = IndexerSpec(8, 128, clean=True, compressed=True)
    accuracy = interpreter.call(interpret_near_the_end, (1 << 24) + 40, spec, config)
    assert accuracy.passed, accuracy.detail


@pytest.mark.gpu
@pytest.mark.parametrize("config", [SMALL, TILELANG, PAIRED, GLUON, EDGES, HALVES], ids=str)
@pytest.mark.parametrize("compressed", [False, True])
def test_keys_and_logits_lie_beyond_two_billion(config, compressed):
    """130 rows of 2^24 columns, of keys that take 2 GiB."""
    spec, gpu = IndexerSpec(64, 128, logits="bf16", compressed=compressed), detect()
    if OP.violations(spec, config, gpu):
        pytest.skip(f"not for {gpu.name}")
    inputs, near = near_the_end((1 << 24) + 40, spec, 130, Draw(5, "cuda"))
    if compressed:
        inputs = {**inputs, "max_window": 1 << 24}
    outputs = OP.allocate(spec, inputs)
    Variant(OP, spec, config, gpu, build.build(render.render(OP, spec, config), gpu).load()).run(inputs, outputs)
    logits = outputs["logits"][:, :100] if compressed else outputs["logits"][:, -100:]
    accuracy = OP.check(spec, near, {"logits": logits}, OP.reference(spec, near))
    assert accuracy.passed, accuracy.detail


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "config", "stride"), [(8, EDGES, (1 << 26) + 64), (64, HALVES, (1 << 30) + 64)], ids=str)
def test_rows_of_a_block_lie_further_apart_than_32_bits_count(heads, config, stride):
    spec, gpu, rows = IndexerSpec(heads, 128), detect(), 33 if heads == 8 else 5
    if OP.violations(spec, config, gpu):
        pytest.skip(f"not for {gpu.name}")
    inputs = OP.inputs(spec, Case(IndexerSizes(rows, 130), "causal"), Draw(5, "cuda"))
    logits = torch.empty(rows * stride, device="cuda").as_strided((rows, 130), (stride, 1))
    kernels = build.build(render.render(OP, spec, config), gpu).load()
    Variant(OP, spec, config, gpu, kernels).run(inputs, {"logits": logits})
    accuracy = OP.check(spec, inputs, {"logits": logits}, OP.reference(spec, inputs))
    assert accuracy.passed, accuracy.detail


def test_columns_that_begin_with_each_window_are_always_masked():
    spec = IndexerSpec(8, 128, compressed=True)
    texts = {render.render(OP, spec, WIDE.replace(edges=edges)).code for edges in (False, True)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("heads", 65), ("head_dim", 100), ("score", "softmax"), ("logits", "fp64"), ("clean", 1)]
)
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        IndexerSpec.from_dict({"heads": 64, "head_dim": 128, field: value})


def arguments(**changes):
    """A valid call's arguments in order, with some of them changed."""
    inputs = OP.inputs(SPECS[0], Case(IndexerSizes(3, 20), "ragged"), Draw(0))
    options = {"score": "weighted_relu", "logits": "fp32", "clean": False, "max_window": None, "scores": "fp8"}
    return list({**inputs, **options, **changes}.values())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(3, 8, 64)),
        ("k", torch.zeros(20, 32).to(torch.float8_e4m3fn)),
        ("k_scale", torch.zeros(19)),
        ("weights", torch.zeros(3, 8, dtype=torch.float64)),
        ("starts", torch.zeros(3, dtype=torch.int64)),
        ("ends", torch.zeros(4, dtype=torch.int32)),
        ("score", "softmax"),
        ("logits", "fp64"),
        ("max_window", -1),
        ("max_window", 1 << 31),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*completed(OP, *arguments(**{argument: value})))


def test_bind_names_what_it_took():
    spec, sizes, inputs = OP.bind(*completed(OP, *arguments()))
    assert (spec, sizes) == (SPECS[0], IndexerSizes(3, 20))
    assert list(inputs) == ["q", "k", "k_scale", "weights", "starts", "ends"]


def test_call_refuses_more_tokens_than_offsets_reach():
    inputs = OP.inputs(SPECS[0], Case(IndexerSizes(3, (1 << 30) + 1), "causal"), Draw(0, "meta"))
    with pytest.raises(InputError, match=r"^k: got 1073741825 tokens"):
        OP.bind(*completed(OP, *arguments(**inputs)))


def test_bind_takes_the_longest_window():
    spec, sizes, inputs = OP.bind(*completed(OP, *arguments(max_window=7)))
    assert (spec, sizes, inputs["max_window"]) == (SPECS[4], IndexerSizes(3, 20), 7)
    assert OP.allocate(spec, inputs)["logits"].shape == (3, 7)


@pytest.mark.parametrize("columns", [0, 1, 60, 200])
@pytest.mark.parametrize("distribution", ["ragged", "extreme"])
def test_compressed_rows_are_the_windows_of_plain_ones(distribution, columns):
    tensors = OP.inputs(SPECS[0], Case(IndexerSizes(49, 130), distribution), Draw(2)).values()
    plain = dsa.indexer_logits(*tensors, clean=True)
    rows = dsa.indexer_logits(*tensors, clean=True, max_window=columns)
    *_, starts, ends = (tensor.tolist() for tensor in tensors)
    assert rows.shape == (49, columns)
    for row, whole, start, end in zip(rows, plain, starts, ends, strict=True):
        window = whole[max(start, 0) : max(end, 0)][:columns]
        assert torch.equal(row[: len(window)], window)
        assert (row[len(window) :] == -math.inf).all()


def test_compressed_rows_without_tokens_are_clean():
    spec = IndexerSpec(8, 64, clean=True, compressed=True)
    inputs = {**OP.inputs(spec, Case(IndexerSizes(3, 0), "ragged"), Draw(0)), "max_window": 5}
    outputs = OP.allocate(spec, inputs)
    outputs["logits"].zero_()
    assert not OP.launches(spec, IN_TURN, inputs, outputs, H200)
    assert (outputs["logits"] == -math.inf).all()


@pytest.mark.parametrize("spec", SPECS[4:], ids=lambda spec: spec.id)
def test_compressed_calls_are_traced(spec):
    tensors = list(OP.inputs(spec, Case(IndexerSizes(5, 40), "ragged"), Draw(3)).values())[:6]
    options = (spec.score, spec.logits, spec.clean)
    operator = torch_ops.function("indexer_logits")
    torch.library.opcheck(operator, (*tensors, *options, 30), test_utils="test_faketensor")
    compiled = torch.compile(lambda columns: operator(*tensors, *options, columns), backend="eager", fullgraph=True)
    for columns in (30, 31, 50):
        assert torch.equal(compiled(columns), operator(*tensors, *options, columns))


def test_a_budget_becomes_rows():
    assert row_bytes(130, "fp32") == 1024
    assert chunk_rows(1 << 30, 4096, 1 << 20, "fp32") == 256
    assert chunk_rows(1 << 30, 4096, 1 << 20, "bf16") == 512
    assert chunk_rows(7 * 1024, 7, 130, "fp32") == 7
    assert chunk_rows(7 * 1024, 8, 130, "fp32") == 4
    assert chunk_rows(3 * 1024, 8, 130, "fp32") == 0
    assert chunk_rows(0, 8, 0, "fp32") == 0


@pytest.mark.parametrize("options", [{}, {"logits": "bf16"}, {"score": "relu_bias"}, {"max_window": 30}], ids=str)
@pytest.mark.parametrize(("rows", "sizes"), [(21, [21]), (20, [8, 8, 5]), (8, [4, 4, 4, 4, 4, 1])])
def test_chunks_are_the_rows_of_the_whole(options, rows, sizes):
    tensors = OP.inputs(SPECS[0], Case(IndexerSizes(21, 130), "ragged"), Draw(4)).values()
    whole = dsa.indexer_logits(*tensors, clean=True, **options)
    budget = rows * whole.stride(0) * whole.element_size()
    chunks = list(dsa.indexer_logits_chunks(*tensors, max_bytes=budget, clean=True, **options))
    assert [len(logits) for _, logits in chunks] == sizes
    assert [first for first, _ in chunks] == [sum(sizes[:number]) for number in range(len(sizes))]
    torch.testing.assert_close(torch.cat([logits for _, logits in chunks]), whole)


def test_a_loop_over_chunks_keeps_the_budget(monkeypatch):
    alive, most, compute = weakref.WeakSet(), [], dsa.functions.indexer.indexer_logits

    def watched(*args, **options):
        logits = compute(*args, **options)
        alive.add(logits)
        most.append(sum(len(chunk) * chunk.stride(0) * chunk.element_size() for chunk in alive))
        return logits

    monkeypatch.setattr(dsa.functions.indexer, "indexer_logits", watched)
    tensors = OP.inputs(SPECS[0], Case(IndexerSizes(40, 130), "causal"), Draw(4)).values()
    budget = 17 * 1024
    for _first, _logits in dsa.indexer_logits_chunks(*tensors, max_bytes=budget):
        pass
    assert len(most) == 5
    assert 8 * 1024 < max(most) <= budget


def test_a_million_tokens_are_scored_in_chunks():
    inputs = OP.inputs(SPECS[0], Case(IndexerSizes(9, 1 << 20), "causal"), Draw(4))
    chunks = dsa.indexer_logits_chunks(*inputs.values(), max_bytes=8 << 22, clean=True)
    seen = [int((logits > -math.inf).sum()) for _, logits in chunks]
    assert seen == [sum((1 << 20) - 8 + row for row in rows) for rows in (range(4), range(4, 8), range(8, 9))]


@pytest.mark.parametrize("budget", [-1, 0, 8 * 1024 - 1, 1e9])
def test_chunks_refuse_a_budget_of_too_few_rows(budget):
    tensors = OP.inputs(SPECS[0], Case(IndexerSizes(21, 130), "ragged"), Draw(4)).values()
    with pytest.raises(InputError, match=r"^max_bytes"):
        dsa.indexer_logits_chunks(*tensors, max_bytes=budget)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_loop_over_chunks_is_traced(device):
    draw = Draw(9, device)
    q, k = draw.normal(25, 16, 64, dtype=torch.float8_e4m3fn), draw.normal(70, 64, dtype=torch.float8_e4m3fn)
    ends = torch.full((25,), 70, dtype=torch.int32, device=device)

    def highest(*tensors):
        return torch.cat([logits.amax(1) for _, logits in dsa.indexer_logits_chunks(*tensors, max_bytes=1 << 13, clean=True)])

    call = q, k, draw.uniform(70), draw.normal(25, 16), torch.zeros_like(ends), ends
    traced = torch.compile(highest, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(*call), highest(*call))
    assert len(list(dsa.indexer_logits_chunks(*call, max_bytes=1 << 13))) > 1


def test_chunks_refuse_at_the_call():
    with pytest.raises(InputError, match=r"^k_scale"):
        dsa.indexer_logits_chunks(*arguments(k_scale=torch.zeros(19))[:6])


def test_no_queries_give_no_chunks():
    tensors = OP.inputs(SPECS[0], Case(IndexerSizes(0, 130), "ragged"), Draw(4)).values()
    assert not list(dsa.indexer_logits_chunks(*tensors))


def test_a_chunk_differs_from_the_whole_by_rounding_at_most():
    draw = Draw(9)
    q, k = draw.normal(257, 16, 64, dtype=torch.float8_e4m3fn), draw.normal(700, 64, dtype=torch.float8_e4m3fn)
    ends = torch.full((257,), 700, dtype=torch.int32)
    call = q, k, draw.uniform(700), draw.normal(257, 16), torch.zeros_like(ends), ends
    whole = dsa.indexer_logits(*call)
    for first, chunk in dsa.indexer_logits_chunks(*call, max_bytes=24 * 768 * 4):
        rows = whole[first : first + len(chunk)]
        torch.testing.assert_close(chunk, rows, rtol=0, atol=1e-5 * float(whole.abs().max()))
