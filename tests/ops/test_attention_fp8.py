"""Sparse MLA of FP8 products: its kernels against the reference, what scales mean, what it refuses, what it compiles to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.gpu import detect, resolve
from dsa_codegen.kernels import build, render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.attention import OP, AttentionSizes, AttentionSpec, fp8
from dsa_codegen.problem.compare import similarity_gap
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import interpret, verify

import emulator
from support import FURTHER, H200, assert_compiles, assert_policies_are_in_even_registers, completed, run_interpreted

TRITON = Config.of("triton", block_h=16, block_n=32, num_stages=2, num_warps=4)
PAIR = Config.of(
    "cuda", num_stages=4, turns=False, interleave=False, l2_prefetch=256, sweep=False, value_tokens=64, consumer_registers=216
)
SPECS = [
    AttentionSpec(5, 576, 70, math="fp8"),
    AttentionSpec(20, 512, 33, lengths=True, sink=True, math="fp8"),
    AttentionSpec(9, 352, 50, lengths=True, d_v=336, math="fp8"),
]
SIZES = ((1, 1, "ragged"), (3, 333, "ragged"), (2, 0, "ragged"), (2, 200, "steep"))
CASES = [Case(AttentionSizes(queries, tokens), distribution) for queries, tokens, distribution in SIZES]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_the_reference(interpreter, spec, case):
    """On the CPU sums are exact, and weights are rounded as the reference rounds them: closer than a GPU has to be."""
    accuracy = interpreter.call(interpret, OP.name, spec, TRITON, case, H200, 1)
    assert accuracy.passed, accuracy.detail
    assert accuracy.similarity < 5e-6


def cut(q, latent, bits=13):
    """``q @ latent.T`` as Hopper adds up: 32 products and the sum so far, each cut where the largest of them has no bit."""
    total = torch.zeros(len(q), len(latent))
    for first in range(0, q.shape[1], 32):
        products = q[:, None, first : first + 32] * latent[None, :, first : first + 32]
        largest = torch.maximum(products.abs().amax(-1), total.abs()).clamp_min(1e-30)
        bit = torch.exp2(torch.floor(torch.log2(largest)) - bits)
        total = (torch.trunc(products / bit[..., None]).sum(-1) + torch.trunc(total / bit)) * bit
    return total


def nearest(weights):
    """Rounded to e4m3 as they should be."""
    return weights.to(torch.float8_e4m3fn).float()


def downwards(weights):
    """The largest e4m3 that is no larger: what cutting bits off gives."""
    code = weights.to(torch.float8_e4m3fn)
    below = (code.view(torch.uint8).int() - 1).clamp(min=0).to(torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.where(code.float() > weights, below, code.float())


def unrounded(weights):
    """As they are, which a kernel that stored them in bf16 would be near to."""
    return weights


def heavier(weights):
    """The scale of the token that counts most a tenth too large."""
    factor = torch.ones(weights.shape[1])
    factor[weights.sum(0).argmax() if len(factor) else []] = 1.1
    return nearest(weights * factor)


def lighter(weights):
    """The last token left out."""
    return nearest(weights) * (torch.arange(weights.shape[1]) < weights.shape[1] - 1)


def weighed_on_hopper(inputs):
    """Of each query what its sums make of the weights, with the tokens' scales; the denominators; the tokens."""
    for query, listed in enumerate(inputs["indices"][:, 0].long()):
        valid = (listed >= 0) & (listed < len(inputs["kv"])) & (torch.arange(len(listed)) < inputs["lengths"][query])
        latent, scale = inputs["kv"][listed[valid], 0].float(), inputs["kv_scale"][listed[valid], 0]
        factor = inputs["q_scale"][query, :, None] * inputs["sm_scale"] * scale
        scores = cut(inputs["q"][query].float(), latent) * factor
        peak = torch.exp2((scores / math.log(2) + scale.log2()).amax(-1, keepdim=True).ceil() - fp8.TOP) if len(scale) else 1.0
        weights, sink = scores.exp() / peak, inputs["sink"][:, None].exp() / peak
        yield weights * scale, weights.sum(-1, keepdim=True) + sink, latent


def as_on_hopper(weighed, lse, d_v=512, rounded=nearest):
    """The outputs of these weights."""
    return {"out": torch.stack([rounded(w) @ latent[:, :d_v] / total for w, total, latent in weighed]), "lse": lse}


def test_weights_on_the_other_side_of_a_boundary_are_told_from_what_is_wrong():
    """A draw in which heads that look at few tokens round them to the other side, as a sum of 13 bits is a little off."""
    spec, case = AttentionSpec(64, 512, 2063, lengths=True, sink=True, math="fp8"), Case(AttentionSizes(5, 333), "ragged")
    inputs = OP.inputs(spec, case, Draw(17, "cpu"))
    reference, weighed = OP.reference(spec, inputs), list(weighed_on_hopper(inputs))
    outputs = as_on_hopper(weighed, reference["lse"])
    assert similarity_gap(outputs["out"], reference["out"]) > 4e-4
    accuracy = OP.check(spec, inputs, outputs, reference)
    assert accuracy.passed and accuracy.similarity < 5e-6, accuracy.detail
    for rounded in (downwards, unrounded, heavier, lighter):
        wrong = as_on_hopper(weighed, reference["lse"], rounded=rounded)
        assert not OP.check(spec, inputs, wrong, reference).passed, rounded.__doc__
    assert not OP.check(spec, inputs, {**outputs, "out": 1.01 * outputs["out"]}, reference).passed
    outputs["out"][0, 0, 0] = math.nan
    assert not OP.check(spec, inputs, outputs, reference).passed


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (AttentionSpec(128, 576, 2048, math="fp8"), TRITON.replace(block_h=64, num_stages=3, num_warps=8)),
        (AttentionSpec(16, 512, 512, lengths=True, sink=True, math="fp8"), TRITON),
    ],
    ids=["128 heads", "16 heads"],
)
def test_compiles_for_hopper(spec, config):
    assert_compiles(OP, spec, config)


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(128, 576, 2048, math="fp8"),
        pytest.param(AttentionSpec(64, 512, 130, lengths=True, sink=True, math="fp8"), marks=FURTHER),
    ],
    ids=["plain", "all options, without a tail"],
)
def test_pairs_compile_for_hopper(spec):
    """Products run beside each other, and no copy is the illegal instruction that the assembler makes of some."""
    assert_compiles(OP, spec, PAIR)
    built = build.find(render.render(OP, spec, PAIR), H200)
    assert "Performance Loss" not in (built.folder / "kernels.log").read_text(), "the assembler serialised products"
    assert_policies_are_in_even_registers(built)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("spec", "order"),
    [
        (AttentionSpec(64, 576, topk=200, lengths=True, sink=True, math="fp8"), "shuffled"),
        pytest.param(AttentionSpec(128, 512, topk=150, math="fp8"), "descending", marks=FURTHER),
        pytest.param(AttentionSpec(64, 576, topk=700, math="fp8"), "ascending", marks=FURTHER),
    ],
    ids=["64 heads", "128 heads", "more pairs than places"],
)
def test_pairs_match_the_reference(spec, order, tmp_path):
    """On one SM: queries of one pair of tiles and of several follow each other; maxima rise between and within tiles."""
    kernels = emulator.cuda_kernels(render.render(OP, spec, PAIR), tmp_path, order)
    variant = Variant(OP, spec, PAIR, replace(H200, sms=1), kernels)
    for sizes, distribution in (((1, 1), "ragged"), ((2, 333), "ragged"), ((2, 200), "steep")):
        accuracy = verify(variant, Case(AttentionSizes(*sizes), distribution), "cpu", repeats=1)
        assert accuracy.passed, (sizes, accuracy.detail)
        assert accuracy.similarity < 5e-6


LISTS = [(576, 2048, False), (576, 700, True), (512, 130, True), (512, 1, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize(("d_qk", "topk", "optional"), LISTS)
def test_pairs_match_the_reference_on_a_gpu(heads, d_qk, topk, optional):
    gpu = detect()
    assert gpu is not None
    spec = AttentionSpec(heads, d_qk, topk, lengths=optional, sink=optional, math="fp8")
    if OP.violations(spec, PAIR, gpu):
        pytest.skip(f"{gpu.name} is not a Hopper GPU")
    variant = Variant(OP, spec, PAIR, gpu, build.build(render.render(OP, spec, PAIR), gpu).load())
    for sizes, distribution in (((1, 1), "ragged"), ((301, 2500), "ragged"), ((170, 3000), "steep"), ((140, 9000), "random")):
        accuracy = verify(variant, Case(AttentionSizes(*sizes), distribution), "cuda", repeats=3)
        assert accuracy.passed, (sizes, accuracy.detail)


def drawn(spec, queries=3, tokens=90, distribution="random"):
    return dict(OP.inputs(spec, Case(AttentionSizes(queries, tokens), distribution), Draw(5)))


def test_reference_is_attention_to_what_was_rounded():
    """But for the weights, which cost less than the rounding of tokens does."""
    spec = SPECS[1]
    inputs = drawn(spec, distribution="ragged")
    wide = {name: inputs[name].double() * inputs[f"{name}_scale"][..., None] for name in ("q", "kv")}
    plain = OP.reference(replace(spec, math="bf16"), {**inputs, **wide})
    found = OP.reference(spec, inputs)
    assert torch.allclose(found["lse"].double(), plain["lse"], atol=1e-5, rtol=1e-5)
    assert 1e-6 < similarity_gap(found["out"], plain["out"]) < 6e-4
    assert not found["out"][0].count_nonzero()


def test_weights_that_are_powers_of_two_are_exact():
    """Queries of zeros weigh all alike: scales of 1, 2 and 4 give weights that e4m3 states."""
    spec = replace(SPECS[0], topk=48)
    inputs = drawn(spec, tokens=48)
    inputs["q"] = torch.zeros_like(inputs["q"])
    inputs["kv_scale"] = 2.0 ** torch.arange(48).remainder(3)[:, None]
    found = OP.reference(spec, inputs)["out"]
    mean = (inputs["kv"].float() * inputs["kv_scale"][..., None])[inputs["indices"][:, 0].long(), 0, :512].mean(1)
    assert torch.allclose(found, mean[:, None].expand_as(found), atol=1e-5, rtol=1e-5)


def test_a_scale_is_its_tokens(interpreter):
    """A token stored at twice the scale and half the value is the same token; one whose scale alone is doubled is not."""
    spec = replace(SPECS[0], topk=48)
    inputs = drawn(spec)
    plain = run_interpreted(interpreter, OP.name, spec, TRITON, inputs)["out"]
    inputs["kv"][::3] = (inputs["kv"][::3].float() / 2).to(inputs["kv"].dtype)  # exact but for the smallest
    inputs["kv_scale"][::3] *= 2
    same = run_interpreted(interpreter, OP.name, spec, TRITON, inputs)["out"]
    assert similarity_gap(plain, same) < 1e-4
    inputs["kv_scale"][1::3] *= 2
    assert similarity_gap(plain, run_interpreted(interpreter, OP.name, spec, TRITON, inputs)["out"]) > 1e-2


def test_what_comes_in_bf16_is_quantised():
    q, kv = torch.randn(3, 4, 576).bfloat16(), torch.randn(90, 1, 576).bfloat16()
    lists = torch.arange(30, dtype=torch.int32).expand(3, 1, 30).contiguous()
    (q8, q_scale), (kv8, kv_scale) = dsa.quantize_latents(q), dsa.quantize_latents(kv)
    assert (q8.shape, q_scale.shape, kv8.shape, kv_scale.shape) == (q.shape, (3, 4), kv.shape, (90, 1))
    scales = {"q_scale": q_scale, "kv_scale": kv_scale}
    buffer = torch.empty(3, 4, 512, dtype=torch.bfloat16)
    given, lse = dsa.sparse_attention(q8, kv8, lists, 0.04, math="fp8", **scales, out=buffer)
    assert given is buffer
    for mixed in ({"q": q, "kv": kv}, {"q": q, "kv": kv8, "kv_scale": kv_scale}, {"q": q8, "kv": kv, "q_scale": q_scale}):
        out, other = dsa.sparse_attention(**mixed, indices=lists, sm_scale=0.04, math="fp8")
        assert torch.equal(out, given)
        assert torch.equal(other, lse)
    plain, _ = dsa.sparse_attention(q, kv, lists, 0.04)
    assert 1e-4 < similarity_gap(given, plain) < 3e-3
    strided = torch.randn(3, 4, 640).bfloat16()[..., :576]
    assert torch.equal(dsa.quantize_latents(strided)[0].float(), dsa.quantize_latents(strided.contiguous())[0].float())


def arguments(**changes):
    spec = AttentionSpec(4, 576, 8, lengths=True, sink=True, math="fp8")
    given = {**drawn(spec, 3, 20), "share": 1, "batch_invariant": False, "d_v": 512, "math": "fp8"}
    scales = {name: given.pop(name) for name in ("q_scale", "kv_scale")}
    return list({**given, **scales, **changes}.values())


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("math", {"math": "int8"}),
        ("q", {"q": torch.zeros(3, 4, 576)}),
        ("kv", {"kv": torch.zeros(20, 1, 576, dtype=torch.bfloat16)}),
        ("q_scale", {"q_scale": None}),
        ("q_scale", {"q_scale": torch.ones(4, 3)}),
        ("kv_scale", {"kv_scale": torch.ones(20)}),
        ("kv_scale", {"kv_scale": torch.ones(20, 1, dtype=torch.bfloat16)}),
        ("q", {"math": "bf16"}),
        ("kv_scale", {"math": "bf16", "q": torch.zeros(3, 4, 576), "kv": torch.zeros(20, 1, 576), "q_scale": None}),
    ],
    ids=str,
)
def test_call_refuses(argument, changes):
    with pytest.raises(InputError, match=f"^{argument}: "):
        OP.bind(*completed(OP, *arguments(**changes)))


def test_highest_scores_are_refused_and_nobody_shares():
    with pytest.raises(InputError, match=r"^max_logits"):
        OP.bind(*arguments(), None, None, torch.zeros(3, 4))
    assert OP.bind(*arguments(share=4))[0].share == 1
    with pytest.raises(InputError, match=r"^latents"):
        dsa.quantize_latents(torch.zeros(3, 576, dtype=torch.bfloat16))
    for field in ({"max_logits": True}, {"share": 2}, {"math": "fp4"}):
        with pytest.raises(SpecError):
            AttentionSpec.from_dict({"heads": 4, "d_qk": 576, "topk": 8, "math": "fp8", **field})


@pytest.mark.parametrize(
    ("heads", "d_v", "gpu", "backend"),
    [
        (128, 512, "h200", "cuda"),
        (64, 512, "h100", "cuda"),
        (16, 512, "h200", "triton"),
        (64, 256, "h200", "triton"),
        (128, 512, "b200", "triton"),
        (128, 512, "l40s", "triton"),
    ],
)
def test_defaults(heads, d_v, gpu, backend):
    spec = AttentionSpec(heads, d_v + 64, 2048, d_v=d_v, math="fp8")
    config = OP.default_config(spec, AttentionSizes(4096, 32768), resolve(gpu))
    assert config.backend == backend
    assert not OP.violations(spec, config, resolve(gpu))


def test_products_of_fp8_are_an_option_of_every_spec_and_none_before_ada():
    plain = AttentionSpec(128, 576, 2048)
    (option,) = [spec for spec in OP.options(plain) if spec.math == "fp8"]
    assert set(OP.options(option)) == {replace(option, lengths=a, sink=b) for a in (False, True) for b in (False, True)}
    assert {violation.name for violation in OP.violations(option, TRITON, resolve("a100"))} == {"math"}
    specialised = Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=384)
    assert [violation.name for violation in OP.violations(option, specialised, H200)] == ["math"]
    case = OP.workloads(plain)[0]
    assert OP.cost(option, case).unit == "fp8"
    assert OP.cost(option, case).bytes < OP.cost(plain, case).bytes
