"""What lse may differ by where a scale is kept as two bf16: as much as that rounds to the other side, and no more."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.ops.attention_paged.rounding import undecided
from dsa_codegen.problem.compare import LSE
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case

TOKENS = 2
SPEC = AttentionPagedSpec(64, TOKENS)


def as_pairs(rows):
    """bf16 of the rows [tokens, 656] of a cache as kernels place them: e4m3 by two halves of the scale, the lower one first."""
    values = rows[:, :512].view(torch.float8_e4m3fn).double().view(-1, 4, 128)
    scales = rows[:, 512:528].contiguous().view(torch.float32)[..., None]
    high = scales.bfloat16()
    low = (scales - high.float()).bfloat16()
    return (values * high.double() + (values * low.double()).bfloat16().double()).bfloat16().flatten(1)


@pytest.fixture(scope="module")
def few_tokens():
    """Inputs of lists of two tokens, the reference, lse of latents placed by pairs."""
    inputs = OP.inputs(SPEC, Case(AttentionPagedSizes(24, 2, 3000), "random"), Draw(1))
    reference = OP.reference(SPEC, inputs)
    slots = inputs["indices"].flatten().long()
    rows = inputs["cache"].flatten(0, 2)[slots]
    latents = torch.cat([as_pairs(rows), rows[:, 528:].contiguous().view(torch.bfloat16)], 1).float().view(24, 2, TOKENS, 576)
    lse = (inputs["q"].float() @ latents.mT * inputs["sm_scale"]).logsumexp(-1)
    return inputs, reference, lse


def passed(few_tokens, lse):
    inputs, reference, _ = few_tokens
    return OP.check(SPEC, inputs, {"out": reference["out"].bfloat16(), "lse": lse}, reference).passed


def test_pairs_of_bf16_pass(few_tokens):
    _, reference, lse = few_tokens
    beyond = (lse - reference["lse"]).abs() > LSE.absolute + LSE.relative * reference["lse"].abs()
    assert beyond.any(), "no value would need it"
    assert passed(few_tokens, lse)


def test_nothing_else_passes(few_tokens):
    inputs, _, lse = few_tokens
    assert not passed(few_tokens, lse + 5e-3 * (torch.arange(64) == 7))
    rows = inputs["cache"].flatten(0, 2)[inputs["indices"].flatten().long()]
    values = rows[:, :512].view(torch.float8_e4m3fn).float().view(-1, 4, 128)
    scales = rows[:, 512:528].contiguous().view(torch.float32)[..., None]
    short = torch.cat([(values * scales.bfloat16().float()).flatten(1), rows[:, 528:].contiguous().view(torch.bfloat16)], 1)
    latents = short.bfloat16().float().view(24, 2, TOKENS, 576)
    assert not passed(few_tokens, (inputs["q"].float() @ latents.mT * inputs["sm_scale"]).logsumexp(-1)), "scales of 8 bits"


def test_elements_by_the_middle_are_undecided():
    unit = 2.0**-7
    middle = 1 + unit / 2
    latents = torch.tensor([middle, middle + 240 * 2.0**-23, middle + 300 * 2.0**-23, 1.0, -4 * middle, 0.0])
    assert undecided(latents).tolist() == [unit, unit, 0, 0, 4 * unit, 0]
