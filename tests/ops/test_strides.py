"""Strides of dimensions of size 1: torch leaves any there, and nobody may read them."""

from __future__ import annotations

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.ops.indexer import OP as INDEXER
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.ops.indexer_paged import OP as INDEXER_PAGED
from dsa_codegen.ops.indexer_paged import IndexerPagedSizes, IndexerPagedSpec
from dsa_codegen.problem.checks import settled
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case

from layer_inputs import TINY, decode_inputs, prefill_inputs
from support import H200, arguments

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def odd(value):
    """The same tensor, with a stride of 7 in every dimension of size 1."""
    if not isinstance(value, torch.Tensor) or 1 not in value.shape:
        return value
    strides = [7 if size == 1 else stride for size, stride in zip(value.shape, value.stride(), strict=True)]
    return value.as_strided(value.shape, strides)


@pytest.mark.parametrize(
    ("shape", "strides", "settles"),
    [
        ((1, 4), (7, 1), (4, 1)),
        ((3, 1, 4), (8, 7, 1), (8, 4, 1)),
        ((5, 1), (1, 7), (1, 1)),
        ((1, 1), (7, 9), (1, 1)),
        ((1, 3, 4), (7, 8, 1), (24, 8, 1)),
        ((2, 3), (5, 1), (5, 1)),
    ],
)
def test_strides_of_size_one_become_those_of_packed_dimensions(shape, strides, settles):
    assert settled(torch.zeros(64).as_strided(shape, strides)).stride() == settles


def test_a_tensor_that_needs_nothing_is_left_alone():
    for tensor in (torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(0, 1)):
        assert settled(tensor) is tensor


def test_descriptors_of_one_block_and_of_one_key_can_be_encoded():
    """TMA takes strides of whole 16 bytes, whatever is behind them."""
    for op, spec, sizes, config in (
        (INDEXER_PAGED, IndexerPagedSpec(8, 64), IndexerPagedSizes(1, 1), "gluon"),
        (INDEXER, IndexerSpec(8, 64), IndexerSizes(1, 1), "gluon"),
    ):
        case = Case(sizes, "full" if op is INDEXER_PAGED else "causal")
        inputs = op.inputs(spec, case, Draw(0))
        if "cache" in inputs:
            inputs["cache"] = inputs["cache"][:1]
        spec, sizes, bound = op.bind(*map(odd, arguments(op, spec, inputs)))
        config = op.default_config(spec, sizes, H200, config)
        (launch,) = op.launches(spec, config, bound, op.allocate(spec, bound), H200)
        views = [value for value in launch.args if hasattr(value, "encoded")]
        assert len(views) == 2
        for view in views:
            assert all(stride % 16 == 0 for stride in view.strides[:-1])  # 4-byte scales come in pages of 64


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_gives_the_same(device):
    layer = dsa.Layer(TINY)
    for inputs, call in (
        (prefill_inputs(TINY, 1, 1, device), layer.prefill),
        (decode_inputs(TINY, 1, 1, 1, device), layer.decode),
    ):
        if "kv_cache" in inputs:
            inputs["kv_cache"], inputs["index_cache"] = inputs["kv_cache"][:1], inputs["index_cache"][:1]
            inputs["page_table"] = torch.zeros_like(inputs["page_table"])
        plain = call(**inputs)
        strided = call(**{name: odd(value) for name, value in inputs.items()})
        assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))
