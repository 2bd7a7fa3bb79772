"""Steps of attention some of whose rows are broken or have no token, and what must come of them."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.problem.draw import Draw
from dsa_codegen.runtime import dispatch

FP8 = torch.float8_e4m3fn
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def under(device, op, config):
    """The kernels of this config on a GPU; on the CPU there is one way only."""
    return dispatch.override(ops.get(op), config) if device == "cuda" else contextlib.nullcontext()


def prefill_inputs(device, lengths, sink, heads=16):
    draw = Draw(7, device)
    q = draw.normal(6, heads, 576, dtype=torch.bfloat16)
    indices = draw.integers(0, 100, 6, 1, 64)
    indices[1] = -1
    indices[3] = 100
    q[1], q[3], q[4, 2, 5] = math.nan, math.inf, math.nan
    return {
        "q": q,
        "kv": draw.normal(100, 1, 576, dtype=torch.bfloat16, scale=0.1),
        "indices": indices,
        "sm_scale": 576**-0.5,
        "lengths": torch.tensor([64, 64, 0, 40, 64, 3], dtype=torch.int32, device=device) if lengths else None,
        "sink": draw.normal(heads) if sink else None,
    }


def assert_padding(out, lse, lengths):
    """Rows 1 and 3 have no token, row 2 none where lengths count; of row 4 one head is broken."""
    empty = [1, 3, *([2] if lengths else [])]
    assert not out[empty].any()
    assert (lse[empty] == -math.inf).all()
    assert out[4, 2].isnan().all()
    assert lse[4, 2].isnan()
    assert out[4, [0, 1, 3]].isfinite().all()
    assert out[[0, 5]].isfinite().all()
    assert lse[[0, 5]].isfinite().all()
