"""Warmup: afterwards nothing is built, whatever step comes within the limits; what the limits leave out is not built."""

from __future__ import annotations

import itertools

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.errors import InputError
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.kv_layouts import kv_layout
from dsa_codegen.problem.presets import Model
from dsa_codegen.runtime import dispatch

from fake_gpu import under_public_functions
from layer_inputs import TINY, decode_inputs, prefill_inputs


def on_meta(inputs: dict) -> dict:
    """The same shapes without memory."""
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def prefill_shapes(model: Model, queries: int, tokens: int, weights: torch.dtype) -> dict:
    """Inputs of a prefill step whose tensors are only shapes."""
    few = on_meta(prefill_inputs(model, 1, 1))
    many = {"kv": tokens, "index_k": tokens, "index_k_scale": tokens, "sink": model.heads}
    resized = {
        name: value if value is None else value.new_empty(many.get(name, queries), *value.shape[1:])
        for name, value in few.items()
    }
    return {**resized, "index_weights": resized["index_weights"].to(weights)}


def decode_shapes(model: Model, batch: int, next_n: int, context: int, weights: torch.dtype) -> dict:
    """Inputs of a decode step whose tensors are only shapes."""
    few = on_meta(decode_inputs(model, 1, next_n, 1))
    rows = {name: value.new_empty(batch, *value.shape[1:]) for name, value in few.items() if name in BY_SEQUENCE}
    rows["index_weights"] = rows["index_weights"].to(weights)
    return {**few, **rows, "max_context": context}


BY_SEQUENCE = ("q", "index_q", "index_weights", "lengths", "page_table")


@pytest.fixture
def fake(monkeypatch):
    """A GPU that is not there, which the public functions call with tensors that are only shapes."""
    yield under_public_functions(monkeypatch)
    dispatch.reset()


WEIGHTS = pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
QUERIES, CONTEXTS = (1, 16, 17, 300, 1024, 1025, 8192), (1, 16384, 16385, 65536, 65537, 1_000_000)


@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
@pytest.mark.parametrize(
    "model", [dsa.preset("deepseek-v3.2"), dsa.preset("deepseek-v4-flash"), TINY], ids=lambda model: model.name
)
@WEIGHTS
def test_nothing_is_built_after_warmup(fake, model, weights):
    layer = dsa.Layer(model)
    assert layer.warmup() == len(dispatch._variants)
    before = len(fake.builds)
    for context in CONTEXTS:
        for queries in QUERIES:
            layer.prefill(**prefill_shapes(model, queries, context, weights))
        for batch in (1, 2, 16, 17, 64, 65, 300):
            for next_n in (1, 2):
                layer.decode(**decode_shapes(model, batch, next_n, context, weights))
    tokens = {"nope": (9, model.d_nope), "rope": (9, model.d_rope)}
    cache, index = kv_layout(model.kv_layout, model.page), IndexKLayout(model.page, model.index_head_dim)
    for slots in (torch.empty(n, dtype=dtype, device="meta") for n in (9, 1000) for dtype in (torch.int32, torch.int64)):
        nope, rope = (torch.empty(len(slots), width, dtype=torch.bfloat16, device="meta") for _, width in tokens.values())
        keys = torch.empty(len(slots), model.index_head_dim, dtype=torch.bfloat16, device="meta")
        for power_of_two in (False, True):
            dsa.store_kv(nope, rope, slots, cache.empty(40, "meta"), layout=model.kv_layout, power_of_two=power_of_two)
            dsa.store_index_k(keys, slots, index.empty(40, "meta"), power_of_two=power_of_two)
            dsa.quantize_index_k(keys, power_of_two=power_of_two)
        dsa.gather_kv(cache.empty(40, "meta"), slots, layout=model.kv_layout)
        dsa.gather_index_k(index.empty(40, "meta"), slots)
    assert len(fake.builds) == before
    assert layer.warmup() == 0


@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
@WEIGHTS
def test_warmup_within_limits_builds_less_and_still_enough(fake, weights):
    layer = dsa.Layer(TINY)
    decoding = layer.warmup(max_queries=0, max_batch=16, max_context=16384, next_n=(3,))
    assert decoding
    before = len(fake.builds)
    for batch in (1, 2, 16):
        layer.decode(**decode_shapes(TINY, batch, 3, 16384, weights))
    assert len(fake.builds) == before
    layer.prefill(**prefill_shapes(TINY, 4, 100, weights))  # beyond the limits: works, and builds
    assert len(fake.builds) > before
    prefilling = layer.warmup(max_queries=1024, max_batch=0)
    before = len(fake.builds)
    for queries, context in itertools.product((1, 300, 1024), CONTEXTS):
        layer.prefill(**prefill_shapes(TINY, queries, context, weights))
    assert prefilling
    assert len(fake.builds) == before
    assert layer.warmup() > decoding  # of what the limits left out


@pytest.mark.parametrize("limits", [{"max_queries": -1}, {"max_batch": -1}, {"max_context": -1}, {"next_n": ()}], ids=str)
def test_warmup_refuses(limits):
    with pytest.raises(InputError, match=f"^{next(iter(limits))}"):
        dsa.Layer(TINY).warmup(**limits)
