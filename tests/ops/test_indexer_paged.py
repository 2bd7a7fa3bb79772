"""The paged indexer: its kernels against the reference, what it refuses, what it compiles to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.indexer_paged import OP, IndexerPagedSizes, IndexerPagedSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config

from support import FURTHER, H200, assert_compiles, assert_matches_reference, completed

SPLIT = Config.of("triton", schedule="split", block_n=64, block_q=1, num_warps=4, num_stages=3, blocks_per_sm=1)
PERSISTENT = SPLIT.replace(schedule="persistent")
PAIRS = [
    (IndexerPagedSpec(8, 64), SPLIT),
    (IndexerPagedSpec(16, 32, page=32), PERSISTENT),
    (IndexerPagedSpec(64, 128, clean=True), PERSISTENT.replace(block_n=128, num_warps=8)),
    (IndexerPagedSpec(32, 64, next_n=3, page=16, clean=True), SPLIT.replace(block_q=2)),
    (IndexerPagedSpec(8, 32, next_n=6, page=128, score="relu_bias"), PERSISTENT.replace(block_q=4)),
    (
        IndexerPagedSpec(16, 128, next_n=2, logits="bf16", score="relu_bias", clean=True),
        SPLIT.replace(block_n=256, num_warps=8, num_stages=2),
    ),
]
HOPPER = Config.of("gluon", part_queries=1, block_n=64, num_stages=2, accumulators=1, blocks_per_sm=4, gathered=1)
TWO_TILES = HOPPER.replace(block_n=128, blocks_per_sm=3)
HOPPER_PAIRS = [
    (IndexerPagedSpec(64, 128), HOPPER.replace(num_stages=6, blocks_per_sm=2)),
    (IndexerPagedSpec(64, 128, logits="bf16"), TWO_TILES.replace(accumulators=2, gathered=48)),
    (IndexerPagedSpec(64, 128, next_n=2, page=32, clean=True), TWO_TILES.replace(part_queries=2, blocks_per_sm=2, gathered=32)),
    (IndexerPagedSpec(64, 128, next_n=3, page=128), HOPPER.replace(blocks_per_sm=2, gathered=16)),
    (IndexerPagedSpec(32, 64, next_n=8, page=256, score="relu_bias"), HOPPER.replace(part_queries=4, blocks_per_sm=2)),
    (IndexerPagedSpec(8, 32, next_n=5, clean=True), HOPPER.replace(part_queries=8)),
]
BY_SPEC = pytest.mark.parametrize(("spec", "config"), PAIRS, ids=[spec.id for spec, _ in PAIRS])


@BY_SPEC
@pytest.mark.parametrize("case", OP.cases(PAIRS[0][0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, config, case):
    assert_matches_reference(interpreter, OP, spec, config, case)


@BY_SPEC
def test_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


@pytest.mark.parametrize(("spec", "config"), HOPPER_PAIRS, ids=[spec.id for spec, _ in HOPPER_PAIRS])
def test_hopper_template_compiles(spec, config):
    assert_compiles(OP, spec, config)


@pytest.mark.parametrize(
    ("spec", "changes", "name"),
    [
        (IndexerPagedSpec(64, 128, page=16), {}, "page"),
        (IndexerPagedSpec(64, 128, next_n=3), {"block_n": 128}, "tiles of a stage"),
        (IndexerPagedSpec(64, 128, next_n=3), {}, "resident blocks"),
        (IndexerPagedSpec(64, 128), {"accumulators": 2}, "accumulators"),
        (IndexerPagedSpec(64, 128, next_n=2), {"part_queries": 2}, "product's registers"),
        (IndexerPagedSpec(64, 128), {"num_stages": 12}, "smem"),
        (IndexerPagedSpec(64, 128), {"gathered": 128}, "smem"),
        (IndexerPagedSpec(64, 128), {"part_queries": 2}, "queries per product"),
    ],
)
def test_hopper_template_says_what_it_cannot_do(spec, changes, name):
    assert name in {violation.name for violation in OP.violations(spec, HOPPER.replace(**changes), H200)}


def test_hopper_template_is_for_hopper_alone():
    (violation,) = OP.violations(IndexerPagedSpec(64, 128), HOPPER, resolve("b200"))
    assert violation.name == "wgmma"


@pytest.mark.parametrize("sizes", [case.sizes for case in OP.workloads(PAIRS[0][0])], ids=lambda sizes: sizes.id)
@pytest.mark.parametrize("spec", OP.options(OP.specs(presets.preset("deepseek-v3.2"))[0]), ids=lambda spec: spec.id)
def test_default_config_fits_every_gpu(spec, sizes):
    for name in ("l40s", "h100", "h20", "b200", "rtx5090"):
        gpu = resolve(name)
        assert not OP.violations(spec, OP.default_config(spec, sizes, gpu), gpu)


@pytest.mark.parametrize(("stated", "specs"), [(1, [1]), (2, [1, 2]), (4, [1, 4])])
def test_a_model_states_the_queries_of_a_step(stated, specs):
    """Drafted tokens are queries, too: what a step with them launches is tuned beside what one without them does."""
    model = replace(presets.preset("deepseek-v3.2"), next_n=stated)
    assert [spec.next_n for spec in OP.specs(model)] == specs


DEFAULTS = [  # several queries a sequence take the compiler 2.5 s each: as many as fill a product everywhere
    pytest.param(spec, id=spec.id, marks=FURTHER if spec.next_n in (3, 4) else ())
    for spec in OP.options(OP.specs(presets.preset("deepseek-v3.2"))[0])
]


@pytest.mark.parametrize("spec", DEFAULTS)
def test_default_config_compiles(spec):
    # Three products of 128 columns leave 26 values to local memory, most of them of the search for the next row (ten, while
    # the page and strides were known when the kernel compiled).
    assert_compiles(OP, spec, OP.default_config(spec, IndexerPagedSizes(8, 65536), H200), spills=104 if spec.next_n == 6 else 0)


def test_default_config_gathers_what_the_l2_cannot_keep():
    spec = IndexerPagedSpec(64, 128)
    gathered = [
        OP.default_config(spec, IndexerPagedSizes(*sizes), H200)["gathered"] for sizes in ((64, 8192), (8, 65536), (64, 65536))
    ]
    assert gathered == [1, 1, 96]
    two = OP.default_config(IndexerPagedSpec(32, 128, next_n=2), IndexerPagedSizes(64, 65536), H200)
    assert (two["gathered"], two["num_stages"]) == (1, 4)


@pytest.mark.parametrize(("batch", "together"), [(8, 1), (64, 96)])
def test_logits_that_the_l2_keeps_are_written_stage_by_stage(batch, together):
    """The kernel gathers as many stages as it has room for, or is told to write every one."""
    inputs = OP.inputs(IndexerPagedSpec(8, 64), Case(IndexerPagedSizes(batch, 40), "full"), Draw(0))
    outputs = {"logits": torch.empty(batch, 1 << 16, device="meta")}  # 2 MB, 16 MB
    (launch,) = OP.launches(IndexerPagedSpec(8, 64), HOPPER.replace(gathered=96), inputs, outputs, H200)
    assert launch.args[-1] == together
    (plain,) = OP.launches(IndexerPagedSpec(8, 64), HOPPER, inputs, outputs, H200)
    assert len(plain.args) == len(launch.args) - 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("heads", 128), ("head_dim", 100), ("next_n", 0), ("page", 48), ("score", "softmax"), ("logits", "fp16"), ("clean", 1)],
)
def test_spec_refuses(field, value):
    with pytest.raises(SpecError, match=field):
        IndexerPagedSpec.from_dict({"heads": 64, "head_dim": 128, field: value})


def arguments(**changes):
    """A valid call's arguments in order, with some of them changed."""
    inputs = OP.inputs(IndexerPagedSpec(8, 64, next_n=2), Case(IndexerPagedSizes(3, 200), "ragged"), Draw(0))
    options = {"score": "weighted_relu", "logits": "fp32", "clean": False, "scores": "fp8"}
    return list({**inputs, **options, **changes}.values())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q", torch.zeros(3, 2, 8, 64)),
        ("cache", torch.zeros(9, 64, 1, 132, dtype=torch.uint8)),
        ("cache", torch.zeros(9, 64, 2, 68, dtype=torch.uint8)[:, :, :1]),
        ("cache", torch.zeros(9, 64 * 68 + 4, dtype=torch.uint8)[:, 4:].unflatten(1, (64, 1, 68))),
        ("weights", torch.zeros(3, 8)),
        ("lengths", torch.zeros(3, dtype=torch.int32)),
        ("page_table", torch.zeros(3, 4, dtype=torch.int64)),
        ("max_context", -1),
        ("max_context", 1 << 31),
        ("score", "softmax"),
        ("logits", "fp64"),
    ],
)
def test_call_refuses(argument, value):
    with pytest.raises(InputError, match=f"^{argument}"):
        OP.bind(*completed(OP, *arguments(**{argument: value})))


def test_bind_names_what_it_took():
    spec, sizes, inputs = OP.bind(*completed(OP, *arguments()))
    assert (spec, sizes) == (IndexerPagedSpec(8, 64, next_n=2), IndexerPagedSizes(3, 200))
    assert list(inputs) == ["q", "cache", "weights", "lengths", "page_table", "max_context"]


def test_padded_blocks_are_served():
    """Blocks of one layer inside a cache of two layers lie two blocks apart."""
    spec = IndexerPagedSpec(8, 64)
    inputs = dict(OP.inputs(spec, Case(IndexerPagedSizes(2, 130), "full"), Draw(1)))
    inputs["cache"] = torch.cat([inputs["cache"], inputs["cache"] ^ 3], dim=1)[:, :64]
    assert not inputs["cache"].is_contiguous()
    bound_spec, _, bound = OP.bind(*completed(OP, *inputs.values(), "weighted_relu", "fp32", False, "fp8"))
    assert bound_spec == spec
    assert OP.launches(spec, SPLIT, bound, OP.allocate(spec, bound), H200)[0].args[15] == 2 * 64 * 68


def test_tiled_views_of_the_cache():
    """TMA sees keys and scales of every block, however far apart the blocks lie."""
    spec = IndexerPagedSpec(64, 128)
    inputs = dict(OP.inputs(spec, Case(IndexerPagedSizes(2, 130), "full"), Draw(1)))
    cache = inputs["cache"] = torch.cat([inputs["cache"], inputs["cache"]], dim=1)[:, :64]
    (launch,) = OP.launches(spec, HOPPER, inputs, OP.allocate(spec, inputs), H200)
    keys, scales = launch.args[1:3]
    assert (keys.shape, keys.strides) == ((len(cache), 64, 128), (2 * 64 * 132, 128, 1))
    assert (scales.shape, scales.strides) == ((len(cache), 64), (2 * 64 * 132 // 4, 1))
    assert scales.data_ptr() - keys.data_ptr() == 64 * 128
    assert launch.grid == (2, 3, 1)  # three stages of 64 tokens


def test_without_blocks_nothing_is_a_token():
    spec = IndexerPagedSpec(64, 128)
    inputs = dict(OP.inputs(spec, Case(IndexerPagedSizes(2, 130), "full"), Draw(1)))
    inputs["cache"] = inputs["cache"][:0]
    outputs = OP.allocate(spec, inputs)
    assert OP.launches(spec, HOPPER, inputs, outputs, H200) == ()
    assert torch.equal(outputs["logits"], torch.full((2, 130), float("-inf")))


def test_nothing_to_do_launches_nothing():
    for batch, context in ((0, 64), (2, 0)):
        inputs = OP.inputs(PAIRS[0][0], Case(IndexerPagedSizes(batch, context), "full"), Draw(0))
        assert OP.launches(PAIRS[0][0], SPLIT, inputs, OP.allocate(PAIRS[0][0], inputs), H200) == ()
