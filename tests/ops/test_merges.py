"""What ranks merge: candidates and parts of attention, interpreted against the reference; what is refused."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen import functions, ops
from dsa_codegen.distributed import Shard, merge_attention
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.functions import operators
from dsa_codegen.ops.candidates import CandidatesSpec
from dsa_codegen.ops.merge_lists import MergeListsSpec
from dsa_codegen.ops.merge_parts import MergePartsSpec
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Config

from support import H200, assert_compiles, assert_matches_reference, run_interpreted

SMALL = {
    "candidates": Config.of("triton", block_k=256, num_warps=1),
    "merge_lists": Config.of("triton", block_k=128, num_warps=1),
    "merge_parts": Config.of("triton", block_h=2, num_warps=1),
}
OPS = {name: ops.get(name) for name in SMALL}
SPECS = {name: [each for spec in op.specs(presets.preset("tiny")) for each in op.options(spec)] for name, op in OPS.items()}
CASES = [
    pytest.param(name, spec, case, id=f"{name}-{spec.id}-{case.id}")
    for name, op in OPS.items()
    for spec in dict.fromkeys(SPECS[name])
    for case in op.cases(spec)
]


@pytest.mark.parametrize(("name", "spec", "case"), CASES)
def test_matches_the_reference(interpreter, name, spec, case):
    assert_matches_reference(interpreter, OPS[name], spec, SMALL[name], case)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("candidates", CandidatesSpec(2048)), ("merge_lists", MergeListsSpec(2048)), ("merge_parts", MergePartsSpec(512, True))],
)
def test_compiles_for_hopper(name, spec):
    op = OPS[name]
    for config in {op.default_config(spec, case.sizes, H200) for case in op.workloads(spec)}:
        assert_compiles(op, spec, config)


def test_candidates_are_numbered_as_their_shard_does():
    shard, draw = Shard.interleaved(2, 3, 4), Draw(4)
    tokens, logits = draw.integers(-1, 50, 6, 64), draw.normal(6, 50)
    found = functions.candidates_of(logits, tokens, (shard.offset, shard.stride, shard.block))
    assert torch.equal(found[:, 0], shard.to_global(tokens, 2**31 - 1))
    held = tokens >= 0
    assert torch.equal(found[:, 1].view(torch.float32)[held], logits.gather(1, tokens.clamp(min=0).long())[held])


def test_nan_stays_in_its_row_of_merged_parts(interpreter):
    out, lse = torch.ones(2, 1, 4, 40), torch.zeros(2, 1, 4)
    lse[1, 0, 2] = torch.nan
    inputs = {"out": out, "lse": lse, "sink": None}
    found = run_interpreted(interpreter, "merge_parts", MergePartsSpec(40, dtype="fp32"), SMALL["merge_parts"], inputs)
    bad = torch.tensor([[False, False, True, False]])
    assert torch.equal(found["total"].isnan(), bad) and torch.equal(found["merged"].isnan().all(-1), bad)
    assert torch.allclose(found["merged"][~bad], torch.ones(3, 40))


def test_parts_may_lie_apart():
    """As they come in one message with their lse: what is between parts is not theirs."""
    message = Draw(2).normal(3, 4 * 24 + 7)
    out, lse = message[:, : 4 * 24].view(3, 1, 4, 24), message[:, 4 * 24 : 4 * 24 + 4].view(3, 1, 4)
    apart, together = merge_attention(out, lse), merge_attention(out.clone(), lse.clone())
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


LISTS = torch.zeros(2, 3, 2, 64, dtype=torch.int32)
OUT, LSE = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("named", "call"),
    [
        ("candidates", lambda: functions.merge_candidates(LISTS.long())),
        ("candidates", lambda: functions.merge_candidates(LISTS[:, :, 0])),
        ("candidates", lambda: functions.merge_candidates(LISTS[:0])),
        ("tokens", lambda: functions.candidates_of(torch.zeros(3, 9), LISTS[0, 0, 0])),
        ("logits", lambda: functions.candidates_of(torch.zeros(4, 9), LISTS[0, :, 0].contiguous())),
        ("stride", lambda: functions.candidates_of(torch.zeros(3, 9), LISTS[0, :, 0].contiguous(), (0, 2, 4))),
        ("out", lambda: operators.merge_attention(OUT.transpose(1, 2), torch.zeros(2, 4, 3), None)),
        ("lse", lambda: operators.merge_attention(OUT, LSE[:, :2], None)),
        ("sink", lambda: operators.merge_attention(OUT, LSE, torch.zeros(3))),
    ],
)
def test_call_refuses(named, call):
    with pytest.raises(InputError, match=f"^{named}"):
        call()


@pytest.mark.parametrize(
    ("spec", "fields"),
    [(CandidatesSpec, {"topk": 0}), (MergeListsSpec, {"topk": 9000}), (MergePartsSpec, {"d_v": 2000})],
)
def test_spec_refuses(spec, fields):
    with pytest.raises(SpecError):
        spec(**fields)
