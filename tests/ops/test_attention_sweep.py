"""Blocks that go through the cache together, their lists sorted: order, counters, and what is attended to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsa_codegen.gpu import detect
from dsa_codegen.kernels import build, render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import OP, AttentionSizes, AttentionSpec, staying
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import verify

import emulator
from support import FURTHER, H200, assert_compiles

PAIR = Config.of(
    "cuda", num_stages=2, turns=False, interleave=False, l2_prefetch=256, sweep=True, value_tokens=16, consumer_registers=216
)
RING = Config.of(
    "cuda", num_stages=7, turns=False, interleave=False, l2_prefetch=256, sweep=True, value_tokens=64, consumer_registers=168
)
BANDS = 32  # of the cache
EMULATED = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")


def sorted_by_bands(entries: Tensor, tokens: int, back: bool) -> Tensor:
    """A list as ``sort`` leaves it: within a band by lanes, of which 32 have every 32nd entry, from the band's own on."""
    factor = min((BANDS << 32) // tokens, (1 << 32) - 1)
    bands = torch.where(entries < 0, tokens - 1, entries.long().clamp(max=tokens - 1)) * factor >> 32
    bands = BANDS - 1 - bands if back else bands
    lanes = (torch.arange(len(entries)) - bands) % 32
    return entries[(bands * 32 + lanes).sort(stable=True).indices]


@EMULATED
@pytest.mark.parametrize(
    ("spec", "config", "sms"),
    [
        (AttentionSpec(5, 512, topk=2100, lengths=True, sink=True), RING.replace(num_stages=9), 2),
        (AttentionSpec(64, 512, topk=300, sink=True), PAIR, 2),
        (AttentionSpec(5, 512, topk=700), RING.replace(num_stages=9), 2),
    ],
    ids=["few heads", "64 heads", "few heads, fewer entries"],
)
def test_sorted_lists_match_the_reference(spec, config, sms, tmp_path, monkeypatch):
    """Blocks of the emulator run one after another: the first waits for steps of others in vain, and goes on."""
    monkeypatch.setattr(staying, "_SORTED_FROM", 1)
    kernels = emulator.cuda_kernels(render.render(OP, spec, config), tmp_path, "shuffled")
    variant = Variant(OP, spec, config, replace(H200, sms=sms), kernels)
    inputs = OP.inputs(spec, Case(AttentionSizes(9, 700), "ragged"), Draw(2))
    outputs = OP.allocate(spec, inputs)
    sort, attend, *_ = variant.launch(inputs, outputs)
    assert (sort.kernel, attend.kernel) == ("sort", "attention")
    assert OP.check(spec, inputs, outputs, OP.reference(spec, inputs)).passed
    round_, entries = sort.args[-3], sort.args[1 if inputs["lengths"] is None else 2]
    for query, (given, made) in enumerate(zip(inputs["indices"][:, 0], entries, strict=True)):
        count = spec.topk if inputs["lengths"] is None else max(min(int(inputs["lengths"][query]), spec.topk), 0)
        assert torch.equal(made[:count], sorted_by_bands(given[:count], 700, bool(query // round_ % 2)))
    if config["num_stages"] == PAIR["num_stages"]:
        counters, steps = sort.args[2:4]
        assert steps == len(counters) == len(entries) // sms * 3
        assert counters.eq(sms).all()


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionSpec(128, 576, 2048), PAIR),
        pytest.param(AttentionSpec(16, 576, 2048), RING, marks=FURTHER),
        pytest.param(AttentionSpec(16, 576, 1024), RING, marks=FURTHER),
        pytest.param(AttentionSpec(16, 576, 512), RING, marks=FURTHER),
    ],
    ids=["pair", "few", "few, 1024 entries", "few, 512 entries"],
)
def test_it_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)
    log = (build.find(render.render(OP, spec, config), H200).folder / "kernels.log").read_text()
    assert "Performance Loss" not in log, "the assembler serialised products"


@pytest.mark.parametrize(("heads", "steps", "round_"), [(128, 62 * 16, 66), (64, 31 * 16, 132), (16, None, 264)])
def test_steps_are_those_of_full_rounds(heads, steps, round_):
    """4096 queries of 128 heads: 62 rounds of 132 blocks, 16 pairs of tiles each; few heads go through without counters."""
    spec, config = AttentionSpec(heads, 576, 2048), PAIR if heads >= 64 else RING
    inputs = {
        "q": torch.empty(4096, heads, 576, device="meta"),
        "kv": torch.empty(9, 1, 576, device="meta"),
        "indices": torch.empty(4096, 1, 2048, dtype=torch.int32, device="meta"),
        "lengths": None,
        "sink": None,
        "sm_scale": 1.0,
    }
    outputs = {"out": torch.empty(0, device="meta"), "lse": torch.empty(0, device="meta")}
    sort, attend = OP.launches(spec, config, inputs, outputs, H200)[:2]
    assert sort.args[-5:-2] == (9, 2048, round_)
    assert steps is None or sort.args[3] == attend.args[-2] == steps


@pytest.mark.parametrize(
    ("spec", "swept"),
    [
        (AttentionSpec(128, 576, 2048), [(4096, 16385), (512, 40961)]),
        (AttentionSpec(64, 512, 2048), [(4096, 16385), (512, 40961)]),
        (AttentionSpec(16, 576, 2048), [(4096, 16385), (512, 40961)]),
        (AttentionSpec(128, 512, 2047), []),
        (AttentionSpec(64, 512, 2047), [(4096, 40961)]),
        (AttentionSpec(64, 512, 1024), [(4096, 40961)]),
        (AttentionSpec(64, 512, 1023), []),
        (AttentionSpec(32, 512, 1024), [(4096, 16385), (512, 40961)]),
        (AttentionSpec(8, 512, 512), [(4096, 40961)]),
        (AttentionSpec(8, 512, 511), []),
        (AttentionSpec(16, 576, 2048, batch_invariant=True), []),
        (AttentionSpec(8, 576, 2048, share=4), []),
        (AttentionSpec(32, 160, 2048, d_v=128), []),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionSpec) else "",
)
def test_lists_are_sorted_by_default_where_that_was_faster(spec, swept):
    sizes = [(queries, tokens) for queries in (4096, 512) for tokens in (16384, 16385, 40961)]
    found = [each for each in sizes if OP.default_config(spec, AttentionSizes(*each), H200)["sweep"]]
    least = {queries: next((tokens for of, tokens in found if of == queries), None) for queries in (4096, 512)}
    assert least == {4096: None, 512: None, **dict(swept)}


def test_few_queries_lists_are_as_they_came():
    spec = AttentionSpec(64, 576, 2048)
    inputs = OP.inputs(spec, Case(AttentionSizes(3, 9), "random"), Draw(0))
    attend, combine = OP.launches(spec, PAIR, inputs, OP.allocate(spec, inputs), H200)
    assert (attend.kernel, combine.kernel) == ("attention", "combine")
    assert attend.args[2] is inputs["indices"]
    assert attend.args[-2] == 0


def test_what_does_not_sweep():
    """Joined lists have an order of their own, and batch-invariant bits may not depend on a query's round."""
    joined = AttentionSpec(8, 576, 2048, share=4)
    assert "sweep" in [found.name for found in OP.violations(joined, RING.replace(num_stages=6, consumer_registers=216), H200)]
    longest = AttentionSpec(64, 576, 4096)
    assert not OP.violations(longest, PAIR, H200)
    assert [found.name for found in OP.violations(replace(longest, topk=4097), PAIR, H200)] == ["entries of a sorted list"]
    assert OP.order(AttentionSpec(128, 576, 2048), PAIR) is None
    assert OP.order(AttentionSpec(16, 576, 2048), RING) is None


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("optional", [False, True], ids=["plain", "options"])
def test_sorted_lists_match_the_reference_on_a_gpu(heads, optional):
    gpu = detect()
    assert gpu is not None
    spec = AttentionSpec(heads, 576, 640, lengths=optional, sink=optional, max_logits=optional)
    config = PAIR if heads >= 64 else RING
    if OP.violations(spec, config, gpu):
        pytest.skip(f"{gpu.name} is not a Hopper GPU")
    variant = Variant(OP, spec, config, gpu, build.build(render.render(OP, spec, config), gpu).load())
    for sizes, distribution in (((1, 1), "ragged"), ((601, 2500), "ragged"), ((170, 3000), "steep"), ((140, 9000), "random")):
        accuracy = verify(variant, Case(AttentionSizes(*sizes), distribution), "cuda", repeats=3)
        assert accuracy.passed, (sizes, accuracy.detail)


@pytest.mark.gpu
def test_calls_whose_blocks_do_not_fit_together_end_on_a_gpu():
    """Two at once: each has as many blocks as there are SMs, and blocks wait for steps of those that are not there yet."""
    gpu = detect()
    assert gpu is not None
    spec = AttentionSpec(64, 576, 640)
    if OP.violations(spec, PAIR, gpu):
        pytest.skip(f"{gpu.name} is not a Hopper GPU")
    variant = Variant(OP, spec, PAIR, gpu, build.build(render.render(OP, spec, PAIR), gpu).load())
    calls = [OP.inputs(spec, Case(AttentionSizes(1000, 3000), "random"), Draw(seed, "cuda")) for seed in (1, 2)]
    outputs = [OP.allocate(spec, inputs) for inputs in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(3):
        for stream, inputs, each in zip(streams, calls, outputs, strict=True):
            with torch.cuda.stream(stream):
                variant.launch(inputs, each)
    torch.cuda.synchronize()
    for inputs, each in zip(calls, outputs, strict=True):
        assert OP.check(spec, inputs, each, OP.reference(spec, inputs)).passed
