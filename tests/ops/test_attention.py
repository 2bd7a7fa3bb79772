"""Sparse MLA prefill: its kernels against the reference, what it refuses, what it compiles to."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsa_codegen import ops
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels import build, render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import OP, AttentionSizes, AttentionSpec
from dsa_codegen.ops.attention.staying import cut_last
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import verify
from dsa_codegen.records import lookup

import emulator
from support import FURTHER, H200, assert_compiles, assert_matches_reference, completed

SPECS = [
    AttentionSpec(5, 576, topk=70),
    AttentionSpec(20, 512, topk=33, lengths=True),
    AttentionSpec(16, 576, topk=96, sink=True),
    AttentionSpec(1, 512, topk=1, lengths=True, sink=True),
    AttentionSpec(5, 576, topk=70, lengths=True, sink=True, max_logits=True),
    AttentionSpec(32, 160, topk=70, d_v=128),
    AttentionSpec(9, 448, topk=50, lengths=True, d_v=336),
]
TRITON = Config.of("triton", block_h=16, block_n=32, num_stages=3, num_warps=4)
MULTISTAGE = Config.of("tilelang", pipeline="multistage", block_h=16, block_n=32, num_stages=2, threads=128)
SPECIALISED = Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=384)
CLUSTER = Config.of("cuda", num_stages=3, turns=True, interleave=False, l2_prefetch=256, sweep=False, consumer_registers=224)
PAIR = Config.of("cuda", num_stages=2, turns=False, interleave=False, l2_prefetch=256, sweep=False, consumer_registers=216)
RING = Config.of("cuda", num_stages=7, turns=False, interleave=False, l2_prefetch=256, sweep=False, consumer_registers=168)
SPILLS_BETWEEN_QUERIES = 72  # bytes; none is touched in the loop over tiles
BY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)


@BY_SPEC
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, TRITON, case)


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionSpec(128, 576, 2048), SPECIALISED),
        pytest.param(AttentionSpec(64, 512, 512, sink=True), SPECIALISED, marks=FURTHER),
        pytest.param(AttentionSpec(20, 576, 130, lengths=True, sink=True), SPECIALISED, marks=FURTHER),
        (AttentionSpec(5, 576, 37, lengths=True, sink=True), MULTISTAGE),
        pytest.param(AttentionSpec(32, 512, 512), MULTISTAGE.replace(block_h=32, block_n=64, threads=256), marks=FURTHER),
        pytest.param(AttentionSpec(128, 576, 2048), MULTISTAGE.replace(block_h=64, num_stages=3, threads=256), marks=FURTHER),
        (AttentionSpec(16, 576, 2048, lengths=True), TRITON),
        (AttentionSpec(16, 576, 2048, max_logits=True), TRITON),
        pytest.param(AttentionSpec(128, 576, 2048, max_logits=True), SPECIALISED, marks=FURTHER),
        (AttentionSpec(64, 512, 512, lengths=True, sink=True, max_logits=True), SPECIALISED),
        pytest.param(AttentionSpec(5, 576, 37, max_logits=True), MULTISTAGE, marks=FURTHER),
        (AttentionSpec(128, 576, 2048, sink=True), TRITON.replace(block_h=64, num_stages=5, num_warps=8)),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionSpec) else value.to_dict().get("pipeline", value.backend),
)
def test_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionSpec(128, 576, 2048), CLUSTER),
        pytest.param(AttentionSpec(128, 576, 130, lengths=True, sink=True), CLUSTER, marks=FURTHER),
        (AttentionSpec(128, 512, 1024, sink=True), CLUSTER.replace(num_stages=4)),
        pytest.param(AttentionSpec(128, 576, 2048, lengths=True), CLUSTER.replace(turns=False), marks=FURTHER),
    ],
    ids=["plain", "lengths, sink", "without a tail", "without turns"],
)
def test_clusters_compile_for_hopper(spec, config):
    assert_compiles(OP, spec, config, spills=SPILLS_BETWEEN_QUERIES)
    built = build.find(render.render(OP, spec, config), H200)
    assert "C75" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionSpec(64, 576, 2048), PAIR),
        pytest.param(AttentionSpec(128, 576, 130, lengths=True, sink=True, max_logits=True), PAIR, marks=FURTHER),
        pytest.param(AttentionSpec(64, 512, 512, sink=True), PAIR.replace(interleave=True), marks=FURTHER),
        pytest.param(AttentionSpec(128, 576, 2048), PAIR.replace(l2_prefetch=128), marks=FURTHER),
    ],
    ids=["plain", "all options", "without a tail", "lines"],
)
def test_pairs_compile_for_hopper(spec, config):
    assert_compiles(OP, spec, config)
    built = build.find(render.render(OP, spec, config), H200)
    assert "Performance Loss" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "config", "order"),
    [
        (AttentionSpec(64, 512, topk=150, lengths=True, sink=True, max_logits=True), PAIR.replace(interleave=True), "shuffled"),
        pytest.param(AttentionSpec(128, 576, topk=300), PAIR, "descending", marks=FURTHER),
    ],
    ids=["64 heads", "128 heads"],
)
def test_pairs_match_the_reference(spec, config, order, tmp_path):
    """On one SM: queries of one pair of tiles and of several follow each other."""
    kernels = emulator.cuda_kernels(render.render(OP, spec, config), tmp_path, order)
    variant = Variant(OP, spec, config, replace(H200, sms=1), kernels)
    for sizes, distribution in (((1, 1), "ragged"), ((3, 333), "ragged"), ((2, 400), "steep")):
        accuracy = verify(variant, Case(AttentionSizes(*sizes), distribution), "cpu")
        assert accuracy.passed, (sizes, accuracy.detail)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
def test_cut_lists_of_pairs_match_the_reference(tmp_path):
    """On three SMs: of four queries the last is cut in three, and parts of short lists are empty."""
    spec = AttentionSpec(64, 512, topk=700, lengths=True, sink=True, max_logits=True)
    kernels = emulator.cuda_kernels(render.render(OP, spec, PAIR), tmp_path, "shuffled")
    variant = Variant(OP, spec, PAIR, replace(H200, sms=3), kernels)
    inputs, outputs = OP.inputs(spec, Case(AttentionSizes(4, 900), "ragged"), Draw(1)), {}
    for length in (700, 200):
        inputs["lengths"][3] = length
        outputs = OP.allocate(spec, inputs)
        assert [launch.kernel for launch in variant.launch(inputs, outputs)] == ["attention", "combine"]
        assert OP.check(spec, inputs, outputs, OP.reference(spec, inputs)).passed, length


IN_A_BLOCK = [
    (AttentionSpec(20, 512, topk=33, lengths=True), RING.replace(num_stages=9, consumer_registers=216), "descending"),
    (AttentionSpec(16, 576, topk=96, sink=True), RING, "shuffled"),
    (AttentionSpec(3, 512, topk=150, lengths=True, sink=True, max_logits=True), RING.replace(num_stages=5), "shuffled"),
    # Tiles that come as a whole: a last piece that is not full, columns of the output that do not divide a group's threads.
    (AttentionSpec(32, 160, topk=70, lengths=True, d_v=128), RING.replace(num_stages=5), "shuffled"),
    (AttentionSpec(9, 208, topk=150, sink=True, max_logits=True, d_v=192), RING.replace(num_stages=3), "descending"),
]


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "config", "order"),
    IN_A_BLOCK,
    ids=lambda value: str(value) if isinstance(value, str) else value.id if isinstance(value, AttentionSpec) else "",
)
def test_few_heads_match_the_reference(spec, config, order, tmp_path):
    """On one SM: its two groups take several queries, and the ring goes round."""
    kernels = emulator.cuda_kernels(render.render(OP, spec, config), tmp_path, order)
    variant = Variant(OP, spec, config, replace(H200, sms=1), kernels)
    for case in OP.cases(spec):
        accuracy = verify(variant, case, "cpu")
        assert accuracy.passed, (case.id, accuracy.detail)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
def test_neighbours_that_share_match_the_reference(tmp_path):
    """Whatever their lists: alike, in any order, with what is no token in front, with a token named twice."""
    spec, config = (
        AttentionSpec(3, 576, 40, lengths=True, sink=True, share=4),
        RING.replace(num_stages=6, consumer_registers=216),
    )
    kernels = emulator.cuda_kernels(render.render(OP, spec, config), tmp_path, "shuffled")
    variant = Variant(OP, spec, config, replace(H200, sms=1), kernels)
    for case in OP.cases(spec):
        accuracy = verify(variant, case, "cpu")
        assert accuracy.passed, (case.id, accuracy.detail)
    inputs = dict(OP.inputs(spec, Case(AttentionSizes(9, 70), "random"), Draw(3)))
    inputs["lengths"][:] = 40
    lists = inputs["indices"][:, 0]
    lists[1] = lists[0].flip(0)
    lists[3, :20] = -1
    lists[5, 1::2] = lists[5, ::2]
    lists[6, 30:] = 70
    outputs = OP.allocate(spec, inputs)
    launches = variant.launch(inputs, outputs)
    assert OP.check(spec, inputs, outputs, OP.reference(spec, inputs)).passed
    assert [launch.kernel for launch in launches] == ["unite", "attention"]
    unions, counts = launches[0].args[2:4]
    entries = unions[0, : counts[0]].tolist()
    wanted = {token: sum(1 << m for m in range(4) if token in lists[m]) for token in lists[:4].flatten().tolist() if token >= 0}
    assert len(entries) == len(wanted) < 140
    assert {entry & (1 << 28) - 1: entry >> 28 & 15 for entry in entries} == wanted
    assert counts.tolist()[1:] == [150, 40]  # nothing is joined with what is named twice; a bundle of one query


def test_as_many_queries_share_as_fit_the_columns():
    def columns(heads, share):
        spec = AttentionSpec(heads, 576, 64, share=share)
        source = render.render(OP, spec, OP.default_config(spec, AttentionSizes(64, 64), H200)).code
        return [int(found) for found in re.findall(r"constexpr int (?:HEAD_COLUMNS|SHARE) = (\d+)", source)]

    assert [columns(8, share) for share in (1, 2, 4)] == [[8, 1], [8, 2], [8, 4]]
    assert [columns(16, share) for share in (1, 2, 4)] == [[16, 1], [16, 2], [16, 2]]
    assert columns(32, 4) == [32, 1]
    # A call with more heads is one without the option, whose records serve it.
    for heads, expected in ((8, 4), (9, 2), (16, 2), (17, 1), (128, 1)):
        q, kv, lists = torch.zeros(2, heads, 576), torch.zeros(3, 1, 576), torch.zeros(2, 1, 5, dtype=torch.int32)
        assert OP.bind(*completed(OP, q, kv, lists, 1.0, None, None, 4))[0].share == expected


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionSpec(8, 576, 2048, share=4), RING.replace(num_stages=6, consumer_registers=216)),
        (AttentionSpec(16, 576, 2048, lengths=True, sink=True, max_logits=True), RING),
        (AttentionSpec(32, 576, 2048), RING.replace(num_stages=6, consumer_registers=216)),
        (AttentionSpec(32, 512, 512, sink=True), RING.replace(num_stages=9, consumer_registers=216)),
        (AttentionSpec(32, 160, 2048, d_v=128), RING.replace(num_stages=8)),
        pytest.param(AttentionSpec(32, 256, 512, lengths=True, d_v=256), RING.replace(num_stages=5), marks=FURTHER),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionSpec) else "",
)
def test_few_heads_compile_for_hopper(spec, config):
    assert_compiles(OP, spec, config)
    built = build.find(render.render(OP, spec, config), H200)
    assert "C75" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"


@pytest.mark.parametrize(("lengths", "sink"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("queries", "blocks"), [(1, 2), (65, 130), (66, 132), (500, 132)])
def test_a_persistent_grid_of_clusters_gets_its_arguments(queries, blocks, lengths, sink):
    spec = AttentionSpec(128, 512, 1, lengths, sink)
    inputs = OP.inputs(spec, Case(AttentionSizes(queries, 3), "random"), Draw(0))
    outputs = OP.allocate(spec, inputs)
    (launch,) = OP.launches(spec, CLUSTER, inputs, outputs, H200)
    optional = [inputs[name] for name in ("lengths", "sink") if inputs[name] is not None]
    tensors = [inputs["q"], inputs["kv"], inputs["indices"], *optional, outputs["out"], outputs["lse"]]
    assert launch.grid == (blocks, 1, 1)
    assert [id(value) for value in launch.args[: len(tensors)]] == [id(tensor) for tensor in tensors]
    between = 128 * 512 if queries > 1 else 0
    assert launch.args[len(tensors) :] == (queries, 3, 1, between, 512, 512, between and 1, inputs["sm_scale"])
    namespace: dict = {}
    exec(render.render(OP, spec, CLUSTER).code, namespace)
    (facts,) = namespace["KERNELS"].values()
    assert facts["args"] == ("ptr",) * len(tensors) + ("i32",) * 3 + ("u32",) * 4 + ("f32",)
    assert facts["cluster"] == 2
    # Every parameter of the text, in that order.
    text = re.search(r"\nattention\((.*?)\)", namespace["SOURCE"], re.DOTALL)[1]
    names = [parameter.split()[-1] for parameter in text.split(",")]
    given = [name for name in ("lengths", "sink") if spec.to_dict()[name]]
    strides = [f"{of}_stride" for of in ("q", "head", "kv", "list")]
    assert names == ["q", "kv", "indices", *given, "out", "lse", "queries", "tokens", "topk", *strides, "sm_scale"]


@pytest.mark.parametrize(("heads", "queries", "blocks"), [(64, 1, 1), (64, 500, 132), (128, 65, 130), (128, 67, 132)])
def test_a_persistent_grid_of_pairs_gets_its_arguments(heads, queries, blocks):
    spec = AttentionSpec(heads, 576, 1, lengths=True, max_logits=True)
    inputs = OP.inputs(spec, Case(AttentionSizes(queries, 3), "random"), Draw(0))
    outputs = OP.allocate(spec, inputs)
    (launch,) = OP.launches(spec, PAIR, inputs, outputs, H200)
    tensors = [inputs[name] for name in ("q", "kv", "indices", "lengths")] + [outputs[name] for name in OP.buffers]
    assert launch.grid == (blocks, 1, 1)
    assert [id(value) for value in launch.args[: len(tensors)]] == [id(tensor) for tensor in tensors]
    namespace: dict = {}
    exec(render.render(OP, spec, PAIR).code, namespace)
    (facts,) = namespace["KERNELS"].values()
    assert facts["args"] == ("ptr",) * len(tensors) + ("i32",) * 3 + ("u32",) * 4 + ("f32",)
    assert (facts["cluster"], len(launch.args)) == (1, len(facts["args"]))


def test_only_full_rounds_of_pairs_are_whole():
    """4096 queries of 64 heads and one round of some; lists too short to be cut, and blocks too few to share one."""
    cuts = [cut_last(*each) for each in ((4096, 16, 132), (140, 16, 132), (3, 16, 132), (66, 16, 132))]
    assert cuts == [(4092, 16), (132, 16), (0, 16), (0, 2)]
    assert [cut_last(*each) for each in ((4096, 4, 132), (67, 16, 132), (264, 16, 132))] == [(4096, 1), (67, 1), (264, 1)]


@pytest.mark.parametrize("queries", [3, 500])
def test_the_last_lists_of_pairs_are_cut(queries):
    """All blocks get a part, and a second kernel adds up those of each head; not where bits must not depend on it."""
    spec = AttentionSpec(64, 576, 1024, sink=True)
    inputs = OP.inputs(spec, Case(AttentionSizes(queries, 3), "random"), Draw(0))
    outputs = OP.allocate(spec, inputs)
    first, second = launches = OP.launches(spec, PAIR, inputs, outputs, replace(H200, sms=99))
    whole, cut = cut_last(queries, 8, 99)
    assert (first.grid, second.grid) == ((min(whole + (queries - whole) * cut, 99), 1, 1), ((queries - whole) * 64, 1, 1))
    namespace: dict = {}
    exec(render.render(OP, spec, PAIR).code, namespace)
    for launch in launches:
        facts = namespace["KERNELS"][launch.kernel]
        kinds = tuple("ptr" if isinstance(arg, Tensor) else "f32" if isinstance(arg, float) else "int" for arg in launch.args)
        assert kinds == tuple({"i32": "int", "u32": "int"}.get(kind, kind) for kind in facts["args"])
    assert second.touched == 2048 * 64 * (queries - whole) * cut
    invariant = replace(spec, batch_invariant=True)
    assert [launch.kernel for launch in OP.launches(invariant, PAIR, inputs, outputs, H200)] == ["attention"]


def test_clusters_leave_calls_without_tokens_to_torch():
    spec = AttentionSpec(128, 512, 1)
    for queries, tokens in ((3, 0), (0, 40)):
        inputs = OP.inputs(spec, Case(AttentionSizes(queries, tokens), "ragged"), Draw(0))
        outputs = OP.allocate(spec, inputs)
        assert OP.launches(spec, CLUSTER, inputs, outputs, H200) == ()
        assert not outputs["out"].count_nonzero()
        assert outputs["lse"].eq(-math.inf).all()


@pytest.mark.parametrize(
    ("heads", "d_qk", "topk", "gpu", "expected"),
    [
        (128, 576, 2048, "h100", PAIR.replace(sweep=True)),
        (128, 512, 1024, "h200", PAIR),
        (64, 576, 2048, "h200", PAIR.replace(sweep=True)),
        (64, 512, 512, "h100", PAIR),
        (128, 576, 500, "h200", SPECIALISED),
        (16, 576, 2048, "h200", RING.replace(sweep=True)),
        (8, 576, 2048, "h100", RING.replace(num_stages=8, sweep=True)),
        (32, 576, 2048, "h200", RING.replace(num_stages=6, consumer_registers=216, sweep=True)),
        (16, 512, 512, "h100", RING.replace(num_stages=11)),
        (33, 576, 2048, "h200", SPECIALISED),
        (128, 576, 2048, "b200", None),
    ],
)
def test_default_is_in_cuda_where_it_wins(heads, d_qk, topk, gpu, expected):
    found = OP.default_config(AttentionSpec(heads, d_qk, topk), AttentionSizes(4096, 32768), resolve(gpu))
    assert found == expected or (expected is None and found.backend == "triton")


def test_products_and_copies_are_others_where_latents_are_far():
    """Of lists that are not sorted: short ones, and where bits may depend on nothing else."""
    spec = AttentionSpec(64, 576, 1024)
    assert OP.default_config(spec, AttentionSizes(4096, 65536), H200) == PAIR
    far = AttentionSizes(4096, 65537)
    assert OP.default_config(spec, far, H200) == PAIR.replace(interleave=True, l2_prefetch=128)
    assert OP.default_config(replace(spec, topk=2048, batch_invariant=True), far, H200) == PAIR.replace(l2_prefetch=128)
    assert OP.default_config(replace(spec, d_qk=512), far, H200) == PAIR.replace(interleave=True)
    assert OP.default_config(replace(spec, heads=128), far, H200) == PAIR


def test_clusters_do_not_keep_the_exact_maxima():
    spec = AttentionSpec(128, 576, 2048, max_logits=True)
    assert [violation.name for violation in OP.violations(spec, CLUSTER, H200)] == ["max_logits"]
    assert OP.default_config(spec, AttentionSizes(4096, 8192), H200) == PAIR


def test_without_nvcc_the_default_is_not_the_cluster(monkeypatch, tmp_path):
    monkeypatch.setattr(lookup, "missing_tool", lambda backend: None if backend == "triton" else f"{backend} (no nvcc)")
    found = lookup.lookup(OP, AttentionSpec(128, 576, 2048), AttentionSizes(4096, 32768), H200, {"tuned": tmp_path})
    assert (found.config.backend, found.origin) == ("triton", "default")
    assert "no nvcc" in found.notes[0]


def test_steep_scores_rise_by_hundreds_within_a_row():
    spec = AttentionSpec(2, 576, 64)
    inputs = OP.inputs(spec, Case(AttentionSizes(4, 300), "steep"), Draw(0))
    latent = inputs["kv"][inputs["indices"][:, 0].long(), 0].float()
    scores = torch.einsum("qhd,qkd->qhk", inputs["q"].float(), latent) * inputs["sm_scale"]
    assert (scores[..., 32:].amax(-1) - scores[..., :32].amax(-1)).abs().max() > 30
    assert scores.abs().amax() > 100


@pytest.mark.parametrize("gpu", ["a100", "l40s", "h200", "b200", "rtx5090"])
@pytest.mark.parametrize("heads", [8, 32, 128])
def test_default_breaks_no_constraint(gpu, heads):
    spec = AttentionSpec(heads, 576, 2048)
    config = OP.default_config(spec, AttentionSizes(4096, 32768), resolve(gpu))
    assert not OP.violations(spec, config, resolve(gpu))


def test_tilelangs_default_of_many_heads_is_specialised_on_hopper():
    assert OP.default_config(AttentionSpec(128, 576, 2048), AttentionSizes(4096, 32768), H200, "tilelang") == SPECIALISED


@pytest.mark.parametrize(
    ("config", "gpu", "name"),
    [
        (SPECIALISED.replace(block_n=32), "h200", "block_n"),
        (SPECIALISED, "a100", "capability"),
        (MULTISTAGE.replace(block_h=64), "h200", "accumulator registers"),
        (MULTISTAGE.replace(threads=256), "h200", "columns per warp"),
        (MULTISTAGE.replace(block_n=64, num_stages=6), "h200", "smem"),
        (CLUSTER, "h200", "heads"),
        (CLUSTER, "a100", "capability"),
        (CLUSTER.replace(num_stages=4), "h200", "smem"),
        (CLUSTER.replace(consumer_registers=168), "h200", "accumulator registers"),
        (TRITON.replace(block_h=64), "h200", "accumulator registers"),
        (TRITON.replace(block_h=64, num_warps=8, num_stages=7), "l40s", "smem"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else value.backend,
)
def test_constraints_name_what_does_not_fit(config, gpu, name):
    found = OP.violations(AttentionSpec(64, 576, 2048), config, resolve(gpu))
    assert name in [violation.name for violation in found]
    assert all(violation.excess > 0 for violation in found)


@pytest.mark.parametrize(
    ("config", "heads", "name"),
    [
        (RING.replace(turns=True), 16, "turns"),
        (RING.replace(num_stages=13), 16, "smem"),
        (RING, 17, "accumulator registers"),
        (RING.replace(num_stages=4), 8, "stages of a tile"),
    ],
    ids=lambda value: "" if isinstance(value, Config) else str(value).replace(" ", "_"),
)
def test_constraints_of_few_heads(config, heads, name):
    assert [violation.name for violation in OP.violations(AttentionSpec(heads, 512, 512), config, H200)] == [name]


@pytest.mark.parametrize(("d_qk", "least"), [(576, 4), (512, 5)])
def test_the_ring_of_few_heads_holds_more_than_a_tile(d_qk, least):
    """With a tile's parts alone a group read tiles that had not come, and the GPU lost the context."""
    spec = AttentionSpec(24, d_qk, 1024)
    (choices,) = (parameter.choices for parameter in OP.parameters("cuda") if parameter.name == "num_stages")
    configs = [RING.replace(num_stages=stages, consumer_registers=216) for stages in choices]
    assert min(config["num_stages"] for config in configs if not OP.violations(spec, config, H200)) == least


def test_a_list_of_one_tile_needs_more_shared_memory():
    """116736 bytes: its loop is gone, and with it the place where the pipeline kept the tile."""
    few, l40s = Config.of("triton", block_h=16, block_n=64, num_stages=3, num_warps=4), resolve("l40s")
    assert not OP.violations(AttentionSpec(16, 576, 65), few, l40s)
    assert [violation.name for violation in OP.violations(AttentionSpec(16, 576, 64), few, l40s)] == ["smem"]
    assert OP.default_config(AttentionSpec(16, 576, 64), AttentionSizes(4096, 32768), l40s)["block_n"] == 32


def test_padding_to_more_than_twice_the_heads_is_refused():
    found = OP.violations(AttentionSpec(8, 576, 2048), TRITON.replace(block_h=32, num_warps=8), H200)
    assert [violation.name for violation in found] == ["padded heads"]


def test_is_registered_by_its_stem():
    assert ops.get("attention") is OP


@pytest.mark.parametrize("name", [name for name in presets.names() if OP.specs(presets.preset(name))])
def test_every_preset_has_a_spec(name):
    model = presets.preset(name)
    spec = OP.specs(model)[0]
    assert (spec.heads, spec.topk, spec.sink) == (model.heads, model.entries, model.attn_sink)
    assert (spec.d_qk, spec.d_v) == (model.d_nope + model.d_rope, model.d_v)


@pytest.mark.parametrize(
    ("field", "value"), [("share", 3), ("heads", 0), ("heads", 129), ("d_qk", 656), ("topk", 0), ("sink", 1)]
)
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        AttentionSpec.from_dict({"heads": 64, "d_qk": 576, "topk": 64, field: value})


def arguments(**changes):
    """A valid call's arguments in order, with some of them changed."""
    spec = AttentionSpec(4, 576, 8, lengths=True, sink=True)
    return list({**OP.inputs(spec, Case(AttentionSizes(3, 20), "ragged"), Draw(0)), "share": 1, **changes}.values())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(3, 4, 576, dtype=torch.float16)),
        ("kv", torch.zeros(20, 1, 512, dtype=torch.bfloat16)),
        ("indices", torch.zeros(3, 1, 8, dtype=torch.int64)),
        ("indices", torch.zeros(2, 1, 8, dtype=torch.int32)),
        ("sm_scale", 0.0),
        ("sm_scale", math.nan),
        ("lengths", torch.zeros(4, dtype=torch.int32)),
        ("sink", torch.zeros(3)),
        ("share", 3),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*completed(OP, *arguments(**{argument: value})))


def test_bind_reads_the_spec_off_the_arguments():
    spec, sizes, _ = OP.bind(*completed(OP, *arguments()))
    assert (spec, sizes) == (AttentionSpec(4, 576, 8, lengths=True, sink=True), AttentionSizes(3, 20))
    assert not OP.bind(*completed(OP, *arguments(lengths=None, sink=None)))[0].sink
    assert OP.bind(*completed(OP, *arguments(share=4)))[0].share == 4


def test_lists_shorter_than_k_are_padded_and_name_no_token_twice():
    indices = OP.inputs(AttentionSpec(1, 512, 9), Case(AttentionSizes(2, 5), "random"), Draw(0))["indices"][:, 0]
    assert indices.sort().values.tolist() == [[-1, -1, -1, -1, 0, 1, 2, 3, 4]] * 2


def test_max_logits_are_the_highest_scores():
    spec = AttentionSpec(3, 576, 16, max_logits=True)
    inputs = OP.inputs(spec, Case(AttentionSizes(4, 30), "ragged"), Draw(0))
    outputs = OP.reference(spec, inputs)
    for query, listed in enumerate(inputs["indices"][:, 0]):
        kept = inputs["kv"][listed[(listed >= 0) & (listed < 30)].long(), 0].float()
        scores = inputs["q"][query].float() @ kept.T * inputs["sm_scale"]
        expected = scores.amax(-1) if len(kept) else torch.full((3,), -math.inf)
        torch.testing.assert_close(outputs["max_logits"][query], expected)


def test_the_sink_takes_weight_from_the_tokens_but_leaves_lse():
    inputs = OP.inputs(AttentionSpec(3, 512, 16), Case(AttentionSizes(2, 30), "random"), Draw(0))
    plain = OP.reference(AttentionSpec(3, 512, 16), inputs)
    # A sink as heavy as all tokens together halves the output.
    even = OP.reference(AttentionSpec(3, 512, 16, sink=True), {**inputs, "sink": plain["lse"][0]})
    torch.testing.assert_close(even["out"][0], plain["out"][0] / 2)
    torch.testing.assert_close(even["lse"], plain["lse"])
