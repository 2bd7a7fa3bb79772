"""Sparse MLA prefill of 33 to 128 heads in CUDA C++: pairs of tiles in a block, and clusters of two blocks."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from torch import Tensor

from dsa_codegen.kernels import build, render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import OP, AttentionSizes, AttentionSpec
from dsa_codegen.ops.attention.staying import cut_last
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.proof.verify import verify

import emulator
from attention_configs import CLUSTER, PAIR
from support import FURTHER, H200, assert_compiles, assert_policies_are_in_even_registers

SPILLS_BETWEEN_QUERIES = 72  # bytes; none is touched in the loop over tiles


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
        pytest.param(AttentionSpec(128, 576, 2048), PAIR.replace(value_tokens=64), marks=FURTHER),
        pytest.param(AttentionSpec(64, 512, 512, sink=True), PAIR.replace(value_tokens=32), marks=FURTHER),
    ],
    ids=["plain", "all options", "without a tail", "lines", "values of a tile", "of half a tile"],
)
def test_pairs_compile_for_hopper(spec, config):
    assert_compiles(OP, spec, config)
    built = build.find(render.render(OP, spec, config), H200)
    assert "Performance Loss" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"
    assert_policies_are_in_even_registers(built)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "config", "order"),
    [
        (AttentionSpec(64, 512, topk=150, lengths=True, sink=True, max_logits=True), PAIR.replace(interleave=True), "shuffled"),
        (AttentionSpec(64, 576, topk=300), PAIR.replace(value_tokens=64), "shuffled"),
        pytest.param(AttentionSpec(64, 512, topk=150, lengths=True), PAIR.replace(value_tokens=32), "shuffled", marks=FURTHER),
        pytest.param(AttentionSpec(128, 576, topk=300), PAIR, "descending", marks=FURTHER),
    ],
    ids=["64 heads", "values of a tile", "of half a tile", "128 heads"],
)
def test_pairs_match_the_reference(spec, config, order, tmp_path):
    """On one SM: queries of one pair of tiles and of several follow each other."""
    kernels = emulator.cuda_kernels(render.render(OP, spec, config), tmp_path, order)
    variant = Variant(OP, spec, config, replace(H200, sms=1), kernels)
    for sizes, distribution in (((1, 1), "ragged"), ((3, 333), "ragged"), ((2, 400), "steep")):
        accuracy = verify(variant, Case(AttentionSizes(*sizes), distribution), "cpu")
        assert accuracy.passed, (sizes, accuracy.detail)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionSpec(128, 576, topk=150, lengths=True, sink=True), CLUSTER),
        pytest.param(AttentionSpec(128, 576, topk=300), CLUSTER.replace(turns=False), marks=FURTHER),
        pytest.param(AttentionSpec(128, 512, topk=150, lengths=True), CLUSTER.replace(num_stages=4), marks=FURTHER),
    ],
    ids=["lengths, sink", "without turns", "without a tail"],
)
def test_clusters_match_the_reference(spec, config, tmp_path):
    """On two SMs: one cluster takes all queries, in turn."""
    kernels = emulator.cuda_kernels(render.render(OP, spec, config), tmp_path, "shuffled")
    variant = Variant(OP, spec, config, replace(H200, sms=2), kernels)
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


def test_clusters_do_not_keep_the_exact_maxima():
    spec = AttentionSpec(128, 576, 2048, max_logits=True)
    assert [violation.name for violation in OP.violations(spec, CLUSTER, H200)] == ["max_logits"]
    assert OP.default_config(spec, AttentionSizes(4096, 8192), H200) == PAIR
