"""What surrounds a call: default dtypes, autocast, gradients, inference mode; and arguments of no sensible type."""

from __future__ import annotations

import contextlib

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError
from dsa_codegen.problem.draw import Draw

from layer_inputs import TINY, V4, decode_inputs, prefill_inputs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FP8 = torch.float8_e4m3fn
LAYER = dsa.Layer(TINY)


@contextlib.contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "bf16": lambda device: default(torch.bfloat16),
    "fp16": lambda device: default(torch.float16),
    "fp64": lambda device: default(torch.float64),
    "autocast": lambda device: torch.autocast(device, dtype=torch.bfloat16),
}


def everything(device):
    """Results of the whole path, stores and gathers included."""
    draw = Draw(4, device)
    rows = draw.normal(70, 576, dtype=torch.bfloat16)
    slots = torch.arange(70, device=device)
    results = []
    for model in (TINY, V4):
        results += dsa.Layer(model).prefill(**prefill_inputs(model, 5, 150, device))
        decoded = decode_inputs(model, 2, 1, 200, device)
        results += dsa.Layer(model).decode(**decoded)
        results.append(dsa.gather_kv(decoded["kv_cache"], slots, layout=model.kv_layout))
        results += dsa.gather_index_k(decoded["index_cache"], slots)
        results.append(
            dsa.indexer_logits_paged(
                draw.normal(2, 1, model.index_heads, model.index_head_dim, dtype=FP8),
                decoded["index_cache"],
                draw.normal(2, model.index_heads),
                decoded["lengths"],
                decoded["page_table"],
                200,
                score="relu_bias",
                clean=True,
            )
        )
    results += dsa.quantize_index_k(rows[:, :64].contiguous(), power_of_two=True)
    return results


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("device", DEVICES)
def test_no_default_dtype_and_no_autocast_changes_a_bit(device, surroundings):
    plain = everything(device)
    with SURROUNDINGS[surroundings](device):
        again = everything(device)
    for a, b in zip(plain, again, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_inference_mode_changes_nothing(device):
    plain = everything(device)
    with torch.inference_mode():
        again = everything(device)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(plain, again, strict=True))


CALLS = {
    "attention": lambda tensor: dsa.sparse_attention(tensor(2, 8, 576), tensor(9, 1, 576), tensor(2, 1, 64).int(), 0.1),
    "keys": lambda tensor: dsa.quantize_index_k(tensor(9, 64)),
    "select": lambda tensor: dsa.select(tensor(2, 90), tensor(2).int(), 64),
    "queries": lambda tensor: dsa.quantize_index_q(tensor(2, 8, 64), torch.zeros(2, 8).to(tensor(1).device)),
}
FIRST = {"attention": "q", "keys": "k", "select": "scores", "queries": "q"}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_input_that_wants_a_gradient_is_refused(device, name):
    def wanting(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16, device=device).requires_grad_()

    for _ in range(2):  # whether or not a call like it went well in between
        with pytest.raises(InputError, match=f"^{FIRST[name]}: got a tensor that requires a gradient; .*no_grad"):
            CALLS[name](wanting)
        with torch.no_grad():
            CALLS[name](wanting)
    CALLS[name](lambda *shape: wanting(*shape).detach())


BF16 = torch.zeros(3, 64, dtype=torch.bfloat16)
QUERIES, KEYS = torch.zeros(2, 8, 64).to(FP8), torch.zeros(5, 64).to(FP8)
INDEXER = (QUERIES, KEYS, torch.ones(5), torch.ones(2, 8), torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
SCORES, ENDS = torch.zeros(2, 90), torch.full((2,), 90, dtype=torch.int32)
KV = torch.zeros(2, 64, 1, 656, dtype=torch.uint8)
SLOTS = torch.zeros(3, dtype=torch.int32)
Q, INDICES = torch.zeros(2, 8, 576, dtype=torch.bfloat16), torch.zeros(2, 1, 64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("topk", lambda: dsa.select(SCORES, ENDS, 64.0)),
        ("topk", lambda: dsa.select(SCORES, ENDS, "64")),
        ("topk", lambda: dsa.select(SCORES, ENDS, torch.tensor([64]))),
        ("scores", lambda: dsa.select(SCORES.tolist(), ENDS, 64)),
        ("starts", lambda: dsa.select(SCORES, ENDS, 64, starts=[0, 0])),
        ("keep_first", lambda: dsa.select(SCORES, ENDS, 64, keep_first=None)),
        ("score", lambda: dsa.indexer_logits(*INDEXER, score=None)),
        ("score", lambda: dsa.indexer_logits(*INDEXER, score="relu")),
        ("clean", lambda: dsa.indexer_logits(*INDEXER, clean=None)),
        ("max_window", lambda: dsa.indexer_logits(*INDEXER, max_window=3.5)),
        ("k", lambda: dsa.indexer_logits(QUERIES, None, *INDEXER[2:])),
        ("score", lambda: dsa.indexer_logits_chunks(*INDEXER, score=None)),
        ("clean", lambda: dsa.indexer_logits_chunks(*INDEXER, clean=None)),
        ("max_bytes", lambda: dsa.indexer_logits_chunks(*INDEXER, max_bytes=None)),
        ("q", lambda: dsa.quantize_index_q(BF16, torch.ones(3, 8))),
        ("q", lambda: dsa.quantize_index_q([1.0], torch.ones(3, 8))),
        ("weights", lambda: dsa.quantize_index_q(BF16[:, None], None)),
        ("k", lambda: dsa.quantize_index_k(BF16.float())),
        ("k", lambda: dsa.quantize_index_k(BF16[0].tolist())),
        ("power_of_two", lambda: dsa.quantize_index_k(BF16, power_of_two=None)),
        ("k", lambda: dsa.store_index_k(BF16[:, :33], SLOTS, KV)),
        ("slots", lambda: dsa.store_index_k(BF16, [0, 1, 2], KV)),
        ("nope", lambda: dsa.store_kv(BF16, BF16, SLOTS, KV)),
        ("layout", lambda: dsa.store_kv(BF16, BF16, SLOTS, KV, layout="index_k")),
        ("layout", lambda: dsa.gather_kv(KV, SLOTS, layout="index_k")),
        ("layout", lambda: dsa.gather_kv(KV, SLOTS, layout=None)),
        ("cache", lambda: dsa.gather_kv(KV.tolist(), SLOTS)),
        ("cache", lambda: dsa.gather_index_k([KV], SLOTS)),
        ("q", lambda: dsa.sparse_attention(Q.float().numpy(), Q[:, :1], INDICES, 0.1)),
        ("sm_scale", lambda: dsa.sparse_attention(Q, Q[:, :1], INDICES, None)),
        ("sm_scale", lambda: dsa.sparse_attention(Q, Q[:, :1], INDICES, "0.1")),
        ("lengths", lambda: dsa.sparse_attention(Q, Q[:, :1], INDICES, 0.1, lengths=[1, 2])),
        ("sink", lambda: dsa.sparse_attention(Q, Q[:, :1], INDICES, 0.1, sink=0.0)),
        ("max_context", lambda: dsa.indexer_logits_paged(QUERIES[None], KV, torch.ones(2, 8), SLOTS, SLOTS, 9.0)),
    ],
)
def test_arguments_of_no_sensible_type_are_named(argument, call):
    with pytest.raises(InputError, match=f"^{argument}: got ") as error:
        call()
    assert len(str(error.value)) < 400, "no array is printed whole"
