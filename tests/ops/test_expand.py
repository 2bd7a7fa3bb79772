"""Blocks of tokens: pooled keys and expanded choices against their references, and the whole way by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.ops.expand import OP, ExpandSizes, ExpandSpec
from dsa_codegen.ops.pool import OP as POOL
from dsa_codegen.ops.pool import PoolSizes, PoolSpec
from dsa_codegen.problem import compare, presets
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Config
from dsa_codegen.problem.presets import Model

from support import H200, assert_compiles, assert_matches_reference, run_interpreted

FLASH = presets.preset("glm-5.3-flash")
SPECS = OP.options(ExpandSpec(12, 16))
POOLS = (*POOL.options(PoolSpec(32, 16)), PoolSpec(96, 2), PoolSpec(208, 8, "fp32"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
@pytest.mark.parametrize("case", OP.cases(SPECS[0]), ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, OP, spec, Config.of("triton", num_warps=4), case)


@pytest.mark.parametrize("spec", POOLS, ids=lambda spec: spec.id)
@pytest.mark.parametrize("case", POOL.cases(POOLS[0]), ids=lambda case: case.id)
def test_pooled_keys_match_the_reference(interpreter, spec, case):
    assert_matches_reference(interpreter, POOL, spec, Config.of("triton", block_t=2, num_warps=1), case)


def test_blocks_before_the_sequence_name_no_slot(interpreter):
    """Of a list that is another sequence's: nothing in front of a page table is read."""
    numbers = {"chosen": [[0, 1], [10, 9]], "block_starts": [0, 10], "starts": [0, 0], "ends": [8, 8]}
    numbers["page_table"] = [[5, 6], [7, 8]]
    inputs = {name: torch.tensor(each, dtype=torch.int32) for name, each in numbers.items()} | {"pool": 4, "page": 64}
    spec = ExpandSpec(2, 4, "slots")
    found = run_interpreted(interpreter, "expand", spec, Config.of("triton", num_warps=1), inputs)
    assert found["out"].tolist() == [[*range(320, 328), -1, -1, -1], [448, 449, 450, 451, *[-1] * 7]]
    assert torch.equal(found["out"], OP.reference(spec, inputs)["out"])


def test_compile_for_hopper():
    (spec,), (keys,) = OP.specs(FLASH), POOL.specs(FLASH)
    assert (spec.blocks, spec.width, keys.pool) == (128, 2063, 16)
    assert_compiles(OP, spec, OP.default_config(spec, ExpandSizes(64), H200))
    assert_compiles(POOL, keys, POOL.default_config(keys, PoolSizes(8192), H200))
    assert not OP.specs(presets.preset("glm-5"))


def test_are_registered_by_their_stems():
    assert ops.get("expand") is OP
    assert ops.get("pool") is POOL


def test_a_model_states_its_blocks():
    assert {spec.topk for spec in ops.get("select").specs(FLASH)} == {128}
    (attention,) = ops.get("attention").specs(FLASH)
    assert (attention.topk, attention.d_qk, attention.lengths) == (2063, 512, True)
    for pool, topk in ((3, 2048), (32, 1024), (16, 2040)):
        with pytest.raises(SpecError, match="pool"):
            Model("m", 64, 512, 0, 32, 128, topk, kv_layout="none", pool=pool)
    with pytest.raises(InputError, match=r"^model: .*pool"):
        dsa.Layer(FLASH)


def test_a_paged_model_of_pooled_keys_states_lists_with_a_tail():
    """And what is always kept in whole blocks, as these are what is chosen."""
    model = replace(FLASH, kv_layout="bf16", keep_first=16, keep_recent=64)
    (paged,) = ops.get("attention_paged").specs(model)
    assert (paged.topk, paged.lengths) == (2063, True)
    assert {(spec.keep_first, spec.keep_recent) for spec in ops.get("select").specs(model)} == {(1, 4)}
    with pytest.raises(SpecError, match=r"Model\.keep_recent = 8 is not possible; allowed: 0 to 2048 in steps of 16"):
        replace(FLASH, keep_recent=8)


def test_a_gate_of_zero_is_a_mean():
    k = Draw(1).normal(40, 32, dtype=torch.bfloat16)
    first = torch.tensor([0, 8, 35], dtype=torch.int32)
    pooled = dsa.pool_index_k(k, torch.zeros_like(k), torch.zeros(8, 32), first)
    assert torch.equal(pooled[1], k[8:16].float().mean(0).bfloat16())
    assert not pooled[2].any()  # five tokens are no block


TOPK, POOL_OF = 256, 4
"""64 blocks of 4."""


def sequences(draw, counts):
    """(pooled keys of sequences one behind the other, the first block of each, the first token of each)."""
    keys = draw.normal(sum(counts), 32, dtype=torch.bfloat16)
    starts = [sum(counts[:each]) for each in range(len(counts))]
    blocks = [count // POOL_OF for count in counts]
    firsts = [start + POOL_OF * block for start, count in zip(starts, blocks, strict=True) for block in range(count)]
    gates = draw.normal(sum(counts), 32, dtype=torch.bfloat16)
    pooled = dsa.pool_index_k(keys, gates, draw.normal(POOL_OF, 32), torch.tensor(firsts, dtype=torch.int32))
    return pooled, [sum(blocks[:each]) for each in range(len(counts))], starts


def test_a_query_gets_the_tokens_of_its_best_blocks_and_its_tail():
    draw = Draw(2)
    counts = (333, 500)
    pooled, first_blocks, first_tokens = sequences(draw, counts)
    rows = [(0, 333), (0, 6), (1, 499), (1, 3), (1, 0)]  # sequence, and how many of its tokens a query sees
    q, weights = draw.normal(5, 8, 32, dtype=torch.bfloat16), draw.normal(5, 8)
    block_starts = torch.tensor([first_blocks[each] for each, _ in rows], dtype=torch.int32)
    starts = torch.tensor([first_tokens[each] for each, _ in rows], dtype=torch.int32)
    ends = starts + torch.tensor([seen for _, seen in rows], dtype=torch.int32)
    tokens, lengths = dsa.index_select_pooled(
        *(q, pooled, None, weights, block_starts, starts, ends, TOPK, POOL_OF), scores="bf16"
    )
    assert tokens.shape == (5, TOPK + POOL_OF - 1)
    scores = (torch.einsum("qhd,bd->qhb", q.double(), pooled.double()).relu() * weights.double()[..., None]).sum(1)
    for row, (sequence, seen) in enumerate(rows):
        whole, base = seen // POOL_OF, first_blocks[sequence]
        best = scores[row, base : base + whole].sort(descending=True, stable=True).indices[: TOPK // POOL_OF].sort().values
        start = first_tokens[sequence]
        expected = [start + POOL_OF * block + place for block in best.tolist() for place in range(POOL_OF)]
        expected += range(start + POOL_OF * whole, start + seen)
        assert tokens[row].tolist() == expected + [-1] * (len(tokens[row]) - len(expected))
        assert lengths[row] == len(expected)


@pytest.mark.parametrize("slots", [False, True])
def test_paged_choices_are_those_of_flat_keys(slots):
    draw, batch, next_n, seen = Draw(3), 3, 2, [700, 5, 389]
    blocks, page = 175, 64
    keys = draw.normal(batch * blocks, 32, dtype=torch.bfloat16)
    cache = IndexKLayout(page, 32).empty(batch * 3)
    table = draw.permutation(batch * 3).view(batch, 3).int()
    place = torch.arange(blocks)
    where = (table.long()[:, place // page] * page + place % page).flatten()
    dsa.store_index_k(keys, where.int(), cache)
    q, weights = dsa.quantize_index_q(draw.normal(batch * next_n, 8, 32, dtype=torch.bfloat16), draw.normal(batch * next_n, 8))
    lengths = torch.tensor([[each - 1, each] for each in seen], dtype=torch.int32)
    latents = draw.permutation(batch * 11 + 1)[: batch * 11].view(batch, 11).int()
    paging = {"page_table": latents, "page": 64} if slots else {}
    found, counts = dsa.index_select_pooled_paged(
        *(q.view(batch, next_n, 8, 32), cache, weights, lengths, table, 704, TOPK, POOL_OF), **paging
    )
    starts = torch.arange(batch, dtype=torch.int32).repeat_interleave(next_n)
    flat = dsa.quantize_index_k(keys)
    ends = starts * 1000 + lengths.flatten()
    tokens, numbers = dsa.index_select_pooled(q, *flat, weights, starts * blocks, starts * 1000, ends, TOPK, POOL_OF)
    tokens = torch.where(tokens < 0, -1, tokens - starts[:, None] * 1000)
    expected = dsa.choice.slots_of(tokens, latents, 64) if slots else tokens
    assert torch.equal(found.flatten(0, 1), expected)
    assert torch.equal(counts.flatten(), numbers)


def test_refuses():
    draw = Draw(4)
    pooled, *_ = sequences(draw, (300,))
    q, weights = draw.normal(1, 8, 32, dtype=torch.bfloat16), draw.normal(1, 8)
    none, end = torch.zeros(1, dtype=torch.int32), torch.tensor([300], dtype=torch.int32)
    call = q, pooled, None, weights, none, none, end
    with pytest.raises(InputError, match=r"^topk:"):
        dsa.index_select_pooled(*call, 254, 4, scores="bf16")
    for pool in (0, 3):
        with pytest.raises(InputError, match=rf"^pool: got {pool}; expected one of 1, 2, 4"):
            dsa.index_select_pooled(*call, 255, pool, scores="bf16")
    with pytest.raises(InputError, match=r"^out:"):
        dsa.index_select_pooled(*call, 256, 4, scores="bf16", out=none)
    with pytest.raises(SpecError, match="pool"):
        dsa.expand_blocks(torch.zeros(1, 4, dtype=torch.int32), none, none, end, 3)
    with pytest.raises(InputError, match=r"^page_table:"):
        dsa.expand_blocks(torch.zeros(1, 4, dtype=torch.int32), none, none, end, 4, page_table=torch.zeros(2, 4).int())


@pytest.mark.gpu
def test_kernels_equal_their_references():
    from dsa_codegen.gpu import detect
    from dsa_codegen.kernels.build import build
    from dsa_codegen.kernels.render import render
    from dsa_codegen.kernels.variant import Variant
    from dsa_codegen.proof.verify import verify

    gpu = detect()
    for op, specs in ((OP, OP.options(ExpandSpec(128, 16))), (POOL, POOL.options(PoolSpec(128, 16)))):
        for spec in specs:
            config = op.default_config(spec, op.workloads(spec)[0].sizes, gpu)
            variant = Variant(op, spec, config, gpu, build(render(op, spec, config), gpu).load())
            for case in op.cases_for(spec, config):
                result = verify(variant, case, "cuda", repeats=2)
                assert result.passed, (spec, case, result.detail)


@pytest.mark.gpu
def test_the_end_of_a_million_tokens():
    """GLM-5.3-Flash at its longest: 65536 pooled keys, 1 GB of latents; as on the CPU, ties of rounded scores aside."""
    model, tokens, queries, draw = dsa.preset("glm-5.3-flash"), 1 << 20, 24, Draw(7, "cuda")
    keys = draw.normal(tokens, model.index_head_dim, dtype=torch.bfloat16)
    gates, bias = draw.normal(tokens, model.index_head_dim), draw.normal(model.pool, model.index_head_dim)
    first = torch.arange(0, tokens, model.pool, dtype=torch.int32, device="cuda")
    pooled, scales = dsa.quantize_index_k(dsa.pool_index_k(keys, gates, bias, first))
    index_q = draw.normal(queries, model.index_heads, model.index_head_dim, dtype=torch.bfloat16)
    q8, folded = dsa.quantize_index_q(index_q, draw.normal(queries, model.index_heads))
    none = torch.zeros(queries, dtype=torch.int32, device="cuda")
    ends = tokens - torch.arange(queries, dtype=torch.int32, device="cuda") * 7
    asked = (q8, pooled, scales, folded, none, none, ends)
    listed, lengths = dsa.index_select_pooled(*asked, model.topk, model.pool)
    expected, counts = dsa.index_select_pooled(*(value.cpu() for value in asked), model.topk, model.pool)
    assert torch.equal(lengths.cpu(), counts)
    for row in range(queries):
        chosen, wanted = (set(each[row, : counts[row]].tolist()) for each in (listed.cpu(), expected))
        assert len(chosen) == counts[row] and len(chosen - wanted) <= 3 * model.pool, row
        assert set(range(int(ends[row]) // model.pool * model.pool, int(ends[row]))) <= chosen, "the tail"
    kv = draw.normal(tokens, 1, model.d_v, dtype=torch.bfloat16)
    q = draw.normal(queries, model.heads, model.d_v, dtype=torch.bfloat16)
    out, lse = dsa.sparse_attention(q, kv, listed[:, None], model.d_v**-0.5, lengths=lengths)
    for row in range(queries):
        latents = kv[listed[row, : counts[row]].long(), 0].float()
        scores = q[row].float() @ latents.T * model.d_v**-0.5
        assert compare.close("lse", lse[row], scores.logsumexp(-1), compare.LSE).passed, row
        assert compare.close("out", out[row], scores.softmax(-1) @ latents, compare.ATTENTION).passed, row
