"""What rounding may cost: nothing of a scale's 24 bits; of few tokens' weights what rounding these to bf16 does, no more."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen.ops.attention_paged import OP, AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case

TOKENS = 2
SPEC = AttentionPagedSpec(64, TOKENS)


def as_pairs(rows):
    """bf16 of the rows [tokens, 656] of a cache, their scales kept as two bf16: e4m3 by both halves, the lower one first."""
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


def test_scales_of_16_bits_do_not_pass(few_tokens):
    """2 % of tokens then have an element that rounds to the other side, and lse of two tokens moves by up to 1e-3."""
    _, _, lse = few_tokens
    assert not passed(few_tokens, lse)


def test_scales_of_24_bits_pass(few_tokens):
    _, reference, _ = few_tokens
    assert passed(few_tokens, reference["lse"])


def test_weights_of_few_tokens_may_be_rounded(few_tokens):
    """Of some rows of two tokens elements are beyond the limit of long lists, though nothing but the weights is rounded."""
    inputs, reference, _ = few_tokens
    magnitude = OP._attend(SPEC, inputs, torch.abs)["out"]
    worst = int((magnitude - 64 * reference["out"].abs()).argmax())  # large values that cancel

    def check(roundings):
        out = reference["out"].clone()
        out.view(-1)[worst] += roundings * 2**-8 * magnitude.view(-1)[worst]
        return OP.check(SPEC, inputs, {**reference, "out": out}, reference).passed

    assert magnitude.view(-1)[worst] * 2**-8 > 1e-3
    assert [check(roundings) for roundings in (0.2, 1, 2.9, 4, -2.9, -4)] == [True, True, True, False, True, False]
